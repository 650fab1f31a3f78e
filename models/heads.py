"""Task heads: features of a packed micro-batch -> logits and the *sum* of the losses of its targets.

A head never averages. The loop divides by the number of targets of the whole optimizer step, over all micro-batches and
ranks, so that the way a step is cut cannot change the loss. A label that is no target: IGNORE among integers, NaN among
floats. (Among the floats of several labels IGNORE is none either; in a regression it is a number like any other.)

Legend of shapes as in models/ops/layers.py, and: C classes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError
from models.ops.dropout import Dropout
from models.ops.layers import ACTIVATIONS, POOLINGS, Packing, mean_pool, padded
from models.ops.linear_cross_entropy import linear_cross_entropy

IGNORE = -100  # a label without a target; torch's own default
PROBLEMS = ("single-label", "multi-label", "regression")


@dataclass(frozen=True)
class HeadShape:
    """All that decides what a head is; each architecture fills in what its published checkpoints have."""

    hidden_size: int
    dropout: float = 0.0
    num_labels: int = 2
    pooling: str = "cls"  # a key of layers.POOLINGS
    num_special: int = 0  # tokens before an image's patches, which the mean leaves out
    dense: str = ""  # activation of a dense layer before the output; empty: there is none
    dropout_before_dense: bool = False
    bias: bool = True
    problem: str = "single-label"
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()  # of the loss in training, one a class; empty: all 1
    vocab_size: int = 0
    tied: bool = True  # a language model's output matrix is its embedding
    layer_norm_eps: float = 1e-12
    scale: float = 1.0  # of the features a language model's output matrix reads


class SequenceClassification(nn.Module):
    """One text or image -> classes: pool -> [dropout] -> [dense, activation] -> dropout -> linear.

    `dense` is BERT's pooler, RoBERTa's and DistilBERT's extra layer; mean pooling has none, so that no parameter is
    left unused. Problems: single-label (cross entropy), multi-label (a sigmoid and binary cross entropy per class),
    regression (squared error per output).
    """

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.shape = shape
        self.dense = nn.Linear(shape.hidden_size, shape.hidden_size) if shape.dense else None
        self.dropout = Dropout(shape.dropout)
        self.classifier = nn.Linear(shape.hidden_size, shape.num_labels, bias=shape.bias)

    def forward(self, hidden: Tensor, packing: Packing, batch: Any) -> tuple[Tensor, Tensor]:
        """hidden: (T, D); batch.labels: (B,) classes, or (B, C) floats for multi-label and regression, or None.

        Returns logits (B, C) and the sum of the losses, a scalar in fp32 or wider.
        """
        if self.shape.pooling == "mean":
            x = mean_pool(hidden, packing, self.shape.num_special)
        else:
            x = POOLINGS[self.shape.pooling](hidden, packing)
        if self.dense is not None:
            x = self.dropout(x) if self.shape.dropout_before_dense else x
            x = ACTIVATIONS[self.shape.dense](self.dense(x))
        logits = self.classifier(self.dropout(x))
        return logits, classification_loss(logits, batch.labels, self.shape, self.training)


class DistilledClassification(nn.Module):
    """One image -> classes: the mean of two classifiers, of the class token and of the distillation token.

    Touvron et al. 2021, "classification with our approach: joint classifiers". Both learn from the labels, through
    their mean; a teacher is not part of a fine-tuning run here.
    """

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.shape = shape
        self.dropout = Dropout(shape.dropout)
        self.classifier = nn.Linear(shape.hidden_size, shape.num_labels, bias=shape.bias)
        self.distilled_classifier = nn.Linear(shape.hidden_size, shape.num_labels, bias=shape.bias)

    def forward(self, hidden: Tensor, packing: Packing, batch: Any) -> tuple[Tensor, Tensor]:
        """hidden: (T, D); batch.labels as for SequenceClassification. Returns logits (B, C), the sum of the losses."""
        first = packing.cu_seqlens[:-1].long()
        class_token, distillation_token = (self.dropout(hidden[first + i]) for i in range(2))
        logits = (self.classifier(class_token) + self.distilled_classifier(distillation_token)) / 2
        return logits, classification_loss(logits, batch.labels, self.shape, self.training)


class TokenClassification(nn.Module):
    """A class for every token: dropout -> linear -> cross entropy."""

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.shape = shape
        self.dropout = Dropout(shape.dropout)
        self.classifier = nn.Linear(shape.hidden_size, shape.num_labels, bias=shape.bias)

    def forward(self, hidden: Tensor, packing: Packing, batch: Any) -> tuple[Tensor, Tensor]:
        """hidden: (T, D); batch.labels: (T,) or None. Returns logits (T, C) and the sum of the losses."""
        logits = self.classifier(self.dropout(hidden))
        return logits, classification_loss(logits, batch.labels, self.shape, self.training)


class QuestionAnswering(nn.Module):
    """The first and the last token of an answer: linear to two scores a token, softmax within each sequence."""

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.shape = shape
        self.dropout = Dropout(shape.dropout)
        self.span = nn.Linear(shape.hidden_size, 2, bias=shape.bias)

    def forward(self, hidden: Tensor, packing: Packing, batch: Any) -> tuple[Tensor, Tensor]:
        """hidden: (T, D); batch.labels: (B, 2), the answer's first and last token within its sequence, or None.

        Returns logits (T, 2) and the sum over the sequences of (loss of the first + loss of the last) / 2, so that a
        sequence is one target.
        """
        logits = self.span(self.dropout(hidden))
        if batch.labels is None:
            return logits, widened(logits).new_zeros(())
        scores = widened(padded(logits, packing, float("-inf")))  # (B, L, 2)
        loss_sum = F.cross_entropy(scores, batch.labels, ignore_index=IGNORE, reduction="sum") / 2
        return logits, loss_sum


class RelationClassification(nn.Module):
    """The relation of two marked entities: their start markers, side by side -> dropout -> linear -> cross entropy.

    Baldini Soares et al. 2019 ("entity markers, entity start").
    """

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.shape = shape
        self.dropout = Dropout(shape.dropout)
        self.classifier = nn.Linear(2 * shape.hidden_size, shape.num_labels, bias=shape.bias)

    def forward(self, hidden: Tensor, packing: Packing, batch: Any) -> tuple[Tensor, Tensor]:
        """hidden: (T, D); batch.markers: (B, 2), their places in the sequence; batch.labels: (B,) or None.

        Returns logits (B, C) and the sum of the losses.
        """
        starts = packing.cu_seqlens[:-1, None].long()
        pair = hidden[starts + batch.markers].flatten(1)  # (B, 2 D)
        logits = self.classifier(self.dropout(pair))
        return logits, classification_loss(logits, batch.labels, self.shape, self.training)


class LanguageModel(nn.Module):
    """[dense -> activation -> LayerNorm] -> output matrix -> cross entropy; masked, causal and sequence-to-sequence.

    batch.labels says what to predict *at* each token (whoever encodes a causal text has shifted it by one), so that the
    three differ in their data only. With labels, the matrix is applied at supervised tokens alone: on masked text and
    on dialogue that spares most of the work.

    keep_logits: whoever reads no logits in training sets it False, and then only the loss is computed there, in a
    fraction of the memory (models/ops/linear_cross_entropy.py). In evaluation the logits are always there.
    """

    keep_logits = True

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.shape = shape
        self.dense = nn.Linear(shape.hidden_size, shape.hidden_size) if shape.dense else None
        self.norm = nn.LayerNorm(shape.hidden_size, shape.layer_norm_eps) if shape.dense else None
        self.decoder = nn.Linear(shape.hidden_size, shape.vocab_size, bias=shape.bias)

    def forward(self, hidden: Tensor, packing: Packing, batch: Any) -> tuple[Tensor, Tensor]:
        """hidden: (T, D); batch.labels: (T,) or None.

        Returns logits, of all tokens (T, V) without labels, else of the supervised ones, or where they are not kept of
        none (0, V), and the sum of the losses.
        """
        labels = batch.labels
        if labels is not None and (places := supervised_places(batch)) is not None:
            hidden, labels = hidden.index_select(0, places), labels.index_select(0, places)
        if self.dense is not None and self.norm is not None:
            hidden = self.norm(ACTIVATIONS[self.shape.dense](self.dense(hidden)))
        hidden = hidden * self.shape.scale if self.shape.scale != 1.0 else hidden
        if labels is not None and self._needs_no_logits(hidden):
            weight, bias = self.decoder.weight, self.decoder.bias
            loss_sum = linear_cross_entropy(hidden, weight, bias, labels, self.shape.label_smoothing)
            return hidden.new_empty(0, self.shape.vocab_size), loss_sum
        logits = self.decoder(hidden)
        return logits, classification_loss(logits, labels, self.shape, self.training)

    def _needs_no_logits(self, hidden: Tensor) -> bool:
        """A training forward whose loss alone is wanted, in a precision that linear_cross_entropy can do."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        training = self.training and torch.is_grad_enabled() and not self.shape.class_weights
        return training and not self.keep_logits and dtype != torch.float16


