"""What a recipe's [augment] means to each kind of task: which operations keep its labels true, and on which columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data import Row
from data.loader import Examples
from engine.config import Augment, Data


@dataclass(frozen=True)
class Encode:
    """rows -> examples as this run encodes its training data, and what it does it with."""

    function: Callable[..., Any]  # Task.encode
    processor: Any  # the tokenizer, or the preprocessing of images
    settings: Data
    labels: tuple[str, ...]

    def __call__(self, rows: list[Row]) -> Any:
        return self.function(rows, self.processor, self.settings, self.labels, True)


def augment_texts(examples: Examples, rows: list[Row], encode: Encode, settings: Augment, seed: int) -> Examples:
    return examples


def augment_tagged(examples: Examples, rows: list[Row], encode: Encode, settings: Augment, seed: int) -> Examples:
    return examples


def augment_questions(examples: Examples, rows: list[Row], encode: Encode, settings: Augment, seed: int) -> Examples:
    return examples


def augment_relations(examples: Examples, rows: list[Row], encode: Encode, settings: Augment, seed: int) -> Examples:
    return examples


def augment_sources(examples: Examples, rows: list[Row], encode: Encode, settings: Augment, seed: int) -> Examples:
    return examples


def refuse_augmentation(examples: Examples, rows: list[Row], encode: Encode, settings: Augment, seed: int) -> Examples:
    return examples
