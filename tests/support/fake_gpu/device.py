"""A GPU without data: host tensors are real, tensors on cuda:0 are FakeTensors with a shape, a dtype and a device.

A dispatch mode sees every op. PyTorch itself finds device mismatches and wrong dtypes; the mode records

- every wait of the host for the device: .item(), .tolist(), bool(), copies to the host, sizes that depend on values;
- every copy to the device: pinned, pageable or blocking;
- the kernels that are launched (report.py).

What was made of the host's tensors alone (ids, lengths, labels) is computed on the host too, so that a value that is
read back is the right one. Everything else reads as MADE_UP.

It cannot see which attention kernel CUDA chooses, numbers, NCCL, Inductor, or out of memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from support.fake_gpu.backward import run_backward
from support.fake_gpu.report import SETUP, Copy, Report, Wait

CUDA = torch.device("cuda", 0)
MADE_UP = 2.0  # a value that is read from the device
LARGEST_KNOWN = 2**20  # elements of a tensor that is also computed on the host
SIZE_UNKNOWN = ("nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
CREATES = ("arange", "zeros", "ones", "full")


class FakeGpu(TorchDispatchMode):
    """Use as `with FakeGpu(root) as gpu: ...; gpu.report`. root: the folder whose lines are named in the report."""

    def __init__(self, root: Path):
        super().__init__()
        self.root = str(root)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.report = Report()
        self.phase = SETUP
        self.pinned: Any = WeakTensorKeyDictionary()
        self.known: Any = WeakTensorKeyDictionary()  # a fake tensor -> its values on the host
        self.depth = self.walks = 0
        self.is_loading = False  # of parameters: nothing is computed of those alone
        self.stack = ExitStack()

    def __enter__(self) -> FakeGpu:
        self.depth += 1
        if self.depth == 1:
            from support.fake_gpu.patches import patches

            torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
            for patch in patches(self):
                self.stack.enter_context(patch)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.depth -= 1
        if not self.depth:
            self.stack.close()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Record what happens in the block under `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def wait(self, what: str) -> None:
        """Record that the host waits for the device."""
        self.report.events.append(Wait(self.phase, self.report.steps, what, self._frames()))

    def backward(self, root: Tensor, wanted: dict[int, Tensor | None]) -> None:
        """Run a backward; for the gradients of `wanted`, or of all parameters."""
        self.walks += 1
        run_backward(root, wanted)

    def _frames(self) -> tuple[str, ...]:
        places, frame = [], sys._getframe(2)
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(self.root) and "fake_gpu" not in name:
                places.append(f"{name[len(self.root) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}")
            frame = frame.f_back  # type: ignore[assignment]
        return tuple(places)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        on_gpu = [x for x in tensors if isinstance(x, FakeTensor)]
        target = next((x for x in leaves if isinstance(x, torch.device)), kwargs.get("device"))
        to_gpu = target is not None and torch.device(target).type == "cuda"
        if not on_gpu and not to_gpu:
            return func(*args, **kwargs)
        if name == "device":
            return args[0].fake_device
        if torch.is_inference_mode_enabled() and func._can_decompose():  # there, composite ops arrive whole
            with self:
                return func.decompose(*args, **kwargs)
        if name in ("_local_scalar_dense", "equal", "is_nonzero"):
            return self._read_scalar(name, args[0])
        to_host = name == "_to_copy" and on_gpu and target is not None and not to_gpu
        if to_host or (name == "copy_" and not isinstance(args[0], FakeTensor)):
            return self._copy_to_host(name, args, kwargs)
        host = [x for x in tensors if not isinstance(x, FakeTensor)]
        if host and ((name == "_to_copy" and to_gpu) or name == "copy_"):
            is_async = bool(kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            self._count_copy(host[-1], is_async)
            if name == "_to_copy":
                return self._copy_to_device(host[-1], kwargs.get("dtype") or host[-1].dtype)
        return self._launch(func, name, args, kwargs, on_gpu)

    def _launch(self, func: Any, name: str, args: Any, kwargs: Any, on_gpu: list[Any]) -> Any:
        """Run an op of the device on shapes alone."""
        if name in INDEXING:
            args = self._without_masks(name, args)
        if name in SIZE_UNKNOWN:
            self.wait(f"{name}: its size depends on values")
            if name == "nonzero":
                return self._stack(self._places(args[0]))
        if name == "repeat_interleave" and kwargs.get("output_size") is None and len(args) < 3:
            self.wait("repeat_interleave without output_size")
        if name == "set_":
            raise NotImplementedError("set_ on the fake GPU")
        self.report.count_kernels(self.phase, name, args)
        with self.fake:
            out = func(*args, **kwargs)
        self._compute_known(func, name, args, kwargs, on_gpu, out)
        return out

    def _read_scalar(self, name: str, tensor: Any) -> Any:
        self.wait(f"a {tensor.dtype} value is read by the host ({name})")
        if name != "_local_scalar_dense":
            return True
        if tensor in self.known:
            return self.known[tensor].item()
        return True if tensor.dtype == torch.bool else MADE_UP if tensor.is_floating_point() else 1

    def read(self, tensor: Any, what: str) -> Tensor:
        """Return the values of a tensor on the host, after a wait; zeros where they are not known."""
        if tensor.numel():
            self.wait(f"{what} of {tensor.dtype} {[*tensor.shape]}")
        return self.known[tensor] if tensor in self.known else torch.zeros(tensor.shape, dtype=tensor.dtype)

    def _copy_to_host(self, name: str, args: Any, kwargs: Any) -> Tensor:
        source = args[1] if name == "copy_" else args[0]
        values = self.read(source, "a copy to the host")
        if name == "copy_":
            target: Tensor = args[0]
            return target.copy_(values)
        return values.to(kwargs.get("dtype") or source.dtype)

    def _count_copy(self, source: Tensor, is_async: bool) -> None:
        base = source._base if source._base is not None else source
        kind = "blocking" if not is_async else "pinned" if source in self.pinned or base in self.pinned else "pageable"
        if not source.numel():
            return
        if kind == "blocking":
            self.wait(f"a copy to the device that is not non_blocking, {source.dtype} {[*source.shape]}")
        self.report.events.append(Copy(self.phase, self.report.steps, kind, self._frames()))

    def _copy_to_device(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        with self.fake:
            out = torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=CUDA)
        if source.numel() <= LARGEST_KNOWN and not self.is_loading:
            self.known[out] = source.detach().to(dtype, copy=True)
        return out

    def _places(self, mask: Any) -> list[Tensor]:
        """Return the places of the true values of a mask, (n,) for each dimension; of all where they are not known."""
        known = self.known[mask].nonzero() if mask in self.known else None
        count = mask.numel() if known is None else len(known)
        with self.fake:
            places = [torch.zeros(count, dtype=torch.int64, device=CUDA) for _ in range(mask.dim())]
        for i, place in enumerate(places if known is not None else ()):
            self.known[place] = known[:, i]  # type: ignore[index]
        return places

    def _stack(self, places: list[Tensor]) -> Tensor:
        with self.fake:
            out = torch.stack(places, 1)
        if all(place in self.known for place in places):
            self.known[out] = torch.stack([self.known[place] for place in places], 1)
        return out

    def _without_masks(self, name: str, args: Any) -> Any:
        indices: list[Any] = []
        for index in args[1]:
            if isinstance(index, FakeTensor) and index.dtype in (torch.bool, torch.uint8):
                self.wait(f"{name} by a mask: its size depends on values")
                self.report.count_kernels(self.phase, "nonzero")
                indices += self._places(index)
                continue
            if isinstance(index, Tensor) and not isinstance(index, FakeTensor) and isinstance(args[0], FakeTensor):
                self.wait(f"{name} by an index on the host, {[*index.shape]}")
            indices.append(index)
        return (args[0], indices, *args[2:])

    def _compute_known(self, func: Any, name: str, args: Any, kwargs: Any, on_gpu: list[Any], out: Any) -> None:
        """Compute the op on the host too, where all that it reads is known there."""
        made = [x for x in tree_leaves(out) if isinstance(x, FakeTensor)]
        if not made or (not on_gpu and name not in CREATES):
            return
        on_gpu = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
        if sum(x.numel() for x in made) > LARGEST_KNOWN or any(x not in self.known for x in on_gpu):
            for x in made:
                self.known.pop(x, None)
            return

        def on_host(x: Any) -> Any:
            if isinstance(x, FakeTensor):
                return self.known[x]
            return torch.device("cpu") if isinstance(x, torch.device) else x

        values = func(*tree_map(on_host, args), **tree_map(on_host, kwargs))
        for fake, true in zip(made, [x for x in tree_leaves(values) if isinstance(x, Tensor)], strict=True):
            if fake not in self.known:
                self.known[fake] = true
