"""Attention over packed sequences, and the self-attention module of the encoders.

packed_attention chooses one of several equal computations:
- on a CPU with dropout, one node of the autograd graph (dropped_attention.py);
- where all sequences have one length, one call on views of the packed tensors (padded_attention without padding);
- for sequences of several lengths, on a CPU one call for each run of equal lengths (attention_by_runs);
- on a GPU in bf16 or fp16, a flash kernel for packed sequences (flash_attention);
- on a GPU in fp32 or with a bias, one call with padding (padded_attention);
- in an exported graph, one call on tensors that are padded already (exported_attention).
Shapes: models/ops/packing.py; S is the number of keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import groupby
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ops.dropped_attention import Runs, dropped_attention
from models.ops.joint_linear import joint_linear
from models.ops.layers import product_dtype
from models.ops.packing import Packing, Padded, aligned

# A term of the scores. A function of (query length, key length) returns it for one sequence, (H, L, S). A tensor has it
# for all padded sequences, (1, H, L, S) or (B, H, L, S), with -inf at the padding of the keys (pad_bias).
Bias: TypeAlias = Callable[[int, int], Tensor] | Tensor

FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_HEAD_WIDTH = 192  # the widest head that the backward of the flash kernel supports on every GPU
# The arguments of torch.ops.aten._flash_attention_forward that flash_attention relies on; from torch 2.6 to 2.14 other
# keyword arguments were added behind them.
FLASH_ARGUMENTS = (
    *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"),
    *("return_debug_mask", "scale"),
)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    key_packing: Packing | None = None,
    causal: bool = False,
    bias: Bias | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(q k^T * scale + bias) v inside each sequence (Vaswani et al. 2017, eq. 1), (T, H * K).

    query: (T, H, K).
    key, value: (T, H, K); in cross-attention (S, H, K), with the borders of `key_packing`.
    causal: a token attends to no later token.
    bias: added to the scores of every sequence (T5's relative positions).
    scale: 1 / sqrt(K) unless given.
    dropout: the rate at which attention weights are dropped.

    Raises ValueError for causal attention to other tokens than those of the queries, which has no defined order.
    """
    keys = key_packing or packing
    if isinstance(packing, Padded):
        return exported_attention(query, key, value, packing, keys, causal, bias, scale)
    if causal and packing.lengths != keys.lengths:
        raise ValueError("causal attention needs queries and keys of the same tokens")
    if not len(query):
        # All inputs stay in the graph, so that a rank without examples has gradients, which are zero.
        empty = query + key.sum(0) + value.sum(0)
        return (empty if bias is None else empty + (bias if isinstance(bias, Tensor) else bias(1, 1)).sum()).flatten(1)
    on_cpu = query.device.type == "cpu"
    if not isinstance(bias, Tensor):
        full_precision_on_cpu = on_cpu and query.dtype in (torch.float32, torch.float64)
        if 0 < dropout < 1 and full_precision_on_cpu and not torch.compiler.is_compiling():
            runs = _attention_runs(packing, keys)
            biases = [] if bias is None else [bias(length, key_length) for _, length, key_length in runs]
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            return dropped_attention(query, key, value, runs, biases, causal, scale, dropout).flatten(1)
        if on_cpu and not (packing.is_uniform and keys.is_uniform):
            return attention_by_runs(query, key, value, packing, keys, causal, bias, scale, dropout)
    if bias is None and _can_use_flash(query, key, value, packing, keys):
        return flash_attention(query, key, value, packing, keys, causal, scale, dropout)
    return padded_attention(query, key, value, packing, keys, causal, bias, scale, dropout)


