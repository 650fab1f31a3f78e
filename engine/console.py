"""stdout and stderr of a command. A run goes on where one of them fails: full, closed, without a reader, not UTF-8."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any


class Console(io.FileIO):
    """A descriptor that is written until its first error, which is in `failure`; later texts are dropped."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes; return how many were written or dropped."""
        if self.failure is None:
            try:
                written = super().write(data)
                if written is not None:
                    return written
                select.select([], [self], [])  # a terminal that another process made non-blocking
                return self.write(data)
            except OSError as error:
                self.failure = error
                _explain(self, error)
        return len(memoryview(data).cast("B"))


def _explain(console: Console, error: OSError) -> None:
    """Say on stderr why stdout ends here; a pipe whose reader has ended, as in `| head`, needs no warning."""
    if console.fileno() == 1 and not isinstance(error, BrokenPipeError):
        print(f"warning: stdout cannot be written ({error.strerror}); going on without it", file=sys.stderr, flush=True)


def protect() -> None:
    """Replace sys.stdout and sys.stderr by streams that escape what their encoding lacks and ignore failures.

    A stream that was replaced before, as in a notebook, stays.
    """
    if sys.stdout is sys.__stdout__:
        sys.stdout = _protected(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _protected(2, sys.stderr)


def _protected(descriptor: int, stream: Any) -> io.TextIOWrapper:
    if stream is None:  # closed, as by `>&-`; its number may be that of another file by now
        descriptor = os.open(os.devnull, os.O_WRONLY)
    else:
        stream.flush()
    raw = Console(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=descriptor == 2 or raw.isatty(),
    )
