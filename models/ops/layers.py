"""Small parts shared by the architectures. Shapes: models/ops/packing.py.

Activations, dropout rates, MLP, fp32 for what exceeds fp16, drop path, pooling, normal initialisation, activation
checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.ops.packing import Packing, Padded, to_device

GELU_TANH = partial(F.gelu, approximate="tanh")
# The names in config.json. transformers writes some functions in several ways, which differ by rounding only.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_10": lambda x: F.gelu(x).clamp(-10.0, 10.0),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), GELU_TANH),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "swish": F.silu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}
# The first token of a sequence, the mean of all, the last; of an image the class token beside the mean of the patches.
POOLINGS = ("cls", "mean", "last", "cls_mean")


class DropoutRates(NamedTuple):
    """The dropout rates of a backbone by site: the field `rates` in the config of every architecture."""

    embedding: float = 0.0
    attention: float = 0.0  # the attention weights
    hidden: float = 0.0  # each branch before it joins the residual
    drop_path: float = 0.0  # whole branches of a sequence, rising linearly to this rate in the last layer

    def layer_drop_path_rate(self, layer: int, num_layers: int) -> float:
        """Return the drop-path rate of one layer: 0 in the first, `drop_path` in the last."""
        return self.drop_path * layer / max(1, num_layers - 1)


NO_DROPOUT = DropoutRates()


class MLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str):
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)"""
        out: Tensor = self.down(self.activation(self.up(x)))
        return out


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the precision of matrix products of x: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def outside_fp16(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return function(x), computed in fp32 where autocast would use fp16, whose largest number is 65,504."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) != torch.float16:
        return function(x)
    with torch.autocast(device, enabled=False):
        return function(x.float())


def drop_path(x: Tensor, packing: Packing, rate: float) -> Tensor:
    """Zero the branch `x`, (T, D), for a random share of the sequences; scale the others up (Huang et al. 2016).

    With a Selection x is (R, D).
    """
    if not rate:
        return x
    lengths = packing.whole.lengths
    kept = torch.empty(len(lengths), device=x.device, dtype=x.dtype).bernoulli_(1 - rate) / (1 - rate)
    kept = torch.repeat_interleave(kept, packing.whole.cu_seqlens.diff(), output_size=sum(lengths))
    return x * packing.take(kept).unsqueeze(1)


def mean_pool(hidden: Tensor, packing: Packing, skip: int = 0) -> Tensor:
    """Return (B, D), the mean of the token vectors of each sequence without its first `skip`. hidden: (T, D)."""
    if isinstance(packing, Padded):
        return packing.mean(hidden, skip)
    means = [
        torch.unflatten(hidden[tokens], 0, (count, length))[:, skip:].mean(1) for tokens, count, length in packing.runs
    ]
    return torch.cat(means) if means else hidden[:0]


def first_pool(hidden: Tensor, packing: Packing) -> Tensor:
    """Return (B, D), the first token vector of each sequence ([CLS]). hidden: (T, D)."""
    return hidden[packing.cu_seqlens[:-1].long()]


def last_pool(hidden: Tensor, packing: Packing) -> Tensor:
    """Return (B, D), the last token vector of each sequence, which in a causal model depends on all tokens."""
    return hidden[packing.cu_seqlens[1:].long() - 1]


def mean_by_example(x: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Return (N, C), the means over runs of counts[0], counts[1], ... rows of x, in fp32 or wider. x: (B, C)."""
    sizes = torch.tensor(counts, dtype=torch.int64)
    rows = to_device(torch.repeat_interleave(torch.arange(len(counts)), sizes), x.device)
    x = upcast(x)
    sums = x.new_zeros(len(counts), x.shape[1]).index_add(0, rows, x)
    return sums / to_device(sizes, x.device)[:, None]


def upcast(x: Tensor) -> Tensor:
    """Return x in fp32, or in fp64 if it is fp64; losses are computed in this precision."""
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def init_normal(module: nn.Module, std: float, generator: torch.Generator, skip: Collection[Tensor] = ()) -> None:
    """Initialise every Linear, Embedding and Conv below `module` from Normal(0, std), biases 0, LayerNorms identity.

    Weights are drawn in the fixed order of module.modules() and from one generator, so that the seed decides every
    weight. A parameter that is no part of such a layer (a class token) is initialised by the architecture.
    skip: weights that are tied to those of another module; they keep their values, and no numbers are drawn for them.
    """
    tied = set(skip)
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d):
            if child.weight not in tied:
                child.weight.normal_(0.0, std, generator=generator)
            if not isinstance(child, nn.Embedding) and child.bias is not None:
                child.bias.zero_()
        elif isinstance(child, nn.LayerNorm):
            child.weight.fill_(1.0)
            if child.bias is not None:
                child.bias.zero_()


class Layered(Protocol):
    """The part of a backbone that checkpoint_activations and compile_layers use."""

    @property
    def layers(self) -> Iterable[nn.Module]:
        """The layers from the input to the output."""


class LayeredModel(Protocol):
    """The part of a TaskModel that checkpoint_activations and compile_layers use."""

    @property
    def backbone(self) -> Layered:
        """The module that has the layers."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield every parameter, as nn.Module.parameters does."""


def checkpoint_activations(model: LayeredModel) -> None:
    """Store only the input of each layer, and compute the layer again in the backward (Chen et al. 2016).

    A step takes about a third longer, and its memory no longer grows with the activations inside the layers. The second
    forward has the same dropout, so the gradients are the same. Names of parameters and checkpoints stay as they are.
    """
    for layer in model.backbone.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
