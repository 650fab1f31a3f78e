"""Checkpoints: safetensors and JSON files, written to a temporary folder, then renamed; verified when read.

A checkpoint is an export that transformers reads (model.safetensors, config.json, tokenizer files) plus what a resumed
run needs: optimizer.safetensors, state.json and the resolved recipe.toml. Modules of the objective beside the model are
in objective.safetensors. manifest.json, written last, has the size and SHA-256 of each file. A run folder contains

    best/      the best evaluation so far, without the optimizer
    last/      the newest checkpoint, to resume from
    previous/  the one before it, in case last/ turns out to be damaged

of which checkpoint.keep may leave out some. No file is a pickle.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import models
from data import Examples, copy_tokenizer
from data.writing import WRITING, to_json
from engine import config as configs
from engine import disk, log, optimizer_state, plugins
from engine.config import Config, ConfigError
from engine.distributed import Ranks, check_shared_folder, on_main
from engine.errors import TrainingError
from engine.manifest import OBJECTIVE, OPTIMIZER, SCHEMA, flush_folder, seal, verify
from engine.objective import extra_state, named_parameters
from engine.precision import Precision, load_scale
from engine.state import TrainState, read_state
from models.checkpoints.tensor_files import read_header

BEST, LAST, PREVIOUS = "best", "last", "previous"
OLD, DAMAGED = ".old-", "damaged"  # names that only a crash leaves behind, like WRITING


@dataclass(frozen=True)
class Contents:
    """Everything that a checkpoint saves, except the counters of the run (TrainState)."""

    config: Config
    objective: nn.Module  # what the loop calls: the model, or a module that contains it
    model: models.TaskModel
    optimizer: torch.optim.Optimizer
    amp: Precision
    tokenizer_folder: Path
    data: tuple[Examples, ...]
    teacher: Tensor | None = None  # (N, C) logits for the first of `data`
    counters: dict[str, Any] = field(init=False)  # of the optimizer, before it was used

    def __post_init__(self) -> None:
        object.__setattr__(self, "counters", optimizer_state.counters(self.optimizer))

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of the data sets and of the teacher's logits."""
        checksums = [examples.fingerprint() for examples in self.data]
        if self.teacher is not None:
            checksums.append(hashlib.sha256(self.teacher.numpy().tobytes()).hexdigest()[:16])
        return "-".join(checksums)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the objective by name, those of the model under the model's names."""
        return named_parameters(self.objective, self.model)


@contextmanager
def claim(config: Config, ranks: Ranks) -> Iterator[Path | None]:
    """Lock the run folder for this run; yield the checkpoint to resume from, or None to start a new run.

    The kernel drops the lock when the process ends, so a crashed run leaves none behind. Raises ConfigError

    - when another run uses the folder, or another machine does not see it;
    - when the folder holds a run and run.resume is "no", or holds none and run.resume is "yes";
    - when the recipe differs from the checkpoint's, unless run.allow_changes.
    """
    if config.run.dry_run:
        yield None
        return
    # Closing the lock's file releases the lock, so the stack stays open until the run ends.
    with ExitStack() as stack:
        on_main(ranks, _in_folder, config, _lock, stack)
        check_shared_folder("run.folder", config.run.folder, ranks)
        found = on_main(ranks, _in_folder, config, _find_checkpoint, config)
        yield None if found is None else Path(config.run.folder) / found.name


def _in_folder(config: Config, function: Callable[..., Any], *args: Any) -> Any:
    """Return function(the run folder, *args); ConfigError where the system refuses the folder."""
    folder = Path(config.run.folder)
    if "\0" in config.run.folder:
        raise ConfigError(f"run.folder = {config.run.folder!r} should not have a NUL: no folder can have this name")
    try:
        return function(folder, *args)
    except OSError as error:
        raise ConfigError(f"run.folder = {str(folder)!r} cannot be written: {error.strerror}") from None


