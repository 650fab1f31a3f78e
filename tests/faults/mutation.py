"""Random changes of files, and what every fuzzer asks for: a result or an error of the user's, soon, in little room.

A fuzzer is a file fuzz_*.py with run(count, seed) -> {"tries", "survived", "failures"}.
"""

from __future__ import annotations

import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import USER_ERRORS

SECONDS = 5.0  # that one try may take
MEGABYTES = 200  # that one try may allocate
FRAGMENTS = [
    *(
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\r",
        b"\n",
        b"\n\n",
        b"\t",
        b'"',
        b"'",
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
    ),
    *(
        b",",
        b":",
        b"null",
        b"true",
        b"NaN",
        b"Infinity",
        b"-1",
        b"0",
        b"1e999",
        b"9" * 400,
        b"-0.0",
        b"18446744073709551616",
    ),
    *(
        b"\\ud800",
        b"\\u0000",
        b"\xc3",
        b"\xf0\x9f\x8e\x89",
        "\u2028\x85\u202e".encode(),
        b"[" * 20_000,
        b'{"a":' * 5_000,
    ),
    *(
        b"x" * 100_000,
        b"__label__",
        b"data",
        b"rows",
        b"../../x",
        b"{}",
        b"[]",
        b'""',
        b"-DOCSTART-",
        b"O",
        b"I-",
        b"#",
    ),
]


class HangError(BaseException):
    """A try has taken more than SECONDS; no Exception, so that nothing that is tried catches it."""


def mutate(rng: random.Random, content: bytes, most: int = 4) -> bytes:
    """Return the content with one to `most` random changes."""
    for _ in range(rng.randint(1, most)):
        content = change(rng, content)
    return content


def change(rng: random.Random, content: bytes) -> bytes:
    """Return the content with a part inserted, replaced, removed, repeated or moved, or with a byte changed."""
    place = rng.randrange(len(content) + 1)
    end = min(len(content), place + rng.choice([1, 1, 2, 8, 64, 512]))
    before, part, after = content[:place], content[place:end], content[end:]
    match rng.randrange(8):
        case 0:
            return before + rng.choice(FRAGMENTS) + part + after
        case 1:
            return before + rng.choice(FRAGMENTS) + after
        case 2:
            return before + after
        case 3:
            return before + part + part + after
        case 4:
            return before + bytes([rng.randrange(256)]) + part[1:] + after
        case 5:
            return before + bytes(byte ^ (1 << rng.randrange(8)) for byte in part[:1]) + part[1:] + after
        case 6:
            return before + after + part
    return before


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise HangError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def memory(*, restart: bool = False) -> int:
    """Return the largest number of bytes that this process has had since the last call with `restart`; Linux only."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def attempt(function: Callable[..., Any], *arguments: Any) -> str:
    """Return what was wrong with a call; "" for a result, or an error of the user's in few words."""
    before = memory(restart=True)
    try:
        with time_limit():
            function(*arguments)
    except USER_ERRORS as error:
        if len(str(error)) > 20_000:
            return f"a message of {len(str(error)):,} characters"
    except HangError:
        return f"hung for {SECONDS:g} s"
    except BaseException as error:  # panics and exits too
        frames = traceback.extract_tb(error.__traceback__)
        own = next((frame for frame in reversed(frames) if "/tests/" not in frame.filename), frames[-1])
        place = f"{Path(own.filename).parent.name}/{Path(own.filename).name}:{own.lineno}"
        return f"{type(error).__name__}: {str(error)[:200]} at {place}"
    used = (memory() - before) >> 20
    return f"allocated {used} MB" if used > MEGABYTES else ""


def count(outcomes: Iterator[tuple[str, str]]) -> dict[str, Any]:
    """Return {"tries", "survived", "failures"} of (name of a try, what was wrong)."""
    tries, failures = 0, []
    for name, problem in outcomes:
        tries += 1
        failures += [f"{name}: {problem}"] if problem else []
    return {"tries": tries, "survived": tries - len(failures), "failures": failures}
