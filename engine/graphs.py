"""Exported graphs: written by torch.export or as ONNX, run again, compared with the model, and quantised.

onnx, onnxscript and onnxruntime come with `pip install "finetune-engine[onnx]"`; torch.export needs none of them.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import Batch, Examples
from engine.errors import TrainingError
from models import ModelError, TaskModel
from models.padded import Graph, GraphModel, Runner, check_graph

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
BATCH = 8  # examples that are compared at a time, of several lengths
PASSES = 5  # over the rows, for the speed of a graph
TOLERANCE = 1e-4  # of logits, relative to the largest one, or to 1
OPSET = 18
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
QUANTISED = "_quantized.onnx"  # optimum's ending


def check_packages(to: str) -> None:
    """Raise TrainingError, before the work, where a package that this export needs is not installed."""
    missing = [name for name in ONNX_PACKAGES if to == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise TrainingError(
            f'--to onnx needs {", ".join(missing)}: pip install "finetune-engine[onnx]" (or pip install '
            f"{' '.join(missing)}); --to torch-export needs no further package"
        )


def write_graph(graph: Graph, to: str, folder: Path) -> Path:
    """Export a graph into a folder; return its file. Raises ModelError for a model that cannot be traced."""
    check_graph(graph)
    path = folder / f"{graph.name}{SUFFIXES[to]}"
    with _quiet():
        try:
            program = torch.export.export(graph.module, tuple(graph.inputs.values()), dynamic_shapes=_axes(graph))
        except Exception as error:  # torch raises errors of many kinds on code that it cannot trace
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"torch.export cannot trace this model: {reason}") from None
        if to == "torch-export":
            torch.export.save(program, path)
        else:
            _write_onnx(program, graph, path)
    return path


def _write_onnx(program: torch.export.ExportedProgram, graph: Graph, path: Path) -> None:
    """Write a program as ONNX; weights of more than 2 GB lie in a second file beside it."""
    names: dict[str, Any] = {"input_names": [*graph.inputs], "output_names": [*graph.outputs]}
    onnx_program = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET, **names)
    if onnx_program is None:
        raise ModelError("torch.onnx.export returned no program")
    _name_axes(onnx_program.model.graph, graph)
    onnx_program.save(path)


def _name_axes(onnx_graph: Any, graph: Graph) -> None:
    """Give the axes of inputs and outputs the names of `graph.axes`, where torch has numbers."""
    names: dict[str, str] = {}
    for value in onnx_graph.inputs:
        names |= {str(value.shape[place]): axis for place, axis in graph.axes[value.name].items()}
    for value in (*onnx_graph.inputs, *onnx_graph.outputs):
        for place, size in enumerate(value.shape):
            value.shape[place] = names.get(str(size), size)


def _axes(graph: Graph) -> Any:
    """Return the dynamic_shapes of torch.export: for each input, {axis: its range}."""
    dims: dict[str, torch.export.Dim] = {}
    for axes in graph.axes.values():
        for name in axes.values():
            limit = {"max": graph.max_length} if name.endswith("length") and graph.max_length < 2**31 else {}
            dims.setdefault(name, torch.export.Dim(name, min=1, **limit))
    shapes = tuple({place: dims[name] for place, name in graph.axes[key].items()} for key in graph.inputs)
    return (shapes,) if graph.takes_all else shapes


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporters print on stdout and warn of: their own steps, which no user can change."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


# Running


def open_graph(path: Path, graph: Graph) -> Runner:
    """Return a function that runs an exported file on the CPU."""
    return _open_onnx(path) if path.suffix == ".onnx" else _open_program(path, graph)


def _open_onnx(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        arrays = {name: x.numpy() for name, x in inputs.items()}
        return [torch.from_numpy(np.asarray(x)) for x in session.run(None, arrays)]

    return run


def _open_program(path: Path, graph: Graph) -> Runner:
    module = torch.export.load(path).module()

    def run(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            outputs = module(*(inputs[name] for name in graph.inputs))
        return [outputs] if isinstance(outputs, Tensor) else [*outputs]

    return run


# Comparison


def batches_of(examples: Examples) -> list[Batch]:
    """Return all examples in micro-batches of BATCH."""
    indices = range(len(examples))
    return [examples.batch(np.array(indices[i : i + BATCH])) for i in range(0, len(examples), BATCH)]


@torch.no_grad()
def compare_logits(model: TaskModel, exported: GraphModel, batches: Sequence[Batch]) -> tuple[float, float]:
    """Return the largest difference of the logits on these examples, and the largest logit."""
    difference = largest = 0.0
    for batch in batches:
        unlabelled = replace(batch, labels=None, sequences=None)  # of each window, and of all tokens
        expected, found = model(unlabelled).logits, exported(unlabelled).logits
        if expected.shape != found.shape:
            raise TrainingError(f"the exported graph gives {[*found.shape]} logits, not {[*expected.shape]}")
        gap = (expected - found).abs().nan_to_num(nan=torch.inf)
        difference = max(difference, gap.max().item() if gap.numel() else 0.0)
        largest = max(largest, expected.abs().max().item() if gap.numel() else 0.0)
    return difference, largest


def check_parity(difference: float, largest: float) -> None:
    """Raise TrainingError where the logits of an exported graph are not those of the model."""
    limit = TOLERANCE * max(1.0, largest)
    if not difference <= limit:
        raise TrainingError(
            f"the exported graph does not compute what the model does: the largest difference of a logit is "
            f"{difference:.3g}, more than {limit:.3g}; nothing is written"
        )


# Quantisation


@dataclass(frozen=True)
class Comparison:
    """What quantisation costs and gains. metrics: {name: (before, after)}. speed: how many times as fast."""

    metrics: dict[str, tuple[float, float]]
    speed: float
    bytes: tuple[int, int]  # before, after


def quantise(path: Path) -> Path:
    """Write an ONNX file with the matrices in int8 beside the given one; activations are quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_name(path.stem + QUANTISED)
    with _quiet():
        quantize_dynamic(path, target, weight_type=QuantType.QInt8, per_channel=True)
    return target


@torch.no_grad()
def compare_speed(before: GraphModel, after: GraphModel, batches: Sequence[Batch]) -> float:
    """Return the time of `before` divided by that of `after`: the median of PASSES, taken in turns."""

    def seconds(model: GraphModel) -> float:
        started = time.perf_counter()
        for batch in batches:
            model.compute(batch)
        return time.perf_counter() - started

    seconds(before), seconds(after)  # the first passes allocate
    return statistics.median([seconds(before) / seconds(after) for _ in range(PASSES)])


def compare_metrics(
    evaluate: Callable[[TaskModel], Mapping[str, float]], before: GraphModel, after: GraphModel
) -> dict[str, tuple[float, float]]:
    """Return {metric: (value of `before`, value of `after`)}, without those that a graph cannot give (NaN)."""
    first, second = evaluate(before), evaluate(after)
    return {name: (value, second[name]) for name, value in first.items() if value == value and name in second}
