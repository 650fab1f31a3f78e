"""Heads: hidden states of a packed micro-batch -> logits and the *sum* of the losses of its targets.

A head never averages. The training loop divides by the number of targets of the whole optimizer step, over all
micro-batches and ranks. So the split of a step into micro-batches cannot change the loss.

Labels that are no targets:
- IGNORE_INDEX among integers;
- NaN among floats;
- IGNORE_INDEX among the floats of a multi-label problem too. In a regression it is a number like any other.

A new head is a subclass of Head and an entry in HEADS. Every architecture takes it. Its parameters are saved under
their own names ("head.x"), and config.json gets `"head": NAME`.

Shapes: models/ops/packing.py, and: C classes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.inputs import IGNORE_INDEX, ModelInputs, require
from models.losses import classification_loss, find_supervised_positions
from models.ops.dropout import Dropout
from models.ops.layers import ACTIVATIONS, init_normal, mean_by_example, mean_pool, product_dtype, upcast
from models.ops.linear_cross_entropy import linear_cross_entropy
from models.ops.packing import Packing, Selection, pad_sequences

PROBLEMS = ("single-label", "multi-label", "regression")


@dataclass(frozen=True)
class HeadShape:
    """The options from which a head is built; each architecture fills in those of its published checkpoints."""

    hidden_size: int
    dropout: float = 0.0
    num_labels: int = 2
    pooling: str = "cls"  # one of layers.POOLINGS
    num_special: int = 0  # special tokens before the patches of an image, which are not part of the mean
    dense: str = ""  # activation of a dense layer before the output; empty: no such layer
    dropout_before_dense: bool = False
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
        logits, labels = upcast(logits), _require_labels(inputs)
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


class SequenceClassification(Head):
    """A classifier of one text or image: pool -> [dropout] -> [dense, activation] -> dropout -> linear.

    `dense` is the pooler of BERT and the additional layer of RoBERTa and DistilBERT; mean pooling does not have it.
    Problems: single-label (cross entropy), multi-label (a sigmoid and binary cross entropy for each class), regression
    (squared error for each output).
    """

    has_labels = True
    reads_pooled = True
    reads_windows = True
    problems = PROBLEMS
    supports_distillation = True
    supports_label_smoothing = True

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.dense = nn.Linear(shape.hidden_size, shape.hidden_size) if shape.dense else None
        self.dropout = Dropout(shape.dropout)
        self.classifier = nn.Linear(shape.hidden_size, shape.num_labels, bias=shape.bias)

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Return logits (B, C) and the sum of the losses.

        hidden: (T, D) or (B, D). inputs.labels: (B,) classes, or (B, C) floats for multi-label and regression, or None.
        Where an example is several sequences (windows of a long text), B examples: their logits are the means.
        """
        if self.shape.pooling == "mean":
            x = mean_pool(hidden, packing, self.shape.num_special)
        else:
            x = self.select(hidden, packing, inputs)
        if self.dense is not None:
            x = self.dropout(x) if self.shape.dropout_before_dense else x
            x = ACTIVATIONS[self.shape.dense](self.dense(x))
        logits = self.classifier(self.dropout(x))
        if inputs.sequences is not None:
            logits = mean_by_example(logits, inputs.sequences)
        return logits, classification_loss(logits, inputs.labels, self.shape, self.training)

    def reads(self, packing: Packing, inputs: ModelInputs) -> Selection | None:
        """Return the first or the last token of each sequence; None for the mean of all."""
        if self.shape.pooling == "mean":
            return None
        is_last = self.shape.pooling == "last"
        rows = packing.cu_seqlens[1:].long() - 1 if is_last else packing.cu_seqlens[:-1].long()
        return Selection.of_each_sequence(rows.unsqueeze(1), packing, are_last=is_last)


