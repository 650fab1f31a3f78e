"""One example as a page shows it: its text in parts with marks, or a small image."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from data import Row
from data.tag_notation import STANDARD, find_notation
from data.tag_schemes import find_entities
from data.words import TEXT, locate_words
from engine.tasks import Task, TaskSettings

MAX_CHARACTERS = 900  # of an example
THUMBNAIL = (96, 96)  # pixels
Span = tuple[int, int, str]  # start, end (after the last), label


@dataclass(frozen=True)
class Part:
    """A piece of a text. mark: "", "true", "predicted", "both", or "name" for the name of a column; label: of it."""

    text: str
    mark: str = ""
    label: str = ""


@dataclass(frozen=True)
class Shown:
    """An example: what is right, what was predicted, how wrong that is, and its text or image.

    confidence: the probability of the prediction; NaN: not known. image: a data URI; "": none.
    """

    id: str
    true: str
    predicted: str
    error: str
    confidence: float
    parts: Sequence[Part]
    image: str = ""


def parts_of(
    row: Row, prediction: Mapping[str, Any], task: Task, settings: TaskSettings, labels: Sequence[str]
) -> list[Part]:
    """Return the text of a row in parts; entities, answers and pairs of entities are marked. labels: of the model."""
    data, values = settings.data, row.values
    if task.predicts == "tags":
        return _tagged_parts(values, prediction, settings, labels)
    if task.predicts == "answer":
        context = str(values[data.text_pair_column])
        true = [(answer.start, answer.start + len(answer.text), "answer") for answer in values[data.label_column]]
        start, end = prediction.get("start"), prediction.get("end")
        found = [(start, end, "predicted")] if isinstance(start, int) and isinstance(end, int) else []
        marked = mark_spans(context, true[:1], found)
        return [Part("question", "name"), Part(str(values[data.text_column])), Part("context", "name"), *crop(marked)]
    if task.predicts == "relation":
        spans = [(values[name].start, values[name].end, name) for name in ("subject", "object")]
        return crop(mark_spans(str(values[data.text_column]), spans, spans))
    texts = [str(text) for text in task.texts(row, settings)]
    if len(texts) == 1:
        return crop([Part(texts[0])])
    return [part for i, text in enumerate(texts, 1) for part in (Part(str(i), "name"), *crop([Part(text)]))]


def _tagged_parts(
    values: Mapping[str, Any], prediction: Mapping[str, Any], settings: TaskSettings, labels: Sequence[str]
) -> list[Part]:
    """Return the words of a row; entities are marked where the tags have some, and else each wrong tag."""
    words: list[str] = values[settings.data.text_column]
    tags: list[str] = values[settings.data.label_column]
    if TEXT in values:
        text, places = values[TEXT], locate_words(words)
    else:
        text, places = " ".join(words), _places_of(words)
    notation = find_notation(labels) or STANDARD
    if "entities" not in prediction and "spans" not in prediction:  # parts of speech
        found = zip(places, tags, prediction["tags"], strict=True)
        wrong = [(*place, f"{true} → {tag}") for place, true, tag in found if true != tag]
        return crop(mark_spans(text, [], wrong))
    true = [(places[start][0], places[end - 1][1], kind) for start, end, kind in find_entities(tags, notation)]
    if "spans" in prediction:
        predicted = [(span["start"], span["end"], span["label"]) for span in prediction["spans"]]
    else:
        entities = prediction["entities"]
        predicted = [(places[one["start"]][0], places[one["end"] - 1][1], one["label"]) for one in entities]
    return crop(mark_spans(text, true, predicted))


def _places_of(words: Sequence[str]) -> list[tuple[int, int]]:
    """Return (start, end) of each word in the words with a space between."""
    places, start = [], 0
    for word in words:
        places.append((start, start + len(word)))
        start += len(word) + 1
    return places


def mark_spans(text: str, true: Sequence[Span], predicted: Sequence[Span]) -> list[Part]:
    """Return the text in parts: those of a true span, of a predicted one, of both with one label, and the others.

    Where the labels differ, the part is of the predicted span and says both. The last part of a span has its label.
    """
    edges = sorted({0, len(text), *(edge for start, end, _ in (*true, *predicted) for edge in (start, end))})
    parts = []
    for start, end in pairwise(edges):
        right, found = (_span_over(spans, start, end) for spans in (true, predicted))
        if right and found:
            same = right[2] == found[2] or (right[2], found[2]) == ("answer", "predicted")
            mark, label = ("both", right[2]) if same else ("predicted", f"{right[2]} → {found[2]}")
        else:
            mark = "true" if right else "predicted" if found else ""
            label = (right or found or (0, 0, ""))[2]
        is_end = end in {span[1] for span in (right, found) if span}
        parts.append(Part(text[start:end], mark, label if is_end else ""))
    return parts


def _span_over(spans: Sequence[Span], start: int, end: int) -> Span | None:
    """Return the first span that has all characters from start to end."""
    return next((span for span in spans if span[0] <= start and end <= span[1]), None)


def crop(parts: Sequence[Part], limit: int = MAX_CHARACTERS) -> list[Part]:
    """Return the parts of a long text around its first mark, with an ellipsis where text was left out."""
    total = sum(len(part.text) for part in parts)
    if total <= limit:
        return [*parts]
    before = 0
    for part in parts:
        if part.mark:
            break
        before += len(part.text)
    start = 0 if before >= total else max(0, min(before - limit // 3, total - limit))
    kept, place = list[Part](), 0
    for part in parts:
        text = part.text[max(0, start - place) : max(0, start + limit - place)]
        place += len(part.text)
        kept += [Part(text, part.mark, part.label)] if text else []
    ends = ([Part("… ")] if start else []), ([Part(" …")] if start + limit < total else [])
    return [*ends[0], *kept, *ends[1]]


def thumbnail(image: Any) -> str:
    """Return a small copy of an image as a data URI; "" for one that cannot be decoded now."""
    from PIL import Image

    from data.formats.image_files import decode

    try:
        if isinstance(image, np.ndarray):
            picture = Image.fromarray(image)
        else:
            picture = image.copy() if isinstance(image, Image.Image) else decode(image)
        picture.thumbnail(THUMBNAIL)
        stream = io.BytesIO()
        picture.convert("RGB").save(stream, format="JPEG", quality=85)
    except (OSError, ValueError):
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
