"""Several heads on one backbone: a micro-batch has examples of several tasks, and each head reads those of its own.

    model = join_tasks({"reviews": classifier, "entities": tagger})   # TaskModels of one checkpoint
    model(batch).loss_sum                                             # the weighted sum of the losses of both
    one_task(model, "reviews")                                        # a TaskModel of the shared backbone and one head

The sequences of a task are neighbours in the micro-batch (data/multi_task.py), so each head reads a slice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from models.checkpoints import weights
from models.checkpoints.tensor_files import open_checkpoint
from models.head import Head
from models.inputs import ModelInputs
from models.ops.packing import Packing, Selection
from models.task_model import ModelSpec, TaskModel, states_what_it_reads

NAME = "multi-task"  # of the head; config.json has it


class MultiTaskInputs(ModelInputs, Protocol):
    """A packed micro-batch of several tasks, one task after another."""

    @property
    def parts(self) -> tuple[ModelInputs, ...]:
        """The micro-batch of each task, with its labels; perhaps empty."""

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of sequences of each task."""

    @property
    def factors(self) -> tuple[float, ...]:
        """How much the loss of a target of each task counts."""


@dataclass(eq=False)
class JointSelection(Selection):
    """The tokens that the heads of several tasks read, task after task; parts: the packing that each head gets."""

    parts: tuple[Packing, ...] = ()


class MultiTaskHead(Head):
    """The heads of several tasks. specs: of each task its ModelSpec, from which its own config.json is written."""

    def __init__(self, heads: Mapping[str, Head], specs: Mapping[str, ModelSpec]):
        super().__init__(next(iter(heads.values())).shape)
        self.tasks = nn.ModuleDict({module_name(name): head for name, head in heads.items()})
        self.specs = dict(specs)

    @property
    def heads(self) -> list[Head]:
        """The head of each task."""
        return [cast("Head", head) for head in self.tasks.values()]

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Return no logits, and the sum over the tasks of factor * sum of the losses. hidden: (T, D), or (R, D)."""
        joint = cast("MultiTaskInputs", inputs)
        parts = packing.parts if isinstance(packing, JointSelection) else split_packing(packing, joint.counts)
        slices = torch.split(hidden, [_num_tokens(part) for part in parts])
        losses = [
            factor * head(x, part, own)[1]
            for head, x, part, own, factor in zip(self.heads, slices, parts, joint.parts, joint.factors, strict=True)
        ]
        return hidden.new_empty(0), torch.stack(losses).sum()

    def reads(self, packing: Packing, inputs: ModelInputs) -> Selection | None:
        """Return the tokens that the heads read; None where all of them read all tokens."""
        joint = cast("MultiTaskInputs", inputs)
        parts, tokens, start, is_less = list[Packing](), list[Tensor](), 0, False
        for head, whole, own in zip(self.heads, split_packing(packing, joint.counts), joint.parts, strict=True):
            selection = head.reads(whole, own) if states_what_it_reads(type(head)) else None
            every = torch.arange(sum(whole.lengths), device=packing.cu_seqlens.device)
            parts.append(whole if selection is None else selection)
            tokens.append(start + (every if selection is None else selection.tokens))
            is_less = is_less or selection is not None
            start += sum(whole.lengths)
        if not is_less:
            return None
        # The host knows the number of tokens of each sequence only where it does for all tasks.
        is_known = all(len(part.lengths) == count for part, count in zip(parts, joint.counts, strict=True))
        lengths = tuple(length for part in parts for length in part.lengths) if is_known else ()
        ends = torch.cat([packing.cu_seqlens[:1], *(part.cu_seqlens.diff() for part in parts)]).cumsum(0)
        return JointSelection(
            lengths=lengths,
            cu_seqlens=ends.to(torch.int32) if is_known else packing.cu_seqlens[:0],
            tokens=torch.cat(tokens),
            micro_batch=packing,
            are_last=all(isinstance(part, Selection) and part.are_last for part in parts),
            parts=tuple(parts),
        )

    def init_weights(self, std: float, generator: torch.Generator, skip: Collection[Tensor] = ()) -> None:
        """Initialise the heads one after another."""
        for head in self.heads:
            head.init_weights(std, generator, skip)

    def tie(self, embedding: nn.Embedding) -> None:
        """Use the embedding as the output matrix of each language model among the heads."""
        for head in self.heads:
            if head.shape.vocab_size and head.shape.tied:
                head.tie(embedding)


def module_name(task: str) -> str:
    """Return the name of a task's head among the modules: without dots, and no attribute of ModuleDict."""
    name = task.replace(".", "_")
    return f"{name}_" if hasattr(nn.ModuleDict(), name) else name


def split_packing(packing: Packing, counts: tuple[int, ...]) -> list[Packing]:
    """Return the packing of each task alone, which has `counts` neighbouring sequences."""
    parts, first, start = list[Packing](), 0, 0
    for count in counts:
        lengths = packing.lengths[first : first + count]
        parts.append(Packing(lengths, packing.cu_seqlens[first : first + count + 1] - start))
        first, start = first + count, start + sum(lengths)
    return parts


def _num_tokens(packing: Packing) -> int:
    return len(packing.tokens) if isinstance(packing, Selection) else sum(packing.lengths)


def join_tasks(models: Mapping[str, TaskModel]) -> TaskModel:
    """Return one model of the first backbone and all heads; {name of the task: its model from the same checkpoint}."""
    first = next(iter(models.values()))
    heads = {name: model.head for name, model in models.items() if model.head is not None}
    head = MultiTaskHead(heads, {name: model.spec for name, model in models.items()})
    if first.embedding is not None:
        head.tie(first.embedding)
    labels = tuple(f"{name}/{label}" for name, model in models.items() for label in model.labels)
    joint = TaskModel(first.backbone, head, replace(first.spec, head_name=NAME, labels=labels))
    named = dict(joint.named_parameters())
    initialised = [name for name in first.report.initialised if not name.startswith("head.")]
    for task, model in models.items():
        new = (
            f"head.tasks.{module_name(task)}.{name[5:]}"
            for name in model.report.initialised
            if name.startswith("head.")
        )
        initialised += [name for name in new if name in named]
    notes = [note for model in models.values() for note in model.report.notes]
    joint.report = replace(first.report, initialised=initialised, notes=list(dict.fromkeys(notes)))
    return joint


def one_task(model: TaskModel, name: str) -> TaskModel:
    """Return the model of one task: the shared backbone, and its head."""
    joint = model.head
    if not isinstance(joint, MultiTaskHead):
        raise TypeError("one_task needs a model of several tasks, as join_tasks makes it")
    single = TaskModel(model.backbone, cast("Head", joint.tasks[module_name(name)]), joint.specs[name])
    single.report = model.report
    single.training = model.training
    return single


def each_task(model: TaskModel) -> dict[str, TaskModel]:
    """Return the model of each of several tasks by its name; {} for a model of one task."""
    return {name: one_task(model, name) for name in model.head.specs} if isinstance(model.head, MultiTaskHead) else {}


def load_tasks(model: TaskModel, folder: Path) -> None:
    """Read the weights of all tasks from a checkpoint of a model as join_tasks makes it, and their report."""
    with ExitStack() as stack:
        files = open_checkpoint(folder, stack)
        names = weights.saved_tensors(model).keys()
        table = model.spec.architecture.weights
        model.report = weights.load(model, names, table, files, head=NAME, own_head=True)
