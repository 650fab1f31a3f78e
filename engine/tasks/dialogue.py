"""Dialogue: a causal language model learns and writes the assistant's replies in conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tokenizers import Tokenizer

from data import Row, TextExamples
from data.batch import IGNORE_INDEX
from data.causal_lm import LanguageModelRecord, PromptRecord
from data.dialogue import encode_dialogues, read_dialogues
from engine.config import GenerateSettings
from engine.tasks.causal_lm import CAUSAL_LM, show_continuations
from engine.tasks.settings import Columns, TaskSettings
from models import TaskModel


def read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    """Read rows of conversations; without labels a last reply is left out, since it is predicted."""
    return read_dialogues(
        name,
        settings.data.text_column,
        labelled,
        group=settings.group_column(name, labelled),
        options=settings.file_options,
    )


def encode(
    rows: list[Row], processor: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples[LanguageModelRecord] | TextExamples[PromptRecord]:
    """Encode conversations, with labels the assistant's replies as targets."""
    return encode_dialogues(
        rows,
        processor,
        column=settings.data.text_column,
        max_length=settings.data.max_length,
        labelled=labelled,
        max_new_tokens=settings.generate.max_new_tokens,
    )


def texts(row: Row, settings: TaskSettings) -> list[str]:
    """Return the contents of all turns."""
    return [turn.content for turn in row.values[settings.data.text_column]]


def show_generations(
    model: TaskModel, examples: TextExamples[LanguageModelRecord], generate: GenerateSettings, count: int
) -> str:
    """Return the first `count` conversations up to their last replies, each with the model's reply."""
    prompts = [examples.sequence(i)[: _start_of_last_reply(examples, i)] for i in range(min(count, len(examples)))]
    return show_continuations(model, prompts, examples, generate)


def _start_of_last_reply(examples: TextExamples[LanguageModelRecord], index: int) -> int:
    """Return the position of the last reply's first token; the token before it has the first target of the reply."""
    labels = examples.token_labels
    if labels is None:
        raise TypeError("only a labelled conversation has a reply")
    is_target = labels[examples.offsets[index] : examples.offsets[index + 1]] != IGNORE_INDEX
    return int(np.flatnonzero(is_target & ~np.append(False, is_target[:-1]))[-1]) + 1


DIALOGUE = replace(
    CAUSAL_LM,
    columns=Columns(text_pair=None, text="messages", label=""),
    section="",
    read=read,
    encode=encode,
    texts=texts,
    show_generations=show_generations,
)
