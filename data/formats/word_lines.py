"""Files of words and tags without named columns -> rows: CoNLL (conll.py), a sentence a line (word/tag), or text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import DataError, ErrorList
from data.formats.conll import read_conll, split_columns
from data.formats.lines import clean_lines, locate
from data.formats.options import FileOptions
from data.notes import count_of
from data.row import Row
from data.windows import open_source
from data.words import TEXT, split_words

LINES = "<lines>"  # an internal column: the line of each word; no file has this column

# Sentences as (first line, words, tags, further columns of the row).
Sentences = Iterator[tuple[int, list[str], list[str], dict[str, Any]]]


def read_sentences(
    name: str,
    format: str,
    keys: tuple[str, str],
    columns: tuple[str, str],
    labelled: bool,
    errors: ErrorList,
    options: FileOptions,
) -> list[Row]:
    """Return a row for each sentence, its words and tags under the two `keys`; the tags only if `labelled` or kept.

    columns: what the settings say of the columns of words and of tags in a file of words a line. format: conll,
    word/tag or text. Bad lines are added to `errors`. DataError for a file that cannot be read.
    """
    path = locate(name)
    if path.is_dir():
        raise DataError(f"{name}: this is a folder; name a file")
    source = open_source(name)
    if format != "text" and not labelled and options.kept_label:
        keys, labelled = (keys[0], options.kept_label), True
    errors.notes += options.name_unused(["delimiter", "quotes"])

    def make(errors: ErrorList) -> Iterator[Row]:
        if format == "conll":
            found = read_conll(path, *columns, labelled, errors, options)
            sentences: Sentences = ((s.line, s.words, s.tags, {LINES: s.lines}) for s in found)
        else:
            sentences = (_word_tag if format == "word/tag" else _texts)(path, labelled, errors, options)
        for number, (line, words, tags, more) in enumerate(sentences, 1):
            id = str(line if format == "text" else number)
            yield Row(id, line, {keys[0]: words, **({keys[1]: tags} if labelled else {}), **more})

    try:
        rows = list(source.take(make, errors))
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    source.num_rows += len(rows)
    if not source.num_rows and not errors:
        raise DataError(f"{name}: no rows")
    return rows


def _word_tag(path: Path, labelled: bool, errors: ErrorList, options: FileOptions) -> Sentences:
    """Yield the sentences of a file with one a line, as word/tag word/tag; a slash within a word belongs to the word.

    Without labels, a line in which every word has a tag is read without the tags, any other as words alone.
    """
    for number, line in clean_lines(path, errors, options):
        fields = line.split()
        pairs = [field.rpartition("/") for field in fields]
        bad = [field for field, (word, _, tag) in zip(fields, pairs, strict=True) if not (word and tag)]
        if labelled and bad:
            more = f", and {len(bad) - 1:,} more on this line" if len(bad) > 1 else ""
            errors.add(path, number, f"{bad[0]!r} is not word/tag{more}")
        if fields:
            yield number, fields if bad else [word for word, _, _ in pairs], [tag for _, _, tag in pairs], {}


def _texts(path: Path, labelled: bool, errors: ErrorList, options: FileOptions) -> Sentences:
    """Yield the words of a text a line, without tags."""
    num_empty = 0
    for number, line in clean_lines(path, errors, options):
        if line.strip():
            yield number, split_words(line), [], {TEXT: line}
        num_empty += not line.strip()
    if num_empty:
        errors.notes.append(f"{count_of(num_empty, 'empty line')} left out; ids are the numbers of the lines")


def guess_format(path: Path, options: FileOptions) -> str:
    """Return the format that would read a file by its first lines, as far as that can be told; "" where it cannot."""
    try:
        lines = [line for _, line in itertools.islice(clean_lines(path, ErrorList(), options), 50) if line.strip()]
    except (OSError, DataError):
        return ""
    if lines and lines[0].lstrip().startswith("{"):
        return "jsonl"
    words = [line for line in lines if not line.startswith(("#", "-DOCSTART-"))]
    counts = {len(split_columns(line)) for line in words}
    if len(words) > 1 and len(counts) == 1 and counts != {1}:
        return "conll"
    pairs = [field.rpartition("/") for line in words for field in line.split()]
    return "word/tag" if pairs and all(word and tag for word, _, tag in pairs) else ""
