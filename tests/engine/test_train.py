"""The loop as a user meets it: when it stops, what it says and leaves behind, and what a NaN does (P15, P16, P18)."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import (
    CPU,
    QuietStop,
    StopAfter,
    arguments_of,
    assert_same_run,
    logged_rows,
    run_training,
    script_metric,
    write_reviews,
)
from torch import nn

import models
from data import Batch, load_tokenizer
from engine import checkpoint, diagnose, train, validate
from engine.cli import StopRequest, run_command
from engine.config import ConfigError, GenerateSettings, override
from engine.errors import TrainingError
from engine.evaluate import evaluate
from engine.evaluation_batches import EvaluationContext
from engine.optim import learning_rate
from engine.precision import Precision
from engine.tasks import find_task

NAN, INF = float("nan"), float("inf")


def folder_of(config) -> Path:
    return Path(config.run.folder)


def state_of(config, name="last") -> dict:
    return json.loads((folder_of(config) / name / "state.json").read_text())["train"]


# When it ends


@pytest.mark.parametrize(
    ("values", "settings", "end", "best"),
    [
        ([0.5, 0.6, 0.59, 0.5], {"eval.patience": 2}, 20, (0.6, 10)),
        ([0.5, 0.4, 0.6, 0.5, 0.4, 0.3], {"eval.patience": 2}, 25, (0.6, 15)),
        ([0.5, 0.55, 0.58, 0.7], {"eval.patience": 2, "eval.min_delta": 0.1}, 15, (0.5, 5)),
        ([0.5, 0.55, 0.62, 0.7, 0.7], {"eval.patience": 2, "eval.min_delta": 0.1}, 25, (0.62, 15)),
        ([0.5, 0.6, 0.4, 0.5, 0.45], {"eval.patience": 2, "eval.mode": "min"}, 25, (0.4, 15)),
        ([0.5, 0.6, 0.7, 0.3, 0.2], {"eval.patience": 2, "eval.metric": "loss"}, 15, (0.5, 5)),
        ([0.3, 0.2, 0.1, 0.1, 0.1, 0.1], {"eval.patience": 0}, 30, (0.3, 5)),
        ([NAN, 0.1, NAN, NAN], {"eval.patience": 2}, 20, (0.1, 10)),
    ],
)
def test_early_stopping(tiny, monkeypatch, capsys, values, settings, end, best):
    metric = settings.get("eval.metric", "accuracy")
    script_metric(monkeypatch, values, metric)
    config = tiny(**{"train.max_steps": 30} | settings)
    assert run_training(config) == {f"best_{metric}": best[0], "best_step": best[1]}
    reason = "all steps done" if end == 30 else "out of patience"
    assert f"\n{reason}\n" in capsys.readouterr().out
    assert logged_rows(config.run.folder)[-1] | {"step": end, "end": reason} == logged_rows(config.run.folder)[-1]
    assert state_of(config)["step"] == end
    assert state_of(config, "best")["step"] == best[1]


def test_a_run_that_diverges_stops_at_once_with_its_best_kept(tiny, monkeypatch, capsys):
    """Also when it is resumed: the checkpoint knows it."""
    script_metric(monkeypatch, [0.5, 0.7, 0.2])
    config = tiny(**{"eval.stop_if_worse_than": 0.3, "train.max_steps": 30})
    result = run_training(config)
    assert result == {"best_accuracy": 0.7, "best_step": 10} == run_training(override(config, {"run.resume": "yes"}))
    reason = "diverged: 0.2 in the last evaluation, eval.stop_if_worse_than = 0.3"
    assert capsys.readouterr().out.count(f"\n{reason}\n") == 2
    assert logged_rows(config.run.folder)[-1] == {"step": 15, "end": reason, **result}
    assert state_of(config, "best")["step"] == 10


@pytest.mark.parametrize(
    ("settings", "total", "evaluated"),
    [
        ({"train.max_steps": 0, "train.epochs": 1.5, "eval.every_steps": 0}, 11, [7, 11]),
        ({"train.max_steps": 0, "train.epochs": 2, "eval.every_steps": 0}, 14, [7, 14]),
        ({"train.max_steps": 9, "train.epochs": 2, "eval.every_steps": 0}, 9, [7, 9]),
        ({"train.max_steps": 9, "eval.every_steps": 4}, 9, [4, 8, 9]),
        ({"train.max_steps": 3, "eval.every_steps": 50}, 3, [3]),
    ],
)
def test_how_long_and_how_often(tiny, settings, total, evaluated):
    """108 examples are 7 steps of 16."""
    config = tiny(**settings)
    run_training(config)
    rows = logged_rows(config.run.folder)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, total + 1))
    assert [row["step"] for row in rows if "evaluation" in row] == evaluated
    assert [row["lr"] for row in rows if "loss" in row] == [learning_rate(s, total, config.optim) for s in range(total)]


def test_impossible_plan_is_refused_before_anything_is_written(tiny):
    config = tiny(**{"optim.lr_schedule": "wsd", "optim.warmup_steps": 15, "optim.decay_steps": 8})
    with pytest.raises(ConfigError, match=r"optim.warmup_steps = 15\.0 and optim.decay_steps = 8\.0"):
        run_training(config)
    assert not folder_of(config).exists()


def test_the_last_step_is_logged_too(tiny):
    config = tiny(**{"log.every_steps": 7, "eval.every_steps": 20})
    run_training(config)
    assert [row["step"] for row in logged_rows(config.run.folder) if "loss" in row] == [7, 14, 20]


def test_the_test_data_is_measured_once_with_the_best_weights(tiny, tmp_path, monkeypatch):
    test = write_reviews(tmp_path / "test.jsonl", 40, seed=9)
    script_metric(monkeypatch, [0.1, 0.9, 0.2, 0.3, 0.77])
    config = tiny(**{"data.test": str(test)})
    result = run_training(config)
    assert (result["best_step"], result["test_accuracy"]) == (10, 0.77)
    monkeypatch.undo()
    task, _ = find_task(config.run.task)
    losses = {}
    for name in ("best", "last"):
        folder = folder_of(config) / name
        model = models.from_pretrained(folder, head=task.head)
        settings = validate.task_settings(config, task)
        rows = task.read(str(test), settings, True)
        examples = task.encode(rows, load_tokenizer(folder), settings, model.labels, True)
        context = EvaluationContext(task, Precision("fp32", CPU.device), CPU, 4096, GenerateSettings())
        losses[name] = evaluate(model, examples, context)["loss"]
    assert result["test_loss"] == losses["best"] != losses["last"]
    assert logged_rows(config.run.folder)[-1]["test_loss"] == losses["best"]


# What is not finite


def changed_model(monkeypatch, change):
    original = models.from_pretrained

    def patched(*args, **kwargs):
        model = original(*args, **kwargs)
        change(model)
        return model

    monkeypatch.setattr(models, "from_pretrained", patched)


def nan_weight(model):
    with torch.no_grad():
        model.backbone.layers[1].mlp.up.weight[0, 0] = NAN


def nan_gradient(model):
    calls = []

    def hook(gradient):
        calls.append(1)
        return gradient * NAN if len(calls) == 1 + 4 * 6 + 2 else gradient  # wrap's, and 4 a step

    model.backbone.layers[0].mlp.down.weight.register_hook(hook)


class NotFiniteInBackward(torch.autograd.Function):
    """The identity, with NaN as the gradient of some rows."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.masked_fill(ctx.saved_tensors[0][:, None], NAN), None


