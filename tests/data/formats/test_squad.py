"""SQuAD files: what is read, what is refused and where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data import DataError, split_rows
from data.formats.lines import locate
from data.formats.options import FileOptions
from data.formats.squad import Answer, read_questions

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
    other = read_questions(write(tmp_path / "dev.questions", content), options=FileOptions(format="squad"))
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
        "the context has 'lack Forest.' at 25, not the answer 'Black Forest'; that is at 24-36: these count from 1",
    ),
    (
        with_answer("Black Forest", 400),
        "answer_start 400 is outside the context, which has 44 characters; that is at 24-36",
    ),
    (with_answer("黑海", 45), "answer_start 45 is outside the context, which has 44 characters; that is at 41-43"),
    (with_answer("黑海。x", 41), "the context has '黑海。' at 41, not the answer '黑海。x'; that is nowhere in it"),
    (with_answer("black forest", 24), "the context has 'Black Forest' at 24, not the answer 'black forest'; at 24"),
    (with_answer("", 3), "an answer is empty; a question without an answer has an empty list of answers"),
    (with_answer(" ", 3), "an answer is empty; a question without an answer has an empty list of answers"),
    (with_answer(None, 3), 'answers should be {"text": [..], "answer_start": [..]} or a list'),
    (with_answer("The", "first"), 'answers should be {"text": [..], "answer_start": [..]} or a list'),
    (with_answer("The", 0.5), 'answers should be {"text": [..], "answer_start": [..]} or a list'),
    (with_answer("The", True), 'answers should be {"text": [..], "answer_start": [..]} or a list'),
    ({"answers": "r"}, "the answer 'r' has no start, and the context has it 2 times, at 11, 32: say which by 'an"),
    (
        {"answers": ["The", "black  forest"]},
        "the answer 'black  forest' has no start, and is nowhere in the context; at",
    ),
    ({"answers": {"text": 5, "answer_start": 0}}, 'answers should be {"text": [..], "answer_start": [..]}'),
    ({"answers": [5]}, 'answers should be {"text": [..], "answer_start": [..]}'),
    ({"answers": {"text": ["The"], "answer_start": []}}, "the answers have 1 texts and 0 starts"),
    ({"is_impossible": "True"}, "is_impossible is true, yet there is the answer 'Black Forest'"),
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
            "FILE: data[0].paragraphs[0].qas[1]: an id should be text or a number, not",
        ),
        (
            [CHINESE | {"id": None}],
            "FILE: data[0].paragraphs[0].qas[0]: an id should be text or a number, not None",
        ),
        ([CHINESE | {"id": [1]}], "FILE: data[0].paragraphs[0].qas[0]: an id should be text or a number, not [1]"),
        ([{"id": "a", "question": "Why?"}], "FILE: question a: no 'answers'"),
        ([QUESTION, {"id": "a"}], "FILE: question a: no 'question'"),
        (
            [QUESTION, "text"],
            "FILE: data[0].paragraphs[0].qas[1]: a question should be an object, not 'text'",
        ),
        ([QUESTION | {"question": 5}], "FILE: question q1: 'question' should be text, not 5"),
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
        ("[]", "FILE: no questions"),
        ("[5]", "FILE: [0] should have 'paragraphs', a list, as a SQuAD file does; this is a int"),
        (
            '{"data": [{"question": "x"}]}',
            "FILE: data[0] should have 'paragraphs', a list, as a SQuAD file does; this is",
        ),
        (
            '{"question": "x"}',
            "FILE: the file should have 'data', a list, as a SQuAD file does; this is an object with",
        ),
        ('{"data": [5]}', "FILE: data[0] should have 'paragraphs', a list, as a SQuAD file does; this is a int"),
        ('{"data": [{"paragraphs": [{"qas": [{"id": 1}]}]}]}', "FILE: question 1: no 'question'"),
        ('{"data": [{"paragraphs": [{"context": "x"}]}]}', "FILE: data[0].paragraphs[0] should have 'qas', a list"),
        ('{"data": [], "data": []}', "FILE: not JSON: key 'data' twice"),
        ('{"data": Infinity}', "FILE: not JSON: Infinity is not a JSON value"),
        (b'{"data":\n\n "\xff"}', "FILE:3: not UTF-8 at byte 2 of the line (0xff)"),
        ('{"data": "\\ud83d"}', "FILE: not JSON: \\ud83d is half of a surrogate pair"),
        ("[" * 100_000, "FILE: not JSON: maximum recursion depth"),
        ('{"data": "\0"}', "FILE:1: a NUL character"),
        (squad_file(QUESTION, context=" "), "FILE: question q1: 'context' is empty"),
        (squad_file(QUESTION, context=None), "FILE: question q1: 'context' should be text, not None"),
    ],
)
def test_f13_a_file_that_is_not_squads(tmp_path, content, error):
    (found,) = errors_of(tmp_path / "x.json", content, options=FileOptions(format="squad"))
    assert found.startswith(error)


def test_a_file_that_is_not_there_and_columns_that_it_has_not(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_questions(str(tmp_path / "x.json"))
    with pytest.raises(DataError, match="this is a folder"):
        read_questions(str(tmp_path), options=FileOptions(format="squad"))
    (error,) = errors_of(tmp_path / "x.json", squad_file(QUESTION), question="q")
    assert error == "FILE: a SQuAD file has no column 'q'; it has id, title, context, question, answers, is_impossible"
    numbered = read_questions(
        write(tmp_path / "x.json", squad_file(QUESTION, CHINESE)), options=FileOptions(id_column="")
    )
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
