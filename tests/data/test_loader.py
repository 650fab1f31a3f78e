"""The order of examples, and limits_of_rank a step is split for the machine: what P1, P3, P4 and P17 rest on."""

from __future__ import annotations

from itertools import chain, islice, pairwise

import numpy as np
import pytest
import torch

from data import MicroBatching, TextExamples, evaluation_batches, steps_per_epoch, training_steps
from data.loader import split_into_micro_batches
from data.order import epoch_order

LIMITS = [
    {},
    {"max_examples": 1},
    {"max_examples": 3},
    {"max_examples": 8},
    {"max_tokens": 1},
    {"max_tokens": 50},
    {"max_tokens": 400},
]


def make_examples(count: int, seed: int = 0, shortest: int = 2, longest: int = 40) -> TextExamples:
    """`count` random encoded texts; their ids are not their places."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, count)
    total = int(lengths.sum())
    return TextExamples(
        input_ids=rng.integers(0, 1000, total).astype(np.int32),
        token_type_ids=rng.integers(0, 2, total).astype(np.uint8),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=rng.integers(0, 3, count),
        ids=[f"id-{7 * i + 3}" for i in range(count)],
        truncated=0,
    )


def all_ranks(world_size: int, limits: dict[str, int]) -> list[MicroBatching]:
    return [MicroBatching(**limits, rank=rank, world_size=world_size) for rank in range(world_size)]


def assert_same(ours, theirs) -> None:
    """Two micro-batches are equal to the last bit."""
    for name in ("input_ids", "token_type_ids", "cu_seqlens", "labels"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("lengths", "num_targets", "indices", "ids"):
        assert getattr(ours, name) == getattr(theirs, name), name


# The order


@pytest.mark.parametrize("count", [1, 2, 17, 1000])
def test_the_order_is_a_permutation_given_by_seed_and_epoch(count):
    orders = {(seed, epoch): epoch_order(seed, epoch, count) for seed in (0, 1, 2**40) for epoch in (0, 1, 7)}
    for key, order in orders.items():
        assert sorted(order) == list(range(count))
        assert np.array_equal(order, epoch_order(*key, count))
    if count > 16:
        assert len({tuple(order) for order in orders.values()}) == len(orders)


def test_the_order_depends_on_no_global_random_state():
    expected = epoch_order(3, 4, 100)
    np.random.seed(1)
    torch.manual_seed(1)
    assert np.array_equal(epoch_order(3, 4, 100), expected)


def test_the_loader_draws_nothing_from_the_global_random_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(islice(training_steps(make_examples(9), 4, 0, MicroBatching()), 5))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (1, 8), (8, 8), (9, 8), (33, 8), (33, 100), (12, 5)])
def test_an_epoch_has_each_example_once(count, batch_size):
    examples = make_examples(count)
    steps = steps_per_epoch(count, batch_size)
    stream = training_steps(examples, batch_size, 5, MicroBatching(max_examples=2))
    for epoch in range(3):
        groups = [[i for batch in group for i in batch.indices] for group in islice(stream, steps)]
        assert [len(group) for group in groups[:-1]] == [batch_size] * (steps - 1)
        assert 0 < len(groups[-1]) <= batch_size
        order = epoch_order(5, epoch, count)
        for place, group in enumerate(groups):
            assert sorted(group) == sorted(order[place * batch_size : (place + 1) * batch_size])
        assert sorted(chain(*groups)) == list(range(count))


# Micro-batches


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_p17_each_example_of_a_step_is_on_one_rank_once(world_size, limits):
    for count in range(1, 34):
        lengths = make_examples(50, seed=count).lengths
        step = epoch_order(0, count, 50)[:count]
        parts = [
            split_into_micro_batches(step, lengths, limits_of_rank) for limits_of_rank in all_ranks(world_size, limits)
        ]
        assert len({len(part) for part in parts}) == 1, "every rank must run the same number of micro-batches"
        assert sorted(np.concatenate(list(chain(*parts)))) == sorted(step)
        for micro in chain(*parts):
            assert len(micro) <= limits.get("max_examples", count)
            assert len(micro) <= 1 or lengths[micro].sum() <= limits.get("max_tokens", 10**9)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_a_rank_takes_its_share_from_short_to_long(limits):
    lengths = make_examples(64).lengths
    for limits_of_rank in all_ranks(3, limits):
        share = lengths[np.concatenate(split_into_micro_batches(np.arange(64), lengths, limits_of_rank))]
        assert np.array_equal(share, np.sort(share))


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_a_step_makes_no_more_micro_batches_than_needed(limits):
    lengths = make_examples(64).lengths
    for world_size in (1, 2, 3, 4):
        all_limits = all_ranks(world_size, limits)
        counts = [
            len(split_into_micro_batches(np.arange(64), lengths, limits_of_rank)) for limits_of_rank in all_limits
        ]
        full = [
            len([part for part in split_into_micro_batches(np.arange(64), lengths, limits_of_rank) if len(part)])
            for limits_of_rank in all_limits
        ]
        assert counts[0] == max(full), "some micro-batch is empty on every rank"
        if "max_examples" in limits:
            assert counts[0] == -(-len(range(0, 64, world_size)) // limits["max_examples"])
        if not limits:
            assert counts[0] == 1


def test_two_neighbours_never_fit_one_budget_together():
    """Greedy: a micro-batch ends only where the next example would not fit; just fitting is fitting."""
    lengths = make_examples(64).lengths
    for budget in range(60, 120):
        for here, following in pairwise(
            split_into_micro_batches(np.arange(64), lengths, MicroBatching(max_tokens=budget))
        ):
            assert lengths[here].sum() + lengths[following[0]] > budget


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_ranks_have_equal_work(world_size):
    """Dealt from a sorted pack, two shares differ by at most the longest example."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        lengths = np.minimum(rng.geometric(0.03, 300), 128)
        step = rng.permutation(300)[: rng.integers(1, 65)]
        shares = [
            np.concatenate(split_into_micro_batches(step, lengths, limits_of_rank))
            for limits_of_rank in all_ranks(world_size, {"max_examples": 4})
        ]
        tokens = [lengths[share.astype(int)].sum() for share in shares]
        assert max(tokens) - min(tokens) <= lengths[step].max()
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


