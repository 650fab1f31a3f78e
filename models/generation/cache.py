"""The cache of keys and values, with which generation computes each token once.

The contract between a backbone and generation (models/generation/generate.py):

    hidden, packing = backbone(inputs, cache)

With a cache, `inputs` has only the *new* tokens of every sequence, packed as always: first the prompts, of any lengths,
then one token each. In an encoder-decoder these are the decoder's tokens. Its first inputs also have the encoder's ids.
Later inputs have none, since `cache.cross` has the keys and values of the cross-attention. The backbone calls

    positions = cache.extend(packing)                   # once, before its layers; (T,), continuing the cached ones
    cache.append(layer, key, value)                     # in each layer: (T, H, K)
    out = cache.attend(layer, query, packing, ...)      # (T, H, K) -> (T, H * K)

There is no padding on the left: every sequence starts at slot 0, and its length says where it ends, so the caller needs
no mask. Shapes: models/ops/packing.py; S is the longest cached length. The cache is not for training, since it is
changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.packing import Packing, pad_sequences, to_device

INITIAL_SLOTS = 64  # doubled whenever they are full


class Cache:
    """The keys and values of B sequences in every layer, for one call of generate.

    lengths: the number of cached tokens of each sequence, those announced by the last `extend` included.
    cross: the cache of the encoder, which an encoder-decoder makes at its first inputs, as Cache(causal=False).
    """

    def __init__(self, causal: bool = True):
        self.causal = causal
        self.lengths: tuple[int, ...] = ()
        self.cross: Cache | None = None
        self._layers: list[Tensor] = []  # (2, B, H, slots, K) each: keys and values
        self._origins: tuple[int, ...] = ()  # for each row the index of its prompt
        self._slots = INITIAL_SLOTS
        self._rows = self._positions = torch.empty(0)  # (T,): the row of each new token, and its position in the row
        self._mask: Tensor | None = None

    @property
    def longest(self) -> int:
        """S, the length of the longest cached sequence."""
        return max(self.lengths, default=0)

    def extend(self, packing: Packing) -> Tensor:
        """Announce new tokens; return (T,), the position of each in its sequence."""
        device = packing.cu_seqlens.device
        if not self.lengths:
            self.lengths = (0,) * len(packing.lengths)
            self._origins = tuple(range(len(packing.lengths)))
        counts = packing.cu_seqlens.diff().long()
        rows = torch.arange(len(counts), device=device)
        self._rows = torch.repeat_interleave(rows, counts, output_size=sum(packing.lengths))
        self._positions = to_device(torch.tensor(self.lengths), device)[self._rows] + packing.positions
        self.lengths = tuple(old + new for old, new in zip(self.lengths, packing.lengths, strict=True))
        while self._slots < self.longest:
            self._slots *= 2
        self._mask = None
        return self._positions

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the keys and values, (T, H, K), of the tokens announced by `extend`; call it in the order of layers."""
        if layer == len(self._layers):
            shape = (2, len(self.lengths), key.shape[1], self._slots, key.shape[2])
            self._layers.append(key.new_zeros(shape))  # no torch.empty: an attention weight of 0 times NaN is NaN
        missing = self._slots - self._layers[layer].shape[3]
        if missing:
            self._layers[layer] = F.pad(self._layers[layer], (0, 0, 0, missing))
        self._layers[layer][:, self._rows, :, self._positions] = torch.stack((key, value), 1)  # (T, 2, H, K)

    def attend(
        self, layer: int, query: Tensor, packing: Packing, *, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Return softmax(q k^T * scale + bias) v over all cached tokens, (T, H * K), as packed_attention does.

        query: (T, H, K), packed as `packing` says; in a causal cache those of the tokens just announced.
        bias: (H, N, S) or (B, H, N, S), N the largest number of new tokens of a sequence.
        scale: 1 / sqrt(K) unless given.
        """
        keys, values = self._layers[layer][:, :, :, : self.longest]  # (B, H, S, K)
        single = max(packing.lengths) == 1
        # (B, H, N, K); the results of the padding behind shorter prompts are discarded
        q = query.unsqueeze(2) if single else pad_sequences(query, packing, 0.0).transpose(1, 2)
        mask = self._attention_mask(packing)
        if bias is not None:
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
        if single:
            return out.flatten(1)
        return torch.cat([x[:, :n].transpose(0, 1) for x, n in zip(out, packing.lengths, strict=True)]).flatten(1)

    def _attention_mask(self, packing: Packing) -> Tensor | None:
        """Return (B, 1, N, S): whether a new token attends to a cached one; None where every pair does."""
        single = max(packing.lengths) == 1
        if min(self.lengths) == self.longest and (single or not self.causal):
            return None
        if self._mask is None:
            device = packing.cu_seqlens.device
            slots = torch.arange(self.longest, device=device)
            if self.causal:
                ends = pad_sequences(self._positions, packing, 0)[:, None, :, None]
            else:
                ends = to_device(torch.tensor(self.lengths), device)[:, None, None, None] - 1
            self._mask = slots <= ends
        return self._mask

    def reorder(self, rows: Sequence[int]) -> None:
        """Make row i continue the old row rows[i]. Beams are reordered or repeated, and finished ones removed."""
        if list(rows) == list(range(len(self.lengths))):
            return
        origins = tuple(self._origins[row] for row in rows)
        if self.cross is not None and origins != self._origins:  # beams of one source share its keys
            self.cross.reorder(rows)
        self.lengths = tuple(self.lengths[row] for row in rows)
        self._origins = origins
        self._mask = None
        if self._layers:
            index = to_device(torch.tensor(rows), self._layers[0].device)
            self._layers = [stored.index_select(1, index) for stored in self._layers]
