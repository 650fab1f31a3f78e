"""Answers to questions, as spans of the contexts that are given with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import Batch, Row, TextExamples
from data.formats.squad import read_questions
from data.question_answering import Candidate, Windows, encode_questions
from engine.config import GenerateSettings
from engine.metrics import question_answering as squad
from engine.tasks.augmentation import augment_questions
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from models import Output, TaskModel

SHOWN = 5  # answers in a prediction


def _read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    splits = settings.is_training_split(name, labelled)
    return read_questions(
        name,
        question=settings.data.text_column,
        context=settings.data.text_pair_column,
        answers=settings.data.label_column if labelled else "",
        others=[settings.data.group_column] if splits and settings.data.group_column else [],
        id_column=settings.data.id_column,
        format=settings.data.format,
    )


def _encode(
    rows: list[Row], tokenizer: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples:
    return encode_questions(
        rows,
        tokenizer,
        question=settings.data.text_column,
        context=settings.data.text_pair_column,
        answers=settings.data.label_column if labelled else "",
        max_length=settings.data.max_length,
        doc_stride=settings.own.doc_stride,
        max_answer_length=settings.own.max_answer_length,
        no_answer_threshold=settings.own.no_answer_threshold,
    )


def _answers(
    out: Output, batch: Batch, windows: Windows, count: int
) -> Iterator[tuple[int, list[Candidate], float, float]]:
    """(the question's place in its data set, *Windows.answers()) of each question of a batch, in its order."""
    logits = [part.numpy() for part in out.logits.float().cpu().split(list(batch.lengths))]
    begin = 0
    for index, sequences in zip(batch.indices, batch.sequences or (), strict=True):
        yield index, *windows.answers(index, logits[begin : begin + sequences], count)
        begin += sequences


def measure_answers(model: TaskModel, batch: Batch, examples: TextExamples, generate: GenerateSettings) -> Tensor:
    """The sum of the losses, the number of windows, and a row of squad.COLUMNS for every question of the data set.

    Rows of the questions of other batches are 0. (2 + N * 7,) fp64.
    """
    if batch.labels is None:
        raise TypeError("only labelled examples can be measured")
    windows: Windows = examples.extra["windows"]
    out = model(batch)
    rows = torch.zeros(len(examples), len(squad.COLUMNS), dtype=torch.float64)
    for index, found, no_answer, _ in _answers(out, batch, windows, count=1):
        text, margin = (found[0].text, no_answer - found[0].score) if found else ("", float("inf"))
        rows[index] = squad.statistics(text, windows.golds[index], margin, windows.no_answer_threshold)
    sums = torch.stack([out.loss_sum.double(), out.loss_sum.new_tensor(batch.num_targets, dtype=torch.float64)])
    return torch.cat([sums, rows.flatten().to(sums.device)])


def summarize_answers(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """The loss of a window, and the metrics of the answers."""
    rows = statistics[2:].view(-1, len(squad.COLUMNS))
    return {"loss": (statistics[0] / statistics[1]).item(), **squad.answer_metrics(rows)}


def predict_answers(
    model: TaskModel, batch: Batch, examples: TextExamples, generate: GenerateSettings
) -> list[dict[str, Any]]:
    """The answer, "" for none, with its characters, its probability and the best spans whether or not there is one.

    no_answer_margin: the score of no answer less that of the best span, which question_answering.no_answer_threshold is compared
    with; null where there is no span at all.
    """
    windows: Windows = examples.extra["windows"]
    predictions = []
    for _, found, no_answer, probability in _answers(model(batch), batch, windows, SHOWN):
        margin = no_answer - found[0].score if found else None
        answer: dict[str, Any] = {"answer": "", "start": None, "end": None, "probability": probability}
        if found and margin is not None and margin <= windows.no_answer_threshold:
            answer = _as_row(found[0])
        best = {"no_answer_probability": probability, "no_answer_margin": margin, "n_best": [*map(_as_row, found)]}
        predictions.append(answer | best)
    return predictions


def _as_row(span: Candidate) -> dict[str, Any]:
    return {"answer": span.text, "start": span.start, "end": span.end, "probability": span.probability}


QUESTION_ANSWERING = Task(
    head="question-answering",
    metrics=("f1", "exact_match", "character_f1", "best_f1", "best_exact_match", "loss"),
    columns=Columns(text="question", text_pair="context", label="answers", group="context"),
    section="question_answering",
    read=_read,
    encode=_encode,
    evaluate_batch=measure_answers,
    compute_metrics=summarize_answers,
    predict_batch=predict_answers,
    augment=augment_questions,
)
