"""Words with tags: checked rows of any format, and examples with a label at the first token of each word.

A row has its words in the text column and their tags in the label column, both lists. The formats:
- conll: a word a line with its tag in another column, an empty line after each sentence (.conll, .conllu, .bio, .iob);
- word/tag: a sentence a line;
- text: a text a line, without tags;
- rows (.jsonl, .json, .csv, .parquet, in memory): lists of words and of tags; or a text and its spans in characters.

A text is split into words by data/words.py, each with the spaces before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from data.batch import IGNORE_INDEX
from data.errors import DataError, ErrorList
from data.examples import TextExamples, count_notes
from data.formats.annotations import is_brat, read_brat
from data.formats.entity_spans import spans_to_tags
from data.formats.lines import locate, read_first_line, suffix_of
from data.formats.memory import is_in_memory
from data.formats.options import FileOptions
from data.formats.rows import read_rows
from data.formats.tagged_rows import check_tagged_rows, hint_at_columns
from data.formats.word_lines import guess_format, read_sentences
from data.long_texts import TRUNCATE, LongTexts, split_into_word_windows
from data.row import Row, Rows
from data.tag_checks import check_tags, name_numbers
from data.tag_schemes import find_scheme
from data.tokenizers.split_words import add_spaces
from data.words import TEXT

LINE_SUFFIXES = {".conll": "conll", ".conllu": "conll", ".conllup": "conll", ".bio": "conll", ".iob": "conll"}
LINE_FORMATS = ("conll", "word/tag", "text")
ROW_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".parquet", ".arrow")
UNTOLD = {"", ".txt", ".tsv", ".tags", ".data", ".iob2", ".bio2"}  # endings of files of more than one kind
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
    bad_tags: str = "raise",
    bad_spans: str = "raise",
    labels: Sequence[str] = (),
    explain: bool = False,
    columns: tuple[str, str] = ("", ""),
) -> Rows:
    """Return the rows of a file. label: the column of the tags, or "" for words alone.

    - group: a column that every row must have, or "". Files of words a line have no such columns.
    - scheme, bad_tags, bad_spans: as in the section [token_classification]. labels: data.labels.
    - explain: note how the tags are read. columns: the numbers or names of the columns in files of words a line.
    Raises one DataError with all errors of the file.
    """
    kind = _find_kind(name, text, label, options)
    errors = ErrorList()
    rows: list[Row]
    texts: list[Row] = []  # with spans
    if kind in ("rows", "brat"):
        if kind == "brat":
            rows = read_brat(locate(name), text, label, bad_spans, errors)
        else:
            options = replace(options, has_lists=True, hint=lambda found: hint_at_columns(found, text, label, options))
            rows = read_rows(name, [c for c in (text, label, group) if c], options, errors)
        if label:
            _refuse_rejected(name, rows, errors)
        texts = check_tagged_rows(name, [row for row in rows if row.line not in errors.reasons], text, label, errors)
        if texts and scheme == "none":
            reason = "spans of a text are entities: token_classification.tag_scheme cannot be none"
            errors.add(name, texts[0].line, reason, of_file=True)
        elif texts:
            spans_to_tags(name, texts, text, label, scheme, bad_spans, errors)
    elif group:
        raise DataError(f"{name}: data.group_column = {group!r} needs columns, so a .jsonl file")
    elif kind == "text" and label:
        raise DataError(f"{name}: data.format = 'text' has no tags; it is for predictions")
    else:
        rows = read_sentences(name, kind, (text, label or "tags"), columns, bool(label), errors, options)
    if explain and bad_spans != "raise" and not texts:
        errors.notes.append(f"token_classification.bad_spans = {bad_spans} has no effect: there are no spans")
    if label:
        good = [row for row in rows if row.line not in errors.reasons]
        name_numbers(name, good, label, labels, errors)
        good = [row for row in good if row.line not in errors.reasons] if errors.reasons else good
        check_tags(name, good, label, scheme, bad_tags, explain, errors)
    return errors.settle(rows, options)


def _refuse_rejected(name: str, rows: Sequence[Row], errors: ErrorList) -> None:
    """Add to `errors` the rows of Prodigy whose annotation was not accepted."""
    for row in rows:
        if "spans" in row.values and (answer := row.values.get("answer")) in ("reject", "ignore"):
            errors.add(name, row.line, f"answer = {answer!r}: in Prodigy, these spans were not accepted")


def _find_kind(name: str, text: str, label: str, options: FileOptions) -> str:
    """Return conll, word/tag, text, brat or rows; DataError for a file whose name and settings do not tell it."""
    if is_in_memory(name):
        return "rows"
    format, path = options.format, locate(name)
    if format == "auto" and is_brat(path, bool(label)):
        return "brat"
    if format != "auto":
        return format if format in LINE_FORMATS else "rows"
    suffix = suffix_of(path)
    if suffix in LINE_SUFFIXES:
        return LINE_SUFFIXES[suffix]
    if suffix not in UNTOLD or path.is_dir():
        return "rows"
    if suffix == ".tsv" and text in read_first_line(path, options).split("\t"):
        return "rows"
    if not path.exists():
        raise DataError(f"{name}: no such file")
    guess = guess_format(path, options)
    hint = f"by its first lines data.format = {guess!r} would read it" if guess else f"one of {', '.join(LINE_FORMATS)}"
    hint += "" if label else "; 'text' reads a text a line"
    raise DataError(
        f"{name}: the name does not tell its format; tagged words are in {', '.join(LINE_SUFFIXES)} or "
        f"{', '.join(ROW_SUFFIXES)}, or data.format says it: {hint}"
    )


# Rows -> examples


@dataclass(frozen=True)
class Words:
    """The words of N examples, end to end, and the token of each."""

    offsets: np.ndarray  # (N + 1,) int64: where the words of each example begin
    first_tokens: np.ndarray  # (total,) int32: the word's first token among those of its example; -1: it has none
    labels: np.ndarray | None  # (total,) int64: classes
    truncated: int  # number of words that lost their tokens to max_length
    unreadable: int  # number of words that have no token in this tokenizer, such as a lone control character
    rows: Sequence[Row]
    column: str  # the column of the words in the rows
    entities: bool  # whether the tags mark entities
    tag_names: tuple[str, ...] = ()  # the classes
    tag_scheme: str = "auto"  # the setting

    @cached_property
    def scheme(self) -> str:
        """The scheme by which strict metrics count entities: as set, else that of the labels, in all examples."""
        pairs: Counter[tuple[str, str]] = Counter({("", tag): 0 for tag in self.tag_names})
        if self.labels is not None and len(self.labels):
            before = np.concatenate([[-1], self.labels[:-1]])
            before[self.offsets[:-1][np.diff(self.offsets) > 0]] = -1
            found, counts = np.unique(np.stack([before, self.labels]), axis=1, return_counts=True)
            names = (*self.tag_names, "")  # -1: no tag
            pairs.update({(names[a], names[b]): n for a, b, n in zip(*found.tolist(), counts.tolist(), strict=True)})
        return find_scheme(pairs, self.tag_scheme)

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
    scheme: str = "auto",
    long_texts: str = TRUNCATE,
    window_overlap: int = 0,
) -> TextExamples[Words]:
    """Encode checked rows word by word, truncated to `max_length` tokens including the special ones.

    A word's label stands at its first token, and IGNORE_INDEX at all others (Devlin et al. 2019, section 5.3). The
    tokenizer says which tokens belong to a word. label: the column of the tags, or "".

    long_texts = windows: a long text is read in several sequences, and each word in one of them (data/long_texts.py).
    """
    ids, types = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.uint8)]
    first_tokens = [np.empty(0, dtype=np.int32)]
    windows: list[int] = []  # of each example
    truncated_words = unreadable = truncated = 0
    if long_texts == TRUNCATE:
        tokenizer.enable_truncation(max_length)
    for begin in range(0, len(rows), CHUNK):
        chunk = [_space_words(row, text, tokenizer) for row in rows[begin : begin + CHUNK]]
        for words, encoding in zip(chunk, tokenizer.encode_batch(chunk, is_pretokenized=True), strict=True):
            encoded = _split_encoding(encoding, len(words), max_length, window_overlap)
            ids += encoded.ids
            types += encoded.types
            first_tokens.append(encoded.first_tokens)
            windows.append(len(encoded.ids))
            truncated += encoded.is_truncated
            truncated_words += encoded.num_truncated
            unreadable += encoded.num_unreadable
    tokenizer.no_truncation()
    offsets = np.cumsum([len(sequence) for sequence in ids], dtype=np.int64)
    sequences = np.cumsum([0, *windows], dtype=np.int64)
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
        tag_names=tuple(labels),
        tag_scheme=scheme,
    )
    return TextExamples(
        input_ids=np.concatenate(ids),
        token_type_ids=np.concatenate(types),
        offsets=offsets,
        labels=None,
        ids=[row.id for row in rows],
        truncated=truncated,
        token_labels=None if tags is None else _label_tokens(record, tags, counts, offsets, sequences),
        sequences=sequences if sequences[-1] > len(rows) else None,
        notes=_note_long(windows, max_length, truncated, truncated_words, long_texts)
        + count_notes((unreadable, "word", "without a token")),
        record=record,
    )


class _EncodedWords(NamedTuple):
    """The sequences of one text of words."""

    ids: list[np.ndarray]  # of each sequence
    types: list[np.ndarray]
    first_tokens: np.ndarray  # (words,) as in Words
    num_truncated: int = 0  # words that lost all tokens, or in windows some
    num_unreadable: int = 0
    is_truncated: bool = False


def _split_encoding(encoding: Encoding, num_words: int, max_length: int, overlap: int) -> _EncodedWords:
    """Return the sequence of a text that fits or was truncated, or the windows of one that is longer."""
    ids, types = np.asarray(encoding.ids, dtype=np.int32), np.asarray(encoding.type_ids, dtype=np.uint8)
    if len(ids) <= max_length:
        first_tokens = _first_tokens(encoding.word_ids, num_words)
        beyond = {word for overflow in encoding.overflowing for word in overflow.word_ids}
        lost = set(np.flatnonzero(first_tokens < 0).tolist())
        return _EncodedWords([ids], [types], first_tokens, len(lost & beyond), len(lost - beyond), bool(beyond))
    word_ids = np.array([-1 if word is None else word for word in encoding.word_ids])
    content = np.flatnonzero(word_ids >= 0)
    begin, end = content[0], content[-1] + 1
    before, after = np.arange(begin), np.arange(end, len(ids))
    windows = split_into_word_windows(word_ids[begin:end], max_length - len(before) - len(after), overlap)
    kept = [np.concatenate([before, np.arange(begin + a, begin + b), after]) for a, b in windows.slices]
    offsets = np.cumsum([0, *map(len, kept)])[windows.window]  # of the window of each word
    first_tokens = np.full(num_words, -1, dtype=np.int32)
    starts = np.array([start for start, _ in windows.slices])[windows.window]
    first_tokens[windows.words] = offsets + len(before) + windows.first - starts
    num_unreadable = int((first_tokens < 0).sum())
    sequences = [ids[positions] for positions in kept], [types[positions] for positions in kept]
    return _EncodedWords(*sequences, first_tokens, windows.num_cut, num_unreadable, windows.num_cut > 0)


def _note_long(windows: Sequence[int], max_length: int, texts: int, words: int, mode: str) -> tuple[str, ...]:
    """Return notes on texts longer than max_length. texts, words: numbers of those that were truncated."""
    if mode == TRUNCATE:
        return count_notes(
            (texts, "text", "truncated to data.max_length"), (words, "word", "cut off by data.max_length")
        )
    split = [count for count in windows if count > 1]
    read = LongTexts(mode, max_length).notes(len(split), len(windows), "texts", sum(split), 0, 0)
    return read + count_notes((words, "word", "longer than a window, of which the first tokens are read"))


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
    return add_spaces(words, tokenizer)


def _first_tokens(word_ids: Sequence[int | None], count: int) -> np.ndarray:
    """Return (count,): the position of the first token of each word, or -1."""
    first_tokens = np.full(count, -1, dtype=np.int32)
    for position in range(len(word_ids) - 1, -1, -1):  # backwards, so that the first token is written last
        word = word_ids[position]
        if word is not None:
            first_tokens[word] = position
    return first_tokens


def _label_tokens(
    words: Words, tags: np.ndarray, counts: Sequence[int], offsets: np.ndarray, sequences: np.ndarray
) -> np.ndarray:
    """Return (total tokens,): the label of each word at its first token, IGNORE_INDEX elsewhere."""
    labels = np.full(offsets[-1], IGNORE_INDEX, dtype=np.int64)
    kept = words.first_tokens >= 0
    labels[(np.repeat(offsets[sequences[:-1]], counts) + words.first_tokens)[kept]] = tags[kept]
    return labels
