"""Packed micro-batches: the sequences lie one after another, without padding.

Legend of shapes, used in every comment of this package:

    B  sequences in a micro-batch          D  hidden_size
    T  tokens in a micro-batch             H  attention heads
    L  length of one sequence              K  D // H, the width of one head

The tokens of a micro-batch form one flat (T,) tensor, T = the sum of the lengths. There are no pad tokens, so none is
computed, and none can change a result. Only attention and pooling need to know where a sequence begins; `Packing`
tells them. The patches of an image are a sequence like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

KEY_ALIGNMENT = 16  # numbers; PyTorch asks for 8 or 16, according to its version


@dataclass(eq=False)  # not frozen: torch.compile up to 2.11 would make a graph for each number of sequences
class Packing:
    """The borders of the sequences of a packed micro-batch.

    lengths: the length of each sequence, on the host, so that no kernel launch waits for the device.
    cu_seqlens: (B + 1,) int32, cumulative lengths from 0 to T, on the model's device.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str | None = None) -> Packing:
        """Return the packing of sequences of these lengths."""
        return cls(tuple(lengths), cumulative_lengths(lengths, device))

    @property
    def whole(self) -> Packing:
        """The packing of all tokens: this one; that of a Selection is another."""
        return self

    def take(self, x: Tensor) -> Tensor:
        """Return the rows of x, (T, ...), that are needed: all; those of a Selection are fewer."""
        return x

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L) of the padded sequences, L the longest."""
        return len(self.lengths), self.max_length

    @property
    def first_tokens(self) -> Tensor:
        """(B,) int64: the index of the first token of each sequence."""
        return self.cu_seqlens[:-1].long()

    @property
    def last_tokens(self) -> Tensor:
        """(B,) int64: the index of the last token of each sequence."""
        return self.cu_seqlens[1:].long() - 1

    @cached_property
    def is_token(self) -> Tensor:
        """(B, L) bool: True at the tokens of the padded sequences, False at the padding."""
        places = torch.arange(self.max_length, device=self.cu_seqlens.device)
        return places < self.cu_seqlens.diff()[:, None]

    def running_sum(self, x: Tensor) -> Tensor:
        """Return (T,) int64: the sums of x, (T,), from the first token of each sequence to each token."""
        sums = torch.cat([x.new_zeros(1), x.cumsum(0)])
        before = torch.repeat_interleave(sums[self.first_tokens], self.cu_seqlens.diff(), output_size=len(x))
        return sums[1:] - before

    @cached_property
    def rows(self) -> Tensor:
        """(T,) int64: the index of the sequence that each token belongs to."""
        sequences = torch.arange(len(self.lengths), device=self.cu_seqlens.device)
        return torch.repeat_interleave(sequences, self.cu_seqlens.diff().long(), output_size=sum(self.lengths))

    @cached_property
    def positions(self) -> Tensor:
        """(T,) int64: the position of each token within its own sequence, from 0."""
        total = sum(self.lengths)
        starts, lengths = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff().long()
        starts_of_tokens = torch.repeat_interleave(starts, lengths, output_size=total)
        return torch.arange(total, device=starts.device) - starts_of_tokens

    @cached_property
    def max_length(self) -> int:
        """The length L of the longest sequence."""
        return max(self.lengths, default=0)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all sequences have one length, so that (B, L, ...) is a view of (T, ...)."""
        return len(set(self.lengths)) < 2

    @cached_property
    def slots(self) -> Tensor:
        """(T,) int64: the place of each token among the B * L of the padded sequences."""
        return self.rows * self.max_length + self.positions

    @cached_property
    def tokens_of_slots(self) -> Tensor:
        """(B * L,) int64: the token at each place of the padded sequences; the padding repeats the last token."""
        starts, ends = self.cu_seqlens[:-1, None].long(), self.cu_seqlens[1:, None].long()
        tokens = starts + torch.arange(self.max_length, device=starts.device)
        return torch.minimum(tokens, ends - 1).clamp(min=0).flatten()

    @cached_property
    def padding_mask(self) -> Tensor:
        """(B, 1, 1, L) fp32: 0 at the tokens of a sequence, -inf behind them, to be added to the scores of keys.

        The memory-efficient kernel reads rows that begin at multiples of KEY_ALIGNMENT and copies other masks in each
        layer. So L is rounded up here.
        """
        positions = torch.arange(aligned(self.max_length), device=self.cu_seqlens.device)
        is_padding = positions >= self.cu_seqlens.diff()[:, None, None, None]
        return torch.zeros_like(is_padding, dtype=torch.float32).masked_fill_(is_padding, float("-inf"))

    @cached_property
    def runs(self) -> list[tuple[slice, int, int]]:
        """(tokens, count, length) for each run of neighbouring sequences of equal length.

        The loader sorts a micro-batch by length, so runs are long. A run is a (count, length, ...) view, not a copy.
        """
        runs: list[tuple[slice, int, int]] = []
        start = first = 0
        for i, length in enumerate(self.lengths):
            if i + 1 == len(self.lengths) or self.lengths[i + 1] != length:
                count = i + 1 - first
                runs.append((slice(start, start + count * length), count, length))
                start, first = start + count * length, i + 1
        return runs


