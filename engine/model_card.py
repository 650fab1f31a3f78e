"""The model card: README.md in best/, which the hub shows. The training writes it at its end.

It says what the model is, which data and recipe made it, what it reaches, what its limits are and how to load it. It
is not in the manifest of the checkpoint, so that its author may edit it. Its front matter is YAML, of which JSON is a
part.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
from data import Examples
from data.multi_task import MultiTaskExamples
from data.writing import to_json, write_text
from engine.config import Config, override, to_dict, to_recipe
from engine.config.schema import toml_value
from engine.errors import TrainingError
from engine.multi_task import open_task
from engine.summary import describe_examples, view_tasks
from engine.tasks.multi_task import MULTI_TASK, MultiTask
from models import TaskModel
from models.multi_task import each_task, one_task

CARD = "README.md"
TAG = "finetune-engine"
# The hub's names of tasks, by the head; others have none.
PIPELINES = {
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "image-classification": "image-classification",
    "distilled-image-classification": "image-classification",
    "masked-lm": "fill-mask",
    "causal-lm": "text-generation",
    "seq2seq-lm": "text2text-generation",
    "sentence-embedding": "sentence-similarity",
    "multiple-choice": "multiple-choice",
}
MAX_LABELS = 50
INTERVAL_ENDS = ("_low", "_high")


@dataclass(frozen=True)
class Facts:
    """What a card says, beside the recipe.

    base: the folder of the pretrained checkpoint. evaluation: the metrics of the best weights on the validation data.
    result: those of the end of the run, with test metrics. Both may have NAME_low and NAME_high, ends of an interval.
    """

    base: Path
    evaluation: Mapping[str, float]
    result: Mapping[str, float]

    def of_task(self, name: str) -> Facts:
        """Return those of one of several tasks, whose metrics are TASK/NAME and test_TASK/NAME."""
        own, test = f"{name}/", f"test_{name}/"
        evaluation = {key.removeprefix(own): x for key, x in self.evaluation.items() if key.startswith(own)}
        result = {f"test_{key.removeprefix(test)}": x for key, x in self.result.items() if key.startswith(test)}
        return Facts(self.base, evaluation, result | {"best_step": self.result["best_step"]})


def write_card(
    folder: Path,
    config: Config,
    model: TaskModel,
    sets: Sequence[Examples],
    base: Path,
    result: Mapping[str, float],
) -> str:
    """Write the card of a run into its best/; return what is to be said, "" for nothing; TrainingError where it fails.

    A card that is there already is kept, since its author may have edited it: a finished run was resumed. Without best
    weights there is no card.
    sets: the training, validation and test data. base: the folder of the pretrained checkpoint.
    """
    if not folder.is_dir():
        return ""
    if (folder / CARD).is_file():
        return f"{folder / CARD} is kept as it is; without it, it is written again"
    evaluation = read_evaluation(folder.parent / "metrics.jsonl", int(result["best_step"]))
    facts = Facts(base, evaluation, result)
    texts = {folder / CARD: model_card(config, model, sets, facts)}
    for name, own in each_task(model).items():
        parts = [examples.parts[name] for examples in sets if isinstance(examples, MultiTaskExamples)]
        part = override(tasks_of(config)[name], {"run.folder": f"{config.run.folder}-{name}"})
        texts[Path(f"{folder}-{name}") / CARD] = model_card(part, own, parts, facts.of_task(name))
    for path, text in texts.items():
        try:
            write_text(path, [text])
        except OSError as error:
            raise TrainingError(f"{path} could not be written: {error.strerror}; the run is complete") from None
    return ""


def read_evaluation(path: Path, step: int) -> dict[str, float]:
    """Return the metrics of the evaluation at a step, with the ends of their intervals; {} where there is none."""
    found: dict[str, float] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        row = json.loads(line)
        if "evaluation" in row and row["step"] == step:
            found = {name: value for name, value in row["evaluation"].items() if value is not None}
            for name, ends in row.get("intervals", {}).items():
                found |= {f"{name}{end}": value for end, value in zip(INTERVAL_ENDS, ends, strict=True)}
    return found


def model_card(config: Config, model: TaskModel, sets: Sequence[Examples], facts: Facts) -> str:
    """Return the text of a card; equal for equal runs, with no dates and no folders of this machine."""
    title = f"{run_name(config)}: {model.spec.architecture.weights.model_type} for {config.run.task}"
    parts = [
        "---",
        *(f"{key}: {to_json(value, ensure_ascii=False)}" for key, value in front_matter(config, model, facts).items()),
        "---",
        f"\n# {escaped(title)}\n",
        f"A model trained from {describe_base(facts.base, config)}\n",
        "## Data\n",
        *_describe_data(config, model, sets),
        "\n## Metrics\n",
        *metric_table(facts, config.eval.confidence),
        "\n## Limits\n",
        *(f"- {line}" for line in limits(config, model)),
        "\n## How to load it\n",
        *how_to_load(config, model),
        "\n## Recipe\n",
        "`recipe.toml` has all settings; these differ from their defaults:\n",
        *("```toml", *changed_settings(without_folders(config)), "```"),
    ]
    return "\n".join(parts) + "\n"


def front_matter(config: Config, model: TaskModel, facts: Facts) -> dict[str, Any]:
    """Return the metadata that the hub reads."""
    pipeline = PIPELINES.get(model.head_name or "")
    reads_images = model.embedding is None
    dataset = {"type": "imagefolder" if reads_images else "text", "name": Path(config.data.train).name or "rows"}
    values = facts.evaluation or {
        name: value for name, value in facts.result.items() if name.startswith("best_") and name != "best_step"
    }
    metrics = [
        {"type": name, "name": name, "value": round(value, 6)}
        for name, value in values.items()
        if not name.endswith(INTERVAL_ENDS) and value == value
    ]
    found: dict[str, Any] = {"tags": [TAG, config.run.task]}
    if models.explain_export(model) == "" and config.run.task != MULTI_TASK:
        is_embedding = model.head_name == "sentence-embedding"
        found["library_name"] = "sentence-transformers" if is_embedding else "transformers"
    found |= {"pipeline_tag": pipeline} if pipeline else {}
    hub_name, license_name = models.hub.snapshot_name(facts.base), license_of(facts.base)
    found |= {"base_model": hub_name} if hub_name else {}
    found |= {"license": license_name} if license_name else {}
    task = {"type": pipeline or config.run.task, "name": config.run.task}
    results = {"task": task, "dataset": dataset | {"split": "validation"}, "metrics": metrics}
    if metrics:
        found["model-index"] = [{"name": run_name(config), "results": [results]}]
    return found


def run_name(config: Config) -> str:
    """Return the name of the run folder, which may be given as "." too."""
    return os.path.basename(os.path.abspath(config.run.folder)) or "run"


def one_line(text: str) -> str:
    """Return a text with a space for each line break or other space."""
    return " ".join(text.split())


def escaped(text: str) -> str:
    """Return a text in one line, in which nothing is Markdown or HTML; "_" within a word is none."""
    return re.sub(r"([\\`*<|\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", one_line(text))


def as_code(text: str) -> str:
    """Return a text in one line as code of Markdown, which may have backticks."""
    ticks = "`" * (max((len(found) for found in re.findall("`+", text)), default=0) + 1)
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{ticks}{space}{one_line(text)}{space}{ticks}"


def license_of(folder: Path) -> str:
    """Return the licence that the card of a pretrained checkpoint names in its front matter; "" where none does."""
    try:
        lines = (folder / CARD).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    if not lines or lines[0].strip() != "---":
        return ""
    for line in lines[1:]:
        key, _, value = line.partition(":")
        if key.strip() == "---":
            return ""
        if key == "license":
            return value.strip().strip("'\"")
    return ""


def describe_base(folder: Path, config: Config) -> str:
    """Return the name of the pretrained checkpoint, and its licence if that is known."""
    name = models.hub.snapshot_name(folder) or config.model.name
    is_folder = os.path.isabs(name) or (name.count("/") > 1 and not name.startswith("package:"))
    shown = as_code(Path(name).name if is_folder else name)
    if config.model.init == "scratch":
        return f"random weights in the shape of {shown}."
    license_name = license_of(folder)
    return f"{shown}, whose licence is {license_name or 'not known here and applies too'}."


def _describe_data(config: Config, model: TaskModel, sets: Sequence[Examples]) -> list[str]:
    task, watched = open_task(config)
    files = (config.data.train, config.data.validation, config.data.test)
    lines = []
    for view in view_tasks(task, watched, tuple(sets), model.labels):
        for name, examples, file in zip(("training", "validation", "test"), view.sets, files, strict=True):
            if len(examples):
                labels = tuple(map(one_line, view.labels))
                first, *more = describe_examples(f"{view.prefix}{name}", examples, labels).split("\n")
                of_file = f", of {as_code(Path(file).name)}" if file else ""
                lines += [f"- {escaped(first)}{of_file}", *(f"  - {escaped(x)}" for x in more)]
    return lines


def metric_table(facts: Facts, confidence: float) -> list[str]:
    """Return a table of the validation and the test metrics, with their intervals where there are some."""
    test = {name.removeprefix("test_"): value for name, value in facts.result.items() if name.startswith("test_")}
    columns = {"validation": facts.evaluation, "test": test}
    columns = {name: values for name, values in columns.items() if values}
    names = [name for name in {**facts.evaluation, **test} if not name.endswith(INTERVAL_ENDS)]
    interval = f" In parentheses: the interval of {confidence:.0%} confidence." if confidence else ""
    lines = [f"Of the best weights, those of step {int(facts.result['best_step']):,}.{interval}\n"]
    lines += [f"| metric | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name in names:
        lines.append(f"| {escaped(name)} | {' | '.join(_value(values, name) for values in columns.values())} |")
    return lines


def _value(values: Mapping[str, float], name: str) -> str:
    """Return a metric as text, with its interval if it has one."""
    if name not in values:
        return ""
    low, high = (values.get(name + end) for end in INTERVAL_ENDS)
    interval = "" if low is None or high is None else f" ({low:.4g} to {high:.4g})"
    return f"{values[name]:.4g}{interval}"


def limits(config: Config, model: TaskModel) -> list[str]:
    """Return sentences on what the model cannot do, as far as the run knows."""
    lines = ["It was evaluated on the data above only; on other texts, topics or times it may be worse."]
    for name, part in tasks_of(config).items():
        longest = part.data.max_length
        phrases = {"truncate": "are truncated", "head+tail": "are read without their middle"}
        rest = phrases.get(part.data.long_texts, "are read in windows, whose logits are averaged")
        if model.embedding is not None:
            found = f"Texts of more than {longest:,} tokens {rest}." if longest else "Texts are read as a whole."
            lines.append(f"{escaped(name)}: {found}" if name else found)
    if model.labels and len(model.labels) <= MAX_LABELS:
        lines.append(f"It knows these labels and no other: {', '.join(map(as_code, model.labels))}.")
    if problem := models.explain_export(model):
        lines.append(f"{problem[0].upper()}{problem[1:]}.")
    return lines


def how_to_load(config: Config, model: TaskModel) -> list[str]:
    """Return the code that loads the model, by transformers where that gives the same logits."""
    ours = f'import models\n\nmodel = models.from_pretrained("FOLDER", head="{model.head_name}").eval()'
    own = f", run__plugins={to_json([*config.run.plugins], ensure_ascii=False)}" if config.run.plugins else ""
    if config.run.task == MULTI_TASK:
        calls = [
            f'engine.predict_rows("RUN/best-{name}", [{example_row(part, one_task(model, name))}]{own})'
            for name, part in tasks_of(config).items()
        ]
        block = "\n".join(["import engine\n", *calls])
        return ["Each task has a folder of its own beside this one:\n", *code_blocks([block])]
    blocks = [f'import engine\n\nengine.predict_rows("FOLDER", [{example_row(config, model)}]{own})', ours]
    if model.head_name == "sentence-embedding":
        blocks.append('from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer("FOLDER")')
    elif models.explain_export(model) == "":
        auto = models.auto_class(model)
        theirs = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("FOLDER").eval()'
        blocks.append(theirs)
    return code_blocks(blocks)


def code_blocks(blocks: Sequence[str]) -> list[str]:
    """Return Python code as blocks of Markdown."""
    return [f"```python\n{block}\n```" for block in blocks]


def tasks_of(config: Config) -> dict[str, Config]:
    """Return {"": the recipe}, or the recipes of several tasks by their names."""
    task = open_task(config)[0]
    return {part.name: part.config for part in task.parts} if isinstance(task, MultiTask) else {"": config}


def example_row(config: Config, model: TaskModel) -> str:
    """Return a row that engine.predict_rows reads, as code."""
    columns = open_task(config)[0].columns.fill(config.data)
    first, second = columns.text_column, columns.text_pair_column
    if model.embedding is None:
        return to_json({first: "picture.png"}, ensure_ascii=False)
    if model.head_name == "multiple-choice":
        names = config.multiple_choice.choice_columns
        texts = [f"choice {i + 1}" for i in range(max(len(names), 2))]
        choices = dict(zip(names, texts, strict=True)) if len(names) > 1 else {(*names, "choices")[0]: texts}
        return to_json({first: "a text", second: "a question"} | choices, ensure_ascii=False)
    if model.head_name == "relation-classification":
        return '"<e1>Anna</e1> lives in <e2>Rome</e2>."'
    if config.run.task == "dialogue":
        return '[{"role": "user", "content": "a message"}]'
    if model.head_name == "question-answering":
        return '("a question", "a text with the answer")'
    return '("a text", "another text")' if second and model.head_name != "sentence-embedding" else '"a text"'


def changed_settings(config: Config) -> list[str]:
    """Return the settings of a recipe that differ from their defaults, as lines of TOML."""
    defaults = to_dict(Config())
    return [f"{key} = {toml_value(value)}" for key, value in to_dict(config).items() if value != defaults[key]]


def without_folders(config: Config) -> Config:
    """Return the recipe with the names of files, but not the folders of absolute paths, which only one machine has."""
    recipe = to_recipe(config)

    def shorten(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(shorten, value))
        is_path = isinstance(value, str) and os.path.isabs(value) and value.rstrip("/").count("/") > 1
        return Path(value).name if is_path else value  # "/" may be a separator of labels

    return override(recipe, {key: shorten(x) for key, x in to_dict(recipe).items()} | {"run.folder": run_name(config)})