class DistilledClassification(Head):
    """A classifier of images: the mean of two linear layers, on the class token and on the distillation token.

    Touvron et al. 2021, "classification with our approach: joint classifiers". Both learn from the labels, through
    their mean, since fine-tuning has no teacher for the distillation token.
    """

    has_labels = True
    problems = PROBLEMS
    supports_distillation = True
    supports_label_smoothing = True

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.dropout = Dropout(shape.dropout)
        self.classifier = nn.Linear(shape.hidden_size, shape.num_labels, bias=shape.bias)
        self.distilled_classifier = nn.Linear(shape.hidden_size, shape.num_labels, bias=shape.bias)

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Return logits (B, C) and the sum of the losses; labels as for SequenceClassification."""
        special = self.select(hidden, packing, inputs)  # (2 B, D)
        class_token, distillation_token = self.dropout(special).reshape(-1, 2, special.shape[1]).unbind(1)
        logits = (self.classifier(class_token) + self.distilled_classifier(distillation_token)) / 2
        return logits, classification_loss(logits, inputs.labels, self.shape, self.training)

    def reads(self, packing: Packing, inputs: ModelInputs) -> Selection:
        """Return the first two tokens of each image."""
        first = packing.cu_seqlens[:-1, None].long()
        return Selection.of_each_sequence(first + torch.arange(2, device=first.device), packing)


class TokenClassification(Head):
    """A classifier of every token: dropout -> linear -> cross entropy."""

    has_labels = True
    supports_label_smoothing = True

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.dropout = Dropout(shape.dropout)
        self.classifier = nn.Linear(shape.hidden_size, shape.num_labels, bias=shape.bias)

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Return logits (T, C) and the sum of the losses. hidden: (T, D). inputs.labels: (T,) or None."""
        logits = self.classifier(self.dropout(hidden))
        return logits, classification_loss(logits, inputs.labels, self.shape, self.training)


class QuestionAnswering(Head):
    """Scores to be the first and the last token of an answer: linear -> softmax over the tokens of each sequence."""

    divergence_scale = 0.5  # the loss is the mean of two losses, those of the first and of the last token

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.dropout = Dropout(shape.dropout)
        self.span = nn.Linear(shape.hidden_size, 2, bias=shape.bias)

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Return logits (T, 2) and the sum over the sequences of (loss of the first + loss of the last token) / 2.

        A sequence is one target. hidden: (T, D). inputs.labels: (B, 2), the positions of the first and the last token
        of the answer within its sequence, or None.
        """
        logits = self.span(self.dropout(hidden))
        if inputs.labels is None:
            return logits, upcast(logits).new_zeros(())
        log_p = upcast(pad_sequences(logits, packing, float("-inf"))).log_softmax(1)  # (B, L, 2)
        # As (2 B, L), since the loss of three dimensions has no deterministic kernel on a GPU.
        rows, labels = log_p.transpose(1, 2).flatten(0, 1), inputs.labels.flatten()
        return logits, F.nll_loss(rows, labels, ignore_index=IGNORE_INDEX, reduction="sum") / 2

    def log_probabilities(self, logits: Tensor, inputs: ModelInputs) -> Tensor:
        """Return (2 T,): the log-probabilities of each token to be the first, and the last, token of the answer.

        They are 0 in a sequence without a target.
        """
        logits, labels = upcast(logits), _require_labels(inputs)
        packing = Packing(inputs.lengths, inputs.cu_seqlens)
        spans = pad_sequences(logits, packing, float("-inf")).log_softmax(1)  # (B, L, 2)
        of_tokens = spans[packing.rows, packing.positions]
        return of_tokens.where((labels != IGNORE_INDEX)[packing.rows], 0.0).flatten()


class RelationClassification(Head):
    """A classifier of two marked entities: the vectors of both start markers -> dropout -> linear -> cross entropy.

    Baldini Soares et al. 2019 ("entity markers, entity start").
    """

    has_labels = True
    problems = PROBLEMS
    supports_distillation = True
    supports_label_smoothing = True

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.dropout = Dropout(shape.dropout)
        self.classifier = nn.Linear(2 * shape.hidden_size, shape.num_labels, bias=shape.bias)

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Return logits (B, C) and the sum of the losses.

        hidden: (T, D) or (2 B, D). inputs.markers: (B, 2), positions of the markers in their sequence.
        inputs.labels: (B,) or None.
        """
        pair = self.select(hidden, packing, inputs)
        logits = self.classifier(self.dropout(pair.reshape(-1, self.classifier.in_features)))  # of (B, 2 D)
        return logits, classification_loss(logits, inputs.labels, self.shape, self.training)

    def reads(self, packing: Packing, inputs: ModelInputs) -> Selection:
        """Return the two markers of each sequence."""
        starts = packing.cu_seqlens[:-1, None].long()
        return Selection.of_each_sequence(starts + require(inputs.markers, "markers"), packing)


