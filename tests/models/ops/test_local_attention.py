"""Attention within a window against a full mask, and rotary positions against complex numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from models.ops.attention import exported_attention
from models.ops.local_attention import local_attention, split_into_blocks, window_bias
from models.ops.packing import Packing, Padded
from models.ops.rotary import rotate, rotation

LENGTHS = (1, 40, 16, 17, 33, 2, 100)


@pytest.mark.parametrize("lengths", [LENGTHS, (48, 48, 48), (50, 50), (100,)])
@pytest.mark.parametrize("window", [0, 1, 5, 16, 17, 46])
def test_windows_equal_a_full_mask(window, lengths):
    """Values and gradients in fp64, of texts shorter and longer than a window and than a block."""
    torch.manual_seed(0)
    packing = Packing.from_lengths(lengths)
    q, k, v = torch.randn(3, sum(lengths), 2, 4, dtype=torch.float64).requires_grad_().unbind()
    distance = (torch.arange(sum(lengths))[:, None] - torch.arange(sum(lengths))).abs()
    mask = (distance <= window) & (packing.rows[:, None] == packing.rows)
    expected = scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask).transpose(0, 1)
    blocks = split_into_blocks(packing, window)
    found = local_attention(q, k, v, blocks)
    torch.testing.assert_close(found, expected.flatten(1), rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(found)
    theirs, ours = (torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (expected.flatten(1), found))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_windows_that_hide_nothing_have_no_blocks():
    assert split_into_blocks(Packing.from_lengths([3, 6]), 5) is None
    assert split_into_blocks(Packing.from_lengths([3, 7]), 5) is not None
    assert split_into_blocks(Packing.from_lengths([]), 0) is None


def test_memory_of_blocks_grows_with_the_tokens():
    """8,192 tokens need a mask of 3 blocks for each token, not one of all tokens."""
    blocks = split_into_blocks(Packing.from_lengths([8192, 1]), 64)
    assert blocks.mask.numel() == 129 * 64 * 3 * 64


@pytest.mark.parametrize("window", [0, 3])
def test_windows_of_an_exported_graph_are_the_same(window):
    torch.manual_seed(0)
    packing = Packing.from_lengths([9, 4])
    q, k, v = torch.randn(3, 13, 2, 4, dtype=torch.float64)
    expected = local_attention(q, k, v, split_into_blocks(packing, window))
    padded = [torch.nn.utils.rnn.pad_sequence(x.split((9, 4)), batch_first=True).flatten(0, 1) for x in (q, k, v)]
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    grid = Padded.from_shape(mask, mask)
    found = exported_attention(*padded, grid, grid, False, window_bias(window), None)
    torch.testing.assert_close(found[mask.flatten()], expected)


def test_rotation_multiplies_by_complex_numbers():
    """Pair i of position p by e^(i p theta^(-2 i / K)), which products of vectors see as a distance only."""
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 2, 700, 8000])
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    found = rotate(x, rotation(positions, 100.0, 6, torch.float64))
    angles = positions[:, None, None].double() / 100.0 ** (torch.arange(3, dtype=torch.float64) / 3)
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(found, torch.cat([turned.real, turned.imag], -1), rtol=1e-3, atol=1e-3)  # fp32 angles
    torch.testing.assert_close(found[:3], torch.cat([turned.real, turned.imag], -1)[:3], rtol=1e-6, atol=1e-6)


def test_rotation_of_low_precision_is_computed_in_fp32():
    x = torch.randn(4, 1, 8).bfloat16()
    found = rotate(x, rotation(torch.arange(4), 1e4, 8, torch.bfloat16))
    expected = rotate(x.float(), rotation(torch.arange(4), 1e4, 8, torch.float32)).bfloat16()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
