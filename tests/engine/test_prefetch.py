"""The next step of data: fetched ahead on a GPU, which is a fake one here, and not at all on a CPU."""

from __future__ import annotations

import pytest
import torch
from support.fake_gpu.rehearsal import ROOT, missing_names

from data import Batch
from engine import prefetch
from engine.prefetch import StepFetcher

CPU = torch.device("cpu")


def steps(taken):
    """Yield steps of two micro-batches without end; note the number of each in `taken`."""
    for step in range(100):
        taken.append(step)
        yield [
            Batch(
                (1,), torch.tensor([0, 1]), None, 0, (i,), (f"{step}-{i}",), input_ids=torch.tensor([step])
            ).pin_memory()
            for i in range(2)
        ]


def ids(micro_batches):
    return [batch.ids[0] for batch in micro_batches]


def test_on_a_cpu_a_step_is_made_when_it_is_needed(monkeypatch):
    monkeypatch.setattr(Batch, "pin_memory", lambda self: self)
    taken = []
    fetcher = StepFetcher(steps(taken), CPU)
    for step in range(3):
        assert ids(next(fetcher)) == [f"{step}-0", f"{step}-1"]
        fetcher.fetch()
        assert taken == list(range(step + 1))
        assert fetcher.seconds > 0


@pytest.mark.skipif(bool(missing_names()), reason="this PyTorch lacks names that the fake GPU needs")
@pytest.mark.parametrize("largest", [prefetch.LARGEST_COPY_AHEAD, 24, 0])
def test_on_a_gpu_the_next_step_is_fetched_once_and_in_order(monkeypatch, largest):
    from support.fake_gpu.device import CUDA, FakeGpu

    monkeypatch.setattr(prefetch, "LARGEST_COPY_AHEAD", largest)
    taken = []
    with FakeGpu(ROOT) as gpu:
        fetcher = StepFetcher(steps(taken), CUDA)
        for step in range(4):
            micro_batches = next(fetcher)
            assert ids(micro_batches) == [f"{step}-0", f"{step}-1"]
            on_gpu = [batch.input_ids.device.type == "cuda" for batch in micro_batches]
            copied = {0: [False, False], 24: [True, False]}.get(largest, [True, True])
            assert on_gpu == (copied if step in (1, 2) else [False, False])
            if step < 2:
                fetcher.fetch()
                fetcher.fetch()
                assert taken == list(range(step + 2))
    assert gpu.report.waits() == []
