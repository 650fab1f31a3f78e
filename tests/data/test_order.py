"""The order of an epoch: a permutation by an array, and, above a number of examples, one that is computed by places."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

from data import MicroBatching, Row, TextExamples, sample_rows, steps_per_epoch, training_steps
from data import order as module
from data.order import LARGEST_PERMUTATION, KeyedPermutation, epoch_order

ROOT = Path(__file__).parents[2]


@pytest.fixture
def keyed(monkeypatch):
    """Let every order be computed by places."""
    monkeypatch.setattr(module, "LARGEST_PERMUTATION", 0)


def values_of(key: tuple[int, ...], n: int) -> np.ndarray:
    return KeyedPermutation(key, n)[np.arange(n)]


def test_number_of_examples_alone_decides():
    n = LARGEST_PERMUTATION
    assert np.array_equal(epoch_order(3, 2, n), np.random.default_rng([3, 2]).permutation(n))
    assert isinstance(epoch_order(3, 2, n + 1), KeyedPermutation)
    assert len(epoch_order(3, 2, n + 1)) == n + 1


@pytest.mark.parametrize("seed", [0, 2**40])
def test_keyed_order_has_each_example_once(seed):
    """At every size up to 70, around powers of two, and at one that a run may have."""
    sizes = [*range(1, 71), *(2**k + i for k in (7, 10, 13) for i in (-1, 0, 1)), 1000, 2**20 + 1]
    for n in sizes:
        values = values_of((seed, 1), n)
        assert values.dtype == np.int64
        assert np.array_equal(np.sort(values), np.arange(n)), n


@pytest.mark.parametrize("n", [5, 1000, 10**8, 2**31 - 1, 2**40 + 7])
def test_places_alone_are_as_in_the_whole_and_invertible(n):
    """Any places in any order give distinct values inside, the same alone and together."""
    order = KeyedPermutation((7, 3), n)
    places = np.unique(np.random.default_rng(0).integers(0, n, 500))
    values = order[places]
    assert 0 <= values.min() <= values.max() < n
    assert len(np.unique(values)) == len(places)
    shuffled = np.random.default_rng(1).permutation(len(places))
    assert np.array_equal(order[places[shuffled]], values[shuffled])
    assert [int(order[places[i : i + 1]][0]) for i in range(5)] == values[:5].tolist()
    assert len(order[places[:0]]) == 0
    with pytest.raises(IndexError, match=f"of a permutation of {n}"):
        order[np.array([n])]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation in standard deviations of that of two random orders."""
    return float(np.corrcoef(a, b)[0, 1] * len(a) ** 0.5)


