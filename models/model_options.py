"""The options of from_pretrained, checked against config.json: depth, dropout, labels, pooling, problem."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.architecture import AnyArchitecture
from models.checkpoints import weights
from models.checkpoints.sentence_files import read_sentence_files
from models.checkpoints.tensor_files import JsonObject, TensorFiles
from models.errors import ModelError
from models.heads import HEADS, Head

HUB_PROBLEMS = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
SHOWN = 20  # labels in a message
CHOICES = {"init": ("pretrained", "scratch"), "head_init": ("auto", "reset")}
SITES = ("embedding", "attention", "hidden", "head", "drop_path")
# Endings of transformers' classes, after "For", that have no classifier which could be mistaken for another task's.
PRETRAINING = ("", "PreTraining", "MaskedLM", "CausalLM", "ConditionalGeneration", "MaskedImageModeling")


@dataclass(frozen=True)
class ModelOptions:
    """The arguments of from_pretrained that determine the modules; None where the checkpoint decides."""

    head: str | None
    labels: Sequence[str] | None
    pooling: str | None
    problem: str | None
    dropout: float | Mapping[str, float] | None
    label_smoothing: float
    seed: int

    def rates(self) -> dict[str, float]:
        """Return {site: rate} of the rates that are given; ModelError for an unknown site or an invalid rate."""
        if self.dropout is None:
            return {}
        every_site = SITES[:-1]  # drop path is set by its name only, since no checkpoint has it
        rates = dict(self.dropout) if isinstance(self.dropout, Mapping) else dict.fromkeys(every_site, self.dropout)
        for site, rate in rates.items():
            if site not in SITES or not _is_rate(rate):
                shown = reprlib.repr(rate)
                raise ModelError(f"dropout {site} = {shown}: sites are {', '.join(SITES)}, rates from 0 to below 1")
        return rates

    def backbone_rates(self) -> dict[str, float]:
        """Return the rates of the sites of the backbone."""
        return {site: rate for site, rate in self.rates().items() if site != "head"}


def check_values(options: ModelOptions, init: str, head_init: str, reinit_layers: int) -> None:
    """Raise ModelError for an option that is invalid for every checkpoint; called before any file is read."""
    for name, value in (("init", init), ("head_init", head_init)):
        if value not in CHOICES[name]:
            raise ModelError(f"model.{name} = {reprlib.repr(value)}: choose from {', '.join(CHOICES[name])}")
    if not _is_rate(options.label_smoothing):
        raise ModelError(f"label_smoothing = {reprlib.repr(options.label_smoothing)} should be from 0 to below 1")
    if reinit_layers and init == "scratch":
        raise ModelError(
            f"model.reinit_layers = {reinit_layers}: model.init = scratch starts every layer anew; choose one"
        )
    options.rates()


def check_used(options: ModelOptions, head: type[Head] | None, problem: str | None) -> None:
    """Raise ModelError for an option without effect on a model with this head and problem."""
    named_sites = options.dropout if isinstance(options.dropout, Mapping) else {}
    for option, given, used in (
        ("labels", bool(options.labels), head is not None and head.has_labels),
        ("model.pooling", options.pooling is not None, head is not None and head.reads_pooled),
        (
            "label_smoothing",
            options.label_smoothing > 0,
            head is not None and head.supports_label_smoothing and problem == "single-label",
        ),
        ("dropout head", "head" in named_sites, head is not None and not head.is_language_model),
        ("problem", options.problem is not None, head is not None),
    ):
        if given and not used:
            target = f"{options.head} head" if head else "model without a head"
            target += f" for {problem}" if head and problem != "single-label" else ""
            undo = ', or set it to "" where the recipe sets it' if option == "model.pooling" else ""
            raise ModelError(f"{option} has no effect on a {target}: leave it out{undo}")


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def is_head_in_file(raw: JsonObject, architecture: AnyArchitecture, head: str, files: TensorFiles) -> bool:
    """Return whether the checkpoint has this head. ModelError where it has another head under its own names."""
    table, saved_head = architecture.weights, raw.get("head")
    if foreign := weights.foreign_head(files, table, head):
        name = f"{foreign}, a {saved_class(raw)}'s" if saved_class(raw) else foreign
        raise ModelError(
            f"{files.folder}: the head in the file ({name}) is computed differently from the {head} head here; "
            "--model.head_init reset starts a new head"
        )
    if head in table.heads:
        return weights.has_head(files, table, head)
    if saved_head is not None and saved_head != head:
        raise ModelError(
            f"{files.folder}: the head in the file is a {reprlib.repr(saved_head)}, no {head} head; "
            "--model.head_init reset starts a new head"
        )
    return saved_head == head


def is_tied(raw: JsonObject, architecture: AnyArchitecture, head: str, files: TensorFiles | None) -> bool:
    """Return whether the output matrix of a language model is the embedding. files: None for a model from scratch.

    An encoder-decoder is always pretrained as a language model, so its tensors take precedence over config.json.
    """
    tied = raw.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise ModelError(f"config.json: tie_word_embeddings = {reprlib.repr(tied)} should be true or false")
    if files is None or not (tied or HEADS[head].needs_decoder):
        return tied
    return weights.is_tied(files, architecture.weights, head)


def limit_layers(raw: JsonObject, architecture: AnyArchitecture, keep_layers: int) -> JsonObject:
    """Return the config.json of a model of only the first `keep_layers` layers (0: all of them)."""
    if not keep_layers:
        return raw
    given = {name: value for name in architecture.depth if isinstance(value := raw.get(name), int)}
    deepest = max(given.values(), default=0)
    if not 0 < keep_layers <= deepest:
        raise ModelError(f"model.keep_layers = {keep_layers}: the checkpoint has {deepest} layers")
    groups = raw.get("num_hidden_groups")
    if isinstance(groups, int) and groups > 1:
        raise ModelError(
            f"model.keep_layers = {keep_layers}: the layers of this checkpoint share their weights in {groups} groups, "
            "of which a part of the layers would be other groups: leave it out"
        )
    kinds = raw.get("layer_types")  # of each layer, in ModernBERT
    kept: JsonObject = {"layer_types": kinds[:keep_layers]} if isinstance(kinds, list) else {}
    return raw | kept | {name: min(keep_layers, value) for name, value in given.items()}


def choose_problem(wanted: str | None, raw: JsonObject, head: str, head_in_file: bool, labels: Sequence[str]) -> str:
    """Return the caller's problem type, else that of the head in the file, else single-label.

    A head in a file with one label and without problem_type is a regression, as in transformers. Raises ModelError for
    a problem that the head does not support, and for a single-label problem with fewer than two labels.
    """
    cls = HEADS[head]
    choices = cls.problems
    saved = raw.get("problem_type")
    if head_in_file and saved and saved not in HUB_PROBLEMS.values():
        known = ", ".join(HUB_PROBLEMS.values())
        raise ModelError(f"config.json: problem_type = {reprlib.repr(saved)}: known are {known}")
    named = {theirs: ours for ours, theirs in HUB_PROBLEMS.items() if ours in choices}
    in_file = None
    if head_in_file:
        default = "regression" if len(labels) == 1 and cls.reads_pooled else None
        in_file = named.get(str(saved)) if saved else default
    problem = wanted or in_file or choices[0]
    if problem not in choices:
        raise ModelError(f"problem = {problem!r}: for a {head} head, choose from {', '.join(choices)}")
    if cls.has_labels and problem == "single-label" and len(labels) < 2:
        known = ", ".join(map(repr, labels))
        raise ModelError(f"labels = [{known}]: a single-label head chooses between two labels or more")
    return problem


def choose_pooling(
    wanted: str | None,
    raw: JsonObject,
    architecture: AnyArchitecture,
    head: type[Head] | None = None,
    folder: Path | None = None,
) -> str:
    """Return the caller's pooling, else the checkpoint's, else the head's or the architecture's.

    A head that prefers the mean reads the files of sentence-transformers in the folder of the checkpoint, too. A causal
    model keeps its own, since its last token alone depends on all. Raises ModelError for an unknown one.
    """
    pooling = wanted or raw.get("pooling")
    if not pooling and head is not None and head.prefers_mean:
        published = read_sentence_files(folder) if folder is not None else None
        default = "mean" if architecture.pooling != "last" else "last"
        pooling = published.pooling if published is not None else default
    pooling = pooling or raw.get(architecture.pooling_field) or architecture.pooling
    if not isinstance(pooling, str) or pooling not in architecture.poolings:
        raise ModelError(f"model.pooling = {reprlib.repr(pooling)}: choose from {', '.join(architecture.poolings)}")
    return pooling


def check_head(raw: JsonObject, architecture: AnyArchitecture, head: str, pooling: str, folder: Path) -> None:
    """Raise ModelError where the classifier in the file belongs to another task or another pooling.

    Classifiers of different tasks have tensors of the same names; config.json says which task it is.
    """
    saved = saved_class(raw)
    trained = choose_pooling(None, raw, architecture)
    ours = hub_class(architecture, head, trained)
    known = (ours.partition("For")[2], *PRETRAINING)
    if saved != ours and (saved in architecture.heads.values() or saved.partition("For")[2] not in known):
        kind = f"a {saved}'s, no {head} head"
    elif HEADS[head].reads_pooled and pooling != trained:
        kind = f"trained with model.pooling = {trained!r}, not {pooling!r}"
    else:
        return
    raise ModelError(f"{folder}: the head in the file is {kind}; --model.head_init reset starts a new head")


def saved_class(raw: JsonObject) -> str:
    """Return the class of transformers that a checkpoint was saved from, as config.json names it; "" if it does not."""
    named = raw.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def hub_class(architecture: AnyArchitecture, head: str, pooling: str) -> str:
    """Return the class of transformers that reads the export: the backbone's where it lacks the head or the pooling."""
    poolings = architecture.hub_poolings or (architecture.pooling,)
    known = head in architecture.heads and (not HEADS[head].reads_pooled or pooling in poolings)
    return architecture.heads[head if known else None]


