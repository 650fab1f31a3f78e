"""Checkpoints: safetensors and JSON, written beside and renamed into place, verified when read.

A checkpoint is an export that transformers reads (model.safetensors, config.json, tokenizer files) plus what a run
needs to go on: optimizer.safetensors, state.json and the resolved recipe.toml. manifest.json, written last, has the
size and sha256 of each file. A run folder holds

    best/      the best evaluation so far, without the optimizer
    last/      the newest checkpoint, to resume from
    previous/  the one before it, in case last/ turns out damaged

Nothing in it is a pickle.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from data import Examples, copy_tokenizer
from engine import config as configs
from engine.config import Config, ConfigError
from engine.distributed import Ranks, on_main
from engine.errors import TrainingError
from engine.precision import Precision
from engine.state import TrainState

SCHEMA = 1
BEST, LAST, PREVIOUS = "best", "last", "previous"
WRITING, OLD_BEST, DAMAGED = ".writing-", ".old-best", "damaged"  # names that only live through a crash


@dataclass(frozen=True)
class Contents:
    """What a checkpoint is made of, apart from the state of the run."""

    config: Config
    model: models.TaskModel
    optimizer: torch.optim.Optimizer
    amp: Precision
    tokenizer_folder: Path
    data: tuple[Examples, ...]
    teacher: Tensor | None = None  # (N, C) logits that the first of `data` is taught with

    @cached_property
    def fingerprint(self) -> str:
        parts = [examples.fingerprint() for examples in self.data]
        if self.teacher is not None:
            parts.append(hashlib.sha256(self.teacher.numpy().tobytes()).hexdigest()[:16])
        return "-".join(parts)


@contextmanager
def claim(config: Config, ranks: Ranks) -> Iterator[Path | None]:
    """Hold the run folder for this run alone; gives the checkpoint to go on from, or None to start anew.

    The lock is the kernel's and falls with the process, so a crashed run leaves none behind. Raises ConfigError when
    another run has the folder, when it holds a run and run.resume is "no", or holds none and it is "yes", and when the
    recipe is not the checkpoint's, unless run.allow_changes.
    """
    if config.run.dry_run:
        yield None
        return
    # Not closed before the end: closing the file is what gives the lock back.
    with ExitStack() as held:
        yield on_main(ranks, _claim, config, held)


def _claim(config: Config, held: ExitStack) -> Path | None:
    folder, resume = Path(config.run.folder), config.run.resume
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = held.enter_context((folder / ".lock").open("a"))
    except OSError as error:
        raise ConfigError(f"run.folder = {str(folder)!r} cannot be written: {error.strerror}") from None
    try:
        # lockf and not flock: a loader's worker that outlives a killed run for seconds does not inherit it.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock.fileno()), (folder / ".lock").stat()):
            raise OSError  # its owner took it away, and another run has made a new one, since it was opened
    except OSError:
        raise ConfigError(f"run.folder = {str(folder)!r} is in use by another run; choose another folder") from None
    held.callback(_leave_nothing, folder)
    _mend(folder)
    existing = [name for name in (LAST, PREVIOUS, BEST) if (folder / name).exists()]
    if existing and resume == "no":
        raise ConfigError(
            f"run.folder = {str(folder)!r} already holds a run ({', '.join(existing)}): "
            "--resume goes on with it, another --run.folder starts anew"
        )
    if not {LAST, PREVIOUS} & {*existing}:  # at most a best/, of a run that died before its first last/
        if resume == "yes":
            raise ConfigError(
                f"--resume: run.folder = {str(folder)!r} holds no checkpoint to go on from; "
                "--run.resume auto starts anew where there is none"
            )
        return None
    newest = _newest(folder)
    _allow(newest, configs.differences(config, configs.read_recipe(str(newest / "recipe.toml"))), config)
    return newest


def _leave_nothing(folder: Path) -> None:
    """Take away the folder of a run that ended, by a mistake in its recipe or data, before it wrote anything."""
    if folder.is_dir() and [path.name for path in folder.iterdir()] == [".lock"]:
        (folder / ".lock").unlink()
        folder.rmdir()


def _allow(folder: Path, changes: list[str], config: Config) -> None:
    """Raise ConfigError for what is not as the checkpoint was made with; say it where run.allow_changes insists."""
    if not changes:
        return
    listed = "\n  ".join(changes)
    if not config.run.allow_changes:
        raise ConfigError(
            f"{folder} was made by another recipe:\n  {listed}\n"
            "go back to it, start in another --run.folder, or insist with --run.allow_changes"
        )
    print(f"warning: going on from {folder} with changes (run.allow_changes):\n  {listed}", flush=True)


def _mend(folder: Path) -> None:
    """Undo what a process that died while saving left half done; the lock says that it is gone."""
    old_best = folder / OLD_BEST
    if old_best.exists() and not (folder / BEST).exists():
        old_best.rename(folder / BEST)
    for leftover in (old_best, *folder.glob(f"{WRITING}*")):
        shutil.rmtree(leftover, ignore_errors=True)


def _newest(folder: Path) -> Path:
    """The newest checkpoint that is whole: last/, else, loudly, previous/."""
    problems: list[str] = []
    for name in (LAST, PREVIOUS):
        checkpoint = folder / name
        problem = verify(checkpoint) if checkpoint.exists() else f"{checkpoint} is not there"
        if problem is None:
            if problems:
                print(f"warning: {problems[0]}; going back to {checkpoint}", flush=True)
                if (folder / LAST).exists():  # set aside, so that it never takes the place of a whole previous/
                    shutil.rmtree(folder / DAMAGED, ignore_errors=True)
                    (folder / LAST).rename(folder / DAMAGED)
            return checkpoint
        problems.append(problem)
    raise ConfigError("no whole checkpoint to go on from: " + "; ".join(problems))


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a sentence, or None: every file of its manifest, by size and checksum."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            return (
                f"{folder} has checkpoint schema {manifest['schema']!r}, this version reads {SCHEMA}: "
                "use the version that wrote it"
            )
        files = {name: (int(entry["size"]), entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return f"{folder} has no readable manifest.json: it was not written to its end, or is damaged"
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{folder} misses {name}"
        try:
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size} bytes, {size} were written"
            if _sha256(path) != sha256:
                return f"{path} differs from what was written (sha256)"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
    return None


def save(target: Path, contents: Contents, state: TrainState, ranks: Ranks) -> None:
    """Write a checkpoint beside `target` and rename it into place; what was there stays until the new one is whole.

    Only last/ has the optimizer. Raises TrainingError, on all ranks, when a weight is not finite or the disk fails.
    """
    on_main(ranks, _save, target, contents, state)


def _save(target: Path, contents: Contents, state: TrainState) -> None:
    broken = [key for key, tensor in contents.model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise TrainingError(f"{broken[0]} has NaN or infinite values at step {state.step}; no checkpoint is written")
    temporary = target.with_name(f"{WRITING}{target.name}")
    try:
        temporary.mkdir()
        models.save_pretrained(contents.model, temporary)
        if contents.config.model.lora.rank:
            models.save_adapter(contents.model, temporary)
        copy_tokenizer(contents.tokenizer_folder, temporary)
        (temporary / "recipe.toml").write_text(configs.to_toml(configs.recipe_of(contents.config)), encoding="utf-8")
        run = {"schema": SCHEMA, "train": asdict(state), "data": contents.fingerprint}
        run["scaler"] = contents.amp.scaler.state_dict()
        if target.name == LAST:
            tensors, values = _optimizer_state(contents)
            run["optimizer"] = {"class": type(contents.optimizer).__name__, "values": values}
            save_file(tensors, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(run, indent=2), encoding="utf-8")
        _seal(temporary)
        _replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"the checkpoint of step {state.step} could not be written to {target}: {error}; "
            f"it needs about {_size(contents, target):,} bytes; earlier checkpoints are untouched"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Flush every file to the disk, and then the manifest that vouches for them."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    with (folder / "manifest.json").open("w") as stream:
        json.dump({"schema": SCHEMA, "files": files}, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    _fsync_folder(folder)


def _replace(temporary: Path, target: Path) -> None:
    """Rename into place. A crash between the two renames leaves the old one under a name that is looked for."""
    old = target.with_name(PREVIOUS if target.name == LAST else OLD_BEST)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    temporary.rename(target)
    _fsync_folder(target.parent)
    if old.name == OLD_BEST:
        shutil.rmtree(old, ignore_errors=True)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _size(contents: Contents, target: Path) -> int:
    """Bytes of the tensors of a checkpoint; its other files are small."""
    tensors: list[Tensor] = [*contents.model.parameters()]
    if target.name == LAST:
        tensors += _optimizer_state(contents)[0].values()
    return sum(tensor.nbytes for tensor in tensors)


def _optimizer_state(contents: Contents) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """{"exp_avg/backbone.layers.0...": tensor}, the optimizer's state by the name of the parameter; and in the same
    way what is no tensor, as the count of steps is in some optimizers."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, parameter in contents.model.named_parameters():
        for kind, value in contents.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{kind}/{name}"] = value.detach().cpu().contiguous()
            elif value is None or isinstance(value, (bool, int, float)):
                values[f"{kind}/{name}"] = value
            else:
                raise TrainingError(
                    f"{type(contents.optimizer).__name__} keeps a {type(value).__name__} ({kind} of {name}), which a "
                    "checkpoint cannot hold: tensors, numbers and None it can"
                )
    return tensors, values


