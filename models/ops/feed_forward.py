"""The feed-forward part of T5's layers. Shapes: models/ops/packing.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.errors import ModelError
from models.ops.dropout import Dropout
from models.ops.joint_linear import joint_linear
from models.ops.layers import ACTIVATIONS, outside_fp16


class FeedForward(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) * linear(x)) (Shazeer 2020)."""

    def __init__(self, width: int, inner: int, activation: str, gated: bool, dropout: float):
        super().__init__()
        self.gated = gated
        if self.gated:
            self.gate = nn.Linear(width, inner, bias=False)
            self.linear = nn.Linear(width, inner, bias=False)
        else:
            self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.activation = ACTIVATIONS[activation]
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)

        Published T5 models were trained in bf16. The products in this layer, and what the attention adds to the
        residual stream, can exceed the range of fp16 (65,504). So fp16 autocast computes both in fp32.
        Raises ModelError for a model cast to fp16.
        """
        if self.down.weight.dtype == torch.float16:
            raise ModelError(
                "a T5 model cast to fp16 overflows; cast it to bf16, or use fp16 autocast with fp32 weights"
            )
        return outside_fp16(self.feed, x)

    def feed(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D), in the precision of the caller"""
        up, *factor = joint_linear(x, (self.gate, self.linear) if self.gated else (self.up,))
        inner = self.activation(up)
        out: Tensor = self.down(self.dropout(inner * factor[0] if factor else inner))
        return out
