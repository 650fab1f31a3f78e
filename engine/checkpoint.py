"""Checkpoints: safetensors and JSON files, written to a temporary folder, then renamed; verified when read.

A checkpoint is an export that transformers reads (model.safetensors, config.json, tokenizer files) plus what a resumed
run needs: optimizer.safetensors, state.json and the resolved recipe.toml. Modules of the objective beside the model are
in objective.safetensors. manifest.json, written last, has the size and SHA-256 of each file. A run folder contains

    best/      the best evaluation so far, without the optimizer
    last/      the newest checkpoint, to resume from
    previous/  the one before it, in case last/ turns out to be damaged

of which checkpoint.keep may leave out some. No file is a pickle. Where the parameters are sharded over the ranks, last/
has model and optimizer in shards, a file a rank (engine/sharded_checkpoint.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import models
from data import Examples, copy_tokenizer
from data.multi_task import MultiTaskExamples
from data.writing import WRITING, to_json
from engine import config as configs
from engine import disk, log, optimizer_state, pending_save, plugins
from engine.config import Config, ConfigError
from engine.distributed import Ranks, check_shared_folder, on_main
from engine.dtensors import is_sharded
from engine.errors import TrainingError
from engine.manifest import OBJECTIVE, OPTIMIZER, SCHEMA, seal, verify
from engine.multi_task import read_parts
from engine.objective import extra_state, named_parameters
from engine.precision import Precision, load_scale
from engine.run_folder import BEST as BEST
from engine.run_folder import DAMAGED, lock, remove, replace
from engine.run_folder import LAST as LAST
from engine.run_folder import OLD as OLD
from engine.run_folder import PREVIOUS as PREVIOUS
from engine.screen import Screen
from engine.state import TrainState, read_state
from engine.tasks.multi_task import Part
from engine.tasks.sentence_embedding import export_sentence_files
from models.checkpoints.tensor_files import open_tensors
from models.multi_task import one_task


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
    parts: tuple[Part, ...] = field(init=False)  # of several tasks

    def __post_init__(self) -> None:
        object.__setattr__(self, "counters", optimizer_state.counters(self.optimizer))
        object.__setattr__(self, "parts", tuple(read_parts(self.config)))

    @cached_property
    def of_each_task(self) -> dict[str, Contents]:
        """The contents of a run of each of several tasks alone, with the shared backbone; {} for one task."""
        found = {}
        for part in self.parts:
            model = one_task(self.model, part.name)
            data = tuple(examples.parts[part.name] for examples in self.data if isinstance(examples, MultiTaskExamples))
            found[part.name] = dataclasses.replace(self, config=part.config, objective=model, model=model, data=data)
        return found

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of the data sets and of the teacher's logits."""
        checksums = [examples.fingerprint() for examples in self.data]
        if self.teacher is not None:
            checksums.append(hashlib.sha256(self.teacher.numpy().tobytes()).hexdigest()[:16])
        return "-".join(checksums)

    def verify_best(self, run_folder: Path) -> str | None:
        """Return a sentence on what is wrong with best/, or with the best-NAME/ of one of several tasks, or None."""
        names = [BEST, *(f"{BEST}-{part.name}" for part in self.parts)]
        return next((problem for name in names if (problem := verify(run_folder / name))), None)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank has a part of every parameter (engine/sharding.py)."""
        return is_sharded(next(self.model.parameters()))

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
        on_main(ranks, _in_folder, config, lock, stack)
        stack.callback(pending_save.end)  # before the lock is released
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
    newest = _newest(folder, Screen(config.log))
    changes = configs.differences(config, configs.read_recipe(str(newest / "recipe.toml")))
    for part in read_parts(config):
        saved = newest / f"recipe-{part.name}.toml"
        if saved.is_file():  # else multi_task.recipes differs
            found = configs.differences(part.config, configs.read_recipe(str(saved)))
            changes += [f"{part.name}: {change}" for change in found]
    _check_changes(newest, list(dict.fromkeys(changes)), config)
    return newest


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
    Screen(config.log).say(f"warning: resuming from {folder} with changes (run.allow_changes):\n  {listed}")


def _newest(folder: Path, screen: Screen) -> Path:
    """Return the newest complete checkpoint: last/, or previous/ with a warning."""
    problems: list[str] = []
    for name in (LAST, PREVIOUS):
        checkpoint = folder / name
        problem = verify(checkpoint, to_resume=True) if checkpoint.exists() else f"{checkpoint} does not exist"
        if problem is None:
            if problems:
                screen.say(f"warning: {problems[0]}; resuming from {checkpoint}")
                if os.path.lexists(folder / LAST):  # renamed, so that it never replaces a complete previous/
                    remove(folder / DAMAGED)
                    (folder / LAST).rename(folder / DAMAGED)
            return checkpoint
        problems.append(problem)
    raise ConfigError("no complete checkpoint to resume from: " + "; ".join(problems))


def save(target: Path, contents: Contents, state: TrainState, ranks: Ranks) -> float:
    """Write a checkpoint to a temporary folder, then rename it to `target`, which keeps the old one until then.

    Return the seconds that the run waited on rank 0. Only last/ has the optimizer. Raises TrainingError, on all ranks,
    when a weight is not finite or a write fails. A sharded run goes on while a thread writes last/; the next save of
    last/, or pending_save.wait, raises the error of that thread.
    """
    if contents.is_sharded:
        from engine import sharded_checkpoint  # which a run that is not sharded never loads

        return sharded_checkpoint.save(target, contents, state, ranks)
    seconds: float = on_main(ranks, _save, target, contents, state)
    return seconds


def _save(target: Path, contents: Contents, state: TrainState) -> float:
    started = time.monotonic()
    extra = {key: tensor.detach() for key, tensor in extra_state(contents.objective, contents.model).items()}
    weights = contents.model.state_dict() | extra
    check_finite((key for key, tensor in weights.items() if not tensor.isfinite().all()), state)
    temporary = target.with_name(f"{WRITING}{target.name}")
    try:
        temporary.mkdir()
        models.save_pretrained(contents.model, temporary)
        if contents.config.model.lora.rank:
            models.save_adapter(contents.model, temporary / models.adapter.FOLDER)
        if extra:
            save_file({key: tensor.cpu().contiguous() for key, tensor in extra.items()}, temporary / OBJECTIVE)
        values = None
        if target.name == LAST:
            tensors, values = _optimizer_state(contents)
            save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, temporary / OPTIMIZER)
        write_small_files(temporary, contents, state, values)
        seal(temporary)
        replace(temporary, target, keep_previous=PREVIOUS in contents.config.checkpoint.keep)
    except (OSError, SafetensorError) as error:
        remove(temporary)
        raise explain_failure(target, state, total_bytes(contents, target), error) from error
    finally:
        remove(temporary)
    return time.monotonic() - started


def check_finite(broken: Iterable[str], state: TrainState) -> None:
    """Raise TrainingError if there is a name of a weight that is not finite."""
    for name in broken:
        raise TrainingError(f"{name} has NaN or infinite values at step {state.step}; no checkpoint is written")


def write_small_files(
    temporary: Path, contents: Contents, state: TrainState, optimizer_values: Mapping[str, Any] | None
) -> None:
    """Write what a checkpoint has beside tensors. optimizer_values: the plain ones of the optimizer; None: in best/."""
    copy_tokenizer(contents.tokenizer_folder, temporary)
    own, max_length = contents.config.sentence_embedding, contents.config.data.max_length
    export_sentence_files(contents.model, own, max_length, temporary)
    recipes = {"recipe.toml": contents.config} | {f"recipe-{part.name}.toml": part.config for part in contents.parts}
    for name, config in recipes.items():
        (temporary / name).write_text(configs.to_toml(configs.to_recipe(config)), encoding="utf-8")
    run = {"schema": SCHEMA, "train": asdict(state), "data": contents.fingerprint}
    run["scaler"] = contents.amp.scaler.state_dict()
    run["plugins"] = plugins.loaded_checksums()
    if optimizer_values is not None:
        run["optimizer"] = {"class": optimizer_state.class_name(contents.optimizer), "values": optimizer_values}
    (temporary / "state.json").write_text(to_json(run, indent=2), encoding="utf-8")


def explain_failure(target: Path, state: TrainState, needed: int, error: Exception, where: str = "") -> TrainingError:
    """Return the error of a save that has failed. needed: bytes. where: " by rank 1 ...", if another rank than 0."""
    return TrainingError(
        f"the checkpoint of step {state.step} could not be written to {target}{where}: {error}; it needs about "
        f"{needed:,} bytes, and {disk.free_bytes(target):,} are free; "
        + ("earlier checkpoints are untouched" if target.parent.is_dir() else f"{target.parent} is gone")
    )


def total_bytes(contents: Contents, target: Path) -> int:
    """Return the bytes of the tensors of a checkpoint; its other files are small."""
    tensors: list[Tensor] = [*contents.parameters.values()]
    if target.name == LAST:
        tensors += _optimizer_state(contents)[0].values()
    return sum(tensor.nbytes for tensor in tensors)


def _optimizer_state(contents: Contents) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's tensors and its plain values."""
    return optimizer_state.split(optimizer_state.collect(contents.optimizer, contents.parameters, contents.counters))


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
    saved_class, own_class = run.get("optimizer", {}).get("class"), optimizer_state.class_name(contents.optimizer)
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
    screen = Screen(contents.config.log, ranks.is_main)
    screen.say(f"resuming from {folder}, after step {state.step:,}\n")
    if ranks.is_main and state.best_step and (problem := contents.verify_best(folder.parent)):
        screen.say(f"warning: {problem}; the weights of step {state.best_step}, the best so far, are lost")
    return state


