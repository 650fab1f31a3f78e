"""What is asked about all lengths of a data set, against NumPy on the whole array; chunks are small here."""

from __future__ import annotations

import numpy as np
import pytest

from data import lengths as module
from data.lengths import all_lengths, count_lengths, longest_examples, percentile


class Read:
    """Lengths that are read by an index, as those of a data set larger than memory."""

    def __init__(self, values: np.ndarray):
        self.values, self.largest = values, 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        self.largest = max(self.largest, len(indices))
        return self.values[indices]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)


@pytest.mark.parametrize("n", [1, 6, 7, 8, 50, 333])
@pytest.mark.parametrize("most", [1, 3, 1000])
def test_lengths_are_counted_and_chosen_by_chunks(n, most):
    values = np.random.default_rng([n, most]).integers(0, most + 1, n)
    read = Read(values)
    counts = count_lengths(read)
    assert counts.tolist() == np.bincount(values).tolist() == count_lengths(values).tolist()
    for percent in (0, 5, 50, 95, 99.9, 100):
        assert percentile(counts, percent) == pytest.approx(np.percentile(values, percent))
    order = np.argsort(values, kind="stable")[::-1]
    for count in {1, min(5, n), n}:
        assert longest_examples(read, count).tolist() == order[:count].tolist()
        assert longest_examples(values, count).tolist() == order[:count].tolist()
    assert read.largest <= 7
    assert all_lengths(read).tolist() == values.tolist()
    assert all_lengths(values) is values


def test_known_counts_spare_reading_all_lengths():
    read = Read(np.array([5] * 3 + [2] * 20 + [5] * 9))
    read.counts = np.bincount(read.values)
    assert count_lengths(read) is read.counts
    assert longest_examples(read, 4).tolist() == [31, 30, 29, 28]
    read.values[:14] = 99  # not looked at: enough examples of the largest length were found before
    assert longest_examples(read, 4).tolist() == [31, 30, 29, 28]
