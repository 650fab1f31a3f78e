"""Statistics of single examples, a row each, which a resample of the examples repeats or leaves out.

`collect` of a task turns any choice of these rows into the statistics that its compute_metrics reads. So every metric
of a resample is computed as on a data set of its own (engine/metrics/bootstrap.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import IGNORE_INDEX, Batch
from engine.metrics.image_classification import TOP_K
from engine.metrics.multi_label_classification import multi_label_statistics
from engine.metrics.question_answering import COLUMNS
from engine.metrics.ranking import NEGATIVE, POSITIVE
from engine.metrics.relation_extraction import NUM_COUNTS
from engine.metrics.text_classification import MAX_MATRIX, class_counts
from models.losses import find_supervised_positions
from models.ops.layers import upcast
from models.ops.packing import Packing, pad_sequences

NO_TARGET = -1.0  # the true class of an example without one


def add_rows(rows: Tensor, labels: Sequence[str]) -> Tensor:
    """Return the sum of rows, (R, K), for statistics that add: (K,)."""
    return rows.sum(0)


def examples_of_tokens(batch: Batch) -> Tensor:
    """Return the example in the batch that each token belongs to, (T,) int64; of a decoder, each of its tokens."""
    lengths = torch.tensor(batch.decoder_lengths or batch.lengths, dtype=torch.int64)
    sequences = torch.tensor(batch.sequences or [1] * len(lengths), dtype=torch.int64)
    of_sequences = torch.repeat_interleave(torch.arange(len(sequences)), sequences)
    return torch.repeat_interleave(of_sequences, lengths)


def token_rows(logits: Tensor, batch: Batch) -> Tensor:
    """Return [sum of losses, right tokens, targets] of each example, (B, 3) fp64, from labels of tokens.

    logits: (targets, V), or (T, V) of all tokens.
    """
    labels = batch.required_labels
    owners = examples_of_tokens(batch).to(labels.device)
    positions = find_supervised_positions(labels, batch.num_targets)
    if positions is not None:
        labels, owners = labels.index_select(0, positions), owners.index_select(0, positions)
        logits = logits if len(logits) == len(positions) else logits.index_select(0, positions)
    losses = F.cross_entropy(upcast(logits), labels, reduction="none").double()
    columns = torch.stack([losses, (logits.argmax(-1) == labels).double(), torch.ones_like(losses)], 1)
    return columns.new_zeros(len(batch.ids), 3).index_add_(0, owners, columns)


# ---- one class for each example

CLASS_COLUMNS = ("loss", "true", "predicted", "is_in_top", "log_odds")


def class_rows(logits: Tensor, labels: Tensor, predicted: Tensor | None = None) -> Tensor:
    """Return the CLASS_COLUMNS of each example, (B, 5) fp64; log_odds: of the second of two classes, else 0.

    logits: (B, C); labels: (B,); predicted: as in classification_statistics.
    """
    true = labels.clamp_min(0)
    losses = F.cross_entropy(upcast(logits), labels, reduction="none", ignore_index=IGNORE_INDEX)
    own = logits.gather(1, true[:, None])
    is_earlier = torch.arange(logits.shape[1], device=logits.device) < true[:, None]
    is_ahead = ~(logits <= own) | ((logits == own) & is_earlier)
    is_two = logits.shape[1] == 2
    log_odds = logits[:, 1].double() - logits[:, 0].double() if is_two else torch.zeros_like(losses).double()
    columns = (
        losses,
        torch.where(labels == IGNORE_INDEX, NO_TARGET, true.double()),
        logits.argmax(-1) if predicted is None else predicted,
        is_ahead.sum(1) < TOP_K,
        log_odds,
    )
    return torch.stack([column.double() for column in columns], 1)


def collect_classes(rows: Tensor, labels: Sequence[str]) -> Tensor:
    """Return classification_statistics of the examples of class_rows, those of two classes with their scores."""
    count = len(labels)
    loss, true, predicted, _, log_odds = rows.unbind(1)
    has_target = true >= 0
    weights, classes, chosen = has_target.double(), true.clamp_min(0).long(), predicted.long()
    if count > MAX_MATRIX:
        first = torch.zeros(count, dtype=torch.float64)
        first[0] = loss.sum()
        hits = weights * (classes == chosen)
        counted = [(classes, hits), (chosen, weights), (classes, weights)]
        return torch.cat([first, *(torch.bincount(k, w, minlength=count) for k, w in counted)])
    confusion = torch.bincount(classes * count + chosen, weights, minlength=count * count)
    parts = [loss.sum().reshape(1), confusion]
    if count == 2:
        stored = torch.where(true == 1, POSITIVE, NEGATIVE).double().where(has_target, 0.0)
        scores = torch.zeros(len(rows) | 1, 2, dtype=torch.float64)  # an odd number, as in classification_statistics
        scores[: len(rows)] = torch.stack([log_odds, stored], 1)
        parts.append(scores.flatten())
    return torch.cat(parts)


def collect_images(rows: Tensor, labels: Sequence[str]) -> Tensor:
    """Return image_statistics of the examples of class_rows."""
    hits = rows[:, CLASS_COLUMNS.index("is_in_top")].sum().reshape(1)
    return torch.cat([hits, collect_classes(rows, labels)])


def relation_rows(logits: Tensor, labels: Tensor, no_relation: int | None) -> Tensor:
    """Return class_rows with the class of no relation, or -1, in the place of `is_in_top`, (B, 5) fp64."""
    rows = class_rows(logits, labels)
    rows[:, CLASS_COLUMNS.index("is_in_top")] = NO_TARGET if no_relation is None else no_relation
    return rows


def collect_relations(rows: Tensor, labels: Sequence[str]) -> Tensor:
    """Return relation_statistics of the examples of relation_rows, without scores."""
    end = 1 + len(labels) ** 2 if len(labels) <= MAX_MATRIX else 4 * len(labels)
    statistics = collect_classes(rows, labels)[:end]
    no_relation = rows[0, CLASS_COLUMNS.index("is_in_top")] if len(rows) else NO_TARGET
    is_relation = (torch.arange(len(labels)) != no_relation).double()
    counts = torch.stack([count @ is_relation for count in class_counts(statistics)])
    return torch.cat([counts[:NUM_COUNTS], statistics])


# ---- several labels, numbers, answers


def label_set_rows(logits: Tensor, labels: Tensor, predicted: Tensor) -> Tensor:
    """Return [loss, logits, labels, predicted labels] of each example, (B, 1 + 3 * C) fp64; all arguments (B, C)."""
    is_target = ~labels.isnan() & (labels != IGNORE_INDEX)
    scores, targets = (x.where(is_target, 0.0) for x in (upcast(logits), labels.to(upcast(logits).dtype)))
    losses = F.binary_cross_entropy_with_logits(scores, targets, reduction="none").where(is_target, 0.0).sum(1)
    return torch.cat([losses.double()[:, None], logits.double(), labels.double(), predicted.double()], 1)


def collect_label_sets(rows: Tensor, labels: Sequence[str]) -> Tensor:
    """Return multi_label_statistics of the examples of label_set_rows, with their scores."""
    loss, logits, targets, predicted = torch.split(rows, [1, *[len(labels)] * 3], 1)
    every = range(len(rows))
    return multi_label_statistics(loss.sum(), logits, targets, every, len(rows), predicted > 0)


def collect_numbers(rows: Tensor, labels: Sequence[str]) -> Tensor:
    """Return regression_statistics of rows (prediction, truth)."""
    return rows.flatten()


def question_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Return [sum of losses, windows] of each question, (B, 2) fp64. logits: (T, 2)."""
    packing = Packing(batch.lengths, batch.cu_seqlens)
    log_p = upcast(pad_sequences(logits, packing, float("-inf"))).log_softmax(1)  # (S, L, 2)
    labels = batch.required_labels
    losses = F.nll_loss(
        log_p.transpose(1, 2).flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    is_target = (labels[:, 0] != IGNORE_INDEX).double()
    columns = torch.stack([losses.view(-1, 2).sum(1).double() / 2, is_target], 1)
    sequences = torch.tensor(batch.sequences or [1] * len(labels), dtype=torch.int64)
    owners = torch.repeat_interleave(torch.arange(len(sequences)), sequences).to(labels.device)
    return columns.new_zeros(len(batch.ids), 2).index_add_(0, owners, columns)


def collect_answers(rows: Tensor, labels: Sequence[str]) -> Tensor:
    """Return [sum of losses, windows, a row of COLUMNS for each question] from rows of both."""
    losses, answers = torch.split(rows, [2, len(COLUMNS)], 1)
    return torch.cat([losses.sum(0), answers.flatten()])
