"""Limits of a tokenizer.json, so that a hostile one can use neither time nor memory without bound.

The library trusts its files. A tokenizer.json can turn one character into a megabyte, lengthen a text at each of many
steps, or have a regular expression that takes years. Published files are far below these limits.
"""

from __future__ import annotations

import base64
import json
import os
import re
import tempfile
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tokenizers import Tokenizer

from data.errors import DataError
from data.tokenizers.charsmap import check_charsmap

MAX_FILE = 1 << 26  # bytes; mT5's tokenizer.json has 16 MB
MAX_STEPS = 1_000  # normalizers, pre-tokenizers, pieces of a template, ... of a file
MAX_TEXT = 1_000  # characters of a setting, such as a text to prepend
MAX_REGEX = 20_000  # characters of a regular expression
MAX_UNIGRAMS = 6_000_000  # bytes of all tokens of a unigram model, whose trie has up to 350 bytes for each; mT5's: 2 MB
MAX_GROWTH = 100  # times that the normalizer may make a text longer
MAX_WORD = 1_000  # characters of a word that WordPiece looks up; its time grows with the square
SECONDS = 5  # that the encoding of a few short texts may take
_FIRST_TEXTS = re.compile(rb'\[\s*"((?:[^"\\]|\\.)*)"')  # of ["token", score]
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def read_limited(path: Path) -> bytes:
    """Return the content of a tokenizer's file; DataError if it has more than MAX_FILE bytes (no more are read)."""
    with path.open("rb") as stream:
        content = stream.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise DataError(f"{path}: more than {MAX_FILE:,} bytes, too many for a file of a tokenizer")
    return content


def check_file(path: Path) -> None:
    """Raise DataError for a tokenizer.json that would need much memory once it is read."""
    content = read_limited(path)
    if b'"Unigram"' in content:
        check_unigrams(path, sum(map(len, _FIRST_TEXTS.findall(content))))


def check_unigrams(path: Path, size: int) -> None:
    """Raise DataError if the tokens of a unigram model have more than MAX_UNIGRAMS bytes together."""
    if size > MAX_UNIGRAMS:
        raise DataError(f"{path}: its tokens have {size:,} bytes; at most {MAX_UNIGRAMS:,} are read")


def check_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Raise DataError, with the part and the limit, for a tokenizer that could use time or memory without bound.

    Errors of the library, which the encoding of the first texts shows, are raised as they are.
    """
    patterns: list[str] = []
    try:
        parts = {part: _state(getattr(tokenizer, part)) for part in PARTS}
        for part, value in parts.items():
            patterns += _check_part(part, value)
        _check_growth(parts["normalizer"])
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
            check_text(name, "model", getattr(tokenizer.model, name, None))
        for token in tokenizer.get_added_tokens_decoder().values():
            check_text("a token", "added_tokens", token.content)
        if (longest := getattr(tokenizer.model, "max_input_chars_per_word", 0)) > MAX_WORD:
            raise ValueError(f"max_input_chars_per_word = {longest:,} of its model should be at most {MAX_WORD:,}")
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    if patterns:
        _try_patterns(tokenizer, path, "".join(patterns))


def _state(part: Any) -> Any:
    """Return the JSON of a part of a tokenizer."""
    return None if part is None else json.loads(part.__getstate__())


def _try_patterns(tokenizer: Tokenizer, path: Path, patterns: str) -> None:
    """Raise DataError if some short texts take more than SECONDS.

    The texts repeat characters that the regular expressions of a tokenizer.json name, since a slow one is slow on them.
    They are encoded in a thread, which cannot be ended, but ends with the process.
    """
    characters = dict.fromkeys([*"a1 !\n", *(c for c in patterns if c.isalnum() or c.isspace())])
    runs = [character * 300 for character in characters][:60]
    texts = [run + end for run in [*runs, "a1" * 150, "a " * 150, "ab" * 150] for end in ("", "!", "\0")]
    outcome: list[BaseException] = []

    def encode() -> None:
        try:
            tokenizer.encode_batch(texts)
        except BaseException as error:  # a panic is no Exception
            outcome.append(error)

    thread = threading.Thread(target=encode, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if thread.is_alive():
        raise DataError(f"{path}: its regular expressions take more than {SECONDS} s for short texts; use simpler ones")
    if outcome and "retry-limit" in str(outcome[0]):  # Oniguruma's own, of one search
        raise DataError(f"{path}: its regular expressions take too many steps for short texts; use simpler ones")
    if outcome:
        raise outcome[0]


@contextmanager
def panics_as_errors(name: str) -> Iterator[None]:
    """Turn a panic of the library, which is no Exception, into DataError. name: of the texts."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{name}: the tokenizer fails on a text: {error}") from None


def _unnamed_file() -> IO[bytes]:
    """Return an empty file: in memory where the system can do that, so that a full disk does not matter."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stderr"), "w+b")
    return tempfile.TemporaryFile()


@contextmanager
def without_panics() -> Iterator[None]:
    """Hide the text of a Rust panic; other texts that are written to stderr in the block are shown after it.

    Rust writes to the descriptor before the exception is raised in Python.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    with os.fdopen(stderr, "wb", buffering=0) as screen, _unnamed_file() as kept:
        os.dup2(kept.fileno(), 2)
        is_error = True
        try:
            yield
            is_error = False
        finally:
            os.dup2(stderr, 2)
            kept.seek(0)
            text = kept.read()
            if text and not (is_error and b"panicked at" in text):
                with suppress(OSError):  # a full or closed stderr
                    screen.write(text)


