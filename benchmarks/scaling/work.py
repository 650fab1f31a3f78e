"""What a micro-batch of a model costs a device: FLOPs, bytes moved, bytes kept for the backward, parameters.

FLOPs are those of benchmarks/flops.py, of the model itself on the meta device. Bytes are linear in the sizes of a
layer; their coefficients were counted op by op on the simulated GPU (tests/support/fake_gpu), in bf16 under autocast. A
test counts the bytes kept again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks import flops
from benchmarks.flops import Sizes
from engine.sharding import sharded_layers
from models import ARCHITECTURES, HEADS, ModelSpec, TaskModel

FP32, BF16 = 4, 2  # bytes
LOGITS_AT_ONCE = 2**30  # bytes of fp32 logits (models/ops/linear_cross_entropy.py on a GPU)
LOGIT_TRAFFIC = 25  # bytes moved for each logit, forward and backward
LOGIT_COPIES = 2.5  # fp32 logits, their copy in bf16, and the product they are made of, as a multiple of the first
KERNELS_OF_LAYER = 72  # forward, backward and optimizer: BERT 869 / 12, GPT-2 840 / 12, T5 1,780 / 24
EMBEDDING_BYTES = 11  # kept for each token and element of the width, before the first layer and behind the last


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a layer that determine the bytes it moves and keeps."""

    width: int  # D
    inner: int  # the width of all heads together
    heads: int
    hidden: int  # of the MLP
    tokens: int  # of an example
    source_tokens: int = 0  # of cross-attention; 0: none
    is_t5: bool = False  # RMSNorm, no biases, ReLU with dropout behind it
    dropout: bool = True

    @property
    def kept(self) -> int:
        """Return the bytes that autograd keeps of an example, without weights.

        Inputs of norms and the residual in fp32, inputs of products in bf16, queries, keys, values and the result of
        attention, the MLP before and after its activation, masks of dropout in one byte (Korthikanti et al. 2022,
        "Reducing activation recomputation in large transformer models", section 4.1, with bf16 norms and residuals).
        """
        d, i, f, mask = self.width, self.inner, self.hidden, int(self.dropout)
        statistics = 4 * self.heads + (8 if self.is_t5 else 16)  # of attention, and of two norms
        own = (12 + 2 * mask) * d + 8 * i + 4 * f + (f * mask if self.is_t5 else 0) + statistics
        cross = (6 + mask) * d + 4 * i + 4 * self.heads + 4 if self.source_tokens else 0
        return self.tokens * (own + cross) + self.source_tokens * (2 * d + 4 * i)

    @property
    def traffic(self) -> int:
        """Return the bytes that all kernels but products and attention move for an example, forward and backward."""
        d, i, f, dropped = self.width, self.inner, self.hidden, 10 * self.dropout
        own = ((120 if self.is_t5 else 123) + 2 * dropped) * d + 21 * i
        own += f * (10 + dropped if self.is_t5 else 12)
        cross = (56 + dropped) * d + 6 * i if self.source_tokens else 0
        return self.tokens * (own + cross) + self.source_tokens * (24 * d + 6 * i)


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers together: a layer, or all that is in no layer (the root)."""

    parameters: int
    flops: float  # of an example, forward and backward
    layer: LayerShape | None = None


@dataclass(frozen=True)
class Work:
    """A model, and the examples that it is trained on."""

    name: str
    kind: str  # model_type of config.json
    layers: tuple[Unit, ...]
    root: Unit
    matrices: int  # parameters of products in layers, which autocast copies in bf16
    attention: float  # FLOPs of an example, of `flops`
    flops: float  # model FLOPs of an example
    tokens: int  # of an example
    width: int
    vocabulary: int  # of a language model; 0: no logits to mention
    targets: int  # of an example

    @property
    def parameters(self) -> int:
        """Return the number of parameters, each of which is trained."""
        return self.root.parameters + sum(unit.parameters for unit in self.layers)

    @property
    def largest(self) -> int:
        """Return the parameters of the largest layer."""
        return max(unit.parameters for unit in self.layers)

    @property
    def traffic(self) -> float:
        """Return the bytes that an example moves, without products and attention."""
        return sum(unit.layer.traffic for unit in self.layers if unit.layer) + (
            LOGIT_TRAFFIC * self.targets * self.vocabulary
        )

    @property
    def weight_traffic(self) -> float:
        """Return the bytes that the weights move in a micro-batch: casts to bf16, and of their gradients to fp32.

        FSDP casts its shards, but copies what it gathers and reduces, which is as much.
        """
        return (19 if self.kind == "t5" else 14) * self.matrices

    @property
    def kernels(self) -> int:
        """Return the number of kernels of a micro-batch."""
        return KERNELS_OF_LAYER * len(self.layers)

    def kept(self, checkpointing: bool) -> float:
        """Return the bytes that an example keeps in a forward.

        checkpointing: only the inputs of the layers are kept, and one layer at a time while its backward runs
        (Chen et al. 2016, "Training deep nets with sublinear memory cost").
        """
        shapes = [unit.layer for unit in self.layers if unit.layer]
        ends = EMBEDDING_BYTES * self.tokens * self.width
        if not checkpointing:
            return ends + sum(shape.kept for shape in shapes)
        return ends + max(shape.kept for shape in shapes) + sum(FP32 * shape.tokens * shape.width for shape in shapes)

    def loss_bytes(self, examples: int) -> float:
        """Return the bytes of the loss of a language model: logits of a chunk, weight in bf16, gradients in fp32."""
        if not self.vocabulary:
            return 0.0
        chunk = min(FP32 * self.vocabulary * self.targets * examples, LOGITS_AT_ONCE)
        weight = self.vocabulary * self.width
        return LOGIT_COPIES * chunk + (FP32 + BF16) * weight + FP32 * self.targets * examples * self.width


def describe_work(name: str, config: dict[str, Any], head: str, sizes: Sizes) -> Work:
    """Return what an example of these sizes costs a model. sizes: those of one example."""
    model = build_on_meta(config, head)
    layers = sharded_layers(model)
    by_layer = {id(layer): index for index, layer in enumerate(layers)}
    owner = {prefix: by_layer[id(module)] for prefix, module in model.named_modules() if id(module) in by_layer}
    needed, matrices = [0.0] * len(layers), 0
    root = 0.0
    attention = flops.attention_flops(model, sizes)
    for product in flops.products(model, sizes):
        index = next((i for prefix, i in owner.items() if product.name.startswith(f"{prefix}.")), None)
        if index is None:
            root += product.flops
        else:
            needed[index] += product.flops
            matrices += product.inner * product.columns
    shapes = list(layer_shapes(model, sizes))
    squares = [shape.tokens * (shape.tokens + shape.source_tokens) * shape.inner for shape in shapes]
    units = tuple(
        Unit(count(layer), flop + attention * square / sum(squares), shape)
        for layer, flop, square, shape in zip(layers, needed, squares, shapes, strict=True)
    )
    rest = count(model) - sum(unit.parameters for unit in units)
    writes = model.head is not None and model.head.is_language_model
    return Work(
        name,
        str(config["model_type"]),
        units,
        Unit(rest, root),
        matrices,
        attention,
        root + sum(needed) + attention,
        sizes.tokens,
        shapes[0].width,
        model.vocab_size if writes else 0,
        sizes.targets,
    )


def layer_shapes(model: TaskModel, sizes: Sizes) -> Iterator[LayerShape]:
    """Yield the shape of each layer of a model, in the order of sharded_layers."""
    config: Any = model.backbone.config
    is_t5 = hasattr(config, "head_size")
    heads, width = config.num_attention_heads, config.hidden_size
    inner = heads * config.head_size if is_t5 else width
    hidden = config.intermediate_size or 4 * width  # 0: GPT-2's own default
    shape = LayerShape(width, inner, heads, hidden, sum(sizes.lengths), is_t5=is_t5, dropout=config.rates.hidden > 0)
    yield from [shape] * config.num_hidden_layers
    if is_t5:
        decoder = replace(shape, tokens=sum(sizes.decoder_lengths), source_tokens=sum(sizes.lengths))
        yield from [decoder] * config.num_decoder_layers


def build_on_meta(config: dict[str, Any], head: str) -> TaskModel:
    """Return a model whose tensors have shapes but no memory; a classifier has two classes."""
    architecture, head_class = ARCHITECTURES[str(config["model_type"])], HEADS[head]
    raw = architecture.complete(config)
    own = architecture.read_config(raw)
    labels = ("a", "b") if head_class.has_labels else ()
    shape = architecture.head_shape(own, head, head_class, architecture.pooling)
    shape = replace(shape, pooling=architecture.pooling, num_labels=len(labels), problem="single-label")
    with torch.device("meta"):
        backbone = architecture.build(own, head_class)
        model = TaskModel(backbone, head_class(shape), ModelSpec(architecture, raw, head, labels))
    if model.head is not None and model.embedding is not None and shape.vocab_size:
        model.head.tie(model.embedding)
    return model


def count(module: nn.Module) -> int:
    """Return the number of parameters of a module, each once."""
    return sum(p.numel() for p in module.parameters())