def _lock(folder: Path, stack: ExitStack) -> None:
    """Lock and repair a folder, created if need be, until the stack is closed; ConfigError where another run has it."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(folder / ".lock") and not (folder / ".lock").is_file():
        raise OSError(errno.EINVAL, "its .lock is not a regular file")  # a pipe would wait for a reader
    lock = stack.enter_context((folder / ".lock").open("a"))
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    try:
        # lockf, not flock: a loader's worker that outlives a killed run for seconds does not inherit it.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock.fileno()), (folder / ".lock").stat()):
            raise OSError  # its owner has removed it since it was opened, and another run has created a new one
    except OSError:
        raise ConfigError(f"run.folder = {str(folder)!r} is in use by another run: choose another folder") from None
    stack.callback(_remove_if_empty, folder)
    _recover(folder)


def _find_checkpoint(folder: Path, config: Config) -> Path | None:
    """Return the checkpoint to resume from, or None to start a new run; ConfigError as for `claim`."""
    existing = [name for name in (LAST, PREVIOUS, BEST) if (folder / name).exists()]
    if existing and config.run.resume == "no":
        raise ConfigError(
            f"run.folder = {str(folder)!r} already holds a run ({', '.join(existing)}): "
            "--resume continues it, another --run.folder starts a new one"
        )
    if not {LAST, PREVIOUS} & {*existing}:  # there may be a best/, of a run that died before it first wrote last/
        if config.run.resume == "yes":
            raise ConfigError(
                f"--resume: run.folder = {str(folder)!r} holds no checkpoint to resume from; "
                "--run.resume auto starts a new run where there is none"
            )
        if existing and log.has_ended(folder):
            raise ConfigError(
                f"run.folder = {str(folder)!r} holds the best/ of a run that has ended and kept nothing to resume from "
                "(checkpoint.keep): another --run.folder starts a new one"
            )
        return None
    newest = _newest(folder)
    _check_changes(newest, configs.differences(config, configs.read_recipe(str(newest / "recipe.toml"))), config)
    return newest


def _remove_if_empty(folder: Path) -> None:
    """Remove the folder of a run that wrote nothing, because its recipe or its data had an error."""
    with suppress(OSError):  # a link to a folder, or one that cannot be written any more
        if [path.name for path in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
            folder.rmdir()


def _check_changes(folder: Path, changes: list[str], config: Config) -> None:
    """Raise ConfigError that lists the changes since the checkpoint; with run.allow_changes, print them instead."""
    if not changes:
        return
    listed = "\n  ".join(changes)
    if not config.run.allow_changes:
        raise ConfigError(
            f"{folder} was saved with other settings or data:\n  {listed}\n"
            "restore them, choose another --run.folder, or resume with these changes by --run.allow_changes"
        )
    for change in changes:
        if change.startswith("model.pooling: "):  # the head was trained on it, and a resume has no new head
            raise ConfigError(
                f"{folder} cannot go on with another pooling, even by run.allow_changes:\n  {change}\nrestore it, or "
                f"start a new run in another --run.folder with --model.name {folder} --model.head_init reset"
            )
    print(f"warning: resuming from {folder} with changes (run.allow_changes):\n  {listed}", flush=True)


def _recover(folder: Path) -> None:
    """Undo the unfinished save of a process that died; the lock, which this process has, proves that it died."""
    for name in (BEST, LAST):
        old = folder / f"{OLD}{name}"
        if old.exists() and not (folder / name).exists():
            old.rename(folder / name)
    for leftover in (*folder.glob(f"{OLD}*"), *folder.glob(f"{WRITING}*")):
        _remove(leftover)


def _remove(path: Path) -> None:
    """Remove a folder, or a link to one, or a file, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _newest(folder: Path) -> Path:
    """Return the newest complete checkpoint: last/, or previous/ with a warning."""
    problems: list[str] = []
    for name in (LAST, PREVIOUS):
        checkpoint = folder / name
        problem = verify(checkpoint, to_resume=True) if checkpoint.exists() else f"{checkpoint} does not exist"
        if problem is None:
            if problems:
                print(f"warning: {problems[0]}; resuming from {checkpoint}", flush=True)
                if os.path.lexists(folder / LAST):  # renamed, so that it never replaces a complete previous/
                    _remove(folder / DAMAGED)
                    (folder / LAST).rename(folder / DAMAGED)
            return checkpoint
        problems.append(problem)
    raise ConfigError("no complete checkpoint to resume from: " + "; ".join(problems))


