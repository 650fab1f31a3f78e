"""The error for unusable data, and the list in which a reader collects all errors of a file."""

from __future__ import annotations

MEMORY = "memory:"  # the prefix of the names of rows in memory (data/formats/memory.py)


class DataError(ValueError):
    """Data that cannot be used. The message has the file, the line, the reason and what would work."""


class ErrorList:
    """The errors of a file, as `file:line: reason`, collected while it is read and raised together, sorted by line."""

    SHOWN = 20

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self.found)

    def add(self, path: object, line: int, reason: str) -> None:
        """Add an error; `path` is a file, or the name of rows in memory, whose lines are their numbers."""
        self.found.append((line, f"{str(path).removeprefix(MEMORY)}:{line}: {reason}"))

    def raise_if_any(self) -> None:
        """Raise one DataError with the first errors and the number of the others; do nothing without errors."""
        if self.found:
            shown = [text for _, text in sorted(self.found, key=lambda item: item[0])[: self.SHOWN]]
            left = len(self.found) - len(shown)
            raise DataError("\n".join(shown) + (f"\n... and {left:,} more" if left else ""))
