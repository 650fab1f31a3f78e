"""Words with tags: checked rows of any format, and examples with a label at the first token of each word.

A row has its words in the text column and their tags in the label column, both lists. The formats:
- conll: a word a line, its tag in the last column, an empty line after each sentence (.conll, .bio, .iob);
- word/tag: a sentence a line;
- text: a text a line, without tags;
- jsonl, and rows in memory: lists of words and of tags; or a text and its spans, {"start", "end", "label"} in
  characters.

A text is split into words by data/words.py, each with the spaces before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data.batch import IGNORE_INDEX
from data.errors import DataError, ErrorList
from data.examples import TextExamples, count_notes
from data.formats.conll import LINES, read_sentences
from data.formats.memory import is_in_memory
from data.formats.options import FileOptions
from data.formats.rows import locate, read_rows
from data.row import Row, Rows
from data.tag_schemes import complete_tags, find_scheme, find_violations, tag_entities
from data.words import TEXT, locate_words, split_words

SUFFIXES = {".jsonl": "jsonl", ".conll": "conll", ".bio": "conll", ".iob": "conll"}
FORMATS = ("jsonl", "conll", "word/tag", "text")
CHUNK = 20_000  # rows encoded at a time; an encoding needs far more memory than its ids


# Files -> rows


def read_tagged(
    name: str,
    text: str,
    label: str = "",
    *,
    group: str = "",
    options: FileOptions = FileOptions(),
    scheme: str = "auto",
) -> Rows:
    """Return the rows of a file. label: the column of the tags, or "" for words alone.

    group: a column that every row of jsonl must have, or "". Files of other formats have no such columns.
    Raises one DataError with all errors of the file.
    """
    format = options.format
    kind = SUFFIXES.get(locate(name).suffix.lower(), "") if format == "auto" else format
    kind = "jsonl" if is_in_memory(name) else kind
    if kind not in FORMATS:
        what = f"data.format = {format!r}" if format != "auto" else "the name does not tell its format"
        known = ", ".join(SUFFIXES)
        raise DataError(f"{name}: {what}; tagged words are in {known}, or data.format is one of {', '.join(FORMATS)}")
    errors = ErrorList()
    rows: list[Row]
    if kind == "jsonl":
        rows = read_rows(name, [c for c in (text, label, group) if c], replace(options, format="jsonl"), errors)
        for row in rows:
            _check_row(name, row, text, label, scheme, errors)
    elif group:
        raise DataError(f"{name}: data.group_column = {group!r} needs columns, so a .jsonl file")
    elif kind == "text" and label:
        raise DataError(f"{name}: data.format = 'text' has no tags; it is for predictions")
    else:
        rows = read_sentences(name, kind, text, label, errors)
    if label:
        good = [row for row in rows if row.line not in errors.reasons]
        _check_scheme(name, good, label, scheme, errors)
    return errors.settle(name, rows, options)


def _check_row(name: str, row: Row, text: str, label: str, scheme: str, errors: ErrorList) -> bool:
    """Put words and tags into a row of jsonl; return whether it is correct, and add its errors to `errors`."""
    words, before = row.values[text], len(errors)
    if isinstance(words, str):
        if not words.strip():
            errors.add(name, row.line, f"{text!r} is empty", is_empty=True)
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
        errors.add(name, row.line, f"{text!r} is empty", is_empty=True)
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
    """Replace the spans in column `label`, of the text `source`, by tags; return the reasons where it is impossible."""
    spans = row.values[label]
    if not isinstance(spans, list):
        return [f"{label!r} should be a list of spans of the text, this is {spans!r}"]
    if scheme == "none":
        return ["spans of a text are entities: token_classification.tag_scheme cannot be none"]
    word_spans = locate_words(row.values[text])
    entities, reasons = [], []
    for span in spans:
        reason = _check_span(span, source)
        if not reason:
            start, end = span["start"], span["end"]
            inside = [i for i, (first, last) in enumerate(word_spans) if first < end and start < last]
            partial = [
                source[first:last] for first, last in (word_spans[i] for i in inside) if first < start or last > end
            ]
            if partial:
                reason = f"the span {span} has only a part of the word {partial[0]!r}"
            elif not inside:
                reason = f"the span {span} has only spaces"
            else:
                entities.append((inside[0], inside[-1] + 1, span["label"].strip()))
        reasons += [reason] if reason else []
    entities.sort()
    for (_, end, first), (start, _, second) in itertools.pairwise(entities):
        if start < end:
            where = source[slice(*word_spans[start])]
            reasons.append(f"spans overlap: {first!r} and {second!r} both have the word {where!r}")
    if not reasons:
        tags = tag_entities(entities, len(word_spans), "IOB2" if scheme == "auto" else scheme)
        row.values = row.values | {label: tags}
    return reasons


def _check_span(span: Any, source: str) -> str:
    """Return what is wrong with a single span; "" for a good one."""
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


def _check_scheme(name: str, rows: Sequence[Row], label: str, scheme: str, errors: ErrorList) -> None:
    """Add to `errors` all tags that violate their scheme."""
    found = find_scheme([row.values[label] for row in rows], scheme)
    if found == "none":
        return
    for row in rows:
        for i, reason in find_violations(row.values[label], found):
            errors.add(name, _find_line(row, i), _word_prefix(row, i) + reason)


def _find_line(row: Row, index: int) -> int:
    """Return the line of a word; the line of its row where the words have none."""
    return row.values[LINES][index] if LINES in row.values else row.line


def _word_prefix(row: Row, index: int) -> str:
    return "" if LINES in row.values else f"word {index}: "


def find_tag_names(name: str, rows: Sequence[Row], label: str, declared: Sequence[str], scheme: str) -> list[str]:
    """Return the classes: those declared, else those found, completed by their scheme. DataError for fewer than two."""
    if declared:
        return list(declared)
    sentences = [row.values[label] for row in rows]
    names = complete_tags({tag for tags in sentences for tag in tags}, find_scheme(sentences, scheme))
    if len(names) < 2:
        raise DataError(f"{name}: all words have the tag {names[0]!r}; training needs two tags")
    return names


def check_tag_names(name: str, rows: Sequence[Row], label: str, labels: Sequence[str]) -> None:
    """Raise one DataError for all tags that are not among `labels`."""
    errors, known = ErrorList(), set(labels)
    for row in rows:
        for i, tag in enumerate(row.values[label]):
            if tag not in known:
                reason = f"{_word_prefix(row, i)}unknown label {tag!r}; the labels are {', '.join(map(repr, labels))}"
                errors.add(name, _find_line(row, i), reason)
    errors.raise_if_any()


# Rows -> examples


@dataclass(frozen=True)
class Words:
    """The words of N examples, end to end, and the token of each."""

    offsets: np.ndarray  # (N + 1,) int64: where the words of each example begin
    first_tokens: np.ndarray  # (total,) int32: the word's first token in its sequence; -1: it has no token
    labels: np.ndarray | None  # (total,) int64: classes
    truncated: int  # number of words that lost their tokens to max_length
    unreadable: int  # number of words that have no token in this tokenizer, such as a lone control character
    rows: Sequence[Row]
    column: str  # the column of the words in the rows
    entities: bool  # whether the tags mark entities

    @property
    def num_lost(self) -> int:
        """Number of words without a token."""
        return self.truncated + self.unreadable

    def word_slice(self, index: int) -> slice:
        """Return the positions of the words of example `index`."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))


