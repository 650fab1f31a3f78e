"""Loggers of other projects beside metrics.jsonl (log.report_to): TensorBoard, Weights & Biases, MLflow, SwanLab.

Each gets the settings of the run, and the numbers of every line of metrics.jsonl as "family/name" with their step.
Its own environment variables say where it writes: WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, SWANLAB_MODE and so
on. To add one, write a function that opens it, and name it in LOGGERS by the package that it imports.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from data.writing import write_text
from engine.config import ConfigError, choose_from

IDS = "loggers.json"  # in the run folder: {logger: the id of the run there}
PARAMETERS_AT_ONCE, LONGEST_PARAMETER = 100, 500  # of MLflow
MLFLOW_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"  # of a request to its server


class RunFacts(NamedTuple):
    """What a logger knows of a run when it is opened."""

    folder: Path
    id: str  # of the run in the logger; "": a new run
    start: int  # the step from which it continues; 0: it is new
    settings: dict[str, Any]


class Logger(NamedTuple):
    """An open logger. id: by which it continues the run; "": it needs none."""

    id: str
    log: Callable[[dict[str, float], int], object]  # numbers and their step
    close: Callable[[bool], object]  # whether the run has ended, which it has not when a signal stopped it


def open_tensorboard(run: RunFacts) -> Logger:
    """Write event files to RUN/tensorboard; those of later steps than `start` are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.start + 1)
    if not run.start:
        writer.add_text("settings", "\n".join(f"    {key} = {value!r}" for key, value in run.settings.items()), 0)

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return Logger("", log, lambda _: writer.close())


def open_wandb(run: RunFacts) -> Logger:
    """Start or continue a run of Weights & Biases, whose files are in RUN/wandb.

    Of a step that a resumed run takes again, it keeps the first numbers, which are the same.
    """
    import wandb

    own = wandb.init(
        id=run.id or uuid.uuid4().hex[:16],
        name=str(run.folder),
        dir=str(run.folder),
        config=run.settings,
        resume="allow",
        allow_val_change=True,
        settings=wandb.Settings(console="off", silent=True),
    )
    return Logger(own.id, lambda numbers, step: own.log(numbers, step=step), lambda ended: own.finish(int(not ended)))


