"""A researcher's own file, as tests/engine/test_plugins.py copies it out of the checkout: one of everything.

An architecture, a head, a task, a metric, a loss, an optimizer, a schedule: the tables that engine/plugins.py reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import engine.tasks
from data import Batch, Row
from engine.metrics.text_classification import confusion_matrix
from models import ModelInputs
from models.architecture import Architecture, read_fields
from models.checkpoints.weights import WeightRow, WeightTable, linear_rows
from models.heads import Head, HeadShape, classification_loss
from models.ops.layers import NO_DROPOUT, DropoutRates, init_normal
from models.ops.packing import Packing


@dataclass(frozen=True)
class BagConfig:
    """The fields of config.json."""

    vocab_size: int = 100
    hidden_size: int = 16
    num_hidden_layers: int = 2
    max_position_embeddings: int = 64
    initializer_range: float = 0.2
    rates: DropoutRates = NO_DROPOUT


class Bag(nn.Module):
    """Word vectors through some linear layers; it knows no order."""

    def __init__(self, config: BagConfig):
        super().__init__()
        self.config, self.max_length = config, config.max_position_embeddings
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.num_hidden_layers)
        )

    def forward(self, inputs: ModelInputs) -> tuple[Tensor, Packing]:
        x = self.embedding(inputs.input_ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x, Packing(inputs.lengths, inputs.cu_seqlens)

    def init_weights(self, generator: torch.Generator, modules: Iterable[nn.Module] = ()) -> None:
        for module in modules or [self]:
            init_normal(module, self.config.initializer_range, generator)


class SoftmaxPooling(Head):
    """Token vectors averaged with learned weights -> classes."""

    has_labels, supports_distillation = True, True

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.score = nn.Linear(shape.hidden_size, 1)
        self.classifier = nn.Linear(shape.hidden_size, shape.num_labels)

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        weights = torch.exp(self.score(hidden).tanh())
        sums = hidden.new_zeros(len(packing.lengths), hidden.shape[1] + 1)
        sums = sums.index_add(0, packing.rows, torch.cat([weights * hidden, weights], 1))
        logits = self.classifier(sums[:, :-1] / sums[:, -1:])
        return logits, classification_loss(logits, inputs.labels, self.shape, self.training)


def read(name: str, settings: Any, labelled: bool) -> list[Row]:
    """A format of one's own: one JSON list of [text, label] pairs."""
    with open(name, encoding="utf-8") as stream:
        pairs = json.load(stream)
    columns = (settings.data.text_column, settings.data.label_column)
    return [Row(str(i), i, dict(zip(columns, pair, strict=True))) for i, pair in enumerate(pairs, start=1)]


def worst_class(statistics: Tensor, labels: tuple[str, ...]) -> float:
    """The recall of the worst class, from the confusion matrix after the loss."""
    confusion = confusion_matrix(statistics)
    return (confusion.diagonal() / confusion.sum(1).clamp_min(1)).min().item()


def hinge(logits: Tensor, batch: Batch) -> Tensor:
    """The multi-class hinge loss, summed over the examples."""
    right = logits.gather(1, batch.required_labels[:, None])
    margins = (1 + logits - right).clamp_min(0).scatter(1, batch.required_labels[:, None], 0.0)
    return margins.sum()


class SignSGD(torch.optim.Optimizer):
    """The sign of a momentum (Bernstein et al. 2018)."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float):
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group["momentum"])
                    p.add_(average.sign(), alpha=-group["lr"])


ARCHITECTURES = {
    "bag": Architecture(
        read_config=lambda raw: read_fields(BagConfig, raw),
        build=lambda config, head: Bag(config),
        head_shape=lambda config, name, head, pooling: HeadShape(config.hidden_size),
        weights=WeightTable(
            model_type="bag",
            prefix="bag.",
            rows=(
                WeightRow("backbone.embedding.weight", "embedding.weight"),
                *linear_rows("backbone.layers.{i}", "layers.{i}"),
            ),
        ),
        heads={None: "BagModel"},
        depth=("num_hidden_layers",),
        pooling="mean",
    )
}
HEADS = {"softmax-pooling": SoftmaxPooling}
TASKS = {"my-reviews": replace(engine.tasks.TASKS["text-classification"], head="softmax-pooling", read=read)}
METRICS = {"my-reviews": {"worst_class": worst_class}}
LOSSES = {"hinge": hinge}
OPTIMIZERS = {"sign-sgd": lambda groups, optim: SignSGD(groups, optim.lr, optim.beta1)}
SCHEDULES = {"halves": lambda step, total_steps, optim: 0.5 ** int(4 * step / total_steps)}
