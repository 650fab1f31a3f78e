"""Entities as spans of a text, in the forms that annotation tools write them -> tags of its words."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data.errors import ErrorList
from data.formats.spans import check_span_text
from data.row import Row
from data.tag_schemes import tag_entities
from data.words import TEXT, locate_words

START = ("start", "start_offset", "begin", "startOffset", "start_char", "start_index", "start_idx", "offset")
END = ("end", "end_offset", "endOffset", "end_char", "end_index", "end_idx", "stop")
LABEL = ("label", "labels", "entity_group", "type", "entity_type", "category", "tag", "class", "entity")
OWN_TEXT = ("text", "word", "surface", "mention", "value", "entity")
SETTING = "token_classification.bad_spans"
OVERLAP = 'the longest of overlapping spans is read with bad_spans = "expand" or "skip"'
INCLUSIVE = "the ends look inclusive, as nearly every span lacks the last character of a word: an end is one after it"


class Span(NamedTuple):
    """An entity of a text: text[start:end]; own_text: what its annotation says that it is, or None."""

    start: int
    end: int
    label: str
    own_text: str | None = None


@dataclass
class SpanReport:
    """What happened to the spans of a file."""

    count: int = 0
    cut_by_one: int = 0  # spans whose end cuts off the last character of a word
    changed: Counter[str] = field(default_factory=Counter)  # {what happened: number of spans}
    first: dict[str, str] = field(default_factory=dict)  # {what happened: the first of these spans}

    def add(self, what: str, row: Row, shown: object) -> None:
        """Count a span to which this happened."""
        self.changed[what] += 1
        self.first.setdefault(what, f"at line {row.line}: {shown}")

    @property
    def looks_inclusive(self) -> bool:
        """Whether ends seem to be the last characters of entities."""
        return self.cut_by_one >= 2 and 10 * self.cut_by_one >= 8 * self.count

    def notes(self, bad_spans: str) -> list[str]:
        """Return a sentence for each kind of change."""
        found = [
            f"{count:,} of {self.count:,} spans {what} ({SETTING} = {bad_spans}), the first {self.first[what]}"
            for what, count in self.changed.items()
        ]
        return found + ([f"warning: {INCLUSIVE}"] if self.looks_inclusive and found else [])


def spans_to_tags(
    name: str, rows: Sequence[Row], text: str, label: str, scheme: str, bad_spans: str, errors: ErrorList
) -> None:
    """Replace the spans in column `label` of rows that are texts by tags of the words in column `text`.

    bad_spans: raise, expand or skip spans that cut a word or have none, and the shorter of two that overlap. A span
    whose own text differs from the text at its place is always an error.
    """
    report, problems = SpanReport(), []
    for row in rows:
        places = locate_words(row.values[text])
        entities, reasons = [], []
        try:
            found = list(_parse_spans(row.values[label], row.values[TEXT], label))
        except ValueError as error:
            problems.append((row, str(error)))
            continue
        for span, shown, reason in found:
            report.count += 1
            if reason:
                reasons.append(reason)
                continue
            words, reason = _find_words(span, shown, row, places, bad_spans, report)
            reasons += [reason] if reason else []
            entities += [words] if words else []
        kept, overlaps = _without_overlaps(entities, row, places, bad_spans, report)
        problems += [(row, reason) for reason in (reasons + overlaps)]
        if not reasons and not overlaps:
            tags = tag_entities(kept, len(places), "IOB2" if scheme == "auto" else scheme)
            row.values = row.values | {label: tags}
    for row, reason in problems:
        errors.add(
            name, row.line, f"{reason}; {INCLUSIVE}" if report.looks_inclusive and "part of" in reason else reason
        )
    errors.notes += report.notes(bad_spans)


def _find_words(
    span: Span, shown: str, row: Row, places: Sequence[tuple[int, int]], bad_spans: str, report: SpanReport
) -> tuple[tuple[int, int, str] | None, str]:
    """Return ((first word, one after the last, label), ""), or (None, the reason why there is none)."""
    source = row.values[TEXT]
    first = bisect_right(places, span.start, key=lambda place: place[1])
    last = bisect_left(places, span.end, key=lambda place: place[0])
    if last <= first:
        if bad_spans != "raise":
            report.add("with only spaces left out", row, shown)
            return None, ""
        return None, f"the span {shown} has only spaces"
    partial = [source[slice(*place)] for place in places[first:last] if place[0] < span.start or place[1] > span.end]
    report.cut_by_one += span.end + 1 == places[last - 1][1]
    if partial and bad_spans == "raise":
        where = f"{places[first][0]}-{places[last - 1][1]}"
        hint = f'{SETTING} = "expand" reads the whole words at {where}, "skip" leaves it out'
        return None, f"the span {shown} has only a part of the word {partial[0]!r}; {hint}"
    if partial and bad_spans == "skip":
        report.add("that cut a word left out", row, shown)
        return None, ""
    if partial:
        whole = source[places[first][0] : places[last - 1][1]]
        report.add("that cut a word expanded", row, f"{shown} to {whole!r}")
    return (first, last, span.label), ""


def _without_overlaps(
    entities: list[tuple[int, int, str]],
    row: Row,
    places: Sequence[tuple[int, int]],
    bad_spans: str,
    report: SpanReport,
) -> tuple[list[tuple[int, int, str]], list[str]]:
    """Return (the entities that are kept, in order, the reasons of overlaps if those are errors)."""
    source = row.values[TEXT]
    entities = sorted(dict.fromkeys(entities))  # one that is annotated twice is one
    if bad_spans == "raise":
        reasons = [
            f"spans overlap: {first!r} and {second!r} both have the word {source[slice(*places[start])]!r}; {OVERLAP}"
            for (_, end, first), (start, _, second) in itertools.pairwise(entities)
            if start < end
        ]
        return entities, reasons
    kept: list[tuple[int, int, str]] = []
    for start, end, kind in sorted(entities, key=lambda entity: (entity[0] - entity[1], entity)):  # the longest first
        if any(start < last and first < end for first, last, _ in kept):
            found = source[places[start][0] : places[end - 1][1]]
            report.add("that overlap a longer one (or an earlier one as long) left out", row, f"{found!r}, {kind}")
        else:
            kept.append((start, end, kind))
    return sorted(kept), []


# One column -> spans


def _parse_spans(value: Any, source: str, label: str) -> Iterator[tuple[Span, str, str]]:
    """Yield (span, what is shown of it, what is wrong with it or ""); ValueError for a column of another form."""
    if isinstance(value, dict):
        value = value["entities"] if "entities" in value else list(_flatten_mapping(value))
    if not isinstance(value, list):
        hint = "; words in lines of their own are read from .conll" if isinstance(value, str) else ""
        raise ValueError(f"{label!r} should be a list of spans of the text, not {value!r}{hint}")
    for item in value:
        span, reason = read_span(item)
        shown = str(item) if isinstance(item, dict | list) else repr(item)
        if not reason and span.end > len(source):
            reason = f"the span {shown} ends outside the text, which has {len(source)} characters"
            reason += _explain_outside(source, span)
        if not reason and span.own_text is not None:
            reason = check_span_text(source, span.start, span.end, span.own_text)
            reason = f"the span {shown}: {reason}" if reason else ""
        yield span, shown, reason


def _explain_outside(source: str, span: Span) -> str:
    """Return the true place of a span that ends outside of its text, if it says what it is."""
    if not span.own_text:
        return ""
    reason = check_span_text(source, span.start, span.end, span.own_text)
    return f"; {reason}" if reason else ""


def _flatten_mapping(value: dict[str, Any]) -> Iterator[Any]:
    """Yield the spans of {label: {text of the entity: [[start, end], ...]}} and of {label: [[start, end], ...]}."""
    for kind, found in value.items():
        places = found.items() if isinstance(found, dict) else [(None, found)]
        for own_text, spans in places:
            for span in spans if isinstance(spans, list) else [spans]:
                start, end = span if isinstance(span, list) and len(span) == 2 else (span, None)
                shown = {"start": start, "end": end, "label": kind}
                yield shown if own_text is None else shown | {"text": own_text}


def read_span(value: Any) -> tuple[Span, str]:
    """Return (the span of an object, or of a list [start, end, label], what is wrong with it or "")."""
    none = Span(0, 0, "")
    if isinstance(value, list) and len(value) == 3:
        start, end, kind, own_text = (*value, None)
    elif isinstance(value, dict):
        start, kind_key = _first(value, START), next((key for key in LABEL if key in value), "")
        end, kind = _first(value, END), value.get(kind_key)
        if end is None and type(start) is int and type(value.get("length")) is int:
            end = start + value["length"]
        own_text = next((value[key] for key in OWN_TEXT if key != kind_key and isinstance(value.get(key), str)), None)
    else:
        return none, f"a span should be an object with start, end and label, not {value!r}"
    if start is None or end is None or kind is None:
        return none, f"a span should be an object with start, end and label, not {value!r}"
    if type(start) is not int or type(end) is not int or not 0 <= start < end:
        return none, f"the span {value} should have whole numbers, start before end"
    if isinstance(kind, list) and len(kind) == 1:
        kind = kind[0]
    if isinstance(kind, list) and len(kind) > 1:
        return none, f"the span {value} has {len(kind)} labels; a word has one tag"
    if not isinstance(kind, str) or not kind.strip():
        return none, f"the label of the span {value} should be text that is not empty"
    return Span(start, end, kind.strip(), own_text), ""


def _first(value: dict[str, Any], keys: Sequence[str]) -> Any:
    return next((value[key] for key in keys if value.get(key) is not None), None)
