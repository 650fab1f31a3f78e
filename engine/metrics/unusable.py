"""Metrics that cannot compare models on a data set: undefined there, or the same for every model.

Each function returns {metric: reason} for these metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.batch import IGNORE_INDEX
from data.tag_notation import STANDARD, find_notation
from engine.metrics import summarization, translation
from engine.metrics.ranking import MAX_SCORES
from engine.state import HIGHER_IS_BETTER

RANKING_METRICS = ("roc_auc", "roc_auc_micro", "average_precision", "average_precision_micro")
TOP_K = 5  # of top5_accuracy


def for_classes(examples: Any, labels: Sequence[str]) -> dict[str, str]:
    """Return the metrics that need examples of two classes, where one alone occurs."""
    unusable = {"top5_accuracy": f"1 for every model of {len(labels)} classes"} if len(labels) <= TOP_K else {}
    present = np.unique(examples.labels[examples.labels != IGNORE_INDEX]).tolist()
    if len(present) != 1:
        return unusable
    why = f"{labels[present[0]]!r} is the only class there, so a model that always predicts it has the best value"
    names = [name for name in HIGHER_IS_BETTER if name not in unusable]
    return unusable | dict.fromkeys(names, why)


def for_relations(examples: Any, labels: Sequence[str]) -> dict[str, str]:
    """Return the metrics that count relations, where every example has the label of no relation."""
    no_relation = examples.record.no_relation
    if no_relation is None or (examples.labels != no_relation).any():
        return {}
    why = f"0 for every model, since all labels there are {labels[no_relation]!r}"
    return dict.fromkeys(("f1", "precision", "recall"), why)


def for_label_sets(examples: Any, labels: Sequence[str]) -> dict[str, str]:
    """Return the metrics that count labels, where no example has one; those that rank, where a label never varies."""
    counts = np.nansum(examples.labels, axis=0)
    if not counts.any():
        names = [name for name in HIGHER_IS_BETTER if name != "subset_accuracy"]
        return dict.fromkeys(names, "0 or undefined for every model, since no example there has a label")
    if examples.labels.size > MAX_SCORES:
        return dict.fromkeys(RANKING_METRICS, f"not computed from more than {MAX_SCORES:,} scores")
    constant = [repr(labels[i]) for i in np.flatnonzero((counts == 0) | (counts == len(examples))).tolist()]
    more = f" and {len(constant) - 1:,} more" if len(constant) > 1 else ""
    why = "undefined, since no example there, or every one, has the label "
    return {"roc_auc": why + constant[0] + more} if constant else {}


def for_scores(examples: Any, labels: Sequence[str]) -> dict[str, str]:
    """Return the correlations, where the targets do not vary."""
    if len(examples) > 1 and np.ptp(examples.labels) > 0:
        return {}
    return dict.fromkeys(("pearson", "spearman"), "undefined, since all targets there are equal")


def for_tags(examples: Any, labels: Sequence[str]) -> dict[str, str]:
    """Return the metrics that count entities, where there is none."""
    words, strict = examples.record, ("f1_strict", "precision_strict", "recall_strict")
    if not words.entities:
        return dict.fromkeys(strict, "not defined, since the tags mark no entities")
    notation = find_notation(labels) or STANDARD
    if {notation.split(labels[k])[0] for k in np.unique(words.labels).tolist()} - {"O"}:
        return {}
    names = ("f1", "precision", "recall", *strict)
    return dict.fromkeys(names, "0 for every model, since no word there is in an entity")


def for_summaries(examples: Any, labels: Sequence[str]) -> dict[str, str]:
    """Return the kinds of ROUGE for which no reference has enough words."""
    longest = max((len(summarization.tokenize(text)) for text in examples.record.references), default=0)
    if longest >= 2:
        return {}
    return dict.fromkeys(
        ("rouge2",) if longest else summarization.ROUGES,
        "0 for every model, since no reference there has " + ("two words" if longest else "a word"),
    )


def for_translations(examples: Any, labels: Sequence[str]) -> dict[str, str]:
    """Return bleu, which is 0 where no reference has four tokens."""
    record = examples.record
    longest = max(translation.count_tokens(text, record.bleu_tokenizer) for text in record.references)
    return {} if longest >= 4 else {"bleu": "0 for every model, since no reference there has four tokens"}
