"""LoRA (Hu et al. 2021): train a low-rank change of chosen projections, y = W x + (alpha / rank) B A x, and no more.

models.add_lora(model, rank=8, targets=["*.query", "*.value"])
... train: only A, B and a classification head have gradients ...
models.save_pretrained(model, "merged")      # an ordinary checkpoint, the change added to W
models.save_adapter(model, "adapter")        # A, B and the head alone: small, and what peft reads
models.load_adapter(model, "adapter")        # ours or peft's, into a model built the same way
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from models.checkpoints.tensor_files import TensorFiles, read_json
from models.errors import ModelError

if TYPE_CHECKING:
    from models import TaskModel

DEFAULT_TARGETS = ("*.query", "*.value", "*.qkv")  # the projections of the paper, fused ones whole
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"

# An adapter_config.json may say more than we compute. These fields have no part in y, or the tensors tell the same;
# init_lora_weights has none when the start left W alone; any other is refused by name unless it is off.
UNREAD = (
    *("peft_type", "r", "lora_alpha", "init_lora_weights"),  # compared
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "modules_to_save", "lora_dropout", "fan_in_fan_out"),
    *("megatron_core", "qalora_group_size", "eva_config"),  # of what is off, or of the start
)
STARTS: tuple[Any, ...] = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
OFF: tuple[Any, ...] = (None, False, "none", "", [], {})


class LoraLinear(nn.Linear):
    """A linear layer, frozen, with a trained change of rank r. Its weight and bias keep their names."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, generator: torch.Generator):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.rate = rank, alpha, dropout
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        bound = base.in_features**-0.5
        a = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a.to(base.weight))  # (r, in)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank).to(base.weight))  # so that training starts at W

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + self.scale * change

    def merged(self) -> Tensor:
        """W + (alpha / rank) B A, summed in fp32 or wider and rounded once, to the precision of W."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        change = self.lora_b.to(wide) @ self.lora_a.to(wide)
        return (self.weight.to(wide) + self.scale * change).to(self.weight.dtype)


def add_lora(
    model: TaskModel,
    rank: int,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] = DEFAULT_TARGETS,
    seed: int = 0,
) -> list[str]:
    """Freeze the model and give the linear layers of its backbone that match `targets` a change of rank `rank`.

    targets: shell patterns of module names ("*.query", "backbone.layers.3.*"). alpha: 2 * rank unless given. A new or
    published classification head goes on being trained, whole; a language model's does not. A starts uniform in
    +-1/sqrt(in) from `seed`, B at zero. Returns the names of the changed layers; ModelError when no pattern fits any
    layer, and for a model that has LoRA layers already.
    """
    if rank < 1:
        raise ModelError(f"model.lora.rank = {rank} must be at least 1")
    if lora_layers(model):
        raise ModelError(
            "this model has LoRA layers already, and a second change would drop what they learnt; "
            "models.save_pretrained merges them, and from_pretrained of that folder takes new ones"
        )
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("backbone.")}
    chosen = [name for name in linear if any(fnmatchcase(name, pattern) for pattern in targets)]
    if not chosen:
        some = ", ".join(dict.fromkeys("*." + name.rpartition(".")[2] for name in linear))
        raise ModelError(
            f"model.lora.target_modules = {', '.join(targets)!r} matches no linear layer; these would: {some}"
        )
    model.requires_grad_(False)
    if model.head is not None and not model.head.shape.vocab_size:
        model.head.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    for name in chosen:
        parent, _, last = name.rpartition(".")
        changed = LoraLinear(linear[name], rank, 2.0 * rank if alpha is None else alpha, dropout, generator)
        setattr(model.get_submodule(parent), last, changed)
    return chosen


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers of a model that LoRA has changed, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of every parameter as an ordinary model would have it, changes added and not named apart."""
    layers = lora_layers(model)
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        if owner not in layers or last == "bias":
            yield name, parameter.detach()
        elif last == "weight":
            yield name, layers[owner].merged().detach()


