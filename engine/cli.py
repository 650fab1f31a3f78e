"""What the commands share: how they end, how they are stopped, how a trained model is opened, where results go."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from engine import checkpoint
from engine.config import Config, ConfigError, all_settings, check, did_you_mean, override, read_recipe, split_arguments
from engine.errors import USER_ERRORS, TrainingError

# What a trained model still listens to: how data is read (less what only training reads), and the machine.
ONLY_TRAINING_READS = (
    *("train", "validation", "validation_fraction", "limit", "test", "group", "labels", "teacher", "workers"),
)
ALWAYS_USED = ("run.device", "train.precision", "eval.batch_tokens")


class StopRequest:
    """SIGINT, SIGTERM and SIGUSR1 only raise this flag, while listening; the loop reads it between two steps.

    A second SIGINT kills. Where nothing would be saved, before and after the loop, signals do what they always do.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._announce = False
        self._before: dict[int, Any] = {}

    def listen(self, announce: bool) -> None:
        """announce: say so when the first signal comes; for the main rank."""
        self._announce = announce
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._receive)

    def unlisten(self) -> None:
        """Put back what was there before listen."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.signal and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        if self._announce and not self.signal:  # not by print, which this may have interrupted
            os.write(2, b"\nstopping after this step; Ctrl-C again ends at once\n")
        self.signal = number

    def __bool__(self) -> bool:
        return bool(self.signal)

    @property
    def exit_code(self) -> int:
        """128 + the signal, as a shell reports it; SIGTERM on a rank that stopped because another one was told to."""
        return 128 + (self.signal or signal.SIGTERM)


@record  # so that torchrun ends with the traceback of the rank that failed first
def run_command(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command line; a user's mistake ends in one sentence and code 2, never in a traceback.

    Exit codes: 0 done; 1 a bug, with its traceback; 2 a user's mistake; 128 + n stopped by signal n, to be resumed.
    """
    try:
        code = main(sys.argv[1:])
    except USER_ERRORS as error:
        _print_once(str(error))
        code = 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read what is printed has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        code = 128 + signal.SIGPIPE
    if dist.is_initialized():
        dist.destroy_process_group()
    raise SystemExit(code)


def _print_once(error: str) -> None:
    """An error that all ranks have is rank 0's to print; one that rank 0 has not got within 2 s is a rank's own."""
    rank = int(os.environ.get("RANK", 0))
    own = "" if rank == 0 else f" (rank {rank})"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=2))
            if rank == 0:
                store.set(error, "printed")
            else:
                store.wait([error])
                return
        except dist.DistError:
            pass
    print(f"error{own}: {error}", file=sys.stderr, flush=True)


def open_model(
    argv: Sequence[str], usage: str, options: Mapping[str, str], more: Sequence[str] = ()
) -> tuple[Path, Config, dict[str, str]]:
    """(checkpoint folder, its recipe with the overrides, the values of `options`) of a command line.

    options: {name: what it is} of the command's own options; more: settings that this command reads beside the usual.
    Raises ConfigError for anything that would have no effect; SystemExit(0) after --help.
    """
    known = all_settings(Config())
    settings = {key: declared.metadata["doc"] for key, declared in known.items() if _is_used(key, more)}
    if "--help" in argv or "-h" in argv:
        shown = [usage, "", *(f"  --{name} FILE\n        {doc}" for name, doc in options.items()), ""]
        shown += ["Settings, taken from the recipe of the run where they are not given:", ""]
        print("\n".join([*shown, *(f"  --{key}\n        {doc}" for key, doc in settings.items())]))
        raise SystemExit(0)
    positional, given = split_arguments(list(argv))
    for key in given:
        if key in known and key not in settings:
            raise ConfigError(f"--{key} has no effect on a trained model; --help lists what has one")
        if key not in (*options, *settings):
            raise ConfigError(f"unknown option --{key}{did_you_mean(key, [*options, *settings])}")
    if len(positional) != 1:
        raise ConfigError(f"name one run folder: {usage}")
    folder = checkpoint.open_run(positional[0])
    own = {key: given.pop(key) for key in options if key in given}
    recipe = read_recipe(str(folder / "recipe.toml"))
    config = override(replace(recipe, run=replace(recipe.run, device="auto")), given)
    check(config)
    return folder, config, own


def _is_used(key: str, more: Sequence[str]) -> bool:
    section, _, name = key.partition(".")
    if section == "data":
        return key in more or name not in ONLY_TRAINING_READS
    return key in ALWAYS_USED or section == "generate"


def check_output(name: str, source: str) -> Path:
    """The file to write results to; ConfigError now, not after the work, where it cannot be written."""
    output = Path(name)
    if output.is_dir():
        raise ConfigError(f"--output {name!r} is a folder; name a file")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {name!r}: there is no folder {str(output.parent)!r}")
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(f"--output {name!r}: the folder {str(output.parent)!r} cannot be written")
    if output.exists() and Path(source).exists() and output.samefile(source):
        raise ConfigError(f"--output {name!r} is the file that is read; name another one")
    return output


def write_whole(output: Path, lines: Iterable[str]) -> None:
    """Write beside `output` and rename, so that a file of this name is always a whole one."""
    temporary = output.with_name(output.name + ".writing")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.writelines(line + "\n" for line in lines)
        os.replace(temporary, output)
    except OSError as error:
        raise TrainingError(f"--output {str(output)!r} could not be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