def bad_backward(model):
    """The gradient of the first layer's MLP is NaN for the tokens of example r17, and for them alone."""

    def note(module, args):
        (batch,) = args
        bad = torch.tensor([module.training and name == "r17" for name in batch.ids], dtype=torch.bool)
        module.bad = bad.repeat_interleave(torch.tensor(batch.lengths, dtype=torch.int64))

    model.register_forward_pre_hook(note)
    down = model.backbone.layers[0].mlp.down
    down.register_forward_hook(lambda module, args, out: NotFiniteInBackward.apply(out, model.bad))


def bad_example(value):
    """The classifier's output for example r17, and for it alone, is `value`."""

    def change(model):
        def note(module, args):
            module.bad = torch.tensor([module.training and name == "r17" for name in args[0].ids], dtype=torch.bool)

        model.register_forward_pre_hook(note)
        model.head.classifier.register_forward_hook(lambda _, __, out: out.masked_fill(model.bad[:, None], value))

    return change


CAUSES = {
    "weight": (nan_weight, "step 1", "the weight backbone.layers.1.mlp.up.weight is not finite"),
    "gradient": (
        nan_gradient,
        "step 7",
        "the forward is finite, the gradient of backbone.layers.0.mlp.down.weight is not, example ids r",
    ),
    "backward": (
        bad_backward,
        "step",
        "the forward is finite; first not finite in the backward: the gradient of the output of backbone.layers.0.mlp."
        "up, example ids r17. ",
    ),
    "nan": (bad_example(NAN), "step", "first not finite: the output of head.classifier, example ids r17. "),
    "inf": (bad_example(INF), "step", "first not finite: the output of head.classifier, example ids r17. "),
}


