"""Exact match and F1 of answers, by the rules of SQuAD's official scripts (Rajpurkar et al. 2016, 2018), in [0, 1].

Versions 1.1 and 2.0 of the script normalise alike and agree on every question that has an answer. For other questions
version 2.0 is followed: if one of two answers has no word, F1 is 1 if the other has none either, else 0.
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

from data.scripts import KANA_AND_HAN

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")
# Scripts without spaces: Han with its extensions, kana.
IDEOGRAPH = re.compile(f"([{KANA_AND_HAN}])")

# The columns of answer_statistics.
COLUMNS = ("exact_match", "f1", "character_f1", "has_answer", "answered", "not_empty", "margin")


def split_words(text: str) -> list[str]:
    """Split a text into words in lower case, without ASCII punctuation and articles; a Chinese answer is one word."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def split_characters(text: str) -> list[str]:
    """Split a text as split_words does, without any punctuation, and into single Chinese and Japanese characters.

    As in the evaluation of CMRC 2018 (Cui et al. 2019). For English text the result is its words.
    """
    plain = "".join(c for c in text.lower() if c in string.whitespace or unicodedata.category(c)[0] != "P")
    return IDEOGRAPH.sub(r" \1 ", ARTICLES.sub(" ", plain.translate(PUNCTUATION))).split()


def exact_match(prediction: str, answer: str) -> float:
    """Return 1 if the two texts have equal words, else 0."""
    return float(" ".join(split_words(prediction)) == " ".join(split_words(answer)))


def f1(prediction: str, answer: str, split: Callable[[str], list[str]] = split_words) -> float:
    """Return the harmonic mean of precision and recall of the words that `split` finds, counted with repetitions."""
    predicted, gold = split(prediction), split(answer)
    if not predicted or not gold:
        return float(predicted == gold)
    common = (Counter(predicted) & Counter(gold)).total()
    return 2 * common / (len(predicted) + len(gold))


def score_answer(prediction: str, answers: Sequence[str]) -> tuple[float, float, float]:
    """Return (exact match, F1, F1 by character), each the largest over the gold answers.

    As in the script, gold answers without a word do not count; if none is left, the right answer is "".
    """
    golds = [answer for answer in answers if split_words(answer)] or [""]
    return (
        max(exact_match(prediction, gold) for gold in golds),
        max(f1(prediction, gold) for gold in golds),
        max(f1(prediction, gold, split_characters) for gold in golds),
    )


def answer_statistics(prediction: str, answers: Sequence[str], margin: float, threshold: float) -> Tensor:
    """Return the row of a question, (7,) fp64, with the columns COLUMNS.

    prediction: the best span, even if no answer has a higher score; the first three columns score it.
    margin: the score of no answer minus that of the prediction. Above `threshold` no answer is given.
    """
    values = [*score_answer(prediction, answers), bool(answers), margin <= threshold, bool(prediction), margin]
    return torch.tensor(values, dtype=torch.float64)


def answer_metrics(rows: Tensor) -> dict[str, float]:
    """Return the metrics of all questions, from the rows of answer_statistics, (N, 7), in the order of the file.

    - exact_match, f1, character_f1: of the given answers, over all questions;
    - has_answer_..., no_answer_accuracy: of the questions with and without an answer, if there are both;
    - best_...: the score at the threshold that is best for these questions, and that threshold, a value for
      question_answering.no_answer_threshold.
    """
    column = dict(zip(COLUMNS, rows.unbind(1), strict=True))
    has_answer, answered = column["has_answer"].bool(), column["answered"].bool()
    names = ("exact_match", "f1", "character_f1")
    # To give no answer is right if the question has none.
    final = {name: torch.where(answered, column[name], 1 - column["has_answer"]) for name in names}
    metrics = {name: values.mean().item() for name, values in final.items()}
    if 0 < has_answer.sum() < len(rows):
        metrics |= {f"has_answer_{name}": final[name][has_answer].mean().item() for name in names[:2]}
        metrics["no_answer_accuracy"] = final["exact_match"][~has_answer].mean().item()
    for name in ("exact_match", "f1"):
        best, threshold = best_threshold(column[name], has_answer, column["not_empty"].bool(), column["margin"])
        metrics |= {f"best_{name}": best, f"best_{name}_threshold": threshold}
    return metrics


def best_threshold(scores: Tensor, has_answer: Tensor, not_empty: Tensor, margins: Tensor) -> tuple[float, float]:
    """Return (the best mean score, its threshold) over the thresholds at the questions' margins, as version 2.0 does.

    All arguments are (N,). scores: of the predictions themselves. not_empty: whether the prediction is not "".
    The search begins with no question answered and adds questions by rising margin, in the order of the file if margins
    are equal. Of equal means the first is taken. If no question is answered, the script reports the threshold 0, which
    suits its probabilities. Margins may be negative, so here the threshold is then below all of them.
    """
    order = torch.argsort(margins, stable=True)
    gains = torch.where(has_answer, scores, -not_empty.double())[order]
    unanswered = (~has_answer).sum().double().reshape(1)
    sums = torch.cat([unanswered, gains]).cumsum(0)  # with the first 0, 1, ... questions answered
    first = int((sums == sums.max()).nonzero()[0])
    threshold = margins[order[first - 1]].item() if first else math.nextafter(margins.min().item(), -math.inf)
    return (sums[first] / len(scores)).item(), threshold if first else min(0.0, threshold)
