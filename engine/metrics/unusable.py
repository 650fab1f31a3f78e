"""Metrics that cannot judge a model on a data set: undefined there, or the same for every model.

Each function returns {metric: why}; a metric that is not in it can judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.batch import IGNORE_INDEX
from data.tag_schemes import split_tag
from engine.metrics import summarization, translation
from engine.state import HIGHER_IS_BETTER

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
    """Return the metrics that count labels, where no example has one."""
    if np.nansum(examples.labels) > 0:
        return {}
    names = [name for name in HIGHER_IS_BETTER if name != "subset_accuracy"]
    return dict.fromkeys(names, "0 or undefined for every model, since no example there has a label")


def for_scores(examples: Any, labels: Sequence[str]) -> dict[str, str]:
    """Return the correlations, where the targets do not vary."""
    if len(examples) > 1 and np.ptp(examples.labels) > 0:
        return {}
    return dict.fromkeys(("pearson", "spearman"), "undefined, since all targets there are equal")


def for_tags(examples: Any, labels: Sequence[str]) -> dict[str, str]:
    """Return the metrics that count entities, where there is none."""
    words = examples.record
    present = {split_tag(labels[k])[0] for k in np.unique(words.labels).tolist()}
    if not words.entities or present - {"O"}:
        return {}
    names = ("f1", "precision", "recall", "f1_strict", "precision_strict", "recall_strict")
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
