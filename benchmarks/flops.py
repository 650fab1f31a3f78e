"""How much arithmetic a step needs, and how fast this machine multiplies matrices: their quotient is the utilisation.

Model FLOPs count what the mathematics needs and nothing else: tokens that exist, an output matrix at supervised
positions only, no recomputation (Chowdhery et al. 2022, "PaLM", appendix B). A product of (rows, in) and (in, out) is
2 * rows * in * out; norms, activations, lookups and the softmax are left out. The scores of causal attention are
counted whole, as PaLM and nanoGPT count them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from data import Batch
from models import TaskModel
from models.lora import LoraLinear

# Dense TFLOP/s that the makers state, the first name that is part of the device's.
DATASHEETS: dict[str, dict[str, float]] = {
    "H100 PCIe": {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51},
    "H100": {"bf16": 989, "fp16": 989, "tf32": 495, "fp32": 67},
    "H200": {"bf16": 989, "fp16": 989, "tf32": 495, "fp32": 67},
    "A100": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    "V100": {"fp16": 125, "fp32": 15.7},
    "T4": {"fp16": 65, "fp32": 8.1},
}
BESIDE = ("key", "value", "linear")  # projections of what the one registered before them reads too
PER_TOKEN = ("token-classification", "question-answering")  # heads with a row for every token


class Sizes(NamedTuple):
    """What decides the FLOPs of a micro-batch; kept of a Batch in the place of its tensors."""

    examples: int
    targets: int
    lengths: tuple[int, ...]  # of each sequence, or image
    decoder_lengths: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """All that the model reads."""
        return sum(self.lengths) + sum(self.decoder_lengths)

    @classmethod
    def of(cls, batch: Batch) -> Sizes:
        count = len(batch.ids)
        images = (batch.image_tokens // count,) * count if batch.image_tokens else ()
        return cls(count, batch.num_targets, (*batch.lengths, *images), batch.decoder_lengths)


class Product(NamedTuple):
    """One matrix product of the forward pass, (rows, inner) x (inner, columns), and how many the backward adds."""

    name: str
    rows: int
    inner: int
    columns: int
    backward: int  # 1 for the gradient of the weight where it is trained, 1 for that of the input where one is needed

    @property
    def flops(self) -> float:
        """Of forward and backward."""
        return 2.0 * self.rows * self.inner * self.columns * (1 + self.backward)


def products(model: TaskModel, sizes: Sizes) -> Iterator[Product]:
    """Those with a weight."""
    needs = inputs_with_gradient(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            rows, inner, columns = _rows(name, model, sizes), module.weight[0].numel(), len(module.weight)
            yield Product(name, rows, inner, columns, module.weight.requires_grad + needs[name])
            if isinstance(module, LoraLinear):
                yield Product(name, rows, inner, module.rank, 1 + needs[name])
                yield Product(name, rows, module.rank, columns, 2)


def inputs_with_gradient(model: TaskModel) -> dict[str, bool]:
    """{module: whether the backward goes on below it}: where anything that comes before it is trained.

    Modules are registered in the order in which they run. But those of BESIDE read what their parent reads, a decoder
    begins with the embeddings anew and reads the encoder in cross-attention, and below the pixels there is nothing.
    """
    below, needs = False, dict[str, bool]()
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        needs[name] = below and not isinstance(module, nn.Conv2d)
        if own in BESIDE:
            needs[name] = needs[parent]
        if name == "backbone.decoder":
            below = model.backbone.embedding.weight.requires_grad
        elif _reads_source(name):
            needs[name] = needs["backbone.decoder"]
            below = below or needs[name]
        below = below or any(p.requires_grad for p in module.parameters(recurse=False))
    return needs


def _reads_source(name: str) -> bool:
    return ".cross_attention." in name and name.endswith((".key", ".value"))


def _rows(name: str, model: TaskModel, sizes: Sizes) -> int:
    """How many vectors this layer reads."""
    source, written = sum(sizes.lengths), sum(sizes.decoder_lengths)
    part = name.split(".")
    if part[0] == "head":
        head = model.origin.head or ""
        if head.endswith("-lm"):
            return sizes.targets
        return source if head in PER_TOKEN else len(sizes.lengths)
    if part[1] == "patch_embeddings":
        return source - model.backbone.num_special * len(sizes.lengths)
    if part[1] == "decoder":
        return source if _reads_source(name) else written
    return source


def attention_flops(model: TaskModel, sizes: Sizes) -> float:
    """Scores and weighted sums of all layers, forward and backward: each product is 2 * (L * S * D)."""
    total, needs = 0.0, inputs_with_gradient(model)
    for name, module in model.named_modules():
        if hasattr(module, "num_heads") and isinstance(getattr(module, "output", None), nn.Linear):
            queries = keys = sizes.decoder_lengths if name.split(".")[1] == "decoder" else sizes.lengths
            keys = sizes.lengths if getattr(module, "cross", False) else keys
            pairs = sum(q * k for q, k in zip(queries, keys, strict=True))
            projections = ("qkv",) * 3 if hasattr(module, "qkv") else ("query", "key", "value")
            q, k, v = (
                needs[f"{name}.{part}"] or any(p.requires_grad for p in getattr(module, part).parameters())
                for part in projections
            )
            backward = (q or k) + q + k + v  # gradients of the scores, and of each of the three
            total += 2.0 * pairs * module.output.in_features * (2 + backward)
    return total


def model_flops(model: TaskModel, sizes: Sizes) -> float:
    """Of one micro-batch, forward and backward; what is frozen spares its part of the backward."""
    return sum(product.flops for product in products(model, sizes)) + attention_flops(model, sizes)


def gemm_peak(model: TaskModel, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of the products that most of this micro-batch's FLOPs are in, alone and in `dtype`."""
    alike: dict[tuple[int, int, int], float] = {}
    for product in products(model, sizes):
        shape = (product.rows, product.inner, product.columns)
        alike[shape] = alike.get(shape, 0.0) + product.flops
    largest = sorted(alike, key=alike.__getitem__, reverse=True)[:4]
    return max(_product_rate(shape, dtype, device) for shape in largest if all(shape))


def _product_rate(shape: Sequence[int], dtype: torch.dtype, device: torch.device, rounds: int = 7) -> float:
    """FLOP/s, the best of some rounds of at least 20 ms."""
    rows, inner, columns = shape
    x = torch.randn(rows, inner, dtype=dtype, device=device)
    weight = torch.randn(columns, inner, dtype=dtype, device=device)

    def seconds(count: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            F.linear(x, weight)
        _wait(device)
        return time.perf_counter() - start

    with torch.no_grad():
        seconds(2)  # the first one sets things up
        count = max(1, round(0.02 / seconds(2) * 2))
        best = min(seconds(count) for _ in range(rounds))
    return 2.0 * rows * inner * columns * count / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def datasheet(device: torch.device, precision: str) -> float | None:
    """FLOP/s that the maker states, None for a device or precision that is not in the table. precision: tf32 too."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    stated = next((rates for part, rates in DATASHEETS.items() if part in name), {})
    return stated[precision] * 1e12 if precision in stated else None


def clock(device: torch.device) -> Callable[[], float]:
    """A perf_counter that first waits for the device."""

    def now() -> float:
        _wait(device)
        return time.perf_counter()

    return now
