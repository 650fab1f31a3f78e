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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError
from models.head import PROBLEMS, Head, HeadShape, require_labels
from models.inputs import IGNORE_INDEX, ModelInputs, require
from models.losses import classification_loss, find_supervised_positions
from models.ops.dropout import Dropout
from models.ops.layers import mean_by_example, mean_pool, product_dtype, upcast
from models.ops.linear_cross_entropy import linear_cross_entropy
from models.ops.packing import Packing, Selection, pad_sequences

__all__ = ["HEADS", "PROBLEMS", "Head", "HeadShape", "MultipleChoice"]


class SequenceClassification(Head):
    """A classifier of one text or image: pool -> [dropout] -> [dense, activation, LayerNorm] -> dropout -> linear.

    Of images, `pooled_norm` is a LayerNorm behind the pooling, as in BEiT.
    `dense` is the pooler of BERT and the additional layer of RoBERTa and DistilBERT, which mean pooling does not have.
    Only ModernBERT has the LayerNorm, and both with each pooling.
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
        self.pooled_norm = nn.LayerNorm(shape.hidden_size, shape.layer_norm_eps) if shape.pooled_norm else None
        self.add_dense(shape.hidden_size, shape.has_norm)
        self.dropout = Dropout(shape.dropout)
        width = shape.hidden_size * (2 if shape.pooling == "cls_mean" else 1)
        self.classifier = nn.Linear(width, shape.num_labels, bias=shape.bias)

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Return logits (B, C) and the sum of the losses.

        hidden: (T, D) or (B, D). inputs.labels: (B,) classes, or (B, C) floats for multi-label and regression, or None.
        Where an example is several sequences (windows of a long text), B examples: their logits are the means.
        """
        x = pool(self, hidden, packing, inputs)
        x = x if self.pooled_norm is None else self.pooled_norm(x)
        x = self.dropout(x) if self.shape.dropout_before_dense and self.dense is not None else x
        logits = self.classifier(self.dropout(self.transform(x)))
        if inputs.sequences is not None:
            logits = mean_by_example(logits, inputs.sequences)
        return logits, classification_loss(logits, inputs.labels, self.shape, self.training)

    def reads(self, packing: Packing, inputs: ModelInputs) -> Selection | None:
        """Return the first or the last token of each sequence; None for the mean of all."""
        return select_pooled(packing, self.shape.pooling)


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
        first = packing.first_tokens[:, None]
        return Selection.of_each_sequence(first + torch.arange(2, device=first.device), packing)


class TokenClassification(Head):
    """A classifier of every token: [dense, activation, LayerNorm] -> dropout -> linear -> cross entropy."""

    has_labels = True
    supports_label_smoothing = True

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.add_dense(shape.hidden_size, shape.has_norm)
        self.dropout = Dropout(shape.dropout)
        self.classifier = nn.Linear(shape.hidden_size, shape.num_labels, bias=shape.bias)

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Return logits (T, C) and the sum of the losses. hidden: (T, D). inputs.labels: (T,) or None."""
        logits = self.classifier(self.dropout(self.transform(hidden)))
        return logits, classification_loss(logits, inputs.labels, self.shape, self.training)


class QuestionAnswering(Head):
    """Scores to be the first and the last token of an answer: linear -> softmax over the tokens of each sequence.

    Before the linear layer it may have those of TokenClassification.
    """

    divergence_scale = 0.5  # the loss is the mean of two losses, those of the first and of the last token

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.add_dense(shape.hidden_size, shape.has_norm)
        self.dropout = Dropout(shape.dropout)
        self.span = nn.Linear(shape.hidden_size, 2, bias=shape.bias)

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Return logits (T, 2) and the sum over the sequences of (loss of the first + loss of the last token) / 2.

        A sequence is one target. hidden: (T, D). inputs.labels: (B, 2), the positions of the first and the last token
        of the answer within its sequence, or None.
        """
        logits = self.span(self.dropout(self.transform(hidden)))
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
        logits, labels = upcast(logits), require_labels(inputs)
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


