"""Guess how a table is read where it is no UTF-8 with commas or tabs: its encoding and its delimiter.

A run never guesses these: it names the setting and stops. A new recipe has the guess, for its user to see.
"""

from __future__ import annotations

from data.formats.encodings import find_wide_encoding, guess_encoding
from data.formats.lines import CHUNK, NOT_TEXT, OPENERS, locate, suffix_of
from data.formats.options import FileOptions
from data.formats.tables import DELIMITERS, GUESSED, find_delimiter
from data.notes import quote
from engine.new_choices import Choice, Choices


def guess_reading(name: str, options: FileOptions) -> Choices:
    """Return data.encoding and data.delimiter of a file where they are not the usual ones; {} where nothing is sure.

    Compressed files, folders and what is not text are not looked at: the reader's own sentence says more.
    """
    path = locate(name)
    head = _read_head(name)
    if not head:
        return {}
    guesses: Choices = {}
    encoding = options.encoding or _guess_encoding(head)
    lines = head.decode(encoding or "utf-8", errors="replace").lstrip("\ufeff").splitlines()
    first = next((line for line in lines if line.strip()), "")
    if encoding and not options.encoding:
        reads = f"the file is not UTF-8; so its first line reads {quote(first[:60])}"
        guesses["data.encoding"] = Choice(encoding, f"guessed: {reads}")
    format = suffix_of(path).removeprefix(".") if options.format == "auto" else options.format
    if format in DELIMITERS and not options.delimiter and (found := _guess_delimiter(first, options, format)):
        names = ", ".join(quote(part.strip().strip('"')) for part in first.split(found)[:3])
        guesses["data.delimiter"] = Choice(found, f"guessed: the first line is then {names}")
    return guesses


def _read_head(name: str) -> bytes:
    """Return the first lines of a file of text; b"" for anything else."""
    path = locate(name)
    if not path.is_file():
        return b""
    with path.open("rb") as stream:
        head = stream.read(CHUNK)
    if head.startswith((*NOT_TEXT, *OPENERS)):
        return b""
    return head if len(head) < CHUNK else head[: head.rfind(b"\n") + 1]


def _guess_encoding(head: bytes) -> str:
    """Return the encoding of bytes that are not UTF-8; "" for UTF-8, and where no other is likely."""
    if wide := find_wide_encoding(head):
        return wide
    lines = [line for line in head.split(b"\n") if not line.isascii()]
    bad = [line for line in lines if not _is_utf8(line)]
    return guess_encoding(lines) if 2 * len(bad) > len(lines) else ""  # else it is UTF-8 with damaged lines


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _guess_delimiter(first: str, options: FileOptions, format: str) -> str:
    """Return the delimiter that splits a header which the usual one leaves whole; "" where none does."""
    usual = find_delimiter(options, format)
    if usual in first or first.startswith(("sep=", '"sep=')):
        return ""
    counts = {other: first.count(other) for other in GUESSED if other != usual}
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] else ""
