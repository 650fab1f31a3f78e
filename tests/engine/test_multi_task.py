"""Several tasks on one model: each task alone is the oracle of its part, and of a run of one task."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.cases import evaluation, predictions
from support.runs import StopAfter, assert_same_run, assert_same_tensors, logged_rows, run_module, run_training
from support.task_data import write

from data import MicroBatching
from data.loader import split_into_micro_batches
from engine import config as configs
from engine.config import Config, ConfigError
from engine.errors import TrainingError
from engine.model import build_model
from engine.multi_task import open_task, read_parts
from engine.objective import training_objective
from engine.save_schedule import SaveSchedule
from engine.tasks import read_training_data
from engine.validate import task_settings
from models.multi_task import one_task

JOINED = [  # not those that write texts, or learn from the examples of a step together
    "text-classification",
    "multi-label-classification",
    "text-regression",
    "token-classification",
    "masked-lm",
    "question-answering",
    "relation-extraction",
]
OF_RECIPE = ("run.task", "data.", "question_answering.")


def write_recipe(task: str, folder: Path, name: str = "", **changes: Any) -> dict[str, Any]:
    """Write the recipe NAME.toml of a task on its data, with a model of its own; return its settings."""
    own = folder / (name or task)
    own.mkdir(parents=True)
    settings = write(task, own, count=20) | {key.replace("__", "."): value for key, value in changes.items()}
    recipe = configs.override(Config(), {key: settings[key] for key in settings if key.startswith(OF_RECIPE)})
    (folder / f"{name or task}.toml").write_text(configs.to_toml(recipe))
    return settings


def joint_config(folder: Path, tasks: list[str], **changes: Any) -> Config:
    """Return the configuration of a run of these tasks, whose recipes it writes if they are not there."""
    for task in tasks:
        if not (folder / f"{task}.toml").exists():
            write_recipe(task, folder)
    values = {
        "run.task": "multi-task",
        "run.folder": str(folder / "run"),
        "run.device": "cpu",
        "model.name": str(folder / tasks[0] / "model"),
        "model.init": "scratch",
        "multi_task.recipes": [str(folder / f"{task}.toml") for task in tasks],
        "train.max_steps": 4,
        "train.global_batch_size": 8,
        "optim.lr": 1e-3,
        "eval.every_steps": 2,
        "log.every_steps": 1,
        "checkpoint.every_minutes": 0.0,
    }
    config = configs.override(Config(), values | {key.replace("__", "."): value for key, value in changes.items()})
    configs.check(config)
    return config


def load(config: Config) -> tuple[Any, Any]:
    """Return the model, in fp64 and without dropout, and the training examples as the loop has them."""
    task, _ = open_task(config)
    settings = task_settings(config, task)
    rows, _, _, labels, _ = read_training_data(task, settings, 0)
    model, folder = build_model(config.model, task, labels, 0.0, 0, None)
    encode = task.encoder(task.load_processor(folder), settings, model.labels)
    examples = task.augment(encode(rows), rows, encode, config.augment, 0)
    return model.double(), examples


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "task", ["text-classification", *(pytest.param(x, marks=pytest.mark.slow) for x in JOINED[1:])]
)
def test_one_task_is_its_plain_run_bit_for_bit(task, tmp_path):
    """With dropout: its draws are those of the plain run too."""
    joint = joint_config(tmp_path, [task])
    (part,) = read_parts(joint)
    plain = configs.override(part.config, {"run.folder": str(tmp_path / "plain")})
    result, expected = run_training(joint), run_training(plain)
    assert_same_tensors(tmp_path / f"run/best-{task}/model.safetensors", tmp_path / "plain/best/model.safetensors")
    assert result["best_step"] == expected["best_step"]
    for row, plain_row in zip(logged_rows(tmp_path / "run"), logged_rows(tmp_path / "plain"), strict=True):
        metrics = plain_row.pop("evaluation", {})
        assert {key: row["evaluation"][f"{task}/{key}"] for key in metrics} == metrics
        assert [row[key] for key in plain_row if "best" not in key] == [
            v for k, v in plain_row.items() if "best" not in k
        ]


@pytest.mark.parametrize(
    "tasks", [JOINED, *(pytest.param([a, b], marks=pytest.mark.slow) for a in JOINED for b in JOINED if a < b)], ids=str
)
def test_gradients_are_the_weighted_sum_of_those_of_each(tasks, tmp_path):
    weights = [str(1 + 0.5 * i) for i in range(len(tasks))]
    model, examples = load(joint_config(tmp_path, tasks, multi_task__weights=weights, model__dropout__all=0.0))
    training_objective(model, Config().regularize, None)
    model.train()
    batch = examples.batch(range(len(examples)), epoch=0)
    (model(batch).loss_sum / batch.weighted_targets).backward()
    total, count = {}, 0.0
    for name, weight in zip(tasks, weights, strict=True):
        own, alone = load(
            joint_config(tmp_path, [name], model__dropout__all=0.0, model__name=str(tmp_path / tasks[0] / "model"))
        )
        own.load_state_dict({key: value for key, value in model.state_dict().items() if key in own.state_dict()})
        single = one_task(own, name).train()
        part = alone.parts[name].batch(range(len(alone)), epoch=0)
        per_example = alone.parts[name].examples if hasattr(alone.parts[name], "examples") else alone.parts[name]
        factor = float(weight) * len(alone) / per_example.num_targets
        single(part).loss_sum.backward()
        count += factor * part.num_targets
        for key, gradient in gradients(own).items():
            total[key] = total.get(key, 0.0) + factor * gradient
    found = gradients(model)
    assert found.keys() == total.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, total[key] / count, atol=1e-12, rtol=1e-9)


def test_the_split_of_a_step_changes_nothing(tmp_path):
    model, examples = load(joint_config(tmp_path, JOINED[2:5], model__dropout__all=0.0))
    found = []
    for limits, ranks in ((MicroBatching(), 1), (MicroBatching(max_examples=2), 3), (MicroBatching(max_tokens=30), 2)):
        split = [
            split_into_micro_batches(
                np.arange(0, len(examples), 3),
                examples.lengths,
                MicroBatching(limits.max_examples, limits.max_tokens, rank, ranks),
            )
            for rank in range(ranks)
        ]
        batches = [examples.batch(indices, 0) for of_rank in split for indices in of_rank]
        count = sum(batch.weighted_targets for batch in batches)
        model.zero_grad()
        for batch in batches:
            (model(batch).loss_sum / count).backward()
        found.append(gradients(model))
    for other in found[1:]:
        for key, gradient in other.items():
            torch.testing.assert_close(gradient, found[0][key], atol=1e-13, rtol=1e-9)


VARIANTS = {
    "micro-batches": {"train__micro_batch_size": 3},
    "lora": {"model__lora__rank": 2, "regularize__ema_decay": 0.9, "optim__layer_decay": 0.8},
    "16 bits": {"train__precision": "bf16", "regularize__fgm_epsilon": 0.5, "train__activation_checkpointing": True},
    "frozen": {
        "model__gradual_unfreezing": 1,
        "optim__lr_scales": ["head.tasks.masked-lm.*=2"],
    },
}


@pytest.mark.parametrize(
    "variant", ["micro-batches", *(pytest.param(x, marks=pytest.mark.slow) for x in [*VARIANTS][1:])]
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(variant, tmp_path):
    """And the folder of each task is an ordinary checkpoint, with the metrics that the run logged."""
    tasks = ["text-classification", "masked-lm", "token-classification"]
    joint = joint_config(tmp_path, tasks, **VARIANTS[variant])
    stopped = configs.override(joint, {"run.folder": str(tmp_path / "stopped")})
    result = run_training(joint)
    assert run_training(stopped, StopAfter(3)) is None
    assert run_training(configs.override(stopped, {"run.resume": "yes"})) == result
    assert_same_run(tmp_path / "stopped", tmp_path / "run")
    for name in tasks:
        assert_same_tensors(*(tmp_path / run / f"best-{name}/model.safetensors" for run in ("run", "stopped")))
    evaluations = {row["step"]: row["evaluation"] for row in logged_rows(tmp_path / "run") if "evaluation" in row}
    for name in tasks:
        source = tmp_path / name / "validation.jsonl"
        found = evaluation(tmp_path / f"run/best-{name}", source)
        assert found["loss"] == pytest.approx(evaluations[result["best_step"]][f"{name}/loss"], rel=1e-5)
        assert len(predictions(tmp_path / f"run/best-{name}", source)) == 10


@pytest.mark.slow
def test_two_ranks_train_as_one_does(tmp_path):
    """A step of 3 examples leaves a rank without examples of some task, and then without any."""
    joint = joint_config(tmp_path, JOINED[3:6], model__dropout__all=0.0, train__global_batch_size=3, optim__name="sgd")
    for ranks in (1, 2):
        recipe = tmp_path / f"{ranks}.toml"
        folder = tmp_path / f"run{ranks}"
        recipe.write_text(configs.to_toml(configs.override(joint, {"run.folder": str(folder)})))
        done = run_module("engine.train", recipe, "--train.micro_batch_size=1", ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (logged_rows(tmp_path / f"run{ranks}") for ranks in (1, 2))
    assert [row["loss"] for row in two if "loss" in row] == pytest.approx([row["loss"] for row in one if "loss" in row])
    weights = [load_file(tmp_path / f"run{ranks}/last/model.safetensors") for ranks in (1, 2)]
    for key, weight in weights[0].items():
        torch.testing.assert_close(weights[1][key], weight, atol=1e-6, rtol=1e-5)


MISTAKES = {
    "no recipe": ({"multi_task__recipes": []}, "multi_task.recipes is empty"),
    "weights": ({"multi_task__weights": ["1"]}, "should be 2 numbers above 0"),
    "data": ({"data__max_length": 9}, "data.max_length = 9 has no effect on multi-task"),
    "section": ({"masked_lm__whole_words": True}, "masked_lm.whole_words = True has no effect on multi-task"),
    "balance": ({"train__sampler": "balanced"}, "train.sampler = 'balanced' does not fit multi-task"),
    "two passes": ({"regularize__r_drop_weight": 1.0}, "regularize.r_drop_weight = 1.0 does not fit multi-task"),
    "temperature": ({"eval__fit_temperature": True}, "eval.fit_temperature = True does not fit multi-task"),
    "thresholds": ({"eval__tune_thresholds": "f1"}, "eval.tune_thresholds = 'f1' does not fit multi-task"),
    "shards": ({"distributed__strategy": "fsdp"}, "distributed.strategy = 'fsdp' is not supported by multi-task"),
    "metric": ({"eval__metric": "f1"}, "eval.metric = 'f1' is not a metric of these tasks"),
    "a task that writes": ({"multi_task__recipes": ["dialogue"]}, "dialogue writes texts"),
    "twice": ({"multi_task__recipes": ["relations", "relations"]}, "names 'relations' twice"),
    "images": ({"multi_task__recipes": ["relations", "fashion_mnist"]}, "fashion_mnist reads images"),
    "unknown": ({"multi_task__recipes": ["no_such"]}, "recipe 'no_such' cannot be read"),
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    joint_config(folder, JOINED[:2])
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_is_said_in_one_sentence(mistake, recipes):
    changes, sentence = MISTAKES[mistake]
    with pytest.raises(ConfigError) as error:
        open_task(joint_config(recipes, JOINED[:2], **changes))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_tasks_may_have_names_of_methods_and_dots(tmp_path, capsys):
    """The folders of both count in the room that the run needs."""
    names = ["train", "my.reviews"]
    for name in names:
        write_recipe("text-classification", tmp_path, name)
    joint = joint_config(tmp_path, names, run__dry_run=True)
    run_training(joint)
    shown = capsys.readouterr().out
    assert shown.count("best-train/ ") == shown.count("best-my.reviews/ ") == 2
    assert re.search(r"checkpoints: .*, best/ .*, best-train/ .*, best-my.reviews/ .*; about ", shown)
    run_training(configs.override(joint, {"run.dry_run": False}))
    shown = capsys.readouterr().out
    assert "  step       mean  train/accuracy  my.reviews/accuracy       loss\n" in shown
    assert f"{tmp_path / 'run'}: best/, best-my.reviews/, best-train/, last/, metrics.jsonl" in shown
    found = load_file(tmp_path / "run/best/model.safetensors")
    own = [load_file(tmp_path / f"run/best-{name}/model.safetensors") for name in names]
    for module, of_task in zip(["train_", "my_reviews"], own, strict=True):
        assert torch.equal(found[f"head.tasks.{module}.classifier.weight"], of_task["classifier.weight"])


def test_the_final_test_is_that_of_the_folder_of_each_task(tmp_path):
    for name in JOINED[:2]:
        write_recipe(name, tmp_path, data__test=str(tmp_path / name / "validation.jsonl"))
    result = run_training(joint_config(tmp_path, JOINED[:2], train__max_steps=2))
    card = (tmp_path / "run/best/README.md").read_text(encoding="utf-8")
    assert "library_name" not in card  # no class of transformers has the heads
    for name in JOINED[:2]:
        assert f'engine.predict_rows("RUN/best-{name}", ' in card
        own = (tmp_path / f"run/best-{name}" / "README.md").read_text(encoding="utf-8")
        assert f"\n# run-{name}: bert for {name}\n" in own
        assert f"| loss | {result[f'test_{name}/loss']:.4g} | {result[f'test_{name}/loss']:.4g} |" in own
        assert f"\n- {name}: Texts of more than 24 tokens are truncated." in card
        found = evaluation(tmp_path / f"run/best-{name}", tmp_path / name / "validation.jsonl")
        tested = {key: result[f"test_{name}/{key}"] for key in found if f"test_{name}/{key}" in result}
        assert "loss" in tested
        assert tested == pytest.approx({key: found[key] for key in tested}, rel=1e-5, nan_ok=True)


def test_the_folder_of_each_task_is_verified_before_the_test(tmp_path, monkeypatch):
    for name in JOINED[:2]:
        write_recipe(name, tmp_path, data__test=str(tmp_path / name / "validation.jsonl"))
    damaged = tmp_path / f"run/best-{JOINED[1]}/model.safetensors"

    def finish(*_: Any) -> None:
        damaged.write_bytes(damaged.read_bytes()[:-4] + b"0123")

    monkeypatch.setattr(SaveSchedule, "finish", finish)
    with pytest.raises(TrainingError, match=f"{damaged} differs from what was written .sha256.; so data.test was not"):
        run_training(joint_config(tmp_path, JOINED[:2], train__max_steps=2))


def test_the_task_of_a_setting_is_named(tmp_path, capsys):
    """It is a setting of one recipe of several, and the same in no other."""
    write_recipe("text-classification", tmp_path, data__max_length=400)
    with pytest.raises(ConfigError, match=r"^text-classification: data.max_length = 400, but .* lower data.max_length"):
        run_training(joint_config(tmp_path, JOINED[:2]))