def save(target: Path, contents: Contents, state: TrainState, ranks: Ranks) -> float:
    """Write a checkpoint to a temporary folder, then rename it to `target`, which keeps the old one until then.

    Return the seconds that it took rank 0. Only last/ has the optimizer. Raises TrainingError, on all ranks, when a
    weight is not finite or a write fails.
    """
    seconds: float = on_main(ranks, _save, target, contents, state)
    return seconds


def _save(target: Path, contents: Contents, state: TrainState) -> float:
    started = time.monotonic()
    extra = {key: tensor.detach() for key, tensor in extra_state(contents.objective, contents.model).items()}
    weights = contents.model.state_dict() | extra
    broken = [key for key, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise TrainingError(f"{broken[0]} has NaN or infinite values at step {state.step}; no checkpoint is written")
    temporary = target.with_name(f"{WRITING}{target.name}")
    try:
        temporary.mkdir()
        models.save_pretrained(contents.model, temporary)
        if contents.config.model.lora.rank:
            models.save_adapter(contents.model, temporary)
        copy_tokenizer(contents.tokenizer_folder, temporary)
        (temporary / "recipe.toml").write_text(configs.to_toml(configs.to_recipe(contents.config)), encoding="utf-8")
        run = {"schema": SCHEMA, "train": asdict(state), "data": contents.fingerprint}
        run["scaler"] = contents.amp.scaler.state_dict()
        run["plugins"] = plugins.loaded_checksums()
        if extra:
            save_file({key: tensor.cpu().contiguous() for key, tensor in extra.items()}, temporary / OBJECTIVE)
        if target.name == LAST:
            tensors, values = _optimizer_state(contents)
            run["optimizer"] = {"class": type(contents.optimizer).__name__, "values": values}
            save_file(tensors, temporary / OPTIMIZER)
        (temporary / "state.json").write_text(to_json(run, indent=2), encoding="utf-8")
        seal(temporary)
        _replace(temporary, target, keep_previous=PREVIOUS in contents.config.checkpoint.keep)
    except (OSError, SafetensorError) as error:
        _remove(temporary)
        raise TrainingError(
            f"the checkpoint of step {state.step} could not be written to {target}: {error}; it needs about "
            f"{_total_bytes(contents, target):,} bytes, and {disk.free_bytes(target):,} are free; "
            + ("earlier checkpoints are untouched" if target.parent.is_dir() else f"{target.parent} is gone")
        ) from error
    finally:
        _remove(temporary)
    return time.monotonic() - started


def _replace(temporary: Path, target: Path, keep_previous: bool) -> None:
    """Rename `temporary` to `target`. After a crash between the two renames, _recover finds the old checkpoint."""
    previous = target.with_name(PREVIOUS)
    old = previous if target.name == LAST and keep_previous else target.with_name(f"{OLD}{target.name}")
    exists = os.path.lexists(target)  # a link that leads nowhere, too
    if exists:
        _remove(old)
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if exists:
            old.rename(target)
        raise
    flush_folder(target.parent)
    if old != previous:
        _remove(old)
    if target.name == LAST and not keep_previous:  # of a run that kept it
        _remove(previous)


def _total_bytes(contents: Contents, target: Path) -> int:
    """Return the bytes of the tensors of a checkpoint; its other files are small."""
    tensors: list[Tensor] = [*contents.parameters.values()]
    if target.name == LAST:
        tensors += _optimizer_state(contents)[0].values()
    return sum(tensor.nbytes for tensor in tensors)


def _optimizer_state(contents: Contents) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's state as {"exp_avg/backbone.layers.0...": tensor}, and its plain values in the same form.

    A plain value is a number or None, such as the step count of some optimizers.
    """
    state = optimizer_state.collect(contents.optimizer, contents.parameters, contents.counters)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items() if isinstance(value, Tensor)}
    return tensors, {key: _to_plain(value) for key, value in state.items() if key not in tensors}


def _to_plain(value: Any) -> Any:
    """Return NaN and the infinities, which JSON does not have, as texts; no other value of an optimizer is a text."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def check_optimizer(contents: Contents) -> None:
    """Raise TrainingError for state of the optimizer that no checkpoint can hold."""
    optimizer_state.collect(contents.optimizer, contents.parameters, contents.counters)


def restore(folder: Path, contents: Contents, ranks: Ranks) -> TrainState:
    """Restore the optimizer, the loss scale and the objective's own modules; return the state of the run.

    build_model has already loaded the weights. Raises ConfigError, on all ranks, when the data, a plugin or the class
    of the optimizer differs from the checkpoint's, unless run.allow_changes. Another optimizer then starts without a
    state.
    """
    run = read_state(folder)
    state: TrainState = run["train"]
    changes = [] if run["data"] == contents.fingerprint else ["the encoded training or validation data is not the same"]
    changes += plugins.changed_since(run["plugins"])
    saved_class, own_class = run.get("optimizer", {}).get("class"), type(contents.optimizer).__name__
    if saved_class != own_class:
        changes.append(f"the optimizer: {saved_class} -> {own_class}, which starts without a state")
    on_main(ranks, _check_changes, folder, changes, contents.config)
    _load_extra(folder, contents)
    try:
        if saved_class == own_class:
            _load_optimizer(folder, contents, run["optimizer"]["values"], state.step)
        if contents.amp.scaler.is_enabled() and run["scaler"]:
            load_scale(contents.amp.scaler, run["scaler"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder} does not have the state of this optimizer: {error}") from None
    if ranks.is_main:
        print(f"resuming from {folder}, after step {state.step:,}\n", flush=True)
    if ranks.is_main and state.best_step and (problem := verify(folder.with_name(BEST))):
        print(f"warning: {problem}; the weights of step {state.best_step}, the best so far, are lost", flush=True)
    return state


def _load_optimizer(folder: Path, contents: Contents, plain: Mapping[str, Any], step: int) -> None:
    """Load the optimizer's tensors and its plain values, which are numbers, or texts for those that JSON lacks."""
    values = {key: float(value) if isinstance(value, str) else value for key, value in plain.items()}
    if wrong := [key for key, value in values.items() if not isinstance(value, int | float | None)]:
        raise ValueError(f"{wrong[0]} is not a number")
    # Cloned, so that the memory is aligned as before the stop: the alignment can change the last bit of a result.
    saved = values | {key: tensor.clone() for key, tensor in _load_tensors(folder / OPTIMIZER).items()}
    optimizer_state.check(contents.optimizer, contents.parameters, saved, step)
    optimizer_state.load(contents.optimizer, contents.parameters, saved)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; ModelError where it is not one."""
    with path.open("rb") as stream:
        read_header(stream, path)  # which is stricter than the library
    return load_file(path)


@torch.no_grad()
def _load_extra(folder: Path, contents: Contents) -> None:
    """Copy objective.safetensors into the objective; ConfigError where the names or shapes of tensors differ."""
    extra = extra_state(contents.objective, contents.model)
    path = folder / OBJECTIVE
    saved = _load_tensors(path) if path.is_file() else {}
    if differing := sorted(extra.keys() ^ saved.keys()):
        raise ConfigError(f"{folder}: the objective no longer has the same modules: {', '.join(differing[:4])}")
    for key, tensor in extra.items():
        if tensor.shape != saved[key].shape:
            raise ConfigError(f"{path}: {key} has shape {list(saved[key].shape)}, not {list(tensor.shape)}")
        tensor.copy_(saved[key])


def open_run(path: str) -> Path:
    """Return the verified checkpoint folder of `path`: `path` itself, or best/, else last/, of a run folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"{path!r}: no such run folder")
    inside = [folder / name for name in (BEST, LAST, PREVIOUS) if (folder / name).is_dir()]
    candidates = [folder] if (folder / "manifest.json").is_file() else inside
    if not candidates:
        raise ConfigError(f"{path!r} is not a run folder: it has no {BEST}/, {LAST}/ or manifest.json")
    if problem := verify(candidates[0]):
        raise ConfigError(f"{problem}; name another checkpoint folder of the run")
    return candidates[0]


def read_plugin_checksums(folder: Path) -> dict[str, str]:
    """Return {plugin: SHA-256} of the plugins that a checkpoint was trained with."""
    checksums: dict[str, str] = read_state(folder)["plugins"]
    return checksums
