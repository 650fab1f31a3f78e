"""Relations: files with two entities in a text, and markers that no truncation loses."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from data import DataError
from data.errors import ErrorList
from data.relation_extraction import ROLES, Entity, encode_relations, mark_entities, read_relations
from data.row import Row

SAMPLES = "package:data/samples/relations"
GOOD = {"text": "Ann lives in Ulm.", "subject": {"start": 0, "end": 3, "type": "person"}, "relation": "lives_in"}
GOOD |= {"object": {"start": 13, "end": 16, "type": "city"}}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def entities_of(rows: list[Row]) -> list[tuple[Entity, Entity]]:
    return [(row.values["subject"], row.values["object"]) for row in rows]


# Files


def test_spans_are_read_with_or_without_types(tmp_path):
    bare = GOOD | {"subject": {"start": 0, "end": 3}, "object": {"start": 13, "end": 16, "type": None}}
    checked = GOOD | {"subject": {"start": 0, "end": 3, "text": "Ann"}}
    rows = read_relations(str(write(tmp_path / "x.jsonl", [GOOD, bare, checked])), label="relation")
    subject, city = Entity(0, 3, "person"), Entity(13, 16, "city")
    assert entities_of(rows) == [(subject, city), (Entity(0, 3), Entity(13, 16)), (Entity(0, 3), city)]
    assert [entity.text_in(rows[0].values["text"]) for entity in entities_of(rows)[0]] == ["Ann", "Ulm"]


TRIPLES = [  # text, subject, object, where they stand
    ("Ann lives in Ulm.", "Ann", "Ulm", [(0, 3), (13, 16)]),
    ("Ulm is where Ann lives", "Ann", "Ulm", [(13, 16), (0, 3)]),
    ("The University of Ulm, Ulm", "University of Ulm", "Ulm", [(4, 21), (23, 26)]),
    ("Anna met Ann", "Ann", "Anna", [(9, 12), (0, 4)]),  # a part of a word is not the word
    ("In Parisian cafés Paris waits for Ann", "Paris", "Ann", [(18, 23), (34, 37)]),
    ("陈若兰出生于青溪镇。", "陈若兰", "青溪镇", [(0, 3), (6, 9)]),
    ("IBM公司在北京", "IBM", "北京", [(0, 3), (6, 8)]),
    ("C++ (by Bjarne)", "Bjarne", "C++", [(8, 14), (0, 3)]),
    ("a.b?c and a*b", "a*b", "a.b?c", [(10, 13), (0, 5)]),  # no patterns
]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
@pytest.mark.parametrize("column", ["text", "sentence"])
def test_triples_find_their_strings_in_the_sentence(tmp_path, kind, column):
    path = tmp_path / f"triples.{kind}"
    rows = [{column: t, "subject": s, "object": o, "relation": "r", "object_type": "thing"} for t, s, o, _ in TRIPLES]
    if kind == "jsonl":
        write(path, rows)
    else:
        separator, quote = {"csv": (",", '"'), "tsv": ("\t", "")}[kind]
        lines = [[*rows[0]], *([f"{quote}{value}{quote}" for value in row.values()] for row in rows)]
        path.write_text("\n".join(separator.join(line) for line in lines), encoding="utf-8")
    read = read_relations(str(path), label="relation")
    assert [[(e.start, e.end) for e in pair] for pair in entities_of(read)] == [places for *_, places in TRIPLES]
    assert {(a.type, b.type) for a, b in entities_of(read)} == {("", "thing")}


def test_text_column_has_precedence_over_sentence(tmp_path):
    path = str(write(tmp_path / "x.jsonl", [GOOD | {"sentence": "another"}]))
    assert read_relations(path)[0].values["text"] == GOOD["text"]
    (row,) = read_relations(
        str(write(tmp_path / "y.jsonl", [GOOD | {"body": "Eve lives in Rom.", "text": 7}])), text="body"
    )
    assert (row.values["subject"].text_in(row.values["body"]), row.values["object"].text_in(row.values["body"])) == (
        "Eve",
        "Rom",
    )


BAD = [  # what is other than in GOOD, and the reason
    ({"subject": {"start": 0, "end": 40}}, "the subject, 0 to 40, is outside the text, which has 17 characters"),
    ({"subject": {"start": -3, "end": 3}}, "the subject, -3 to 3, is outside the text"),
    ({"object": {"start": 18, "end": 19}}, "the object, 18 to 19, is outside the text"),
    ({"subject": {"start": 3, "end": 1}}, "the subject, 3 to 1, is outside the text"),
    ({"subject": {"start": 3, "end": 3}}, "the subject, 3 to 3, is empty"),
    ({"subject": {"start": 3, "end": 4}}, "the subject, 3 to 4, is empty"),
    ({"subject": {"start": 0, "end": 14}}, "the subject, 0 to 14, and the object, 13 to 16, overlap"),
    ({"subject": {"start": 13, "end": 16}}, "the subject, 13 to 16, and the object, 13 to 16, overlap"),
    ({"subject": {"start": 15, "end": 17}}, "the subject, 15 to 17, and the object, 13 to 16, overlap"),
    ({"subject": {"start": 12, "end": 14}}, "the subject, 12 to 14, and the object, 13 to 16, overlap"),
    (
        {"subject": {"start": 0}},
        "the subject should have a 'start' and an 'end', both whole numbers, not {'start': 0}",
    ),
    ({"subject": {"start": "0", "end": 3}}, "the subject should have a 'start' and an 'end'"),
    ({"subject": {"start": False, "end": 3}}, "the subject should have a 'start' and an 'end'"),
    ({"subject": {"start": 0.0, "end": 3}}, "the subject should have a 'start' and an 'end'"),
    ({"subject": {"start": 0, "end": 3, "type": 7}}, "the type of the subject should be text, not 7"),
    (
        {"subject": {"start": 1, "end": 4, "text": "Ann"}},
        "the subject, 1 to 4, is not what it says: the text has 'nn ' at 1-4, not 'Ann'; that is at 0-3",
    ),
    ({"subject": [0, 3]}, "'subject' should be {'start', 'end', 'type'} or a string of the text, not [0, 3]"),
    ({"subject": 7}, "'subject' should be {'start', 'end', 'type'} or a string of the text, not 7"),
    ({"subject": None}, "column 'subject' is null"),
    ({"subject": " "}, "the subject is empty"),
    ({"subject": "Bob"}, "the subject 'Bob' is not in the text"),
    ({"subject": "li"}, "the subject 'li' is only as a part of a longer word in the text"),
    ({"subject": "Ulm"}, "the subject 'Ulm' is only within the other entity in the text"),
    ({"subject": "n", "text": "n lives in n or Ulm"}, "the subject 'n' is in the text 2 times, at 0 and 11: say which"),
    ({"subject": "Ann", "subject_type": ["x"]}, "'subject_type' should be text, not ['x']"),
    ({"text": ""}, "'text' is empty"),
    ({"text": ["Ann", "Ulm"]}, "'text' should be text, not ['Ann', 'Ulm']"),
    ({"relation": " "}, "the label in 'relation' is empty"),
    ({"relation": ["a", "b"]}, "a label should be text or a number, not ['a', 'b']"),
    ({"relation": None}, "column 'relation' is null"),
]


def errors_of(path: Path, rows: list[dict]) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_relations(str(write(path, rows)), label="relation")
    return str(caught.value).split("\n")


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_f13_a_bad_row_is_named_by_line_and_reason(tmp_path, change, reason):
    path = tmp_path / "bad.jsonl"
    errors = errors_of(path, [GOOD, GOOD | change, GOOD])
    assert errors[0].startswith(f"{path}:2: {reason}")
    assert all(error.startswith(f"{path}:2: ") for error in errors)


def test_f13_all_bad_rows_are_reported_together_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(ErrorList, "SHOWN_OF_KIND", 20)
    path = tmp_path / "bad.jsonl"
    errors = errors_of(path, [GOOD, *(GOOD | change for change, _ in BAD[:17])])
    assert [error.partition(": ")[0] for error in errors] == [f"{path}:{line}" for line in range(2, 19)]


@pytest.mark.parametrize("missing", ["text", "subject", "object", "relation"])
def test_a_missing_column_is_named(tmp_path, missing):
    (error, *_) = errors_of(tmp_path / "x.jsonl", [{k: v for k, v in GOOD.items() if k != missing}])
    assert f"'{missing}'" in error


def test_the_sample_is_what_its_readme_says():
    rows = {name: read_relations(f"{SAMPLES}/{name}.jsonl", label="relation") for name in ("train", "validation")}
    assert [len(part) for part in rows.values()] == [320, 108]
    every = [row for part in rows.values() for row in part]
    assert len({row.values["text"] for row in every}) == len({row.id for row in every}) == len(every)
    assert sum(any("\u4e00" <= c <= "\u9fff" for c in row.values["text"]) for row in every) == 56
    counts = Counter(row.values["relation"] for row in every)
    assert counts.pop("no_relation") == 84
    assert len(counts) == 8
    assert {*counts.values()} == {42, 43, 44}
    named = [{row.values[r].text_in(row.values["text"]) for row in part for r in ROLES} for part in rows.values()]
    assert not named[0] & named[1]
    assert all(row.values[role].type for row in every for role in ROLES)


# Markers

MARKED = [
    ("Ann lives in Ulm.", (0, 3, "person"), (13, 16, "city"), "@ * person * Ann @ lives in # ^ city ^ Ulm # ."),
    ("Ulm likes Ann", (10, 13, ""), (0, 3, ""), "# Ulm # likes @ Ann @"),
    ("陈若兰生于青溪镇。", (0, 3, "PER"), (5, 8, "LOC_TOWN"), "@ * per * 陈若兰 @ 生于 # ^ loc town ^ 青溪镇 # 。"),
    ("北京大学", (2, 4, ""), (0, 2, ""), "# 北京 # @ 大学 @"),
    ("x@y # z", (0, 1, ""), (6, 7, ""), "@ x @ @y # # z #"),
    ("so Ann  Ulm", (2, 7, ""), (8, 11, ""), "so @ Ann @ # Ulm #"),
]


@pytest.mark.parametrize(("text", "subject", "obj", "expected"), MARKED)
def test_entities_are_marked_by_role_and_type(text, subject, obj, expected):
    found, places = mark_entities(text, Entity(*subject), Entity(*obj))
    assert found == expected
    assert [(found[start], found[end - 1]) for start, end in places] == [("@", "@"), ("#", "#")]


CORPUS = ["@ * person * Ann @ was born in # ^ city ^ Ulm # .", "陈若兰 出生 于 青溪镇", "the old man of the sea"] * 20


def make_tokenizer(kind: str) -> Tokenizer:
    """Return a small tokenizer of one family of models."""
    letters = sorted({c for text in CORPUS for c in text.lower() if not c.isspace()})
    if kind == "bert":
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters), "person", "city"]
        tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    elif kind in ("gpt2", "roberta"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
        tokenizer.train_from_iterator(CORPUS, trainer)
        if kind == "roberta":
            tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=False)
        else:
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
        tokenizer.train_from_iterator(CORPUS, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


@pytest.fixture(scope="module", params=["bert", "roberta", "gpt2", "t5"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return make_tokenizer(request.param)


def random_rows(count: int, seed: int) -> list[Row]:
    """Return texts with odd characters and marks, and two entities anywhere in each, some of them long."""
    rng = random.Random(seed)
    words = [
        "Ann",
        "was",
        "born",
        "in",
        "Ulm",
        "@",
        "#",
        "a@b",
        "*^",
        "陈若兰",
        "出生",
        "🎉",
        "e\u0301té",
        "the sea,",
        "\u200b",
    ]
    rows = []
    for i in range(count):
        text = rng.choice(["", " "]).join(rng.choice(words) for _ in range(rng.randint(4, 40)))
        while True:
            a, b, c, d = sorted(rng.choices(range(len(text) + 1), k=4))
            if text[a:b].strip() and text[c:d].strip():
                break
        spans = rng.sample([Entity(a, b, rng.choice(["", "person"])), Entity(c, d, "city")], 2)
        rows.append(Row(f"r{i}", i + 1, {"text": text, "subject": spans[0], "object": spans[1]}))
    return rows


def is_part(part: list[int], whole: list[int]) -> bool:
    """Return whether `part` is a subsequence of `whole`."""
    left = iter(whole)
    return all(token in left for token in part)


@pytest.mark.parametrize("room", [2, 3, 7, 16, 40, 10_000])
def test_no_truncation_loses_a_marker(tokenizer, room):
    special = tokenizer.num_special_tokens_to_add(False)
    rows = random_rows(60, seed=room)
    examples = encode_relations(rows, tokenizer, max_length=special + room)
    whole = [
        tokenizer.encode(mark_entities(r.values["text"], r.values["subject"], r.values["object"])[0]) for r in rows
    ]
    ends = whole[0].ids[:1] * whole[0].special_tokens_mask[0], whole[0].ids[-1:] * whole[0].special_tokens_mask[-1]
    for i, encoding in enumerate(whole):
        kept = examples.sequence(i)
        assert len(kept) == min(len(encoding.ids), special + room)
        assert is_part(kept, encoding.ids)
        assert (kept[: len(ends[0])], kept[len(kept) - len(ends[1]) :]) == ends
        for mark_of_role, place in zip("@#", examples.markers[i], strict=True):
            token = tokenizer.id_to_token(kept[place])
            assert token.strip("Ġ▁") == mark_of_role
    assert examples.truncated == sum(len(encoding.ids) > special + room for encoding in whole)
    assert (examples.truncated == 0) == (room == 10_000)


def shown(text: str, subject: Entity, obj: Entity, max_length: int) -> str:
    """Return the tokens that are kept, in a vocabulary of whole words."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*"abcdefghijklmnopqrstuvwxyz@#*^", "[C]"])}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[C] $A", special_tokens=[("[C]", 30)])
    row = Row("x", 1, {"text": text, "subject": subject, "object": obj})
    examples = encode_relations([row], tokenizer, max_length=max_length)
    tokens = [tokenizer.id_to_token(i) for i in examples.sequence(0)]
    assert [tokens[place] for place in examples.markers[0]] == ["@", "#"]
    return "".join(tokens[1:])


