"""Parts of a researcher's own (engine/plugins.py): trained, resumed, evaluated and predicted with."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
from support import my_parts
from support.runs import SPECIAL, WORDS, StopAfter, assert_same_run, logged_rows, run_module, run_training

import engine
import models
from engine import plugins
from engine.config import Config, ConfigError, override
from engine.errors import TrainingError
from engine.plugins import TABLES, changed_since, load_plugins, loaded_checksums
from engine.tasks import TASKS

STEPS = 6


@pytest.fixture(autouse=True)
def _tables_as_they_were():
    yield
    load_plugins([])


@pytest.fixture
def lab(tmp_path: Path, checkpoint_folder: Path) -> Path:
    """A folder outside the checkout with the parts, a data file in their format, and a model of their architecture."""
    folder = tmp_path / "lab"
    (folder / "bag").mkdir(parents=True)
    shutil.copy(my_parts.__file__, folder / "my_parts.py")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 20))) for _ in range(80)]
    pairs = [[text, "good" if "film" in text.split() else "bad"] for text in texts]
    (folder / "reviews.json").write_text(json.dumps(pairs))
    config = {"model_type": "bag", "vocab_size": len(WORDS) + len(SPECIAL)}
    (folder / "bag" / "config.json").write_text(json.dumps(config))
    shutil.copy(checkpoint_folder / "tokenizer.json", folder / "bag")
    (folder / "mine.toml").write_text("schema = 2\n")
    return folder


SETTINGS = {
    "run.plugins": "my_parts.py",
    "run.task": "my-reviews",
    "model.name": "bag",
    "model.init": "scratch",
    "data.train": "reviews.json",
    "data.max_length": 32,
    "train.global_batch_size": 16,
    "train.max_steps": STEPS,
    "train.loss": "hinge",
    "optim.name": "sign-sgd",
    "optim.lr": 3e-3,
    "optim.lr_schedule": "halves",
    "eval.metric": "worst_class",
    "eval.mode": "max",
    "eval.every_steps": 3,
    "log.every_steps": 1,
    "run.device": "cpu",
}


def flags(**changes: object) -> list[str]:
    return [f"--{key}={value}" for key, value in (SETTINGS | changes).items()]


def config(lab: Path, folder: str, **changes: object) -> Config:
    paths = {"run.folder": str(lab / folder), "run.plugins": str(lab / "my_parts.py"), "model.name": str(lab / "bag")}
    return override(Config(), SETTINGS | paths | {"data.train": str(lab / "reviews.json")} | changes)


def test_one_of_everything_by_the_commands(lab):
    """Train, resume, evaluate and predict, each as a command in the researcher's folder."""
    done = run_module("engine.train", "mine.toml", *flags(**{"run.folder": "run"}), cwd=lab)
    assert done.returncode == 0, done.stderr
    assert "best_worst_class" in done.stdout
    assert done.stdout.count(" --run.plugins my_parts.py\n") == 3  # the next commands can be copied
    assert ', run__plugins=["my_parts.py"])' in (lab / "run/best/README.md").read_text()
    lrs = [row["lr"] for row in logged_rows(lab / "run") if "lr" in row]
    assert [lrs[0], lrs[-1]] == pytest.approx([3e-3, 3e-3 / 8])
    assert json.loads((lab / "run/last/state.json").read_text())["optimizer"]["class"] == "SignSGD"

    longer = flags(**{"run.folder": "run", "train.max_steps": STEPS + 2})
    done = run_module("engine.train", "mine.toml", *longer, "--resume", "--run.allow_changes", cwd=lab)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in logged_rows(lab / "run") if "lr" in row] == list(range(1, STEPS + 3))

    given = ["--run.plugins=my_parts.py", "--run.device=cpu"]
    arguments = ["--data.test", "reviews.json", "--output", "metrics.json", *given]
    done = run_module("engine.evaluate", "run", *arguments, cwd=lab)
    assert done.returncode == 0, done.stderr
    assert "worst_class" in json.loads((lab / "metrics.json").read_text())
    done = run_module("engine.predict", "run", "--input", "reviews.json", "--output", "out.jsonl", *given, cwd=lab)
    assert done.returncode == 0, done.stderr
    predicted = [json.loads(line) for line in (lab / "out.jsonl").read_text().splitlines()]
    assert len(predicted) == 80
    assert {row["label"] for row in predicted} <= {"good", "bad"}