def _walk(value: Any) -> Iterator[Any]:
    """Yield a value of JSON and all values in it."""
    pending = [value]
    while pending:
        value = pending.pop()
        yield value
        pending += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _check_part(part: str, value: Any) -> list[str]:
    """Return the regular expressions of a normalizer, pre-tokenizer, ..., a JSON value.

    Raises ValueError for too many steps, for a long text, and for an expression that is certainly slow.
    """
    steps, patterns = 0, list[str]()
    for item in _walk(value):
        if not isinstance(item, dict | list):
            continue
        steps += 1 if isinstance(item, dict) else sum(not isinstance(value, dict) for value in item)
        if steps > MAX_STEPS:
            raise ValueError(f"its {part} has more than {MAX_STEPS:,} steps, which are not read")
        for name, text in item.items() if isinstance(item, dict) else [("a text", text) for text in item]:
            if name == "precompiled_charsmap":
                check_charsmap(base64.b64decode(text, validate=True))
            elif name == "Regex":
                _check_regex(part, text)
                patterns.append(text)
            else:
                check_text(name, part, text)
        if isinstance(item, dict) and item.get("type") == "FixedLength" and item.get("length") == 0:
            raise ValueError(f"length = 0 of its {part} should be above 0")
    return patterns


def check_text(name: str, part: str, text: Any) -> None:
    """Raise ValueError for a text of more than MAX_TEXT characters; other values are accepted."""
    if isinstance(text, str) and len(text) > MAX_TEXT:
        raise ValueError(f"{name} of its {part} has {len(text):,} characters; at most {MAX_TEXT:,} are read")


# How long a normalizer can make a text


def _check_growth(normalizer: Any) -> None:
    """Raise ValueError if the steps of a normalizer together can make a text more than MAX_GROWTH times as long.

    A step that replaces a text by a longer one multiplies the length. It multiplies what an earlier step has added only
    if it looks for a regular expression, or if the two texts share a character (ignoring case and form).
    """
    steps: list[tuple[set[str], float]] = []  # (the characters that it adds, the growth up to it)
    for item in _leaves(normalizer):
        kind, pattern = item.get("type"), item.get("pattern")
        content = item.get("prepend" if kind == "Prepend" else "content")
        if kind not in ("Prepend", "Replace") or not isinstance(content, str):
            continue
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        finds = set(_fold(literal)) if isinstance(literal, str) and literal else None  # None: anything
        own = len(content) / len(literal) if finds and literal else len(content) + 1.0
        growth = [before for added, before in steps if finds is None or added & finds]
        steps.append((set(_fold(content)), max(1.0, own) * max(growth, default=1.0)))
        if steps[-1][1] > MAX_GROWTH:
            raise ValueError(
                f"its normalizer can make a text {steps[-1][1]:,.0f} times as long; at most {MAX_GROWTH} times are read"
            )


def _leaves(normalizer: Any) -> Iterator[dict[str, Any]]:
    """Yield the normalizers of a sequence of sequences, in their order."""
    pending = [normalizer]
    while pending:
        item = pending.pop()
        if isinstance(item, dict) and item.get("type") == "Sequence" and isinstance(item.get("normalizers"), list):
            pending += reversed(item["normalizers"])
        elif isinstance(item, dict):
            yield item


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKD", text.casefold())


# Regular expressions

# An escaped character, a class of characters with classes in it, the start of a group, its end, a quantifier.
_REGEX_PARTS = re.compile(
    r"\\[pP]\{[^}]*\}|\\.|\[(?:\\.|\[(?:\\.|[^\]])*\]|[^\]\\])*\]|\((?:\?[^:)=!>]*[:=!>]?)?|\)|[*+?]|\{\d*,?\d*\}",
    re.DOTALL,
)


def _check_regex(part: str, pattern: str) -> None:
    """Raise ValueError for a long expression, and for one with an unbounded repetition inside another, as (a+)+.

    The library tries all ways to split a text among the two, of which there are 2^length.
    """
    if len(pattern) > MAX_REGEX:
        raise ValueError(f"a regular expression of {len(pattern):,} characters in its {part}; at most {MAX_REGEX:,}")
    repeats = [False]  # whether a group, innermost last, has a part that repeats without end
    closed, end = False, 0  # whether the part before is a group in which such a part is; its end
    for match in _REGEX_PARTS.finditer(pattern):
        token = match[0]
        is_adjacent = closed and match.start() == end
        if token.startswith("("):
            repeats.append(False)
        elif token == ")":
            inner = repeats.pop() if len(repeats) > 1 else False
            repeats[-1] |= inner
            closed, end = inner, match.end()
            continue
        elif token in ("*", "+") or token[0] == "{":
            if is_adjacent and token not in ("{1}", "{0,1}"):
                raise ValueError(
                    f"the regular expression {pattern[:80]!r} in its {part} repeats a repetition; use a simpler one"
                )
            repeats[-1] |= token[-1] != "}" or token[-2] == ","
        closed = False
