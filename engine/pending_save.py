"""The save of last/ that a sharded run goes on beside: a thread writes it, at most one at a time in this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PendingSave:
    """A save in the background. explain: returns what to raise for an error of it."""

    future: Future[Any]
    explain: Callable[[BaseException], Exception]


_pending: PendingSave | None = None  # of this process


def begin(future: Future[Any], explain: Callable[[BaseException], Exception]) -> None:
    """Note that a save has begun; `wait` has been called for the one before."""
    global _pending
    _pending = PendingSave(future, explain)


def has_failed() -> bool:
    """Return whether the save has ended with an error, which `wait` raises."""
    return _pending is not None and _pending.future.done() and _pending.future.exception() is not None


def wait() -> None:
    """Wait until no save is in the background; raise its error. All ranks have the same one."""
    global _pending
    pending, _pending = _pending, None
    if pending is not None and (error := pending.future.exception()) is not None:
        raise pending.explain(error) from error


def end() -> None:
    """Wait until no save is in the background, as a run ends by another error than the save's."""
    with suppress(Exception):
        wait()
