"""The answers to a question: the forms in which files have them -> checked spans of the context."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from data.errors import DataError
from data.formats.row_forms import parse_cell
from data.formats.spans import explain_place, find_alike

FORM = 'answers should be {"text": [..], "answer_start": [..]} or a list of {"text": .., "answer_start": ..}'
START = "answer_start"
MAX_SHOWN = 80  # characters of a value in a message

Pairs = list[tuple[Any, Any]]  # (text, start); the start is None where the file has none


class Answer(NamedTuple):
    """A span of a context: context[start : start + len(text)] == text, counted in characters (code points)."""

    text: str
    start: int


class ReadAnswers(NamedTuple):
    """The answers to a question, and what was done to read them."""

    answers: list[Answer]
    num_located: int = 0  # answers without a start, which occur in the context once
    is_emptied: bool = False  # an empty text without a start was read as no answer


def read_answers(value: Any, context: str, starts: Any = None) -> ReadAnswers:
    """Return the answers of a question, all of them spans of its context; DataError, with the reason alone.

    value: of the column of answers. starts: of a column `answer_start` beside it.
    An answer without a start (or with a negative one) is read where it occurs in the context once.
    """
    if isinstance(value, list) and all(isinstance(item, Answer) for item in value):
        pairs: Pairs = [(item.text, item.start) for item in value]  # of rows that this reader made, in memory
    else:
        pairs = _as_pairs(parse_cell(value), _parse_starts(starts))
    pairs = [(text, _whole_number(start)) for text, start in pairs]
    for text, start in pairs:
        if not isinstance(text, str) or not (start is None or type(start) is int):
            raise DataError(f"{FORM}, with text and whole numbers; this is {text!r} at {start!r}")
    if pairs and all(not text.strip() and start is not None and start < 0 for text, start in pairs):
        return ReadAnswers([], is_emptied=True)
    has_no_start = [start is None or start < 0 for _, start in pairs]
    return ReadAnswers([_find_span(text, start, context) for text, start in pairs], sum(has_no_start))


def _parse_starts(value: Any) -> Any:
    """Return the starts of a column of their own, which are text in a table."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _whole_number(start: Any) -> Any:
    """Return 4 for 4.0, as a table with gaps has it, and for "4"; any other start as it is."""
    if isinstance(start, str) and start.strip().isdecimal():
        return int(start)
    return int(start) if isinstance(start, float) and start.is_integer() else start


def _as_pairs(value: Any, starts: Any) -> Pairs:
    """Return (text, start) of each answer, in any of the forms of files; DataError for another form."""
    if isinstance(value, dict):
        return _zip_starts(value.get("text"), value.get(START), value)
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return [pair for item in value for pair in _zip_starts(item.get("text"), item.get(START), value)]
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # an answer such as 1990, in a table
    return _zip_starts(value, starts, value)


def _zip_starts(texts: Any, starts: Any, value: Any) -> Pairs:
    """Return the pairs of one or several texts and their starts; one text may have several."""
    if isinstance(texts, str):
        return [(texts, start) for start in (starts if isinstance(starts, list) else [starts])]
    if not isinstance(texts, list) or not (starts is None or isinstance(starts, list)):
        raise DataError(f"{FORM}, not {shorten(value)}")
    if starts is None:
        return [(text, None) for text in texts]
    if len(texts) != len(starts):
        raise DataError(f"the answers have {len(texts)} texts and {len(starts)} starts")
    return list(zip(texts, starts, strict=True))


def _find_span(text: str, start: int | None, context: str) -> Answer:
    """Return the answer as a span of its context; DataError, with the true place, where it is none."""
    if not text.strip():
        raise DataError("an answer is empty; a question without an answer has an empty list of answers")
    if start is None or start < 0:
        return _locate(text, context)
    if context[start : start + len(text)] == text:
        return Answer(text, start)
    if start >= len(context):
        what = f"answer_start {start} is outside the context, which has {len(context):,} characters"
    else:
        what = f"the context has {context[start : start + len(text)]!r} at {start}, not the answer {text!r}"
    raise DataError(f"{what}; {explain_place(context, start, start + len(text), text)}")


def _locate(text: str, context: str) -> Answer:
    """Return the only occurrence of an answer in its context; DataError for none and for several."""
    places = []
    place = context.find(text)
    while place >= 0:
        places.append(place)
        place = context.find(text, place + 1)
    if len(places) == 1:
        return Answer(text, places[0])
    if places:
        shown = ", ".join(f"{place:,}" for place in places[:3]) + (", ..." if len(places) > 3 else "")
        raise DataError(
            f"the answer {text!r} has no start, and the context has it {len(places)} times, at {shown}: "
            f"say which by {START!r}"
        )
    first, last = find_alike(context, text)
    hint = f"; at {first}-{last} it has {context[first:last]!r}" if last else ""
    raise DataError(f"the answer {text!r} has no start, and is nowhere in the context{hint}")


def shorten(value: Any) -> str:
    """Return a value as text, of at most MAX_SHOWN characters."""
    shown = repr(value)
    return shown if len(shown) <= MAX_SHOWN else shown[: MAX_SHOWN - 3] + "..."