def supervised_places(batch: Any) -> Tensor | None:
    """The tokens of a packed micro-batch that are a target, ascending; None: all are.

    A data.Batch says how many they are, so that the host need not wait for the device to count them.
    """
    targets = batch.labels != IGNORE
    count = getattr(batch, "num_targets", None)
    if count is None:
        return targets.nonzero().squeeze(1)
    return None if count == len(targets) else torch.nonzero_static(targets, size=count).squeeze(1)


def classification_loss(logits: Tensor, labels: Tensor | None, shape: HeadShape, training: bool) -> Tensor:
    """The sum of the losses of all targets, 0 without labels; in fp32, or fp64 for fp64 logits.

    Single labels are classes, or (B, C) floats: the share of each class in the target, as mixup and cutmix make them.
    Label smoothing (Szegedy et al. 2016) and class weights are part of the training objective only; evaluation is
    without them. A weight multiplies the loss of its class, and the sum is still divided by the number of targets, not
    by their weights as torch's mean is: so a step's loss does not depend on how it is cut.
    ModelError for numbers that are not one for each output, and for the integers where a regression takes floats.
    """
    wide = widened(logits)
    if labels is None:
        return wide.new_zeros(())
    shared = shape.problem == "single-label" and labels.is_floating_point()
    if labels.shape != logits.shape and (shared or shape.problem != "single-label"):
        raise ModelError(
            f"{shape.problem} labels of shape {[*labels.shape]} should be {[*logits.shape]}, as the logits"
        )
    if shape.problem == "single-label":
        smoothing = shape.label_smoothing if training else 0.0
        weight = wide.new_tensor(shape.class_weights) if training and shape.class_weights else None
        if not shared:
            return F.cross_entropy(
                wide, labels, weight, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
            )
        shares = labels.nan_to_num().to(wide.dtype)
        losses = F.cross_entropy(wide, shares, weight, reduction="none", label_smoothing=smoothing)
        return losses.where(~labels.isnan().any(-1), 0.0).sum()
    target = ~labels.isnan()
    if shape.problem == "multi-label":
        target &= labels != IGNORE
    elif not labels.is_floating_point():
        raise ModelError(
            "regression labels should be floats, NaN where there is no target: an integer -100 is a number"
        )
    wide, labels = wide[target], labels[target].to(wide.dtype)
    if shape.problem == "multi-label":
        return F.binary_cross_entropy_with_logits(wide, labels, reduction="sum")
    return F.mse_loss(wide, labels, reduction="sum")


def widened(x: Tensor) -> Tensor:
    """fp16 and bf16 raised to fp32, in which losses are computed; fp64 stays."""
    return x if x.dtype == torch.float64 else x.float()
