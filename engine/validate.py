"""Checks of the recipe against the task, the model and the data, made before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data import Examples
from data.errors import DataError
from data.examples import TextExamples
from data.image_preprocessing import Preprocessing
from data.long_texts import WINDOWS, find_overlap_fault
from data.mapped import MappedExamples
from data.multi_task import MultiTaskExamples, labels_of
from engine.config import Config, ConfigError, all_settings, get
from engine.metrics.text_classification import POSITIVE_CLASS_METRICS
from engine.mps import check_supported
from engine.multi_task import read_parts
from engine.plugins import loaded_checksums
from engine.tasks import MULTI_TASK, TASKS, Task, TaskSettings
from engine.tasks.multi_task import MultiTask, of_task
from engine.tasks.task import no_labels
from models import TaskModel
from models.multi_task import one_task

# Names of files, which may lie elsewhere on another machine. What they contain is compared once it is read.
NAMES_OF_FILES = ("run.folder", "run.plugins", "model.name", "data.train", "data.validation", "data.test", "data.cache")


def shared_settings(config: Config) -> dict[str, Any]:
    """Return the settings that are the same on all ranks of a run, and the checksums of its plugins."""
    settings = {key: get(config, key) for key in all_settings(config) if key not in NAMES_OF_FILES}
    return settings | {"run.plugins": sorted(loaded_checksums().values())}


def task_settings(config: Config, task: Task) -> TaskSettings:
    """Return the settings by which the task reads data, with every column named; ConfigError for unused settings.

    Those of several tasks have the settings of each, by name, as their own.
    """
    if isinstance(task, MultiTask):
        own = {}
        for part in task.parts:
            with of_task(part.name):
                own[part.name] = task_settings(part.config, part.task)
        return TaskSettings(config.data, own)
    _check_used(config, task)
    check_supported(config.run.device, config.train.precision, task.generates, config.regularize.fgm_epsilon)
    section = getattr(config, task.section) if task.section else None
    return TaskSettings(
        task.columns.fill(config.data), section, generate=config.generate, bleu_tokenizer=config.eval.bleu_tokenizer
    )


def unread_settings(task: Task) -> set[str]:
    """Return the sections, and the settings "section.key", that other tasks read and this one does not."""
    unread = {other.section for other in TASKS.values()} - {task.section, ""} | {"multi_task"}
    unread |= set() if task.generates else {"generate"}
    unread |= set() if "bleu" in task.metrics else {"eval.bleu_tokenizer"}
    unread |= {"data.labels"} if task.find_labels is no_labels else set()
    unread |= set() if task.problem == "multi-label" else {"data.label_separator"}
    unread |= {"data.text_pair_column"} if task.columns.text_pair is None else set()
    unread |= set() if task.problem in ("single-label", "multi-label") else {"data.teacher_file"}
    unread |= {"data.split_special_tokens"} if task.head == "image-classification" else set()
    unread |= {"data.long_texts"} if task.long_texts == ("truncate",) else set()
    unread |= set() if WINDOWS in task.long_texts else {"data.window_overlap"}
    return unread


def _check_used(config: Config, task: Task) -> None:
    """Raise ConfigError for a setting that is not at its default and that this task does not read."""
    default, unread = Config(), unread_settings(task)
    _check_long_texts(config, task)  # first, since it says why
    for key in all_settings(default):
        if {key, key.partition(".")[0]} & unread and get(config, key) != get(default, key):
            raise ConfigError(f"{key} = {get(config, key)!r} has no effect on {config.run.task}: leave it out")
    _check_format(config)
    _check_judging(config, task)
    _check_cache(config, task)
    _check_imbalance(config, task)
    if config.causal_lm.document_mask and not config.causal_lm.concatenate_texts:
        raise ConfigError(
            "causal_lm.document_mask = True has no effect on texts that are read alone: leave it out, or set "
            "causal_lm.concatenate_texts = true"
        )
    if config.masked_lm.segmenter and not config.masked_lm.whole_words:
        raise ConfigError(
            f"masked_lm.segmenter = {config.masked_lm.segmenter!r} has no effect where tokens are masked alone: leave "
            "it out, or set masked_lm.whole_words = true"
        )
    for name in ("mixup", "cutmix"):
        if config.data.teacher_file and get(config, f"augment.image.{name}"):
            raise ConfigError(
                f"augment.image.{name} mixes two examples, which data.teacher_file has no logits for: leave out one of "
                "the two settings"
            )


def _check_format(config: Config) -> None:
    """Raise ConfigError for a setting of text files that files of data.format do not have."""
    tables, binary = ("auto", "csv", "tsv"), ("parquet", "idx", "folder", "tar")
    for key in ("encoding", "delimiter", "quotes"):
        value, format = getattr(config.data, key), config.data.format
        is_read = format not in binary if key == "encoding" else format in tables
        if value != getattr(Config().data, key) and not is_read:
            raise ConfigError(f"data.{key} = {value!r} has no effect with data.format = {format!r}: leave it out")


def _check_judging(config: Config, task: Task) -> None:
    """Raise ConfigError for intervals, a temperature or thresholds that the task does not have."""
    name, judged = config.run.task, config.eval
    single = task.evaluate_examples
    if judged.confidence and (
        single is None or single.__module__.split(".")[0] != task.evaluate_batch.__module__.split(".")[0]
    ):
        raise ConfigError(
            f"eval.confidence = {judged.confidence:g} needs the statistics of single examples, which {name} does not "
            "have: leave it out, or give the task an evaluate_examples (engine/tasks/task.py)"
        )
    if judged.fit_temperature and task.problem not in ("single-label", "multi-label"):
        raise ConfigError(
            f"eval.fit_temperature = True has no effect on {name}, which predicts no class of an example: leave it out"
        )
    if judged.tune_thresholds != "none" and not task.has_thresholds:
        raise ConfigError(
            f"eval.tune_thresholds = {judged.tune_thresholds!r} has no effect on {name}: it serves "
            f"{', '.join(other for other, known in TASKS.items() if known.has_thresholds)}"
        )
    if judged.tune_thresholds == "f1_positive" and task.problem == "multi-label":
        raise ConfigError("eval.tune_thresholds = 'f1_positive' is of two classes: f1 is that of each label here")


def check_thresholds(config: Config, task: Task, labels: Sequence[str]) -> None:
    """Raise ConfigError for thresholds of classes where there are not two."""
    if config.eval.tune_thresholds != "none" and task.problem == "single-label" and len(labels) != 2:
        raise ConfigError(
            f"eval.tune_thresholds = {config.eval.tune_thresholds!r} needs two classes, and there are {len(labels)}: "
            "leave it out"
        )


def _check_long_texts(config: Config, task: Task) -> None:
    """Raise ConfigError for a way of reading long texts that the task does not have, with the reason."""
    mode, overlap = config.data.long_texts, config.data.window_overlap
    if mode not in task.long_texts:
        reason = {
            "token-classification": "each word has a tag, and those in the middle would be lost: windows reads all",
            "sentence-embedding": "a text has one vector; head+tail keeps the end of a long one",
            "multiple-choice": "each choice is read with its context once; head+tail keeps the end of a long one",
            "question-answering": "contexts are always read in windows that share question_answering.doc_stride tokens",
            "relation-extraction": "a long text is cut around its two entities",
            **dict.fromkeys(
                ("masked-lm", "span-corruption"), "all of a text is read, in further examples where it is long"
            ),
            "causal-lm": "causal_lm.concatenate_texts reads all of a text in blocks",
            "dialogue": "a reply is learned after the turns just before it",
            "image-classification": "an image is not a text",
            "multi-label-image-classification": "an image is not a text",
        }.get(config.run.task, "the text that is written would have no source for what was left out")
        raise ConfigError(f"data.long_texts = {mode!r} has no effect on {config.run.task}: {reason}")
    if overlap != Config().data.window_overlap and mode != WINDOWS and WINDOWS in task.long_texts:
        raise ConfigError(
            f"data.window_overlap = {overlap} has no effect with data.long_texts = {mode!r}: leave it out, or set "
            'data.long_texts = "windows"'
        )


def _check_cache(config: Config, task: Task) -> None:
    """Raise ConfigError for data.cache where it cannot keep what a task encodes."""
    if not config.data.cache:
        return
    cached = [name for name, other in TASKS.items() if other.caches]
    if not task.caches:
        raise ConfigError(
            f"data.cache = {config.data.cache!r} keeps no examples of {config.run.task}, which needs more of the rows "
            f"than tokens: leave it out (it serves {', '.join(cached)})"
        )
    if not all(slot.__module__.startswith("engine.tasks.") for slot in (task.encode, task.texts)):
        raise ConfigError(
            f"data.cache = {config.data.cache!r} cannot tell when the code of a plugin changes, and {config.run.task} "
            "encodes with such code: leave it out"
        )


def _check_imbalance(config: Config, task: Task) -> None:
    """Raise ConfigError for a setting against imbalance that does not fit the task, with the one that does."""
    name, regularize = config.run.task, config.regularize
    if regularize.class_weights and task.problem == "multi-label":
        raise ConfigError(
            f"regularize.class_weights = {list(regularize.class_weights)} has no effect on {name}, which does "
            "not learn one class per example: regularize.pos_weight weights the labels"
        )
    if regularize.pos_weight and task.problem != "multi-label":
        more = "regularize.class_weights weights classes" if task.problem == "single-label" else "leave it out"
        raise ConfigError(
            f"regularize.pos_weight = {list(regularize.pos_weight)} has no effect on {name}, whose examples do not "
            f"have several labels each: {more}"
        )
    if config.train.sampler == "balanced" and task.problem != "single-label":
        more = "regularize.pos_weight weights the labels" if task.problem == "multi-label" else "leave it out"
        raise ConfigError(
            f"train.sampler = 'balanced' draws examples by their class, and an example of {name} does not have one "
            f"class: {more}"
        )


def check_metric(task: Task, watched: str, labels: Sequence[str]) -> None:
    """Raise ConfigError for a metric of two classes where there are more or fewer."""
    for part in task.parts if isinstance(task, MultiTask) else ():
        prefix, _, name = watched.rpartition("/")
        with of_task(part.name):
            check_metric(part.task, name if prefix == part.name else part.watched, labels_of(part.name, labels))
    if task.problem == "single-label" and watched in POSITIVE_CLASS_METRICS and len(labels) != 2:
        raise ConfigError(
            f"eval.metric = {watched!r} needs two classes, and there are {len(labels)}; f1 is the mean over all classes"
        )


def check_fit(config: Config, model: TaskModel, processor: Any) -> None:
    """Raise ConfigError if the inputs that `processor` prepares do not fit the model. Several tasks have one each."""
    for part in read_parts(config):
        with of_task(part.name):
            check_fit(part.config, one_task(model, part.name), processor[part.name])
    if config.run.task == MULTI_TASK:
        return
    if not isinstance(processor, Preprocessing):  # images of any size fit, since a ViT interpolates its positions
        _check_tokens(config, model, getattr(processor, "tokenizer", processor))  # a PairTokenizer holds one


def _check_tokens(config: Config, model: TaskModel, tokenizer: Tokenizer) -> None:
    """Raise ConfigError for texts longer than the model's positions, or token ids without an embedding."""
    if config.data.max_length > model.max_length:
        raise ConfigError(
            f"data.max_length = {config.data.max_length}, but {config.model.name} has {model.max_length} positions: "
            "lower data.max_length"
        )
    check_room(config, tokenizer)
    averages = model.head is None or model.head.reads_windows or not TASKS[config.run.task].problem
    if config.data.long_texts == WINDOWS and not averages:
        raise ConfigError(
            f"data.long_texts = 'windows': the head {model.head_name} does not average windows; set its reads_windows "
            "once it does, or choose truncate"
        )
    rows = model.vocab_size
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])  # ids may have gaps
    if largest >= rows:
        raise ConfigError(
            f"{config.model.name}: the tokenizer gives {token!r} the id {largest}, the embedding has {rows} rows"
        )


