"""Words with tags: files, words of texts, and labels at the first token of a word (P10)."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from support.wordpiece import PIECES, VOCAB, odd_texts, write_vocab
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from data import DataError, load_tokenizer
from data.batch import IGNORE_INDEX
from data.formats.options import FileOptions
from data.row import Row
from data.tag_checks import check_tag_names, find_tag_names
from data.token_classification import encode_tagged, read_tagged
from data.words import TEXT, locate_words, split_words


def write(path: Path, content: str | list[dict]) -> str:
    if not isinstance(content, str):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_bytes(content.encode())
    return str(path)


def pairs(rows: list[Row]) -> list[list[tuple[str, str]]]:
    return [list(zip(row.values["tokens"], row.values["tags"], strict=True)) for row in rows]


def errors_of(name: str, label: str = "tags", **options) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_tagged(name, "tokens", label, **options)
    return str(caught.value).replace(name, "FILE").split("\n")


# Files

EXPECTED = [[("Ann", "B-PER"), ("Lee", "I-PER"), ("left", "O")], [("中国", "B-LOC"), ("1/2", "O")]]
FILES = {
    "spaces.conll": ("Ann NNP B-PER\nLee NNP I-PER\nleft VB O\n\n中国 NR B-LOC\n1/2 CD O\n", "auto"),
    "tabs.bio": ("Ann\tB-PER\nLee\tI-PER\nleft\tO\n\n\n中国\tB-LOC\n1/2\tO", "auto"),
    "odd.iob": (
        "\ufeff-DOCSTART- -X- O\r\n\r\nAnn  x  B-PER\r\nLee x I-PER\r\nleft x O\r\n \r\n中国 x B-LOC\r\n1/2 x O",
        "auto",
    ),
    "any.txt": ("-DOCSTART- O\nAnn B-PER\nLee I-PER\nleft O\n-DOCSTART- O\n中国 B-LOC\n1/2 O\n\n", "conll"),
    "slashes.txt": ("Ann/B-PER  Lee/I-PER left/O \n\n  中国/B-LOC  1/2/O\n", "word/tag"),
    "lists.jsonl": ([{"tokens": [w for w, _ in s], "tags": [t for _, t in s]} for s in EXPECTED], "auto"),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_sentences_are_read_from_every_kind_of_file(tmp_path, name):
    content, format = FILES[name]
    rows = read_tagged(write(tmp_path / name, content), "tokens", "tags", options=FileOptions(format=format))
    assert pairs(rows) == EXPECTED
    assert [row.id for row in rows] == ["1", "2"]


@pytest.mark.parametrize("name", FILES)
def test_words_are_read_without_their_tags(tmp_path, name):
    content, format = FILES[name]
    rows = read_tagged(write(tmp_path / name, content), "tokens", options=FileOptions(format=format))
    assert [row.values["tokens"] for row in rows] == [[word for word, _ in sentence] for sentence in EXPECTED]


def test_words_alone_are_read_for_predictions(tmp_path):
    rows = read_tagged(write(tmp_path / "x.conll", "Ann\nleft\n\nLee\n"), "tokens")
    assert [row.values["tokens"] for row in rows] == [["Ann", "left"], ["Lee"]]
    rows = read_tagged(
        write(tmp_path / "x.txt", "Ann left/VB\n1/2 x/y\n"), "tokens", options=FileOptions(format="word/tag")
    )
    assert [row.values["tokens"] for row in rows] == [["Ann", "left/VB"], ["1", "x"]]
    rows = read_tagged(write(tmp_path / "x.txt", "Ann left.\n\n中国 x\n"), "tokens", options=FileOptions(format="text"))
    assert [row.values["tokens"] for row in rows] == [["Ann", " left", "."], ["中", "国", " x"]]
    rows = read_tagged(write(tmp_path / "x.jsonl", [{"tokens": "Ann left."}]), "tokens")
    assert [row.values["tokens"] for row in rows] == [["Ann", " left", "."]]


def spans(text: str, *found: tuple[int, int, str]) -> dict:
    return {"tokens": text, "tags": [{"start": start, "end": end, "label": label} for start, end, label in found]}


@pytest.mark.parametrize(
    ("row", "scheme", "tags"),
    [
        (spans("Ann Lee left", (0, 7, "PER")), "auto", "B-PER I-PER O"),
        (spans("Ann Lee left", (0, 7, "PER")), "IOBES", "B-PER E-PER O"),
        (spans("Ann Lee left", (4, 7, "PER"), (0, 3, "PER")), "IOB1", "I-PER B-PER O"),
        (spans("江泽民访问中国。", (0, 3, "PER"), (5, 7, "LOC")), "auto", "B-PER I-PER I-PER O O B-LOC I-LOC O"),
        (spans("in 中国Beijing.", (3, 5, "LOC"), (5, 12, "LOC")), "auto", "O B-LOC I-LOC B-LOC O"),
        (spans(" Ann  left", (0, 5, " PER ")), "auto", "B-PER O"),  # spaces at the ends of a span are no words
        (spans("U.S. x", (0, 4, "LOC")), "auto", "B-LOC I-LOC I-LOC I-LOC O"),
        (spans("nothing"), "auto", "O"),
    ],
)
def test_spans_become_tags(tmp_path, row, scheme, tags):
    (found,) = read_tagged(write(tmp_path / "x.jsonl", [row]), "tokens", "tags", scheme=scheme)
    assert found.values["tags"] == tags.split()
    assert found.values[TEXT] == row["tokens"]


WRONG = [  # row of jsonl, the reason
    ({"tokens": [], "tags": []}, "'tokens' is empty"),
    ({"tokens": "  ", "tags": []}, "'tokens' is empty"),
    ({"tokens": 3, "tags": []}, "'tokens' should be a list of words, or a text, not 3"),
    ({"tokens": ["a", ""], "tags": ["O", "O"]}, "word 1 in 'tokens' should be text that is not empty, ''"),
    ({"tokens": ["a", 3], "tags": ["O", "O"]}, "word 1 in 'tokens' should be text that is not empty, 3"),
    ({"tokens": ["a", "b"], "tags": ["O"]}, "2 words in 'tokens', and 1 tag in 'tags'"),
    ({"tokens": ["a"], "tags": "O"}, "'tags' should be a list of tags, not 'O'"),
    ({"tokens": ["a"], "tags": [" "]}, "tag 0 in 'tags' should be text that is not empty, ' '"),
    ({"tokens": ["a"], "tags": [True]}, "tag 0 in 'tags' should be text that is not empty, True"),
    ({"tokens": ["a"], "tags": None}, "column 'tags' is null"),
    ({"tokens": ["a"]}, "no column 'tags'; this row has 'tokens'"),
    ({"tokens": ["a", "b"], "tags": ["O", "I-X"]}, "word 1: 'I-X' after 'O': in IOB2 an entity begins with 'B-X'"),
    ({"tokens": "ab", "tags": "O"}, "'tags' should be a list of spans of the text, not 'O'"),
    ({"tokens": "ab", "tags": ["O"]}, "a span should be an object with start, end and label, not 'O'"),
    (spans("Ann left", (0, 9, "X")), "ends outside the text, which has 8 characters"),
    (spans("Ann left", (3, 3, "X")), "should have whole numbers, start before end"),
    (spans("Ann left", (-1, 3, "X")), "should have whole numbers, start before end"),
    (spans("Ann left", (0.0, 3, "X")), "should have whole numbers, start before end"),
    (spans("Ann left", (0, 3, " ")), "should be text that is not empty"),
    (spans("Ann left", (3, 4, "X")), "has only spaces"),
    (spans("Ann left", (0, 2, "X")), "has only a part of the word 'Ann'"),
    (spans("Ann left", (0, 8, "X"), (4, 8, "Y")), "spans overlap: 'X' and 'Y' both have the word 'left'"),
]


def test_f13_all_that_is_wrong_in_jsonl_is_reported_by_line(tmp_path):
    good = {"tokens": ["a", "b"], "tags": ["B-X", "I-X"]}
    rows = [row for wrong, _ in WRONG for row in (good, wrong)]
    path = write(tmp_path / "x.jsonl", rows[:40])  # an error of at most 20 lines is shown whole
    for line, (_, reason) in zip(errors_of(path), WRONG[:20], strict=True):
        assert reason in line, line
    assert [line.split(":")[1] for line in errors_of(path)] == [str(i) for i in range(2, 41, 2)]
    for line, (_, reason) in zip(errors_of(write(tmp_path / "y.jsonl", rows[40:])), WRONG[20:], strict=True):
        assert reason in line, line


@pytest.mark.parametrize(
    ("content", "format", "expected"),
    [
        ("a O\nb I-X\nc B-X\nd B-Y\n", "conll", ["FILE:2: 'I-X' after 'O': in IOB2 an entity begins with 'B-X'"]),
        ("a O\nb x O\nc O\n", "conll", ["FILE:2: 3 columns, the lines before have 2"]),
        ("a\nb\n", "conll", ["FILE:1: no tag: 'a' is one column; a word and its tag are needed"]),
        ("a\tO\n\tO\nb\t\n", "conll", ["FILE:2: the word is empty", "FILE:3: the tag is empty"]),
        ("a B-X\nb PER\nc O\n", "conll", ["FILE:2: 'PER' is not a tag of IOB2"]),
        (
            "a/O b\n\n/O c/\nx/N\n",
            "word/tag",
            ["FILE:1: 'b' is not word/tag", "FILE:3: '/O' is not word/tag, and 1 more"],
        ),
        ("a/O\0\n", "word/tag", ["FILE:1: a NUL character"]),
        ("\n\n", "conll", ["FILE: no rows"]),
        ("", "word/tag", ["FILE: no rows"]),
        ("a text\n", "text", ["FILE: data.format = 'text' has no tags"]),
        ("tokens,b\nx,y\n", "csv", ["FILE:1: no column 'tags'"]),
        ("a O\n", "auto", ["FILE: the name does not tell its format"]),
    ],
)
def test_f13_what_is_wrong_in_lines_is_reported(tmp_path, content, format, expected):
    found = errors_of(write(tmp_path / "x.txt", content), options=FileOptions(format=format))
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start), line


def test_f13_bytes_that_are_no_utf8_and_files_that_are_none(tmp_path):
    path = tmp_path / "x.conll"
    path.write_bytes(b"a O\n\xff O\n")
    assert errors_of(str(path))[0].startswith("FILE:2: not UTF-8 at byte 0 of the line (0xff)")
    assert errors_of(str(tmp_path / "none.conll")) == ["FILE: no such file"]
    assert errors_of(str(tmp_path), options=FileOptions(format="conll")) == ["FILE: this is a folder; name a file"]


def test_the_scheme_of_the_recipe_is_kept_to(tmp_path):
    path = write(tmp_path / "x.conll", "a I-X\nb O\n")
    assert pairs(read_tagged(path, "tokens", "tags")) == [[("a", "I-X"), ("b", "O")]]  # IOB1, as found
    assert "in IOB2 an entity begins with 'B-X'" in errors_of(path, scheme="IOB2")[0]
    assert "in IOBES an entity begins with" in errors_of(path, scheme="IOBES")[0]
    read_tagged(path, "tokens", "tags", scheme="none")
    path = write(tmp_path / "x.jsonl", [spans("a", (0, 1, "X"))])
    assert errors_of(path, scheme="none") == [
        "FILE:1: spans of a text are entities: token_classification.tag_scheme cannot be none"
    ]


def test_labels_are_found_completed_or_declared(tmp_path):
    path = write(tmp_path / "x.conll", "a B-X\nb O\n\nc B-Y\nd I-Y\n")
    rows = read_tagged(path, "tokens", "tags")
    assert find_tag_names(path, rows, "tags", (), "auto") == ["B-X", "B-Y", "I-X", "I-Y", "O"]
    assert find_tag_names(path, rows, "tags", (), "none") == ["B-X", "B-Y", "I-Y", "O"]
    assert find_tag_names(path, rows, "tags", ("O", "B-X"), "auto") == ["O", "B-X"]
    with pytest.raises(DataError) as caught:
        check_tag_names(path, rows, "tags", ["O", "B-X", "B-Y"])
    assert str(caught.value) == f"{path}:5: unknown label 'I-Y'; the labels are 'O', 'B-X', 'B-Y'"
    rows = read_tagged(write(tmp_path / "y.conll", "a NN\n"), "tokens", "tags")
    with pytest.raises(DataError, match="all words have the tag 'NN'"):
        find_tag_names("y", rows, "tags", (), "auto")


def test_a_group_needs_columns(tmp_path):
    path = write(tmp_path / "x.conll", "a B-X\n")
    assert "needs columns" in errors_of(path, group="document")[0]
    path = write(tmp_path / "x.jsonl", [{"tokens": ["a"], "tags": ["O"]}])
    assert "no column 'document'" in errors_of(path, group="document")[0]


# Words of texts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's 3.5 km, Ann_1.", ["It", "'", "s", " 3", ".", "5", " km", ",", " Ann_1", "."]),
        ("他在 New York住", ["他", "在", " New", " York", "住"]),
        ("e\u0301a x\u0308", ["e\u0301a", " x\u0308"]),  # a mark does not end a word
        ("ดี👍🏽!", ["ดี", "👍", "🏽", "!"]),
        ("हिन्दी भाषा", ["हिन्दी", " भाषा"]),
        ("서울에", ["서", "울", "에"]),
        (" \t", []),
        ("x ", ["x"]),
    ],
)
def test_texts_are_split_into_words(text, words):
    assert split_words(text) == words


def test_words_together_are_the_text_and_know_their_places():
    for text in odd_texts(2_000):
        words = split_words(text)
        assert "".join(words) == text.rstrip()
        places = locate_words(words)
        assert [text[start:end] for start, end in places] == [word.lstrip() for word in words]
        assert all(text[start:end].strip() for start, end in places)


# Labels at tokens


@pytest.fixture(scope="module")
def word_pieces(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_vocab(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet, "Ġa", "an"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "a"), ("a", "n")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def odd_words(count: int) -> list[list[str]]:
    """Return sentences of random Unicode; a tokenizer that cleans its texts has no token for some words."""
    rng = random.Random(3)
    untokenized = ["\x07", "\u200b", "\ufffd", "\u0301", "\x01\x02", "\u202e"]
    sentences = [text.split(" ") for text in odd_texts(count)]
    sentences = [[word for word in sentence if word.strip()] or ["x"] for sentence in sentences]
    return [[rng.choice(untokenized) if rng.random() < 0.1 else word for word in sentence] for sentence in sentences]


def alone(tokenizer: Tokenizer, word: str) -> int:
    return len(tokenizer.encode(word, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", ["word_pieces", "byte_level"])
@pytest.mark.parametrize("max_length", [512, 16])
def test_p10_every_kept_word_has_one_label_at_its_first_token(request, kind, max_length):
    tokenizer = request.getfixturevalue(kind)
    labels = [f"L{i}" for i in range(7)]
    rng = random.Random(max_length)
    sentences = odd_words(10_000)  # of random strings
    rows = [Row(str(i), i, {"w": words, "t": [rng.choice(labels) for _ in words]}) for i, words in enumerate(sentences)]
    examples = encode_tagged(rows, tokenizer, text="w", label="t", labels=labels, max_length=max_length)
    words = examples.record
    before = " " if kind == "byte_level" else ""
    size = {word: alone(tokenizer, before + word) for word in {word for words in sentences for word in words}}
    num_truncated = unreadable = 0
    for i, row in enumerate(rows):
        # What each word's tokens are by itself says where it begins and whether there is room for that.
        at, expected = 1, {}
        for word, tag in zip(row.values["w"], row.values["t"], strict=True):
            if not size[word]:
                unreadable += 1
            elif at < max_length - 1:
                expected[at] = tag
            else:
                num_truncated += 1
            at += size[word]
        tokens = examples.token_labels[examples.offsets[i] : examples.offsets[i + 1]]
        assert {place: labels[k] for place, k in enumerate(tokens.tolist()) if k != IGNORE_INDEX} == expected, row
        assert [p for p in words.first_tokens[words.word_slice(i)].tolist() if p >= 0] == list(expected)
        assert len(tokens) == min(at + 1, max_length)
    assert (words.truncated, words.unreadable) == (num_truncated, unreadable)
    assert examples.record.num_lost == num_truncated + unreadable
    assert bool(unreadable) == (kind == "word_pieces")
    assert bool(num_truncated) == bool(examples.truncated) == (max_length == 16)
    assert examples.num_targets == sum(map(len, sentences)) - num_truncated - unreadable


def test_words_of_a_text_are_encoded_as_the_text(word_pieces, byte_level):
    """Labels stand where character offsets put them, as an independent oracle."""
    texts = ["他在École住，the film was GOOD.", "中文字 a-b 1,000.5", "an a an.a an"]
    for tokenizer in (word_pieces, byte_level):
        for text in texts:
            row = Row("1", 1, {"w": split_words(text), TEXT: text})
            examples = encode_tagged([row], tokenizer, text="w", max_length=100)
            encoding = tokenizer.encode(text)
            assert examples.input_ids.tolist() == encoding.ids
            starts = [start for start, _ in locate_words(row.values["w"])]
            found = [encoding.token_to_chars(p) for p in examples.record.first_tokens.tolist()]
            for start, (first, _) in zip(starts, found, strict=True):
                assert first in (start - 1, start)  # a space may be a token by itself


def test_words_are_encoded_as_roberta_wants_them(byte_level):
    words = ["an", "a", ".", "中"]
    examples = encode_tagged([Row("1", 1, {"w": words})], byte_level, text="w", max_length=100)
    with_spaces = Tokenizer.from_str(byte_level.to_str())
    with_spaces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # as transformers asks for
    assert examples.input_ids.tolist() == with_spaces.encode(words, is_pretokenized=True).ids
    assert examples.token_labels is None


def test_no_rows_make_no_examples(word_pieces):
    examples = encode_tagged([], word_pieces, text="w", label="t", labels=["A"], max_length=10)
    assert len(examples) == len(examples.batch([]).ids) == 0


def test_pieces_and_vocabulary_are_odd_enough():
    assert "\x00" in PIECES and "##ing" in VOCAB  # noqa: PT018  what P10 above rests on
