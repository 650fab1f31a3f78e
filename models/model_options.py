"""What a caller asks of a checkpoint, checked against its config.json: depth, dropout, labels, pooling, problem."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.architecture import Architecture
from models.checkpoints import weights
from models.errors import ModelError
from models.heads import PROBLEMS
from models.ops.layers import POOLINGS

POOLED = ("sequence-classification", "image-classification")  # these read one vector of each example
LABELLED = (*POOLED, "distilled-image-classification", "token-classification", "relation-classification")
HUB_PROBLEMS = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}

CHOICES = {"init": ("pretrained", "scratch"), "head_init": ("auto", "reset")}
# Classes of transformers, after their "For", that have no classifier whose tensors could be taken for another's.
PRETRAINING = ("", "PreTraining", "MaskedLM", "CausalLM", "ConditionalGeneration", "MaskedImageModeling")


def check_options(init: str, head_init: str, label_smoothing: float, reinit_layers: int) -> None:
    """ModelError for an option that no checkpoint could fulfil: asked before anything is read."""
    for name, value in (("init", init), ("head_init", head_init)):
        if value not in CHOICES[name]:
            raise ModelError(f"model.{name} = {reprlib.repr(value)}: choose from {', '.join(CHOICES[name])}")
    if not _is_rate(label_smoothing):
        raise ModelError(f"label_smoothing = {reprlib.repr(label_smoothing)} should be from 0 to below 1")
    if reinit_layers and init == "scratch":
        raise ModelError(
            f"model.reinit_layers = {reinit_layers}: model.init = scratch starts every layer anew; drop one of the two"
        )


def check_used(
    head: str | None,
    problem: str | None,
    *,
    labels: Sequence[str] | None,
    pooling: str | None,
    label_smoothing: float,
    rates: Mapping[str, float],
) -> None:
    """ModelError for an option that a model with this head would not read. rates: of the sites that are named."""
    smoothed = head not in (None, "question-answering") and problem == "single-label"
    language_model = head is None or head.endswith("-lm")
    for option, given, used in (
        ("labels", bool(labels), head in LABELLED),
        ("model.pooling", pooling is not None, head in POOLED),
        ("label_smoothing", label_smoothing > 0, smoothed),
        ("dropout head", "head" in rates, not language_model),
        ("problem", problem is not None, head is not None),
    ):
        if given and not used:
            what = f"{head} head" if head else "model without a head"
            what += f" for {problem}" if head and problem != "single-label" else ""
            raise ModelError(f"{option} has no effect on a {what}: leave it out")


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def is_tied(raw: dict[str, Any], architecture: Architecture, head: str, folder: Path | None) -> bool:
    """Is a language model's output matrix the embedding? folder: of its weights, None for a model from scratch.

    An encoder-decoder is always pretrained as a language model, so what its file holds outweighs what config.json says.
    """
    tied = raw.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise ModelError(f"config.json: tie_word_embeddings = {reprlib.repr(tied)} should be true or false")
    if folder is None or not (tied or head == "seq2seq-lm"):
        return tied
    return weights.is_tied(folder, architecture.weights, head)


def shallower(raw: dict[str, Any], architecture: Architecture, keep_layers: int) -> dict[str, Any]:
    """The config.json of the model cut to its first `keep_layers` layers (0: as it is)."""
    if not keep_layers:
        return raw
    given = {name: raw[name] for name in architecture.depth if isinstance(raw.get(name), int)}
    deepest = max(given.values(), default=0)
    if not 0 < keep_layers <= deepest:
        raise ModelError(f"model.keep_layers = {keep_layers}: the checkpoint has {deepest} layers")
    return raw | {name: min(keep_layers, value) for name, value in given.items()}


def dropout_rates(dropout: float | Mapping[str, float] | None) -> dict[str, float]:
    """{site: rate} of what the caller sets; ModelError for an unknown site or an impossible rate."""
    sites = ("embedding", "attention", "hidden", "head", "drop_path")
    if dropout is None:
        return {}
    every = sites[:-1]  # "every site" means those a checkpoint has; drop path is asked for by name
    rates = dict(dropout) if isinstance(dropout, Mapping) else dict.fromkeys(every, dropout)
    for site, rate in rates.items():
        if site not in sites or not _is_rate(rate):
            shown = reprlib.repr(rate)
            raise ModelError(f"dropout {site} = {shown}: sites are {', '.join(sites)}, rates from 0 to below 1")
    return rates


def choose_problem(wanted: str | None, raw: dict[str, Any], head: str, head_in_file: bool, names: Sequence[str]) -> str:
    """The file's own for the file's own head; a head with a label for every token is always single-label.

    A file that does not say and has one label is a regression's, as on the hub. names: the labels.
    ModelError for a problem that the head does not take, and for a choice between fewer than two labels.
    """
    choices = PROBLEMS if head in LABELLED and head != "token-classification" else PROBLEMS[:1]
    named = {theirs: ours for ours, theirs in HUB_PROBLEMS.items() if ours in choices}
    in_file = None
    if head_in_file:
        unsaid = "regression" if len(names) == 1 and head in POOLED else None
        in_file = named.get(str(raw["problem_type"])) if raw.get("problem_type") else unsaid
    problem = wanted or in_file or "single-label"
    if problem not in choices:
        raise ModelError(f"problem = {problem!r}: for a {head} head, choose from {', '.join(choices)}")
    if head in LABELLED and problem == "single-label" and len(names) < 2:
        known = ", ".join(map(repr, names))
        raise ModelError(f"labels = [{known}]: a single-label head chooses between two labels or more")
    return problem


def choose_pooling(wanted: str | None, raw: dict[str, Any], architecture: Architecture) -> str:
    """The caller's, else the checkpoint's, else the architecture's; ModelError for an unknown one."""
    pooling = wanted or raw.get("pooling") or architecture.pooling
    if pooling not in tuple(POOLINGS):
        raise ModelError(f"model.pooling = {reprlib.repr(pooling)}: choose from {', '.join(POOLINGS)}")
    return pooling


