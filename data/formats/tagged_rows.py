"""Rows with lists of words and of tags, or with a text and its spans: their columns are checked and made lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data.errors import ErrorList
from data.formats.options import FileOptions
from data.label_lists import parse_list_text
from data.notes import count_of
from data.row import Row
from data.words import TEXT, split_words

# Columns of public data sets and of annotation tools.
WORDS = ("tokens", "words", "text", "sentence", "content")
TAGS = ("tags", "ner_tags", "labels", "label", "entities", "spans", "ents", "ner", "pos_tags", "upos", "pos")


def check_tagged_rows(name: str, rows: Sequence[Row], text: str, label: str, errors: ErrorList) -> list[Row]:
    """Put words and tags into rows, and add to `errors` those that have none; return those with spans of a text."""
    as_text = blank = 0
    texts: list[Row] = []
    spaced: list[Row] = []  # rows whose words and tags are separated by spaces
    for row in rows:
        words = row.values[text]
        if isinstance(words, str) and words[:1] + words[-1:] in ("[]", "()") and _read_lists(row, text, label):
            words, as_text = row.values[text], as_text + 1
        if isinstance(words, str):
            if not words.strip():
                errors.add(name, row.line, f"{text!r} is empty", is_empty=True)
            elif label and (tags := _split_tags(row.values[label])):
                spaced.append(row)
                row.values = row.values | {text: words.split(), label: tags}
                if len(tags) != len(words.split()):
                    found = f"{count_of(len(words.split()), 'word')} between spaces in {text!r}"
                    errors.add(name, row.line, f"{found}, and {count_of(len(tags), 'tag')} in {label!r}")
            else:
                spans = parse_list_text(row.values[label]) if label and isinstance(row.values[label], str) else None
                more = {} if spans is None else {label: spans}
                row.values = row.values | {TEXT: words, text: split_words(words)} | more
                texts += [row] if label else []
        elif reason := _check_words(row, text, label):
            errors.add(name, row.line, reason, is_empty=reason == f"{text!r} is empty")
        else:
            blank += sum(not word.strip() for word in words)
            if label:
                row.values = row.values | {label: [str(tag).strip() for tag in row.values[label]]}
    if spaced and all(len(row.values[text]) == 1 for row in spaced):
        hint = "words in lines of their own are read from .conll, with an empty line after each sentence"
        for row in spaced:
            reason = f"{label!r} should be a list of spans of the text, not {row.values[label][0]!r}; {hint}"
            errors.add(name, row.line, reason)
    elif spaced:
        errors.notes.append(f"{count_of(len(spaced), 'row')} with tags separated by spaces, read as one tag per word")
    if as_text:
        errors.notes.append(f"{count_of(as_text, 'row')} with lists as text, such as ['a', 'b'], read as lists")
    if blank:
        errors.notes.append(f"{count_of(blank, 'word')} of white space alone, which tokenizers do not read")
    return texts


def _split_tags(value: Any) -> list[str]:
    """Return the tags that a text has between spaces; [] for spans or a list, also one that is written as text."""
    is_plain = isinstance(value, str) and value.strip()[:1] not in ("[", "(", "{")
    return value.split() if is_plain else []


def hint_at_columns(found: Sequence[str], text: str, label: str, options: FileOptions) -> str:
    """Return the settings that would read a file with these columns; "" for columns that are not known."""
    wanted = {text: [column for column in WORDS if column in found], label: [tag for tag in TAGS if tag in found]}
    named = [
        f'{options.settings[column]} = "{known[0]}"'
        for column, known in wanted.items()
        if column and column not in found and known and column in options.settings
    ]
    return f"{' and '.join(named)} would read it" if named else ""


def _read_lists(row: Row, text: str, label: str) -> bool:
    """Put the lists that are written as text in a table into a row; return whether they are such lists."""
    columns = [column for column in (text, label) if column]
    found = {column: parse_list_text(value) for column in columns if isinstance(value := row.values[column], str)}
    if len(found) < len(columns) or not all(isinstance(items, list) for items in found.values()):
        return False
    if not all(isinstance(word, str) for word in found[text] or ()):
        return False
    row.values = row.values | found
    return True


def _check_words(row: Row, text: str, label: str) -> str:
    """Return what is wrong with a row of words and tags; "" for a good one."""
    words = row.values[text]
    if not isinstance(words, list):
        return f"{text!r} should be a list of words, or a text, not {words!r}"
    wrong = [i for i, word in enumerate(words) if not isinstance(word, str) or not word]
    if wrong:
        return f"word {wrong[0]} in {text!r} should be text that is not empty, {words[wrong[0]]!r}"
    if not any(map(str.strip, words)):
        return f"{text!r} is empty"
    if not label:
        return ""
    tags = row.values[label]
    if not isinstance(tags, list):
        return f"{label!r} should be a list of tags, not {tags!r}"
    bad = [i for i, tag in enumerate(tags) if isinstance(tag, bool) or not isinstance(tag, str | int)]
    bad += [i for i, tag in enumerate(tags) if isinstance(tag, str) and not tag.strip()]
    if bad and isinstance(tags[bad[0]], dict | list):
        return f"{label!r} has spans, {tags[bad[0]]!r}: data.text_column should name the text, not a list of words"
    if bad:
        return f"tag {bad[0]} in {label!r} should be text that is not empty, {tags[bad[0]]!r}"
    if len(tags) != len(words):
        return f"{count_of(len(words), 'word')} in {text!r}, and {count_of(len(tags), 'tag')} in {label!r}"
    return ""