def check_room(config: Config, tokenizer: Tokenizer) -> None:
    """Raise ConfigError for a data.max_length that has no room for text, or none for windows that overlap."""
    data, task = config.data, TASKS[config.run.task]
    is_pair = bool(data.text_pair_column or task.columns.text_pair)
    special = tokenizer.num_special_tokens_to_add(is_pair)
    if data.max_length <= special:
        raise ConfigError(
            f"data.max_length = {data.max_length} leaves no room beside {special} special tokens: raise it"
        )
    if data.long_texts == WINDOWS and (
        fault := find_overlap_fault(data.max_length, special, data.window_overlap, is_pair)
    ):
        raise ConfigError(fault)


def check_encoded(config: Config, model: TaskModel, *sets: Examples) -> None:
    """Raise ConfigError or DataError for encoded texts that the model cannot read.

    A tokenizer's post-processor may add ids and token types that its vocabulary does not show, and its normalizer may
    leave nothing of a text.
    """
    for part in read_parts(config):
        own = [examples.parts[part.name] for examples in sets if isinstance(examples, MultiTaskExamples)]
        with of_task(part.name):
            check_encoded(part.config, one_task(model, part.name), *own)
    for examples in sets:
        if isinstance(examples, MappedExamples):
            facts = examples.facts
            _check_ids(config.model.name, model, facts.largest)
            _check_lengths(config, model, facts.longest_sequence, facts.num_empty, facts.first_empty)
        elif isinstance(examples, TextExamples) and len(examples.input_ids) + len(examples):
            named = {name: getattr(examples, name) for name in ("input_ids", "target_ids", "token_type_ids")}
            largest = {name: int(ids.max(initial=0)) for name, ids in named.items() if ids is not None}
            _check_ids(config.model.name, model, largest)
            lengths = np.diff(examples.offsets)
            empty = np.flatnonzero(lengths == 0)
            if examples.sequences is not None and len(empty):
                empty = np.unique(np.searchsorted(examples.sequences, empty, side="right") - 1)
            first = examples.ids[empty[0]] if len(empty) else ""
            _check_lengths(config, model, int(lengths.max(initial=0)), len(empty), first)


