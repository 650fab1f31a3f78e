"""Multiple choice: the best of the choices that are given with a question, a context, or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import Batch, Examples, Row, TextExamples
from data.formats.choices import CHOICES, read_choices
from data.multiple_choice import ChoiceRecord, encode_choices
from engine.config import AugmentSettings, GenerateSettings
from engine.metrics import multiple_choice as metrics
from engine.tasks.augmentation import RowEncoder, augment_columns
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from models import TaskModel
from models.heads import log_softmax_of_choices


def read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    """Read questions with their choices, and with labels the number of the right one."""
    return read_choices(
        name,
        context=settings.data.text_column,
        question=settings.data.text_pair_column,
        label=settings.label_column(labelled),
        choices=settings.own.choice_columns,
        first_label=settings.own.first_label,
        group=settings.group_column(name, labelled),
        options=settings.file_options,
    )


def encode(
    rows: list[Row], processor: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples[ChoiceRecord]:
    """Encode each question once with each of its choices."""
    return encode_choices(
        rows,
        processor,
        context=settings.data.text_column,
        question=settings.data.text_pair_column,
        label=settings.label_column(labelled),
        max_length=settings.data.max_length,
        long_texts=settings.data.long_texts,
    )


def texts(row: Row, settings: TaskSettings) -> list[str]:
    """Return the context and the question, as far as there are any, and the choices."""
    around = (row.values[settings.data.text_column], row.values[settings.data.text_pair_column])
    return [*filter(None, around), *row.values[CHOICES]]


def augment(examples: Examples, rows: list[Row], encode: RowEncoder, settings: AugmentSettings, seed: int) -> Examples:
    """Augment the contexts by every change, or the questions where there are no contexts; choices stay as they are."""
    data = encode.settings.data
    has_context = any(row.values[data.text_column] for row in rows)
    return augment_columns(
        examples, rows, encode, settings, seed, [data.text_column if has_context else data.text_pair_column]
    )


def evaluate_batch(model: TaskModel, batch: Batch, examples: Examples, generate: GenerateSettings) -> Tensor:
    """Return [sum of losses, right answers, examples], (3,)."""
    return evaluate_examples(model, batch, examples, generate).sum(0)


def evaluate_examples(model: TaskModel, batch: Batch, examples: Examples, generate: GenerateSettings) -> Tensor:
    """Return [loss, whether the answer is right, 1] of each example, (N, 3)."""
    labels = batch.required_labels
    log_p, _ = log_softmax_of_choices(model(batch).logits, batch)
    return metrics.choice_rows(log_p, labels)


def references(examples: TextExamples[ChoiceRecord], labels: Sequence[str]) -> list[int]:
    """Return the number of the right choice of each example."""
    return [] if examples.labels is None else [int(label) for label in examples.labels]


def compute_metrics(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Return accuracy and loss."""
    return metrics.choice_metrics(statistics)


def predict_batch(
    model: TaskModel, batch: Batch, examples: TextExamples[ChoiceRecord], generate: GenerateSettings
) -> list[dict[str, Any]]:
    """Return the number of the likeliest choice, from 0, and its text, with the probability of each choice."""
    scores = model(batch).logits.double().cpu()
    predictions = []
    for index, of_example in zip(batch.indices, torch.split(scores, list(batch.sequences or ())), strict=True):
        chosen = int(of_example.argmax())
        probabilities = of_example.softmax(0).tolist()
        text = examples.record.choices[index][chosen]
        predictions.append({"choice": chosen, "text": text, "probabilities": probabilities})
    return predictions


MULTIPLE_CHOICE = Task(
    head="multiple-choice",
    predicts="choice",
    metrics=("accuracy", "loss"),
    columns=Columns(text="context", text_pair="question", group="same_context"),
    section="multiple_choice",
    long_texts=("truncate", "head+tail"),
    read=read,
    encode=encode,
    texts=texts,
    augment=augment,
    evaluate_batch=evaluate_batch,
    evaluate_examples=evaluate_examples,
    references=references,
    compute_metrics=compute_metrics,
    predict_batch=predict_batch,
)
