"""What --help prints: one screen for each command, and the rest by topic.

    python -m engine.train --help                 the screen
    python -m engine.train --help optim           a section of settings, or one setting, such as optim.lr
    python -m engine.train --help tasks           the tasks; also recipes, and all
    python -m engine.train RECIPE --help optim    with the values of this recipe
    python -m engine.predict RUN --help           the settings that the task of this run reads

Lines are as long as the terminal is wide.
"""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from engine.commands import as_started
from engine.config import (
    DEFAULT_RECIPE,
    RECIPES,
    Config,
    ConfigError,
    all_settings,
    did_you_mean,
    get,
    read_recipe,
    sections,
    shipped_recipes,
)
from engine.config.command_line import HELP, describe_section, describe_setting
from engine.config.hf_names import HF_NAMES
from engine.config.schema import toml_value
from engine.run_folder import BEST, LAST, PREVIOUS
from engine.tasks import MULTI_TASK, TASKS
from engine.validate import unread_settings

NARROWEST, WIDEST = 40, 100
ONE_COLUMN = 64  # below this width, a meaning stands under its name
# The settings of the first page. {setting: (its value, or "" for that of the recipe; its meaning)}
COMMON = {
    "model.name": ("NAME", "pretrained model: a folder or a name on the hub"),
    "data.train": ("FILE", "training data; also --data.validation and .test"),
    "data.text_column": ("NAME", "column of the texts; also --data.label_column"),
    "data.max_length": ("", "longest input, in tokens"),
    "train.epochs": ("", "passes over the training data"),
    "train.global_batch_size": ("", "examples of one optimizer step"),
    "train.micro_batch_size": ("", "examples at a time on a device; auto: what fits"),
    "train.precision": ("", "bf16 is faster on a recent GPU"),
    "optim.lr": ("", "learning rate at its peak"),
    "eval.metric": ("NAME", "metric that chooses the best weights"),
    "run.folder": ("FOLDER", "where the checkpoints, logs and results go"),
}
COMMON_OF_RUNS = {  # the same for the commands that open a run
    "run.device": "auto, cpu, cuda or mps",
    "train.precision": "fp32, bf16 or fp16",
    "eval.batch_tokens": "largest number of tokens at a time",
    "data.text_column": "column of the texts",
    "data.label_column": "column of the labels",
    "data.bad_rows": "skip leaves out rows that cannot be used",
}
ROWS = {  # {task: what one row of its data has}
    "text-classification": "a text, or two (data.text_pair_column), and its label",
    "multi-label-classification": "a text, or two (data.text_pair_column), and all its labels",
    "text-regression": "a text, or two (data.text_pair_column), and a number",
    "token-classification": "a list of words and a list of tags, or a text with spans; .conll files are read too",
    "multiple-choice": "a context, a question, the choices, and which one is right",
    "masked-lm": "a text, to adapt an encoder to a domain; no labels",
    "span-corruption": "a text, to adapt a T5 to a domain; no labels",
    "sentence-embedding": "two texts that belong together; more columns may have texts that do not",
    "causal-lm": "a text to continue, for a decoder; no labels",
    "dialogue": "a list of messages, each with a role and a text; ShareGPT and Alpaca are read too",
    "summarization": "a text and its summary",
    "translation": "a source text and its translation",
    "question-answering": "a question, a context, and the answers as spans of it; SQuAD's JSON is read too",
    "relation-extraction": "a text with two marked entities, and their relation",
    "image-classification": "an image and its label; or a folder of images for each label",
    "multi-label-image-classification": "an image and all its labels",
}


def answer(
    argv: Sequence[str],
    usage: str,
    first_page: Sequence[str] = (),
    options: Mapping[str, str] | None = None,
) -> None:
    """Print the help of a command that reads a recipe, where `argv` asks for it, and raise SystemExit(0).

    first_page: paragraphs in place of the page of engine.train. options: {"name VALUE": meaning} of the command's own.
    Raises ConfigError for a topic that is none, and for a recipe that cannot be read.
    """
    if (topic := find_topic(argv)) is None:
        return
    before = argv[: _place(argv)]
    recipe = DEFAULT_RECIPE
    if before and not before[0].startswith("-") and before[0] not in TASKS:  # engine.new has a task there
        recipe = before[0]
    if topic in shipped_recipes() or topic.endswith(".toml"):
        recipe, topic = topic, ""
    width, values = terminal_width(), read_recipe(recipe)
    if not topic and not first_page and not options:
        show(recipe_page(usage, recipe, values, width))
    if not topic:
        show(own_page(usage, first_page, options or {}, width))
    show(topic_page(topic, list(all_settings(Config())), recipe, values, width))


