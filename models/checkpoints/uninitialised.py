"""Build modules without giving their parameters values: every value comes from a file or from init_weights.

Only this module relies on how torch initialises its modules: they call functions of torch.nn.init, which a
TorchFunctionMode intercepts where they draw random numbers. tests/models/checkpoints/test_uninitialised.py fails when
a version of torch does it differently.

The documented way is slower. Building on the meta device with Module.to_empty imports torch's decompositions and
compiler, which took 2 s and 160 MB when measured. (nn.utils.skip_init uses the meta device too.)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models.checkpoints.tensor_files import TensorFiles
from models.errors import ModelError

MAX_TENSORS = 20_000  # of a model from scratch; about a thousand layers


class Uninitialised(TorchFunctionMode):
    """A context in which modules get memory without values: the functions of torch.nn.init draw no random numbers.

    Constants stay: torch.zeros, torch.ones, and nn.init.zeros_ and ones_, which cannot be intercepted.
    mark: fill the memory with NaN, so that a parameter without initialisation is found.
    Raises ModelError where the config.json of `folder` needs more than `max_tensors` tensors or `max_numbers` numbers,
    or more memory than the machine has. Memory without values is not in use yet, so the error comes early enough.
    """

    def __init__(self, folder: Path, max_tensors: float, max_numbers: float, mark: bool = False):
        super().__init__()
        self.mark = mark
        self.folder, self.max_tensors, self.max_numbers = folder, max_tensors, max_numbers
        self.tensors = self.numbers = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if function in (torch.empty, torch.zeros, torch.ones):
            tensor = self._allocate(args, kwargs or {})
            return tensor if function is torch.empty else tensor.fill_(function is torch.ones)
        return function(*args, **(kwargs or {}))

    def _allocate(self, args: Any, kwargs: Any) -> Tensor:
        try:
            tensor = torch.empty(*args, **kwargs)
        except (RuntimeError, MemoryError):
            raise ModelError(f"{self.folder}: config.json describes a model that is larger than the memory") from None
        self.tensors += 1
        self.numbers += tensor.numel()
        if self.tensors > self.max_tensors or self.numbers > self.max_numbers:
            raise ModelError(
                f"{self.folder}: config.json describes a model of {self.tensors:,} tensors and {self.numbers:,} "
                "numbers or more, which is far too large"
            )
        return tensor.fill_(torch.nan) if self.mark and tensor.is_floating_point() else tensor


def size_limits(files: TensorFiles | None) -> tuple[float, float]:
    """Return the maximum (tensors, numbers) of a model from these files with any new head; None: from scratch."""
    if files is None:
        return MAX_TENSORS, math.inf
    shapes = [stored.shape for stored in files.entries.values()]
    return 4 * len(shapes) + 100, 4 * sum(map(math.prod, shapes)) + 2**24
