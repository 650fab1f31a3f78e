"""Words with tags: the files they stand in, and the checks.

A row has its words in the column data.text_column and their tags in data.label_column, both lists, however the file had them:
- conll: a word a line, its tag the last column, an empty line after each sentence (.conll, .bio, .iob);
- word/tag: a sentence a line;
- jsonl: lists of words and of tags; or a text and its spans, {"start", "end", "label"} in characters.

A text is cut into words by `split_words` of data/words.py, each with the spaces before it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError, ErrorList
from data.formats import rows as readers
from data.formats.rows import Row
from data.tag_schemes import breaches, complete, find_scheme, tag_entities
from data.words import TEXT, split_words, word_places

SUFFIXES = {".jsonl": "jsonl", ".conll": "conll", ".bio": "conll", ".iob": "conll"}
FORMATS = ("jsonl", "conll", "word/tag", "text")
LINES = "<lines>"  # where each word of a row stands; no name that a column would have


# Files -> rows


def read_tagged(
    name: str,
    text: str,
    label: str = "",
    *,
    group: str = "",
    id_column: str = "id",
    format: str = "auto",
    scheme: str = "auto",
) -> list[Row]:
    """The rows of a file; label: the column of the tags, or "" for words alone. All that is wrong is one DataError.

    group: a column that every row of jsonl must have, or "". Other files have no columns but words and tags.
    """
    kind = SUFFIXES.get(readers.locate(name).suffix.lower(), "") if format == "auto" else format
    if kind not in FORMATS:
        what = f"data.format = {format!r}" if format != "auto" else "the name does not tell its format"
        known = ", ".join(SUFFIXES)
        raise DataError(f"{name}: {what}; tagged words are in {known}, or data.format is one of {', '.join(FORMATS)}")
    errors = ErrorList()
    if kind == "jsonl":
        rows = readers.read_rows(name, [c for c in (text, label, group) if c], id_column, errors, "jsonl")
        rows = [row for row in rows if _check_row(name, row, text, label, scheme, errors)]
    elif group:
        raise DataError(f"{name}: data.group_column = {group!r} needs columns, so a .jsonl file")
    elif kind == "text" and label:
        raise DataError(f"{name}: data.format = 'text' has no tags; it is for predictions")
    else:
        rows = _read_lines(name, kind, text, label, errors)
    if label:
        _check_tags(name, rows, label, scheme, errors)
    errors.raise_if_any()
    return rows


def _read_lines(name: str, kind: str, text: str, label: str, errors: ErrorList) -> list[Row]:
    """Of the formats that have no columns of their own."""
    path = readers.locate(name)
    if path.is_dir():
        raise DataError(f"{name}: this is a folder; name a file")
    read = {"conll": _conll, "word/tag": _word_tag, "text": _texts}[kind]
    rows: list[Row] = []
    try:
        for line, words, tags, more in read(path, bool(label), errors):
            values = {text: words, **({label: tags} if label else {}), **more}
            rows.append(Row(str(len(rows) + 1), line, values))
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    if not rows and not errors:
        raise DataError(f"{name}: no rows")
    return rows


Sentences = Iterator[tuple[int, list[str], list[str], dict[str, Any]]]  # first line, words, tags, more of the row


def _conll(path: Path, labelled: bool, errors: ErrorList) -> Sentences:
    """A word a line: the first column, and the last one its tag; columns between tabs where there is one, else spaces.

    -DOCSTART- lines are left out. Every line has as many columns as the first.
    """
    columns = 0
    words: list[str] = []
    tags: list[str] = []
    lines: list[int] = []
    for number, line in itertools.chain(readers.clean_lines(path, errors), [(0, "")]):  # the last sentence ends too
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
            return  # which holds for all lines
        elif not fields[0].strip():
            errors.add(path, number, "the word is empty")
        elif labelled and not fields[-1].strip():
            errors.add(path, number, "the tag is empty")
        else:
            words.append(fields[0])
            tags.append(fields[-1].strip())
            lines.append(number)


def _word_tag(path: Path, labelled: bool, errors: ErrorList) -> Sentences:
    """A sentence a line, as word/tag word/tag; a slash within a word belongs to it.

    Without labels, a line in which every word has a tag is read without them, any other as words alone.
    """
    for number, line in readers.clean_lines(path, errors):
        parts = line.split()
        pairs = [part.rpartition("/") for part in parts]
        bad = [part for part, (word, _, tag) in zip(parts, pairs, strict=True) if not (word and tag)]
        if labelled and bad:
            more = f", and {len(bad) - 1:,} more on this line" if len(bad) > 1 else ""
            errors.add(path, number, f"{bad[0]!r} is no word/tag{more}")
        elif parts:
            yield number, parts if bad else [word for word, _, _ in pairs], [tag for _, _, tag in pairs], {}


def _texts(path: Path, labelled: bool, errors: ErrorList) -> Sentences:
    """A text a line, without tags."""
    for number, line in readers.clean_lines(path, errors):
        if line.strip():
            yield number, split_words(line), [], {TEXT: line}


def _check_row(name: str, row: Row, text: str, label: str, scheme: str, errors: ErrorList) -> bool:
    """Put words and tags into a row of jsonl; False, and the errors, where it is wrong."""
    words, before = row.values[text], len(errors)
    if isinstance(words, str):
        if not words.strip():
            errors.add(name, row.line, f"{text!r} is empty")
            return False
        row.values = row.values | {TEXT: words, text: split_words(words)}
        if label:
            reasons = _spans_to_tags(row, words, text, label, scheme)
            for reason in reasons:
                errors.add(name, row.line, reason)
        return len(errors) == before
    if not isinstance(words, list):
        errors.add(name, row.line, f"{text!r} should be a list of words, or a text, this is {words!r}")
    elif not words:
        errors.add(name, row.line, f"{text!r} is empty")
    elif wrong := [i for i, word in enumerate(words) if not isinstance(word, str) or not word.strip()]:
        errors.add(name, row.line, f"word {wrong[0]} in {text!r} should be text that is not empty, {words[wrong[0]]!r}")
    elif label and not isinstance(row.values[label], list):
        errors.add(name, row.line, f"{label!r} should be a list of tags, this is {row.values[label]!r}")
    elif label:
        tags = row.values[label]
        bad = [i for i, tag in enumerate(tags) if isinstance(tag, bool) or not isinstance(tag, str | int)]
        bad += [i for i, tag in enumerate(tags) if isinstance(tag, str) and not tag.strip()]
        if bad:
            errors.add(name, row.line, f"tag {bad[0]} in {label!r} should be text that is not empty, {tags[bad[0]]!r}")
        elif len(tags) != len(words):
            errors.add(name, row.line, f"{len(words)} words in {text!r}, and {len(tags)} tags in {label!r}")
        row.values = row.values | {label: [str(tag).strip() for tag in tags]}
    return len(errors) == before


def _spans_to_tags(row: Row, source: str, text: str, label: str, scheme: str) -> list[str]:
    """Put the tags into a row whose `label` has spans of the text `source`; what is wrong with them."""
    spans = row.values[label]
    if not isinstance(spans, list):
        return [f"{label!r} should be a list of spans of the text, this is {spans!r}"]
    if scheme == "none":
        return ["spans of a text are entities: token_classification.tag_scheme cannot be none"]
    places = word_places(row.values[text])
    entities, reasons = [], []
    for span in spans:
        reason = _check_span(span, source)
        if not reason:
            start, end = span["start"], span["end"]
            inside = [i for i, (first, last) in enumerate(places) if first < end and start < last]
            cut = [source[first:last] for first, last in (places[i] for i in inside) if first < start or last > end]
            if cut:
                reason = f"the span {span} has only a part of the word {cut[0]!r}"
            elif not inside:
                reason = f"the span {span} has only spaces"
            else:
                entities.append((inside[0], inside[-1] + 1, span["label"].strip()))
        reasons += [reason] if reason else []
    entities.sort()
    for (_, end, first), (start, _, second) in itertools.pairwise(entities):
        if start < end:
            where = source[slice(*places[start])]
            reasons.append(f"spans overlap: {first!r} and {second!r} both have the word {where!r}")
    if not reasons:
        tags = tag_entities(entities, len(places), "IOB2" if scheme == "auto" else scheme)
        row.values = row.values | {label: tags}
    return reasons


def _check_span(span: Any, source: str) -> str:
    """What is wrong with a span by itself, or ""."""
    if not isinstance(span, dict) or not {"start", "end", "label"} <= span.keys():
        return f"a span should be an object with start, end and label, this is {span!r}"
    start, end, label = span["start"], span["end"], span["label"]
    if type(start) is not int or type(end) is not int or not 0 <= start < end:
        return f"the span {span} should have whole numbers, start before end"
    if end > len(source):
        return f"the span {span} ends outside the text, which has {len(source)} characters"
    if not isinstance(label, str) or not label.strip():
        return f"the label of the span {span} should be text that is not empty"
    return ""


def _check_tags(name: str, rows: Sequence[Row], label: str, scheme: str, errors: ErrorList) -> None:
    """Tags must keep to their scheme."""
    found = find_scheme([row.values[label] for row in rows], scheme)
    if found == "none":
        return
    for row in rows:
        for place, reason in breaches(row.values[label], found):
            errors.add(name, _line_of(row, place), _at(row, place) + reason)


def _line_of(row: Row, place: int) -> int:
    """The line of a word, where words have one."""
    return row.values[LINES][place] if LINES in row.values else row.line


def _at(row: Row, place: int) -> str:
    return "" if LINES in row.values else f"word {place}: "


def tag_names(name: str, rows: Sequence[Row], label: str, declared: Sequence[str], scheme: str) -> list[str]:
    """The classes: those declared, or those found, completed by their scheme and sorted; at least two."""
    if declared:
        return list(declared)
    sentences = [row.values[label] for row in rows]
    names = complete({tag for tags in sentences for tag in tags}, find_scheme(sentences, scheme))
    if len(names) < 2:
        raise DataError(f"{name}: all words have the tag {names[0]!r}; two tags are needed to learn")
    return names


def check_tags(name: str, rows: Sequence[Row], label: str, labels: Sequence[str]) -> None:
    """Every tag must be one of `labels`; all that are not are reported together."""
    errors, known = ErrorList(), set(labels)
    for row in rows:
        for i, tag in enumerate(row.values[label]):
            if tag not in known:
                reason = f"{_at(row, i)}unknown label {tag!r}; the labels are {', '.join(map(repr, labels))}"
                errors.add(name, _line_of(row, i), reason)
    errors.raise_if_any()