def check_head(raw: dict[str, Any], architecture: Architecture, head: str, pooling: str, folder: Path) -> None:
    """Classifiers of different tasks have tensors of the same names; config.json says whose they are."""
    named = raw.get("architectures")
    saved = str(named[0]) if isinstance(named, list) and named else ""
    trained = choose_pooling(None, raw, architecture)
    ours = hub_class(architecture, head, trained)
    known = (ours.partition("For")[2], *PRETRAINING)
    if saved != ours and (saved in architecture.heads.values() or saved.partition("For")[2] not in known):
        kind = f"a {saved}'s, no {head} head"
    elif head in POOLED and pooling != trained:
        kind = f"trained with model.pooling = {trained!r}, not {pooling!r}"
    else:
        return
    raise ModelError(f"{folder}: the head in the file is {kind}; --model.head_init reset starts a new head")


def hub_class(architecture: Architecture, head: str | None, pooling: str) -> str:
    """The class of transformers that reads our export: for a pooling that it does not know, the plain backbone."""
    known = head not in POOLED or pooling == architecture.pooling
    return architecture.heads[head if known else None]


def choose_labels(
    wanted: Sequence[str] | None, raw: dict[str, Any], head: str | None, head_in_file: bool, folder: Path
) -> list[str]:
    """The class names in the order of the logits: the file's order when its head is used, else the caller's."""
    if head not in LABELLED:
        return []
    try:
        by_number = dict(raw.get("id2label") or {})
        in_file = [str(by_number[key]) for key in sorted(by_number, key=int)]
    except (ValueError, TypeError, AttributeError, KeyError):
        raise ModelError(f"{folder / 'config.json'}: id2label must map numbers to names") from None
    if wanted is not None:
        _check_labels(wanted)
    if wanted is None:
        return in_file or [f"LABEL_{i}" for i in range(_num_labels(raw, folder))]  # the hub's default names
    if not head_in_file:
        return list(wanted)
    lacking, strange = list(Counter(in_file) - Counter(wanted)), list(Counter(wanted) - Counter(in_file))
    if lacking or strange:
        known = f"{reprlib.repr(lacking)}, which the data lacks" if lacking else "fewer labels than the data"
        known = known if in_file else "no labels (config.json has no id2label)"
        more = f"; the data has {reprlib.repr(strange)}, which it does not know" if strange else ""
        raise ModelError(f"{folder}: its head knows {known}{more}; --model.head_init reset starts a new head")
    return in_file


def _check_labels(names: Sequence[str]) -> None:
    """ModelError where there is none, or one twice."""
    if not names:
        raise ModelError("labels = []: name the classes, or leave labels out to take those of config.json")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ModelError(f"labels: {reprlib.repr(twice)} more than once; a class has one name, and a name one class")


def _num_labels(raw: dict[str, Any], folder: Path) -> int:
    count = raw.get("num_labels", 2)
    if type(count) is not int or not 0 < count <= 2**20:
        raise ModelError(f"{folder / 'config.json'}: num_labels = {reprlib.repr(count)} should be from 1 to {2**20}")
    return count
