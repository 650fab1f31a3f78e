"""Train, evaluate, predict and embed from Python, on rows in memory.

    import engine
    from data import Row

    rows = [Row(text="A fine film.", label="good"), Row(text="Dull, dull, dull.", label="bad"), ...]
    engine.run_training("my_recipe.toml", train_rows=rows, **{"run.folder": "runs/mine", "train.epochs": 2})
    engine.evaluate_rows("runs/mine", rows)                      # {"accuracy": ..., ...}
    engine.predict_rows("runs/mine", ["A fine film.", "Dull."])  # [{"id": "1", "label": "good", ...}, ...]
    engine.embed_rows("runs/mine", ["A fine film.", "Dull."])    # (2, D): their vectors
    engine.write_recipe("text-classification", "mine.csv")       # a commented recipe for a file: my_recipe.toml
    engine.write_report("runs/mine")                             # runs/mine/report.html

Overrides are settings by their dotted names, `**{"optim.lr": 1e-4}`, or with two underscores, `optim__lr=1e-4`.
Everything works in a notebook, and any number of times in one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data import Examples, Row, Rows
from data.formats.memory import as_list, in_memory, is_in_memory
from engine import checkpoint, cli, distributed, heartbeat, plugins, validate
from engine.config import DEFAULT_RECIPE, Config, ConfigError, DataSettings, check, override_recipe, read_recipe
from engine.embeddings import as_matrix, embedding_task, load_embedder, open_embedder, print_notes
from engine.evaluate import evaluate, make_context, open_trained, predict, start
from engine.evaluation_batches import EvaluationContext
from engine.predict import with_left_out
from engine.tasks import find_task, read_file
from models import TaskModel


def run_training(
    config: Config | str | Path = DEFAULT_RECIPE,
    train_rows: Iterable[Any] | None = None,
    validation_rows: Iterable[Any] | None = None,
    test_rows: Iterable[Any] | None = None,
    **overrides: Any,
) -> dict[str, float]:
    """Run a recipe in this process as `python -m engine.train` does; return its final metrics.

    config: a Config, a recipe's file, or the name of a shipped recipe. The rows replace data.train, data.validation
    and data.test; each is a Row or a dict of the columns that a file would have. With train_rows, a validation or test
    file of the recipe itself is not used; an override names one that is.
    Raises ConfigError, DataError, ModelError or TrainingError with one sentence; KeyboardInterrupt after Ctrl-C, once
    the checkpoint is written (run.resume="yes" continues the run).
    """
    from engine import train  # imported here, because only this function runs the loop

    given = {"train_rows": train_rows, "validation_rows": validation_rows, "test_rows": test_rows}
    with in_memory(**{name: rows for name, rows in given.items() if rows is not None}) as sources:
        # The recipe's validation and test files belong to the recipe's training file, not to these rows.
        files = dict.fromkeys(("data.validation", "data.test"), "") if train_rows is not None else {}
        files |= {f"data.{name.removesuffix('_rows')}": source for name, source in sources.items()}
        if not isinstance(config, Config | str | Path):
            raise ConfigError(f"{config!r:.80} is not a recipe: give a Config, the file of a recipe, or its name")
        base = config if isinstance(config, Config) else read_recipe(str(config))
        cfg = override_recipe(base, files | _with_dotted_keys(overrides))
        plugins.load_plugins(cfg.run.plugins)
        check(cfg)
        ranks = distributed.setup(cfg.run.device, cfg.distributed.timeout_seconds)
        stop = cli.StopRequest()
        try:
            with checkpoint.claim(cfg, ranks) as resumed, _no_files_needed(cfg):
                result = train.train(cfg, ranks, stop, resumed)
        finally:  # the caller's signal handlers, however the run has ended
            stop.restore_handlers()
            heartbeat.end()
    if result is None:
        raise KeyboardInterrupt(f"stopped by signal {stop.signal}; run.resume = 'yes' continues the run")
    return result


def evaluate_rows(run: str | Path, rows: Iterable[Any], **overrides: Any) -> dict[str, float]:
    """Return the metrics of a trained model on labelled rows, each a Row or a dict of a file's columns.

    Rows without a text are not evaluated; the result then has their number as "left_out".
    run: a run folder, whose best/ is used, or a checkpoint folder. overrides: settings that a trained model reads.
    """
    folder = checkpoint.open_run(str(run))
    config = cli.configure(folder, _with_dotted_keys(overrides))
    with in_memory(rows=rows) as sources:
        model, examples, context, read = _open_rows(folder, config, sources["rows"], labelled=True)
        return evaluate(model, examples, context) | ({"left_out": len(read.left_out)} if read.left_out else {})


def predict_rows(run: str | Path, rows: Iterable[Any], **overrides: Any) -> list[dict[str, Any]]:
    """Return what engine.predict writes for each row, as dicts in the order of the rows.

    A row is what the task reads:

    - a string (a text), or a tuple of two strings (two texts, or a question and its context);
    - a list (tokens, or the turns of a conversation);
    - an image (Pillow, a uint8 array, a Path or the bytes of a file);
    - a dict or Row with the columns that a file would have.

    Ids are those of the rows' id column, else numbers from 1. Other arguments as for evaluate_rows.
    """
    folder = checkpoint.open_run(str(run))
    config = cli.configure(folder, _with_dotted_keys(overrides))
    task, _ = find_task(config.run.task)
    columns = validate.task_settings(config, task).data
    with in_memory(rows=[_to_columns(row, columns) for row in as_list("rows", rows)]) as sources:
        model, examples, context, rows = _open_rows(folder, config, sources["rows"], labelled=False)
        return with_left_out(predict(model, examples, context), rows, context.task)


def embed_rows(model: str | Path, rows: Iterable[Any], **overrides: Any) -> Any:
    """Return the vectors that engine.predict --embeddings writes, (N, D) fp32; NaN for a row without a text.

    model: a run folder, a checkpoint folder, or a published model (package:NAME/FOLDER, or a name of the hub). Rows as
    for predict_rows; overrides: settings that embeddings read, such as model__pooling="mean".
    """
    folder, config, similarity, notes = open_embedder(str(model), _with_dotted_keys(overrides))
    columns = validate.task_settings(config, find_task(config.run.task)[0]).data
    rows = as_list("rows", rows)
    for row in rows:
        if isinstance(row, tuple):
            raise ConfigError(f"the row {row!r:.200} is a pair, and a vector is of one text: give each as a row")
    given = [_to_columns(row, columns) for row in rows]
    print_notes(notes)
    with in_memory(rows=given) as sources, _no_files_needed(config):
        config, task, settings, ranks = start(config)
        task = embedding_task(task, similarity, as_text=False)
        read = read_file(task, sources["rows"], settings, False)
        loaded, processor = load_embedder(folder, config, task)
        examples = task.encoder(processor, settings, loaded.labels)(read, False)
        validate.check_encoded(config, loaded, examples)
        predictions = with_left_out(predict(loaded, examples, make_context(loaded, config, task, ranks)), read, task)
    return as_matrix(predictions)


def write_recipe(
    task: str, data: str | Path, output: str | Path = "my_recipe.toml", force: bool = False, **overrides: Any
) -> Path:
    """Write a recipe for a file of one's own as `python -m engine.new` does, and return its path.

    data: a file, or a folder or .tar of images. force: overwrite a recipe that exists. overrides: settings that are
    written as given, such as model__name. What was guessed is printed. Raises ConfigError, DataError or ModelError.
    """
    from engine import new  # imported here, because only this function writes one

    given = [f"--{key}={_as_argument(value)}" for key, value in _with_dotted_keys(overrides).items()]
    new.main([task, f"--data={data}", f"--output={output}", *given, *(["--force"] if force else [])])
    return Path(output)


def write_report(*runs: str | Path, output: str | Path = "", predict: bool = True, **overrides: Any) -> Path:
    """Write the page of one or several run folders as `python -m engine.report` does, and return its path.

    output: a name that ends with .html; default: report.html in the folder of the first run. predict: add what the best
    weights predict for the validation rows. overrides: settings that a trained model reads. The table of the runs is
    printed. Raises ConfigError, DataError or ModelError.
    """
    from engine.report import PAGE  # imported here, because only this function writes one
    from engine.report.__main__ import main
    from engine.report.runs import open_runs

    names = list(map(str, runs))
    given = [f"--{key}={_as_argument(value)}" for key, value in _with_dotted_keys(overrides).items()]
    given += [f"--output={output}"] if output else []
    main([*names, *given, *([] if predict else ["--no-predict"])])
    return Path(output) if output else open_runs(names)[0].folder / PAGE


def _as_argument(value: Any) -> str:
    """Return a value of a setting as a command line has it."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _open_rows(
    folder: Path, config: Config, source: str, labelled: bool
) -> tuple[TaskModel, Examples, EvaluationContext, Rows]:
    """Open a trained model and rows in memory."""
    with _no_files_needed(config):
        return open_trained(folder, config, source, labelled)


@contextmanager
def _no_files_needed(config: Config) -> Iterator[None]:
    """Raise ConfigError where a task's own reader looks for a file with the name of rows in memory."""
    try:
        yield
    except FileNotFoundError as error:
        if not is_in_memory(str(error.filename)):
            raise
        raise ConfigError(f"{config.run.task} reads files in a format of its own, not rows in memory") from None


def _with_dotted_keys(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides with each "section__key" written "section.key"."""
    return {key.replace("__", "."): value for key, value in overrides.items()}


def _to_columns(row: Any, data: DataSettings) -> Row | dict[str, Any]:
    """Return a row as the columns of a file; ConfigError for a pair where the task reads one text."""
    if isinstance(row, Row | dict):
        return row
    if isinstance(row, tuple) and len(row) == 2:
        if not data.text_pair_column:
            raise ConfigError(
                f"the row {row!r} is a pair, and this model reads one text a row; "
                "name data.text_pair_column if it reads two"
            )
        return {data.text_column: row[0], data.text_pair_column: row[1]}
    return {data.text_column: row}
