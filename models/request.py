"""What a caller asks of a checkpoint, checked against its config.json: depth, dropout, labels, pooling, problem."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models import weights
from models.architecture import Architecture
from models.errors import ModelError
from models.heads import PROBLEMS
from models.layers import POOLINGS

POOLED = ("sequence-classification", "image-classification")  # these read one vector of each example
LABELLED = (*POOLED, "distilled-image-classification", "token-classification", "relation-classification")
HUB_PROBLEMS = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}


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
    sites = ("embedding", "attention", "hidden", "path", "head")
    rates = dict.fromkeys(sites, dropout) if isinstance(dropout, float | int) else dict(dropout or {})
    if isinstance(dropout, float | int):
        del rates["path"]  # "every site" means those a checkpoint has; drop path is asked for by name
    for site, rate in rates.items():
        if site not in sites or not 0 <= rate < 1:
            raise ModelError(f"dropout {site} = {rate!r}: sites are {', '.join(sites)}, rates from 0 to below 1")
    return rates


def choose_problem(wanted: str | None, raw: dict[str, Any], head: str, head_in_file: bool) -> str:
    """The file's own for the file's own head; a head with a label for every token is always single-label."""
    choices = PROBLEMS if head in LABELLED and head != "token-classification" else PROBLEMS[:1]
    named = {theirs: ours for ours, theirs in HUB_PROBLEMS.items() if ours in choices}
    problem = wanted or (named.get(str(raw.get("problem_type"))) if head_in_file else None) or "single-label"
    if problem not in choices:
        raise ModelError(f"problem = {problem!r}: for a {head} head, choose from {', '.join(choices)}")
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
    saved = named[0] if isinstance(named, list) and named else None
    trained = choose_pooling(None, raw, architecture)
    if saved in architecture.heads.values() and saved != hub_class(architecture, head, trained):
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
    if wanted is None:
        return in_file or [f"LABEL_{i}" for i in range(_num_labels(raw, folder))]  # the hub's default names
    if not head_in_file:
        return list(wanted)
    if sorted(wanted) != sorted(in_file):
        known = in_file or "no labels (config.json has no id2label)"
        raise ModelError(
            f"{folder}: its head knows {known}, the data has {list(wanted)}; --model.head_init reset starts a new head"
        )
    return in_file


def _num_labels(raw: dict[str, Any], folder: Path) -> int:
    count = raw.get("num_labels", 2)
    if type(count) is not int or not 0 < count <= 2**20:
        raise ModelError(f"{folder / 'config.json'}: num_labels = {reprlib.repr(count)} should be from 1 to {2**20}")
    return count