def encode_tagged(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    text: str,
    label: str = "",
    labels: Sequence[str] = (),
    max_length: int,
    entities: bool = True,
) -> TextExamples[Words]:
    """Encode checked rows word by word, truncated to `max_length` tokens including the special ones.

    A word's label stands at its first token, and IGNORE_INDEX at all others (Devlin et al. 2019, section 5.3). The
    tokenizer says which tokens belong to a word. label: the column of the tags, or "".
    """
    ids, types = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.uint8)]
    first_tokens = [np.empty(0, dtype=np.int32)]
    lengths: list[int] = []
    truncated_words = unreadable = truncated = 0
    tokenizer.enable_truncation(max_length)
    for begin in range(0, len(rows), CHUNK):
        chunk = [_space_words(row, text, tokenizer) for row in rows[begin : begin + CHUNK]]
        for words, encoding in zip(chunk, tokenizer.encode_batch(chunk, is_pretokenized=True), strict=True):
            ids.append(np.asarray(encoding.ids, dtype=np.int32))
            types.append(np.asarray(encoding.type_ids, dtype=np.uint8))
            lengths.append(len(encoding.ids))
            first_tokens.append(_first_tokens(encoding.word_ids, len(words)))
            beyond = {word for overflow in encoding.overflowing for word in overflow.word_ids}
            lost = set(np.flatnonzero(first_tokens[-1] < 0).tolist())
            truncated += bool(beyond)
            truncated_words += len(lost & beyond)
            unreadable += len(lost - beyond)
    tokenizer.no_truncation()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    counts = [len(row.values[text]) for row in rows]
    number = {name: i for i, name in enumerate(labels)}
    tags = np.array([number[tag] for row in rows for tag in row.values[label]], dtype=np.int64) if label else None
    record = Words(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        first_tokens=np.concatenate(first_tokens),
        labels=tags,
        truncated=truncated_words,
        unreadable=unreadable,
        rows=rows,
        column=text,
        entities=entities,
    )
    return TextExamples(
        input_ids=np.concatenate(ids),
        token_type_ids=np.concatenate(types),
        offsets=offsets,
        labels=None,
        ids=[row.id for row in rows],
        truncated=truncated,
        token_labels=None if tags is None else _label_tokens(record, tags, counts, offsets),
        notes=count_notes(
            (truncated, "text", "truncated to data.max_length"), (record.num_lost, "word", "without a token")
        ),
        record=record,
    )


def _space_words(row: Row, text: str, tokenizer: Tokenizer) -> list[str]:
    """Return the words as the tokenizer should see them: with one space before them, unless the text has none there.

    - To a byte-level tokenizer (RoBERTa), a word after a space is another word, and a second space would be a token.
    - To WordPiece there is no difference.
    - A tokenizer that does not split texts would take the space for a part of the word, so there is none.
    """
    words: list[str] = row.values[text]
    if tokenizer.pre_tokenizer is None:
        return [word.lstrip() for word in words]
    if TEXT in row.values:
        return [" " + word.lstrip() if word[0].isspace() else word for word in words]
    return [" " + word for word in words]


def _first_tokens(word_ids: Sequence[int | None], count: int) -> np.ndarray:
    """Return (count,): the position of the first token of each word, or -1."""
    first_tokens = np.full(count, -1, dtype=np.int32)
    for position in range(len(word_ids) - 1, -1, -1):  # backwards, so that the first token is written last
        word = word_ids[position]
        if word is not None:
            first_tokens[word] = position
    return first_tokens


def _label_tokens(words: Words, tags: np.ndarray, counts: Sequence[int], offsets: np.ndarray) -> np.ndarray:
    """Return (total tokens,): the label of each word at its first token, IGNORE_INDEX elsewhere."""
    labels = np.full(offsets[-1], IGNORE_INDEX, dtype=np.int64)
    kept = words.first_tokens >= 0
    labels[(np.repeat(offsets[:-1], counts) + words.first_tokens)[kept]] = tags[kept]
    return labels
