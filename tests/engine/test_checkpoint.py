"""P6, F2, F3, F17: a checkpoint is whole or it is not used, whatever happened while it was written or afterwards."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import random
import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.runs import CPU, StopAfter, logged_rows, run_training, tiny_config

import models
from data import load_tokenizer
from engine import checkpoint, evaluate, manifest, predict, validate
from engine.checkpoint import claim, open_run, save, verify
from engine.config import ConfigError, override
from engine.errors import TrainingError
from engine.optim import build_optimizer
from engine.precision import Precision
from engine.state import TrainState
from engine.tasks import find_task, read_training_data


@pytest.fixture(scope="module")
def contents(checkpoint_folder, reviews, tmp_path_factory):
    """What a run would save: a model with a head, and an optimizer that has taken a step."""
    config = tiny_config(checkpoint_folder, reviews, tmp_path_factory.mktemp("contents") / "run", {})
    task, _ = find_task(config.run.task)
    settings = validate.task_settings(config, task)
    rows, _, _, labels, _ = read_training_data(task, settings, 0)
    model = models.from_pretrained(checkpoint_folder, head=task.head, labels=labels, pooling="cls")
    examples = task.encode(rows[:8], load_tokenizer(checkpoint_folder), settings, labels, True)
    optimizer = build_optimizer(dict(model.named_parameters()), override(config, {"optim.weight_decay": 0.0}).optim)
    model(examples.batch(range(8))).loss_sum.backward()
    optimizer.step()
    amp = Precision("fp32", CPU.device)
    return checkpoint.Contents(config, model, model, optimizer, amp, checkpoint_folder, (examples,))


@pytest.fixture(scope="module")
def pristine(contents, tmp_path_factory):
    """A run folder with best/ of step 5, previous/ of step 5 and last/ of step 10."""
    folder = tmp_path_factory.mktemp("pristine") / "run"
    folder.mkdir()
    for name, step in (("best", 5), ("last", 5), ("last", 10)):
        save(folder / name, contents, TrainState(step=step, position=step, best=0.5, best_step=5), CPU)
    return folder


@pytest.fixture
def run_folder(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "run"))


def step_of(folder: Path) -> int:
    return json.loads((folder / "state.json").read_text())["train"]["step"]


def claimed(contents, folder, resume="auto"):
    config = override(contents.config, {"run.folder": str(folder), "run.resume": resume})
    with claim(config, CPU) as resumed:
        return resumed


def test_checkpoint_has_known_files_and_a_manifest_of_all(run_folder):
    expected = {"model.safetensors", "config.json", "recipe.toml", "state.json"}
    expected |= {"tokenizer.json", "tokenizer_config.json"}
    for name, extra in {
        "best": set(),
        "last": {"optimizer.safetensors"},
        "previous": {"optimizer.safetensors"},
    }.items():
        folder = run_folder / name
        listed = json.loads((folder / "manifest.json").read_text())["files"]
        assert set(listed) == expected | extra
        assert {path.name for path in folder.iterdir()} - {"README.md"} == set(listed) | {"manifest.json"}
        assert verify(folder) is None
    assert [step_of(run_folder / name) for name in ("best", "previous", "last")] == [5, 5, 10]


def test_f15_nothing_in_a_run_folder_is_a_pickle(tiny):
    config = tiny(**{"train.max_steps": 10, "log.report_to": ["tensorboard"]})
    run_training(config)
    for path in Path(config.run.folder).rglob("*"):
        if path.is_file():
            start = path.read_bytes()[:2]
            assert start[:1] != b"\x80", path  # a pickle's first byte from protocol 2 on
            assert start != b"PK", path  # torch.save's zip


# Damage after the fact


def damage(path: Path, kind: str, rng: random.Random) -> None:
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "longer":
        path.write_bytes(data + b"\0")
    else:
        place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])


@pytest.mark.parametrize(
    ("kind", "times"), [("missing", 1), ("empty", 1), ("longer", 1), ("truncated", 10), ("bit", 40)]
)
def test_f03_every_damage_to_every_file_is_seen_and_named(run_folder, kind, times):
    rng = random.Random(0)
    for path in sorted((run_folder / "last").iterdir()):
        whole = path.read_bytes()
        for _ in range(times if path.name != "manifest.json" else 5 * times):
            damage(path, kind, rng)
            problem = verify(run_folder / "last")
            assert problem is not None, path
            assert path.name in problem or path.name == "manifest.json"
            path.write_bytes(whole)
    assert verify(run_folder / "last") is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_f03_a_damaged_last_goes_back_to_previous_loudly(contents, run_folder, capsys, name):
    damage(run_folder / "last" / name, "truncated", random.Random(1))
    assert claimed(contents, run_folder) == run_folder / "previous"
    said = capsys.readouterr().out
    assert said.startswith(f"warning: {run_folder / 'last'}")
    assert name in said
    assert f"resuming from {run_folder / 'previous'}" in said
    assert (run_folder / "damaged").is_dir()  # so that the next save does not put it in the place of previous/
    save(run_folder / "last", contents, TrainState(step=7), CPU)
    assert [step_of(run_folder / n) for n in ("previous", "last")] == [5, 7]


def test_f03_the_fallback_ends_as_the_run_that_was_not_damaged(tiny, tmp_path):
    through, config = tiny(**{"run.folder": str(tmp_path / "through")}), tiny()
    run_training(through)
    assert run_training(config, StopAfter(12)) is None
    damage(tmp_path / "run/last/model.safetensors", "truncated", random.Random(0))
    run_training(override(config, {"run.resume": "yes"}))
    assert logged_rows(tmp_path / "run") == logged_rows(tmp_path / "through")
    for name in ("last/model.safetensors", "last/optimizer.safetensors", "last/state.json", "best/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "through" / name).read_bytes()


def test_f03_without_a_valid_checkpoint_the_error_names_both(contents, run_folder):
    for name in ("last", "previous"):
        damage(run_folder / name / "model.safetensors", "bit", random.Random(0))
    with pytest.raises(ConfigError, match=r"no complete checkpoint to resume from: .*last.*; .*previous.*"):
        claimed(contents, run_folder)
    assert (run_folder / "last").is_dir()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
@pytest.mark.parametrize("kind", ["missing", "truncated"])
def test_f03_evaluate_and_predict_refuse_a_damaged_checkpoint(run_folder, reviews, tmp_path, name, kind):
    damage(run_folder / "best" / name, kind, random.Random(0))
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        evaluate.main([str(run_folder), "--data.test", str(reviews)])
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        predict.main([str(run_folder), "--input", str(reviews), "--output", str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out.jsonl").exists()
    assert open_run(str(run_folder / "last")) == run_folder / "last"


def test_open_run_takes_best_then_last_then_previous(run_folder, tmp_path):
    for name in ("best", "last", "previous"):
        assert open_run(str(run_folder)) == run_folder / name
        shutil.rmtree(run_folder / name)
    with pytest.raises(ConfigError, match="is not a run folder: it has no best/, last/ or manifest"):
        open_run(str(run_folder))
    with pytest.raises(ConfigError, match="no such run folder"):
        open_run(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", [*manifest.CORE, "optimizer.safetensors"])
def test_f03_a_manifest_must_name_the_core_files(contents, run_folder, capsys, name):
    """An attacker, or a tool that rewrites it, leaves a file out: what is not named is not compared."""
    for folder in ("last", "best"):
        path = run_folder / folder / "manifest.json"
        listed = json.loads(path.read_text())
        listed["files"].pop(name, None)
        path.write_text(json.dumps(listed))
    damage(run_folder / "last" / name, "bit", random.Random(0))
    assert claimed(contents, run_folder) == run_folder / "previous"
    assert f"last/manifest.json does not name {name}: the checkpoint is incomplete" in capsys.readouterr().out
    assert (verify(run_folder / "best") is None) == name.startswith("optimizer")


ADDED = ["special_tokens_map.json", "added_tokens.json", "vocab.txt", "generation_config.json", "adapter_config.json"]
ADDED += ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "objective.safetensors"]


@pytest.mark.parametrize("name", ADDED)
def test_f14_a_file_that_was_added_is_not_read_but_named(contents, run_folder, capsys, name):
    (run_folder / "last" / name).write_bytes((run_folder / "last/tokenizer.json").read_bytes())
    (run_folder / "best" / name).write_text("{}")
    assert claimed(contents, run_folder) == run_folder / "previous"
    assert f"last/{name} was added after the checkpoint was written" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=rf"best/{name} was added after .*: move it away; name another"):
        open_run(str(run_folder))


def test_other_files_may_lie_in_a_checkpoint(run_folder):
    for name in ("README.md", "metrics.json", ".DS_Store"):
        (run_folder / "best" / name).write_text("{}")
    assert open_run(str(run_folder)) == run_folder / "best"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "recipe.toml", "manifest.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "dangling link", "loop"])
def test_f14_what_is_no_file_is_a_sentence_and_no_hang(contents, run_folder, name, kind):
    path = run_folder / "last" / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": name}.get(kind, "nowhere"))
    problem = verify(run_folder / "last")
    assert problem is not None
    assert name in problem
    assert claimed(contents, run_folder) == run_folder / "previous"


def test_a_manifest_that_names_another_folder_is_refused(run_folder):
    path = run_folder / "last/manifest.json"
    listed = json.loads(path.read_text())
    listed["files"]["../best/config.json"] = listed["files"]["config.json"]
    path.write_text(json.dumps(listed))
    assert "names '../best/config.json', which is not a file of its own folder" in str(verify(path.parent))


def test_checkpoints_behind_links_are_saved_over(contents, run_folder):
    """A user moved a folder to another disk: the link goes, what it pointed to stays."""
    for name in ("last", "previous"):
        (run_folder / name).rename(run_folder.parent / name)
        (run_folder / name).symlink_to(run_folder.parent / name)
    assert claimed(contents, run_folder) == run_folder / "last"
    for step in (11, 12):
        save(run_folder / "last", contents, TrainState(step=step), CPU)
    assert [step_of(run_folder / name) for name in ("previous", "last")] == [11, 12]
    assert step_of(run_folder.parent / "last") == 10


def test_a_damaged_best_is_not_tested_with(tiny, reviews):
    config = tiny(**{"train.max_steps": 5, "data.test": str(reviews)})
    run_training(config)
    damage(Path(config.run.folder) / "best/model.safetensors", "bit", random.Random(3))
    with pytest.raises(TrainingError, match=r"best/model\.safetensors differs .*; so data\.test was not evaluated"):
        run_training(override(config, {"run.resume": "yes"}))
    assert "test_accuracy" not in logged_rows(config.run.folder)[-1]
    assert logged_rows(config.run.folder)[-1]["end"] == "all steps done"
    shutil.rmtree(Path(config.run.folder) / "best")  # last/ is not tested in its place
    with pytest.raises(TrainingError, match=r"best has no readable manifest\.json.*data\.test was not evaluated"):
        run_training(override(config, {"run.resume": "yes"}))


def test_p20_another_schema_says_what_to_do(contents, run_folder):
    for name in ("last", "previous"):
        path = run_folder / name / "manifest.json"
        path.write_text(path.read_text().replace('"schema": 1', '"schema": 99'))
    with pytest.raises(ConfigError, match="has checkpoint schema 99, this version reads 1: use the version that wrote"):
        claimed(contents, run_folder)


# Crashes and full disks while it is written


class CrashError(BaseException):
    """Stands for kill -9: no clean-up runs after it either."""


EVENTS = [
    *[(Path, name) for name in ("mkdir", "write_text", "rename")],
    *[(checkpoint, "save_file"), (checkpoint, "copy_tokenizer"), (manifest, "sha256_of")],
    *[(models, "save_pretrained"), (os, "fsync"), (shutil, "rmtree")],
]


@contextmanager
def crash_at(event: int):
    """Dies at the given one of the things that a save does; yields the list of their names so far."""
    done: list[str] = []

    def watched(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            done.append(name)
            if len(done) == event and name == "rmtree" and Path(args[0]).is_dir():
                next(Path(args[0]).iterdir()).unlink()  # dies having removed one file
            if len(done) >= event:
                raise CrashError
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in EVENTS:
            patch.setattr(owner, name, watched(owner, name))
        yield done


@pytest.mark.parametrize("target", ["last", "best"])
def test_f02_crash_at_any_point_of_a_save_leaves_a_checkpoint(contents, pristine, tmp_path, target):
    state = TrainState(step=11, position=11, best=0.6, best_step=11)
    expected = {"last": {10, 11}, "best": {5, 11}}[target]
    seen, event, finished = set(), 0, False
    while not finished:
        event += 1
        folder = Path(shutil.copytree(pristine, tmp_path / str(event)))
        with crash_at(event) as done:
            try:
                save(folder / target, contents, state, CPU)
                finished = True
            except CrashError:
                pass
        resumed = claimed(contents, folder)
        assert resumed is not None, done
        assert verify(resumed) is None, done
        assert verify(folder / "best") is None, done
        assert not [path.name for path in folder.iterdir() if path.name.startswith((".writing", ".old"))], done
        steps = {"last": step_of(resumed), "best": step_of(folder / "best")}
        assert steps[target] in expected, done
        seen.add(steps[target])
        shutil.rmtree(folder)
    assert event > 15  # every one of the writes, flushes and renames has been the last thing that happened
    assert seen == expected
    assert done.count("rename") == 2


@contextmanager
def limited_file_size(limit: int):
    """The kernel refuses to write more: as near to a full disk as a test without privileges comes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [100, 20_000, 100_000])