@dataclass(eq=False)
class Selection(Packing):
    """The tokens whose last hidden states a head reads, as a packing of these tokens alone.

    The last layer of a backbone takes it in the place of its packing: it reads (T, D) and returns (R, D).
    `lengths` and `cu_seqlens` are empty where the device chose the tokens: the host then does not know how many each
    sequence has.

    tokens: (R,) int64, the index of each in the micro-batch, sequence after sequence. An index may repeat.
    micro_batch: the packing of all T tokens.
    are_last: whether they are the last token of each sequence. In a causal model it attends to all of its sequence.
    """

    tokens: Tensor
    micro_batch: Packing
    are_last: bool = False

    @classmethod
    def of_each_sequence(cls, tokens: Tensor, micro_batch: Packing, are_last: bool = False) -> Selection:
        """Return the selection of (B, N) indices, N of each sequence."""
        count, length = tokens.shape
        ends = torch.arange(count + 1, dtype=torch.int32, device=tokens.device) * length
        lengths = (length,) * count if micro_batch.lengths else ()
        return cls(lengths, ends, tokens.flatten(), micro_batch, are_last)

    @classmethod
    def of_any(cls, tokens: Tensor, micro_batch: Packing) -> Selection:
        """Return the selection of (R,) ascending indices, any number of each sequence."""
        return cls((), micro_batch.cu_seqlens[:0], tokens, micro_batch)

    @property
    def whole(self) -> Packing:
        """The packing of all tokens."""
        return self.micro_batch

    def take(self, x: Tensor) -> Tensor:
        """Return the rows of the selected tokens, (R, ...), of (T, ...)."""
        return x.index_select(0, self.tokens)


@dataclass(eq=False)
class Padded(Packing):
    """Padded sequences for an exported graph: T = B * L, where the padding is computed and hidden from the tokens.

    A graph takes any number of sequences of any length, so no number here is one of the host: `lengths` is empty.

    grid: (B, L).
    mask: (B, L) bool, True at the tokens, on either side of the padding; None without padding.
    """

    grid: tuple[int, int]
    mask: Tensor | None

    @classmethod
    def from_shape(cls, x: Tensor, mask: Tensor | None) -> Padded:
        """Return the packing of padded tokens x, (B, L, ...)."""
        count, length = x.shape[:2]
        borders = torch.arange(count + 1, dtype=torch.int32, device=x.device) * length
        return cls((), borders, (count, length), mask)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)"""
        return self.grid

    @property
    def max_length(self) -> int:
        """The length L with its padding."""
        return self.grid[1]

    @property
    def is_uniform(self) -> bool:
        """True: (B, L, ...) is a view of (T, ...)."""
        return True

    @property
    def is_token(self) -> Tensor:
        """(B, L) bool: True at the tokens."""
        every = self.cu_seqlens.new_ones(self.grid, dtype=torch.bool)
        return every if self.mask is None else self.mask

    @property
    def first_tokens(self) -> Tensor:
        """(B,) int64: the index of the first token of each sequence."""
        return self.cu_seqlens[:-1].long() + self.is_token.long().argmax(1)

    @property
    def last_tokens(self) -> Tensor:
        """(B,) int64: the index of the last token of each sequence."""
        return self.cu_seqlens[:-1].long() + self.is_token.long().cumsum(1).argmax(1)

    @property
    def positions(self) -> Tensor:
        """(T,) int64: the position of each token among the tokens of its sequence, from 0; 0 at padding before them."""
        return (self.is_token.long().cumsum(1) - 1).clamp(min=0).flatten()

    @property
    def padding_mask(self) -> Tensor:
        """(B, 1, 1, L) fp32: 0 at the tokens, the lowest number at padding, to be added to the scores of keys.

        With -inf, the scores of padding without a token to attend to would be NaN.
        """
        mask = self.is_token[:, None, None]
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, torch.finfo(torch.float32).min)

    def running_sum(self, x: Tensor) -> Tensor:
        """Return (T,) int64: the sums of x, (T,), from the first token of each sequence to each token."""
        return (torch.unflatten(x, 0, self.grid) * self.is_token).cumsum(1).flatten()

    def mean(self, x: Tensor, skip: int = 0) -> Tensor:
        """Return (B, D), the mean over the tokens of each sequence without its first `skip` places. x: (T, D)."""
        weights = self.is_token[:, skip:, None].to(x.dtype)
        return (torch.unflatten(x, 0, self.grid)[:, skip:] * weights).sum(1) / weights.sum(1)


def cumulative_lengths(lengths: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Return (B + 1,) int32: 0 and the running sums of the lengths."""
    sums = F.pad(torch.tensor(list(lengths), dtype=torch.int64).cumsum(0), (1, 0)).to(torch.int32)
    return sums if device is None else to_device(sums, device)


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor of the host on `device`; to a GPU through pinned memory, so that the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)


def aligned(num_keys: int) -> int:
    """Return `num_keys`, rounded up to a multiple of KEY_ALIGNMENT."""
    return -(-num_keys // KEY_ALIGNMENT) * KEY_ALIGNMENT


def pad_sequences(x: Tensor, packing: Packing, fill: float) -> Tensor:
    """Return (B, L, ...) of (T, ...), L the longest sequence, with `fill` behind the end of each sequence."""
    out = x.new_full((len(packing.lengths), packing.max_length, *x.shape[1:]), fill)
    return out.index_put_((packing.rows, packing.positions), x)
