"""Shared by the commands: exit codes, stop signals, the configuration of a trained model, and output files."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from data.workers import LoaderStopped, stop_signals
from data.writing import is_same_stream, is_stream, write_text
from engine import checkpoint, config, console, distributed, heartbeat, help_pages, plugins
from engine.commands import as_started
from engine.config import Config, ConfigError, all_settings, check, did_you_mean, override, read_recipe, split_arguments
from engine.config.command_line import explain_option
from engine.errors import (
    LOST_PROCESS_ERRORS,
    USER_ERRORS,
    LostRankError,
    OtherRankError,
    TrainingError,
    write_error_file,
)
from engine.kernels import explain_missing_kernel
from engine.manifest import MANIFEST
from engine.tasks import MULTI_TASK, TASKS

# The settings that evaluation and prediction read, beside [data], [generate] and the section of the task.
ALWAYS_USED = (
    "run.device",
    "run.deterministic",
    "run.plugins",
    "train.precision",
    "train.tf32",
    "eval.batch_tokens",
    "eval.confidence",
    "distributed.timeout_seconds",
)
ONLY_TRAINING_READS = (
    *("data.train", "data.validation", "data.validation_fraction", "data.max_train_examples", "data.test"),
    *("data.group_column", "data.labels", "data.teacher_file", "data.num_workers", "data.fold", "data.cache"),
)
PRINT_SECONDS = 2.0  # within which another rank of this machine reports the same error
ECHO_SECONDS = 2.0  # within which torchrun passes a terminal's Ctrl-C on to ranks that have got it too

Item = TypeVar("Item")


class StopRequest:
    """A flag that SIGINT, SIGTERM, SIGUSR1 and SIGHUP set while it listens; the loop reads it between two steps.

    A second SIGINT ends the process. Before and after the loop nothing would be saved, so signals keep their usual
    effect there. Outside the main thread Python delivers no signals, and the flag is never set.

    unit: after which the loop stops, for the line that says so.
    error: why the next step could not be read; it stops the loop too, and is raised after the checkpoint.
    """

    def __init__(self, unit: str = "step") -> None:
        self.unit = unit
        self.signal = 0
        self.error: Exception | None = None
        self._received_at = 0.0
        self._announce, self._listening = False, False
        self._previous_handlers: dict[int, Any] = {}

    def listen(self, announce: bool) -> None:
        """Install handlers for the signals. announce: print a line at the first one (on the main rank)."""
        self._announce, self._listening = announce, True
        if threading.current_thread() is not threading.main_thread():
            return
        for number in stop_signals():
            self._previous_handlers[number] = signal.signal(number, self._receive)

    def restore_handlers(self) -> None:
        """Restore the handlers that `listen` replaced."""
        self._listening = False
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        is_echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() < self._received_at + ECHO_SECONDS
        if self.signal and number == signal.SIGINT and not is_echo:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        if self._announce and not self.signal:  # not print, which the signal may have interrupted
            with suppress(OSError):  # the terminal may have gone
                os.write(2, f"\nstopping after this {self.unit}; Ctrl-C again ends at once\n".encode())
        self._received_at = time.monotonic()
        self.signal = number
        heartbeat.note_stop()

    def __bool__(self) -> bool:
        return bool(self.signal) or self.error is not None

    def is_seen(self) -> bool:
        """Return whether some rank got a signal while it listens.

        What takes long within a step asks this: waiting for data, an evaluation. What the ranks agree on is the flag.
        """
        return self._listening and (bool(self.signal) or heartbeat.stop_seen())

    def guard(self, load: Callable[..., Iterator[list[Item]]], *args: Any, **options: Any) -> Iterator[list[Item]]:
        """Yield the steps of load(*args, **options, should_stop=a function that tells whether a signal has come).

        Where a step cannot be read, set the flag and yield empty steps, which no rank then takes.
        """
        try:
            yield from load(*args, **options, should_stop=self.is_seen)
        except LoaderStopped:
            self.signal = self.signal or signal.SIGTERM
        except Exception as error:  # the user's own code fails with errors of every kind
            self.error = error
        while True:
            yield []

    def raise_error(self) -> None:
        """If a rank could not read its data, raise its error there, and OtherRankError on the others."""
        if any(distributed.all_gather(self.error is not None)):
            raise self.error or OtherRankError("another rank has failed")

    @property
    def exit_code(self) -> int:
        """128 + the signal, as a shell reports it; SIGTERM's on a rank that stopped because another one did."""
        return 128 + (self.signal or signal.SIGTERM)


