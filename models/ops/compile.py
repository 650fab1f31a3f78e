"""Regional compilation (torch.compile): the layers of a model, each without its attention.

Text is packed, so micro-batches differ in T and in the length of every sequence. The operations between two attentions
depend on T alone, which a graph can leave open. Attention has kernels of its own and stays uncompiled. So a layer
becomes one graph for each part between its attentions, and these graphs serve all layers and all lengths.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import signature
from types import MethodType

import torch
from torch import Tensor, nn

from models.errors import ModelError
from models.ops.layers import LayeredModel
from models.ops.packing import Selection

Forward = Callable[..., Tensor]


def compile_layers(model: LayeredModel, backend: str = "inductor") -> None:
    """Compile the layers of a TaskModel for training, at its first step; without gradients they run uncompiled.

    - Parameters, checkpoints and copies of the model stay as before.
    - Call it before checkpoint_activations, which then applies to the compiled layers.
    - Dropout draws other random numbers than in the uncompiled model; they too are a function of the seed.
    - Layers with drop path stay uncompiled, since drop path depends on where sequences begin.
    - After a change of requires_grad, call drop_graphs.
    Raises ModelError where the backend "inductor" lacks the compiler that it calls for the model's device.
    """
    layers = [layer for layer in model.backbone.layers if not getattr(layer, "drop_path_rate", 0.0)]
    if any("forward" in vars(layer) for layer in layers):
        raise ModelError("compile_layers must be called only once, and before checkpoint_activations")
    if backend == "inductor":
        _check_compiler(next(model.parameters()).device)
    # Functions of the classes are compiled, not methods of the layers, so that all layers share the code.
    layer_classes = {type(layer) for layer in layers}
    compiled = {
        cls: _in_training(cls.forward, torch.compile(cls.forward, dynamic=True, backend=backend))
        for cls in layer_classes
    }
    packed_classes = {
        type(module) for layer in layers for module in layer.modules() if _is_packed(module) and module is not layer
    }
    left_out = {cls: torch.compiler.disable(cls.forward) for cls in packed_classes}  # type: ignore[no-untyped-call]
    for layer in layers:
        for module in layer.modules():
            if type(module) in left_out:
                module.forward = MethodType(left_out[type(module)], module)  # a deepcopy binds it to the copy
        layer.forward = MethodType(compiled[type(layer)], layer)


def drop_graphs() -> None:
    """Compile everything anew, at its next forward: for compiled layers, after a change of requires_grad.

    torch 2.6 to 2.11 may use the old graph, which treats the parameter as a constant, so it gets no gradient; 2.14 not.
    """
    if "torch._dynamo" in sys.modules:  # it is not imported before something is compiled, and importing it takes 1 s
        torch.compiler.reset()


def _is_packed(module: nn.Module) -> bool:
    """Return whether the forward takes a Packing, so that a graph of it would serve these lengths only."""
    return "packing" in signature(type(module).forward).parameters


def _in_training(plain: Forward, compiled: Forward) -> Forward:
    """Return the forward of a layer class: compiled while gradients are kept, for shapes that one graph can serve."""

    def forward(layer: nn.Module, x: Tensor, *rest: object) -> Tensor:
        """Apply the layer to x, (T, D). T = 0, T = 1 (also of T5's source) and views would each need their own graph.

        With a Selection, as in the last layer, most operations are on few tokens; they too would need other graphs.
        """
        sources = [value[0] for value in rest if isinstance(value, tuple)]  # hidden states of T5's encoder
        reads_few = any(isinstance(value, Selection) for value in rest)
        if reads_few or not torch.is_grad_enabled() or min(map(len, [x, *sources])) < 2:
            return plain(layer, x, *rest)
        return compiled(layer, x if x._base is None else x.clone(), *rest)

    return forward


def _check_compiler(device: torch.device) -> None:
    """Raise ModelError where no compiler is installed; without the check the first step would end in a traceback."""
    # Imported here, since it is slow and only a compiled run needs it.
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
