"""The one error that bad data raises, and the collector that lets a file report all of its errors at once."""

from __future__ import annotations


class DataError(ValueError):
    """The data cannot be used; the message says file, line, reason and what would work."""


class ErrorList:
    """Collects `file:line: reason` while a file is read, and raises all of them together, in the order of the lines."""

    SHOWN = 20

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self.found)

    def add(self, path: object, line: int, reason: str) -> None:
        self.found.append((line, f"{path}:{line}: {reason}"))

    def raise_if_any(self) -> None:
        if self.found:
            shown = [text for _, text in sorted(self.found, key=lambda item: item[0])[: self.SHOWN]]
            left = len(self.found) - len(shown)
            raise DataError("\n".join(shown) + (f"\n... and {left:,} more" if left else ""))
