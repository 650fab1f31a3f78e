"""LoRA (Hu et al. 2021): train only a low-rank update of chosen projections, y = W x + (alpha / rank) B A x.

DoRA (Liu et al. 2024) also trains the length m of each row of W' = W + (alpha / rank) B A: y = (m / |W'|) W' x.

models.add_lora(model, rank=8, targets=["*.query", "*.value"])
... train: only A, B and a classification head have gradients ...
models.save_pretrained(model, "merged")      # an ordinary checkpoint, the update added to W
models.save_adapter(model, "adapter")        # only A, B and the head, as peft reads them (models/adapter.py)
models.load_adapter(model, "adapter")        # ours or peft's, into a model built the same way
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoints.weights import saved_tensors
from models.errors import ModelError
from models.frozen_linear import FrozenLinear
from models.task_model import TaskModel

DEFAULT_TARGETS = ("*.query", "*.value", "*.qkv")  # the projections of the paper; a fused one is changed as a whole


class LoraLinear(FrozenLinear):
    """A frozen linear layer with a trained update of rank r; of DoRA with trained lengths of the rows too."""

    lora_magnitude: nn.Parameter | None  # (out,)

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, dropout: float, generator: torch.Generator, dora: bool = False
    ):
        super().__init__(base)
        self.rank, self.alpha, self.rate = rank, alpha, dropout
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        bound = base.in_features**-0.5
        a = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a.to(base.weight))  # (r, in)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank).to(base.weight))  # so that training starts at W
        self.lora_magnitude = nn.Parameter(base.weight.detach().norm(dim=1)) if dora else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        dropped = self.dropout(x)
        update = F.linear(F.linear(dropped, self.lora_a), self.lora_b)
        out = self.product(x)
        if self.lora_magnitude is None:
            return out + self.scale * update
        # As in peft, what the lengths change of W x sees the dropout too, and the norm is a constant for the gradient
        # (section 4.3 of the paper).
        factor = self.lora_magnitude / self._sum().detach().norm(dim=1).to(self.lora_magnitude.dtype)
        direct = self.product(dropped) if self.training and self.dropout.p else out
        if self.bias is not None:
            direct = direct - self.bias
        change: Tensor = (factor - 1) * direct + factor * self.scale * update
        return out + change.to(out.dtype)

    @torch.no_grad()
    def store_as(self, storage: str) -> None:
        """Round the weight to `storage`, before training: DoRA starts from the lengths of the rounded rows."""
        super().store_as(storage)
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(self.whole_weight().norm(dim=1))

    def merged_weight(self) -> Tensor:
        """Return the weight of one linear layer that computes the same, rounded once, to the precision of W."""
        total, weight = self._sum(), self.whole_weight()
        if self.lora_magnitude is not None:
            total *= (self.lora_magnitude.to(total.dtype) / total.norm(dim=1))[:, None]
        return total.to(weight.dtype)

    def _sum(self) -> Tensor:
        """Return W + (alpha / rank) B A, summed in fp32 or wider."""
        weight = self.whole_weight().detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        update = self.lora_b.detach().to(wide) @ self.lora_a.detach().to(wide)
        total: Tensor = weight.to(wide) + self.scale * update
        return total


def add_lora(
    model: TaskModel,
    rank: int,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] = DEFAULT_TARGETS,
    dora: bool = False,
    seed: int = 0,
) -> list[str]:
    """Freeze the model, add an update of rank `rank` to chosen linear layers of its backbone; return their names.

    targets: shell patterns of module names ("*.query", "backbone.layers.3.*"). alpha: 2 * rank unless given.
    The head is trained as a whole, unless it is a language model's. A starts uniform in +-1/sqrt(in) from `seed`, B at
    zero. dora: also train the lengths of the rows of the weights, which must have been read.
    Raises ModelError when no pattern fits any layer, and for a model that has LoRA layers already.
    """
    if rank < 1:
        raise ModelError(f"model.lora.rank = {rank} must be at least 1")
    if lora_layers(model):
        raise ModelError(
            "this model has LoRA layers already, and a second update would discard what they learned; "
            "save it with models.save_pretrained, which merges them, and load that folder to add new ones"
        )
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("backbone.")}
    chosen = [name for name in linear if any(fnmatchcase(name, pattern) for pattern in targets)]
    if not chosen:
        matching = ", ".join(dict.fromkeys("*." + name.rpartition(".")[2] for name in linear))
        raise ModelError(
            f"model.lora.target_modules = {', '.join(targets)!r} matches no linear layer; these would: {matching}"
        )
    model.requires_grad_(False)
    for head in model.head.heads if model.head is not None else []:
        head.requires_grad_(not head.is_language_model)
    generator = torch.Generator().manual_seed(seed)
    for name in chosen:
        parent, _, last = name.rpartition(".")
        layer = LoraLinear(linear[name], rank, 2.0 * rank if alpha is None else alpha, dropout, generator, dora)
        setattr(model.get_submodule(parent), last, layer)
    return chosen


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return {name: layer} of the LoRA layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def merged_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, value) of all that is saved of the model without LoRA, the updates added to the weights."""
    layers = lora_layers(model)
    for name, tensor in base_tensors(model):
        owner, _, last = name.rpartition(".")
        is_changed = owner in layers and last == "weight"
        yield name, layers[owner].merged_weight().detach() if is_changed else tensor


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the same names as merged_tensors, with tensors of the same shapes, without the updates."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    for name, tensor in saved_tensors(model).items():
        owner, _, last = name.rpartition(".")
        if owner in layers and last == "weight":
            yield name, layers[owner].whole_weight().detach()
        elif owner not in layers or last == "bias":
            yield name, tensor.detach()
