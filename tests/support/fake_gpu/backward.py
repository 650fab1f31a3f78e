"""Backward in Python: torch's C++ engine refuses CUDA tensors without a driver.

The nodes of the graph are torch's own, each called once all of its gradients are there, so the ops are the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def run_backward(root: Tensor, wanted: dict[int, Tensor | None]) -> None:
    """Call every node below `root`; add the gradients of leaves to .grad, or to `wanted`, by id, if it has any."""
    start = root.grad_fn
    if start is None:
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    waiting = _count_parents(start)
    gradients: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    gradients[start][root.output_nr] = torch.ones_like(root)
    ready = [start]
    while ready:
        node = ready.pop()
        given = gradients.pop(node, {})
        variable = getattr(node, "variable", None)
        if variable is not None and type(node).__name__ == "AccumulateGrad":
            if given:
                _accumulate(variable, given[0], wanted)
            continue
        results = _call(node, given)
        for i, (child, number) in enumerate(node.next_functions):
            if child is None:
                continue
            if i < len(results) and results[i] is not None:
                value = _fit(results[i], child._input_metadata[number])
                before = gradients[child].get(number)
                gradients[child][number] = value if before is None else before + value
            waiting[child] -= 1
            if not waiting[child]:
                ready.append(child)


def _count_parents(start: Any) -> Counter[Any]:
    waiting: Counter[Any] = Counter()
    seen, stack = {start}, [start]
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None:
                waiting[child] += 1
                if child not in seen:
                    seen.add(child)
                    stack.append(child)
    return waiting


def _call(node: Any, given: dict[int, Tensor]) -> list[Tensor | None]:
    """Return the gradients for node.next_functions."""
    metadata = node._input_metadata
    values = [_fit(given.get(i), metadata[i]) for i in range(len(metadata))]
    if all(value is None for value in values):
        return []
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        results = node(*values)
        return list(results) if isinstance(results, tuple) else [results]
    results = node.apply(*values)
    results = results if isinstance(results, tuple) else (results,)
    needed = [result for result, need in zip(results, node.needs_input_grad, strict=False) if need]
    places = [i for i, (child, _) in enumerate(node.next_functions) if child is not None]
    spread: list[Tensor | None] = [None] * len(node.next_functions)
    for i, result in zip(places, needed, strict=False):
        spread[i] = result
    return spread


def _accumulate(variable: Tensor, grad: Tensor, wanted: dict[int, Tensor | None]) -> None:
    grad = grad.to(variable.dtype)
    if wanted:
        if id(variable) in wanted:
            before = wanted[id(variable)]
            wanted[id(variable)] = grad if before is None else before + grad
    elif variable.grad is None:
        variable.grad = grad
    else:
        variable.grad += grad


def _fit(grad: Tensor | None, metadata: Any) -> Tensor | None:
    """Do what the engine does before it hands a gradient on: fit shape and dtype, check the device."""
    if grad is None:
        return None
    if tuple(grad.shape) != tuple(metadata.shape):
        grad = grad.sum_to_size(*metadata.shape) if metadata.shape else grad.sum()
    if grad.dtype != metadata.dtype:
        grad = grad.to(metadata.dtype)
    if grad.device.type != metadata.device.type:
        raise RuntimeError(f"a gradient on {grad.device} for a value on {metadata.device}")
    return grad