def attention_by_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    key_packing: Packing,
    causal: bool,
    bias: Callable[[int, int], Tensor] | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Return the result of packed_attention, computed in one call for each run of sequences of equal length."""
    runs = _attention_runs(packing, key_packing)
    outputs = []
    tokens, keys = [count * length for count, length, _ in runs], [count * key_length for count, _, key_length in runs]
    # Split once: the backward of a slice would write a whole tensor of zeros for each run.
    pieces = zip(torch.split(query, tokens), torch.split(key, keys), torch.split(value, keys), strict=True)
    for (count, length, key_length), (q, k, v) in zip(runs, pieces, strict=True):
        q = torch.unflatten(q, 0, (count, length)).transpose(1, 2)  # (B, H, L, K)
        k, v = (torch.unflatten(x, 0, (count, key_length)).transpose(1, 2) for x in (k, v))
        mask = None if bias is None else _with_causal_mask(bias(length, key_length), causal)
        is_causal = causal and mask is None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scale
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
    return torch.cat(outputs)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    key_packing: Packing,
    causal: bool,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Return the result of packed_attention, computed by the flash kernel for packed sequences (Dao 2023).

    PyTorch's public function for it, varlen_attn, has no dropout. This private one has, and a backward. Where queries
    and keys of a sequence differ in number, its causal mask begins at the last key; packed_attention refuses that.
    """
    borders = (packing.cu_seqlens, key_packing.cu_seqlens, packing.max_length, key_packing.max_length)
    flash = torch.ops.aten._flash_attention_forward
    out: Tensor = flash(query, key, value, *borders, dropout, causal, False, scale=scale)[0]  # (T, H, K)
    return out.flatten(1)


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    key_packing: Packing,
    causal: bool,
    bias: Bias | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Return the result of packed_attention, computed in one call with all sequences padded to the longest.

    It is for a GPU, where many small calls cost more than the padding. No other operation of a model pads. Sequences of
    one length are not copied.
    """
    q = to_padded(query, packing).transpose(1, 2)  # (B, H, L, K)
    k, v = (to_padded(x, key_packing).transpose(1, 2) for x in (key, value))
    padding = None if causal or key_packing.is_uniform else key_packing  # a causal mask hides the padding already
    if isinstance(bias, Tensor):
        mask: Tensor | None = bias
    elif bias is not None:
        mask = _with_causal_mask(bias(packing.max_length, key_packing.max_length), causal)  # (H, L, S)
        mask = mask if padding is None else pad_bias(mask, key_packing.max_length, padding, product_dtype(query))
    else:
        mask = None if padding is None else padding.padding_mask.to(product_dtype(query))[..., : padding.max_length]
    is_causal = causal and mask is None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scale)
    return to_packed(out.transpose(1, 2).flatten(0, 1), packing).flatten(1)


def exported_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Padded,
    key_packing: Packing,
    causal: bool,
    bias: Bias | None,
    scale: float | None,
) -> Tensor:
    """Return the result of packed_attention for sequences that are padded, without dropout.

    Where padding has no token to attend to, its scores are all the lowest number, so that no NaN arises.
    """
    q = to_padded(query, packing).transpose(1, 2)  # (B, H, L, K)
    k, v = (to_padded(x, key_packing).transpose(1, 2) for x in (key, value))
    hidden = ~key_packing.is_token[:, None, None]  # (B, 1, 1, S)
    if causal:
        places = torch.arange(key_packing.max_length, device=q.device)
        hidden = hidden | (places > places[:, None])
    mask: Tensor = torch.zeros_like(hidden, dtype=q.dtype)
    if bias is not None:
        mask = mask + (bias if isinstance(bias, Tensor) else bias(packing.max_length, key_packing.max_length))
    mask = mask.masked_fill(hidden, torch.finfo(q.dtype).min)
    return join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))


def join_heads(x: Tensor) -> Tensor:
    """Return (B * L, H * K) of (B, H, L, K), copied: an exporter may compute x in another layout than it traced."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(0, 1).flatten(1)


def pad_bias(bias: Tensor, num_keys: int, padding: Packing | None, dtype: torch.dtype) -> Tensor:
    """Return the bias of all padded sequences, (1, H, L, S), or (B, H, L, S) with -inf at the padding of the keys.

    Call it once for all layers that share the bias. The memory-efficient kernel takes such a tensor as it is, so that
    no layer writes scores; other kernels take no bias. (flex_attention would compute the bias in the kernel, but it
    compiles each kernel when it is first called, and its gradients cannot be tested without a GPU.)

    bias: (H, L, S), or with columns to spare, up to aligned(S), which saves a copy. num_keys: S.
    padding: the packing of the keys; None where nothing is to be hidden: sequences of one length, or a causal bias.
    dtype: of the scores.
    """
    missing = aligned(num_keys) - bias.shape[-1]
    bias = F.pad(bias, (0, missing)) if missing else bias
    mask = bias.to(dtype).contiguous().unsqueeze(0)  # the kernel would copy other layouts in each layer
    if padding is not None:
        mask = mask + padding.padding_mask.to(dtype)
    return mask[..., :num_keys]


