"""The declaration of an architecture, as in models/bert.py, and the Protocols of its config and its module."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from models.checkpoints.tensor_files import JsonObject
from models.checkpoints.weights import WeightTable
from models.errors import ModelError
from models.generation.cache import Cache
from models.heads import Head, HeadShape
from models.inputs import ModelInputs, Reads
from models.ops.layers import POOLINGS, DropoutRates
from models.ops.packing import Packing

MAX_SIZE = 2**24  # the limit of every size in config.json, far above those of published models


class BackboneConfig(Protocol):
    """The fields of every config, a frozen dataclass of what changes the mathematics."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def hidden_size(self) -> int:
        """The width D of the hidden states."""

    @property
    def initializer_range(self) -> float:
        """The standard deviation of new weights."""

    @property
    def rates(self) -> DropoutRates:
        """The dropout rates."""


class Backbone(Protocol):
    """An nn.Module from inputs to hidden states.

    - A backbone to which an output matrix can be tied also has `embedding`, an nn.Embedding.
    - A layer that drops paths has its rate as `drop_path_rate`.
    - Its forward may also have the parameter `reads` (models/inputs.py). It then may compute the last hidden states
      only of the tokens that reads(packing, inputs) selects, and return them, (R, D), with the Selection.
    """

    @property
    def config(self) -> BackboneConfig:
        """The config that the module was built from."""

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of a sequence."""

    @property
    def layers(self) -> Iterable[nn.Module]:
        """The layers from the input to the output."""

    def __call__(
        self, inputs: ModelInputs, cache: Cache | None = None, *, reads: Reads | None = None
    ) -> tuple[Tensor, Packing]:
        """Return the hidden states (T, D) and their packing. Only a backbone that generates text takes a cache."""

    def init_weights(self, generator: torch.Generator, modules: Iterable[nn.Module] = ()) -> None:
        """Initialise every weight from `generator`, or only those of `modules`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield every parameter, as nn.Module.parameters does."""


ConfigT = TypeVar("ConfigT", bound=BackboneConfig)


@dataclass(frozen=True)
class Architecture(Generic[ConfigT]):
    """The declaration of one value of config.json's model_type."""

    read_config: Callable[[JsonObject], ConfigT]  # config.json -> config; ModelError for unsupported values
    build: Callable[[ConfigT, type[Head] | None], Backbone]
    # (config, name of the head, its class, pooling); labels and losses are filled in later
    head_shape: Callable[[ConfigT, str, type[Head], str], HeadShape]
    weights: WeightTable
    heads: Mapping[str | None, str]  # supported heads -> the class of transformers that reads their export
    depth: tuple[str, ...]  # the fields of config.json that say how many layers there are
    pooling: str = "cls"  # the default; a checkpoint or a recipe may have another
    poolings: tuple[str, ...] = POOLINGS[:3]  # the choices; images have another one instead of the last token
    hub_poolings: tuple[str, ...] = ()  # those that transformers' classifier can have; (): only the default
    pooling_field: str = ""  # of config.json, that says which of hub_poolings; "": none
    complete: Callable[[JsonObject], JsonObject] = dict  # add to config.json the fields that others imply
    # Names of parameters of two dimensions or more to which weight decay and the penalties (l1, l2, l2_sp) never apply,
    # in any model that has one. (Biases and norms, of one dimension, are never decayed; matrices and embeddings are,
    # those of text positions too.)
    no_weight_decay: tuple[str, ...] = ()


# Each entry of ARCHITECTURES has its own config class, which the type of a dictionary cannot express.
AnyArchitecture: TypeAlias = Architecture[Any]


def read_fields(
    cls: type[ConfigT],
    raw: JsonObject,
    names: Mapping[str, str] | None = None,
    supported: Mapping[str, Sequence[object]] | None = None,
) -> ConfigT:
    """Return a config dataclass from config.json: the fields it declares, each a number, text or bool like its default.

    names: {our field: the hub's}, where they differ.
    supported: {hub field: implemented values}, for fields that change the mathematics. Raises ModelError for any other
    value, and for a value of the wrong type or size.
    """
    for name, values in (supported or {}).items():
        if name in raw and raw[name] not in values:
            choices = ", ".join(map(repr, values))
            shown = reprlib.repr(raw[name])
            raise ModelError(f"config.json: {name} = {shown} is not supported; this architecture takes {choices}")
    given = {}
    for declared in fields(cls):
        name = (names or {}).get(declared.name, declared.name)
        value = raw.get(name)
        if declared.name in ("rates", "head_rates") or value is None:
            continue
        annotation = getattr(declared.type, "__name__", str(declared.type))  # a type, or its name as text
        given[declared.name] = _check_field(name, value, annotation, declared.default)
    return cls(**given)


def with_own_names(raw: JsonObject, names: Mapping[str, str]) -> JsonObject:
    """Return config.json with the common names of sizes replaced by the architecture's, where it lacks these.

    transformers accepts both. names: as for read_fields.
    """
    common = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    theirs = {names[name]: raw[name] for name in common if name in names and name in raw}
    return theirs | raw


def _check_field(name: str, value: Any, annotation: str, example: object) -> Any:
    """Return the value of a field; ModelError unless it fits the annotation of the dataclass field and the limits."""
    expected: Any = {"int": int, "float": int | float, "str": str, "bool": bool}[annotation.split(" ")[0]]
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ModelError(f"config.json: {name} = {reprlib.repr(value)} should be like {example!r}")
    if expected in (str, bool):
        return value
    minimum = -1 if name.endswith("_id") else 1 if expected is int and name != "type_vocab_size" else 0
    if not minimum <= value <= MAX_SIZE:
        bound = f"at least {minimum}" if value < minimum else f"at most {MAX_SIZE}"
        raise ModelError(f"config.json: {name} = {reprlib.repr(value)} should be {bound}")
    return value


def read_rates(raw: JsonObject, **sites: tuple[str, float]) -> dict[str, float]:
    """Return {site: rate} for {site: (the hub's field, its default)}; ModelError unless 0 <= rate < 1."""
    rates = {}
    for site, (name, default) in sites.items():
        value = raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ModelError(f"config.json: {name} = {reprlib.repr(value)} should be a rate from 0 to below 1")
        rates[site] = float(value)
    return rates


def check_divides(size_name: str, size: int, heads_name: str, heads: int) -> None:
    """Raise ModelError unless the hidden size splits into equal attention heads."""
    if size % heads:
        raise ModelError(f"config.json: {size_name} = {size} is not a multiple of {heads_name} = {heads}")