# Training steps


@pytest.mark.parametrize("limits", [{}, {"max_examples": 2}, {"max_tokens": 60}], ids=str)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 3, 13])
def test_p04_micro_batches_do_not_depend_on_workers_and_start(limits, workers, start):
    """start = k is skipping k: 33 examples in steps of 8 are 5 steps an epoch, so 3 is amid one and 13 amid another."""
    examples = make_examples(33)
    limits_of_rank = MicroBatching(**limits, rank=1, world_size=2)
    expected = list(islice(training_steps(examples, 8, 1, limits_of_rank), start, start + 8))
    stream = training_steps(examples, 8, 1, limits_of_rank, start=start, num_workers=workers)
    for ours, theirs in zip(islice(stream, 8), expected, strict=True):
        assert len(ours) == len(theirs)
        for batch, other in zip(ours, theirs, strict=True):
            assert_same(batch, other)
            assert not batch.input_ids.is_pinned()
    stream.close()


def test_a_step_is_the_same_examples_for_any_number_of_ranks():
    """F8: what a step sees is the recipe's, not the machine's."""
    examples = make_examples(33)
    runs = []
    for world_size in (1, 2, 3, 4, 9):
        streams = [
            training_steps(examples, 8, 0, limits_of_rank)
            for limits_of_rank in all_ranks(world_size, {"max_examples": 2})
        ]
        steps = [list(chain(*groups)) for groups in islice(zip(*streams, strict=True), 12)]
        runs.append([sorted(i for batch in step for i in batch.indices) for step in steps])
    assert all(run == runs[0] for run in runs)


# Evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_p03_evaluation_takes_each_example_on_one_rank_once(world_size, limits):
    for count in range(1, 34):
        examples = make_examples(count)
        parts = [evaluation_batches(examples, limits_of_rank) for limits_of_rank in all_ranks(world_size, limits)]
        assert sorted(np.concatenate(list(chain(*parts)))) == list(range(count))
        for part in chain(*parts):
            assert 0 < len(part) <= limits.get("max_examples", count)
            assert len(part) == 1 or examples.lengths[part].sum() <= limits.get("max_tokens", 10**9)


# The micro-batch