def answer_for_run(
    argv: Sequence[str], usage: str, options: Mapping[str, str], keys: Sequence[str], more: Collection[str]
) -> None:
    """Print the help of a command that opens a run, where `argv` asks for it, and raise SystemExit(0).

    With a run it shows the settings that the task of this run reads, and their values there.

    keys: the settings that the command reads for some task; more: those that it reads whatever the task is.
    Raises ConfigError for a topic that is none, and for a run without a recipe.
    """
    if (topic := find_topic(argv)) is None:
        return
    width, before = terminal_width(), argv[: _place(argv)]
    name = before[0] if before and not before[0].startswith("-") else ""
    values, task = Config(), None
    if name:
        values = read_recipe(str(_find_recipe(name)))
        task = TASKS.get(values.run.task)
    unread = unread_settings(task) if task else set()
    keys = [key for key in keys if key in more or not {key, key.partition(".")[0]} & unread]
    if topic:
        show(topic_page(topic, keys, name, values, width))
    lines = wrap_usage(usage, width) + describe_options(options, width)
    if name:
        lines += wrap(f"Settings that this run ({values.run.task}) reads, with its values:", width)
        lines += two_columns({f"--{key} {toml_value(get(values, key))}": brief(key) for key in keys}, width)
    else:
        lines += wrap("Settings are as in the recipe of RUN, unless they are given. Those given most:", width)
        lines += two_columns({f"--{key}": text for key, text in COMMON_OF_RUNS.items() if key in keys}, width)
    topics = "More: --help data, or another section or setting; --help all"
    show(lines + wrap(f"{topics}." if name else f"{topics}; RUN --help: all that the task of RUN reads.", width))


def _find_recipe(name: str) -> Path:
    """Return the recipe of a run folder or checkpoint folder; ConfigError where there is none."""
    found = [path for part in ("", BEST, LAST, PREVIOUS) if (path := Path(name) / part / "recipe.toml").is_file()]
    if not found:
        raise ConfigError(f"{name!r} is not a run folder: it has no {BEST}/recipe.toml")
    return found[0]


def brief(key: str) -> str:
    """Return the meaning of a setting without its details."""
    meaning: str = all_settings(Config())[key].metadata["doc"]
    return re.sub(r" \([^)]*\)", "", meaning.partition("; ")[0])


def find_topic(argv: Sequence[str]) -> str | None:
    """Return the topic that --help is asked for, "" where it has none; None where `argv` does not ask for help."""
    place = _place(argv)
    if place == len(argv):
        return None
    _, equals, topic = argv[place].partition("=")
    following = argv[place + 1] if place + 1 < len(argv) else ""
    if not equals and (not following.startswith("-") or "." in following):
        topic = following
    topic = topic.strip("-[]")
    return topic if topic.endswith(".toml") else topic.partition("=")[0].replace("-", "_")


def _place(argv: Sequence[str]) -> int:
    """Return the place of --help among the arguments; their number where it is none of them."""
    if argv and argv[0] == "help" and not os.path.exists("help"):
        return 0
    return next((i for i, argument in enumerate(argv) if argument.partition("=")[0] in HELP), len(argv))


def terminal_width() -> int:
    """Return the columns of the terminal, within limits; 80 where the output is no terminal."""
    return min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)


def show(lines: Sequence[str]) -> NoReturn:
    """Print a page, on the first rank of a run, and raise SystemExit(0)."""
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines), flush=True)
    raise SystemExit(0)


def wrap(text: str, width: int, indent: str = "", hanging: str | None = None) -> list[str]:
    """Return a text as lines of at most `width` columns. hanging: the indent of all lines but the first."""
    hanging = indent if hanging is None else hanging
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=hanging, break_on_hyphens=False)


def wrap_usage(usage: str, width: int) -> list[str]:
    """Return a usage line as lines, broken between its [options]."""
    glued = re.sub(r"\[[^]]{1,34}\]", lambda found: found[0].replace(" ", "\0"), as_started(usage))
    return [line.replace("\0", " ") for line in wrap(glued, width, hanging="    ")]


def two_columns(rows: Mapping[str, str], width: int) -> list[str]:
    """Return names and their meanings side by side, or one under the other where the terminal is narrow."""
    left = max(map(len, rows), default=0) + 4
    if width < ONE_COLUMN or left > width // 2:
        return [line for name, text in rows.items() for line in (f"  {name}", *wrap(text, width, " " * 6))]
    return [
        line for name, text in rows.items() for line in wrap(text, width, f"  {name}".ljust(left), hanging=" " * left)
    ]


def describe_options(options: Mapping[str, str], width: int) -> list[str]:
    """Return lines with the own options of a command. options: {"name VALUE": meaning}."""
    return two_columns({f"--{name}": text for name, text in options.items()}, width)


def recipe_page(usage: str, recipe: str, values: Config, width: int) -> list[str]:
    """Return the first page of engine.train: the recipes, the settings that are changed most, and the topics."""
    lines = wrap_usage(usage, width)
    lines += wrap(f"RECIPE: a TOML file of settings, or one of these (without it {DEFAULT_RECIPE}):", width)
    lines += wrap(" ".join(shipped_recipes()), width, "  ")
    lines += wrap(f"The settings that are changed most, with the values of {recipe}:", width)
    shown = {f"--{key} {name or get(values, key)}": text for key, (name, text) in COMMON.items()}
    lines += two_columns(shown, width)
    module = usage.partition(" ")[2].partition(" [")[0]  # -m engine.train, or a loop of the user's own
    for line in (
        "--resume continues a run; --dry-run [--show-all] shows data, trains nothing.",
        "More: --help SECTION, such as optim, data or model.lora; --help tasks; --help "
        f"recipes; --help all. On 4 GPUs: torchrun --nproc-per-node 4 {module} ...",
    ):
        lines += wrap(line, width)
    return lines