def _with_causal_mask(bias: Tensor, causal: bool) -> Tensor:
    """Return the bias, (H, L, S), with -inf above the diagonal if `causal`."""
    return bias.masked_fill(~torch.ones_like(bias, dtype=torch.bool).tril(), float("-inf")) if causal else bias


def _attention_runs(queries: Packing, keys: Packing) -> Runs:
    """Return (count, query length, key length) of each run of neighbouring sequences that agree in both lengths."""
    pairs = groupby(zip(queries.lengths, keys.lengths, strict=True))
    return tuple((len(list(same)), length, key_length) for (length, key_length), same in pairs)


# Padding


def to_padded(x: Tensor, packing: Packing) -> Tensor:
    """Return (B, L, H, K) of (T, H, K): a view if all sequences have one length."""
    if not packing.is_uniform:
        x = _Pad.apply(x, packing.tokens_of_slots, packing.slots)
    return torch.unflatten(x, 0, packing.shape)


def to_packed(x: Tensor, packing: Packing) -> Tensor:
    """Return (T, H, K) of (B * L, H, K), without the padding."""
    if packing.is_uniform:
        return x
    out: Tensor = _Unpad.apply(x, packing.slots)
    return out


class _Pad(torch.autograd.Function):
    """The gather x[tokens_of_slots]. The gradients of the padding, which nothing reads, are zero and left out.

    The backward of an index adds where indices repeat, as they do in the padding: it would sort them in each layer.
    Here it is a gather too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens_of_slots: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return x.index_select(0, tokens_of_slots)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slots,) = ctx.saved_tensors
        return grad.index_select(0, slots), None, None


class _Unpad(torch.autograd.Function):
    """The gather x[slots], where each slot is read at most once: the backward writes, and adds nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.num_slots = len(x)
        return x.index_select(0, slots)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slots,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_slots, *grad.shape[1:]).index_copy_(0, slots, grad), None


# The flash kernel


def _can_use_flash(query: Tensor, key: Tensor, value: Tensor, packing: Packing, key_packing: Packing) -> bool:
    """Return whether flash_attention is possible and useful: SDPA itself takes flash for sequences of one length."""
    if query.device.type != "cuda" or (packing.is_uniform and key_packing.is_uniform):
        return False
    tensors, borders = (query, key, value), (packing.cu_seqlens, key_packing.cu_seqlens)
    return (
        query.dtype in FLASH_DTYPES
        and all(x.dtype == query.dtype and x.stride(-1) == 1 for x in tensors)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= FLASH_HEAD_WIDTH
        and all(x.dtype == torch.int32 and x.is_contiguous() and x.device == query.device for x in borders)
        and torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
        and has_flash(query.device)
    )


@functools.lru_cache(maxsize=16)
def has_flash(device: torch.device) -> bool:
    """Return whether a GPU and this PyTorch have the flash kernel for packed sequences: NVIDIA's from sm80 on."""
    operation = getattr(torch.ops.aten, "_flash_attention_forward", None)
    if operation is None or torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return False
    schema = operation.default._schema
    names = tuple(argument.name for argument in schema.arguments)
    if names[: len(FLASH_ARGUMENTS)] != FLASH_ARGUMENTS or len(schema.returns) < 2:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


class SelfAttention(nn.Module):
    """Multi-head self-attention. `bias`: whether the query, key and value projections have one; key_bias: the key's."""

    def __init__(
        self, hidden_size: int, num_heads: int, dropout: float, bias: bool = True, key_bias: bool | None = None
    ):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.key = nn.Linear(hidden_size, hidden_size, bias=bias if key_bias is None else key_bias)
        self.value = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, packing: Packing, bias: Bias | None = None) -> Tensor:
        """(T, D) -> (T, D), or with a Selection (R, D). bias: a term of the scores of whole sequences."""
        # Queries are computed for the selected tokens only, if the host knows how many of them each sequence has.
        queries = packing if packing.lengths and bias is None else packing.whole
        if queries is packing.whole:
            projected = joint_linear(x, (self.query, self.key, self.value))
        else:
            projected = [self.query(queries.take(x)), *joint_linear(x, (self.key, self.value))]
        q, k, v = (torch.unflatten(y, -1, (self.num_heads, -1)) for y in projected)
        dropout = self.dropout if self.training else 0.0
        attended = packed_attention(q, k, v, queries, key_packing=packing.whole, bias=bias, dropout=dropout)
        out: Tensor = self.output(attended if queries is packing else packing.take(attended))
        return out
