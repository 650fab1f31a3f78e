"""Model FLOPs of a step and the matrix-product rate of this machine; their quotient is the utilisation (MFU).

Model FLOPs count only what the mathematics requires (Chowdhery et al. 2022, "PaLM", appendix B):
- tokens without padding, the output matrix at supervised positions only, no recomputation;
- behind the keys and values of the last layer, only the tokens that the head reads;
- 2 * rows * in * out for a product of (rows, in) and (in, out);
- the full score matrix of causal attention, as PaLM and nanoGPT count it.

Norms, activations, lookups and the softmax are not counted.
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
from models.ops.attention import SelfAttention

# Dense TFLOP/s stated by the vendor. The first name that is a substring of the device's name applies.
DATASHEETS: dict[str, dict[str, float]] = {
    "H100 PCIe": {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51},
    "H100": {"bf16": 989, "fp16": 989, "tf32": 495, "fp32": 67},
    "H200": {"bf16": 989, "fp16": 989, "tf32": 495, "fp32": 67},
    "A100": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    "V100": {"fp16": 125, "fp32": 15.7},
    "T4": {"fp16": 65, "fp32": 8.1},
}
SAME_INPUT = ("key", "value", "linear")  # projections that read the input of the module registered before them
PER_TOKEN = ("token-classification", "question-answering")  # heads that read every token
PAIRS = ("relation-classification", "distilled-image-classification")  # heads that read two tokens of each sequence


class Sizes(NamedTuple):
    """The sizes of a micro-batch that determine its FLOPs; kept instead of its tensors."""

    examples: int
    targets: int
    lengths: tuple[int, ...]  # one per sequence or image
    decoder_lengths: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Return the number of tokens that the model reads."""
        return sum(self.lengths) + sum(self.decoder_lengths)

    @classmethod
    def from_batch(cls, batch: Batch) -> Sizes:
        """Return the sizes of a batch of texts or images."""
        count = len(batch.ids)
        images = (batch.image_tokens // count,) * count if batch.image_tokens else ()
        return cls(count, batch.num_targets, (*batch.lengths, *images), batch.decoder_lengths)


class Product(NamedTuple):
    """A matrix product of the forward, (rows, inner) x (inner, columns), and the number of products in its backward."""

    name: str
    rows: int
    inner: int
    columns: int
    backward: int  # 1 if the weight is trained, plus 1 if the input needs a gradient

    @property
    def flops(self) -> float:
        """Return the FLOPs of forward and backward."""
        return 2.0 * self.rows * self.inner * self.columns * (1 + self.backward)


def products(model: TaskModel, sizes: Sizes) -> Iterator[Product]:
    """Yield the products with a weight."""
    needs_gradient = inputs_with_gradient(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            rows, inner, columns = _rows(name, model, sizes), module.weight[0].numel(), len(module.weight)
            yield Product(name, rows, inner, columns, module.weight.requires_grad + needs_gradient[name])
            if isinstance(module, LoraLinear):
                yield Product(name, rows, inner, module.rank, 1 + needs_gradient[name])
                yield Product(name, rows, module.rank, columns, 2)


def inputs_with_gradient(model: TaskModel) -> dict[str, bool]:
    """Return {module: whether its input needs a gradient}: whether anything before it in the graph is trained.

    Modules are registered in the order in which they run, with these exceptions:
    - a module of SAME_INPUT reads the input of its parent;
    - a decoder starts from the embeddings, and its cross-attention reads the encoder;
    - pixels have no gradient.
    """
    below, needs_gradient = False, dict[str, bool]()
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        needs_gradient[name] = below and not isinstance(module, nn.Conv2d)
        if own in SAME_INPUT:
            needs_gradient[name] = needs_gradient[parent]
        if name == "backbone.decoder":
            below = model.backbone.embedding.weight.requires_grad
        elif _reads_source(name):
            needs_gradient[name] = needs_gradient["backbone.decoder"]
            below = below or needs_gradient[name]
        below = below or any(p.requires_grad for p in module.parameters(recurse=False))
    return needs_gradient


def _reads_source(name: str) -> bool:
    return ".cross_attention." in name and name.endswith((".key", ".value"))


def _rows(name: str, model: TaskModel, sizes: Sizes) -> int:
    """Return the number of vectors that this layer reads."""
    source, written = sum(sizes.lengths), sum(sizes.decoder_lengths)
    path = name.split(".")
    if path[0] == "head":
        if model.head.is_language_model:
            return sizes.targets
        return source if model.head_name in PER_TOKEN else len(sizes.lengths)
    if path[1] == "patch_embeddings":
        return source - model.backbone.num_special * len(sizes.lengths)
    if path[1] == "decoder":
        return source if _reads_source(name) else written
    if name.startswith(_last_layer(model)) and path[-1] in ("output", "up", "gate", "linear", "down"):
        return _tokens_read(model, sizes)
    if name.startswith(_last_layer(model)) and path[-1] == "query":
        return sum(_queries_of_last_layer(model, sizes))
    return source


def _last_layer(model: TaskModel) -> str:
    """Return the beginning of the names in the last layer of an encoder, or of a decoder without one."""
    stack = "backbone.encoder" if hasattr(model.backbone, "encoder") else "backbone"
    return f"{stack}.layers.{len(model.get_submodule(stack).layers) - 1}."


def _tokens_read(model: TaskModel, sizes: Sizes) -> int:
    """Return the number of tokens whose last hidden states the head reads."""
    head, everything = model.head, sum(sizes.lengths)
    if sizes.decoder_lengths or model.head_name in PER_TOKEN or head.shape.pooling in ("mean", "cls_mean"):
        return everything
    if head.is_language_model:
        return sizes.targets
    return len(sizes.lengths) * (2 if model.head_name in PAIRS else 1)


def _queries_of_last_layer(model: TaskModel, sizes: Sizes) -> tuple[int, ...]:
    """Return the number of queries of each sequence in the last layer. See Selection in models/ops/packing.py."""
    read, count = _tokens_read(model, sizes), len(sizes.lengths)
    attention = model.get_submodule(_last_layer(model) + "attention")
    is_gpt2_classifier = hasattr(attention, "qkv") and model.head.shape.pooling == "last"
    chosen_before = isinstance(attention, SelfAttention) or is_gpt2_classifier
    if not chosen_before or model.head.is_language_model or read == sum(sizes.lengths):
        return sizes.lengths
    return (read // count,) * count


def attention_flops(model: TaskModel, sizes: Sizes) -> float:
    """Return the FLOPs of attention scores and weighted sums, forward and backward: 2 * L * S * D per product."""
    total, needs_gradient = 0.0, inputs_with_gradient(model)
    for name, module in model.named_modules():
        if hasattr(module, "num_heads") and isinstance(getattr(module, "output", None), nn.Linear):
            queries = keys = sizes.decoder_lengths if name.split(".")[1] == "decoder" else sizes.lengths
            keys = sizes.lengths if getattr(module, "cross", False) else keys
            if name.startswith(_last_layer(model)):
                queries = _queries_of_last_layer(model, sizes)
            pairs = sum(q * k for q, k in zip(queries, keys, strict=True))
            projections = ("qkv",) * 3 if hasattr(module, "qkv") else ("query", "key", "value")
            q, k, v = (
                needs_gradient[f"{name}.{projection}"]
                or any(p.requires_grad for p in getattr(module, projection).parameters())
                for projection in projections
            )
            backward = (q or k) + q + k + v  # gradients of the scores, queries, keys and values
            total += 2.0 * pairs * module.output.in_features * (2 + backward)
    return total


def model_flops(model: TaskModel, sizes: Sizes) -> float:
    """Return the FLOPs of a micro-batch, forward and backward, without the backward products that freezing removes."""
    return sum(product.flops for product in products(model, sizes)) + attention_flops(model, sizes)


def gemm_peak(model: TaskModel, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOP/s of the fastest of the four product shapes with the most FLOPs, each timed alone in `dtype`."""
    by_shape: dict[tuple[int, int, int], float] = {}
    for product in products(model, sizes):
        shape = (product.rows, product.inner, product.columns)
        by_shape[shape] = by_shape.get(shape, 0.0) + product.flops
    largest = sorted(by_shape, key=by_shape.__getitem__, reverse=True)[:4]
    return max(product_rate(shape, dtype, device) for shape in largest if all(shape))


def product_rate(shape: Sequence[int], dtype: torch.dtype, device: torch.device, rounds: int = 7) -> float:
    """Return the FLOP/s of a product: the best of several rounds of at least 20 ms."""
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
        seconds(2)  # warm-up
        count = max(1, round(0.02 / seconds(2) * 2))
        best = min(seconds(count) for _ in range(rounds))
    return 2.0 * rows * inner * columns * count / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def datasheet(device: torch.device, precision: str) -> float | None:
    """Return the vendor's FLOP/s for a precision ("tf32" included), or None if the table does not have it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    stated = next((rates for model, rates in DATASHEETS.items() if model in name), {})
    return stated[precision] * 1e12 if precision in stated else None


def clock(device: torch.device) -> Callable[[], float]:
    """Return a perf_counter that first synchronises with the device."""

    def now() -> float:
        _wait(device)
        return time.perf_counter()

    return now