def test_p04_a_run_with_own_parts_resumes_bit_for_bit(lab):
    load_plugins([str(lab / "my_parts.py")])
    run_training(config(lab, "whole"))
    assert run_training(config(lab, "parts"), StopAfter(4)) is None
    run_training(config(lab, "parts", **{"run.resume": "yes"}))
    assert_same_run(lab / "whole", lab / "parts")


def test_own_parts_from_python(lab):
    result = engine.run_training(config(lab, "run"))
    assert "best_worst_class" in result
    parts = str(lab / "my_parts.py")
    with pytest.raises(ConfigError, match=r"my-reviews reads files in a format of its own, not rows in memory"):
        engine.predict_rows(lab / "run", ["a film"], **{"run.plugins": parts})


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_checkpoint_imports_nothing_by_itself(lab, command):
    engine.run_training(config(lab, "run"))
    (lab / "my_parts.py").write_text("raise SystemExit('imported')")
    options = {
        "evaluate": ["--data.test", "reviews.json"],
        "predict": ["--input", "reviews.json", "--output", "o.jsonl"],
    }
    done = run_module(f"engine.{command}", "run", *options[command], cwd=lab)
    assert done.returncode == 2
    assert "loading a checkpoint imports nothing by itself: name them with --run.plugins" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_changed_plugin_stops_a_resume_unless_allowed(lab):
    load_plugins([str(lab / "my_parts.py")])
    assert run_training(config(lab, "run"), StopAfter(4)) is None
    parts = lab / "my_parts.py"
    parts.write_text(parts.read_text() + "\n# changed\n")
    load_plugins([str(parts)])
    with pytest.raises(ConfigError, match=r"my_parts\.py is not loaded as it was"):
        run_training(config(lab, "run", **{"run.resume": "yes"}))
    assert run_training(config(lab, "run", **{"run.resume": "yes", "run.allow_changes": True}))


def test_tables_hold_what_was_named_last_and_no_more(lab):
    before = {name: dict(table) for name, (table, _) in TABLES.items()}
    parts = str(lab / "my_parts.py")
    load_plugins([parts])
    assert "bag" in models.ARCHITECTURES
    assert "worst_class" in TASKS["my-reviews"].metrics
    assert loaded_checksums() == {parts: plugins.checksum(parts)}
    load_plugins([parts])  # again, as a notebook does
    load_plugins([])
    assert {name: dict(table) for name, (table, _) in TABLES.items()} == before
    assert changed_since({"x.py": "0" * 64}) == ["the plugin x.py is not loaded as it was"]