def _load_optimizer(folder: Path, contents: Contents, plain: Mapping[str, Any], step: int) -> None:
    """Load the optimizer's tensors and its plain values; ValueError where they are not those of this optimizer."""
    with ExitStack() as stack:
        tensors = optimizer_state.read(open_tensors(folder, "optimizer", stack), contents.parameters)
    saved = optimizer_state.join(tensors, plain)
    optimizer_state.check(contents.optimizer, contents.parameters, saved, step)
    optimizer_state.load(contents.optimizer, contents.parameters, saved)


@torch.no_grad()
def _load_extra(folder: Path, contents: Contents) -> None:
    """Copy objective.safetensors into the objective; ConfigError where the names or shapes of tensors differ."""
    extra = extra_state(contents.objective, contents.model)
    with ExitStack() as stack:
        is_saved = any(folder.glob(f"{Path(OBJECTIVE).stem}*.safetensors"))
        files = open_tensors(folder, Path(OBJECTIVE).stem, stack) if is_saved else None
        entries = files.entries if files else {}
        if differing := sorted(extra.keys() ^ entries.keys()):
            raise ConfigError(f"{folder}: the objective no longer has the same modules: {', '.join(differing[:4])}")
        for key, tensor in extra.items():
            if files and tensor.shape != entries[key].shape:
                raise ConfigError(
                    f"{folder / OBJECTIVE}: {key} has shape {list(entries[key].shape)}, not {list(tensor.shape)}"
                )
            if files:
                files.copy_into(key, tensor)


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
