"""Keys and values of the tokens that were already read, so that generation computes each token once.

The contract between a backbone and generation (models/generation/generate.py):

    hidden, packing = backbone(inputs, cache)

With a cache, `inputs` has only the *new* tokens of every sequence, packed as ever: first the prompts, of any lengths,
then one token each. In an encoder-decoder these are the decoder's tokens. Its first inputs also have the encoder's ids;
later ones need none, because `cache.cross` keeps the keys and values of the cross-attention. The backbone calls

    positions = cache.extend(packing)                   # once, before its layers; (T,), continuing the cached ones
    cache.append(layer, key, value)                     # in each layer: (T, H, K)
    out = cache.attend(layer, query, packing, ...)      # (T, H, K) -> (T, H * K)

Nothing is padded on the left: the sequences start at slot 0, and their lengths, not a mask of the caller's, say how far
they go. Shapes: models/ops/packing.py; S is the longest cached length. Not for training: appending is in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.packing import Packing, padded

ROOM = 64  # slots to begin with; doubled whenever they are full


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
        self._origins: tuple[int, ...] = ()  # the sequence of the first inputs that each row descends from
        self._slots = ROOM
        self._rows = self._positions = torch.empty(0)  # (T,) of the new tokens: sequence, position in it
        self._mask: Tensor | None = None

    @property
    def longest(self) -> int:
        """S, the length of the longest cached sequence."""
        return max(self.lengths, default=0)

    def extend(self, packing: Packing) -> Tensor:
        """Announce new tokens; return (T,), the position of each in its sequence, for position embeddings or biases."""
        device = packing.cu_seqlens.device
        if not self.lengths:
            self.lengths = (0,) * len(packing.lengths)
            self._origins = tuple(range(len(packing.lengths)))
        counts = packing.cu_seqlens.diff().long()
        rows = torch.arange(len(counts), device=device)
        self._rows = torch.repeat_interleave(rows, counts, output_size=sum(packing.lengths))
        self._positions = torch.tensor(self.lengths, device=device)[self._rows] + packing.positions
        self.lengths = tuple(old + new for old, new in zip(self.lengths, packing.lengths, strict=True))
        while self._slots < self.longest:
            self._slots *= 2
        self._mask = None
        return self._positions

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the keys and values, (T, H, K), of the tokens announced by `extend`; layers come in order."""
        if layer == len(self._layers):
            shape = (2, len(self.lengths), key.shape[1], self._slots, key.shape[2])
            self._layers.append(key.new_zeros(shape))  # not empty: a weight of 0 times a NaN would be a NaN
        missing = self._slots - self._layers[layer].shape[3]
        if missing:
            self._layers[layer] = F.pad(self._layers[layer], (0, 0, 0, missing))
        self._layers[layer][:, self._rows, :, self._positions] = torch.stack((key, value), 1)  # (T, 2, H, K)

    def attend(
        self, layer: int, query: Tensor, packing: Packing, *, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Return softmax(q k^T * scale + bias) v over all cached tokens, (T, H * K); without a cache: packed_attention.

        query: (T, H, K), packed as `packing` says; in a causal cache of the tokens just announced.
        bias: (H, N, S) or (B, H, N, S), N the largest number of new tokens of a sequence.
        scale: 1 / sqrt(K) unless given.
        """
        keys, values = self._layers[layer][:, :, :, : self.longest]  # (B, H, S, K)
        single = max(packing.lengths) == 1
        # (B, H, N, K); the padding behind the shorter prompts is computed and thrown away
        q = query.unsqueeze(2) if single else padded(query, packing, 0.0).transpose(1, 2)
        mask = self._visible(packing)
        if bias is not None:
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
        if single:
            return out.flatten(1)
        return torch.cat([one[:, :n].transpose(0, 1) for one, n in zip(out, packing.lengths, strict=True)]).flatten(1)

    def _visible(self, packing: Packing) -> Tensor | None:
        """Return (B, 1, N, S): whether the new token sees the cached one; None where all do."""
        single = max(packing.lengths) == 1
        if min(self.lengths) == self.longest and (single or not self.causal):
            return None
        if self._mask is None:
            device = packing.cu_seqlens.device
            slots = torch.arange(self.longest, device=device)
            if self.causal:
                ends = padded(self._positions, packing, 0)[:, None, :, None]
            else:
                ends = torch.tensor(self.lengths, device=device)[:, None, None, None] - 1
            self._mask = slots <= ends
        return self._mask

    def reorder(self, rows: Sequence[int]) -> None:
        """Make row i continue the old row rows[i]: beams change places, multiply, or are left out when finished."""
        if list(rows) == list(range(len(self.lengths))):
            return
        origins = tuple(self._origins[row] for row in rows)
        if self.cross is not None and origins != self._origins:  # beams of one source share its keys
            self.cross.reorder(rows)
        self.lengths = tuple(self.lengths[row] for row in rows)
        self._origins = origins
        self._mask = None
        for layer, stored in enumerate(self._layers):
            self._layers[layer] = stored.index_select(1, torch.tensor(rows, device=stored.device))