def restore(folder: Path, contents: Contents, ranks: Ranks) -> TrainState:
    """Put the optimizer and the loss scale back as they were, the model being loaded; returns the state of the run.

    Raises ConfigError, on all ranks, when the data or the optimizer's class is not that of the checkpoint, unless
    run.allow_changes; an optimizer of another class then starts anew.
    """
    run = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    changes = [] if run["data"] == contents.fingerprint else ["the encoded training or validation data is not the same"]
    theirs, ours = run["optimizer"]["class"], type(contents.optimizer).__name__
    if theirs != ours:
        changes.append(f"the optimizer: {theirs} -> {ours}, which starts anew")
    on_main(ranks, _allow, folder, changes, contents.config)
    if theirs == ours:
        # Copies of their own: arithmetic on memory aligned as it was before the stop gives the same bits.
        tensors = {key: tensor.clone() for key, tensor in load_file(folder / "optimizer.safetensors").items()}
        _load_optimizer(contents, tensors | run["optimizer"]["values"])
    if contents.amp.scaler.is_enabled() and run["scaler"]:
        contents.amp.scaler.load_state_dict(run["scaler"])
    return TrainState(**run["train"])


def _load_optimizer(contents: Contents, saved: dict[str, Any]) -> None:
    """Through load_state_dict, which knows what belongs on which device; the settings of the groups stay as they are.

    It counts parameters through the groups, while `saved` ({"exp_avg/backbone...": value}) has their names.
    """
    state = contents.optimizer.state_dict()
    places = {
        parameter: place
        for group, counted in zip(contents.optimizer.param_groups, state["param_groups"], strict=True)
        for parameter, place in zip(group["params"], counted["params"], strict=True)
    }
    parameters = dict(contents.model.named_parameters())
    state["state"] = {}
    for key, value in saved.items():
        kind, _, name = key.partition("/")
        if parameters.get(name) in places:  # all of them, unless changes were allowed
            state["state"].setdefault(places[parameters[name]], {})[kind] = value
    contents.optimizer.load_state_dict(state)


def open_run(path: str) -> Path:
    """The checkpoint to use of `path`, a run folder (its best/, else last/) or a checkpoint folder; verified."""
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"{path!r}: no such run folder")
    inside = [folder / name for name in (BEST, LAST, PREVIOUS) if (folder / name).is_dir()]
    candidates = [folder] if (folder / "manifest.json").is_file() else inside
    if not candidates:
        raise ConfigError(f"{path!r} is no run folder: it has no {BEST}/, {LAST}/ or manifest.json")
    if problem := verify(candidates[0]):
        raise ConfigError(f"{problem}; name another checkpoint folder of the run")
    return candidates[0]
