"""The columns of a file: dotted names, and what is said of columns that are missing or not read."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from data.formats.options import FileOptions
from data.notes import list_some

USUAL_NAMES = {  # names of columns in public data sets, for a guess
    "text": ("sentence", "content", "review", "comment", "tweet", "document", "body", "message", "utterance", "title"),
    "label": ("labels", "class", "category", "sentiment", "intent", "target", "topic", "rating", "stars", "y"),
    "score": ("rating", "stars", "similarity_score", "similarity", "label", "value", "target", "y"),
    "tokens": ("words", "sentence", "text"),
    "tags": ("ner_tags", "pos_tags", "labels", "entities"),
    "answers": ("answer", "answer_text", "answers_text", "ans"),
    "context": ("passage", "paragraph", "document", "article"),
    "summary": ("highlights", "abstract", "headline", "title"),
}
PAIRS = [  # columns of two texts that are classified together
    names.split()
    for names in (
        "sentence1 sentence2",
        "premise hypothesis",
        "question1 question2",
        "text1 text2",
        "text_a text_b",
        "sentence_A sentence_B",
        "question sentence",
        "query passage",
    )
]
NEAR = 0.7  # of difflib: "lable" and "label" have 0.8, "threat" and "text" 0.6


def resolve(values: dict[str, Any], name: str) -> Any:
    """Return the value at a dotted name: `translation.en` in {"translation": {"en": ...}}; None where there is none.

    A number is a place in a list; another name applies to all items of a list, so that `answers.text` of a list of
    answers is the list of their texts.
    """
    value: Any = values
    for part in name.split("."):
        if isinstance(value, list) and part.isdecimal():
            value = value[int(part)] if int(part) < len(value) else None
        elif isinstance(value, list) and value:
            value = [item.get(part) if isinstance(item, dict) else None for item in value]
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def find_null(values: dict[str, Any], name: str) -> str:
    """Return what is null at a dotted name, "translation" or "translation.en"; "" where the row has no such name."""
    value: Any = values
    for count, part in enumerate(parts := name.split("."), start=1):
        if not isinstance(value, dict) or part not in value:
            break
        value = value[part]
        if value is None:
            return ".".join(parts[:count])
    return name if values.get(name, "") is None else ""


def list_nested(columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return the names of columns, with dotted names in the place of those that hold objects in one of `rows`."""
    nested = {column: list[str]() for column in columns}
    for values in rows:
        for column, value in values.items():
            if isinstance(value, dict):
                nested[column] = list(dict.fromkeys([*nested.get(column, []), *(f"{column}.{key}" for key in value)]))
    return [name for column, names in nested.items() for name in names or [column]]


def describe_missing(
    column: str, columns: Sequence[str], required: Sequence[str], options: FileOptions, hint: str = ""
) -> str:
    """Return the message for a file without `column`: its columns, the setting, and `hint` or a guess."""
    setting = options.settings.get(column, "")
    text = f"no column {column!r}{f' ({setting})' if setting else ''}; "
    if not columns:
        return text + "there are no columns"
    text += f"the columns are {name_all(columns)}"
    hint = hint or (options.hint(columns) if options.hint else "")
    if hint:
        return f"{text}; {hint}"
    free = [name for name in columns if name not in required and name != options.id_column]
    pair = next((pair for pair in PAIRS if set(pair) <= set(free)), None)
    if pair and column == "text" and setting == "data.text_column" and not options.hint:
        return f'{text}; data.text_column = "{pair[0]}" and data.text_pair_column = "{pair[1]}" would read the pairs'
    if setting == "data.group_column":
        return f'{text}; data.group_column = "" if no rows belong together'
    if guess := _find_nearest(column, free):
        text += f"; did you mean {setting} = {json.dumps(guess, ensure_ascii=False)}?" if setting else ""
        text += "" if setting else f"; did you mean {guess!r}?"
    return text


def name_all(columns: Sequence[str]) -> str:
    """Return the names in quotes, the first ones of many."""
    return list_some([repr(column) for column in columns])


def _find_nearest(column: str, columns: Sequence[str]) -> str:
    """Return the column whose name is most similar, is often used for it, or is the only one left; "" for none."""
    folded = {name.casefold(): name for name in reversed(columns)}
    ends = [name for name in columns if name.rpartition(".")[2] == column]
    ends = ends or [name for name in columns if column.casefold() in re.split(r"[\W_]+", name.casefold())]
    if ends:
        return ends[0]
    usual = next((folded[name] for name in USUAL_NAMES.get(column, ()) if name in folded), "")
    near = difflib.get_close_matches(column.casefold(), folded, n=1, cutoff=NEAR)
    return usual or (folded[near[0]] if near else columns[0] if len(columns) == 1 else "")
