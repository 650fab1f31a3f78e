"""Part 2: loss and gradients of every architecture and head, compared with the CPU in fp64; dropout; pieces left out.

The models are the tiny ones of the tests, and models with heads of 64 dimensions, for which a GPU has other kernels. In
bf16 and fp16 the errors are those of rounding, so the limits are wide: an error of the mathematics is far larger.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import models
from benchmarks.gpu_check.attention import check_attention
from benchmarks.gpu_check.check import Check, first_line, has_tests
from benchmarks.gpu_check.pieces import check_pieces
from engine.precision import DTYPES
from engine.regularize import seed_dropout
from models.ops.dropout import dropout

# Examples of zoo.LENGTHS, those that there are.
BATCHES = {"ragged": [*range(5)], "equal": [2, 3], "one token": [1], "empty": []}
LOSS_LIMITS = {"fp32": 2e-5, "bf16": 5e-2, "fp16": 1e-2}  # relative errors; of a loss below 1 absolute ones
GRADIENT_LIMITS = {"fp32": 1e-4, "bf16": 0.15, "fp16": 0.05}
LOSS_SCALE = 128.0  # so that gradients do not underflow in fp16
WIDE = {  # heads of 64 dimensions
    ("bert", "sequence-classification"): {"hidden_size": 128, "num_attention_heads": 2, "initializer_range": 0.06},
    ("gpt2", "causal-lm"): {"n_embd": 128, "n_head": 2, "initializer_range": 0.06},
    ("t5", "seq2seq-lm"): {"d_model": 128, "d_kv": 64, "num_heads": 2},
    ("vit", "image-classification"): {"hidden_size": 128, "num_attention_heads": 2, "initializer_range": 0.06},
}
RATE = 0.1


def run(check: Check) -> None:
    """Check dropout and attention, compare every pair of architecture and head, then leave out the pieces."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    check_dropout(check)
    check_attention(check)
    if has_tests():
        compare_all(check)
    else:
        check.note("architectures", "not checked: they need the folder tests and pytest")
    check_pieces(check)  # last, since engine.train chooses kernels for the whole process


def compare_all(check: Check) -> None:
    """Compare every pair of architecture and head, as long as there is time."""
    for name, model_type, head, changes, problem in cases():
        if not check.has_time_for(2, name):
            return
        compare(check, name, model_type, head, changes, problem)


def cases() -> Iterator[tuple[str, str, str, dict[str, Any], str]]:
    """Yield (name, model_type, head, changes of config.json, problem) of every comparison."""
    from support.zoo import ZOO, reads_pooled

    for model_type, architecture in models.ARCHITECTURES.items():
        for head in filter(None, architecture.heads if model_type in ZOO else ()):
            yield f"{model_type} {head}", model_type, head, {}, "single-label"
            if reads_pooled(head) and model_type == "bert" and head == "sequence-classification":
                for problem in ("multi-label", "regression"):
                    yield f"{model_type} {problem}", model_type, head, {}, problem
    for (model_type, head), changes in WIDE.items():
        yield f"{model_type} {head}, wide", model_type, head, changes, "single-label"


def compare(check: Check, name: str, model_type: str, head: str, changes: dict[str, Any], problem: str) -> None:
    """Write a row for each precision: the largest errors of loss and gradient over all BATCHES."""
    from support.tiny_models import inputs_of

    model = build(check, name, model_type, head, changes, problem)
    inputs = inputs_of(model, problem=problem)
    reference = copy.deepcopy(model).double()
    expected = {batch: step(reference, inputs, head, batch, "fp64") for batch in BATCHES}
    model.to(check.device)
    for precision in check.precisions:
        worst_loss = worst_gradient = 0.0
        places = []
        try:
            for batch, (loss, gradient) in expected.items():
                found_loss, found_gradient = step(model, inputs, head, batch, precision, check.device)
                loss_error = abs(found_loss - loss) / max(abs(loss), 1.0)
                gradient_error = float((found_gradient - gradient).norm() / gradient.norm().clamp(min=1e-6))
                within = loss_error <= LOSS_LIMITS[precision] and gradient_error <= GRADIENT_LIMITS[precision]
                places += [] if within else [batch]
                worst_loss, worst_gradient = max(worst_loss, loss_error), max(worst_gradient, gradient_error)
            errors = {"loss_error": worst_loss, "gradient_error": worst_gradient}
            check.add(name, precision, ok=not places, where=", ".join(places), **errors)
        except RuntimeError as error:
            check.add(name, precision, ok=False, where=first_line(error))


def build(
    check: Check, name: str, model_type: str, head: str, changes: dict[str, Any], problem: str
) -> models.TaskModel:
    """Return a random model without dropout, no parameter at its initial zero or one."""
    from support.tiny_models import config_folder
    from support.zoo import has_labels

    folder = config_folder(check.scratch / name.replace(" ", "-"), model_type, **changes)
    labels = ["a", "b", "c"] if has_labels(head) else None
    problems = {"problem": problem} if problem != "single-label" else {}
    model = models.from_pretrained(folder, head=head, labels=labels, init="scratch", dropout=0.0, **problems)
    generator = torch.Generator().manual_seed(1)
    width = 24 / model.backbone.config.hidden_size
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * width * torch.randn(parameter.shape, generator=generator))
    return model


def step(
    model: models.TaskModel, inputs: Any, head: str, batch: str, precision: str, device: torch.device | None = None
) -> tuple[float, Tensor]:
    """Return the loss of a batch and the gradient of all parameters as one fp64 vector on the CPU."""
    from support.tiny_models import count_examples, select

    chosen = select(inputs, head, [i for i in BATCHES[batch] if i < count_examples(inputs)])
    dtype = next(model.parameters()).dtype
    floating = {
        name: value.to(dtype)
        for name in ("pixel_values", "labels")
        if (value := getattr(chosen, name)) is not None and value.is_floating_point()
    }
    chosen = models.Inputs(**vars(chosen) | floating)
    chosen = chosen.to(device) if device else chosen
    model.zero_grad()
    with torch.autocast((device or torch.device("cpu")).type, DTYPES.get(precision), enabled=precision[2:] == "16"):
        loss = model(chosen).loss_sum
    (loss * LOSS_SCALE).backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    gradient = torch.cat([part.flatten().double().cpu() for part in parts]) / LOSS_SCALE
    return loss.item(), gradient


def check_dropout(check: Check) -> None:
    """Check that dropout keeps the mean, drops at its rate, and repeats with its seed."""
    ones = torch.ones(2**18 if check.shrink else 2**22, device=check.device)
    outputs = []
    for position in (0, 0, 1):
        seed_dropout(7, position, 0, 0, check.device)
        outputs.append(dropout(ones, RATE).double())
    spread = float(outputs[0].std()) / ones.numel() ** 0.5
    off = abs(float(outputs[0].mean()) - 1)
    repeats, differs = bool(torch.equal(*outputs[:2])), not torch.equal(outputs[0], outputs[2])
    ok = repeats and differs and off <= 6 * spread
    text = f"mean off by {off:.1e}, same seed repeats: {repeats}, another differs: {differs}"
    check.add("dropout", "fp32", ok=ok, where=text)