@pytest.mark.parametrize(
    ("places", "max_length", "expected"),
    [
        ((10, 14), 27, "abcde@f@g#h#ijklmnopqrstuv"),  # all of it
        ((10, 14), 12, "de@f@g#h#ij"),  # a window around both
        ((0, 4), 12, "@a@b#c#defg"),  # at the ends of the text there is more on the other side
        ((42, 38), 12, "qrs#t#u@v@"),
    ],
)  # fmt: skip
def test_the_window_is_around_the_entities(places, max_length, expected):
    text = " ".join("abcdefghijklmnopqrstuv")
    found = shown(text, *(Entity(p, p + 1) for p in places), max_length)
    assert expected in found


def test_two_windows_where_the_entities_are_far_apart():
    text = " ".join("abcdefghijklmnopqrstuvwxyz")
    assert shown(text, Entity(4, 5), Entity(44, 45), 13) == "ab@c@dev#w#x"


def test_long_entities_are_truncated_and_share_the_window():
    text = " ".join("abcdefghijklmnopqrstuvwxyz")
    assert shown(text, Entity(0, 19), Entity(20, 39), 9) == "@abc#klm"


def test_no_room_for_two_markers_is_refused(tokenizer):
    special = tokenizer.num_special_tokens_to_add(False)
    with pytest.raises(DataError, match=f"data.max_length = {special + 1} has no room for two entities"):
        encode_relations(random_rows(1, 0), tokenizer, max_length=special + 1)


def test_tokenizer_without_marker_characters_is_refused():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    row = Row("x", 1, {"text": "a b", "subject": Entity(0, 1), "object": Entity(2, 3)})
    with pytest.raises(DataError, match="no token for the markers"):
        encode_relations([row], tokenizer, max_length=9)


def test_no_rows_make_no_examples(tokenizer):
    examples = encode_relations([], tokenizer, label="relation", labels=["a"], max_length=9)
    assert (len(examples), examples.markers.shape, examples.batch([]).markers.shape) == (0, (0, 2), (0, 2))


def test_the_fingerprint_sees_which_entity_is_the_subject(tokenizer):
    def fingerprint(subject: Entity, obj: Entity) -> str:
        row = Row("x", 1, {"text": "Ann met Bob", "subject": subject, "object": obj})
        return encode_relations([row], tokenizer, max_length=64).fingerprint()

    ann, bob = Entity(0, 3), Entity(8, 11)
    assert fingerprint(ann, bob) != fingerprint(bob, ann) != fingerprint(bob, Entity(0, 3, "person"))
