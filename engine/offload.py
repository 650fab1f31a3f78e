"""optim.offload: the optimizer's states are on the host, and on the device only while their part of it is updated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.undecorated import AdamW

PART = 2**25  # numbers of the parameters that are updated together: 128 MiB for each of their two states in fp32
MOVED = ("exp_avg", "exp_avg_sq")  # what AdamW keeps for each number; the step count of a parameter is one number


class OffloadedAdamW(AdamW):
    """AdamW whose two states for each weight, 8 bytes in fp32, are in pinned memory of the host between the steps.

    After Rajbhandari et al. 2021, "ZeRO-Infinity", which streams them as well. The update itself runs on the device, so
    every number is the same as without offloading. A step copies 16 bytes a weight, and the host waits for its end. On
    a CPU nothing is moved.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters, a part of them at a time."""
        groups = self.param_groups
        try:
            for part in split_groups(groups, PART):
                self._move(part["params"], to_host=False)
                self.param_groups = [part]
                super().step()
                self._move(part["params"], to_host=True)
        finally:
            self.param_groups = groups
        self._wait()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, which torch puts on the device, and move it to the host."""
        super().load_state_dict(state_dict)
        self._move([p for group in self.param_groups for p in group["params"]], to_host=True)
        self._wait()

    def _move(self, parameters: Sequence[Tensor], to_host: bool) -> None:
        for p in parameters:
            state = self.state.get(p, {})
            for name in MOVED if p.device.type != "cpu" else ():
                if name in state:
                    value: Tensor = state[name]
                    target = torch.empty_like(value, device="cpu" if to_host else p.device, pin_memory=to_host)
                    state[name] = target.copy_(value, non_blocking=True)

    def _wait(self) -> None:
        """Wait until the copies to the host have ended, since a checkpoint reads them there."""
        if any(p.device.type == "cuda" for group in self.param_groups for p in group["params"]):
            torch.cuda.current_stream().synchronize()


def split_groups(groups: Sequence[dict[str, Any]], limit: int) -> Iterator[dict[str, Any]]:
    """Yield the groups cut into parts of at most `limit` numbers; a larger parameter is a part alone."""
    for group in groups:
        part: list[Tensor] = []
        for p in group["params"]:
            if part and sum(q.numel() for q in part) + p.numel() > limit:
                yield group | {"params": part}
                part = []
            part.append(p)
        if part:
            yield group | {"params": part}
