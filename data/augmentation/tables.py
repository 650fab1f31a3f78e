"""The tables that text augmentation reads: synonyms by word, and other wordings by the id of a row."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data.errors import ErrorList
from data.formats.rows import read_rows
from data.scripts import KANA_AND_HAN

# A run of characters between spaces; in Chinese and Japanese, which have no spaces, a single character.
WORD = re.compile(rf"[{KANA_AND_HAN}]|[^\s{KANA_AND_HAN}]+")


def entry_key(words: str) -> tuple[str, ...]:
    """Return the key of an entry, which ignores capitals and the spaces between words."""
    return tuple(WORD.findall(words.lower()))


def read_synonyms(name: str) -> dict[tuple[str, ...], list[str]]:
    """Return {the words of an entry, in lower case: its synonyms} of a file of rows with `word` and `synonyms`.

    The synonyms are a list, or one field with commas between them. Raises one DataError for all bad lines.
    """
    errors = ErrorList()
    table: dict[tuple[str, ...], list[str]] = {}
    lines: dict[tuple[str, ...], int] = {}
    for row in read_rows(name, ["word", "synonyms"], errors=errors):
        word, synonyms = row.values["word"], row.values["synonyms"]
        texts = synonyms.split(",") if isinstance(synonyms, str) else synonyms
        if not isinstance(word, str) or not word.strip():
            errors.add(name, row.line, f"'word' should be text, not {word!r}")
        elif not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            errors.add(name, row.line, f"'synonyms' should be texts with commas between, not {synonyms!r}")
        elif not texts:
            errors.add(name, row.line, f"{word!r} has no synonyms; leave the line out")
        elif (key := entry_key(word)) in table:
            errors.add(name, row.line, f"{word!r} is on line {lines[key]} too; put all its synonyms in one")
        else:
            table[key], lines[key] = [text.strip() for text in texts], row.line
    errors.raise_if_any()
    return table


def read_wordings(name: str, ids: Iterable[str]) -> dict[str, list[str]]:
    """Return {id: other wordings} of a .jsonl file with `id` and `texts`; each id must be one of `ids`."""
    errors, known = ErrorList(), set(ids)
    wordings: dict[str, list[str]] = {}
    for row in read_rows(name, ["id", "texts"], errors=errors):
        texts = row.values["texts"]
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            errors.add(name, row.line, f"'texts' should be a list of texts, not {texts!r}")
        elif row.id not in known:
            errors.add(name, row.line, f"the training data has no id {row.id!r}")
        else:
            wordings[row.id] = texts
    errors.raise_if_any()
    return wordings


def checksum(*tables: Mapping[Any, Sequence[str]]) -> str:
    """Return a checksum of the tables; "" where all are empty."""
    if not any(tables):
        return ""
    return hashlib.sha256(repr([sorted(table.items()) for table in tables]).encode()).hexdigest()[:16]