MISTAKES = {
    "nowhere.py": (None, "'nowhere.py': no such file"),
    "no_such_module": (None, "is neither a file ending in .py nor a module"),
    "empty.py": ("x = 1\n", "empty.py defines none of ARCHITECTURES, HEADS,"),
    "broken.py": ("import torch\n\nHEADS = {'x': undefined}\n", "broken.py:3: NameError: name 'undefined'"),
    "syntax.py": ("def f(:\n", "syntax.py:1: "),
    "list.py": ("HEADS = ['x']\n", "HEADS should be a dictionary, not a list"),
    "kind.py": ("HEADS = {'x': int}\n", "HEADS['x'] should be a subclass of models.heads.Head"),
    "taken.py": ("OPTIMIZERS = {'adamw': print}\n", "OPTIMIZERS['adamw'] exists already: choose another name"),
    "task.py": ("METRICS = {'text-clasification': {}}\n", "did you mean 'text-classification'?"),
    "metric.py": ("METRICS = {'text-classification': {'accuracy': len}}\n", "has a metric 'accuracy' already"),
    "named.py": ("METRICS = {'text-classification': {'step': len}}\n", "has a metric 'step' already"),
    "key.py": ("HEADS = {3: int}\n", "HEADS[3]: a name is a text"),
    "./nul.py": ("\0", "nul.py:1: "),
    "./rows.jsonl": ("{}\n", "is no Python file"),
    "metrics.py": ("METRICS = {'text-classification': [len]}\n", "should be {name: function(statistics, labels)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_plugin_is_one_sentence(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text, message = MISTAKES[name]
    if text is not None:
        Path(name).write_text(text)
    before = {table: dict(entries) for table, (entries, _) in TABLES.items()}
    with pytest.raises(ConfigError) as caught:
        load_plugins([name])
    assert message in str(caught.value)
    assert {table: dict(entries) for table, (entries, _) in TABLES.items()} == before


def test_a_module_beside_the_plugin_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("beside_the_plugin.py").write_text("def constant(step, total_steps, optim):\n    return 1.0\n")
    Path("parts.py").write_text("from beside_the_plugin import constant\nSCHEDULES = {'flat': constant}\n")
    before = list(sys.path)
    load_plugins(["parts.py", "parts.py"])
    assert TABLES["SCHEDULES"][0]["flat"](3, 9, None) == 1.0
    load_plugins([])
    assert sys.path == before


def test_plugins_of_one_name_in_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "parts.py").write_text(f"class C: folder = '{folder}'\nSCHEDULES = {{'{folder}': C}}\n")
    load_plugins(["a/parts.py", "b/parts.py"])
    for folder in ("a", "b"):
        cls = TABLES["SCHEDULES"][0][folder]
        assert sys.modules[cls.__module__].C is cls


def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Load a plugin with this text in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(f"import torch\nfrom torch.nn import functional as F\n{text}\n")
    load_plugins(["mine.py"])


COUNTS = """
from dataclasses import replace
from torch import nn
from engine.tasks import TASKS as ENGINE_TASKS
from models.heads import SequenceClassification
class Counts(SequenceClassification):
    def __init__(self, shape):
        super().__init__(shape)
        self.register_buffer("count", torch.ones(shape.hidden_size))
    def forward(self, hidden, packing, inputs):
        if self.training:
            self.count = self.count + 0.1
        return super().forward(hidden * self.count, packing, inputs)
HEADS = {"counts": Counts}
TASKS = {"counted": replace(ENGINE_TASKS["text-classification"], head="counts")}
"""


def test_buffers_are_those_of_the_evaluated_step(tiny, reviews, tmp_path, monkeypatch):
    """They are resumed too, and no forward but those of training changes them."""
    use(tmp_path, monkeypatch, COUNTS)
    changes = {"run.task": "counted", "run.plugins": "mine.py", "data.validation": str(reviews), "eval.metric": "loss"}
    whole, parts = ({"run.folder": str(tmp_path / name)} for name in ("whole", "parts"))
    run_training(tiny(**changes | whole))
    assert run_training(tiny(**changes | parts), StopAfter(8)) is None
    run_training(tiny(**changes | parts | {"run.resume": "yes"}))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    rows = [json.loads(line) for line in reviews.read_text().splitlines()]
    best = [row["evaluation"] for row in logged_rows(tmp_path / "whole") if row.get("best")][-1]
    metrics = engine.evaluate_rows(tmp_path / "whole", rows, **{"run.plugins": "mine.py"})
    assert metrics == pytest.approx(best)


METRIC = "METRICS = {{'text-classification': {{'mine': lambda statistics, labels: {}}}}}"


@pytest.mark.parametrize("value", ["None", "torch.ones(2)", "'high'", "{}"])
def test_own_metric_that_is_no_number_is_named(tiny, tmp_path, monkeypatch, value):
    use(tmp_path, monkeypatch, METRIC.format(value))
    with pytest.raises(TrainingError, match=r"the metric 'mine' should return a number, not "):
        run_training(tiny(**{"train.max_steps": 2}))


def test_own_metric_is_watched_in_the_direction_that_is_set(tiny, tmp_path, monkeypatch):
    """No name says whether lower is better; the wrong guess would keep the worst weights."""
    use(tmp_path, monkeypatch, METRIC.format("statistics[0].item()"))
    changes = {"eval.metric": "mine", "train.max_steps": 4, "eval.every_steps": 2}
    with pytest.raises(
        ConfigError, match=r"eval\.mode = auto does not know whether a higher or a lower mine is better"
    ):
        run_training(tiny(**changes))
    best = run_training(tiny(**changes | {"eval.mode": "min"}))["best_mine"]
    evaluations = [row["evaluation"]["mine"] for row in logged_rows(tmp_path / "run") if "evaluation" in row]
    assert best == min(evaluations)


LOSS = "LOSSES = {{'mine': lambda logits, batch: {}}}"
SUM = "F.cross_entropy(logits, batch.labels, reduction='sum')"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "F.cross_entropy(logits, batch.labels, reduction='none')",
            r"returns is a tensor of shape \[0\]; it should be",
        ),
        ("F.cross_entropy(logits, batch.labels)", "without examples is nan, and should be 0: .* not their mean"),
        (f"1.0 + {SUM}", "without examples is 1, and should be 0"),
        (f"{SUM}.detach()", "is a tensor without a gradient"),
        (f"{SUM}.item()", "is a float; it should be a scalar tensor"),
        (f"({SUM}, logits)", "is a tuple"),
        (
            f"{SUM} * (1 if len(logits) == 0 else float('nan'))",
            r"the training objective \(train.loss, .* is not, example ids r",
        ),
    ],
)
def test_own_loss_that_is_no_sum_is_refused(tiny, tmp_path, monkeypatch, value, message):
    use(tmp_path, monkeypatch, LOSS.format(value))
    with pytest.raises(TrainingError, match=message):
        run_training(tiny(**{"train.loss": "mine", "train.max_steps": 2}))