def statistics(values: np.ndarray, other: np.ndarray) -> list[float]:
    """Eight statistics of an order, each about normal with mean 0 and deviation 1 for random permutations."""
    n, i, cells = len(values), np.arange(len(values)), 16
    table = np.zeros((cells, cells))
    np.add.at(table, (i * cells // n, values * cells // n), 1)
    expected = np.outer(np.bincount(i * cells // n), np.bincount(i * cells // n)) / n
    chi_square, freedom = ((table - expected) ** 2 / expected).sum(), (cells - 1) ** 2
    displacement = np.abs(values - i).mean() - (n * n - 1) / (3 * n)
    return [
        correlation(values, i),
        correlation(values, other),
        correlation(values[1:], values[:-1]),
        displacement / (n * (2 / 45 / n) ** 0.5),
        (chi_square - freedom) / (2 * freedom) ** 0.5,
        np.count_nonzero(np.diff(values) == 1) - 1,  # Poisson of mean 1
        np.count_nonzero(values == i) - 1,
        np.count_nonzero(values == other) - 1,
    ]


@pytest.mark.parametrize("n", [1_000, 6_000])
def test_keyed_orders_are_as_random_as_shuffles(n):
    """The means of 100 orders of one seed are within 4 of their deviations, and they deviate as random orders do."""
    orders = [values_of((0, epoch), n) for epoch in range(101)]
    found = np.array([statistics(a, b) for a, b in pairwise(orders)])
    assert np.abs(found.mean(0)).max() < 4 / 100**0.5
    assert np.abs(found.std(0) - 1).max() < 0.35


def test_statistics_notice_an_order_that_is_not_random():
    """One round that leaves a half as it is; the reverse order; a rotation."""
    n = 4_096
    i = np.arange(n)
    for poor in (i[::-1], (i + 77) % n, i ^ ((i >> 6) * 37 % 64), (i * 1_365) % n):
        assert np.abs(statistics(poor, i)).max() > 8


def test_orders_of_seeds_and_epochs_differ():
    orders = [values_of((seed, epoch), 2_000) for seed in (0, 1, 2**40) for epoch in (0, 1, 2)]
    pairs = [(a, b) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(abs(correlation(a, b)) for a, b in pairs) < 4


@pytest.mark.usefixtures("keyed")
@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (9, 8), (33, 100), (64, 5)])
def test_an_epoch_of_a_keyed_order_has_each_example_once(count, batch_size):
    examples = TextExamples(
        np.zeros(count, np.int32), np.zeros(count, np.uint8), np.arange(count + 1), None, [*map(str, range(count))], 0
    )
    steps = steps_per_epoch(count, batch_size)
    stream = training_steps(examples, batch_size, 5, MicroBatching(max_examples=2))
    epochs = [[[i for batch in step for i in batch.indices] for step in islice(stream, steps)] for _ in range(3)]
    for epoch, read in enumerate(epochs):
        order = epoch_order(5, epoch, count)[np.arange(count)]
        for place, step in enumerate(read):
            assert sorted(step) == sorted(order[place * batch_size : (place + 1) * batch_size])
        assert sorted(i for step in read for i in step) == list(range(count))
    resumed = training_steps(examples, batch_size, 5, MicroBatching(max_examples=2), start=steps + steps // 2)
    assert [i for batch in next(resumed) for i in batch.indices] == epochs[1][steps // 2]


@pytest.mark.usefixtures("keyed")
def test_a_larger_sample_of_rows_has_the_smaller_one():
    rows = [Row(str(i), i) for i in range(100)]
    samples = [sample_rows(rows, count, 3) for count in (10, 40)]
    assert [len(sample) for sample in samples] == [10, 40]
    assert {row.id for row in samples[0]} < {row.id for row in samples[1]}
    assert samples[1] == sorted(samples[1], key=lambda row: row.line)


FIRST_STEPS = """
    import mmap
    import sys
    from itertools import islice
    from pathlib import Path

    import numpy as np

    from data import MicroBatching, TextExamples, training_steps
    from data.lengths import longest_examples

    def peak():  # KiB; getrusage counts what the parent had before exec
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


    N, WIDTH = int(sys.argv[1]), 8


    class Lengths:
        '''Lengths that are computed from the offsets in a file, for the examples that are asked for.'''

        def __init__(self, offsets):
            self.offsets = offsets

        def __len__(self):
            return len(self.offsets) - 1

        def __getitem__(self, indices):
            return np.full(np.shape(indices), WIDTH)  # the file is sparse: its offsets are all 0


    class Ids:
        def __len__(self):
            return N

        def __getitem__(self, index):
            return str(index)


    class Mapped:
        def __init__(self, path):
            self.tokens = np.memmap(path, np.int32, "r", shape=(N, WIDTH))
            self.tokens._mmap.madvise(mmap.MADV_RANDOM)  # else 16 pages around each are mapped too
            self.lengths, self.ids = Lengths(np.memmap(path, np.int64, "r", shape=(N + 1,))), Ids()

        def __len__(self):
            return N

        def batch(self, indices, epoch=None):
            rows = self.tokens[indices]
            text = TextExamples(
                rows.ravel(), np.zeros(rows.size, np.uint8), np.arange(len(rows) + 1) * WIDTH,
                np.zeros(len(rows), np.int64), [self.ids[i] for i in indices], 0,
            )
            return text.batch(range(len(rows)))


    path = Path(sys.argv[2])
    with path.open("wb") as file:
        file.truncate(N * WIDTH * 4 + 64)
    examples = Mapped(path)
    next(training_steps(examples, 32, 0, MicroBatching(max_tokens=64)))  # with all that is imported late
    before = peak()
    steps = training_steps(examples, 32, 0, MicroBatching(max_tokens=64), start=3 * N // 32)
    ids = [i for step in islice(steps, 50) for batch in step for i in batch.ids]
    assert len(set(ids)) == len(ids) == 50 * 32
    assert len(longest_examples(examples.lengths, 16)) == 16
    print(peak() - before)
"""


@pytest.mark.parametrize("n", [2**22, pytest.param(10**8, marks=pytest.mark.slow)])
def test_memory_of_a_step_does_not_depend_on_the_data(tmp_path, n):
    """With an array of all examples, 8 bytes each, it would: 34 and 800 MB."""
    command = [sys.executable, "-c", textwrap.dedent(FIRST_STEPS), str(n), str(tmp_path / "sparse")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16_000  # KiB: pages of 1,600 examples, and the arrays of some steps