class LanguageModel(Head):
    """A language-model head: [dense -> activation -> LayerNorm] -> output matrix -> cross entropy.

    inputs.labels has the token to predict *at* each position; those of a causal text are shifted when it is encoded. So
    masked, causal and sequence-to-sequence models differ in their data only. With labels, the matrix is applied at
    supervised tokens only, which saves most of the work on masked text and on dialogue.

    Without keep_logits, training computes only the loss (models/ops/linear_cross_entropy.py). Evaluation always
    computes the logits.
    """

    is_language_model = True
    supports_label_smoothing = True

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        width = shape.embedding_size or shape.hidden_size
        self.dense = nn.Linear(shape.hidden_size, width) if shape.dense else None
        self.norm = nn.LayerNorm(width, shape.layer_norm_eps) if shape.dense else None
        self.decoder = nn.Linear(width, shape.vocab_size, bias=shape.bias)

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Return logits and the sum of the losses. hidden: (T, D) or (targets, D). inputs.labels: (T,) or None.

        Logits are (T, V) without labels, (targets, V) with labels, and (0, V) where they are not kept.
        """
        labels = inputs.labels
        selection = packing if isinstance(packing, Selection) else self.reads(packing, inputs)
        if labels is not None and selection is not None:
            hidden = hidden if selection is packing else selection.take(hidden)
            labels = selection.take(labels)
        if self.dense is not None and self.norm is not None:
            hidden = self.norm(ACTIVATIONS[self.shape.dense](self.dense(hidden)))
        hidden = hidden * self.shape.scale if self.shape.scale != 1.0 else hidden
        if labels is not None and self._needs_no_logits(hidden):
            weight, bias = self.decoder.weight, self.decoder.bias
            loss_sum = linear_cross_entropy(hidden, weight, bias, labels, self.shape.label_smoothing)
            return hidden.new_empty(0, self.shape.vocab_size), loss_sum
        logits = self.decoder(hidden)
        return logits, classification_loss(logits, labels, self.shape, self.training)

    def reads(self, packing: Packing, inputs: ModelInputs) -> Selection | None:
        """Return the supervised tokens; None without labels, and where all tokens are supervised."""
        if inputs.labels is None:
            return None
        positions = find_supervised_positions(inputs.labels, inputs.num_targets)
        return None if positions is None else Selection.of_any(positions, packing)

    def log_probabilities(self, logits: Tensor, inputs: ModelInputs) -> Tensor:
        """Return (targets, V). Raises TypeError for logits that were not kept, and without labels."""
        labels, count = _require_labels(inputs), inputs.num_targets
        if len(logits) != (int((labels != IGNORE_INDEX).sum()) if count is None else count):
            raise TypeError("log-probabilities need the logits of all targets; set keep_logits = True on the head")
        return upcast(logits).log_softmax(-1)

    def tie(self, embedding: nn.Embedding) -> None:
        """Use the embedding as the output matrix."""
        self.decoder.weight = embedding.weight

    def _needs_no_logits(self, hidden: Tensor) -> bool:
        """Return whether to compute only the loss: in training, in a precision that linear_cross_entropy supports."""
        training = self.training and torch.is_grad_enabled() and not self.shape.class_weights
        return training and not self.keep_logits and product_dtype(hidden) != torch.float16


class MaskedLM(LanguageModel):
    """Predict masked tokens of a text."""


class CausalLM(LanguageModel):
    """Predict the next token of a text."""

    generates_text = True


class Seq2SeqLM(LanguageModel):
    """Predict the next token of a target, given a source."""

    generates_text = True
    needs_decoder = True


HEADS: dict[str, type[Head]] = {
    "sequence-classification": SequenceClassification,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
    "relation-classification": RelationClassification,
    "image-classification": SequenceClassification,
    "distilled-image-classification": DistilledClassification,
    "masked-lm": MaskedLM,
    "causal-lm": CausalLM,
    "seq2seq-lm": Seq2SeqLM,
}


def _require_labels(inputs: ModelInputs) -> Tensor:
    if inputs.labels is None:
        raise TypeError("log-probabilities need labels, and the micro-batch has none")
    return inputs.labels
