"""Regional compilation (torch.compile): the layers of a model, each without its attention.

Text is packed, so micro-batches differ in T and in every sequence's length. Between two attentions nothing knows of
more than T, which a graph can leave open; attention, which has kernels of its own, goes on as it is. So a layer is as
many graphs as its attentions cut it into, and these serve all layers and all lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ModelError

Forward = Callable[..., Tensor]


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """Compile the layers of a TaskModel for training, at its first step; with gradients off they stay as they are.

    Parameters, checkpoints and copies of the model are as before. To be called before checkpoint_activations, which
    then runs the compiled layers again. Dropout is another draw than the uncompiled model's, as much a function of the
    seed. Layers that drop whole paths are left out, since a path is dropped for a sequence. ModelError where the
    backend "inductor" lacks the compiler that it calls for the model's device.
    """
    layers = [layer for layer in model.backbone.layers if not layer.path]
    if any("forward" in vars(layer) for layer in layers):
        raise ModelError("compile_layers comes once, and before checkpoint_activations")
    if backend == "inductor":
        _check_compiler(next(model.parameters()).device)
    # The functions of the classes, not the methods of the layers: what is compiled for one layer serves the next.
    kinds = {type(layer) for layer in layers}
    compiled = {
        kind: _in_training(kind.forward, torch.compile(kind.forward, dynamic=True, backend=backend)) for kind in kinds
    }
    kinds = {
        type(module) for layer in layers for module in layer.modules() if _is_packed(module) and module is not layer
    }
    left_out = {kind: torch.compiler.disable(kind.forward) for kind in kinds}
    for layer in layers:
        for module in layer.modules():
            if type(module) in left_out:
                module.forward = MethodType(left_out[type(module)], module)  # which a deepcopy binds to the copy
        layer.forward = MethodType(compiled[type(layer)], layer)


def _is_packed(module: nn.Module) -> bool:
    """Is it told where sequences begin, so that a graph of it would be good for these lengths only?"""
    return "packing" in signature(type(module).forward).parameters


def _in_training(plain: Forward, compiled: Forward) -> Forward:
    """The forward of a layer class: compiled while gradients are kept, for the shapes that one graph can serve."""

    def forward(layer: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        """x: (T, D). T = 0 and T = 1 would be a graph each, and a view another one, with guards on what it views."""
        if len(x) < 2 or not torch.is_grad_enabled():
            return plain(layer, x, *rest)
        return compiled(layer, x if x._base is None else x.clone(), *rest)

    return forward


def _check_compiler(device: torch.device) -> None:
    """ModelError, in the place of a traceback out of the first step, where there is nothing to compile with."""
    # Imported here: who does not compile need not wait for it.
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ModelError(
                "train.compile on a GPU needs triton, and none works here: install the one of this PyTorch, or train "
                "with train.compile = false"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ModelError(
            "train.compile needs a C++ compiler, and none works here: install g++ (or name another in CXX), or train "
            "with train.compile = false"
        ) from error
