"""The base of all heads, and the options from which a head is built. The heads are in heads.py.

Shapes: models/ops/packing.py, and: C classes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.inputs import IGNORE_INDEX, ModelInputs
from models.losses import find_supervised_positions
from models.ops.layers import ACTIVATIONS, init_normal, upcast
from models.ops.packing import Packing, Selection

PROBLEMS = ("single-label", "multi-label", "regression")


@dataclass(frozen=True)
class HeadShape:
    """The options from which a head is built; each architecture fills in those of its published checkpoints."""

    hidden_size: int
    dropout: float = 0.0
    num_labels: int = 2
    pooling: str = "cls"  # one of layers.POOLINGS
    num_special: int = 0  # special tokens before the patches of an image, which are not part of the mean
    pooled_norm: bool = False  # a LayerNorm on the pooled vector (BEiT)
    dense: str = ""  # activation of a dense layer before the output; empty: no such layer
    dense_bias: bool = True
    dropout_before_dense: bool = False
    has_norm: bool = False  # a LayerNorm behind the dense layer, which a language model always has
    norm_bias: bool = True
    pools_choices: bool = False  # multiple choice may take the mean of a sequence, as `pooling` says
    bias: bool = True
    problem: str = "single-label"
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()  # factors of the training loss, one per class; empty: all 1
    pos_weight: tuple[float, ...] = ()  # factors of the training loss where a label applies, one per label; empty: 1
    vocab_size: int = 0
    tied: bool = True  # the output matrix of a language model is its embedding
    layer_norm_eps: float = 1e-12
    embedding_size: int = 0  # the width that the output matrix of a language model reads; 0: hidden_size
    scale: float = 1.0  # factor of the features that the output matrix of a language model reads


class Head(nn.Module):
    """The base of all heads. The class attributes say what a head can do."""

    is_language_model: ClassVar[bool] = False  # its logits are over the vocabulary; it has no dropout
    generates_text: ClassVar[bool] = False
    needs_decoder: ClassVar[bool] = False  # an encoder-decoder builds its decoder only for such a head
    has_labels: ClassVar[bool] = False  # its classes have names
    prefers_mean: ClassVar[bool] = False  # its pooling is the mean where no checkpoint says another one
    reads_pooled: ClassVar[bool] = False  # it reads one vector per example, pooled by shape.pooling
    reads_windows: ClassVar[bool] = False  # an example may be several sequences, of whose logits it takes the mean
    problems: ClassVar[tuple[str, ...]] = PROBLEMS[:1]  # the problem types that it supports; the first is the default
    supports_distillation: ClassVar[bool] = False  # its logits are (B, C), like a teacher's
    supports_label_smoothing: ClassVar[bool] = False
    divergence_scale: ClassVar[float] = 1.0  # factor of a divergence of its log_probabilities, to match its loss

    # Set it to False where training does not read the logits: a language model then needs less memory for its loss.
    keep_logits: bool = True

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.shape = shape

    @property
    def heads(self) -> list[Head]:
        """This head, or those of several tasks (models/multi_task.py)."""
        return [self]

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Return the logits and the sum of the losses, a scalar in fp32 or wider, 0 without labels.

        hidden: (T, D); of an encoder-decoder (U, D), those of the decoder; or those that `reads` selects, (R, D).
        """
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def reads(self, packing: Packing, inputs: ModelInputs) -> Selection | None:
        """Return the tokens whose hidden states forward reads; None: all.

        The last layer computes only these. `forward` then gets (R, D) and the Selection as their packing; but all
        tokens where the backbone has no such layer. A subclass with another forward also has to state what it reads:
        without a `reads` of its own it gets all tokens.
        """
        return None

    def select(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> Tensor:
        """Return the hidden states that `reads` selects, (R, D), unless the backbone has computed only these."""
        selection = None if isinstance(packing, Selection) else self.reads(packing, inputs)
        return hidden if selection is None else selection.take(hidden)

    def log_probabilities(self, logits: Tensor, inputs: ModelInputs) -> Tensor:
        """Return the log-probabilities of all outcomes at each target, (targets, C), in fp32 or wider.

        In a multi-label problem they are (B, C, 2): those of each label and of its absence. Among float labels what is
        no target has zeros, which add nothing to a divergence; their number would make the host wait for the device.
        logits: as forward returns them, (n, C). Raises TypeError without labels.
        """
        logits, labels = upcast(logits), require_labels(inputs)
        if self.shape.problem == "multi-label":
            is_target = ~labels.isnan() & (labels != IGNORE_INDEX)
            both = torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], -1)
            return both.where(is_target[..., None], 0.0)
        if labels.is_floating_point():
            return logits.log_softmax(-1).where(~labels.isnan().any(-1, keepdim=True), 0.0)
        positions = find_supervised_positions(labels, inputs.num_targets)
        return (logits if positions is None else logits.index_select(0, positions)).log_softmax(-1)

    def init_weights(self, std: float, generator: torch.Generator, skip: Collection[Tensor] = ()) -> None:
        """Initialise a new head: weights from Normal(0, std), biases 0, LayerNorms identity; other parameters stay.

        skip: weights that are tied to the backbone's. Override this for another initialisation. The __init__ of a new
        head runs with the seed of from_pretrained.
        """
        init_normal(self, std, generator, skip)

    def tie(self, embedding: nn.Embedding) -> None:
        """Use the embedding as the output matrix; does nothing for a head without one."""

    def add_dense(self, width: int, has_norm: bool) -> None:
        """Add the layers of `transform`, if shape.dense: a dense layer of `width` outputs, and its LayerNorm."""
        shape = self.shape
        self.dense = nn.Linear(shape.hidden_size, width, bias=shape.dense_bias) if shape.dense else None
        has_norm = has_norm and self.dense is not None
        self.norm = nn.LayerNorm(width, shape.layer_norm_eps, bias=shape.norm_bias) if has_norm else None

    def transform(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., width): dense -> activation -> LayerNorm, of those layers that add_dense has added."""
        x = x if self.dense is None else ACTIVATIONS[self.shape.dense](self.dense(x))
        return x if self.norm is None else self.norm(x)


def require_labels(inputs: ModelInputs) -> Tensor:
    """Return the labels of a micro-batch; TypeError where it has none."""
    if inputs.labels is None:
        raise TypeError("log-probabilities need labels, and the micro-batch has none")
    return inputs.labels
