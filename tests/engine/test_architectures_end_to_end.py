"""Every architecture that classifies text, through the engine: it learns, in any micro-batches, and resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import zoo
from support.runs import SPECIAL, WORDS, StopAfter, assert_same_run, logged_rows, run_training, write_reviews
from support.task_settings import settings_of
from support.tiny_models import config_folder

import models
from data import MicroBatching, load_tokenizer, training_steps
from engine.tasks import TASKS, read_training_data

HEAD = "sequence-classification"
KINDS = [name for name in zoo.KINDS if HEAD in models.ARCHITECTURES[name].heads]
SAMPLE = ("bert", "modernbert", "deberta-v2", "gpt2")  # the others are slow: their layers are alike


@pytest.fixture(params=[k if k in SAMPLE else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def checkpoint(request, tmp_path, checkpoint_folder) -> Path:
    """Return a random tiny checkpoint of each architecture, with conftest's tokenizer."""
    vocabulary = {"vocab_size": len(WORDS) + len(SPECIAL), "pad_token_id": 0}
    positions = {"max_position_embeddings": 40, "n_positions": 40}
    fields = {k: v for k, v in positions.items() if k in zoo.ZOO[request.param].fields}
    folder = config_folder(tmp_path / "checkpoint", request.param, **vocabulary, **fields)
    models.save_pretrained(models.from_pretrained(folder, init="scratch", seed=1), folder)
    (folder / "tokenizer.json").write_bytes((checkpoint_folder / "tokenizer.json").read_bytes())
    return folder


def test_architecture_learns_sixteen_examples_by_heart(tiny, tmp_path, checkpoint):
    few = str(write_reviews(tmp_path / "few.jsonl", 16))
    changes = {"model.name": str(checkpoint), "model.pooling": "", "model.dropout.all": 0.0, "optim.lr": 3e-3}
    changes |= {"data.train": few, "data.validation": few, "train.max_steps": 120, "eval.every_steps": 120}
    result = run_training(tiny(**changes))
    assert result["best_accuracy"] == 1.0
    assert [row["loss"] for row in logged_rows(tiny().run.folder) if "lr" in row][-1] < 0.05


def test_p01_micro_batches_change_no_gradient(tiny, checkpoint):
    config = tiny(**{"model.name": str(checkpoint)})
    task = TASKS["text-classification"]
    settings = settings_of(config)
    rows, _, _, labels, _ = read_training_data(task, settings, 0)
    model = models.from_pretrained(checkpoint, head=HEAD, labels=labels, dropout=0.0).double().train()
    examples = task.encode(rows, load_tokenizer(checkpoint), settings, labels, True)

    def gradients(*limits_of_ranks):
        model.zero_grad()
        for limits in limits_of_ranks:
            for batch in next(training_steps(examples, 16, 0, limits)):
                (model(batch).loss_sum / 16).backward()
        return [p.grad.clone() for p in model.parameters()]

    whole = gradients(MicroBatching())
    scale = max(gradient.abs().max() for gradient in whole)
    for limits_of_ranks in (
        [MicroBatching(max_examples=1)],
        [MicroBatching(max_tokens=50)],
        [MicroBatching(max_examples=5, rank=r, world_size=2) for r in (0, 1)],
    ):
        for found, expected in zip(gradients(*limits_of_ranks), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * scale.item())


def test_p04_architecture_resumes_bit_for_bit_with_dropout(tiny, tmp_path, checkpoint):
    changes = {
        "model.name": str(checkpoint),
        "model.pooling": "",
        "model.dropout.all": 0.2,
        "model.dropout.drop_path": 0.2,
    }
    changes |= {"train.max_steps": 8, "eval.every_steps": 4, "train.micro_batch_size": 5}
    run_training(tiny(**changes | {"run.folder": str(tmp_path / "whole")}))
    stopped = changes | {"run.folder": str(tmp_path / "stopped")}
    assert run_training(tiny(**stopped), StopAfter(5)) is None
    run_training(tiny(**stopped | {"run.resume": "yes"}))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
