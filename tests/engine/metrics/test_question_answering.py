"""Metrics of answers against SQuAD's official rules (P11)."""

from __future__ import annotations

import math
import random

import pytest
import torch
from support.squad_rules import official_scores, official_threshold

from engine.metrics import question_answering as metrics

PIECES = ["the", "The", "a", "an", "An", "THE", "Danube"]
PIECES += ["danube", "river", "1,642", "1642", "13.5", "U.S.", "us", "don't"]
PIECES += ["dont", "well-known", "wellknown", "L'Auto", "lauto", "$5", "5%", "(five)", "theory", "another", "a-b", "ab"]
PIECES += ["岷江", "四川省", "李冰", "岷江。", "。", "，", "naïve", "naïve"]
PIECES += ["école", "…", "“quote”", "'", ".", "-", "_", "A."]
PIECES += ["river\nbank", "two\ttabs", "no\xa0break", "Ⅷ", "½", "İ", "ß", "the\u3000end", "a,an,the", "the."]


def random_text(rng: random.Random, most: int) -> str:
    gap = rng.choice([" ", " ", "  ", "", "\u3000"])
    return gap.join(rng.choice(PIECES) for _ in range(rng.randint(0, most)))


def crafted(count: int) -> list[tuple[str, list[str]]]:
    """Return predictions with up to three gold answers; half of the cases have the prediction in another form."""
    rng = random.Random(0)
    cases = []
    for _ in range(count):
        prediction = random_text(rng, 6)
        answers = [random_text(rng, 4) for _ in range(rng.randint(0, 3))]
        if rng.random() < 0.5:
            words = prediction.split(" ")
            rng.shuffle(words)
            changed = rng.choice([prediction.upper(), f"the {prediction}.", " ".join(words), prediction[1:]])
            answers.insert(rng.randint(0, len(answers)), changed)
        cases.append((prediction, answers))
    return cases


CASES = crafted(1000)


def test_p11_em_and_f1_equal_the_official_script():
    seen = set()
    for prediction, answers in CASES:
        exact, f1, _ = metrics.score_answer(prediction, answers)
        expected = official_scores(prediction, answers)
        assert (exact, f1) == pytest.approx(expected, rel=1e-12), (prediction, answers)
        seen.add((exact, 0 < f1 < 1, len(answers) > 1))
    assert len(seen) == 6  # right, partly right and wrong, of one answer and of several


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("the Black Sea", ["Black Sea"], 1, 1),
        ("Black  Sea!", ["the black sea"], 1, 1),
        ("Sea Black", ["Black Sea"], 0, 1),
        ("the deep Black Sea", ["Black Sea"], 0, 4 / 5),
        ("sea sea sea", ["sea"], 0, 1 / 2),
        ("in 1990", ["1989", "1990"], 0, 2 / 3),
        ("", [], 1, 1),
        ("the", [], 1, 1),  # an article is no word
        ("something", [], 0, 0),
        ("", ["something"], 0, 0),
        ("the", ["The"], 1, 1),
        ("another", ["other"], 0, 0),
        ("well-known", ["wellknown"], 1, 1),
        ("well known", ["well-known"], 0, 0),
        ("岷江", ["岷江"], 1, 1),
        ("在岷江", ["岷江"], 0, 0),  # one word
    ],
)
def test_scores_by_hand(prediction, answers, exact, f1):
    assert metrics.score_answer(prediction, answers)[:2] == pytest.approx((exact, f1))
    assert official_scores(prediction, answers) == pytest.approx((exact, f1))


@pytest.mark.parametrize(
    ("prediction", "answers", "f1"),
    [
        ("在岷江", ["岷江"], 4 / 5),
        ("岷江。", ["《岷江》"], 1),
        ("四川省成都平原", ["成都平原西部"], 2 * 4 / (7 + 6)),
        ("1299元", ["1299 元"], 1),
        ("iPhone手机", ["手机iPhone"], 1),
        ("どこ", ["ここ"], 1 / 2),
        ("the Black Sea", ["black sea"], 1),
        ("Black Sea", ["Black River"], 1 / 2),
        ("", ["岷江"], 0),
        ("", [], 1),
        ("。", [], 1),
    ],
)
def test_f1_by_character_of_chinese_is_by_word_of_english(prediction, answers, f1):
    assert metrics.score_answer(prediction, answers)[2] == pytest.approx(f1)