def test_a_batch_is_its_examples_end_to_end():
    examples = make_examples(20)
    rng = np.random.default_rng(0)
    for chosen in ([3], [3, 3], [19, 0, 7], list(range(20)), rng.permutation(20), rng.integers(0, 20, 50)):
        batch = examples.batch(chosen)
        naive_ids, naive_types, ends = [], [], [0]
        for i in chosen:
            begin, end = examples.offsets[i], examples.offsets[i + 1]
            naive_ids += examples.input_ids[begin:end].tolist()
            naive_types += examples.token_type_ids[begin:end].tolist()
            ends.append(len(naive_ids))
        assert batch.input_ids.tolist() == naive_ids
        assert batch.token_type_ids.tolist() == naive_types
        assert batch.cu_seqlens.tolist() == ends
        assert batch.lengths == tuple(examples.lengths[list(chosen)])
        assert batch.labels.tolist() == [examples.labels[i] for i in chosen]
        assert batch.num_targets == len(chosen)
        assert batch.indices == tuple(chosen)
        assert batch.ids == tuple(examples.ids[i] for i in chosen)
        assert batch.num_tokens == len(naive_ids)
        assert (batch.input_ids.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
        assert (batch.token_type_ids.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)


@pytest.mark.parametrize(
    "no_indices", [[], np.empty(0, dtype=np.int64), np.arange(5)[5:]], ids=["list", "array", "slice"]
)
def test_an_empty_batch_has_the_types_of_a_full_one(no_indices):
    examples = make_examples(4)
    empty, full = examples.batch(no_indices), examples.batch([1])
    for name in ("input_ids", "token_type_ids", "labels"):
        assert getattr(empty, name).shape == (0,)
        assert getattr(empty, name).dtype == getattr(full, name).dtype
    assert empty.cu_seqlens.tolist() == [0]
    assert empty.cu_seqlens.dtype == torch.int32
    assert (empty.lengths, empty.ids, empty.indices, empty.num_targets, empty.num_tokens) == ((), (), (), 0, 0)


def test_targets_are_counted_without_those_to_ignore():
    examples = make_examples(10)
    examples.labels[:] = [-100, 0, 1, -100, 2, 2, 0, 1, -100, 0]
    assert examples.num_targets == 7
    assert [examples.batch(part).num_targets for part in ([0, 3], [0, 1], range(10))] == [0, 1, 7]


def test_moving_a_batch_moves_every_tensor_and_leaves_the_rest():
    batch = make_examples(5).batch([4, 2])
    copied = batch.to(torch.device("meta"))
    tensors = [value for value in vars(copied).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 4
    assert all(tensor.is_meta for tensor in tensors)
    assert (copied.ids, copied.lengths, copied.num_targets) == (batch.ids, batch.lengths, batch.num_targets)


# The data set


def test_a_token_costs_five_bytes():
    examples = make_examples(1000)
    total = int(examples.lengths.sum())
    arrays = (examples.input_ids, examples.token_type_ids, examples.offsets, examples.labels)
    assert sum(array.nbytes for array in arrays) == 5 * total + 8 * 1001 + 8 * 1000


@pytest.mark.parametrize("field", ["input_ids", "token_type_ids", "labels"])
@pytest.mark.parametrize("place", [0, 9, -1])
def test_f18_the_fingerprint_changes_with_any_token_or_label(field, place):
    examples, changed = make_examples(20), make_examples(20)
    assert examples.fingerprint() == changed.fingerprint()
    getattr(changed, field)[place] ^= 1
    assert examples.fingerprint() != changed.fingerprint()


def test_f18_the_fingerprint_changes_with_order_and_bounds():
    def of(texts: list[list[int]], labels: list[int]) -> str:
        return TextExamples(
            input_ids=np.array([*chain(*texts)], dtype=np.int32),
            token_type_ids=np.zeros(sum(map(len, texts)), dtype=np.uint8),
            offsets=np.cumsum([0, *map(len, texts)]),
            labels=np.array(labels),
            ids=[str(i) for i in range(len(texts))],
            truncated=0,
        ).fingerprint()

    kinds = [of([[1, 2], [3]], [0, 1]), of([[3], [1, 2]], [1, 0]), of([[1], [2, 3]], [0, 1]), of([[1, 2], [3]], [1, 0])]
    assert len(set(kinds)) == 4
