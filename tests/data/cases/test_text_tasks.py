"""Questions, relations, conversations and pairs in the forms that files have: what is read, counted, or refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support.cases import Content, dry_run, evaluation, predictions, run, settings_for, write_file

from data import DataError
from data.causal_lm import read_texts
from data.dialogue import read_dialogues
from data.formats.options import FileOptions
from data.formats.squad import Answer, read_questions
from data.relation_extraction import ROLES, read_relations
from data.row import Rows
from data.seq2seq import read_pairs
from engine.config import ConfigError

# Questions

CONTEXT = "The house in Rome is red. Anna likes the house."
ROME = [Answer("Rome", 13)]
QUESTION = {"id": "q", "question": "where ?", "context": CONTEXT}
NESTED = {"id": 7, "question": "where ?", "answers": [{"id": "1", "text": "Rome", "answer_start": -1}]}
CMRC = {"query_id": "T_1", "query_text": "where ?", "answers": ["Rome"]}
LOCATED = "1 answer without a start, read at the only place where the context has the text (the first: {})"

QUESTION_FILES = {  # name -> (ending, content, answers, start of a note)
    "flattened": (".json", {"data": [QUESTION | {"answers": {"text": ["Rome"], "answer_start": [13]}}]}, ROME, ""),
    "objects": (".json", [QUESTION | {"answers": [{"text": "Rome", "answer_start": 13}]}], ROME, ""),
    "text": (".jsonl", QUESTION | {"answers": "Rome"}, ROME, LOCATED.format("line 1")),
    "texts": (".jsonl", QUESTION | {"answers": ["Rome"]}, ROME, LOCATED.format("line 1")),
    "no starts": (".jsonl", QUESTION | {"answers": {"text": ["Rome"]}}, ROME, LOCATED.format("line 1")),
    "one": (".jsonl", QUESTION | {"answers": {"text": "Rome", "answer_start": 13}}, ROME, ""),
    "starts": (
        ".jsonl",
        QUESTION | {"answers": {"text": "house", "answer_start": [4, 41]}},
        [Answer("house", 4), Answer("house", 41)],
        "",
    ),
    "column": (".jsonl", QUESTION | {"answers": "house", "answer_start": 41}, [Answer("house", 41)], ""),
    "table": (".csv", QUESTION | {"answers": "house", "answer_start": "41"}, [Answer("house", 41)], ""),
    "float": (".jsonl", QUESTION | {"answers": {"text": ["Rome"], "answer_start": [13.0]}}, ROME, ""),
    "texts of numbers": (".jsonl", QUESTION | {"answers": {"text": ["Rome"], "answer_start": ["13"]}}, ROME, ""),
    "json in a table": (".csv", QUESTION | {"answers": '{"text": ["Rome"], "answer_start": [13]}'}, ROME, ""),
    "python in a table": (".csv", QUESTION | {"answers": "{'text': ['Rome'], 'answer_start': [13]}"}, ROME, ""),
    "numpy in a table": (
        ".csv",
        QUESTION | {"answers": "{'text': array(['Rome'], dtype=object), 'answer_start': array([13], dtype=int32)}"},
        ROME,
        "",
    ),
    "a year": (".jsonl", QUESTION | {"context": "in 1990 .", "answers": 1990}, [Answer("1990", 3)], LOCATED[:20]),
    "emptied": (
        ".jsonl",
        QUESTION | {"answers": {"text": [""], "answer_start": [-1]}},
        [],
        "1 question with an empty answer at a negative start, read as without an answer",
    ),
    "nested": (
        ".json",
        {"data": [{"paragraphs": [{"context": CONTEXT, "qas": [NESTED]}]}]},
        ROME,
        LOCATED.format("question 7"),
    ),
    "cmrc": (".json", [{"context_text": CONTEXT, "qas": [CMRC]}], ROME, LOCATED.format("question T_1")),
}


def write_as(path: Path, content: Any) -> str:
    """Write one row as a line of .jsonl or a table of .csv, or any value as .json."""
    if path.suffix == ".csv":
        quoted = [
            ['"' + str(cell).replace('"', '""') + '"' for cell in cells] for cells in zip(*content.items(), strict=True)
        ]
        return str(write_file(path, "\n".join(",".join(line) for line in quoted) + "\n"))
    return str(write_file(path, json.dumps(content, ensure_ascii=False) + "\n"))


@pytest.mark.parametrize("name", QUESTION_FILES)
def test_answers_are_read_in_the_forms_of_files(name, tmp_path):
    ending, content, answers, note = QUESTION_FILES[name]
    (row,) = rows = read_questions(write_as(tmp_path / f"x{ending}", content))
    assert row.values["answers"] == answers
    assert any(found.startswith(note) for found in [*rows.notes, ""])


@pytest.mark.parametrize("encoding", ["utf-16", "gb18030"])
def test_questions_are_read_in_another_encoding(encoding, tmp_path):
    content = squad(GOOD | {"id": "问"}).encode(encoding)
    name = str(write_file(tmp_path / "x.json", content))
    assert [row.id for row in read_questions(name, options=FileOptions(encoding=encoding))] == ["问"]
    with pytest.raises(DataError, match="encoding"):
        read_questions(name)


def test_answers_of_a_parquet_file_are_structs(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist([QUESTION | {"answers": {"text": ["Rome"], "answer_start": [13]}}])
    parquet.write_table(table, tmp_path / "x.parquet")
    assert read_questions(str(tmp_path / "x.parquet"))[0].values["answers"] == ROME


FACE = "\U0001f600 the Café"  # an emoji counts two in UTF-16
WRONG = {  # context, answer, start, the end of the message
    "utf-16": (FACE, "Café", 7, "that is at 6-10: these count UTF-16 units"),
    "bytes": (FACE, "Café", 9, "that is at 6-10: these count UTF-8 bytes"),
    "from 1": (CONTEXT, "Rome", 14, "that is at 13-17: these count from 1"),
    "form": (FACE, "CAFE\u0301", 6, "at 6-10 it has 'Café', which differs in case, white space or Unicode form"),
    "nowhere": (CONTEXT, "Ulm", 3, "that is nowhere in it"),
    "twice": (CONTEXT, "house", None, "the context has it 2 times, at 4, 41: say which by 'answer_start'"),
    "another case": (CONTEXT, "rome", None, "is nowhere in the context; at 13-17 it has 'Rome'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_answer_that_is_not_in_its_place_names_the_true_one(name, tmp_path):
    context, text, start, reason = WRONG[name]
    answer = {"text": text, "answer_start": start}
    with pytest.raises(DataError) as caught:
        read_questions(write_as(tmp_path / "x.jsonl", QUESTION | {"context": context, "answers": [answer]}))
    assert reason in str(caught.value)


def squad(*entries: Any) -> str:
    data = {"data": [{"paragraphs": [{"context": CONTEXT, "qas": list(entries)}]}]}
    return json.dumps(data, ensure_ascii=False)


GOOD = {"question": "where ?", "answers": [{"text": "Rome", "answer_start": 13}]}


def test_bad_questions_of_squad_are_skipped_by_question(tmp_path):
    entries = [GOOD | {"id": "a"}, GOOD | {"id": "b", "question": " "}, "none", GOOD | {"id": "a"}]
    entries += [{"id": "e", "question": "who ?", "answers": [{"text": "Anna", "answer_start": 3}]}, GOOD | {"id": "f"}]
    name = str(write_file(tmp_path / "x.json", squad(*entries)))
    rows = read_questions(name, options=FileOptions(bad_rows="skip"))
    assert [row.id for row in rows] == ["a", "f"]
    assert [(row.id, row.line) for row in rows.left_out] == [("b", 2), ("3", 3), ("a", 4), ("e", 5)]
    assert rows.notes[-1].startswith(f"4 of 6 rows left out: {name}: question b: 'question' is empty; and 3 more")


def test_every_question_gets_one_prediction(tmp_path, capsys):
    train = squad(*(GOOD | {"id": str(i)} for i in range(8)))
    settings = settings_for("question-answering", tmp_path, train, "train.json", question_answering__doc_stride=4)
    run(settings | {"data.validation": settings["data.train"]}, capsys)
    source = write_file(tmp_path / "new.json", squad(GOOD | {"id": 5}, GOOD | {"id": "x", "question": ""}))
    found = predictions(settings["run.folder"], source)
    assert [row["id"] for row in found] == ["5", "x"]
    assert found[1] == {"id": "x", "answer": None, "reason": "'question' is empty"}
    assert evaluation(settings["run.folder"], source)["left_out"] == 1


def test_answers_that_cannot_be_learned_or_predicted_are_counted(tmp_path, capsys):
    long = " ".join(["cat", "dog"] * 20)
    rows = [QUESTION | {"id": str(i), "context": long, "answers": [{"text": long, "answer_start": 0}]} for i in "1234"]
    settings = settings_for("question-answering", tmp_path, rows, question_answering__doc_stride=4)
    settings |= {"data.validation": settings["data.train"]}
    printed = dry_run(settings, capsys)
    assert printed.count("4 of 4 answers are whole in no window: raise data.max_length or question_answering.") == 2
    assert printed.count("4 of 4 answers have more tokens than question_answering.max_answer_length = 30") == 2


# Relations

TOKENS = ["Anna", "Lee", "likes", "Rome", "."]
RELATION_ROWS = {  # name -> (row, subject, object, types)
    "tacred": (
        {"token": TOKENS, "subj_start": 0, "subj_end": 1, "obj_start": 3, "obj_end": 3, "subj_type": "PER"},
        ("Anna Lee", "Rome", "PER"),
    ),
    "opennre": (
        {"text": "Anna likes Rome .", "h": {"name": "Anna", "pos": [0, 4]}, "t": {"name": "Rome", "pos": [11, 15]}},
        ("Anna", "Rome", ""),
    ),
    "opennre tokens": (
        {"token": TOKENS, "h": {"name": "anna lee", "pos": [0, 2]}, "t": {"name": "rome", "pos": [3, 4]}},
        ("Anna Lee", "Rome", ""),
    ),
    "fewrel": (
        {"tokens": TOKENS, "h": ["anna lee", "Q1", [[0, 1]]], "t": ["rome", "Q2", [[3]]]},
        ("Anna Lee", "Rome", ""),
    ),
    "semeval": ({"sentence": "<e1>Anna</e1> likes <e2>Rome</e2>."}, ("Anna", "Rome", "")),
    "marks in brackets": ({"text": "[E2] Rome [/E2] is liked by [E1]Anna[/E1]"}, ("Anna", " Rome ", "")),
    "klue": (
        {
            "sentence": "Anna likes Rome.",
            "subject_entity": {"word": "Anna", "start_idx": 0, "end_idx": 3, "type": "PER"},
            "object_entity": {"word": "Rome", "start_idx": 11, "end_idx": 14, "type": "LOC"},
        },
        ("Anna", "Rome", "PER"),
    ),
    "lower case": (
        {"text": "Anna likes Rome.", "h": {"name": "anna", "pos": [0, 4]}, "t": {"name": "rome", "pos": [11, 15]}},
        ("Anna", "Rome", ""),
    ),
    "head and tail": ({"text": "Anna likes Rome.", "head": "Anna", "tail": "Rome"}, ("Anna", "Rome", "")),
}


@pytest.mark.parametrize("name", RELATION_ROWS)
def test_relations_are_read_in_the_forms_of_files(name, tmp_path):
    row, (subject, obj, kind) = RELATION_ROWS[name]
    (read,) = rows = read_relations(
        write_as(tmp_path / "x.jsonl", row | {"relation": "likes(e1,e2)"}), label="relation"
    )
    found = [read.values[role].text_in(read.values["text"]) for role in ROLES]
    assert (*found, read.values["subject"].type) == (subject, obj, kind)
    assert [note.startswith("1 row read as ") for note in rows.notes] == [True]


BAD_RELATIONS = {
    "own text": (
        {"text": "Anna likes Rome", "subject": {"start": 0, "end": 3, "text": "Anna"}, "object": "Rome"},
        "the subject, 0 to 3, is not what it says: the text has 'Ann' at 0-3, not 'Anna'; that is at 0-4: ends are ex",
    ),
    "no entities": ({"text": "Anna likes Rome"}, "no column 'subject'; the columns are 'text', 'relation'; read are"),
    "outside": (
        {"token": TOKENS, "subj_start": 0, "subj_end": 5, "obj_start": 3, "obj_end": 3},
        "subj_start and subj_end, 0 and 5, are not a span of the 5 tokens",
    ),
    "several places": (
        {"tokens": TOKENS, "h": ["anna", "Q1", [[0], [2]]], "t": ["rome", "Q2", [[3]]]},
        "'h' is in the text 2 times: keep one of its places in 'pos'",
    ),
}


@pytest.mark.parametrize("name", BAD_RELATIONS)
def test_relations_that_are_not_right_say_why(name, tmp_path):
    row, reason = BAD_RELATIONS[name]
    with pytest.raises(DataError) as caught:
        read_relations(write_as(tmp_path / "x.jsonl", row | {"relation": "likes"}), label="relation")
    assert reason in str(caught.value)


def test_entities_without_their_last_letters_are_counted(tmp_path):
    places = {"subject": {"start": 0, "end": 3}, "object": {"start": 11, "end": 14}}
    rows: Content = [{"text": "anna likes rome .", **places}] * 2
    assert read_relations(str(write_file(tmp_path / "x.jsonl", rows))).notes == [
        "warning: 4 of 4 entities lack the last letter of a word, such as 'ann' at 0-3 (line 1): "
        "an end is one after the last character"
    ]


def test_spans_in_a_table_are_read(tmp_path):
    row = {"text": "Anna likes Rome.", "subject": '{"start": 0, "end": 4}', "object": "{'start': 11, 'end': 15}"}
    (read,) = read_relations(write_as(tmp_path / "x.csv", row))
    assert [read.values[role].text_in(read.values["text"]) for role in ROLES] == ["Anna", "Rome"]


def test_semeval_has_a_file_of_its_own(tmp_path):
    block = '{0}\t"The <e1>cat</e1> in the <e2>house</e2> ."\r\nContent-Container(e1,e2)\r\nComment: {0}\r\n\r\n'
    name = str(write_file(tmp_path / "TRAIN.TXT", block.format(8001) + block.format(8002)))
    rows = read_relations(name, label="relation")
    assert [(row.id, row.values["relation"]) for row in rows] == [
        (i, "Content-Container(e1,e2)") for i in ("8001", "8002")
    ]
    assert [rows[1].values[role].text_in(rows[1].values["text"]) for role in ROLES] == ["cat", "house"]
    write_file(tmp_path / "TRAIN.TXT", '1\t"<e1>a</e1> <e2>b</e2>"\nr\ns\n')
    with pytest.raises(DataError, match=r"TRAIN\.TXT:3: neither a number, a tab and a sentence, nor its relation: 's'"):
        read_relations(name, label="relation")


def test_a_label_that_means_no_relation_is_asked_about(tmp_path, capsys):
    row = {"text": "anna likes rome .", "subject": "anna", "object": "rome"}
    rows = [row | {"relation": name} for name in ("Other", "likes")] * 4
    printed = dry_run(settings_for("relation-extraction", tmp_path, rows), capsys)
    assert "no label is 'no_relation', so F1 counts 'Other' as a relation" in printed
    named = settings_for("relation-extraction", tmp_path, rows, relation_extraction__no_relation_label="Other")
    assert "counts 'Other' as a relation" not in dry_run(named, capsys)


# Conversations


def say(*contents: Any, keys: tuple[str, str] = ("role", "content"), roles: tuple[str, ...] = ("user", "assistant")):
    return [{keys[0]: roles[i % len(roles)], keys[1]: content} for i, content in enumerate(contents)]


SHAREGPT = {"keys": ("from", "value"), "roles": ("human", "gpt")}
TALK = [("user", "red ?"), ("assistant", "blue .")]
CONVERSATIONS = {
    "sharegpt": ({"conversations": say("red ?", "blue .", **SHAREGPT)}, TALK),
    "sharegpt with a system": (
        {"system": "be kind", "conversations": say("red ?", "blue .", **SHAREGPT)},
        [("system", "be kind"), *TALK],
    ),
    "names of models": ({"messages": say("red ?", "blue .", roles=("Human", "ChatGPT"))}, TALK),
    "developer": ({"messages": [*say("be kind", roles=("developer",)), *say("red ?", "blue .")]}, None),
    "parts": ({"messages": say([{"type": "text", "text": "red "}, {"type": "text", "text": "?"}], "blue .")}, TALK),
    "completion": ({"prompt": "red ?", "completion": "blue ."}, TALK),
    "lists of turns": ({"prompt": say("red ?"), "completion": say("blue .", roles=("assistant",))}, TALK),
    "alpaca": ({"instruction": "red ?", "input": "", "output": "blue ."}, TALK),
    "alpaca with an input": (
        {"instruction": "which ?", "input": "the sky", "output": "blue ."},
        [("user", "which ?\nthe sky"), ("assistant", "blue .")],
    ),
    "alpaca with a history": (
        {"instruction": "red ?", "output": "blue .", "history": [["a", "b"]], "system": "be kind"},
        [("system", "be kind"), ("user", "a"), ("assistant", "b"), *TALK],
    ),
    "dolly": ({"instruction": "red ?", "context": "", "response": "blue ."}, TALK),
    "answer": ({"question": "red ?", "answer": "blue ."}, TALK),
    "texts": ({"dialog": ["red ?", "blue ."]}, TALK),
    "exchanges": ({"conversation": [{"human": "red ?", "assistant": "blue ."}]}, TALK),
    "table": ({"conversations": {"from": ["human", "gpt"], "value": ["red ?", "blue ."]}}, TALK),
    "text": ({"messages": json.dumps(say("red ?", "blue ."))}, TALK),
    "last question": ({"messages": say("red ?", "blue .", "and ?")}, TALK),
    "empty system": ({"messages": [*say(" ", roles=("system",)), *say("red ?", "blue .")]}, TALK),
}


def turns_of(rows: Rows) -> list[Any]:
    return [[tuple(turn) for turn in row.values["messages"]] for row in rows]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_read_in_the_forms_of_files(name, tmp_path):
    row, expected = CONVERSATIONS[name]
    rows = read_dialogues(write_as(tmp_path / "x.jsonl", row), "messages", True)
    assert turns_of(rows) == [expected or [("system", "be kind"), *TALK]]
    changed = {"last question": "a last turn of the user's", "empty system": "an empty turn of the system"}
    assert len(rows.notes) == ("messages" not in row or name in changed)
    assert (
        changed.get(name, "the conversations are those of the column")
        in (*rows.notes, changed.get(name, "the conv" + "ersations are those of the column"))[0]
    )
    if name != "last question":
        asked = read_dialogues(str(tmp_path / "x.jsonl"), "messages", False)
        assert turns_of(asked) == [(expected or [("system", "be kind"), *TALK])[:-1]]


BAD_TALKS = {
    "tool": (
        say("red ?", "blue .", "x", "fine", roles=("user", "assistant", "tool", "assistant")),
        "turn 3 of 'messages' has the role 'tool'; the roles are user, assistant and system; calls of tools and their",
    ),
    "call": (
        [*say("red ?"), {"role": "assistant", "content": None, "tool_calls": [{}]}],
        "turn 2 of 'messages' is a call",
    ),
    "image": (
        say([{"type": "image_url", "image_url": {}}], "blue ."),
        "turn 1 of 'messages' has a part of type 'image_url'",
    ),
    "twice": (say("red ?", "and ?", "x", roles=("user", "user", "assistant")), "roles take turns: join the two"),
    "weight": (
        [*say("red ?"), {"role": "assistant", "content": "no", "weight": 0}, *say("and ?", "blue .")],
        "turn 2 of 'messages' has weight = 0, but every reply is learned",
    ),
}


def test_conversations_that_are_not_read_can_be_skipped(tmp_path):
    rows = [{"id": name, "messages": turns} for name, (turns, _) in BAD_TALKS.items()] + [
        {"id": 1, "messages": ["a", "b"]}
    ]
    name = str(write_file(tmp_path / "x.jsonl", rows))
    with pytest.raises(DataError) as caught:
        read_dialogues(name, "messages", True)
    assert all(
        reason in line for line, (_, reason) in zip(str(caught.value).split("\n"), BAD_TALKS.values(), strict=True)
    )
    read = read_dialogues(name, "messages", True, options=FileOptions(bad_rows="skip"))
    assert [row.id for row in read] == ["1"]
    assert [row.id for row in read.left_out] == [*BAD_TALKS]


RELATION = {"text": "anna likes rome .", "subject": "anna", "object": "rome"}
EMPTY_ROWS = {  # rows to train on, rows to predict, what is null
    "relation-extraction": (
        [RELATION | {"relation": name} for name in ("no_relation", "likes")] * 4,
        [RELATION, RELATION | {"text": ""}],
        {"relation": None, "reason": "'text' is empty"},
    ),
    "dialogue": (
        [{"prompt": "red ?", "completion": "blue"}] * 8,
        [{"prompt": "red ?"}, {"prompt": " "}],
        {"text": None, "reason": "turn 1 of 'prompt' is empty"},
    ),
    "causal-lm": (
        [{"text": "the cat"}] * 8,
        [{"text": ""}, {"text": " "}],  # an empty prompt is continued
        {"text": None, "reason": "'text' is empty"},
    ),
}


@pytest.mark.parametrize("task", EMPTY_ROWS)
def test_every_row_gets_one_prediction(task, tmp_path, capsys):
    train, new, expected = EMPTY_ROWS[task]
    generate = {} if task == "relation-extraction" else {"generate__max_new_tokens": 2}
    settings = settings_for(task, tmp_path, train, train__max_steps=1, **generate)
    run(settings, capsys)
    found = predictions(settings["run.folder"], write_file(tmp_path / "new.jsonl", new))
    assert [row["id"] for row in found] == ["1", "2"]
    assert found[0][next(iter(expected))] is not None
    assert found[1] == {"id": "2", **expected}


def test_what_turns_say_of_themselves_is_counted_or_named(tmp_path):
    reply = {"role": "assistant", "content": "blue .", "weight": 1, "thinking": "sky", "name": None}
    rows = read_dialogues(write_as(tmp_path / "x.jsonl", {"messages": [*say("red ?"), reply]}), "messages", True)
    assert rows.notes == ["1 of 1 conversations: 'thinking' of their turns is not read"]
    with pytest.raises(DataError, match=r"turn 2 of 'instruction' and 'output' should be text, not \['a', 'b'\]"):
        read_dialogues(write_as(tmp_path / "y.jsonl", {"instruction": "red ?", "output": ["a", "b"]}), "messages", True)


def test_columns_that_are_no_conversation_are_named(tmp_path):
    with pytest.raises(
        DataError, match=r"no column 'messages'.* 'body'; read are columns of turns, such as 'messages' or"
    ):
        read_dialogues(write_as(tmp_path / "x.jsonl", {"body": "a"}), "messages", True)


def test_replies_longer_than_can_be_written_are_counted(tmp_path, capsys):
    rows: Content = [{"conversations": say("red ?", "the cat saw a dog", **SHAREGPT)}] * 4
    settings = settings_for("dialogue", tmp_path, rows, generate__max_new_tokens=3)
    printed = dry_run(settings | {"data.validation": settings["data.train"]}, capsys)
    assert "train.jsonl: the conversations are those of the column 'conversations'" in printed
    assert printed.count("4 of 4 last replies are longer than generate.max_new_tokens = 3") == 2


# Pairs

PAIRS = [{"source": "the cat", "target": " ".join(["red"] * 9)}] * 4


def test_targets_longer_than_can_be_written_are_counted(tmp_path, capsys):
    settings = settings_for("translation", tmp_path, PAIRS, generate__max_new_tokens=8, seq2seq__max_target_length=9)
    printed = dry_run(settings | {"data.validation": settings["data.train"]}, capsys)
    assert (
        printed.count("4 of 4 targets are longer than generate.max_new_tokens = 8: their ends are never written") == 2
    )
    assert printed.count("4 of 4 targets truncated to seq2seq.max_target_length = 9, 10.0% of all tokens lost") == 2


@pytest.mark.parametrize(
    ("task", "rows", "hint"),
    [
        (
            "summarization",
            {"article": "a", "highlights": "b"},
            'data.text_column = "article" and data.label_column = "h',
        ),
        (
            "translation",
            {"translation": {"en": "a", "de": "b"}},
            'data.text_column = "translation.en" and data.label_c',
        ),
        (
            "translation",
            {"id": 1, "en": "a", "de": "b"},
            'data.text_column = "en" and data.label_column = "de" would read it',
        ),
        (
            "relation-extraction",
            {"text": "a", "spo_list": []},
            "a row has one pair of entities and their relation, so that",
        ),
        ("causal-lm", {"prompt": "a", "completion": "b"}, 'these are conversations, which run.task = "dialogue" reads'),
        ("causal-lm", {"messages": say("a", "b")}, 'these are conversations, which run.task = "dialogue" reads'),
    ],
)
def test_columns_of_public_data_sets_are_recognised(task, rows, hint, tmp_path, capsys):
    with pytest.raises(DataError) as caught:
        dry_run(settings_for(task, tmp_path, [rows] * 4), capsys)
    assert hint in str(caught.value)


def test_another_ending_of_texts_says_the_format(tmp_path):
    name = str(write_file(tmp_path / "x.md", "a\nb\n"))
    with pytest.raises(DataError, match="'text' reads a text a line, as of a "):
        read_texts(name, "text")
    assert len(read_texts(name, "text", options=FileOptions(format="text"))) == 2


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("x.en", "auto", r"together are read as '.*x' with data.format = 'parallel'"),
        ("x.en", "parallel", r"reads .*x.en.en and .*x.en.de, so that the name is '.*x' here"),
    ],
)
def test_one_of_two_parallel_files_says_how_both_are_read(name, format, message, tmp_path):
    for language in ("en", "de"):
        write_file(tmp_path / f"x.{language}", "a\nb\n")
    with pytest.raises(DataError, match=message):
        read_pairs(str(tmp_path / name), "en", "de", options=FileOptions(format=format))


def test_parallel_files_may_be_compressed_and_copies_are_counted(tmp_path, capsys):
    for language in ("en", "de"):
        write_file(tmp_path / f"x.{language}.gz", gzip.compress(b"the cat\nred\nblue\ngreen\n"))
    columns = {"data__format": "parallel", "data__text_column": "en", "data__label_column": "de"}
    printed = dry_run(settings_for("summarization", tmp_path, tmp_path / "x", **columns), capsys)
    assert "warning: 3 of 3 targets are the source itself" in printed


def test_nested_columns_are_read_and_predicted(tmp_path, capsys):
    rows: Content = [{"translation": {"en": f"the cat {i % 3}", "de": "red"}} for i in range(12)]
    columns = {"data__text_column": "translation.en", "data__label_column": "translation.de"}
    settings = settings_for("translation", tmp_path, rows, generate__max_new_tokens=2, **columns)
    run(settings, capsys)
    source = write_file(tmp_path / "new.jsonl", [*rows[:2], {"translation": {"en": " "}}])
    found = predictions(settings["run.folder"], source)
    assert [row["id"] for row in found] == ["1", "2", "3"]
    assert found[2] == {"id": "3", "text": None, "reason": "'translation.en' is empty"}


def test_a_bad_line_of_one_parallel_file_leaves_out_its_pair(tmp_path):
    write_file(tmp_path / "x.en", b"a\r\nb\xff\r\nc\r\nd\r\n")
    write_file(tmp_path / "x.de", "\ufeffä\nb\n\nd\n")
    skip = FileOptions(format="parallel", bad_rows="skip")
    rows = read_pairs(str(tmp_path / "x"), "en", "de", options=skip)
    assert [(row.id, row.values["en"], row.values["de"]) for row in rows] == [("1", "a", "ä"), ("4", "d", "d")]
    assert [row.id for row in rows.left_out] == ["2", "3"]


# BLEU


@pytest.mark.parametrize(
    ("setting", "note"),
    [
        ("auto", "BLEU: sacrebleu's tokenizer 13a, by the script of most targets"),
        ("intl", "BLEU: sacrebleu's tokenizer intl, as eval.bleu_tokenizer says"),
        ("none", "BLEU: sacrebleu's tokenizer none, as eval.bleu_tokenizer says"),
    ],
)
def test_bleu_uses_the_tokenizer_that_is_named(setting, note, tmp_path, capsys):
    pytest.importorskip("sacrebleu")
    settings = settings_for("translation", tmp_path, PAIRS, eval__bleu_tokenizer=setting, train__max_steps=1)
    settings |= {"data.validation": settings["data.train"]}
    assert note in dry_run(settings, capsys)
    if setting == "intl":
        run(settings, capsys)
        evaluation(settings["run.folder"], Path(settings["data.train"]))
        assert "|tok:intl|" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "tokenizer", "message"),
    [
        (
            "translation",
            "ja-mecab",
            "eval.bleu_tokenizer = 'ja-mecab' needs further packages: pip install 'sacrebleu[ja]'",
        ),
        ("summarization", "zh", "eval.bleu_tokenizer = 'zh' has no effect on summarization: leave it out"),
    ],
)
def test_bleu_tokenizers_that_cannot_be_used_are_refused(task, tokenizer, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "MeCab", None)
    with pytest.raises(ConfigError) as caught:
        run(settings_for(task, tmp_path, PAIRS, eval__bleu_tokenizer=tokenizer), capsys)
    assert message in str(caught.value)
