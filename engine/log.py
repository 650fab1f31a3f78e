"""The log of a run: metrics.jsonl, what the screen shows of it, and the loggers of log.report_to."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.writing import replace_file, to_json, write_text
from engine.config import LogSettings
from engine.distributed import Ranks, on_main
from engine.errors import TrainingError
from engine.first_screen import Summary
from engine.loggers import Loggers, check_loggers
from engine.profiling import StepProfiler, parse_profile_steps
from engine.run_end import describe_folder, evaluation_table, format_metrics, next_commands, result_line
from engine.run_folder import RESUMED, SUMMARY
from engine.screen import ProgressBar, Screen, step_line, terminal_width
from engine.spikes import WINDOW, describe_norms, describe_spike
from engine.study_link import report_evaluation


class RunLog:
    """The log that rank 0 writes; on other ranks every method returns at once.

    metrics.jsonl has one JSON object a line:

    - a training line: {"step", "loss", "lr", "grad_norm", ...}, after a spike of the loss with {"spike": {...}};
    - an evaluation: {"step", "evaluation": {...}}, with "training": {...} where training examples were evaluated too,
      and with eval.confidence "intervals": {metric: [low, high]}.

    A line that cannot be written is kept and written with a later one; the run goes on meanwhile. Rates and
    data_wait_seconds cover the steps since the last training line, without evaluation and saving.

    start: the step that the run resumes from. Later lines are removed, so that the file is that of one run.
    summary: what was said before the first step, for summary.txt; None (as on other ranks): there is no such file, the
    screen shows all metrics, and the loggers get no settings.
    Raises, on every rank, ConfigError when a logger cannot be opened, and TrainingError when metrics.jsonl cannot be
    written.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        settings: LogSettings,
        screen: Screen,
        summary: Summary | None = None,
        *,
        start: int,
        total: int,
    ):
        self.is_main, self.device, self.screen = ranks.is_main, ranks.device, screen
        self.columns = summary.columns if summary else ()
        self.path, self.start = folder / "metrics.jsonl", start
        self.unwritten: list[str] = []  # lines that could not be written so far
        self.profiler = StepProfiler(settings.profile_steps, folder, ranks.device, total)
        self.losses: list[float] = on_main(ranks, self._open, start)  # logged before a resume; the last ones
        on_main(ranks, self._open_loggers, settings.report_to, start, summary.recipe if summary else {})
        if not self.is_main:
            return
        self.bar = ProgressBar(start, total, screen.has_bar)
        self.unsaid = summary.full if summary else ""  # for summary.txt
        if not start:
            self._write_summary()
        self._restart_rates()

    def _open(self, start: int) -> list[float]:
        """Open metrics.jsonl and read what the lines up to step `start` say; return their last losses."""
        try:
            kept = _remove_lines_after(self.path, start)
            self.file = self.path.open("a+b", buffering=0)  # unbuffered, so that no later write repeats a failed one
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be written: {error.strerror}") from None
        self.length = os.fstat(self.file.fileno()).st_size  # of the complete lines
        self.evaluations = [_flatten_evaluation(row) for row in kept if "evaluation" in row]
        training = [row for row in kept if "grad_norm" in row]
        self.grad_norms = [(row["step"], row["grad_norm"]) for row in training]
        return [row["loss"] for row in training[-WINDOW:]]

    def _open_loggers(self, names: Collection[str], start: int, recipe: Mapping[str, Any]) -> None:
        self.loggers = Loggers([*names], self.path.parent, start, recipe, self.say)

    def _write_summary(self) -> None:
        """Write summary.txt, once; a resumed run, whose weights are those of its checkpoint, adds to it."""
        path = self.path.with_name(SUMMARY)
        text, self.unsaid = self.unsaid, ""
        if not text:
            return
        before = ""
        if self.start:
            with suppress(OSError):  # it was removed
                before = f"{path.read_text(encoding='utf-8', errors='replace')}{RESUMED}{self.start}\n\n"
        try:
            write_text(path, [before, text])
        except OSError as error:
            self.warn(f"warning: {path} cannot be written ({error.strerror}); the run goes on")

    def _restart_rates(self) -> None:
        self.since = time.perf_counter()
        self.samples = self.tokens = self.waited = 0.0

    def begin_step(self, step: int) -> None:
        """Start the trace of log.profile_steps, if this is its first step."""
        if self.is_main:
            self._write_summary()  # of a resumed run, once it goes on
            self.profiler.begin_step(step)

    def count_step(self, step: int, samples: float, tokens: float, waited: float) -> None:
        """Add the examples and non-pad tokens of a step (all ranks), and the seconds rank 0 waited for its data."""
        if self.is_main:
            with self.paused():  # for the writing of a trace
                self.say(self.profiler.end_step(step))
            self.bar.move_to(step)
            self.samples += samples
            self.tokens += tokens
            self.waited += waited

    def log_step(self, step: int, loss: float, lr: float, grad_norm: float, more: dict[str, Any]) -> None:
        """Write a training line: the numbers of this step, the rates since the last line, and `more`."""
        if not self.is_main:
            return
        seconds = time.perf_counter() - self.since
        rate = self.samples / seconds
        row = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm, **more}
        row |= {"samples_per_second": round(rate, 2), "tokens_per_second": round(self.tokens / seconds, 1)}
        row |= {"data_wait_seconds": round(self.waited, 4), "peak_memory_mb": peak_memory_mb(self.device)}
        self.grad_norms.append((step, grad_norm))
        self._write(row, "train", step, {name: value for name, value in row.items() if name != "spike"})
        self.bar.show_step(loss, lr, rate)
        if self.bar.is_line_due(step):
            self.screen.show(step_line(terminal_width(), step, loss, lr, grad_norm, rate))
        if "spike" in more:
            self.warn(describe_spike(step, loss, more["spike"]))
        self._restart_rates()

    def log_evaluation(
        self, step: int, metrics: dict[str, float], on_training: dict[str, float], best: bool, seconds: float
    ) -> None:
        """Write the metrics of the validation data, and of training examples if any; stop the clock of the rates.

        seconds: the time the evaluation took. Call `restart_clock` once the best weights are saved.
        """
        if not self.is_main:
            return
        self.paused_at = time.perf_counter() - seconds
        row: dict[str, Any] = {"step": step, "evaluation": metrics, "best": best}
        row |= {"training": on_training} if on_training else {}
        intervals = getattr(metrics, "intervals", {})
        row |= {"intervals": intervals} if intervals else {}
        self.evaluations.append(_flatten_evaluation(row))
        self._write(row, "validation", step, metrics)
        report_evaluation(row)
        if on_training:
            self.loggers.log("training", on_training, step)
        shown = format_metrics(metrics, self.columns)
        self.screen.show(f"step {step:>6}  validation  {shown}  ({seconds:.1f} s){'  best' if best else ''}", 13, "  ")
        if on_training:
            self.screen.show(f"{'':>11}  training    {format_metrics(on_training, self.columns)}", 2, "  ")

    def restart_clock(self) -> None:
        """Exclude the time since the evaluation began from the rates."""
        if self.is_main:
            self.since += time.perf_counter() - self.paused_at

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block from the rates."""
        self.paused_at = time.perf_counter()
        yield
        self.restart_clock()

    def say(self, text: str) -> None:
        """Print a note, or a warning, unless the text is empty."""
        self.screen.say(text)

    def warn(self, text: str) -> None:
        """Print a warning, unless the text is empty."""
        self.screen.warn(text)

    def table(self) -> str:
        """Return the evaluations of the run, one a line, the best one marked."""
        return evaluation_table(self.evaluations, self.columns, terminal_width())

    def values_of(self, metric: str) -> list[float]:
        """Return a metric of the validation data in all evaluations of the run, in their order; [] on other ranks."""
        return [row[metric] for row in self.evaluations if metric in row] if self.is_main else []

    def final(self, step: int, result: dict[str, float], reason: str, max_grad_norm: float) -> None:
        """Show why the run ended, its evaluations, gradient norms and result; write it to metrics.jsonl; close.

        max_grad_norm: train.max_grad_norm.
        """
        if not self.is_main:
            return
        self.bar.close()
        self.screen.show(f"\n{reason}\n{self.table()}\n")
        self.screen.show(describe_norms(self.grad_norms, max_grad_norm))
        self.screen.result(result_line(result, self.columns))
        self._write({"step": step, "end": reason, **result}, "final", step, result)
        self.close(ended=True)
        if self.unwritten:
            raise TrainingError(
                f"{self.path} lacks the last {len(self.unwritten)} lines, which could not be written; the run is "
                "complete otherwise, and the same command with --resume writes its end"
            )

    def show_next(self, labelled: str, plugins: Sequence[str]) -> None:
        """Show what the run wrote, its time, and the commands to go on with; arguments as for next_commands."""
        if self.is_main:
            folder = self.path.parent
            self.screen.show(describe_folder(folder, time.monotonic() - self.screen.started, self.start))
            self.screen.show_commands(next_commands(folder, labelled, plugins))

    def close(self, ended: bool = False) -> None:
        """Close the files, the bar and the loggers. ended: whether the run has; if not, a resume continues it."""
        if not self.is_main:
            return
        self.say(self.profiler.finish())
        self.bar.close()
        self.file.close()
        self.loggers.close(ended)

    def _write(self, row: dict[str, Any], family: str, step: int, scalars: dict[str, Any]) -> None:
        self._append(to_json(row) + "\n")
        self.screen.write_row(row)
        self.loggers.log(family, {name: value for name, value in scalars.items() if name != "step"}, step)

    def _append(self, line: str) -> None:
        """Append a line, and those that could not be written before; of a failed write nothing stays in the file."""
        failed_before = bool(self.unwritten)
        self.unwritten.append(line)
        data = "".join(self.unwritten).encode()
        try:
            self._put_back()
            self.file.truncate(self.length)  # where a failed write could not be undone
            rest = memoryview(data)
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            with suppress(OSError):  # read-only by now: the next write, or a resume, removes the incomplete line
                self.file.truncate(self.length)
            if not failed_before:
                self.say(
                    f"warning: {self.path} cannot be written ({error.strerror}); the run goes on, and its lines are "
                    "written once that is possible"
                )
        else:
            self.length += len(data)
            self.unwritten.clear()

    def _put_back(self) -> None:
        """Write the lines so far to a new file where the file was removed, or replaced as editors do to save one."""
        with suppress(OSError):  # it is not there
            if os.path.samestat(os.fstat(self.file.fileno()), self.path.stat()):
                return
        with replace_file(self.path) as temporary:
            temporary.write_bytes(os.pread(self.file.fileno(), self.length, 0))
        self.file.close()
        self.file = self.path.open("a+b", buffering=0)
        self.say(f"warning: {self.path} was removed or replaced; it is written again, with all lines of the run")


def _flatten_evaluation(row: dict[str, Any]) -> dict[str, Any]:
    return {"step": row["step"], **row["evaluation"], "best": row.get("best", False)}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, with NaN for null; raises OSError, and ValueError for an incomplete line."""
    return [_parse(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _parse(line: str) -> dict[str, Any]:
    """Return a row; ValueError for a line that is none."""
    try:
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return _with_nan(row)
    except RecursionError:
        pass
    raise ValueError(f"{line!r:.80} is not a line of a run's log")


def _with_nan(row: dict[str, Any]) -> dict[str, Any]:
    filled = {key: math.nan if value is None else value for key, value in row.items()}
    return {key: _with_nan(value) if isinstance(value, dict) else value for key, value in filled.items()}


def _has_numbers(row: dict[str, Any]) -> bool:
    """Return whether the values that a resumed run shows again are numbers, as they are unless the file was damaged."""
    values = row.get("evaluation", {name: row.get(name) for name in ("loss", "grad_norm")})
    return isinstance(values, dict) and all(isinstance(value, int | float) for value in values.values())


def _remove_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the lines after `step` and the line that ended the run from the file; return the other lines."""
    kept: list[dict[str, Any]] = []
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file")
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            try:
                row = _parse(line)
            except ValueError:  # a line that a crash left incomplete
                continue
            if 0 < step >= row["step"] and "end" not in row and _has_numbers(row):
                kept.append(row)
        write_text(path, (to_json(row) + "\n" for row in kept))
    return kept


def check_log(settings: LogSettings) -> None:
    """Raise ConfigError for a logger that is unknown or not installed, and for log.profile_steps that are none."""
    check_loggers(settings.report_to)
    parse_profile_steps(settings.profile_steps)


def read_numbers(*values: Tensor | float) -> list[float]:
    """Return scalars as numbers on the host, which waits for the device once for all of them."""
    tensors = [value.detach() for value in values if isinstance(value, Tensor)]
    wide = torch.float32 if any(x.device.type == "mps" for x in tensors) else torch.float64  # MPS has no fp64
    on_host = iter(torch.stack([x.to(wide) for x in tensors]).tolist() if tensors else [])
    return [next(on_host) if isinstance(value, Tensor) else value for value in values]


def peak_memory_mb(device: torch.device) -> int:
    """Return the peak memory so far in MiB: allocated on the GPU, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def progress(is_shown: bool, total: int, what: str) -> Callable[[int], object]:
    """Return update(n) of a progress bar of `total` examples, which is shown on a terminal only."""
    bar = tqdm(total=total, desc=what, unit="ex", leave=False, disable=not (is_shown and sys.stderr.isatty()))
    update: Callable[[int], object] = bar.update
    return update


def has_ended(folder: Path) -> bool:
    """Return whether the last line of metrics.jsonl says that the run has ended."""
    with suppress(OSError):
        return b'"end": ' in (folder / "metrics.jsonl").read_bytes().rstrip().rpartition(b"\n")[2]
    return False