class MultipleChoice(Head):
    """Scores of choices: first token -> dense, activation -> dropout -> linear; softmax over the choices of an example.

    ModernBERT reads the mean of a sequence where its pooling says so, and has a LayerNorm behind the activation.
    Each sequence is a context with one of the choices; inputs.sequences has the number of choices of each example,
    which may differ. An example is one target.
    """

    supports_label_smoothing = True

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.add_dense(shape.hidden_size, shape.has_norm)
        self.dropout = Dropout(shape.dropout)
        self.classifier = nn.Linear(shape.hidden_size, 1, bias=shape.bias)
        self.takes_mean = shape.pools_choices and shape.pooling == "mean"

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Return logits (B,), a score for each sequence, and the sum of the losses.

        hidden: (T, D) or (B, D). inputs.labels: (N,) the number of the right choice of each of N examples, or None.
        """
        x = mean_pool(hidden, packing) if self.takes_mean else self.select(hidden, packing, inputs)
        logits = self.classifier(self.dropout(self.transform(x))).squeeze(1)
        if inputs.labels is None:
            return logits, upcast(logits).new_zeros(())
        log_p, choices = log_softmax_of_choices(logits, inputs)
        smoothing = self.shape.label_smoothing if self.training else 0.0
        loss = F.nll_loss(log_p, inputs.labels, ignore_index=IGNORE_INDEX, reduction="sum")
        if not smoothing:
            return logits, loss
        is_target = (inputs.labels != IGNORE_INDEX)[choices.rows]
        uniform = -log_p[choices.rows, choices.positions] / choices.cu_seqlens.diff()[choices.rows]
        return logits, (1 - smoothing) * loss + smoothing * uniform.where(is_target, 0.0).sum()

    def reads(self, packing: Packing, inputs: ModelInputs) -> Selection | None:
        """Return the first token of each sequence; None for the mean of all."""
        if self.takes_mean:
            return None
        return Selection.of_each_sequence(packing.first_tokens[:, None], packing)

    def log_probabilities(self, logits: Tensor, inputs: ModelInputs) -> Tensor:
        """Return (B,): the log-probability of each choice among those of its example; 0 without a target."""
        is_target = require_labels(inputs) != IGNORE_INDEX
        log_p, choices = log_softmax_of_choices(logits, inputs)
        return log_p[choices.rows, choices.positions].where(is_target[choices.rows], 0.0)


def log_softmax_of_choices(logits: Tensor, inputs: ModelInputs) -> tuple[Tensor, Packing]:
    """Return the log-probabilities of the choices of each example, and where the choices of each example begin.

    logits: (B,). Returns (N, most choices), -inf behind the last choice of an example, in fp32 or wider. Raises
    ModelError where it is not known which sequences belong together.
    """
    if inputs.sequences is None:
        raise ModelError("multiple choice reads the number of choices of each example, in `sequences`")
    choices = Packing.from_lengths(inputs.sequences, logits.device)
    return pad_sequences(upcast(logits), choices, float("-inf")).log_softmax(1), choices


class SentenceEmbedding(Head):
    """One vector for each sequence, pooled from its hidden states, without parameters.

    Its loss is that of a whole optimizer step (engine/coupling.py), so it has none of its own.
    """

    reads_pooled = True
    prefers_mean = True

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Return vectors (B, D) in fp32 or wider, and 0. hidden: (T, D) or (B, D)."""
        pooled = pool(self, upcast(hidden), packing, inputs)
        return pooled, pooled.new_zeros(())

    def reads(self, packing: Packing, inputs: ModelInputs) -> Selection | None:
        """Return the first or the last token of each sequence; None for the mean of all."""
        return select_pooled(packing, self.shape.pooling)


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
        self.add_dense(width, has_norm=True)
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
        hidden = self.transform(hidden)
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
        labels, count = require_labels(inputs), inputs.num_targets
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
    "multiple-choice": MultipleChoice,
    "image-classification": SequenceClassification,
    "distilled-image-classification": DistilledClassification,
    "sentence-embedding": SentenceEmbedding,
    "masked-lm": MaskedLM,
    "causal-lm": CausalLM,
    "seq2seq-lm": Seq2SeqLM,
}


def pool(head: Head, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> Tensor:
    """Return the vector of each sequence that shape.pooling says, (B, D); of cls_mean (B, 2 D)."""
    pooling = head.shape.pooling
    if pooling not in ("mean", "cls_mean"):
        return head.select(hidden, packing, inputs)
    mean = mean_pool(hidden, packing, head.shape.num_special)
    return mean if pooling == "mean" else torch.cat([hidden[packing.first_tokens], mean], 1)


def select_pooled(packing: Packing, pooling: str) -> Selection | None:
    """Return the first or the last token of each sequence; None where the mean of all is read."""
    if pooling in ("mean", "cls_mean"):
        return None
    is_last = pooling == "last"
    rows = packing.last_tokens if is_last else packing.first_tokens
    return Selection.of_each_sequence(rows.unsqueeze(1), packing, are_last=is_last)
