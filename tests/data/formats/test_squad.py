"""SQuAD files: what is read, what is refused and where; and the metrics of answers against the official rules (P11)."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from data import DataError, split_rows
from data.formats.rows import locate
from data.formats.squad import Answer, read_questions
from engine.metrics import question_answering as squad

# The rules, written once more: of the scripts evaluate-v1.1.py and evaluate-v2.0.py, as their papers describe them.


def official_words(text: str) -> list[str]:
    """Lower case; no character of ASCII punctuation; a, an and the are no words; the rest is split at white space."""
    kept = "".join(c for c in text.lower() if not (c.isascii() and c.isprintable() and not c.isalnum() and c != " "))
    found, word = [], ""
    for c in kept + " ":  # an article is one between two characters that belong to no word
        if c.isalnum() or c == "_":
            word += c
        else:
            found += [" " if word in ("a", "an", "the") else word, c]
            word = ""
    return "".join(found).split()


def official_scores(prediction: str, answers: list[str]) -> tuple[float, float]:
    golds = [answer for answer in answers if official_words(answer)] or [""]
    exact = f1 = 0.0
    for gold in golds:
        ours, theirs = official_words(prediction), official_words(gold)
        exact = max(exact, float(ours == theirs))
        if not ours or not theirs:
            f1 = max(f1, float(ours == theirs))
            continue
        left = list(theirs)
        same = 0
        for word in ours:
            if word in left:
                left.remove(word)
                same += 1
        if same:
            precision, recall = same / len(ours), same / len(theirs)
            f1 = max(f1, 2 * precision * recall / (precision + recall))
    return exact, f1


def official_threshold(predictions, scores, margins, has_answer) -> tuple[float, float]:
    """Questions are answered from the smallest margin on: the best mean score, and where it is first reached."""
    current = best = sum(not has for has in has_answer)
    threshold = 0.0
    for i in sorted(range(len(scores)), key=lambda i: margins[i]):
        if has_answer[i]:
            current += scores[i]
        elif predictions[i]:
            current -= 1
        if current > best:
            best, threshold = current, margins[i]
    return best / len(scores), threshold


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
    """Predictions with none to three gold answers, half of which are the prediction in another form."""
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


def test_p11_exact_match_and_f1_are_the_official_ones_on_a_thousand_cases():
    seen = set()
    for prediction, answers in CASES:
        exact, f1, _ = squad.score(prediction, answers)
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
        ("the", [], 1, 1),  # no word either
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
    assert squad.score(prediction, answers)[:2] == pytest.approx((exact, f1))
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
    assert squad.score(prediction, answers)[2] == pytest.approx(f1)


def test_f1_by_character_is_the_official_one_where_there_is_no_chinese():
    ascii_cases = [(p, a) for p, a in CASES if (p + "".join(a)).isascii()]
    assert len(ascii_cases) > 50
    for prediction, answers in ascii_cases:
        _, f1, by_character = squad.score(prediction, answers)
        assert by_character == f1


# Thresholds


def of_questions(predictions, answers, margins, threshold=0.0) -> torch.Tensor:
    parts = zip(predictions, answers, margins, strict=True)
    return torch.stack([squad.statistics(p, a, m, threshold) for p, a, m in parts])


@pytest.mark.parametrize("seed", range(30))
def test_metrics_and_the_best_threshold_are_the_official_ones(seed):
    rng = random.Random(seed)
    chosen = rng.sample(CASES, rng.choice([1, 2, 7, 60]))
    predictions, answers = ([case[i] for case in chosen] for i in (0, 1))
    # Probabilities, as the script takes them; some equal, so that the order of the file decides.
    margins = [rng.choice([rng.uniform(0.01, 1), 0.25, 0.5, 1.0]) for _ in chosen]
    threshold = rng.choice([0.0, 0.3, 0.5, 1.0])
    found = squad.answer_metrics(of_questions(predictions, answers, margins, threshold))
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
    """The margins of scores, which may be negative, and all of them different."""
    rng = random.Random(1)
    for size in (1, 3, 40):
        for _ in range(20):
            chosen = rng.sample(CASES, size)
            predictions, answers = ([case[i] for case in chosen] for i in (0, 1))
            margins = [rng.uniform(-9, 3) for _ in chosen]
            best = squad.answer_metrics(of_questions(predictions, answers, margins))
            for name in ("exact_match", "f1"):
                threshold = best[f"best_{name}_threshold"]
                assert math.isfinite(threshold)
                again = squad.answer_metrics(of_questions(predictions, answers, margins, threshold))
                # A prediction without a word is right where there is no answer; the script's search counts on none.
                assert again[name] >= best[f"best_{name}"] - 1e-12


def test_nothing_is_answered_where_no_threshold_is_better():
    metrics = squad.answer_metrics(of_questions(["x", "y"], [[], []], [-5.0, 2.0]))
    assert (metrics["best_f1"], metrics["best_f1_threshold"] < -5) == (1.0, True)
    assert metrics["f1"] == 0.5


def test_a_question_without_any_span_is_answered_with_nothing():
    metrics = squad.answer_metrics(of_questions(["", "", "sea"], [[], ["x"], ["sea"]], [math.inf, math.inf, -1.0]))
    assert metrics["f1"] == pytest.approx(2 / 3)
    assert (metrics["best_f1"], metrics["best_f1_threshold"]) == (pytest.approx(2 / 3), -1.0)


# Files

CONTEXT = "The Danube rises in the Black Forest. 它流入黑海。"
QUESTION = {"id": "q1", "question": "Where?", "answers": [{"text": "Black Forest", "answer_start": 24}]}
CHINESE = {"id": "q2", "question": "流入哪里？", "answers": [{"text": "黑海", "answer_start": 41}]}
NONE = {"id": "q3", "question": "When?", "answers": [], "is_impossible": True, "plausible_answers": [{"text": "x"}]}


def squad_file(*entries: object, context: object = CONTEXT) -> str:
    return json.dumps(
        {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": context, "qas": entries}]}]}
    )


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def errors_of(path: Path, content: str | bytes, **options: object) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_questions(write(path, content), **options)
    return str(caught.value).replace(str(path), "FILE").split("\n")


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("indent", [None, 1])
def test_both_versions_of_squad_are_read(tmp_path, bom, indent):
    content = bom + json.dumps(json.loads(squad_file(QUESTION, CHINESE, NONE)), indent=indent)
    rows = read_questions(write(tmp_path / "dev.json", content))
    assert [(row.id, row.values["question"], row.values["answers"]) for row in rows] == [
        ("q1", "Where?", [Answer("Black Forest", 24)]),
        ("q2", "流入哪里？", [Answer("黑海", 41)]),
        ("q3", "When?", []),
    ]
    assert {row.values["context"] for row in rows} == {CONTEXT}
    assert {row.values["title"] for row in rows} == {"T"}
    other = read_questions(write(tmp_path / "dev.questions", content), format="squad")
    assert other == rows


FORMS = [
    {"text": ["Black Forest", "Forest"], "answer_start": [24, 30]},
    [{"text": "Black Forest", "answer_start": 24}, {"text": "Forest", "answer_start": 30}],
]


@pytest.mark.parametrize("answers", FORMS)
def test_rows_of_jsonl_are_read_in_both_forms(tmp_path, answers):
    lines = [{"id": 7, "q": "Where?", "c": CONTEXT, "a": answers, "page": 1}]
    lines += [
        {"id": 8, "q": "Who?", "c": CONTEXT, "a": none, "page": 2} for none in ([], {"text": [], "answer_start": []})
    ]
    lines[2]["id"] = "nine"
    content = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    names = {"question": "q", "context": "c", "answers": "a"}
    rows = read_questions(write(tmp_path / "x.jsonl", content), **names, others=["page"])
    assert [row.id for row in rows] == ["7", "8", "nine"]
    assert [row.values["a"] for row in rows] == [[Answer("Black Forest", 24), Answer("Forest", 30)], [], []]
    assert [row.line for row in rows] == [1, 2, 3]
    unlabelled = read_questions(str(tmp_path / "x.jsonl"), **names | {"answers": ""})
    assert [row.id for row in unlabelled] == ["7", "8", "nine"]


def test_answers_are_not_read_where_none_are_wanted(tmp_path):
    bad = QUESTION | {"answers": [{"text": "elsewhere", "answer_start": 500}]}
    rows = read_questions(write(tmp_path / "x.json", squad_file(bad, {"id": 5, "question": "No answers?"})), answers="")
    assert [row.id for row in rows] == ["q1", "5"]


def with_answer(text: object, start: object) -> dict[str, object]:
    return {"answers": [{"text": text, "answer_start": start}]}


BAD = [
    (
        with_answer("Black Forest", 25),
        "the context has 'lack Forest.' at 25, not the answer 'Black Forest'; it is at 24",
    ),
    (with_answer("Black Forest", -1), "answer_start -1 is outside the context, which has 44 characters; it is at 24"),
    (with_answer("Black Forest", 400), "answer_start 400 is outside the context, which has 44 characters; it is at 24"),
    (with_answer("黑海", 45), "answer_start 45 is outside the context, which has 44 characters; it is at 41"),
    (with_answer("黑海。x", 41), "the context has '黑海。' at 41, not the answer '黑海。x'; it is nowhere in it"),
    (with_answer("black forest", 24), "the context has 'Black Forest' at 24, not the answer 'black forest'; it is now"),
    (with_answer("", 3), "an answer is empty; a question that has none has an empty list of answers"),
    (with_answer(" ", 3), "an answer is empty; a question that has none has an empty list of answers"),
    (with_answer(None, 3), '\'answers\' should be {"text": [..], "answer_start": [..]} or a list'),
    (with_answer("The", "0"), '\'answers\' should be {"text": [..], "answer_start": [..]} or a list'),
    (with_answer("The", 0.0), '\'answers\' should be {"text": [..], "answer_start": [..]} or a list'),
    (with_answer("The", True), '\'answers\' should be {"text": [..], "answer_start": [..]} or a list'),
    ({"answers": "Black Forest"}, '\'answers\' should be {"text": [..], "answer_start": [..]} or a list'),
    ({"answers": ["Black Forest"]}, '\'answers\' should be {"text": [..], "answer_start": [..]} or a list'),
    ({"answers": {"text": "The", "answer_start": 0}}, '\'answers\' should be {"text": [..], "answer_start": [..]}'),
    ({"answers": {"text": ["The"], "answer_start": []}}, "'answers' has 1 texts and 0 starts"),
    ({"is_impossible": True}, "is_impossible is true, yet there is the answer 'Black Forest'"),
    ({"is_impossible": False, "answers": []}, "is_impossible is false, yet there is no answer"),
    ({"question": ""}, "'question' is empty"),
    ({"question": " \t"}, "'question' is empty"),
]


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_f13_a_bad_question_is_named_with_its_reason(tmp_path, change, reason):
    for place in range(3):
        entries = [CHINESE, NONE]
        entries.insert(place, QUESTION | change)
        (error,) = errors_of(tmp_path / "x.json", squad_file(*entries))
        assert error.startswith(f"FILE: question q1: {reason}")
        rows = "\n".join(json.dumps(entry | {"context": CONTEXT}, ensure_ascii=False) for entry in entries)
        (error,) = errors_of(tmp_path / "x.jsonl", rows)
        assert error.startswith(f"FILE:{place + 1}: {reason}")


def test_f13_all_bad_questions_are_reported_together(tmp_path):
    entries = [QUESTION | change | {"id": f"q{i}"} for i, (change, _) in enumerate(BAD)]
    errors = errors_of(tmp_path / "x.json", squad_file(CHINESE | {"id": "good"}, *entries))
    assert len(errors) == len(BAD) == 20
    for i, (error, (_, reason)) in enumerate(zip(errors, BAD, strict=True)):
        assert error.startswith(f"FILE: question q{i}: {reason}")


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ([QUESTION, CHINESE, CHINESE], "FILE: question q2: data[0].paragraphs[0].qas[1] has this id too"),
        (
            [QUESTION, CHINESE | {"id": ""}],
            "FILE: data[0].paragraphs[0].qas[1]: an id should be text or a number, this is",
        ),
        (
            [CHINESE | {"id": None}],
            "FILE: data[0].paragraphs[0].qas[0]: an id should be text or a number, this is None",
        ),
        ([CHINESE | {"id": [1]}], "FILE: data[0].paragraphs[0].qas[0]: an id should be text or a number, this is [1]"),
        ([{"id": "a", "question": "Why?"}], "FILE: question a: no 'answers'"),
        ([QUESTION, {"id": "a"}], "FILE: data[0].paragraphs[0].qas[1] should have 'question', text, as a SQuAD file"),
        (
            [QUESTION, "text"],
            "FILE: data[0].paragraphs[0].qas[1] should have 'question', text, as a SQuAD file does; this",
        ),
        ([QUESTION | {"question": 5}], "FILE: data[0].paragraphs[0].qas[0] should have 'question', text, as a SQuAD"),
        ([], "FILE: no questions"),
    ],
)
def test_f13_questions_that_are_none(tmp_path, entries, error):
    (found,) = errors_of(tmp_path / "x.json", squad_file(*entries))
    assert found.startswith(error)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "FILE:1: not JSON: Expecting value"),
        ('{"data": [\n}', "FILE:2: not JSON: Expecting value"),
        ("[]", "FILE: the file should have 'data', a list, as a SQuAD file does; this is a list"),
        (
            '{"question": "x"}',
            "FILE: the file should have 'data', a list, as a SQuAD file does; this is an object with",
        ),
        ('{"data": [5]}', "FILE: data[0] should have 'paragraphs', a list, as a SQuAD file does; this is a int"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "FILE: data[0].paragraphs[0] should have 'context', text"),
        ('{"data": [{"paragraphs": [{"context": "x"}]}]}', "FILE: data[0].paragraphs[0] should have 'qas', a list"),
        ('{"data": [], "data": []}', "FILE: not JSON: key 'data' twice"),
        ('{"data": NaN}', "FILE: not JSON: NaN is not a JSON value"),
        (b'{"data":\n\n "\xff"}', "FILE:3: not UTF-8 (0xff at byte 12 of the file)"),
        ('{"data": "\\ud83d"}', "FILE: \\ud83d is half of a surrogate pair"),
        ("[" * 100_000, "FILE: not JSON: maximum recursion depth"),
        ('{"data": "\0"}', "FILE:1: not JSON: Invalid control character"),
        (squad_file(QUESTION, context=" "), "FILE: question q1: 'context' is empty"),
        (squad_file(QUESTION, context=None), "FILE: data[0].paragraphs[0] should have 'context', text"),
    ],
)
def test_f13_a_file_that_is_not_squads(tmp_path, content, error):
    (found,) = errors_of(tmp_path / "x.json", content)
    assert found.startswith(error)


def test_a_file_that_is_not_there_and_columns_that_it_has_not(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_questions(str(tmp_path / "x.json"))
    with pytest.raises(DataError, match="this is a folder"):
        read_questions(str(tmp_path), format="squad")
    (error,) = errors_of(tmp_path / "x.json", squad_file(QUESTION), question="q")
    assert error == "FILE: a SQuAD file has no column 'q'; it has id, title, context, question, answers, is_impossible"
    numbered = read_questions(write(tmp_path / "x.json", squad_file(QUESTION, CHINESE)), id_column="")
    assert [row.id for row in numbered] == ["1", "2"]


# The questions that come with the engine

SAMPLES = [f"package:data/samples/questions/{name}.json" for name in ("train", "validation")]


def test_the_questions_that_come_along():
    train, validation = map(read_questions, SAMPLES)
    rows = train + validation
    assert len(train) == 298
    assert len(validation) == 76
    assert len({row.id for row in rows}) == len(rows)
    contexts = [{row.values["context"] for row in part} for part in (train, validation)]
    assert [len(part) for part in contexts] == [56, 14]
    assert not contexts[0] & contexts[1]
    assert 0.14 < sum(not row.values["answers"] for row in rows) / len(rows) < 0.18
    assert sum(any("\u4e00" <= c <= "\u9fff" for c in row.values["context"]) for row in rows) == 40
    for row in rows:
        for text, start in row.values["answers"]:
            assert row.values["context"][start : start + len(text)] == text == text.strip()
            before = row.values["context"][start - 1 : start]
            assert not (text[0].isascii() and text[0].isalnum() and before.isalnum() and before.isascii())
    assert all(locate(name).with_name("LICENSE.txt").is_file() for name in SAMPLES)


def test_questions_of_a_context_stay_on_one_side():
    rows = read_questions(SAMPLES[0])
    train, held_out = ({row.values["context"] for row in part} for part in split_rows(rows, 0.2, 0, "context"))
    assert len(held_out) == 11
    assert not train & held_out
