"""Metrics of token classification.

Tags that mark entities are scored by entity, by the rules of CoNLL's conlleval, and in the metrics called strict by
those of seqeval's strict mode, which counts entities only where all their tags follow the scheme. Other tags are
classes of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from data.notes import align_right, display_width, short_label
from data.tag_notation import ROLES, STANDARD, Notation, find_notation
from data.tag_schemes import find_entities, find_strict_entities
from engine.metrics.counts import SCORE_HEADER, format_scores, precision_recall_f1, present_averages
from models.ops.packing import to_device

NO_TAG = "\0"  # the predicted tag of a word that the model did not see; no file can have it
MAX_TYPES_SHOWN = 20
HEADER_SIZE = 8  # numbers before the counts
STRICT = slice(5, 8)  # the strict counts among them
STRICT_METRICS = ("f1_strict", "precision_strict", "recall_strict")
Sentence = tuple[Sequence[str], Sequence[str]]  # (true tags, predicted tags) of the same words


def entity_types(labels: Iterable[str]) -> list[str]:
    """Return the types of entities that the tags name, sorted."""
    labels = tuple(labels)
    notation = find_notation(labels) or STANDARD
    return sorted({kind for letter, kind in map(notation.split, labels) if letter in ROLES})


def tagging_statistics(
    loss_sum: Tensor,
    num_targets: int,
    num_unseen: int,
    sentences: Iterable[Sentence],
    labels: Sequence[str],
    entities: bool,
    scheme: str = "IOB2",
) -> Tensor:
    """Return [sum of losses, targets, words, right words, unseen words; strict counts; hits, predicted, true by unit].

    - num_targets: labels that have a loss.
    - num_unseen: words that the model did not see. Their predicted tag is NO_TAG, which counts as wrong, so that
      truncating a text never raises a score.
    - Units are the types of the entities; where tags are classes of their own, the tags.
    - The strict counts are hits, predicted and true entities of all types, by `scheme`; 0 for other tags.

    Returns (8 + 3 * units,) fp64.
    """
    notation = find_notation(labels) or STANDARD
    units = entity_types(labels) if entities else list(labels)
    unit_index = {unit: i for i, unit in enumerate(units)}
    counts = np.zeros((3, len(units)))
    strict = np.zeros(3)
    words = right = 0
    for true, predicted in sentences:
        words += len(true)
        right += sum(a == b for a, b in zip(true, predicted, strict=True))
        if entities:
            spans_of_both = [find_entities(predicted, notation), find_entities(true, notation)]
            strict += _count_strict(true, predicted, scheme, notation)
        else:
            spans_of_both = [
                [(i, i + 1, tag) for i, tag in enumerate(tags) if tag != NO_TAG] for tags in (predicted, true)
            ]
        hits = set(spans_of_both[0]) & set(spans_of_both[1])
        for row, spans in enumerate((hits, *spans_of_both)):
            for *_, unit in spans:
                counts[row, unit_index[unit]] += 1
    totals = torch.tensor([num_targets, words, right, num_unseen, *strict, *counts.reshape(-1)], dtype=torch.float64)
    return torch.cat([loss_sum.detach().double().reshape(1), to_device(totals, loss_sum.device)])


def _count_strict(true: Sequence[str], predicted: Sequence[str], scheme: str, notation: Notation) -> list[int]:
    """Return the numbers of right, predicted and true entities of a sentence, each by the rules of the scheme alone."""
    found = [set(find_strict_entities(tags, scheme, notation)) for tags in (predicted, true)]
    return [len(found[0] & found[1]), len(found[0]), len(found[1])]


def tagging_metrics(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Return loss, accuracy of the words, precision, recall and F1; an undefined score is 0.

    For entities the three are over all types together (micro). For other tags they are means over those that occur
    (macro), as in scikit-learn, and the strict ones are NaN.
    """
    loss_sum, targets, words, right, *_ = statistics[:HEADER_SIZE].tolist()
    counts, strict = _counts(statistics), dict.fromkeys(STRICT_METRICS, float("nan"))
    if _are_entities(statistics, labels):
        counts = counts.sum(1, keepdim=True)
        scores = precision_recall_f1(*statistics[STRICT])
        strict = {f"{name}_strict": value.item() for name, value in scores.items()}
    return {
        "loss": loss_sum / targets if targets else float("nan"),
        "accuracy": right / max(words, 1),
        **present_averages(*counts),
        **strict,
    }


def type_table(statistics: Tensor, labels: Sequence[str]) -> str:
    """Return a line for each type of entity, or each tag, with its scores and count; then the unseen words."""
    units = entity_types(labels) if _are_entities(statistics, labels) else list(labels)
    counts = _counts(statistics)
    scores = precision_recall_f1(*counts)
    shown = [short_label(unit) for unit in units[:MAX_TYPES_SHOWN]]
    width = max(map(display_width, shown), default=0)
    lines = [f"{'':>{width}}  {SCORE_HEADER}"]
    lines += [f"{align_right(unit, width)}  {format_scores(scores, counts[2], i)}" for i, unit in enumerate(shown)]
    if len(units) > len(shown):
        lines.append(f"and {len(units) - len(shown):,} more")
    words, _, num_unseen = statistics[2:5].tolist()
    if num_unseen:
        reason = "the model did not see (truncated, or without a token)"
        lines.append(f"{int(num_unseen):,} of {int(words):,} words count as wrong, which {reason}")
    return "\n".join(lines)


def _are_entities(statistics: Tensor, labels: Sequence[str]) -> bool:
    """Return whether the units are entity types, which are fewer than the tags, since O is one of those."""
    return len(statistics) != HEADER_SIZE + 3 * len(labels)


def _counts(statistics: Tensor) -> Tensor:
    """Return (3, units): hits, predicted, true."""
    return statistics[HEADER_SIZE:].view(3, -1)
