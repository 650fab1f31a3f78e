"""The one error that bad data raises, and the collector that lets a file report all of its errors at once."""

from __future__ import annotations


class DataError(ValueError):
    """The data cannot be used; the message says file, line, reason and what would work."""


class ErrorList:
    """Collects `file:line: reason` lines while a file is read, and raises them together."""

    SHOWN = 20

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, path: object, line: int, reason: str) -> None:
        self.lines.append(f"{path}:{line}: {reason}")

    def raise_if_any(self) -> None:
        if self.lines:
            more = f"\n... and {len(self.lines) - self.SHOWN} more" if len(self.lines) > self.SHOWN else ""
            raise DataError("\n".join(self.lines[: self.SHOWN]) + more)