@pytest.fixture
def not_held_out(reviews):
    return {"data.validation": str(reviews), "train.micro_batch_size": 5}


def test_p18_infinite_loss_with_finite_gradient_is_an_error(tiny, monkeypatch):
    def infinite(module, args, output):
        return output._replace(loss_sum=output.loss_sum + INF) if module.training and len(output.logits) else output

    changed_model(monkeypatch, lambda model: model.register_forward_hook(infinite))
    with pytest.raises(TrainingError, match=r"^step 1 .* rank 0: first not finite: the loss, example ids r"):
        run_training(tiny())


@pytest.mark.parametrize("cause", CAUSES)
def test_p18_raise_says_step_rank_examples_and_module(tiny, monkeypatch, not_held_out, cause):
    change, step, message = CAUSES[cause]
    changed_model(monkeypatch, change)
    config = tiny(**not_held_out)
    with pytest.raises(TrainingError) as error:
        run_training(config)
    assert str(error.value).startswith(step)
    assert f": the gradient is not finite; rank 0: {message}" in str(error.value)
    assert "train.nan_policy = raise stops the run; skip would leave out the step" in str(error.value)
    assert all("nan" not in line.lower() for line in (folder_of(config) / "metrics.jsonl").read_text().splitlines())
    for name in ("best", "last", "previous"):
        if (folder_of(config) / name).exists():
            assert all(t.isfinite().all() for t in load_file(folder_of(config) / name / "model.safetensors").values())
    if cause == "gradient":  # at step 7; the checkpoint of step 5 is there to resume from
        assert state_of(config)["step"] == 5


def test_p18_pixels_that_are_not_finite_are_named():
    pixels = torch.zeros(3, 1, 2, 2)
    pixels[1, 0, 1, 0] = INF
    batch = Batch((), torch.zeros(1, dtype=torch.int32), None, 3, (0, 1, 2), ("a", "b", "c"), pixel_values=pixels)
    found = diagnose._find_in_forward(0, 0, nn.Identity(), [batch], Precision("fp32", CPU.device), CPU)
    assert found == "the pixels of the input are not finite, example ids b"


def test_p18_skip_leaves_the_step_out_and_says_so(tiny, monkeypatch, capsys, not_held_out):
    changed_model(monkeypatch, bad_example(NAN))
    config = tiny(**not_held_out | {"train.nan_policy": "skip"})
    run_training(config)
    out = capsys.readouterr().out
    lines = re.findall(r"^step \d+ \(position \d+\): .*$", out, re.MULTILINE)
    assert lines
    assert all(line.endswith("head.classifier, example ids r17. The step is skipped") for line in lines)
    state = state_of(config)
    assert (state["step"], state["position"], state["skipped_in_a_row"]) == (20, 20 + len(lines), 0)
    rows = [row for row in logged_rows(config.run.folder) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_p18_skip_is_bounded(tiny, monkeypatch):
    changed_model(monkeypatch, nan_weight)
    config = tiny(**{"train.nan_policy": "skip", "train.max_skipped": 3})
    with pytest.raises(TrainingError, match=r"4 steps in a row were skipped \(train\.max_skipped = 3\)"):
        run_training(config)
    assert not (folder_of(config) / "last").exists()


def test_p15_a_step_that_overflows_does_not_advance_the_schedule(tiny, monkeypatch, capsys):
    class Overscaled(Precision):
        def __init__(self, *args):
            super().__init__(*args)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)

    monkeypatch.setattr(train, "Precision", Overscaled)
    config = tiny(**{"train.precision": "fp16", "eval.every_steps": 10})
    run_training(config)
    skipped = re.findall(
        r"^step (\d+) \(position \d+\): .* step skipped, loss scale now", capsys.readouterr().out, re.M
    )
    assert skipped[:2] == ["1", "1"]
    rows = [row for row in logged_rows(config.run.folder) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["lr"] for row in rows] == [learning_rate(step, 20, config.optim) for step in range(20)]
    assert state_of(config)["position"] == 20 + len(skipped)


