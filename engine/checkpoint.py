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
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from data import TextExamples, copy_tokenizer
from engine import config as configs
from engine.config import Config, ConfigError, Model, Run
from engine.distributed import Ranks, TrainingError, on_main
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
    data: tuple[TextExamples, ...]

    @cached_property
    def fingerprint(self) -> str:
        return "-".join(examples.fingerprint() for examples in self.data)


@contextmanager
def claim(run: Run, ranks: Ranks) -> Iterator[Path | None]:
    """Hold the run folder for this run alone; gives the checkpoint to go on from, or None to start anew.

    The lock is the kernel's and falls with the process, so a crashed run leaves none behind. Raises ConfigError when
    another run has the folder, when it holds a run and run.resume is "no", or holds none and it is "yes".
    """
    if run.dry_run:
        yield None
        return
    # Not closed before the end: closing the file is what gives the lock back.
    with ExitStack() as held:
        yield on_main(ranks, _claim, Path(run.folder), run.resume, held)


def _claim(folder: Path, resume: str, held: ExitStack) -> Path | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = held.enter_context((folder / ".lock").open("a"))
    except OSError as error:
        raise ConfigError(f"run.folder = {str(folder)!r} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(f"run.folder = {str(folder)!r} is in use by another run; choose another folder") from None
    _mend(folder)
    existing = [name for name in (LAST, PREVIOUS, BEST) if (folder / name).exists()]
    if existing and resume == "no":
        raise ConfigError(
            f"run.folder = {str(folder)!r} already holds a run ({', '.join(existing)}): "
            "--resume goes on with it, another --run.folder starts anew"
        )
    if resume == "yes" and not existing:
        raise ConfigError(f"--resume: run.folder = {str(folder)!r} holds no checkpoint to go on from")
    return _newest(folder) if existing else None


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
        manifest = json.loads((folder / "manifest.json").read_text())
        schema, files = manifest["schema"], manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return f"{folder} has no readable manifest.json, so it was not written to its end"
    if schema != SCHEMA:
        return f"{folder} has checkpoint schema {schema!r}; this version reads {SCHEMA}"
    for name, expected in files:
        path = folder / name
        if not path.is_file():
            return f"{folder} misses {name}"
        if path.stat().st_size != expected["size"]:
            return f"{path} has {path.stat().st_size} bytes, {expected['size']} were written"
        if _sha256(path) != expected["sha256"]:
            return f"{path} differs from what was written (sha256)"
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
    temporary = Path(tempfile.mkdtemp(prefix=WRITING, dir=target.parent))
    try:
        models.save_pretrained(contents.model, temporary)
        copy_tokenizer(contents.tokenizer_folder, temporary)
        (temporary / "recipe.toml").write_text(configs.to_toml(contents.config), encoding="utf-8")
        run = {"schema": SCHEMA, "train": asdict(state), "data": contents.fingerprint}
        run["scaler"] = contents.amp.scaler.state_dict()
        (temporary / "state.json").write_text(json.dumps(run, indent=2), encoding="utf-8")
        if target.name == LAST:
            save_file(_optimizer_tensors(contents), temporary / "optimizer.safetensors")
        _seal(temporary)
        _replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"the checkpoint of step {state.step} could not be written to {target}: {error}; "
            "earlier checkpoints are untouched"
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
    folder.chmod(0o755)
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


def _optimizer_tensors(contents: Contents) -> dict[str, Tensor]:
    """{"exp_avg/backbone.layers.0...": tensor}: the optimizer's state by the name of the parameter."""
    return {
        f"{key}/{name}": value.detach().cpu().contiguous()
        for name, parameter in contents.model.named_parameters()
        for key, value in contents.optimizer.state.get(parameter, {}).items()
    }


def as_start(folder: Path, model: Model) -> Model:
    """The recipe's [model] section, with a checkpoint of our own in the place of the one it names."""
    return replace(model, name=str(folder), sha256="", init="pretrained", head_init="auto")


def restore(folder: Path, contents: Contents) -> TrainState:
    """Put the optimizer and the loss scale back as they were, the model being loaded; returns the state of the run.

    Raises ConfigError when the recipe or the data is not that of the checkpoint, unless run.allow_changes.
    """
    run = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    changes = configs.differences(contents.config, configs.read_recipe(str(folder / "recipe.toml")))
    if run["data"] != contents.fingerprint:
        changes.append("the encoded training or validation data is not the same")
    if changes and not contents.config.run.allow_changes:
        raise ConfigError(
            f"{folder} was made by another recipe:\n  " + "\n  ".join(changes) + "\n"
            "go back to it, start in another --run.folder, or insist with --run.allow_changes"
        )
    names = dict(contents.model.named_parameters())
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        kind, _, name = key.partition("/")
        # A copy of its own: arithmetic on memory aligned as it was before the stop gives the same bits.
        contents.optimizer.state[names[name]][kind] = tensor.to(names[name].device, copy=True)
    if contents.amp.scaler.is_enabled() and run["scaler"]:
        contents.amp.scaler.load_state_dict(run["scaler"])
    return TrainState(**run["train"])


def open_run(path: str) -> Path:
    """The checkpoint to use of `path`, a run folder (its best/, else last/) or a checkpoint folder; verified."""
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"{path!r}: no such run folder")
    for candidate in (folder, folder / BEST, folder / LAST, folder / PREVIOUS):
        if (candidate / "manifest.json").is_file():
            problem = verify(candidate)
            if problem:
                raise ConfigError(f"{problem}; name another checkpoint folder of the run")
            return candidate
    raise ConfigError(f"{path!r} is no run folder: it has no {BEST}/, {LAST}/ or manifest.json")