@record  # torchrun then ends with the traceback of the rank that failed first
def run_command(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command and exit; an error of the user's is printed as one sentence, without a traceback.

    Exit codes: 0 done; 1 a bug, with its traceback; 2 an error of the user's; 75 another process of the run was lost or
    does not answer; 128 + n stopped by signal n.
    """
    console.protect()
    try:
        code = main(sys.argv[1:])
    except USER_ERRORS as error:
        code = _report(error)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # of --output; the console goes on without its reader
        code = 128 + signal.SIGPIPE
    except Exception as error:
        lost = heartbeat.explain_lost_connection(error) if heartbeat.is_connection_error(error) else ""
        missing = explain_missing_kernel(error)
        if not lost and not missing:
            distributed.announce_failure(f"{type(error).__name__}: {error}")
            raise
        code = _report(LostRankError(lost) if lost else TrainingError(missing))
    heartbeat.end()
    if dist.is_initialized():
        dist.destroy_process_group()
        # gloo's threads rarely abort the interpreter's own end, and torchrun then reports a finished run as failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def _report(error: Exception) -> int:
    """Print an error of the user's, unless another rank says it; return the exit code."""
    if isinstance(error, OtherRankError):
        heartbeat.explain_lost_connection(error)
    else:
        sentence = as_started(str(error))
        distributed.announce_failure(sentence)
        write_error_file(sentence)
        _print_once(sentence)
    return heartbeat.EXIT_CODE if isinstance(error, LOST_PROCESS_ERRORS) else 2


def _print_once(error: str) -> None:
    """Print an error; if the first rank of this machine reports the same one soon, only that rank prints it."""
    try:
        rank, world_size = distributed.read_variable("RANK", 0), distributed.read_variable("WORLD_SIZE", 1)
        local_rank = distributed.read_variable("LOCAL_RANK", rank)
    except ConfigError:  # which may be the error to print
        rank, world_size, local_rank = 0, 1, 0
    own = "" if rank == 0 else f" (rank {rank})"
    if world_size > 1:
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # of this machine
        printed = f"printed {heartbeat.own_machine()} {restarts} {error}"
        try:
            store = distributed.connect(1, world_size, PRINT_SECONDS)  # as a client of the store
            if local_rank == 0:
                store.set(printed, "yes")
            elif _is_set_soon(store, printed):
                return
        except (dist.DistError, *USER_ERRORS):
            pass
    print(f"error{own}: {error}", file=sys.stderr, flush=True)


def _is_set_soon(store: Any, key: str) -> bool:
    """Return whether a key is set within PRINT_SECONDS; torch's own wait prints warnings of C++ where it is not."""
    deadline = time.monotonic() + PRINT_SECONDS
    while not store.check([key]) and time.monotonic() < deadline:
        time.sleep(PRINT_SECONDS / 20)
    found: bool = store.check([key])
    return found


def parse(argv: Sequence[str], usage: str, options: Mapping[str, str] | None = None) -> Config:
    """Return the checked configuration of `[RECIPE] --section.key=value ...`.

    options: of the command itself, for its --help. Raises ConfigError, or SystemExit(0) after --help.
    """
    help_pages.answer(argv, usage, options=options)
    return config.parse(list(argv), usage)


def open_model(
    argv: Sequence[str],
    usage: str,
    options: Mapping[str, str],
    more: Sequence[str] = (),
    fixed: Mapping[str, str] = {},
) -> tuple[Path, Config, dict[str, str]]:
    """Return (checkpoint folder, its recipe with overrides, values of `options`) of a command line.

    Arguments and errors as for read_command; ConfigError for a setting that would have no effect, too.
    """
    name, given, own = read_command(argv, usage, options, more, fixed)
    folder = checkpoint.open_run(name)
    return folder, configure(folder, given, more), own


def read_command(
    argv: Sequence[str],
    usage: str,
    options: Mapping[str, str],
    more: Sequence[str] = (),
    fixed: Mapping[str, str] = {},
) -> tuple[str, dict[str, str], dict[str, str]]:
    """Return (the folder or name of a model, the settings given, values of `options`) of a command line.

    options: {"name PLACEHOLDER": meaning} of the command's own options. more: settings that this command reads beside
    the usual ones; fixed: {setting: why} of the usual ones that it does not read. Raises ConfigError for an unknown
    option or a fixed setting; SystemExit(0) after --help.
    """
    known = all_settings(Config())
    settings = [key for key in known if is_used(key, more) and key not in fixed]
    help_pages.answer_for_run(argv, usage, options, settings, more)
    positional, given = split_arguments(list(argv))
    names = [name.partition(" ")[0] for name in options]
    own = {key: given.pop(key) for key in names if key in given}
    for key in given:
        if key in fixed:
            raise ConfigError(f"--{key} has no effect here: {fixed[key]}")
        if key not in known:
            raise ConfigError(explain_option(key) or f"unknown option --{key}{did_you_mean(key, [*names, *settings])}")
    if len(positional) != 1:
        many = f", not {' and '.join(map(repr, positional))}" if positional else ""
        raise ConfigError(f"name one run folder{many}: {usage}")
    return positional[0], given, own


def configure(folder: Path, given: Mapping[str, Any], more: Sequence[str] = ()) -> Config:
    """Return the recipe of a checkpoint with the settings `given` for this use, its plugins loaded.

    more: settings that are read beside the usual ones. Raises ConfigError for a setting without effect on a trained
    model, and where the recipe names plugins and `given` does not.
    """
    for key in given:
        if key in all_settings(Config()) and not is_used(key, more):
            raise ConfigError(f"--{key} has no effect on a trained model; --help lists the settings that have one")
    recipe = read_recipe(str(folder / "recipe.toml"))
    if recipe.run.task == MULTI_TASK:
        single = ", ".join(str(path) for path in sorted(folder.parent.glob(f"{checkpoint.BEST}-*")))
        raise ConfigError(
            f"{folder} has several tasks; name the folder of one of them: {single or 'there is none yet'}"
        )
    named = override(Config(), {key: value for key, value in given.items() if key == "run.plugins"}).run.plugins
    plugins.check_named(named, recipe.run.plugins, folder)
    plugins.load_plugins(named)
    # The device of the training need not exist here.
    config = override(replace(recipe, run=replace(recipe.run, device="auto")), dict(given))
    check(config)
    for change in plugins.changed_since(checkpoint.read_plugin_checksums(folder)):
        print(f"warning: {folder}: {change}", file=sys.stderr)
    return config


def is_used(key: str, more: Sequence[str]) -> bool:
    """Return whether a trained model reads a setting. more: those of a command beside the usual ones."""
    section = key.partition(".")[0]
    if key in ALWAYS_USED or key in more:
        return True
    if section == "data":
        return key not in ONLY_TRAINING_READS
    return section == "generate" or section in {task.section for task in TASKS.values()}


def check_output(name: str, source: str) -> Path:
    """Return the file to write results to; ConfigError if it cannot be written. Call it before the work."""
    try:
        return _check_output(name, source)
    except OSError as error:  # a name that is too long, links that lead to each other
        raise ConfigError(f"--output {name!r:.80} cannot be written: {error.strerror}") from None


def _check_output(name: str, source: str) -> Path:
    output = Path(name)
    if "\0" in name:
        raise ConfigError(f"--output {name!r}: no file can have a NUL in its name")
    if is_stream(output):
        return output
    folder = Path(os.path.realpath(output)).parent if output.is_symlink() else output.parent
    if output.is_dir():
        raise ConfigError(f"--output {name!r} is a folder; name a file")
    if os.path.islink(os.path.realpath(output)):
        raise ConfigError(f"--output {name!r} is a link that leads to itself; name a file")
    if not folder.is_dir():
        raise ConfigError(f"--output {name!r}: there is no folder {str(folder)!r}")
    if (folder / MANIFEST).is_file():
        raise ConfigError(f"--output {name!r} would be in a checkpoint; name a file elsewhere")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--output {name!r}: the folder {str(folder)!r} cannot be written")
    if output.exists() and Path(source).exists() and output.samefile(source):
        raise ConfigError(f"--output {name!r} is the file that is read; name another one")
    return output


def write_output(output: Path, lines: Iterable[str]) -> None:
    """Write lines to a regular file as a whole, so that it is always complete, or into a device or pipe."""
    try:
        write_text(output, (line + "\n" for line in lines))
    except BrokenPipeError:  # its reader has ended, as in `--output /dev/stdout | head`
        raise
    except OSError as error:
        raise TrainingError(f"--output {str(output)!r} could not be written: {error.strerror}") from None


def console_beside(output: Path | None) -> TextIO:
    """Return where a command prints for the user: stdout, or stderr where `output` is the same file as stdout."""
    return sys.stderr if output is not None and is_same_stream(output, sys.stdout) else sys.stdout