def test_p04_a_run_with_steps_left_out_resumes_exactly(tiny, tmp_path, monkeypatch, not_held_out):
    changed_model(monkeypatch, bad_example(NAN))
    through = tiny(**not_held_out | {"train.nan_policy": "skip", "run.folder": str(tmp_path / "through")})
    run_training(through)
    config = override(through, {"run.folder": str(tmp_path / "run"), "run.resume": "auto"})
    while run_training(config, StopAfter(6)) is None:
        pass
    assert_same_run(config.run.folder, through.run.folder)


def test_p16_a_parameter_that_no_gradient_reaches_is_named(tiny, monkeypatch):
    changed_model(monkeypatch, lambda model: model.head.register_parameter("idle", nn.Parameter(torch.zeros(2))))
    monkeypatch.setattr(train, "training_steps", None)  # before the first step, which may be dear
    with pytest.raises(TrainingError, match=r"^parameters that no gradient reaches: head\.idle$"):
        run_training(tiny())


# Signals


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)),
    ],
)
def test_f05_signal_leaves_a_checkpoint_that_resumes_exactly(tiny, tmp_path, number):
    """All processes of the run get it, as from a terminal or a scheduler: the workers of the loader too."""
    through = tiny(**{"train.max_steps": 100, "eval.every_steps": 50, "run.folder": str(tmp_path / "through")})
    config = override(through, {"run.folder": str(tmp_path / "run"), "data.num_workers": 2})
    command = [sys.executable, "-m", "engine.train", *arguments_of(config, tmp_path / "recipe.toml")]
    environment = os.environ | {"PYTHONPATH": str(Path(models.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, env=environment, start_new_session=True)
    for line in process.stdout:
        if re.match(r"step +(\d+) ", line):
            os.killpg(process.pid, number)
            break
    out, err = process.communicate(timeout=180)
    assert process.returncode == 128 + number, err
    stopped = int(re.search(r"stopped at step (\d+); the same command with --resume continues the run", out)[1])
    assert state_of(config)["step"] == stopped < 100
    assert checkpoint.verify(folder_of(config) / "last") is None
    if number == signal.SIGTERM:
        run_training(through)
        run_training(override(config, {"run.resume": "yes"}))
        assert_same_run(config.run.folder, through.run.folder)


@pytest.mark.parametrize("call", [0, 1, 4, 5], ids=["validation", "training subset", "last", "last subset"])
def test_f05_a_signal_in_an_evaluation_leaves_it_to_the_resume(tiny, tmp_path, monkeypatch, call):
    settings = {"train.max_steps": 9, "eval.every_steps": 3, "eval.train_subset_size": 8, "regularize.ema_decay": 0.5}
    through = tiny(**settings)
    run_training(through)
    config = override(through, {"run.folder": str(tmp_path / "stopped")})
    calls = []

    class Stopped(QuietStop):
        def is_seen(self):
            return bool(self.signal)

    stop = Stopped()

    def evaluate_and_stop(*args):
        stop.signal = signal.SIGTERM if len(calls) == call else stop.signal
        calls.append(args)
        return evaluate(*args)

    with monkeypatch.context() as patched:
        patched.setattr(train, "evaluate", evaluate_and_stop)
        assert run_training(config, stop) is None
    state = state_of(config)
    assert len(calls) == 2 * (call // 2) + 2
    assert (state["step"], state["evaluated_step"]) == (3 * (call // 2) + 3, 3 * (call // 2))
    run_training(override(config, {"run.resume": "yes"}))
    assert_same_run(config.run.folder, through.run.folder)


@pytest.fixture
def handlers():
    """What signals do is as before after the test."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield lambda: [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("where", ["open_task", "build_model", "StepFetcher"])
def test_f05_a_signal_before_the_loop_ends_at_once(tiny, tmp_path, monkeypatch, handlers, where):
    config = tiny()

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal was swallowed")

    monkeypatch.setattr(train, where, interrupted)
    monkeypatch.setattr(sys, "argv", ["engine.train", *arguments_of(config, tmp_path / "recipe.toml")])
    before = handlers()
    with pytest.raises(SystemExit) as ended:
        run_command(train.main)
    assert ended.value.code == 130
    assert handlers() == before


def test_f05_nothing_listens_once_the_loop_is_done(tiny, handlers):
    before, within = handlers(), []

    class Watched(StopRequest):
        def __bool__(self):
            within.append(handlers())
            return super().__bool__()

    run_training(tiny(**{"train.max_steps": 2}), Watched())
    assert len(within) == 2
    assert all(now != then for row in within for now, then in zip(row, before, strict=True))
    assert handlers() == before


def test_f05_first_signal_is_announced_by_the_main_rank_only(handlers, capfd):
    for announce in (True, False):
        stop = StopRequest()
        stop.listen(announce)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.exit_code == 128 + signal.SIGUSR1
        said = "\nstopping after this step; Ctrl-C again ends at once\n"
        assert capfd.readouterr().err == (said if announce else "")


def test_f05_a_second_sigint_ends_at_once():
    """In a fork, so that pytest's own handling stays as it is: the first one is a flag, the second one is death."""
    child = os.fork()
    if child == 0:
        stop = StopRequest()
        stop.listen(announce=False)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun may pass one on; that is no second Ctrl-C
        if stop and stop.exit_code in (130, 143):
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT


# What it says and writes


def test_every_line_of_the_log_has_its_numbers(tiny):
    config = tiny(**{"log.every_steps": 5, "eval.every_steps": 10})
    run_training(config)
    lines = [json.loads(line) for line in (folder_of(config) / "metrics.jsonl").read_text().splitlines()]
    rows = [line for line in lines if "loss" in line]
    for row in rows:
        assert set(row) == {
            *("step", "loss", "lr", "grad_norm", "samples_per_second", "tokens_per_second"),
            *("data_wait_seconds", "peak_memory_mb"),
        }
        assert all(math.isfinite(value) and value >= 0 for value in row.values())
        assert row["peak_memory_mb"] > 10
        # The texts have 5 to 32 tokens, and no pad is counted.
        assert 5 < row["tokens_per_second"] / row["samples_per_second"] < 32
    evaluations = [line for line in lines if "evaluation" in line]
    assert [set(line) for line in evaluations] == [{"step", "evaluation", "best"}] * 2
    assert {"loss", "accuracy", "precision", "recall", "f1"} <= set(evaluations[0]["evaluation"])
    assert set(lines[-1]) == {"step", "end", "best_accuracy", "best_step"}


def test_without_a_terminal_there_are_lines_only(tiny, capsys):
    run_training(tiny(**{"eval.every_steps": 10}))
    out, err = capsys.readouterr()
    assert err == ""
    assert "\r" not in out
    assert "\x1b" not in out
    assert len(re.findall(r"^step +\d+  loss \S+  lr \S+  norm \S+  \S+ examples/s$", out, re.MULTILINE)) == 20
    assert len(re.findall(r"^step +\d+  validation  accuracy .* loss ", out, re.MULTILINE)) == 2
    assert re.search(r"\n +step +accuracy .* loss\n +10 .*\n +20 .*\n", out)
    assert out.count("<- best") == 1


def test_in_a_terminal_a_bar_shows_loss_rate_and_time_left(tiny, monkeypatch, capsys):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    shown = []

    def read():
        try:
            while data := os.read(ours, 4096):
                shown.append(data)
        except OSError:  # how Linux says that the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        run_training(tiny())
        monkeypatch.undo()
    reader.join(30)
    os.close(ours)
    last = b"".join(shown).decode().rstrip().rsplit("\r", 1)[-1]
    assert re.search(
        r"20/20 \[\d\d:\d\d<\d\d:\d\d, .*step/s, loss \d\.\d{4}, lr \d\.\d\de-\d\d, [\d.]+ examples/s\]", last
    )
    assert len(re.findall(r"^step +\d+  loss", capsys.readouterr().out, re.MULTILINE)) == 20, "stdout is a file"


def test_tensorboard_reads_as_one_run_after_a_resume(tiny):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny(**{"log.report_to": ["tensorboard"], "run.resume": "auto"})
    assert run_training(config, StopAfter(7)) is None
    run_training(config)
    events = accumulator.EventAccumulator(str(folder_of(config) / "tensorboard"))
    events.Reload()
    for name, key in (("train/loss", "loss"), ("train/lr", "lr"), ("train/grad_norm", "grad_norm")):
        rows = [(row["step"], row[key]) for row in logged_rows(config.run.folder) if key in row]
        assert [event.step for event in events.Scalars(name)] == [step for step, _ in rows]
        assert [event.value for event in events.Scalars(name)] == pytest.approx([value for _, value in rows])
    assert [event.step for event in events.Scalars("validation/accuracy")] == [5, 10, 15, 20]


def test_tensorboard_that_is_not_installed_is_a_clear_error(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"log\.report_to = tensorboard needs the tensorboard package: pip install"):
        run_training(tiny(**{"log.report_to": ["tensorboard"]}))