def choose_labels(
    wanted: Sequence[str] | None,
    raw: JsonObject,
    head: type[Head],
    head_in_file: bool,
    num_outputs: int | None,
    folder: Path,
) -> tuple[list[str], str]:
    """Return the class names in the order of the logits, and a note where config.json names only some of them.

    They are the file's when its head is used, else the caller's. num_outputs: of the head in the file, where known.
    """
    if not head.has_labels:
        return [], ""
    if wanted is not None:
        _check_labels(wanted)
    if wanted is not None and not head_in_file:
        return list(wanted), ""
    in_file, note = _labels_of(raw, num_outputs, folder)
    if wanted is None:
        return in_file, note
    in_file = in_file if raw.get("id2label") else []
    missing, unknown = list(Counter(in_file) - Counter(wanted)), list(Counter(wanted) - Counter(in_file))
    if missing or unknown:
        known = f"{reprlib.repr(missing)}, which the data lacks" if missing else "fewer labels than the data"
        known = known if in_file else "no labels (config.json has no id2label)"
        more = f"; the data has {reprlib.repr(unknown)}, which it does not know" if unknown else ""
        more += f" ({note})" if note else ""
        same = f"data.labels = {json.dumps(','.join(in_file), ensure_ascii=False)} reads other spellings of its names, "
        same = f"{same}and numbers as their indices; " if missing and len(in_file) == len(wanted) <= SHOWN else ""
        raise ModelError(f"{folder}: its head knows {known}{more}; {same}--model.head_init reset starts a new head")
    return in_file, note


