"""TaskModel: backbone, head and loss in one module."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import NamedTuple

from torch import Tensor, nn

from models.architecture import AnyArchitecture, Backbone
from models.checkpoints.tensor_files import JsonObject
from models.checkpoints.weights import LoadReport
from models.errors import ModelError
from models.heads import Head
from models.inputs import ModelInputs


class Output(NamedTuple):
    """The result of TaskModel.forward."""

    loss_sum: Tensor  # scalar: the sum over the targets of this micro-batch
    logits: Tensor  # in the shape of the head (models/heads.py); without a head, the hidden states (T, D)


@dataclass(frozen=True)
class ModelSpec:
    """The description of a model from which its config.json is written."""

    architecture: AnyArchitecture
    config: JsonObject  # the config.json, with the depth of this model
    head_name: str | None  # a key of HEADS
    labels: tuple[str, ...]


class TaskModel(nn.Module):
    """Backbone -> head -> loss in one forward, so that DDP wraps a single call."""

    backbone: Backbone
    head: Head | None

    def __init__(self, backbone: Backbone, head: Head | None, spec: ModelSpec):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.spec = spec
        self.report = LoadReport("not loaded")
        # Whether the last layer computes only what the head reads. It changes the speed, and which random numbers
        # dropout gets there; without dropout the results differ by rounding only.
        self.skips_unread_tokens = head is not None and states_what_it_reads(type(head)) and _takes_reads(backbone)

    def forward(self, inputs: ModelInputs) -> Output:
        """Return the sum of the losses and the logits. ModelError for a sequence longer than max_length."""
        longest = max(inputs.lengths, default=0)
        if longest > self.max_length:
            raise ModelError(f"a sequence of {longest} tokens is longer than the model's {self.max_length} positions")
        reads = self.head.reads if self.head is not None and self.skips_unread_tokens else None
        hidden, packing = self.backbone(inputs) if reads is None else self.backbone(inputs, reads=reads)
        if self.head is None:
            return Output(hidden.new_zeros(()), hidden)
        logits, loss_sum = self.head(hidden, packing, inputs)
        return Output(loss_sum, logits)

    @property
    def head_name(self) -> str | None:
        """The key of the head in HEADS; None without a head."""
        return self.spec.head_name

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits."""
        return self.spec.labels

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of a sequence."""
        return int(self.backbone.max_length)

    @property
    def vocab_size(self) -> int:
        """The number of token ids that the model reads; 0 where it reads images."""
        return self.embedding.num_embeddings if self.embedding is not None else 0

    @property
    def num_token_types(self) -> int:
        """The number of token types that the model reads; 0 where it reads none."""
        types = getattr(self.backbone, "token_type_embeddings", None)
        return types.num_embeddings if isinstance(types, nn.Embedding) else 0

    @property
    def embedding(self) -> nn.Embedding | None:
        """The embedding of the backbone's tokens; None where it reads images."""
        return getattr(self.backbone, "embedding", None)


def states_what_it_reads(head: type[Head]) -> bool:
    """Return whether `reads` belongs to the forward of this head, which no subclass below `reads` replaces."""
    return next(name for cls in head.__mro__ for name in ("reads", "forward") if name in vars(cls)) == "reads"


def _takes_reads(backbone: Backbone) -> bool:
    """Return whether the forward of a backbone takes what the head reads; one of a user's own need not."""
    return isinstance(backbone, nn.Module) and "reads" in signature(backbone.forward).parameters