def test_own_code_that_fails_without_examples_says_why(tiny, tmp_path, monkeypatch):
    use(tmp_path, monkeypatch, LOSS.format("logits.sum() / len(logits) if 1 / len(logits) else 0"))
    with pytest.raises(ZeroDivisionError) as caught:
        run_training(tiny(**{"train.loss": "mine"}))
    assert "a micro-batch without examples" in caught.value.__notes__[0]


@pytest.mark.parametrize("value", ["-1.0", "float('nan')", "None", "torch.ones(2)", "1.0 if step < 8 else 1 / 0.0"])
def test_own_schedule_is_checked_before_training(tiny, tmp_path, monkeypatch, value):
    use(tmp_path, monkeypatch, f"SCHEDULES = {{'mine': lambda step, total_steps, optim: {value}}}")
    error = ZeroDivisionError if "/ 0.0" in value else ConfigError
    with pytest.raises(error, match=r"gives .* for step 5 of 20; a factor of optim.lr is a finite number|division"):
        run_training(tiny(**{"optim.lr_schedule": "mine"}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


OPTIMIZER = "OPTIMIZERS = {{'mine': lambda groups, optim: {}}}"
ALL = "[p for group in groups for p in group['params']]"


@pytest.mark.parametrize(
    ("value", "changes", "message"),
    [
        ("None", {}, "its function should return an optimizer, not None"),
        (f"torch.optim.LBFGS({ALL})", {}, "LBFGS.step needs a closure"),
        ("torch.optim.SGD([{**g, 'lr': i} for i, g in enumerate(groups)], lr=1.0)", {}, "its groups differ in lr"),
        (f"torch.optim.SGD({ALL}, lr=1.0)", {"optim.layer_decay": 0.5}, "its groups lack lr_scale"),
    ],
)
def test_own_optimizer_that_the_loop_would_misuse(tiny, tmp_path, monkeypatch, value, changes, message):
    use(tmp_path, monkeypatch, OPTIMIZER.format(value))
    with pytest.raises(ConfigError, match=message):
        run_training(tiny(**{"optim.name": "mine"} | changes))


COUNTING = """
class Counting(torch.optim.SGD):
    calls = 0
    def step(self, closure=None):
        self.calls += 1
        for i, group in enumerate(self.param_groups):
            group["k"] = group.get("k", 0) + 1
            group["d"] = group.get("d", torch.ones(2)) * 1.5
            for p in group["params"]:
                KEPT
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] * self.calls * group["k"] * group["d"][0].item())
OPTIMIZERS = {"mine": lambda groups, optim: Counting(groups, lr=optim.lr)}
""".replace("    def step", "    @torch.no_grad()\n    def step")


def test_p04_what_an_optimizer_counts_itself_is_resumed(tiny, tmp_path, monkeypatch):
    """In its groups, as a learning rate that it estimates, and in its attributes."""
    use(tmp_path, monkeypatch, COUNTING.replace("KEPT", "pass"))
    changes = {"optim.name": "mine", "optim.lr": 1e-4, "regularize.ema_decay": 0.9}
    whole, parts = ({"run.folder": str(tmp_path / name)} for name in ("whole", "parts"))
    run_training(tiny(**changes | whole))
    assert run_training(tiny(**changes | parts), StopAfter(8)) is None
    run_training(tiny(**changes | parts | {"run.resume": "yes"}))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("kept", ["self.state[p]['x'] = [1]", "self.state['all'] = {'x': 1}", "group['x'] = [1]"])
def test_optimizer_state_that_cannot_be_saved_ends_step_1(tiny, tmp_path, monkeypatch, kept):
    use(tmp_path, monkeypatch, COUNTING.replace("KEPT", kept))
    with pytest.raises(
        TrainingError, match=r"Counting keeps a (list|dict) \((x|all) of .*; a checkpoint holds tensors"
    ):
        run_training(tiny(**{"optim.name": "mine"}))
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_numpy_numbers_of_an_optimizer_are_saved(tiny, tmp_path, monkeypatch):
    use(tmp_path, monkeypatch, "import numpy as np\n" + COUNTING.replace("KEPT", "self.state[p]['x'] = np.int64(3)"))
    run_training(tiny(**{"optim.name": "mine", "train.max_steps": 2}))
    values = json.loads((tmp_path / "run/last/state.json").read_text())["optimizer"]["values"]
    assert values["x/head.classifier.bias"] == 3


def test_the_path_of_a_plugin_may_change_on_resume(lab):
    """Its content is compared, not its name."""
    assert run_training_of(lab, config(lab, "run"), StopAfter(4)) is None
    shutil.move(lab / "my_parts.py", lab / "bag" / "moved.py")
    changes = {"run.resume": "yes", "run.plugins": str(lab / "bag" / "moved.py")}
    assert run_training_of(lab, config(lab, "run", **changes))


def run_training_of(lab: Path, settings: Config, stop: StopAfter | None = None) -> dict[str, float] | None:
    load_plugins(settings.run.plugins)
    return run_training(settings, stop)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.name": "lamb"}, "optim.name = 'lamb'"),
        ({"optim.lr_schedule": "zigzag"}, "optim.lr_schedule = 'zigzag'"),
        ({"train.loss": "huber"}, "train.loss = 'huber': there is none; run.plugins names a file that defines LOSSES"),
        ({"run.task": "my-reviews"}, "run.task = 'my-reviews'"),
    ],
)
def test_a_name_that_no_table_has_is_answered_with_the_choices(tiny, changes, message):
    with pytest.raises(ConfigError) as caught:
        run_training(tiny(**changes))
    assert message in str(caught.value)
