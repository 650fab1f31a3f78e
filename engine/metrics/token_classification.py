"""Of the tags of words: entities by the rules of CoNLL's conlleval, or where they mark none, each tag a class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from data.tag_schemes import find_entities, split_tag

NO_TAG = "\0"  # of a word that the model did not see; no tag that a file could have
MOST_TYPES = 20  # that the table shows
Sentence = tuple[Sequence[str], Sequence[str]]  # (true tags, predicted tags) of the same words


def entity_types(labels: Iterable[str]) -> list[str]:
    """The types that the tags of entities have, sorted."""
    return sorted({kind for _, kind in map(split_tag, labels)} - {""})


def tagging_statistics(
    loss_sum: Tensor, targets: int, lost: int, sentences: Iterable[Sentence], labels: Sequence[str], entities: bool
) -> Tensor:
    """[sum of losses, targets, words, right words, lost words; hits, predicted, true of each unit] in fp64.

    targets: labels that have a loss. lost: words that the model did not see, whose predicted tag is NO_TAG: they count
    as wrong, so that cutting a text short never pays. Units are the types of the entities, or where tags are classes of
    their own, the tags. Returns (5 + 3 * units,).
    """
    units = entity_types(labels) if entities else list(labels)
    number = {unit: i for i, unit in enumerate(units)}
    counts = np.zeros((3, len(units)))
    words = right = 0
    for true, predicted in sentences:
        words += len(true)
        right += sum(a == b for a, b in zip(true, predicted, strict=True))
        if entities:
            found = [find_entities(predicted), find_entities(true)]
        else:
            found = [[(i, i + 1, tag) for i, tag in enumerate(tags) if tag != NO_TAG] for tags in (predicted, true)]
        hits = set(found[0]) & set(found[1])
        for row, spans in enumerate((hits, *found)):
            for *_, unit in spans:
                counts[row, number[unit]] += 1
    totals = torch.tensor([targets, words, right, lost, *counts.reshape(-1)], dtype=torch.float64)
    return torch.cat([loss_sum.detach().double().reshape(1).cpu(), totals])


def tagging_metrics(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """loss, accuracy of the words, and precision, recall and F1: of all entities together (micro); of tags that mark
    none, averaged over those that occur (macro), as in scikit-learn. What is undefined is 0.
    """
    loss, targets, words, right, _ = statistics[:5].tolist()
    hits, predicted, true = _counts(statistics)
    if _of_entities(statistics, labels):
        hits, predicted, true = (count.sum(0, keepdim=True) for count in (hits, predicted, true))
    occurs = predicted + true > 0
    return {
        "loss": loss / targets if targets else float("nan"),
        "accuracy": right / max(words, 1),
        **{
            name: values[occurs].mean().item() if occurs.any() else 0.0
            for name, values in _precision_recall_f1(hits, predicted, true).items()
        },
    }


def type_table(statistics: Tensor, labels: Sequence[str]) -> str:
    """Precision, recall, F1 and count of each type of entity, or of each tag; and the words the model did not see."""
    units = entity_types(labels) if _of_entities(statistics, labels) else list(labels)
    hits, predicted, true = _counts(statistics)
    values = _precision_recall_f1(hits, predicted, true)
    shown = units[:MOST_TYPES]
    width = max([len(unit) for unit in shown], default=0)
    lines = [f"{'':>{width}}  precision  recall      f1  count"]
    for i, unit in enumerate(shown):
        p, r, f = (values[name][i].item() for name in ("precision", "recall", "f1"))
        lines.append(f"{unit:>{width}}  {p:9.4f}  {r:6.4f}  {f:6.4f}  {int(true[i]):>5}")
    if len(units) > len(shown):
        lines.append(f"and {len(units) - len(shown):,} more")
    words, _, lost = statistics[2:5].tolist()
    if lost:
        what = "the model did not see (cut off, or nothing to the tokenizer)"
        lines.append(f"{int(lost):,} of {int(words):,} words count as wrong, which {what}")
    return "\n".join(lines)


def _of_entities(statistics: Tensor, labels: Sequence[str]) -> bool:
    """Tags of entities are more than the types, since O is one of them."""
    return len(statistics) != 5 + 3 * len(labels)


def _counts(statistics: Tensor) -> Tensor:
    """(3, units): hits, predicted, true."""
    return statistics[5:].view(3, -1)


def _precision_recall_f1(hits: Tensor, predicted: Tensor, true: Tensor) -> dict[str, Tensor]:
    return {
        "precision": hits / predicted.clamp_min(1),
        "recall": hits / true.clamp_min(1),
        "f1": 2 * hits / (predicted + true).clamp_min(1),
    }