def open_mlflow(run: RunFacts) -> Logger:
    """Start or continue a run of MLflow at MLFLOW_TRACKING_URI, by default mlflow.db in the current folder."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # two lines on the tables of a new data base
    os.environ.setdefault(MLFLOW_RETRIES, "2")  # by default 7, for which a step would wait 4 minutes
    import mlflow
    from mlflow.entities import Metric, Param

    client = mlflow.MlflowClient()
    if run.id:
        client.update_run(run.id, status="RUNNING")
    else:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        known = client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else client.create_experiment(experiment)
        run = run._replace(id=client.create_run(number, run_name=str(run.folder)).info.run_id)
        params = [Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in run.settings.items() if value != ""]
        for i in range(0, len(params), PARAMETERS_AT_ONCE):
            client.log_batch(run.id, params=params[i : i + PARAMETERS_AT_ONCE])
    logged: dict[str, int] = {}  # {name: its last step there}, since MLflow keeps a number that is logged twice

    def log(numbers: dict[str, float], step: int) -> None:
        for name in numbers.keys() - logged.keys() if run.start else ():
            logged[name] = max((metric.step for metric in client.get_metric_history(run.id, name)), default=-1)
        now = int(1000 * time.time())
        new = [Metric(name, value, now, step) for name, value in numbers.items() if logged.get(name, -1) < step]
        client.log_batch(run.id, metrics=new)

    return Logger(run.id, log, lambda ended: client.set_terminated(run.id, "FINISHED" if ended else "KILLED"))


def open_swanlab(run: RunFacts) -> Logger:
    """Start or continue an experiment of SwanLab, whose files are in RUN/swanlab."""
    import swanlab

    own = swanlab.init(
        id=run.id or uuid.uuid4().hex[:16],
        name=str(run.folder),
        log_dir=str(run.folder / "swanlab"),
        config={key: list(value) if isinstance(value, tuple) else value for key, value in run.settings.items()},
        resume="allow",
    )
    return Logger(str(own.id), lambda numbers, step: swanlab.log(numbers, step=step), lambda _: swanlab.finish())


LOGGERS: dict[str, Callable[[RunFacts], Logger]] = {
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
    "mlflow": open_mlflow,
    "swanlab": open_swanlab,
}


def check_loggers(names: Sequence[str]) -> None:
    """Raise ConfigError for a logger that is unknown or not installed. It imports none, so that it can come first."""
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"log.report_to = {list(names)}: {choose_from(name, LOGGERS)}; or leave it empty")
        spec = importlib.util.find_spec(name)
        if list(names).count(name) > 1:
            raise ConfigError(f"log.report_to = {list(names)}: name {name} once")
        if spec is None or spec.origin is None:  # a folder ./wandb of a run is found as a package without a file
            raise ConfigError(_not_installed(name))


def _not_installed(name: str) -> str:
    return f"log.report_to = {name} needs the {name} package: pip install {name}"


class Loggers:
    """The open loggers of a run, on rank 0. One that fails in training is left out from then on, and the run goes on.

    say: prints a line. Raises ConfigError where a logger of a new run cannot be opened. A resumed run goes on without.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, start: int, settings: Mapping[str, Any], say: Callable[[str], object]
    ):
        self.open: dict[str, Logger] = {}
        self.say = say
        ids = _read_ids(folder / IDS) if start else {}
        for name in names:
            run = RunFacts(folder, ids.get(name, ""), start, dict(settings))
            try:
                self.open[name] = LOGGERS[name](run)
            except ImportError as error:
                raise ConfigError(f"{_not_installed(name)} ({error})") from None
            except Exception as error:  # each has errors of its own
                if not start:
                    raise ConfigError(f"log.report_to = {name}: it cannot be opened: {_one_line(error)}") from None
                self._leave_out(name, error)
        ids |= {name: logger.id for name, logger in self.open.items() if logger.id}
        if ids or (folder / IDS).exists():
            _write_ids(folder / IDS, ids)
        if self.open:
            atexit.register(self.close, False)

    def log(self, family: str, numbers: Mapping[str, float], step: int) -> None:
        """Pass numbers on to all loggers."""
        named = {f"{family}/{name}": float(value) for name, value in numbers.items()}
        for name in [*self.open]:
            self._try(name, self.open[name].log, named, step)

    def close(self, ended: bool) -> None:
        """Close all loggers. ended: whether the run has; if not, a resume continues it."""
        atexit.unregister(self.close)
        for name in [*self.open]:
            self._try(name, self.open[name].close, ended)
        self.open = {}

    def _try(self, name: str, function: Callable[..., object], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:  # a full disk, a lost connection, or a bug of the logger
            self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        self.open.pop(name, None)
        self.say(
            f"warning: {name} (log.report_to) has failed: {_one_line(error)}; the run goes on without it, and "
            "metrics.jsonl has all numbers"
        )


def _one_line(error: Exception) -> str:
    """Return an error of another project in one line, cut if it is long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{'; '.join(lines):.300}" if lines else type(error).__name__


def _read_ids(path: Path) -> dict[str, str]:
    """Return the ids of a run in its loggers; {} where the file is missing or damaged, which begins new runs there."""
    with suppress(OSError, ValueError):
        ids = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(ids, dict):
            return {name: value for name, value in ids.items() if isinstance(value, str)}
    return {}


def _write_ids(path: Path, ids: dict[str, str]) -> None:
    with suppress(OSError):  # a resume then begins a new run in the loggers
        write_text(path, [json.dumps(ids), "\n"])
