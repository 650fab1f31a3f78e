"""Extractive question answering: an answer is a span of the context that is given with the question."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import Batch, Examples, Row, TextExamples
from data.augmentation import text as text_augmentation
from data.formats.squad import Answer, read_questions
from data.question_answering import Candidate, Windows, encode_questions
from engine.config import AugmentSettings, GenerateSettings
from engine.metrics import by_example
from engine.metrics import question_answering as metrics
from engine.tasks.augmentation import CHANGES_IN_PLACE, RowEncoder, augment_rows, check_text_changes, text_changes
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from models import Output, TaskModel
from models.ops.packing import to_device

NUM_CANDIDATES = 5  # spans in "n_best" of a prediction


def read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    """Read questions and contexts, and with labels the accepted answers."""
    group = settings.group_column(name, labelled)
    return read_questions(
        name,
        question=settings.data.text_column,
        context=settings.data.text_pair_column,
        answers=settings.label_column(labelled),
        others=[group] if group else [],
        options=settings.file_options,
    )


def split_labels(rows: list[Row], settings: TaskSettings) -> list[Collection[str]]:
    """Return whether each question has an answer."""
    return [("an answer",) if row.values[settings.data.label_column] else ("no answer",) for row in rows]


def encode(
    rows: list[Row], processor: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples[Windows]:
    """Encode each question with its context, in several windows if the context is long."""
    return encode_questions(
        rows,
        processor,
        question=settings.data.text_column,
        context=settings.data.text_pair_column,
        answers=settings.label_column(labelled),
        max_length=settings.data.max_length,
        doc_stride=settings.own.doc_stride,
        max_answer_length=settings.own.max_answer_length,
        no_answer_threshold=settings.own.no_answer_threshold,
    )


def augment(examples: Examples, rows: list[Row], encode: RowEncoder, settings: AugmentSettings, seed: int) -> Examples:
    """Change words in place: all of the question, and those of the context outside the answers."""
    if not check_text_changes(settings, CHANGES_IN_PLACE, "an answer is a span of the text"):
        return examples
    data, changes = encode.settings.data, text_changes(settings.text, encode, rows)

    def change(row: Row, rng: np.random.Generator) -> Row:
        question, _ = text_augmentation.change_around(row, rng, changes, data.text_column, [])
        answers: list[Answer] = row.values[data.label_column]
        spans = [(answer.start, answer.start + len(answer.text)) for answer in answers]
        context, new_spans = text_augmentation.change_around(row, rng, changes, data.text_pair_column, spans)
        shifted = [Answer(answer.text, start) for answer, (start, _) in zip(answers, new_spans, strict=True)]
        new = {data.text_column: question, data.text_pair_column: context, data.label_column: shifted}
        return row.updated(new)

    return augment_rows(examples, rows, encode, changes, seed, change)


def evaluate_batch(
    model: TaskModel, batch: Batch, examples: TextExamples[Windows], generate: GenerateSettings
) -> Tensor:
    """Return [sum of losses, windows, a row of metrics.COLUMNS for every question of the data set], (2 + N * 7,).

    Rows of the questions of other batches are 0.
    """
    _ = batch.required_labels  # TypeError without labels
    windows = examples.record
    out = model(batch)
    rows = torch.zeros(len(examples), len(metrics.COLUMNS), dtype=torch.float64)
    for index, found, no_answer, _ in _find_answers(out, batch, windows, count=1):
        text, margin = (found[0].text, no_answer - found[0].score) if found else ("", float("inf"))
        rows[index] = metrics.answer_statistics(text, windows.gold_answers[index], margin, windows.no_answer_threshold)
    counts = torch.cat([torch.tensor([batch.num_targets], dtype=torch.float64), rows.flatten()])
    return torch.cat([out.loss_sum.double().reshape(1), to_device(counts, out.loss_sum.device)])


def evaluate_examples(
    model: TaskModel, batch: Batch, examples: TextExamples[Windows], generate: GenerateSettings
) -> Tensor:
    """Return [sum of losses, windows, *metrics.COLUMNS] of each question of a batch, (B, 9)."""
    out, windows = model(batch), examples.record
    losses = by_example.question_losses(out.logits, batch).cpu()
    rows = torch.zeros(len(batch.ids), len(metrics.COLUMNS), dtype=torch.float64)
    for row, (index, found, no_answer, _) in zip(rows, _find_answers(out, batch, windows, count=1), strict=True):
        text, margin = (found[0].text, no_answer - found[0].score) if found else ("", float("inf"))
        row += metrics.answer_statistics(text, windows.gold_answers[index], margin, windows.no_answer_threshold)
    return torch.cat([losses, rows], 1)


def references(examples: TextExamples[Windows], labels: Sequence[str]) -> list[list[str]]:
    """Return the accepted answers to each question, [] where it has none."""
    return [list(answers) for answers in examples.record.gold_answers]


def compute_metrics(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Return the loss of a window, and the metrics of the answers."""
    rows = statistics[2:].view(-1, len(metrics.COLUMNS))
    return {"loss": (statistics[0] / statistics[1]).item(), **metrics.answer_metrics(rows)}


def predict_batch(
    model: TaskModel, batch: Batch, examples: TextExamples[Windows], generate: GenerateSettings
) -> list[dict[str, Any]]:
    """Return the answer to each question, "" for none, with its characters, its probability and the best spans.

    no_answer_margin: the score of no answer minus that of the best span; null without any span. An answer is given if
    the margin is at most question_answering.no_answer_threshold.
    """
    windows = examples.record
    predictions = []
    for _, found, no_answer, probability in _find_answers(model(batch), batch, windows, NUM_CANDIDATES):
        margin = no_answer - found[0].score if found else None
        answer: dict[str, Any] = {"answer": "", "start": None, "end": None, "probability": probability}
        if found and margin is not None and margin <= windows.no_answer_threshold:
            answer = _as_dict(found[0])
        best = {"no_answer_probability": probability, "no_answer_margin": margin, "n_best": [*map(_as_dict, found)]}
        predictions.append(answer | best)
    return predictions


def _find_answers(
    out: Output, batch: Batch, windows: Windows, count: int
) -> Iterator[tuple[int, list[Candidate], float, float]]:
    """Yield (the question's index in its data set, *windows.answers()) for each question of a batch, in its order."""
    logits = [window.numpy() for window in torch.split(out.logits.float().cpu(), list(batch.lengths))]
    begin = 0
    for index, sequences in zip(batch.indices, batch.sequences or (), strict=True):
        yield index, *windows.answers(index, logits[begin : begin + sequences], count)
        begin += sequences


def _as_dict(span: Candidate) -> dict[str, Any]:
    return {"answer": span.text, "start": span.start, "end": span.end, "probability": span.probability}


QUESTION_ANSWERING = Task(
    head="question-answering",
    predicts="answer",
    metrics=("f1", "exact_match", "character_f1", "best_f1", "best_exact_match", "loss"),
    columns=Columns(text="question", text_pair="context", label="answers", group="context"),
    section="question_answering",
    read=read,
    split_labels=split_labels,
    encode=encode,
    augment=augment,
    evaluate_batch=evaluate_batch,
    evaluate_examples=evaluate_examples,
    collect=by_example.collect_answers,
    references=references,
    compute_metrics=compute_metrics,
    predict_batch=predict_batch,
)
