"""Text augmentation shared by the tasks: which changes of [augment.text] keep the labels of a task right.

The `augment` slot of a task takes (encoded examples, their rows, the encoder of rows, [augment], seed) and returns the
examples to train on. It raises ConfigError, with the name of the setting, for

- a change that would make a label wrong;
- a setting that would have no effect.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data import Examples, Row, TextExamples, cache
from data.audit import audit_targets, audit_texts, has_texts
from data.augmentation import tables
from data.augmentation import text as texts
from data.image_preprocessing import Preprocessing
from data.mapped_images import open_prepared_images
from data.masked_lm import without_masks
from data.prepared import PreparedRows
from data.segmentation import checksum_of_segmenter
from data.span_corruption import with_spans
from data.tokenizers.limits import panics_as_errors
from engine.config import AugmentSettings, ConfigError, ImageAugmentSettings, TextAugmentSettings
from engine.tasks.settings import TaskSettings

ALL_CHANGES = ("crop", "delete", "swap", "mask", "fill", "synonym_file", "back_translation_file")
CHANGES_IN_PLACE = ("mask", "synonym_file")  # every other word stays where it was


@dataclass(frozen=True)
class RowEncoder:
    """A function that encodes rows, with the processor, the settings and the labels of a run bound."""

    encode: Callable[[list[Row], Any, TaskSettings, Sequence[str], bool], Examples]  # Task.encode
    read: Callable[[str, TaskSettings, bool], list[Row]]  # Task.read
    processor: Any  # what Task.load_processor returned
    settings: TaskSettings
    labels: tuple[str, ...]
    texts: Callable[[Row, TaskSettings], Sequence[str]] = lambda row, settings: ()  # Task.texts

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, of a pair of them too; None where images are read."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)  # a PairTokenizer holds one
        return tokenizer if isinstance(tokenizer, Tokenizer) else None

    def __call__(self, rows: list[Row], labelled: bool = True) -> Examples:
        """Encode rows, with notes on what became of their texts; or take them from data.cache, or a prepared folder."""
        tokenizer, folder = self.tokenizer, self.settings.data.cache
        if isinstance(rows, PreparedRows) and isinstance(self.processor, Preprocessing):
            return open_prepared_images(rows, self.processor, self.labels, self.settings.own.max_pixels)
        if isinstance(rows, PreparedRows):
            return rows.open(tokenizer, getattr(self.processor, "decoder_start_id", 0), self.labels)
        if not folder or tokenizer is None or not rows:
            return self._encode_with_notes(rows, labelled)
        no_files: dict[str, Any] = dict.fromkeys(("train", "validation", "test", "teacher_file", "cache"), "")
        settings = replace(self.settings, data=replace(self.settings.data, **no_files, num_workers=0))
        words = checksum_of_segmenter(getattr(settings.own, "segmenter", ""))  # a file may have changed
        own = (getattr(self.processor, "decoder_start_id", None), words)
        packages = [sys.modules[name] for name in ("data", "engine.tasks")]
        key = cache.find_key(rows, tokenizer, (self.encode.__module__, settings, self.labels, labelled, own), packages)
        file = Path(folder) / f"{key}.safetensors"
        note = f"encoded, and kept in data.cache = {folder}"
        try:
            if (kept := cache.read_examples(file, tokenizer)) is not None:
                return replace(kept, cache_note=f"taken from data.cache = {folder}")
        except cache.DamagedError as error:
            note = f"{file} is damaged ({error}): encoded again, and kept"
        examples = self._encode_with_notes(rows, labelled)
        if not isinstance(examples, TextExamples):
            return examples
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one process of a machine is enough
            cache.write_examples(file, examples)
        return replace(examples, cache_note=note)

    def _encode_with_notes(self, rows: list[Row], labelled: bool) -> Examples:
        examples = self.without_notes(rows, labelled)

        def texts_of(row: Row) -> Sequence[str]:
            return self.texts(row, self.settings)

        if self.tokenizer is None or not isinstance(examples, TextExamples) or not has_texts(rows, texts_of):
            return examples
        notes = audit_texts(with_spans(without_masks(examples)), rows, texts_of, self.tokenizer)
        if examples.target_ids is not None and self.settings.data.label_column:
            notes += audit_targets([row.values[self.settings.data.label_column] for row in rows], self.tokenizer)
        return replace(examples, notes=(*examples.notes, *notes))

    def without_notes(self, rows: list[Row], labelled: bool = True) -> Examples:
        """Encode rows. A special token in a text is read as data.split_special_tokens says."""
        if self.tokenizer is not None and self.settings.data.split_special_tokens:
            self.tokenizer.encode_special_tokens = True  # set each time, as a copy in another process loses it
        with panics_as_errors(f"row {rows[0].id} or a later one" if rows else "no rows"):
            return self.encode(rows, self.processor, self.settings, self.labels, labelled)


def refuse_augmentation(
    examples: Examples, rows: list[Row], encode: RowEncoder, settings: AugmentSettings, seed: int
) -> Examples:
    """Return the examples unchanged; ConfigError for any setting of [augment].

    For a task whose texts are the targets: a language model would learn the changes.
    """
    check_text_changes(settings, (), "the text itself is the target")
    return examples


def augment_columns(
    examples: Examples,
    rows: list[Row],
    encode: RowEncoder,
    settings: AugmentSettings,
    seed: int,
    columns: Sequence[str],
) -> Examples:
    """Augment the texts in `columns` by every change, for labels that do not depend on the order of the words."""
    if not check_text_changes(settings, ALL_CHANGES, ""):
        return examples
    changes = text_changes(settings.text, encode, rows, columns)
    return augment_rows(
        examples, rows, encode, changes, seed, lambda row, rng: texts.change_text(row, rng, changes, columns)
    )


def augment_rows(
    examples: Examples,
    rows: list[Row],
    encode: RowEncoder,
    changes: texts.TextChanges,
    seed: int,
    change: texts.Change,
) -> Examples:
    """Return examples whose rows are changed by `change`, differently in each epoch."""
    files = tables.checksum(changes.synonyms, changes.wordings)
    return texts.Augmented(examples, rows, encode.without_notes, change, seed, files, changes.masking)


def check_text_changes(settings: AugmentSettings, allowed: Sequence[str], reason: str) -> bool:
    """Return whether [augment.text] has any change.

    allowed: the changes that are right for this task. reason: why the others are wrong. Raises ConfigError for all
    settings that are not allowed or that would have no effect.
    """
    text, errors = settings.text, []
    given = changed_settings(text)
    advice = f"choose from {', '.join(f'augment.text.{name}' for name in allowed)}" if allowed else "leave it out"
    for name in given:
        if name in ALL_CHANGES and name not in allowed:
            value = getattr(text, name)
            errors.append(f"augment.text.{name} = {value!r} would be wrong here, since {reason}: {advice}")
    if "synonym_rate" in given and not text.synonym_file:
        errors.append(
            f"augment.text.synonym_rate = {text.synonym_rate} has no effect: augment.text.synonym_file names no file"
        )
    if text.synonym_file and not text.synonym_rate:
        errors.append(
            "augment.text.synonym_rate = 0 leaves augment.text.synonym_file without effect: remove one of them"
        )
    for name in changed_settings(settings.image):
        value = getattr(settings.image, name)
        errors.append(f"augment.image.{name} = {value!r} has no effect on text: leave it out")
    if errors:
        raise ConfigError("\n".join(errors))
    return bool(given)


def changed_settings(settings: TextAugmentSettings | ImageAugmentSettings) -> list[str]:
    """Return the names of the settings that are not at their defaults."""
    default = type(settings)()
    return [f.name for f in fields(settings) if getattr(settings, f.name) != getattr(default, f.name)]


def text_changes(
    settings: TextAugmentSettings, encode: RowEncoder, rows: Sequence[Row], columns: Sequence[str] = ()
) -> texts.TextChanges:
    """Return the settings with the data they need: the mask token, words to insert, and the contents of the files.

    columns: the columns whose words `fill` inserts. Raises ConfigError if the tokenizer lacks a mask token that is
    needed, and DataError for a bad file.
    """
    if isinstance(rows, PreparedRows):
        given = [f"augment.text.{name} = {getattr(settings, name)!r}" for name in changed_settings(settings)]
        raise ConfigError(
            f"{', '.join(given)}: {rows.folder} has the tokens of the texts alone, which cannot be changed by words; "
            "train from the file that it was made from"
        )
    masking = _add_mask(settings.mask, encode.tokenizer) if settings.mask else None
    wordings: dict[str, list[str]] = {}
    if settings.back_translation_file:
        data = encode.settings.data
        # The file may also have wordings of rows that are held out or were left out, which are not augmented.
        found = encode.read(data.train, encode.settings, True)
        known = [row.id for row in (*found, *getattr(found, "left_out", ()))]
        wordings = tables.read_wordings(settings.back_translation_file, known)
    return texts.TextChanges(
        crop=settings.crop,
        delete=settings.delete,
        swap=settings.swap,
        mask=settings.mask,
        fill=settings.fill,
        synonym=settings.synonym_rate,
        mask_token=texts.MASKED if masking else "",
        masking=masking,
        words=texts.find_distinct_words(row.values[c] for row in rows for c in columns) if settings.fill else (),
        synonyms=tables.read_synonyms(settings.synonym_file) if settings.synonym_file else {},
        wordings=wordings,
    )


def _add_mask(rate: float, tokenizer: Tokenizer | None) -> texts.Mask:
    """Return the tokenizer's mask token, prepared for changed texts; ConfigError where it has none."""
    if tokenizer is not None and (token := texts.find_mask_token(tokenizer)):
        return texts.add_mask(tokenizer, token)
    raise ConfigError(
        f"augment.text.mask = {rate} needs a tokenizer with a mask token, {' or '.join(texts.MASKS)}, and "
        "this checkpoint's has none: use augment.text.delete"
    )
