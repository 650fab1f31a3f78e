"""engine.train on a GPU that is not there: nothing waits, and no launches are added unseen (README.md)."""

from __future__ import annotations

import json

import pytest
import torch
from support.fake_gpu import published
from support.fake_gpu.__main__ import TABLE, version
from support.fake_gpu.cases import CASES, compare, find_problems, measure
from support.fake_gpu.rehearsal import missing_names, rehearse

from engine import offload
from engine import train as loop
from engine.precision import Precision
from engine.prefetch import StepFetcher
from models.heads import SequenceClassification

MISSING = missing_names()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"torch {torch.__version__} has no {', '.join(MISSING)}")
# In the default suite: tasks in bf16, and of the rest those that once went wrong. The others are slow.
ALIKE = {"translation bf16", "dialogue bf16", "text-regression bf16", "multi-label-image-classification bf16"}
SAMPLE = {
    *({name for name in CASES if name.endswith(" bf16")} - ALIKE),
    *("causal-lm fp16", "text-classification fp32", "r-drop, tags", "r-drop, sets of labels", "distillation"),
    *("class weights", "pos_weight", "penalties", "windows", "beams", "activation checkpointing", "workers"),
}
TABLE_OF_CASES = json.loads(TABLE.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def one_thread():
    """Shapes need no threads, and the other test processes do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SAMPLE else [pytest.mark.slow]) for name in CASES]
)
def test_step_waits_once_and_launches_what_the_table_says(name, tmp_path):
    report = rehearse(CASES[name].prepare(tmp_path))
    assert find_problems(CASES[name], report) == []
    if TABLE_OF_CASES["torch"] == version():  # other versions decompose ops differently
        assert compare(TABLE_OF_CASES["cases"][name], measure(report)) == []


def test_every_case_is_in_the_table():
    assert list(TABLE_OF_CASES["cases"]) == list(CASES)


# Faults that it must find


def plant(monkeypatch, fault):
    """Call fault(hidden) before the head of a classifier, which reads what it returns."""
    forward = SequenceClassification.forward
    monkeypatch.setattr(
        SequenceClassification, "forward", lambda self, hidden, *rest: forward(self, fault(hidden), *rest)
    )


def read_a_value(hidden):
    return hidden * (hidden.sum().item() != 0)


def index_by_a_mask(hidden):
    return hidden + hidden[hidden > 0].sum()


def copy_from_pageable_memory(hidden):
    return hidden + torch.ones(3).to(hidden.device, non_blocking=True).sum()


def copy_and_wait(hidden):
    return hidden + torch.ones(3).pin_memory().to(hidden.device).sum()


def launch_in_a_loop(hidden):
    for _ in range(20):
        hidden = hidden + 1
    return hidden


def loss_of_three_dimensions(hidden):
    labels = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    return hidden + torch.nn.functional.cross_entropy(hidden.T[None], labels)


FAULTS = {
    loss_of_three_dimensions: "no deterministic kernel: nll_loss2d_forward",
    read_a_value: "value is read by the host",
    index_by_a_mask: "by a mask: its size depends on values",
    copy_from_pageable_memory: "pageable copy",
    copy_and_wait: "not non_blocking",
    launch_in_a_loop: "kernels, in the table",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault, monkeypatch, tmp_path):
    plant(monkeypatch, fault)
    name = "text-classification bf16"
    report = rehearse(CASES[name].prepare(tmp_path))
    found = find_problems(CASES[name], report) + compare(TABLE_OF_CASES["cases"][name], measure(report))
    assert any(FAULTS[fault] in problem for problem in found), found


def test_planted_tensor_of_the_host_ends_the_run(monkeypatch, tmp_path):
    plant(monkeypatch, lambda hidden: hidden + torch.arange(len(hidden))[:, None])
    with pytest.raises(RuntimeError, match=r"(?i)device"):
        rehearse(CASES["text-classification bf16"].prepare(tmp_path))


def test_steps_that_are_not_fetched_ahead_are_found(monkeypatch, tmp_path):
    monkeypatch.setattr(StepFetcher, "fetch", lambda self: None)
    name = "text-classification bf16"
    found = find_problems(CASES[name], rehearse(CASES[name].prepare(tmp_path)))
    assert any(problem.startswith("not copied ahead") for problem in found), found


def test_norm_that_is_read_before_the_update_is_found(monkeypatch, tmp_path):
    clip_ = Precision.clip_

    def read(*args):
        norm = clip_(*args)
        return norm * (norm.item() > 0)

    monkeypatch.setattr(Precision, "clip_", read)
    name = "text-classification bf16"
    found = find_problems(CASES[name], rehearse(CASES[name].prepare(tmp_path)))
    assert any(problem.startswith("before the weights are updated") for problem in found), found


def test_step_without_a_piece_launches_more_kernels(capsys):
    tables = []
    for given in ([], ["--without", "joint-projections"]):
        published.main(["bert-base-ragged", "--shrink", *given])
        tables.append([cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")])
    (_, name, _, kernels, waits, *_), (_, _, _, more, *_) = tables
    assert (name, waits) == ("bert-base-ragged", "1")
    assert int(kernels) < int(more)


def test_offloaded_states_are_on_the_host_between_steps(tmp_path, monkeypatch):
    built = []
    build = loop.build_optimizer
    monkeypatch.setattr(loop, "build_optimizer", lambda *args: built.append(build(*args)) or built[0])
    monkeypatch.setattr(offload, "PART", 1000)
    more = {"optim.offload": True, "checkpoint.keep": ("best",)}  # the fake GPU cannot save what is on the host
    rehearse(CASES["text-classification bf16"].prepare(tmp_path) | more)
    states = [state for state in built[0].state.values() if state]
    assert len(states) == len([p for group in built[0].param_groups for p in group["params"]])
    assert {state[name].device.type for state in states for name in offload.MOVED} == {"cpu"}
    assert {state["step"].device.type for state in states} == {"cuda"}
