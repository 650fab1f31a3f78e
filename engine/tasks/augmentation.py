"""What [augment] means to each kind of task: which changes keep its labels true, and of which columns.

Each function has the signature of Task.augment: (encoded examples, their rows, how rows are encoded, [augment], seed)
-> the examples that training sees. A change that would make a label wrong is refused by its setting's name, and so is
one that would have no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from data import Examples, Row
from data.augmentation import text as texts
from data.formats.squad import Answer
from data.relation_extraction import ROLES, Entity
from data.seq2seq import PairTokenizer
from data.tag_schemes import mark_entities
from engine.config import AugmentSettings, ConfigError, ImageAugmentSettings, TextAugmentSettings
from engine.tasks.settings import TaskSettings

EVERY = ("crop", "delete", "swap", "mask", "fill", "synonym_file", "back_translation_file")
IN_PLACE = ("mask", "synonym_file")  # after which every other word is where it was


@dataclass(frozen=True)
class Encode:
    """rows -> examples as a run encodes its training data, and what it does so with."""

    function: Callable[[list[Row], Any, TaskSettings, Sequence[str], bool], Examples]  # Task.encode
    processor: Any  # the tokenizer, or the preprocessing of images
    settings: TaskSettings
    labels: tuple[str, ...]
    read: Callable[[str, TaskSettings, bool], list[Row]]  # Task.read

    def __call__(self, rows: list[Row]) -> Examples:
        return self.function(rows, self.processor, self.settings, self.labels, True)


def augment_texts(
    examples: Examples, rows: list[Row], encode: Encode, settings: AugmentSettings, seed: int
) -> Examples:
    """Of a label of the whole text, or pair of texts: any change, of both."""
    columns = [column for column in (encode.settings.data.text_column, encode.settings.data.text_pair_column) if column]
    return _augment_columns(examples, rows, encode, settings, seed, columns)


def augment_sources(
    examples: Examples, rows: list[Row], encode: Encode, settings: AugmentSettings, seed: int
) -> Examples:
    """Of a text that is written from another: any change of the source; the target never changes."""
    return _augment_columns(examples, rows, encode, settings, seed, [encode.settings.data.text_column])


def augment_tagged(
    examples: Examples, rows: list[Row], encode: Encode, settings: AugmentSettings, seed: int
) -> Examples:
    """Of a tag for each word: words are masked, replaced one by one, or left out together with their tags."""
    if not _wanted(settings, ("delete", *IN_PLACE), "each word has a label"):
        return examples
    data, changes = encode.settings.data, _changes(settings.text, encode, rows, [])
    entities = encode.settings.own.tag_scheme != "none" and mark_entities(encode.labels)

    def change(row: Row, rng: np.random.Generator) -> Row:
        return texts.change_tagged(row, rng, changes, data.text_column, data.label_column, entities)

    return _augmented(examples, rows, encode, change, changes, seed)


def augment_questions(
    examples: Examples, rows: list[Row], encode: Encode, settings: AugmentSettings, seed: int
) -> Examples:
    """Of answers that stand in a context: words of the question, and of the context but for the answers, in place."""
    if not _wanted(settings, IN_PLACE, "an answer is a place in the text"):
        return examples
    data, changes = encode.settings.data, _changes(settings.text, encode, rows, [])

    def change(row: Row, rng: np.random.Generator) -> Row:
        question, _ = texts.change_around(row, rng, changes, data.text_column, [])
        answers: list[Answer] = row.values[data.label_column]
        spans = [(answer.start, answer.start + len(answer.text)) for answer in answers]
        context, moved = texts.change_around(row, rng, changes, data.text_pair_column, spans)
        placed = [Answer(answer.text, start) for answer, (start, _) in zip(answers, moved, strict=True)]
        new = {data.text_column: question, data.text_pair_column: context, data.label_column: placed}
        return row.updated(new)

    return _augmented(examples, rows, encode, change, changes, seed)


def augment_relations(
    examples: Examples, rows: list[Row], encode: Encode, settings: AugmentSettings, seed: int
) -> Examples:
    """Of two entities in a text: words outside them, in place."""
    if not _wanted(settings, IN_PLACE, "the entities are places in the text"):
        return examples
    column, changes = encode.settings.data.text_column, _changes(settings.text, encode, rows, [])

    def change(row: Row, rng: np.random.Generator) -> Row:
        entities: list[Entity] = [row.values[role] for role in ROLES]
        spans = [(entity.start, entity.end) for entity in entities]
        text, moved = texts.change_around(row, rng, changes, column, spans)
        placed = [replace(entity, start=a, end=b) for entity, (a, b) in zip(entities, moved, strict=True)]
        return row.updated({column: text, **dict(zip(ROLES, placed, strict=True))})

    return _augmented(examples, rows, encode, change, changes, seed)


def refuse_augmentation(
    examples: Examples, rows: list[Row], encode: Encode, settings: AugmentSettings, seed: int
) -> Examples:
    """Of a text that is itself what is learned, as by a language model, which would learn the changes."""
    _wanted(settings, (), "what is learned is the text itself")
    return examples


def _augment_columns(
    examples: Examples, rows: list[Row], encode: Encode, settings: AugmentSettings, seed: int, columns: list[str]
) -> Examples:
    if not _wanted(settings, EVERY, ""):
        return examples
    changes = _changes(settings.text, encode, rows, columns)

    def change(row: Row, rng: np.random.Generator) -> Row:
        return texts.change_text(row, rng, changes, columns)

    return _augmented(examples, rows, encode, change, changes, seed)


def _augmented(
    examples: Examples, rows: list[Row], encode: Encode, change: texts.Change, changes: texts.TextChanges, seed: int
) -> Examples:
    files = texts.digest(changes.synonyms, changes.wordings)
    return texts.Augmented(examples, rows, encode, change, seed, files)


def _wanted(settings: AugmentSettings, allowed: Sequence[str], why: str) -> bool:
    """Whether any change is asked for. ConfigError for all that this task refuses, or that would have no effect."""
    default, errors = TextAugmentSettings(), []
    set_here = [
        f.name for f in fields(TextAugmentSettings) if getattr(settings.text, f.name) != getattr(default, f.name)
    ]
    what = f"choose from {', '.join(f'augment.text.{name}' for name in allowed)}" if allowed else "leave it out"
    for name in set_here:
        if name in EVERY and name not in allowed:
            errors.append(
                f"augment.text.{name} = {getattr(settings.text, name)!r} would be wrong here, as {why}: {what}"
            )
    if "synonym" in set_here and not settings.text.synonym_file:
        errors.append(
            f"augment.text.synonym_rate = {settings.text.synonym_rate} has no effect: augment.text.synonym_file names no file"
        )
    if settings.text.synonym_file and not settings.text.synonym_rate:
        errors.append("augment.text.synonym_rate = 0 leaves augment.text.synonym_file without effect: drop one of them")
    for field in fields(ImageAugmentSettings):
        if (value := getattr(settings.image, field.name)) != getattr(ImageAugmentSettings(), field.name):
            errors.append(f"augment.image.{field.name} = {value!r} has no effect on text: leave it out")
    if errors:
        raise ConfigError("\n".join(errors))
    return bool(set_here)


def _changes(
    settings: TextAugmentSettings, encode: Encode, rows: Sequence[Row], columns: Sequence[str]
) -> texts.TextChanges:
    """The settings with what they need: the mask, the words, the files. columns: whose words `fill` draws from."""
    tokenizer = encode.processor.tokenizer if isinstance(encode.processor, PairTokenizer) else encode.processor
    mask = texts.mask_token(tokenizer) if settings.mask else ""
    if settings.mask and not mask:
        raise ConfigError(
            f"augment.text.mask = {settings.mask} needs a tokenizer with a mask token, {' or '.join(texts.MASKS)}, and "
            "this checkpoint's has none: use augment.text.delete"
        )
    wordings: dict[str, list[str]] = {}
    if settings.back_translation_file:
        data = encode.settings.data
        # The file may have other wordings of rows that are held out, which stay as they are.
        known = rows if data.validation else encode.read(data.train, encode.settings, True)
        wordings = texts.read_wordings(settings.back_translation_file, [row.id for row in known])
    return texts.TextChanges(
        crop=settings.crop,
        delete=settings.delete,
        swap=settings.swap,
        mask=settings.mask,
        fill=settings.fill,
        synonym=settings.synonym_rate,
        mask_token=mask,
        words=texts.distinct_words(row.values[c] for row in rows for c in columns) if settings.fill else (),
        synonyms=texts.read_synonyms(settings.synonym_file) if settings.synonym_file else {},
        wordings=wordings,
    )
