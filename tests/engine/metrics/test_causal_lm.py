"""Metrics of a language model."""

from __future__ import annotations

import math

import numpy as np
import torch

from data.batch import IGNORE_INDEX
from engine.metrics.causal_lm import language_metrics, language_statistics


def test_statistics_against_numpy_and_at_their_limits():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(9, 5)), rng.integers(0, 5, 12)
    labels[[0, 4, 11]] = IGNORE_INDEX
    statistics = language_statistics(torch.tensor(7.0), torch.tensor(logits), torch.tensor(labels), 20)
    hits = (logits.argmax(-1) == labels[labels != IGNORE_INDEX]).sum()
    assert statistics.tolist() == [7.0, hits, 9, 20]
    assert statistics.dtype == torch.float64
    empty = language_statistics(torch.tensor(0.0), torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 0)
    assert empty.tolist() == [0, 0, 0, 0]
    assert language_metrics(torch.tensor([9000.0, 0, 9, 20]).double())["perplexity"] == math.inf
