"""What a file like models/bert.py tells the rest of the package about one kind of checkpoint."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from models.checkpoints.weights import WeightTable
from models.errors import ModelError
from models.heads import HeadShape

C = TypeVar("C")
LARGEST = 2**24  # of any size in config.json; no model comes near it


@dataclass(frozen=True)
class Architecture:
    """One value of config.json's model_type.

    `config` is a frozen dataclass with at least hidden_size, num_hidden_layers, initializer_range and
    `rates: DropoutRates`. A backbone is a module with forward(batch) -> (hidden states (T, D), Packing), config,
    max_length, `layers` from the input to the output, init_weights(generator, modules), where a language model's
    output may be tied to it `embedding`, and where it writes text forward(batch, cache) (models/generation/cache.py).
    """

    read_config: Callable[[dict[str, Any]], Any]  # config.json -> config; ModelError for what it does not support
    build: Callable[[Any, str | None], nn.Module]  # (config, head) -> backbone
    head_shape: Callable[[Any, str, str], HeadShape]  # (config, head, pooling); labels and losses are filled in later
    weights: WeightTable
    heads: Mapping[str | None, str]  # the heads it takes -> the class of transformers that reads their export
    depth: tuple[str, ...]  # the fields of config.json that say how many layers there are
    pooling: str = "cls"  # unless the checkpoint or the recipe says otherwise
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict  # config.json -> with the fields that others imply


def read_fields(
    cls: type[C],
    raw: dict[str, Any],
    names: Mapping[str, str] | None = None,
    supported: Mapping[str, Sequence[Any]] | None = None,
) -> C:
    """A config dataclass from config.json: the fields it declares, each a number, text or bool like its default.

    names: {our field: the hub's}, where they differ. supported: {hub field: values}, for settings that change the
    mathematics and of which only these values are implemented; any other is refused by name.
    """
    for name, values in (supported or {}).items():
        if name in raw and raw[name] not in values:
            choices = ", ".join(map(repr, values))
            shown = reprlib.repr(raw[name])
            raise ModelError(f"config.json: {name} = {shown} is not supported; this architecture takes {choices}")
    given = {}
    for declared in fields(cls):  # type: ignore[arg-type]
        name = (names or {}).get(declared.name, declared.name)
        value = raw.get(name)
        if declared.name in ("rates", "head_rates") or value is None:
            continue
        given[declared.name] = _checked(name, value, str(declared.type), declared.default)
    return cls(**given)


def _checked(name: str, value: Any, kind: str, example: Any) -> Any:
    good: Any = {"int": int, "float": int | float, "str": str, "bool": bool}[kind.split(" ")[0]]
    if not isinstance(value, good) or (isinstance(value, bool) and good is not bool):
        raise ModelError(f"config.json: {name} = {reprlib.repr(value)} should be like {example!r}")
    if good in (str, bool):
        return value
    least = -1 if name.endswith("_id") else 1 if good is int and name != "type_vocab_size" else 0
    if not least <= value <= LARGEST:
        bound = f"at least {least}" if value < least else f"at most {LARGEST}"
        raise ModelError(f"config.json: {name} = {reprlib.repr(value)} should be {bound}")
    return value


def read_rates(raw: dict[str, Any], **sites: tuple[str, float]) -> dict[str, float]:
    """{site: rate} for {site: (the hub's field, its default)}; ModelError unless 0 <= rate < 1."""
    rates = {}
    for site, (name, default) in sites.items():
        value = raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ModelError(f"config.json: {name} = {reprlib.repr(value)} should be a rate from 0 to below 1")
        rates[site] = float(value)
    return rates


def check_divides(raw_name: str, size: int, heads_name: str, heads: int) -> None:
    """ModelError unless the hidden size splits into equal attention heads."""
    if size % heads:
        raise ModelError(f"config.json: {raw_name} = {size} is not a multiple of {heads_name} = {heads}")


@torch.no_grad()
def init_normal(module: nn.Module, std: float, generator: torch.Generator, skip: Collection[Tensor] = ()) -> None:
    """Every Linear, Embedding and Conv2d below `module` from Normal(0, std), biases 0, LayerNorms at identity.

    In the fixed order of module.modules() and from one generator, so that the seed decides every weight. A parameter
    that a module owns itself (a class token) is the architecture's to initialise. skip: weights of another module that
    are tied to one of these; nothing is drawn for them.
    """
    tied = set(skip)
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Embedding | nn.Conv2d):
            if child.weight not in tied:
                child.weight.normal_(0.0, std, generator=generator)
            if not isinstance(child, nn.Embedding) and child.bias is not None:
                child.bias.zero_()
        elif isinstance(child, nn.LayerNorm):
            child.weight.fill_(1.0)
            child.bias.zero_()
