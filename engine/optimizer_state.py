"""The state of an optimizer as {key: tensor, number or None}, by the names of the parameters.

A key is "exp_avg/backbone.layers.0..." for the state of a parameter, "k/group 0" for what the optimizer changes in a
group, and "k/optimizer" for a number or tensor that it keeps as an attribute and changes.
"""

from __future__ import annotations

import math
import numbers
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.dtensors import is_sharded, local
from engine.errors import TrainingError
from engine.optimizers import Lion
from models.checkpoints.tensor_files import TensorFiles

NO_PARAMETER = "no parameter"
BLOCK = 256  # numbers of bitsandbytes that share a scale; a parameter with fewer than 16 blocks has states in fp32


def expected(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], p: Tensor) -> dict[str, Tensor] | None:
    """Return what an optimizer keeps of a parameter of a group after its first step, as tensors without memory.

    None: an optimizer that is not the engine's, of which nothing is known.
    """

    def empty(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    whole = empty(*p.shape)
    count = {"step": empty(dtype=torch.float32)}
    if isinstance(optimizer, torch.optim.AdamW) or group.get("use_muon") is False:
        return count | {"exp_avg": whole, "exp_avg_sq": whole}
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer": whole} if group["momentum"] else {}
    if isinstance(optimizer, Lion):
        return {"exp_avg": whole}
    if group.get("use_muon"):
        return {"momentum_buffer": whole}
    if isinstance(optimizer, torch.optim.Adafactor):
        if p.ndim < 2:
            return count | {"variance": whole}
        *leading, rows, columns = p.shape
        return count | {"row_var": empty(*leading, rows, 1), "col_var": empty(*leading, 1, columns)}
    if type(optimizer).__name__ != "AdamW8bit":
        return None
    if p.numel() < 16 * BLOCK:
        return {"state1": whole, "state2": whole}
    quantised = {"state": empty(*p.shape, dtype=torch.uint8), "qmap": empty(256)}
    quantised["absmax"] = empty(-(-p.numel() // BLOCK))
    return {f"{kind}{i}": value for i in (1, 2) for kind, value in quantised.items()}


def state_bytes(optimizer: torch.optim.Optimizer, average: bool, part: Callable[[Tensor], Tensor] = local) -> list[int]:
    """Return about how many bytes the states of each parameter take; of an unknown optimizer as many as AdamW's.

    average: whether an average of the weights is kept too. part: which part of a sharded parameter, by default this
    rank's.
    """
    sizes = []
    for group in optimizer.param_groups:
        for p in map(part, group["params"]):
            states = expected(optimizer, group, p)
            known = 2 * p.nbytes if states is None else sum(value.nbytes for value in states.values())
            sizes.append(known + average * p.nbytes)
    return sizes


def class_name(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of an optimizer's class; optim.offload, a setting of the machine, does not change it."""
    return type(optimizer).__name__.removeprefix("Offloaded")


def counters(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what an optimizer may change outside the state of the parameters; tensors are copied.

    The learning rate of a group is not of it: it follows from the step.
    """
    owners: dict[str, Mapping[str, Any]] = {f"group {i}": group for i, group in enumerate(optimizer.param_groups)}
    owners["optimizer"] = {key: value for key, value in vars(optimizer).items() if type(value) in (int, float, Tensor)}
    return {
        f"{kind}/{owner}": value.clone() if isinstance(value, Tensor) else value
        for owner, values in owners.items()
        for kind, value in values.items()
        if kind not in ("params", "lr")
    }


def collect(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], start: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the state of an optimizer; TrainingError for what is no tensor, number or None.

    start: its counters before it was used; those that have not changed are settings, and are left out.
    """
    state: dict[str, Any] = {}
    for name, parameter in parameters.items():
        state |= {f"{kind}/{name}": value for kind, value in optimizer.state.get(parameter, {}).items()}
    known = set(parameters.values())
    state |= {f"{kind}/{NO_PARAMETER}": value for kind, value in optimizer.state.items() if kind not in known and value}
    state |= {key: value for key, value in counters(optimizer).items() if not _are_equal(value, start.get(key))}
    for key, value in state.items():
        kind, _, owner = key.partition("/")
        if isinstance(value, numbers.Real) and not isinstance(value, bool | int | float):  # NumPy's
            state[key] = int(value) if isinstance(value, numbers.Integral) else float(value)
        elif owner == NO_PARAMETER or not isinstance(value, Tensor | bool | int | float | None):
            raise TrainingError(
                f"{type(optimizer).__name__} keeps a {type(value).__name__} ({kind} of {owner}); a checkpoint holds "
                "tensors, numbers and None, of a parameter or a group"
            )
        if isinstance(value, Tensor) and is_sharded(value) and value.shape != parameters[owner].shape:
            raise TrainingError(
                f"{type(optimizer).__name__} keeps {kind} of {owner} in another shape than the weight's, which no "
                "checkpoint of a sharded run holds: set distributed.strategy to ddp"
            )
    return state


def split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (the tensors of what `collect` has returned, its plain values as JSON has them).

    A plain value is a number or None, such as the step count of some optimizers. NaN and the infinities, which JSON
    does not have, become texts; no other value of an optimizer is a text.
    """
    tensors = {key: value.detach() for key, value in state.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in state.items() if key not in tensors}
    unnumbered = {key for key, value in plain.items() if isinstance(value, float) and not math.isfinite(value)}
    return tensors, {key: repr(value) if key in unnumbered else value for key, value in plain.items()}


def join(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state that `split` has split; ValueError for plain values of another kind."""
    values = {key: float(value) if isinstance(value, str) else value for key, value in plain.items()}
    if wrong := [key for key, value in values.items() if not isinstance(value, int | float | None)]:
        raise ValueError(f"{wrong[0]} is not a number")
    return values | dict(tensors)


def read(files: TensorFiles, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the tensors of a file; those in the shape of a sharded parameter are sharded like it.

    The memory of each is a new one, and so aligned as before a stop: the alignment can change the last bit of a result.
    """
    found = {}
    for key, entry in files.entries.items():
        parameter = parameters.get(key.partition("/")[2])
        if parameter is not None and is_sharded(parameter) and entry.shape == parameter.shape:
            found[key] = torch.empty_like(parameter, dtype=entry.dtype, requires_grad=False)
        else:
            found[key] = torch.empty(entry.shape, dtype=entry.dtype)
        files.copy_into(key, found[key])
    return found


def _are_equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return bool(a == b)


def check(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, object], step: int
) -> None:
    """Raise ValueError for a saved state that `collect` has not returned for this optimizer and these parameters.

    step: the steps that the optimizer has taken.
    It may come from a stranger's file. So no attribute may be set that is no number, and no tensor of another shape or
    kind of number may get into a kernel, which does not check them.
    """
    groups = {f"group {i}": group for i, group in enumerate(optimizer.param_groups)}
    of_parameters: defaultdict[str, dict[str, object]] = defaultdict(dict)
    for key, value in saved.items():
        kind, _, owner = key.partition("/")
        if owner == "optimizer" or owner in groups:
            own = getattr(optimizer, kind, None) if owner == "optimizer" else groups[owner].get(kind)
            if not isinstance(own, Tensor | int | float | None) or kind == "lr":
                raise ValueError(f"{key} is not changed by {type(optimizer).__name__}")
        elif owner in parameters:
            of_parameters[owner][kind] = value
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    wanted = {name: expected(optimizer, group_of[p], p) or {} for name, p in parameters.items() if p in group_of}
    if step and not of_parameters and any(wanted.values()):
        raise ValueError(f"no parameter has a state after {step:,} steps")
    for owner, found in of_parameters.items():
        if missing := wanted.get(owner, {}).keys() - found:
            raise ValueError(f"{min(missing)}/{owner} is missing")
        for kind, value in found.items():
            like = parameters[owner] if kind == "average" else wanted.get(owner, {}).get(kind)
            _check_value(f"{kind}/{owner}", value, like)


def _check_value(key: str, value: object, like: Tensor | None) -> None:
    """Raise ValueError for a state that is not like that of its kind; None: nothing is known of the kind."""
    shape = value.shape if isinstance(value, Tensor) else torch.Size()
    if like is not None and shape != like.shape:
        raise ValueError(f"{key} has shape {list(shape)}, not {list(like.shape)}")
    if key.startswith("step/"):
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if like is not None and not (isinstance(number, int | float) and 0 <= number < math.inf):
            raise ValueError(f"{key} = {number!r:.80} is not a number of steps")
    elif like is not None and (not isinstance(value, Tensor) or value.dtype != like.dtype):
        raise ValueError(f"{key} is not a tensor of {like.dtype}")


def load(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, object]) -> None:
    """Load what `collect` has returned through load_state_dict, which moves each value to the right device.

    load_state_dict numbers the parameters across the groups. The settings of the groups stay as they are.
    """
    state = optimizer.state_dict()
    places = {
        parameter: place
        for group, numbered in zip(optimizer.param_groups, state["param_groups"], strict=True)
        for parameter, place in zip(group["params"], numbered["params"], strict=True)
    }
    groups = {f"group {i}": group for i, group in enumerate(state["param_groups"])}
    state["state"] = {}
    for key, value in saved.items():
        kind, _, name = key.partition("/")
        if name == "optimizer":
            setattr(optimizer, kind, value)
        elif name in groups:
            groups[name][kind] = value
        elif parameters.get(name) in places:  # always, unless run.allow_changes
            state["state"].setdefault(places[parameters[name]], {})[kind] = value
    optimizer.load_state_dict(state)
