"""Exports of annotation tools: Label Studio's tasks as rows, and folders of BRAT.

doccano's lines are rows already: {"text", "label"} with spans or classes, or "entities". So is Label Studio's JSON-MIN.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError, ErrorList
from data.formats.lines import read_whole
from data.formats.spans import from_utf16
from data.notes import count_of
from data.row import Row

SETTING = "token_classification.bad_spans"
ENTITY = re.compile(r"T\d+\t")  # a line of an entity in BRAT: T1, tab, label start end, tab, its text


# Label Studio: {"id", "data": {"text": ...}, "annotations": [{"result": [{"from_name", "type", "value": {...}}]}]}


def is_label_studio(values: dict[str, Any]) -> bool:
    """Return whether a row is a task of Label Studio's JSON export."""
    return isinstance(values.get("data"), dict) and isinstance(values.get("annotations"), list)


def flatten_label_studio(values: dict[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """Return the columns of a task: those of its data, and one for each control tag, with spans or with choices.

    - A control tag's name is its from_name. If all have one name, it is "label" too. A required column after the first
      (the text) that no result of an annotated task fills is [], since there is no entity.
    - Ends are one after the last character; places in UTF-16 units become characters, where a span's text says so.
    DataError, with the reason alone, for annotations that differ.
    """
    data = values["data"]
    annotations = [a for a in values["annotations"] if isinstance(a, dict) and not a.get("was_cancelled")]
    annotations = [a for a in annotations if a.get("ground_truth")] or annotations
    results = [_read_results(a.get("result") or [], data) for a in annotations]
    is_read = any(column not in data for column in required[1:])  # predictions need no annotations
    if is_read and any(other != results[0] for other in results[1:]):
        raise DataError(f"{len(results)} annotations of this task differ; export one, or mark one as ground truth")
    found: dict[str, Any] = dict(results[0]) if results else {}
    if len(found) == 1:
        found.setdefault("label", next(iter(found.values())))
    flat = {"data": data} if any(column.startswith("data.") for column in required) else {}
    flat |= {"id": values["id"]} if "id" in values else {}
    flat |= data | found
    missing = [column for column in required[1:] if column not in flat and "." not in column]
    if missing and not results:
        raise DataError(f"this task has no annotation, so no {missing[0]!r}")
    if "label" not in found:
        flat |= {column: [] for column in missing}
    return flat


def _read_results(results: list[Any], data: dict[str, Any]) -> dict[str, Any]:
    """Return {from_name: spans, or the choice, or a list of several choices}."""
    found: dict[str, Any] = {}
    for result in results:
        value = result.get("value") if isinstance(result, dict) else None
        if not isinstance(value, dict):
            continue
        name, kind = str(result.get("from_name", "label")), result.get("type")
        labels = value.get("labels") or value.get("hypertextlabels")
        if labels:
            source = next((text for text in data.values() if isinstance(text, str)), "")
            found.setdefault(name, []).extend(_read_spans(value, labels, source))
        elif kind == "choices" or "choices" in value:
            choices = value.get("choices") or []
            found[name] = choices[0] if len(choices) == 1 else choices
        elif "rating" in value:
            found[name] = value["rating"]
    return found


def _read_spans(value: dict[str, Any], labels: list[str], source: str) -> Iterator[dict[str, Any]]:
    start, end, own_text = value.get("start"), value.get("end"), value.get("text")
    if isinstance(own_text, str) and isinstance(start, int) and isinstance(end, int):
        as_characters = (from_utf16(source, start), from_utf16(source, end))
        if source[start:end] != own_text and source[slice(*as_characters)] == own_text:
            start, end = as_characters
    for label in labels:
        span = {"start": start, "end": end, "label": label}
        yield span | {"text": own_text} if isinstance(own_text, str) else span


# BRAT: a folder of NAME.txt with a text, and NAME.ann with its annotations


def is_brat(path: Path, labelled: bool) -> bool:
    """Return whether a path is a folder of BRAT's files, which without labels may be texts alone."""
    return path.is_dir() and any(next(path.rglob(f"*.{end}"), None) for end in ("ann", "txt")[: 2 - labelled])


def read_brat(path: Path, text: str, label: str, bad_spans: str, errors: ErrorList) -> list[Row]:
    """Return a row for each line of the texts, with its entities; lines that share an entity are one row.

    bad_spans: what to do with entities in several pieces: raise; expand from the first piece to the last; or skip.
    Annotations of other kinds (relations, events, attributes, notes) are not read.
    """
    rows: list[Row] = []
    num_others, pieces = 0, list[str]()
    for document in sorted(path.rglob("*.txt")):
        name = document.relative_to(path).with_suffix("").as_posix()
        source, lines = _read_document(document, bool(label))
        entities = [_read_entity(line, document) for line in lines if ENTITY.match(line)]
        num_others += sum(1 for line in lines if line.strip() and not ENTITY.match(line))
        pieces += [f"{name}.ann {entity['id']}" for entity in entities if entity["pieces"] > 1]
        kept = [entity for entity in entities if entity["pieces"] == 1 or bad_spans != "skip"]
        for first, last, number in _join_lines(source, kept):
            if not source[first:last].strip():
                continue
            inside = [entity for entity in kept if first <= entity["start"] < last]
            values = {text: source[first:last], **({label: [_as_span(e, first) for e in inside]} if label else {})}
            rows.append(Row(f"{name}:{number}", len(rows) + 1, values))
            if bad_spans == "raise" and (bad := [entity["id"] for entity in inside if entity["pieces"] > 1]):
                hint = f'{SETTING} = "expand" reads it from the first to the last, "skip" leaves it out'
                errors.add(path, len(rows), f"the entity {bad[0]} has several pieces; {hint}", place=f"{name}:{number}")
    if not rows:
        raise DataError(f"{path}: no texts; BRAT's folders have a .txt beside each .ann")
    if pieces and bad_spans != "raise":
        what = "left out" if bad_spans == "skip" else "read from the first piece to the last"
        errors.notes.append(f"{count_of(len(pieces), 'span')} in several pieces {what}, the first {pieces[0]}")
    if num_others:
        errors.notes.append(f"{count_of(num_others, 'annotation')} of BRAT other than entities not read")
    return rows


def _read_document(document: Path, labelled: bool) -> tuple[str, list[str]]:
    """Return the text of a document and the lines of its annotations; no lines if not labelled."""
    annotation = document.with_suffix(".ann")
    try:
        source = read_whole(document).decode("utf-8")  # line ends stay, since places count them
        return source, read_whole(annotation).decode("utf-8-sig").splitlines() if labelled else []
    except UnicodeDecodeError:
        raise DataError(f"{document}: this text or its .ann is not UTF-8") from None
    except FileNotFoundError:
        raise DataError(f"{document}: has no .ann beside it; a text without entities has an empty one") from None


def _as_span(entity: dict[str, Any], first: int) -> dict[str, Any]:
    """Return an entity as a span of a text that begins at character `first`."""
    span = {"start": entity["start"] - first, "end": entity["end"] - first, "label": entity["label"]}
    return span | ({"text": entity["text"]} if entity["pieces"] == 1 and entity["text"] else {})


def _read_entity(line: str, document: Path) -> dict[str, Any]:
    """Return the entity of a line; DataError for a line of another form."""
    fields = line.split("\t")
    match = re.fullmatch(r"(\S+) (\d+ \d+(?:;\d+ \d+)*)", fields[1])
    if not match:
        raise DataError(f"{document.with_suffix('.ann')}: {line!r} is not a BRAT entity, such as 'T1\tPER 0 3\tAnn'")
    places = [int(place) for place in re.findall(r"\d+", match[2])]
    own_text = fields[2] if len(fields) > 2 else ""
    kind, start, end = match[1], places[0], places[-1]
    return {"id": fields[0], "label": kind, "start": start, "end": end, "pieces": len(places) // 2, "text": own_text}


def _join_lines(source: str, spans: Sequence[dict[str, Any]]) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, number of the first line) of the lines of a text; lines that share a span are joined."""
    ends = list(itertools.accumulate(len(line) for line in source.splitlines(keepends=True)))
    joined = {end for end in ends for span in spans if span["start"] < end < span["end"]}
    start, first_line = 0, 1
    for number, end in enumerate(ends, 1):
        if end not in joined:
            yield start, end, first_line
            start, first_line = end, number + 1
