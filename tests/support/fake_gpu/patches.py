"""What the host asks of a GPU, and what PyTorch decides in C++ by asking one, answered for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from support.fake_gpu.device import CUDA, FakeGpu
from support.fake_gpu.report import BACKWARD

MEMORY = 140 * 2**30
aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


def patches(gpu: FakeGpu) -> Iterator[AbstractContextManager[object]]:
    """Yield a context for each name of PyTorch that is replaced."""
    cuda: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *a, **k: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: gpu.wait("torch.cuda.synchronize"),
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "get_device_properties": lambda device=None: MagicMock(total_memory=MEMORY),
        "get_device_name": lambda device=None: "NVIDIA H200",
        "get_device_capability": lambda device=None: (9, 0),
        "is_current_stream_capturing": lambda: False,
        "empty_cache": lambda: None,
        "default_generators": (torch.Generator(),),
        "Stream": MagicMock(),
        "current_stream": MagicMock(),
        "stream": lambda stream: nullcontext(),
        **dict.fromkeys(("memory_reserved", "memory_allocated", "max_memory_allocated"), lambda device=None: 0),
    }
    accelerator: dict[str, Any] = {
        "is_available": lambda: True,
        "current_accelerator": lambda *a, **k: torch.device("cuda"),
        "set_device_index": lambda index: None,
        "current_device_index": lambda: 0,
    }
    tensor: dict[str, Any] = {
        "backward": _backward(gpu, torch.Tensor.backward),
        "pin_memory": _pin_memory(gpu),
        "record_stream": lambda self, stream: None,
        "new_tensor": _new_tensor(torch.Tensor.new_tensor),
        "__getitem__": _index(torch.Tensor.__getitem__),
        "__setitem__": _index(torch.Tensor.__setitem__),
        "numpy": _numpy(torch.Tensor.numpy),
    }
    for owner, names in ((torch.cuda, cuda), (torch.accelerator, accelerator), (torch.Tensor, tensor)):
        yield from (patch.object(owner, name, new) for name, new in names.items() if hasattr(owner, name))
    yield patch.object(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    yield patch.object(FakeTensorMode, "avoid_device_init", True)
    yield patch.object(fake_tensor, "init_gpu_context", lambda device: None)
    yield patch.object(FakeTensor, "tolist", lambda self: gpu.read(self, "tolist").tolist(), create=True)
    yield patch.object(F, "scaled_dot_product_attention", _attention(F.scaled_dot_product_attention))
    yield patch.object(torch.autograd, "grad", _grad(gpu, torch.autograd.grad))
    yield patch.object(torch.autograd, "backward", _backward(gpu, torch.autograd.backward))
    yield patch.object(torch._C, "_current_graph_task_id", lambda: gpu.walks)  # a checkpoint runs once a backward
    yield patch.object(torch, "tensor", _tensor(torch.tensor))
    yield patch.object(nn.Module, "to", _module_to(gpu, nn.Module.to))


def _attention(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Choose the kernel as CUDA does: flash for half precision without a mask, else the memory-efficient one."""

    def attention(
        query: Any,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not isinstance(query, FakeTensor):
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = (x.to(dtype) for x in (query, key, value))
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(dtype)
        if {x.dtype for x in (query, key, value)} != {query.dtype}:
            raise RuntimeError("query, key and value differ in dtype")
        if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
            raise RuntimeError(f"attn_mask is {attn_mask.dtype}, query {query.dtype}")
        with torch.autocast("cuda", enabled=False):
            if attn_mask is None and query.dtype in HALF and query.shape[-1] % 8 == 0:
                flash = aten._scaled_dot_product_flash_attention
                out: Tensor = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
                return out
            mask = None if attn_mask is None else _expand_mask(attn_mask, query, key)
            efficient = aten._scaled_dot_product_efficient_attention
            out = efficient(query, key, value, mask, True, dropout_p, is_causal, scale=scale)[0]
            return out

    return attention


def _expand_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return the mask as the memory-efficient kernel reads it: numbers, aligned, a row for each head."""
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=CUDA)
        mask = torch.where(mask, zero, torch.full_like(zero, float("-inf")))
    if mask.stride(-1) != 1 or any(stride % 8 for stride in mask.stride()[:-1]):
        missing = 8 - mask.shape[-1] % 8
        mask = F.pad(mask, (0, missing))[..., :-missing]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _module_to(gpu: FakeGpu, original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Replace the parameters: their data cannot be swapped for that of a FakeTensor."""

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device = torch._C._nn._parse_to(*args, **kwargs)[0]  # type: ignore[attr-defined]
        if device is None or device.type != "cuda":
            return original(module, *args, **kwargs)
        gpu.is_loading = True
        moved: dict[int, nn.Parameter] = {}
        for child in module.modules():
            for name, p in [*child._parameters.items()]:
                if p is not None and not isinstance(p, FakeTensor):
                    if id(p) not in moved:
                        with torch.no_grad():
                            moved[id(p)] = nn.Parameter(p.detach().to(device), requires_grad=p.requires_grad)
                    child._parameters[name] = moved[id(p)]
            for name, buffer in [*child._buffers.items()]:
                if buffer is not None and not isinstance(buffer, FakeTensor):
                    child._buffers[name] = buffer.to(device)
        gpu.is_loading = False
        return module

    return to


def _pin_memory(gpu: FakeGpu) -> Callable[..., Tensor]:
    def pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
        copy = tensor.clone()
        gpu.pinned[copy] = True
        return copy

    return pin_memory


def _tensor(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        made = original(data, device="cpu", **kwargs)
        return made if device is None or torch.device(device).type == "cpu" else made.to(device)

    return tensor


def _new_tensor(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def new_tensor(tensor: Any, data: Any, **kwargs: Any) -> Tensor:
        if not isinstance(tensor, FakeTensor):
            return original(tensor, data, **kwargs)
        return torch.tensor(data, dtype=kwargs.get("dtype", tensor.dtype), device=tensor.device)

    return new_tensor


def _index(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make an index that is a list or an array a tensor on the device first, as PyTorch does."""

    def item(tensor: Any, index: Any, *rest: Any) -> Any:
        if isinstance(tensor, FakeTensor):
            parts = index if isinstance(index, tuple) else (index,)
            parts = tuple(torch.tensor(x, device=tensor.device) if isinstance(x, list) else x for x in parts)
            index = parts if isinstance(index, tuple) else parts[0]
        return original(tensor, index, *rest)

    return item


def _numpy(original: Callable[..., Any]) -> Callable[..., Any]:
    def numpy(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensor, FakeTensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")
        return original(tensor, *args, **kwargs)

    return numpy


def _backward(gpu: FakeGpu, original: Callable[..., None]) -> Callable[..., None]:
    def backward(tensor: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(tensor, FakeTensor):
            return original(tensor, *args, **kwargs)
        with gpu.during(BACKWARD if gpu.phase not in ("setup",) else gpu.phase):
            gpu.backward(tensor, {})

    return backward


def _grad(gpu: FakeGpu, original: Callable[..., Any]) -> Callable[..., Any]:
    def grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(outputs, FakeTensor):
            return original(outputs, inputs, *args, **kwargs)
        wanted = inputs if isinstance(inputs, list | tuple) else [inputs]
        found: dict[int, Tensor | None] = {id(x): None for x in wanted}
        gpu.backward(outputs, found)
        return tuple(found[id(x)] for x in wanted)

    return grad
