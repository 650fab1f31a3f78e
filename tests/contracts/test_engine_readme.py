"""engine/README.md: every example is complete, is at most 25 lines, and does what it says on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import CPU, QuietStop, StopAfter, assert_same_run, logged_rows, run_module, write_reviews

import engine
from engine.checkpoint import claim
from engine.config import Config

ENGINE = Path(engine.__file__).parent
README = (ENGINE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
PLUGINS = {
    match[1]: (block, match[2].replace("\\\n# ", ""))  # a long command goes on in the next comment
    for block in BLOCKS
    if (match := re.match(r"# (my_\w+\.py): torchrun -m engine\.train ((?:.*\\\n)*.*)\n", block))
}
LOOP = next(block for block in BLOCKS if block.startswith("# in my_loop.py"))
REPLACED = "objective = training_objective(model, cfg.regularize, teacher, cfg.train.loss, task.step_loss(settings))"


def test_the_examples_are_those_that_were_promised_and_short():
    assert set(PLUGINS) >= {f"my_{name}.py" for name in ("lion", "schedule", "metric", "loss", "data", "head")}
    lines = {block.split("\n")[0]: sum(bool(line.strip()) for line in block.splitlines()) for block in BLOCKS}
    assert {name: count for name, count in lines.items() if count > 25} == {}


def tiny_flags(checkpoint_folder: Path, reviews: Path) -> list[str]:
    return [
        *("--run.folder=run", "--run.device=cpu", f"--model.name={checkpoint_folder}"),
        *("--data.max_length=32", "--train.global_batch_size=16", "--train.max_steps=4", "--eval.every_steps=2"),
        *("--log.every_steps=1", f"--data.train={reviews}"),
    ]


# Each runs three commands, so one of them stands for all by default.
EXAMPLES = [pytest.param(name, marks=[pytest.mark.slow] * (name != "my_head.py")) for name in PLUGINS]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains_evaluates_and_predicts(tmp_path, checkpoint_folder, reviews, name):
    block, arguments = PLUGINS[name]
    (tmp_path / name).write_text(block)
    (tmp_path / "empty.toml").write_text("schema = 2\n")
    rows = [json.loads(line) for line in reviews.read_text().splitlines()]
    stars = [{"body": row["text"], "stars": 5 if row["label"] == "positive" else 1} for row in rows]
    (tmp_path / "reviews.json").write_text(json.dumps({"reviews": stars}))
    flags = tiny_flags(checkpoint_folder, reviews)
    done = run_module("engine.train", "empty.toml", *flags, *shlex.split(arguments), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [row["loss"] for row in logged_rows(tmp_path / "run") if "lr" in row]
    assert len(losses) == 4
    assert all(loss == loss for loss in losses)
    source = "reviews.json" if name == "my_data.py" else str(reviews)
    plugin = ["--run.plugins", name, "--run.device", "cpu"]
    done = run_module("engine.evaluate", "run", "--data.test", source, *plugin, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    output = ["--output", "out.jsonl"]
    done = run_module("engine.predict", "run", "--input", source, *output, *plugin, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(rows)


def test_lion_is_the_published_update():
    """One step by hand: the sign of the interpolated momentum; then the momentum itself."""
    scope: dict = {}
    exec(PLUGINS["my_lion.py"][0], scope)
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = scope["Lion"]([{"params": [p], "weight_decay": 0.5}], 0.1, (0.9, 0.99))
    p.grad = torch.tensor([3.0, -4.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1]))
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.tensor([0.03, -0.04]))


@pytest.fixture
def my_loop(tmp_path):
    """The copied loop with the README's change, as a module."""
    source = (ENGINE / "train.py").read_text()
    assert source.count(REPLACED) == 1
    code = LOOP.split("\n", 1)[1]
    cls, _, line = code.rpartition("\n\nobjective = ")
    changed = source.replace("USAGE = ", f"{cls}\n\n\nUSAGE = ", 1)
    changed = changed.replace(REPLACED, f"objective = {line.strip()}")
    (tmp_path / "my_loop.py").write_text(changed)
    spec = importlib.util.spec_from_file_location("my_loop", tmp_path / "my_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(loop, config: Config, stop=None):
    with claim(config, CPU) as resumed:
        return loop.train(config, CPU, QuietStop() if stop is None else stop, resumed)


def test_p04_a_copied_loop_with_a_module_of_its_own_resumes(my_loop, tiny, tmp_path):
    """The module's parameters are trained, saved and resumed bit for bit with the model's."""
    run(my_loop, tiny(**{"run.folder": str(tmp_path / "whole")}))
    changes = {"run.folder": str(tmp_path / "parts")}
    assert run(my_loop, tiny(**changes), StopAfter(8)) is None
    run(my_loop, tiny(**changes | {"run.resume": "yes"}))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    saved = [load_file(tmp_path / name / "last" / "objective.safetensors") for name in ("whole", "parts")]
    assert saved[0].keys() == saved[1].keys() == {"objective.log_variance"}
    assert torch.equal(*(tensors["objective.log_variance"] for tensors in saved))
    assert saved[0]["objective.log_variance"].abs().max() > 0
    optimizer = load_file(tmp_path / "whole" / "last" / "optimizer.safetensors")
    assert "exp_avg/objective.log_variance" in optimizer


def test_other_modules_than_before_are_refused_at_resume(my_loop, tiny, tmp_path):
    changes = {"run.folder": str(tmp_path / "run")}
    assert run(my_loop, tiny(**changes), StopAfter(8)) is None
    from engine import train

    with pytest.raises(engine.config.ConfigError, match=r"the objective no longer has the same modules: objective"):
        run(train, tiny(**changes | {"run.resume": "yes"}))


@pytest.mark.slow
def test_a_copy_of_the_loop_is_a_program(tmp_path, checkpoint_folder):
    shutil.copy(ENGINE / "train.py", tmp_path / "my_loop.py")
    (tmp_path / "empty.toml").write_text("schema = 2\n")
    reviews = write_reviews(tmp_path / "reviews.jsonl", 60)
    done = run_module("my_loop", "empty.toml", *tiny_flags(checkpoint_folder, reviews), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