def test_f04_failing_disk_is_one_sentence_and_keeps_the_old_one(contents, run_folder, limit):
    """The limits fall into the tokenizer or the weights, the weights, and the optimizer."""
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    parameters = sum(p.numel() for p in contents.model.parameters())
    with limited_file_size(limit), pytest.raises(TrainingError) as error:
        save(run_folder / "last", contents, TrainState(step=11), CPU)
    message = str(error.value)
    assert message.startswith(f"the checkpoint of step 11 could not be written to {run_folder / 'last'}: ")
    steps = len(list(contents.model.parameters()))
    assert f"it needs about {12 * parameters + 4 * steps:,} bytes, and " in message
    assert message.endswith(" are free; earlier checkpoints are untouched")
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before
    assert {path.name for path in run_folder.iterdir()} == {"best", "last", "previous"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize(("owner", "name"), [(Path, "mkdir"), (os, "fsync"), (Path, "rename")])
def test_f04_any_refusal_of_the_system_is_a_training_error(contents, run_folder, monkeypatch, code, owner, name):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refuse)
        with pytest.raises(TrainingError, match=os.strerror(code)):
            save(run_folder / "last", contents, TrainState(step=11), CPU)
    assert claimed(contents, run_folder) == run_folder / "last"
    assert step_of(run_folder / "last") == 10


