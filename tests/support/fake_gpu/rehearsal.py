"""engine.train itself on the fake GPU, with the parts of its loop told apart."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from engine import config as configs
from engine import train as loop
from engine.config import Config
from engine.distributed import Ranks
from engine.log import RunLog
from engine.precision import Precision
from engine.tasks import Task
from models import TaskModel, losses
from models.ops.attention import has_flash
from support.fake_gpu.report import (
    EVALUATION,
    FORWARD,
    GENERATION,
    LOG,
    LOOP,
    SAMPLES,
    SAVE,
    SETUP,
    STEP,
    Report,
)
from support.runs import QuietStop

ROOT = Path(loop.__file__).parent.parent
# What the fake GPU needs of PyTorch and does not find documented.
PRIVATE = (
    "torch._subclasses.fake_tensor.FakeTensorMode.avoid_device_init",
    "torch._subclasses.fake_tensor.init_gpu_context",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils.weak.WeakTensorKeyDictionary",
    "torch._C._ensureCUDADeviceGuardSet",
    "torch._C._current_graph_task_id",
    "torch._C._nn._parse_to",
    "torch.ops.aten._scaled_dot_product_flash_attention",
    "torch.ops.aten._scaled_dot_product_efficient_attention",
)


def missing_names() -> list[str]:
    """Return the private names that this PyTorch does not have; the rehearsal needs all of them."""
    return [name for name in PRIVATE if not _exists(name)] + ([] if _nodes_have_metadata() else ["_input_metadata"])


def _exists(name: str) -> bool:
    parts = name.split(".")
    found: Any = importlib.import_module("torch")
    for i, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[:i]))
            except ImportError:
                return False
        found = getattr(found, part, None)
    return found is not None


def _nodes_have_metadata() -> bool:
    node = torch.zeros(1, requires_grad=True).exp().grad_fn
    return hasattr(node, "_input_metadata") and hasattr(node, "next_functions")


def rehearse(settings: dict[str, Any]) -> Report:
    """Run a recipe on the fake GPU; return what was seen. Errors of the run are raised."""
    from engine.checkpoint import claim
    from support.fake_gpu.device import CUDA, FakeGpu

    config = configs.override(Config(), settings | {"run.device": "cuda"})
    configs.check(config)
    gpu, ranks = FakeGpu(ROOT), Ranks(0, 1, CUDA)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _phases(gpu), gpu, claim(config, ranks) as resumed:
                loop.train(config, ranks, _Listening(gpu), resumed)
    finally:
        losses._weights_on_device.cache_clear()  # fake tensors belong to one rehearsal
        has_flash.cache_clear()
    return gpu.report


class _Listening(QuietStop):
    """The loop asks it to listen right before its first step."""

    def __init__(self, gpu: Any):
        super().__init__()
        self.gpu = gpu

    def listen(self, announce: bool) -> None:
        self.gpu.phase = LOOP

    def restore_handlers(self) -> None:
        self.gpu.phase = SETUP


@contextmanager
def _phases(gpu: Any) -> Iterator[None]:
    report: Report = gpu.report

    def around(owner: Any, name: str, phase: str, count: Callable[..., object] | None = None) -> Any:
        original = getattr(owner, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            if phase == FORWARD and gpu.phase != LOOP:
                return original(*args, **kwargs)
            if count is not None:
                count(*args)
            with gpu.during(phase):
                return original(*args, **kwargs)

        return patch.object(owner, name, function)

    def one_more(name: str) -> Callable[..., None]:
        return lambda *_: setattr(report, name, getattr(report, name) + 1)

    def one_pass(model: TaskModel, examples: Any, *_: Any) -> None:
        report.passes += bool(len(examples))

    from engine import checkpoint, distributed
    from engine.tasks import generation, seq2seq

    with ExitStack() as stack:
        contexts: list[AbstractContextManager[Any]] = [
            around(Precision, "forward", FORWARD, one_more("micro_batches")),
            around(Precision, "unscale_", STEP),
            around(Precision, "clip_", STEP),
            around(Precision, "step", STEP),
            around(loop.Penalties, "add_gradients_", STEP),
            around(loop.Ema, "update_", STEP),
            around(RunLog, "log_step", LOG),
            around(loop, "read_numbers", LOG),
            around(loop, "evaluate", EVALUATION, one_pass),
            around(checkpoint, "save", SAVE),
            around(checkpoint, "check_optimizer", SETUP),
            around(distributed, "wrap", SETUP),
            patch.object(distributed, "_check_empty", lambda loss: None),  # the device has no numbers
            patch.object(loop, "explain_best", lambda *_: ""),
            around(generation, "generate_tokens", GENERATION),
            around(seq2seq, "generate", GENERATION),
            _counted(RunLog, "count_step", one_more("steps")),
            _counted(importlib.import_module("models.generation.generate")._Reader, "_read", one_more("reads")),
            patch.object(loop, "open_task", _with_phases(loop.open_task, gpu, one_more("batches"))),
        ]
        for context in contexts:
            stack.enter_context(context)
        yield


def _counted(owner: Any, name: str, count: Callable[[], None]) -> Any:
    original = getattr(owner, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        count()
        return original(*args, **kwargs)

    return patch.object(owner, name, function)


def _with_phases(open_task: Callable[..., Any], gpu: Any, count: Callable[[], None]) -> Callable[..., Any]:
    def found(*args: Any) -> tuple[Task, str]:
        task, watched = open_task(*args)

        def show(*arguments: Any) -> str:
            with gpu.during(SAMPLES):
                return task.show_generations(*arguments)

        def evaluate_batch(model: TaskModel, batch: Any, *rest: Any) -> Any:
            if batch.indices:
                count()
            return task.evaluate_batch(model, batch, *rest)

        def compute_metrics(*_: Any) -> dict[str, float]:
            return dict.fromkeys(("loss", *task.metrics), 1.0)  # the device has no numbers to compute them from

        changed = {"show_generations": show, "evaluate_batch": evaluate_batch, "compute_metrics": compute_metrics}
        return replace(task, **changed), watched

    return found
