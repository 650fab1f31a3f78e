"""Apple's GPUs: refused in one sentence where there is none, or where they lack something; a run where there is one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import runs
from support import tiny_models as tiny

from data.batch import Batch
from engine import distributed, mps
from engine.config import ConfigError

AVAILABLE = torch.backends.mps.is_available()


@pytest.mark.skipif(AVAILABLE, reason="there is an MPS device")
def test_without_such_a_device_one_sentence_says_so():
    with pytest.raises(ConfigError, match=r"run\.device = mps: .*--run.device cpu"):
        distributed.setup("mps")


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="takes one process, not 2"):
        mps.check_available(2)
    mps.check_available(1)


@pytest.mark.parametrize(
    ("precision", "generates", "fgm", "message"),
    [("fp16", False, 0.0, "fp16"), ("fp32", True, 0.0, "writes texts"), ("bf16", False, 0.5, "fgm_epsilon")],
)
def test_what_it_cannot_compute_is_refused(precision, generates, fgm, message):
    with pytest.raises(ConfigError, match=message):
        mps.check_supported("mps", precision, generates, fgm)
    mps.check_supported("cuda", precision, generates, fgm)
    mps.check_supported("mps", "bf16", False, 0.0)


def test_an_evaluation_reads_from_the_host_and_answers_there(tmp_path):
    """With "meta" as the other device: its results have no values, so those of an evaluation must have been moved."""
    model = tiny.scratch(tmp_path, "bert", "token-classification")
    inputs, moved = tiny.inputs_of(model), []
    spy = SimpleNamespace(to=lambda device: moved.append(device) or inputs)
    mps.keep_results_on_host(model, torch.device("meta"))
    assert model.train()(inputs).logits.requires_grad
    with torch.no_grad():
        out = model.eval()(spy)
    assert moved == [torch.device("meta")]
    assert {x.device.type for x in out} == {"cpu"}


def test_a_batch_to_evaluate_stays_on_the_host():
    batch = Batch((), torch.zeros(1, dtype=torch.int32), None, 0, (), ())
    assert batch.upload(torch.device("mps")) is batch


@pytest.mark.skipif(not AVAILABLE, reason="needs an MPS device")
def test_a_run_on_the_device_learns(tmp_path: Path):
    reviews = runs.write_reviews(tmp_path / "reviews.jsonl", 120)
    config = runs.tiny_config(runs.write_tiny_bert(tmp_path / "tiny"), reviews, tmp_path / "run", {"run.device": "mps"})
    ranks = distributed.setup("mps")
    from engine import train

    with runs.claim(config, ranks) as resumed:
        result = train.train(config, ranks, runs.QuietStop(), resumed)
    assert result["best_accuracy"] > 0.5