def test_p18_weights_that_are_not_finite_are_never_written(contents, run_folder):
    weight = contents.model.backbone.layers[1].mlp.up.bias
    kept = weight[3].item()
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            weight[3] = value
        for name in ("best", "last"):
            with pytest.raises(TrainingError, match=r"backbone\.layers\.1\.mlp\.up\.bias has NaN or infinite values"):
                save(run_folder / name, contents, TrainState(step=11), CPU)
    with torch.no_grad():
        weight[3] = kept
    assert {path.name for path in run_folder.iterdir()} == {"best", "last", "previous"}
    assert step_of(run_folder / "last") == 10


# The optimizer


class Counting(torch.optim.Optimizer):
    """State that is no tensor: a number of steps, and nothing yet."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    def step(self):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["step"], state["none"] = state.get("step", 0) + 1, None
            state["mean"] = p.grad.clone()


def with_optimizer(contents, make, steps=0, **changes):
    """`contents` with another optimizer, `steps` steps old."""
    optimizer = make(list(contents.model.parameters()))
    for _ in range(steps):
        optimizer.step()
    return replace(contents, optimizer=optimizer, config=override(contents.config, changes))


@pytest.fixture
def copied(contents):
    """Contents with a copy of the model, which an optimizer may change."""
    model = copy.deepcopy(contents.model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return replace(contents, model=model)


MAKERS = {
    "counting": Counting,
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adam": lambda p: torch.optim.Adam([{"params": p[5:]}, {"params": p[:5], "lr_scale": 3.0}], lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
}


@pytest.mark.parametrize("name", MAKERS)
def test_p04_the_state_of_any_optimizer_comes_back(copied, tmp_path, name):
    saved = with_optimizer(copied, MAKERS[name], steps=3)
    save(tmp_path / "last", saved, TrainState(step=3), CPU)
    loaded = with_optimizer(copied, MAKERS[name])
    assert checkpoint.restore(tmp_path / "last", loaded, CPU).step == 3
    assert len(loaded.optimizer.state) == len(list(copied.model.parameters()))
    for p, expected in saved.optimizer.state.items():
        found = loaded.optimizer.state[p]
        assert found.keys() == expected.keys()
        for kind, value in expected.items():
            assert type(found[kind]) is type(value)
            assert torch.equal(found[kind], value) if isinstance(value, torch.Tensor) else found[kind] == value
    assert [g.get("lr_scale") for g in loaded.optimizer.param_groups] == [
        g.get("lr_scale") for g in saved.optimizer.param_groups
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.25])
def test_p04_a_number_that_json_lacks_comes_back(copied, tmp_path, value):
    saved = with_optimizer(copied, Counting, steps=1)
    for state in saved.optimizer.state.values():
        state["largest"] = value
    state = TrainState(step=3, watched=value, best_step=0, bad_evaluations=1)
    save(tmp_path / "last", saved, state, CPU)
    json.loads((tmp_path / "last/state.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    loaded = with_optimizer(copied, Counting)
    restored = checkpoint.restore(tmp_path / "last", loaded, CPU)
    assert {repr(state["largest"]) for state in loaded.optimizer.state.values()} == {repr(value)}
    assert repr(restored.watched) == (repr(value) if math.isfinite(value) else "nan")


def test_optimizer_step_count_stays_on_the_cpu(copied, tmp_path):
    """The meta device stands for a GPU."""
    save(tmp_path / "last", with_optimizer(copied, MAKERS["adam"], steps=1), TrainState(step=1), CPU)
    loaded = with_optimizer(replace(copied, model=copy.deepcopy(copied.model).to("meta")), MAKERS["adam"])
    checkpoint.restore(tmp_path / "last", loaded, CPU)
    for state in loaded.optimizer.state.values():
        assert {kind: value.device.type for kind, value in state.items()} == {
            "step": "cpu",
            "exp_avg": "meta",
            "exp_avg_sq": "meta",
        }


def test_f18_another_optimizer_is_refused_by_name_unless_allowed(copied, tmp_path, capsys):
    save(tmp_path / "last", with_optimizer(copied, MAKERS["sgd"], steps=1), TrainState(step=1), CPU)
    with pytest.raises(ConfigError, match="the optimizer: SGD -> Adam"):
        checkpoint.restore(tmp_path / "last", with_optimizer(copied, MAKERS["adam"]), CPU)
    allowed = with_optimizer(copied, MAKERS["adam"], **{"run.allow_changes": True})
    checkpoint.restore(tmp_path / "last", allowed, CPU)
    assert "the optimizer: SGD -> Adam, which starts without a state" in capsys.readouterr().out
    allowed.optimizer.step()


def test_optimizer_state_that_no_checkpoint_can_hold_is_named(copied, tmp_path):
    contents = with_optimizer(copied, MAKERS["sgd"], steps=1)
    contents.optimizer.state[next(copied.model.parameters())]["history"] = [1, 2]
    with pytest.raises(TrainingError, match=r"^SGD keeps a list \(history of "):
        save(tmp_path / "last", contents, TrainState(step=1), CPU)


# The run folder and its lock


def test_f17_what_a_dead_run_left_behind_is_cleaned(contents, run_folder):
    for name in (".writing-last", ".writing-best", ".old-best"):
        shutil.copytree(run_folder / "best", run_folder / name)
    claimed(contents, run_folder)
    assert {path.name for path in run_folder.iterdir()} == {"best", "last", "previous", ".lock"}


def in_a_fork(function) -> int:
    """What `function` returns in a forked process, as its exit code."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = function()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_f17_the_second_run_on_a_folder_is_refused(contents, run_folder):
    def second() -> int:
        try:
            claimed(contents, run_folder)
        except ConfigError as error:
            return 7 if "is in use by another run: choose another folder" in str(error) else 1
        return 0

    config = override(contents.config, {"run.folder": str(run_folder), "run.resume": "auto"})
    with claim(config, CPU):
        assert in_a_fork(second) == 7
    assert in_a_fork(second) == 0