def own_page(usage: str, paragraphs: Sequence[str], options: Mapping[str, str], width: int) -> list[str]:
    """Return the first page of a command with options of its own."""
    lines = wrap_usage(usage, width)
    for paragraph in paragraphs:
        lines += wrap(as_started(paragraph), width)
    return (
        lines
        + describe_options(options, width)
        + wrap(
            "Settings of the recipe, as --section.key=value: --help optim, or any other section; --help tasks; "
            "--help recipes; --help all.",
            width,
        )
    )


def topic_page(topic: str, keys: Collection[str], recipe: str, values: Config, width: int) -> list[str]:
    """Return the page of a topic: a section or a setting of `keys`, tasks, recipes, or all.

    values: those of `recipe`. Raises ConfigError for a topic that is none.
    """
    own_sections = [name for name in sections(Config()) if any(key.rpartition(".")[0] == name for key in keys)]
    named = [name for name in [*own_sections, *keys] if topic in (name, name.rpartition(".")[2])]
    if topic in ("tasks", "task"):
        return tasks_page(width)
    if topic in ("recipes", "recipe"):
        return recipes_page(width)
    if topic == "all":
        lines = wrap(
            "Every setting can be given as --section.key=value or --section.key value. A list has commas, or is one of "
            'TOML where a comma belongs to an item: --data.labels=\'["a, b", "c"]\'. A setting marked * changes the '
            "speed or the output of a run, not its result; it may differ on resume.",
            width,
        )
        for name in own_sections:
            lines += ["", *describe_section(name, keys, values, recipe, width)]
        return lines
    if topic not in named:  # lora, lr, or a name of Hugging Face
        ours = HF_NAMES.get(topic, ("", ""))[0]
        if len(named) == 1:
            topic = named[0]
        elif ours in keys:
            topic = ours
    if topic in keys:
        return describe_setting(topic, values, recipe, width)
    inside = [name for name in own_sections if name.startswith(f"{topic}.")]
    if topic in own_sections:
        lines = describe_section(topic, keys, values, recipe, width)
        return lines + (wrap(f"More: --help {', --help '.join(inside)}", width) if inside else [])
    if inside:  # a section of sections, such as augment
        return [line for name in inside for line in describe_section(name, keys, values, recipe, width)]
    topics = ["tasks", "recipes", "all", *own_sections]
    is_known = topic in all_settings(Config()) or topic in sections(Config())
    why = "this command does not read it" if is_known else "there is no such topic"
    hint = did_you_mean(topic, [*topics, *keys] if "." in topic else topics)
    listed = f"{', '.join(topics)}, or a setting"
    choices = f"{hint} All topics: {listed}" if hint else f"; choose from {listed}"
    raise ConfigError(f"--help {topic}: {why}{choices}")


def tasks_page(width: int) -> list[str]:
    """Return every task with what a row has, the usual columns, and the shipped recipes."""
    lines = wrap("run.task is one of these. A row of the data has", width)
    recipes = recipes_of_tasks()
    for name, task in TASKS.items():
        columns = [x for x in (task.columns.text, task.columns.text_pair, task.columns.label) if x]
        lines += wrap(f"{name}: {ROWS[name]}", width, "  ", "      ")
        lines += wrap(f"columns {', '.join(columns)}; recipe {', '.join(recipes[name])}", width, " " * 6)
    lines += wrap(f"{MULTI_TASK}: several of these with one backbone", width, "  ", "      ")
    lines += wrap(f"recipe {', '.join(recipes[MULTI_TASK])}", width, " " * 6)
    return lines + wrap(
        "Other names of columns: --data.text_column, --data.text_pair_column, --data.label_column. A recipe for your "
        "own data: python -m engine.new TASK --data FILE",
        width,
    )


def recipes_of_tasks() -> dict[str, list[str]]:
    """Return {task: the names of its shipped recipes}."""
    found: dict[str, list[str]] = {name: [] for name in (*TASKS, MULTI_TASK)}
    for name in shipped_recipes():
        found[read_recipe(name).run.task].append(name)
    return found


def recipes_page(width: int) -> list[str]:
    """Return every shipped recipe with the first sentence of its file."""
    lines = wrap("Shipped recipes, in engine/recipes; --help NAME shows the first page with its values:", width)
    for name in shipped_recipes():
        lines += wrap(f"{name}: {first_sentence(name)}", width, "  ", "      ")
    return lines


def first_sentence(recipe: str) -> str:
    """Return what a shipped recipe does: the first comment of its file, up to its first full stop."""
    text = (RECIPES / f"{recipe}.toml").read_text(encoding="utf-8")
    comment = re.split(r"\n# \w+: |\n(?!#)", text)[0].replace("\n#", "").removeprefix("# ")
    return re.split(r"\.(?:\s|$)", comment)[0]