def _labels_of(raw: JsonObject, num_outputs: int | None, folder: Path) -> tuple[list[str], str]:
    """Return (the labels of config.json in the order of their numbers, a note if it does not name all).

    Their number is that of the outputs of the head, else num_labels, else that of the names in id2label. A class
    without a name has the hub's default name. Raises ModelError for names of classes that do not exist.
    """
    named = _names_by_number(raw, folder)
    count = num_outputs or _num_labels(raw, len(named) or 2, folder)
    if unknown := [number for number in named if not 0 <= number < count]:
        raise ModelError(
            f"{folder / 'config.json'}: id2label names the class {unknown[0]}, but there are {count} classes, from 0 "
            f"to {count - 1}: correct id2label, or --model.head_init reset starts a new head"
        )
    labels = [named.get(i, f"LABEL_{i}") for i in range(count)]
    if not named or len(named) == count:
        return labels, ""
    first = next(i for i in range(count) if i not in named)
    others = f"the others have default names, such as {labels[first]}"
    return labels, f"id2label of config.json names {len(named)} of {count} classes; {others}"


def _names_by_number(raw: JsonObject, folder: Path) -> dict[int, str]:
    """Return {number: label} of config.json; {} without id2label."""
    by_number = raw.get("id2label") or {}
    try:
        names = {int(number): str(name) for number, name in by_number.items()}  # type: ignore[attr-defined]
    except (ValueError, TypeError, AttributeError):
        names = {}
    if not isinstance(by_number, Mapping) or len(names) < len(by_number):
        raise ModelError(f"{folder / 'config.json'}: id2label must map numbers to names")
    return names


def _check_labels(names: Sequence[str]) -> None:
    """Raise ModelError for an empty list and for a label that occurs twice."""
    if not names:
        raise ModelError("labels = []: name the classes, or leave labels out to take those of config.json")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ModelError(f"labels: {reprlib.repr(twice)} more than once; name each class once")


def _num_labels(raw: JsonObject, default: int, folder: Path) -> int:
    count = default if raw.get("num_labels") is None else raw["num_labels"]
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= 2**20:
        raise ModelError(f"{folder / 'config.json'}: num_labels = {reprlib.repr(count)} should be from 1 to {2**20}")
    return count