def test_f17_dead_run_leaves_no_lock_though_workers_live_on(contents, run_folder):
    config = override(contents.config, {"run.folder": str(run_folder), "run.resume": "auto"})
    read, write = os.pipe()

    def dies() -> int:
        with claim(config, CPU):
            if os.fork() == 0:  # a loader's worker, which holds whatever a fork inherits until the pipe is closed
                os.close(write)
                os.read(read, 1)
            os._exit(0)

    assert in_a_fork(dies) == 0
    assert claimed(contents, run_folder) == run_folder / "last"
    os.close(write)
    os.close(read)


def test_a_folder_that_cannot_be_made_is_named(contents, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.folder = .*file/run' cannot be written: Not a directory"):
        claimed(contents, tmp_path / "file/run")


@pytest.mark.parametrize("name", ["mkdir", "open", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_f04_a_folder_that_fails_at_the_start_is_a_sentence(contents, run_folder, monkeypatch, name, code):
    """At --resume, with an unfinished save to undo and a damaged last/ to move out of the way."""
    (run_folder / "best").rename(run_folder / ".old-best")
    damage(run_folder / "last/state.json", "empty", random.Random(0))
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, name, refuse)
        with pytest.raises(ConfigError, match=rf"run\.folder = .* cannot be written: {os.strerror(code)}$"):
            claimed(contents, run_folder, "yes")
    after = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_f04_a_folder_without_permission_is_a_sentence(contents, run_folder, monkeypatch):
    """Root may write everywhere, so the answer of the system is patched."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"run\.folder = .* cannot be written: Permission denied"):
        claimed(contents, run_folder)


def test_f04_a_folder_that_vanished_is_a_sentence(contents, run_folder):
    shutil.rmtree(run_folder)
    with pytest.raises(TrainingError, match=r"could not be written .*No such file or directory.* are free"):
        save(run_folder / "last", contents, TrainState(step=11), CPU)
    assert not run_folder.exists()


def test_a_dry_run_writes_nothing(tiny):
    assert run_training(tiny(**{"run.dry_run": True})) == {}
    assert not Path(tiny().run.folder).exists()
