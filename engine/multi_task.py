"""The task of a run; for run.task = "multi-task" made from the recipes of several tasks (engine/tasks/multi_task.py).

    [run]
    task = "multi-task"
    [multi_task]
    recipes = ["movie_reviews", "my_entities.toml"]

Of each recipe come its run.task, [data], [augment], the section of its task, and the metric that it watches. All else
(the model, the optimizer, the length of the run) is of the recipe of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.multi_task import count_all_targets
from data.notes import list_some
from data.prepared import is_prepared
from engine.config import Config, ConfigError, all_settings, get, read_recipe
from engine.config.schema import LARGEST, SMALLEST
from engine.disk import format_bytes
from engine.state import metric_direction
from engine.tasks import MULTI_TASK, TASKS, Task, find_task
from engine.tasks.multi_task import MultiTask, Part, combine
from engine.tasks.task import no_step_loss
from models import TaskModel
from models.multi_task import each_task, module_name

# Settings of the run that several tasks do not have, and why.
UNSUPPORTED = {
    "regularize.class_weights": "the tasks have different classes; multi_task.weights weights the tasks",
    "regularize.pos_weight": "the tasks have different labels; multi_task.weights weights the tasks",
    "regularize.r_drop_weight": "it compares the outcomes of one task",
    "regularize.distillation_weight": "a teacher has logits for one task",
    "train.loss": "it is the loss of one task",
    "eval.fit_temperature": "it is fitted to the probabilities of one task",
    "eval.tune_thresholds": "they are those of one task",
    "train.sampler": "an example has the classes of its own task only",
}
OF_EACH_RECIPE = ("data.", "augment.", "generate.", "eval.bleu_tokenizer")  # settings that the run does not read
OF_THE_RUN = ("data.num_workers", "data.cache")  # but these


def open_task(config: Config) -> tuple[Task, str]:
    """Return the task of a run and the metric to watch; ConfigError as for find_task and read_parts."""
    if config.run.task != MULTI_TASK:
        return find_task(config.run.task, config.eval.metric)
    task = combine(read_parts(config))
    watched = config.eval.metric or task.metrics[0]
    if watched not in task.metrics:
        raise ConfigError(
            f"eval.metric = {watched!r} is not a metric of these tasks: choose from {', '.join(task.metrics)}"
        )
    return task, watched


def read_parts(config: Config) -> list[Part]:
    """Return the tasks of a run by their recipes, in their order; [] for a run of one task.

    Raises ConfigError for recipes that cannot be read or combined, and for settings that several tasks do not have.
    """
    if config.run.task != MULTI_TASK:
        return []
    names = config.multi_task.recipes
    if not names:
        raise ConfigError("multi_task.recipes is empty: name the recipe of each task")
    _check_settings(config)
    parts = [
        _read_part(config, name, weight)
        for name, weight in zip(names, _read_weights(config.multi_task.weights, len(names)), strict=True)
    ]
    for i, part in enumerate(parts):
        if module_name(part.name) in [module_name(other.name) for other in parts[:i]]:
            raise ConfigError(f"multi_task.recipes names {part.name!r} twice: give the files different names")
    if len({part.task.noun == "image" for part in parts}) > 1:
        nouns = " and ".join(f"{part.name} reads {part.task.noun}s" for part in parts)
        raise ConfigError(f"multi_task.recipes: {nouns}, and a model reads one of them")
    return parts


def _read_part(config: Config, recipe: str, weight: float) -> Part:
    """Return the task of a recipe, with the configuration of a run of this task alone."""
    inner, name = read_recipe(recipe), Path(recipe).stem
    where = f"multi_task.recipes: {recipe}: "
    try:
        task, watched = find_task(inner.run.task, inner.eval.metric)
        direction = metric_direction(inner.eval, watched)
    except ConfigError as error:
        missing = [file for file in inner.run.plugins if file not in config.run.plugins]
        hint = f"; it names run.plugins = {','.join(missing)}, which this recipe has to name" if missing else ""
        raise ConfigError(f"{where}{error}{hint}") from None
    if task.generates or task.step_loss is not no_step_loss:
        reason = "writes texts" if task.generates else "learns from the examples of a step together"
        known = [key for key, other in TASKS.items() if not other.generates and other.step_loss is no_step_loss]
        raise ConfigError(
            f"{where}{inner.run.task} {reason}, which is not combined with other tasks: choose from {', '.join(known)}"
        )
    for key in ("data.train", "data.validation", "data.test"):
        if is_prepared(get(inner, key)):
            raise ConfigError(f"{where}{key} = {get(inner, key)!r} is a prepared folder: name the file it was made of")
    if inner.data.teacher_file:
        raise ConfigError(f"{where}data.teacher_file has no effect on {MULTI_TASK}: leave it out")
    section = {task.section: getattr(inner, task.section)} if task.section else {}
    merged = replace(
        config,
        run=replace(config.run, task=inner.run.task),
        data=replace(inner.data, num_workers=config.data.num_workers, cache=config.data.cache if task.caches else ""),
        augment=inner.augment,
        eval=replace(config.eval, metric=inner.eval.metric, mode=inner.eval.mode),
        multi_task=Config().multi_task,
        **section,
    )
    ignored = [
        key
        for key in all_settings(inner)
        if get(inner, key) not in (get(Config(), key), get(merged, key))
        and not all_settings(inner)[key].metadata["machine"]
    ]
    return Part(name, task, watched, direction, weight, merged, tuple(ignored))


def _check_settings(config: Config) -> None:
    """Raise ConfigError for a setting of the run that several tasks do not have, or that each recipe has."""
    default = Config()
    sections = {f"{task.section}." for task in TASKS.values() if task.section}
    for key in all_settings(default):
        value = get(config, key)
        if value == get(default, key) or key in OF_THE_RUN:
            continue
        if key in UNSUPPORTED:
            raise ConfigError(f"{key} = {value!r} does not fit {MULTI_TASK}, since {UNSUPPORTED[key]}: leave it out")
        if key.startswith((*OF_EACH_RECIPE, *sections)):
            raise ConfigError(
                f"{key} = {value!r} has no effect on {MULTI_TASK}, whose tasks each have their own recipe "
                "(multi_task.recipes): set it there"
            )
    if config.distributed.strategy != "ddp":
        raise ConfigError(
            f"distributed.strategy = {config.distributed.strategy!r} is not supported by {MULTI_TASK}: set it to ddp"
        )


def _read_weights(given: Sequence[str], count: int) -> list[float]:
    try:
        weights = [float(text) for text in given] or [1.0] * count
    except ValueError:
        weights = []
    if len(weights) != count or not all(SMALLEST <= weight <= LARGEST for weight in weights):
        raise ConfigError(
            f"multi_task.weights = [{', '.join(given)}] should be {count} numbers above 0, one for each of "
            f"multi_task.recipes; none may be above {LARGEST:g}"
        )
    return weights


def describe_tasks(task: MultiTask, examples: Any, model: TaskModel) -> str:
    """Return how much each task counts in the loss, and the folders that the run writes for each.

    examples: the training examples. model: that of all tasks.
    """
    lines = ["the loss is a mean over the targets of all tasks, in which those of each count by a factor:"]
    for part, factor in zip(task.parts, examples.factors, strict=True):
        own = examples.parts[part.name]
        targets = count_all_targets(own) / max(1, len(own))
        lines.append(f"  {part.name}: {factor:.4g} (weight {part.weight:g}, {targets:.4g} targets an example)")
    folders = list_some([f"best-{name}/ {_format_size(own)}" for name, own in each_task(model).items()])
    lines.append(f"beside best/, which has all tasks, there is one for each, to evaluate and predict with: {folders}")
    return "\n".join(lines)


def _format_size(model: TaskModel) -> str:
    return format_bytes(sum(p.nbytes for p in model.parameters()))