def test_character_f1_without_chinese_equals_the_official_f1():
    ascii_cases = [(p, a) for p, a in CASES if (p + "".join(a)).isascii()]
    assert len(ascii_cases) > 50
    for prediction, answers in ascii_cases:
        _, f1, by_character = metrics.score_answer(prediction, answers)
        assert by_character == f1


# Thresholds


def of_questions(predictions, answers, margins, threshold=0.0) -> torch.Tensor:
    parts = zip(predictions, answers, margins, strict=True)
    return torch.stack([metrics.answer_statistics(p, a, m, threshold) for p, a, m in parts])


@pytest.mark.parametrize("seed", range(30))
def test_metrics_and_the_best_threshold_are_the_official_ones(seed):
    rng = random.Random(seed)
    chosen = rng.sample(CASES, rng.choice([1, 2, 7, 60]))
    predictions, answers = ([case[i] for case in chosen] for i in (0, 1))
    # Probabilities, as the script reads them. Some are equal, so that the order of the file decides.
    margins = [rng.choice([rng.uniform(0.01, 1), 0.25, 0.5, 1.0]) for _ in chosen]
    threshold = rng.choice([0.0, 0.3, 0.5, 1.0])
    found = metrics.answer_metrics(of_questions(predictions, answers, margins, threshold))
    has_answer = [bool(golds) for golds in answers]
    for k, name in enumerate(("exact_match", "f1")):
        raw = [official_scores(p, golds)[k] for p, golds in zip(predictions, answers, strict=True)]
        final = [float(not has) if m > threshold else s for s, has, m in zip(raw, has_answer, margins, strict=True)]
        assert found[name] == pytest.approx(sum(final) / len(final))
        assert [found[f"best_{name}"], found[f"best_{name}_threshold"]] == pytest.approx(
            official_threshold(predictions, raw, margins, has_answer)
        )
        having = [s for s, has in zip(final, has_answer, strict=True) if has]
        lacking = [s for s, has in zip(final, has_answer, strict=True) if not has]
        if having and lacking:
            assert found[f"has_answer_{name}"] == pytest.approx(sum(having) / len(having))
            if name == "exact_match":
                assert found["no_answer_accuracy"] == pytest.approx(sum(lacking) / len(lacking))
        else:
            assert "no_answer_accuracy" not in found


def test_the_best_threshold_gives_the_best_score_when_it_is_set():
    """Uses margins of scores, which may be negative and are all different."""
    rng = random.Random(1)
    for size in (1, 3, 40):
        for _ in range(20):
            chosen = rng.sample(CASES, size)
            predictions, answers = ([case[i] for case in chosen] for i in (0, 1))
            margins = [rng.uniform(-9, 3) for _ in chosen]
            best = metrics.answer_metrics(of_questions(predictions, answers, margins))
            for name in ("exact_match", "f1"):
                threshold = best[f"best_{name}_threshold"]
                assert math.isfinite(threshold)
                again = metrics.answer_metrics(of_questions(predictions, answers, margins, threshold))
                # A prediction without a word is right where there is no answer, which the script's search ignores.
                assert again[name] >= best[f"best_{name}"] - 1e-12


def test_nothing_is_answered_where_no_threshold_is_better():
    found = metrics.answer_metrics(of_questions(["x", "y"], [[], []], [-5.0, 2.0]))
    assert (found["best_f1"], found["best_f1_threshold"] < -5) == (1.0, True)
    assert found["f1"] == 0.5


def test_a_question_without_any_span_is_answered_with_nothing():
    found = metrics.answer_metrics(of_questions(["", "", "sea"], [[], ["x"], ["sea"]], [math.inf, math.inf, -1.0]))
    assert found["f1"] == pytest.approx(2 / 3)
    assert (found["best_f1"], found["best_f1_threshold"]) == (pytest.approx(2 / 3), -1.0)