def save_adapter(model: TaskModel, folder: str | Path) -> None:
    """Write A, B and a trained head, and a config, in the names and the form that peft reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = lora_layers(model)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in _adapter_tensors(model).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(_adapter_config(model, layers), indent=2) + "\n", encoding="utf-8")


def load_adapter(model: TaskModel, folder: str | Path) -> None:
    """Copy an adapter, ours or peft's, into a model that add_lora has prepared in the same way.

    A part of the head that the adapter was not trained with stays as it is where it came from the base's file (peft
    leaves out BERT's pooler). ModelError where adapter and model differ, in config or in tensors.
    """
    path = Path(folder) / WEIGHTS_FILE
    ours = _adapter_tensors(model)
    trained = _check_config(Path(folder) / CONFIG_FILE, lora_layers(model))
    new = {parameter for name, parameter in model.named_parameters() if name in set(model.report.initialised)}
    with ExitStack() as stack:
        files = TensorFiles([path], stack)
        odd = files.where.keys() - ours.keys()
        for key in ours.keys() - files.where.keys():
            if ".lora_" in key or ours[key] in new or any(f".{module}." in key for module in trained):
                odd.add(key)
        if odd:
            raise ModelError(
                f"{path}: its tensors are not those of this model's adapter (differing: "
                f"{', '.join(sorted(odd)[:4])}); the targets and the head must be those it was trained with"
            )
        with torch.no_grad():
            for key in files.where:
                shape, parameter = files.where[key].shape, ours[key]
                if shape != parameter.shape:
                    raise ModelError(f"{path}: {key} has shape {list(shape)}, not {list(parameter.shape)}")
                files.read_into(key, parameter)


def _check_config(path: Path, layers: dict[str, LoraLinear]) -> list[str]:
    """The modules that an adapter's config says were trained whole; ModelError unless its change is that of `layers`.

    Which layers it changes, the names of its tensors say.
    """
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; without it nobody knows the adapter's alpha") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: not the config of a LoRA adapter (peft_type = LORA)")
    if not layers:
        raise ModelError("this model has no LoRA layers to load an adapter into; models.add_lora makes them")
    first = next(iter(layers.values()))
    for name, setting, value in (("r", "rank", first.rank), ("lora_alpha", "alpha", first.alpha)):
        if config.get(name) != value:
            theirs = reprlib.repr(config.get(name))
            raise ModelError(f"{path}: {name} = {theirs}, but this model has model.lora.{setting} = {value:g}")
    start = config.get("init_lora_weights")
    if start not in STARTS:
        raise ModelError(f"{path}: init_lora_weights = {reprlib.repr(start)} is not supported: it changes the base too")
    for name, value in config.items():
        if name not in UNREAD and value not in OFF:
            raise ModelError(f"{path}: {reprlib.repr(name)} = {reprlib.repr(value)} is not supported in an adapter")
    trained = config.get("modules_to_save") or []
    if not isinstance(trained, list):
        raise ModelError(f"{path}: modules_to_save = {reprlib.repr(trained)} is no list of names")
    return [str(module) for module in trained]


def _hub_name(model: TaskModel, ours: str) -> str:
    """The hub's name of a parameter, as peft writes it before "lora_A"."""
    table = model.origin.architecture.weights
    return "base_model.model." + table.exported_name(ours, model.origin.head)


def _adapter_tensors(model: TaskModel) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        key = _hub_name(model, f"{name}.weight").removesuffix(".weight")
        tensors |= {f"{key}.lora_A.weight": layer.lora_a, f"{key}.lora_B.weight": layer.lora_b}
    if model.head is not None:
        for name, parameter in model.head.named_parameters():
            if parameter.requires_grad:
                tensors[_hub_name(model, f"head.{name}")] = parameter
    return tensors


def _adapter_config(model: TaskModel, layers: dict[str, LoraLinear]) -> dict[str, Any]:
    if not layers:
        raise ModelError("this model has no LoRA layers to save; models.save_pretrained writes the whole of it")
    first = next(iter(layers.values()))
    table, head = model.origin.architecture.weights, model.origin.head
    names = [table.exported_name(f"{name}.weight", head).removesuffix(".weight") for name in layers]
    trained = [f"head.{name}" for name, p in (model.head or nn.Module()).named_parameters() if p.requires_grad]
    modules = sorted({table.exported_name(name, head).rpartition(".")[0] for name in trained})
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": model.report.source,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.rate,  # as asked for: a schedule may have changed that of this step
        "target_modules": names,
        "modules_to_save": modules or None,
        "fan_in_fan_out": any(table.row_of(f"{name}.weight", head).transpose for name in layers),
        "bias": "none",
        "inference_mode": True,
    }
