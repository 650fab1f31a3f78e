"""Files of words and tags without named columns: a word a line (CoNLL), a sentence a line (word/tag), or text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import DataError, ErrorList
from data.formats.rows import clean_lines, locate
from data.row import Row
from data.words import TEXT, split_words

LINES = "<lines>"  # an internal column: the line of each word; no file has this column

# Sentences as (first line, words, tags, further columns of the row).
Sentences = Iterator[tuple[int, list[str], list[str], dict[str, Any]]]


def read_sentences(name: str, format: str, text: str, label: str, errors: ErrorList) -> list[Row]:
    """Return a row for each sentence, its words in column `text` and its tags in `label` ("": words alone).

    format: conll, word/tag or text. Bad lines are added to `errors`. DataError for a file that cannot be read.
    """
    path = locate(name)
    if path.is_dir():
        raise DataError(f"{name}: this is a folder; name a file")
    reader = {"conll": _conll, "word/tag": _word_tag, "text": _texts}[format]
    rows: list[Row] = []
    try:
        for line, words, tags, more in reader(path, bool(label), errors):
            values = {text: words, **({label: tags} if label else {}), **more}
            rows.append(Row(str(len(rows) + 1), line, values))
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    if not rows and not errors:
        raise DataError(f"{name}: no rows")
    return rows


def _conll(path: Path, labelled: bool, errors: ErrorList) -> Sentences:
    """Yield sentences of a file with a word a line, ended by an empty line.

    The first column is the word, the last one its tag. Columns are separated by tabs if the line has one, else by
    spaces. Every line has as many columns as the first. -DOCSTART- lines are skipped.
    """
    columns = 0
    words: list[str] = []
    tags: list[str] = []
    lines: list[int] = []
    for number, line in itertools.chain(clean_lines(path, errors), [(0, "")]):  # the last sentence needs an end too
        if not line.strip() or line.startswith("-DOCSTART-"):
            if words:
                yield lines[0], words, tags, {LINES: lines}
            words, tags, lines = [], [], []
            continue
        fields = line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))
        columns = columns or len(fields)
        if len(fields) != columns:
            errors.add(path, number, f"{len(fields)} columns, the lines before have {columns}")
        elif labelled and columns < 2:
            errors.add(path, number, f"no tag: {line!r} is one column; a word and its tag are needed")
            return  # all lines have this fault
        elif not fields[0].strip():
            errors.add(path, number, "the word is empty")
        elif labelled and not fields[-1].strip():
            errors.add(path, number, "the tag is empty")
        else:
            words.append(fields[0])
            tags.append(fields[-1].strip())
            lines.append(number)


def _word_tag(path: Path, labelled: bool, errors: ErrorList) -> Sentences:
    """Yield the sentences of a file with one a line, as word/tag word/tag; a slash within a word belongs to the word.

    Without labels, a line in which every word has a tag is read without the tags, any other as words alone.
    """
    for number, line in clean_lines(path, errors):
        fields = line.split()
        pairs = [field.rpartition("/") for field in fields]
        bad = [field for field, (word, _, tag) in zip(fields, pairs, strict=True) if not (word and tag)]
        if labelled and bad:
            more = f", and {len(bad) - 1:,} more on this line" if len(bad) > 1 else ""
            errors.add(path, number, f"{bad[0]!r} is no word/tag{more}")
        elif fields:
            yield number, fields if bad else [word for word, _, _ in pairs], [tag for _, _, tag in pairs], {}


def _texts(path: Path, labelled: bool, errors: ErrorList) -> Sentences:
    """Yield the words of a text a line, without tags."""
    for number, line in clean_lines(path, errors):
        if line.strip():
            yield number, split_words(line), [], {TEXT: line}