def _check_ids(name: str, model: TaskModel, largest_ids: Mapping[str, int]) -> None:
    """Raise ConfigError for a token id or a token type without an embedding. largest_ids: of each kind of ids."""
    for kind, largest in largest_ids.items():
        is_type = kind == "token_type_ids"
        what, rows = ("token type", model.num_token_types) if is_type else ("token id", model.vocab_size)
        if rows and largest >= rows:
            raise ConfigError(
                f"{name}: the tokenizer gives the {what} {largest}, the embedding has {rows} rows: tokenizer and "
                "weights do not belong together"
            )


def _check_lengths(config: Config, model: TaskModel, longest: int, num_empty: int, first_empty: str) -> None:
    """Raise DataError for a text without a token, ConfigError for one that is longer than the model's positions.

    longest: tokens of the longest sequence. num_empty, first_empty: the texts without a token, and the id of one.
    """
    if longest > model.max_length:
        raise ConfigError(
            f"data.max_length = {config.data.max_length} gives a text of {longest} tokens, and "
            f"{config.model.name} has {model.max_length} positions: lower data.max_length"
        )
    if num_empty:
        more = f" and {num_empty - 1:,} more" if num_empty > 1 else ""
        raise DataError(
            f"the tokenizer of {config.model.name} leaves no tokens of the text with id {first_empty!r}"
            f"{more}: remove such texts"
        )
