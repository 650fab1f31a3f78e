"""Exact match and F1 of answers, by the rules of SQuAD's official scripts; all as shares of 1, not of 100.

Versions 1.1 and 2.0 of the script normalise alike and agree on every question that has an answer. Version 2 is followed
here: of two answers of which one is no word, F1 is 1 where the other is none either. (Rajpurkar et al. 2016, 2018.)
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")
# Scripts without spaces: Han with its extensions, kana.
IDEOGRAPH = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")

# What is kept of each question, a column each.
COLUMNS = ("exact_match", "f1", "character_f1", "has_answer", "answered", "spoken", "margin")


def words(text: str) -> list[str]:
    """Lower-cased words without ASCII punctuation and English articles. A Chinese answer is one word."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def characters(text: str) -> list[str]:
    """As words(), but punctuation of any script is left out and each Chinese or Japanese character is a word.

    As in the evaluation of CMRC 2018 (Cui et al. 2019). Of English text these are its words.
    """
    plain = "".join(c for c in text.lower() if c in string.whitespace or unicodedata.category(c)[0] != "P")
    return IDEOGRAPH.sub(r" \1 ", ARTICLES.sub(" ", plain.translate(PUNCTUATION))).split()


def exact_match(prediction: str, answer: str) -> float:
    """1 where the two are equal as words, else 0."""
    return float(" ".join(words(prediction)) == " ".join(words(answer)))


def f1(prediction: str, answer: str, split: Callable[[str], list[str]] = words) -> float:
    """Harmonic mean of precision and recall of the words (of `split`), counted with their repetitions."""
    predicted, gold = split(prediction), split(answer)
    if not predicted or not gold:
        return float(predicted == gold)
    common = (Counter(predicted) & Counter(gold)).total()
    return 2 * common / (len(predicted) + len(gold))


def score(prediction: str, answers: Sequence[str]) -> tuple[float, float, float]:
    """(exact match, F1, F1 by character), each the largest over the gold answers.

    As in the script, a gold answer that has no word does not count, and where none is left the right answer is "".
    """
    golds = [answer for answer in answers if words(answer)] or [""]
    return (
        max(exact_match(prediction, gold) for gold in golds),
        max(f1(prediction, gold) for gold in golds),
        max(f1(prediction, gold, characters) for gold in golds),
    )


def statistics(prediction: str, answers: Sequence[str], margin: float, threshold: float) -> Tensor:
    """The row of a question, (7,) fp64: COLUMNS.

    prediction: the best answer, whatever speaks for there being none. margin: by how much the score of no answer is
    above its score; above `threshold` nothing is answered. The first three columns score the prediction itself.
    """
    values = [*score(prediction, answers), bool(answers), margin <= threshold, bool(prediction), margin]
    return torch.tensor(values, dtype=torch.float64)


def answer_metrics(rows: Tensor) -> dict[str, float]:
    """Metrics of all questions, from the rows of statistics(), (N, 7), in the order of the file.

    exact_match, f1 and character_f1 are of what was answered: overall and, where some questions have no answer, of
    those that have one (has_answer_..) and those that have none (no_answer_accuracy). best_.. are what the threshold
    that fits these questions best would give, and that threshold: a value for question_answering.no_answer_threshold.
    """
    column = dict(zip(COLUMNS, rows.unbind(1), strict=True))
    has_answer, answered = column["has_answer"].bool(), column["answered"].bool()
    names = ("exact_match", "f1", "character_f1")
    # Nothing said is right where there is no answer.
    final = {name: torch.where(answered, column[name], 1 - column["has_answer"]) for name in names}
    metrics = {name: values.mean().item() for name, values in final.items()}
    if 0 < has_answer.sum() < len(rows):
        metrics |= {f"has_answer_{name}": final[name][has_answer].mean().item() for name in names[:2]}
        metrics["no_answer_accuracy"] = final["exact_match"][~has_answer].mean().item()
    for name in ("exact_match", "f1"):
        best, threshold = best_threshold(column[name], has_answer, column["spoken"].bool(), column["margin"])
        metrics |= {f"best_{name}": best, f"best_{name}_threshold": threshold}
    return metrics


def best_threshold(scores: Tensor, has_answer: Tensor, spoken: Tensor, margins: Tensor) -> tuple[float, float]:
    """(the best mean score, its threshold) of all thresholds at the questions' own margins, as version 2 finds it.

    All (N,). scores: of the predictions as they are; spoken: is the prediction more than ""? It begins where nothing is
    answered and adds the questions from the smallest margin on, one by one in the order of the file where margins are
    equal; the first of equal means is taken. Nothing answered at all: the script says threshold 0, which fits its
    probabilities; margins may be below, and then so is the threshold.
    """
    current = best = float((~has_answer).sum())
    threshold = min(0.0, math.nextafter(margins.min().item(), -math.inf))
    gains = torch.where(has_answer, scores, -spoken.double())
    for i in torch.argsort(margins, stable=True).tolist():
        current += gains[i].item()
        if current > best:
            best, threshold = current, margins[i].item()
    return best / len(scores), threshold
