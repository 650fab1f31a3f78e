"""Texts with two entities and the relation between them: checked rows, and examples with typed entity markers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from data.errors import DataError, ErrorList
from data.examples import TextExamples, note_truncated, warn_of_part
from data.formats.lines import locate
from data.formats.options import FileOptions
from data.formats.relations import COLUMNS, HINT, SENTENCE, hint_at_pairs, is_semeval, read_other_form, read_semeval
from data.formats.row_forms import parse_cell, require_columns
from data.formats.rows import read_rows
from data.formats.spans import check_span_text
from data.labels import class_numbers
from data.notes import count_of
from data.row import Row, Rows
from data.text_classification import check_texts
from data.words import UNSPACED

ROLES = ("subject", "object")
CHUNK = 10_000  # rows encoded at a time; an encoding needs far more memory than its ids


@dataclass(frozen=True)
class Entity:
    """The span of an entity in its text, in characters, and its type."""

    start: int
    end: int  # one after the last
    type: str = ""  # "": not given

    def text_in(self, text: str) -> str:
        """Return the entity as text."""
        return text[self.start : self.end]


@dataclass(frozen=True)
class RelationRecord:
    """The entities of N examples, and the class that means there is no relation between them."""

    entities: list[tuple[str, str]]  # (subject, object) of each example, as text
    no_relation: int | None  # the number of the label; None: no label means that


# Files -> rows


def read_relations(
    name: str,
    *,
    text: str = "text",
    label: str = "",
    group: str = "",
    options: FileOptions = FileOptions(),
) -> Rows:
    """Return rows whose columns "subject" and "object" are an Entity each.

    In the file an entity is
    - {"start", "end", "type"} in characters of the text, optionally with "text", which must equal that span; or
    - a string that occurs once in the text, optionally with its type in the column "subject_type" or "object_type".

    A type may be left out. The forms of data/formats/relations.py are read too; the notes say so.
    label: the column of the relation; "": none is read.
    Raises one DataError with all errors of the file, as `file:line: reason`.
    """
    errors = ErrorList()
    options = replace(options.also_reading((text, *COLUMNS)), hint=hint_at_pairs)
    required = [column for column in (label, group) if column]
    if is_semeval(name, options):
        rows = Rows(read_semeval(name, text, label or "relation", errors, options))
        require_columns(name, rows, required, HINT, errors, options)
    else:
        rows = read_rows(name, required, options, errors)
    forms: Counter[str] = Counter()
    for row in rows:
        try:
            forms[read_other_form(row.values, text)] += 1
        except DataError as error:
            errors.add(locate(name), row.line, str(error))
    errors.notes += [f"{count_of(count, 'row')} read as {form}" for form, count in forms.items() if form]
    read = [row for row in rows if row.line not in errors.reasons]
    require_columns(name, read, [*ROLES, *([text] if text != SENTENCE else [])], HINT, errors, options)
    read = [row for row in read if row.line not in errors.reasons and not errors.has_bad_file]
    check_texts(name, read, [text], label, errors)
    num_places, clipped = 0, list[str]()  # entities by their places alone; those that lack the last letter of a word
    for row in read:
        if row.line in errors.reasons:
            continue
        source, given = row.values[text], [parse_cell(row.values[role]) for role in ROLES]
        try:
            entities = _find_entities(row.values, source)
        except DataError as error:
            errors.add(locate(name), row.line, str(error))
            continue
        row.values |= dict(zip(ROLES, entities, strict=True))
        placed = [
            e for e, value in zip(entities, given, strict=True) if isinstance(value, dict) and "text" not in value
        ]
        num_places += len(placed)
        clipped += [
            f"{e.text_in(source)!r} at {e.start}-{e.end} (line {row.line})"
            for e in placed
            if _is_inside_word(source, e.end) and not _is_inside_word(source, e.end + 1)
        ]
    if len(clipped) > 1 and 10 * len(clipped) >= 8 * num_places:
        what = f"{len(clipped):,} of {num_places:,} entities lack the last letter of a word, such as {clipped[0]}"
        errors.notes.append(f"warning: {what}: an end is one after the last character")
    return errors.settle(rows, options)


def _find_entities(values: dict[str, Any], text: str) -> tuple[Entity, Entity]:
    """Return the subject and the object; DataError with the reason alone."""
    found: dict[str, Entity] = {}
    # Entities with a span come first, then strings, the longest first: in "University of Ulm, Ulm" the subject
    # "University of Ulm" leaves the last word to the object "Ulm".
    for role in sorted(ROLES, key=lambda role: (isinstance(values[role], str), -len(str(values[role])))):
        value, kind = parse_cell(values[role]), values.get(f"{role}_type") or ""
        if isinstance(value, Entity):  # of rows that this reader made, in memory
            value = asdict(value)
        if isinstance(value, dict):
            found[role] = _read_span(role, value, text)
        elif isinstance(value, str) and isinstance(kind, str):
            found[role] = _find_string(role, value, kind, text, list(found.values()))
        elif isinstance(value, str):
            raise DataError(f"'{role}_type' should be text, not {kind!r}")
        else:
            raise DataError(f"{role!r} should be {{'start', 'end', 'type'}} or a string of the text, not {value!r}")
    subject, obj = found["subject"], found["object"]
    if subject.start < obj.end and obj.start < subject.end:
        raise DataError(
            f"the subject, {subject.start} to {subject.end}, and the object, {obj.start} to {obj.end}, overlap"
        )
    return subject, obj


def _read_span(role: str, value: dict[str, Any], text: str) -> Entity:
    start, end, kind = value.get("start"), value.get("end"), value.get("type", "")
    if type(start) is not int or type(end) is not int:
        raise DataError(f"the {role} should have a 'start' and an 'end', both whole numbers, not {value!r}")
    if not isinstance(kind, str | None):
        raise DataError(f"the type of the {role} should be text, not {kind!r}")
    place = f"the {role}, {start} to {end},"
    if not 0 <= start <= end <= len(text):
        raise DataError(f"{place} is outside the text, which has {len(text):,} characters")
    if not text[start:end].strip():
        raise DataError(f"{place} is empty")
    own = value.get("text")
    if isinstance(own, str) and (reason := check_span_text(text, start, end, own)):
        raise DataError(f"{place} is not what it says: {reason}")
    return Entity(start, end, kind or "")


def _find_string(role: str, string: str, kind: str, text: str, taken: Sequence[Entity]) -> Entity:
    """Return the only occurrence of a string outside longer words and outside the entities in `taken`."""
    if not string.strip():
        raise DataError(f"the {role} is empty")
    starts = [match.start() for match in re.finditer(f"(?={re.escape(string)})", text)]
    whole = [i for i in starts if not _is_inside_word(text, i) and not _is_inside_word(text, i + len(string))]
    free = [i for i in whole if all(i >= other.end or i + len(string) <= other.start for other in taken)]
    if len(free) == 1:
        return Entity(free[0], free[0] + len(string), kind)
    if free:
        places = " and ".join(f"{i:,}" for i in free[:3])
        raise DataError(
            f"the {role} {string!r} is in the text {len(free)} times, at {places}: "
            "say which by {'start', 'end'} in a .jsonl file"
        )
    where = "only as a part of a longer word" if starts else "not"
    where = "only within the other entity" if whole else where
    raise DataError(f"the {role} {string!r} is {where} in the text")


def _is_inside_word(text: str, position: int) -> bool:
    """Return whether the characters before and at `position` belong to one word; never between Chinese characters."""
    around = text[max(0, position - 1) : position + 1]
    return len(around) == 2 and position > 0 and around.isalnum() and not UNSPACED.search(around)


# Rows -> examples


def mark_entities(text: str, subject: Entity, obj: Entity) -> tuple[str, list[tuple[int, int]]]:
    """Return (the text with marked entities, [(start, end) of the marked subject and of the marked object in it]).

    The typed entity markers (punct) of Zhou & Chen 2021, "An Improved Baseline for Sentence-level Relation Extraction":
    "@ * person * Bill @ was born in # ^ city ^ Seattle #." Every vocabulary has these characters, so no embedding is
    added. An entity without a type is "@ Bill @". Each marker has spaces around it, in Chinese too.
    """
    out, done, places = "", 0, [(0, 0), (0, 0)]
    by_position = sorted([(subject, 0, "@", "*"), (obj, 1, "#", "^")], key=lambda item: item[0].start)
    for entity, role, outer, inner in by_position:
        out += text[done : entity.start]
        out += " " if out and not out[-1].isspace() else ""
        kind = " ".join(entity.type.lower().replace("_", " ").split())
        marked = " ".join([outer, *([inner, kind, inner] if kind else []), entity.text_in(text).strip(), outer])
        places[role] = (len(out), len(out) + len(marked))
        out += marked
        done = entity.end
        out += " " if done < len(text) and not text[done].isspace() else ""
    return out + text[done:], places


def encode_relations(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    text: str = "text",
    label: str = "",
    labels: Sequence[str] = (),
    max_length: int,
    no_relation: int | None = None,
) -> TextExamples[RelationRecord]:
    """Mark and encode rows of read_relations; `label` is a column, or "" for unlabelled rows.

    A text of more than `max_length` tokens keeps the tokens nearest to its entities, always with both markers, and
    counts as truncated. `markers` are the positions of the two start markers.
    no_relation: the number of the label that means that there is no relation.
    Raises DataError where `max_length` has no room for both markers.
    """
    special = tokenizer.num_special_tokens_to_add(False)
    if max_length < special + 2:
        raise DataError(
            f"data.max_length = {max_length} has no room for two entities beside {special} special tokens: raise it"
        )
    ids, types = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.uint8)]
    lengths: list[int] = []
    markers: list[list[int]] = []
    truncated = num_shortened = num_lost = num_tokens = 0
    marked = [mark_entities(row.values[text], row.values["subject"], row.values["object"]) for row in rows]
    for start in range(0, len(marked), CHUNK):
        chunk = marked[start : start + CHUNK]
        for encoding, (_, places) in zip(tokenizer.encode_batch([m for m, _ in chunk]), chunk, strict=True):
            kept, begins, is_shortened = _nearest(encoding, places, max_length)
            ids.append(np.asarray(encoding.ids, dtype=np.int32)[kept])
            types.append(np.asarray(encoding.type_ids, dtype=np.uint8)[kept])
            lengths.append(len(kept))
            markers.append(begins)
            truncated += len(kept) < len(encoding.ids)
            num_shortened += is_shortened
            num_lost += len(encoding.ids) - len(kept)
            num_tokens += len(encoding.ids)
    return TextExamples(
        input_ids=np.concatenate(ids),
        token_type_ids=np.concatenate(types),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=class_numbers(rows, label, labels) if label else None,
        ids=[row.id for row in rows],
        truncated=truncated,
        markers=np.array(markers, dtype=np.int64).reshape(-1, 2),
        notes=(
            *note_truncated(
                truncated,
                len(rows),
                "texts",
                f"the data.max_length = {max_length} tokens nearest to the entities",
                num_lost,
                num_tokens,
            ),
            *warn_of_part(num_shortened, len(rows), "texts", "lost a part of an entity too: raise data.max_length"),
        ),
        record=RelationRecord(
            entities=[(_entity_text(row, text, "subject"), _entity_text(row, text, "object")) for row in rows],
            no_relation=no_relation,
        ),
    )


def _entity_text(row: Row, text: str, role: str) -> str:
    entity: Entity = row.values[role]
    return entity.text_in(row.values[text])


def _nearest(
    encoding: Encoding, places: Sequence[tuple[int, int]], max_length: int
) -> tuple[np.ndarray, list[int], bool]:
    """Return (the tokens that are kept, in their order; the positions of the two start markers among them; whether an
    entity or its marker lost a token).

    The order of preference: special tokens, start markers, the marked entities from their beginnings, then the tokens
    nearest to one of them. The result is a window around the entities, or two windows if they are far apart.
    """
    count = len(encoding.ids)
    token = np.arange(count)
    order = np.full(count, count)
    offsets = np.array(encoding.offsets)  # (count, 2), in characters; of special tokens they are empty
    begins = []
    for start, end in places:
        # The last of the tokens with a marker's character: SentencePiece may put the space before it into another.
        holding = [np.flatnonzero((offsets[:, 0] <= i) & (i < offsets[:, 1])) for i in (start, end - 1)]
        if not all(map(len, holding)):
            raise DataError("this tokenizer has no token for the markers '@' and '#' of entities")
        first, last = (int(tokens[-1]) for tokens in holding)
        distance = np.maximum(first - token, token - last)
        order = np.minimum(order, np.where(distance <= 0, token - first - count, distance))
        begins.append(first)
    order[np.asarray(encoding.special_tokens_mask, dtype=bool)] = -count
    kept = np.sort(np.argsort(order, kind="stable")[:max_length])
    return kept, np.searchsorted(kept, begins).tolist(), bool(np.count_nonzero(order < 0) > max_length)
