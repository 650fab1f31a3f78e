"""Tiny random models of ours for the architectures of zoo.ZOO, without transformers, and parts of their inputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import models
from models import Inputs
from models.inputs import cumulative_lengths
from support.zoo import ZOO, has_labels, make_inputs

PER_TOKEN = ("token-classification", "masked-lm", "causal-lm", "seq2seq-lm")  # heads with a label for every token


def config_folder(folder: Path, model_type: str, **changes: Any) -> Path:
    """Write a folder with only the config.json of a tiny model; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **ZOO[model_type].fields, **changes}))
    return folder


def scratch(folder: Path, model_type: str, head: str | None, *, seed: int = 0, **options: Any) -> models.TaskModel:
    """Return a random tiny model of ours, no parameter at its initial zero or one."""
    labels = [f"class {i}" for i in range(options.pop("num_labels", 3))] if has_labels(head) else None
    config_folder(folder, model_type)
    options = {"dropout": 0.0, "labels": labels} | options
    model = models.from_pretrained(folder, head=head, init="scratch", seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs_of(model: models.TaskModel, seed: int = 0, problem: str = "single-label") -> Inputs:
    """Return make_inputs for a model of ours."""
    head = model.head_name
    config = SimpleNamespace(**vars(model.backbone.config), num_labels=len(model.labels))
    inputs = make_inputs(model.spec.architecture.weights.model_type, head, config, seed, problem)
    if head == "relation-classification":
        return with_relations(inputs, config.num_labels, torch.Generator().manual_seed(seed + 1))
    return inputs


def with_relations(inputs: Inputs, num_labels: int, generator: torch.Generator) -> Inputs:
    """Return the inputs with two marked positions in each text, and a class for the pair."""
    count, lengths = len(inputs.lengths), torch.tensor(inputs.lengths)
    markers = [(torch.rand(count, generator=generator) * lengths).long() for _ in range(2)]
    labels = torch.randint(0, num_labels, (count,), generator=generator)
    return replace(inputs, markers=torch.stack(markers, 1), labels=labels)


def select(inputs: Inputs, head: str | None, chosen: Sequence[int]) -> Inputs:
    """Return the micro-batch of these examples, in this order; an empty one for []."""

    def pick(values: Tensor, lengths: Sequence[int]) -> Tensor:
        pieces = values.split(list(lengths))
        return torch.cat([pieces[i] for i in chosen] or [values[:0]])

    index = torch.tensor(list(chosen), dtype=torch.int64)
    labels = inputs.labels
    if inputs.sequences is not None:  # the sequences of these examples, which then are theirs again
        numbers = torch.arange(len(inputs.lengths)).split(inputs.sequences)
        sequences = [int(number) for i in chosen for number in numbers[i]]
        counts = tuple(inputs.sequences[i] for i in chosen)
        return replace(
            select(replace(inputs, sequences=None, labels=None), head, sequences),
            sequences=counts,
            labels=None if labels is None else labels[index],
        )
    if labels is not None and head in PER_TOKEN:
        labels = pick(labels, inputs.decoder_lengths if head == "seq2seq-lm" else inputs.lengths)
    elif labels is not None:
        labels = labels[index]
    if inputs.pixel_values is not None:
        return models.pack_images(inputs.pixel_values[index], labels=labels)
    decoder = {}
    if inputs.decoder_input_ids is not None:
        lengths = tuple(inputs.decoder_lengths[i] for i in chosen)
        decoder = {
            "decoder_input_ids": pick(inputs.decoder_input_ids, inputs.decoder_lengths),
            "decoder_lengths": lengths,
            "decoder_cu_seqlens": cumulative_lengths(lengths),
        }
    lengths = tuple(inputs.lengths[i] for i in chosen)
    return Inputs(
        input_ids=pick(inputs.input_ids, inputs.lengths),
        lengths=lengths,
        cu_seqlens=cumulative_lengths(lengths),
        token_type_ids=pick(inputs.token_type_ids, inputs.lengths),
        labels=labels,
        markers=None if inputs.markers is None else inputs.markers[index],
        **decoder,
    )


def count_examples(inputs: Inputs) -> int:
    counts = inputs.lengths if inputs.sequences is None else inputs.sequences
    return len(counts) if inputs.pixel_values is None else len(inputs.pixel_values)


def replace_labels(inputs: Inputs, head: str | None, example: int, labels: Tensor) -> Inputs:
    """Return the inputs with other labels, in the shape that select() gives them, for one example."""
    parts = [select(inputs, head, [i]).labels for i in range(count_examples(inputs))]
    parts[example] = labels
    return replace(inputs, labels=torch.cat(parts))
