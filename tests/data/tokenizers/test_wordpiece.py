"""vocab.txt and tokenizer.json: the ids of transformers, what is refused, and copies."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from support.wordpiece import SPECIAL, VOCAB, added, odd_texts, write_vocab

from data import DataError, copy_tokenizer, load_tokenizer


def oracle(folder: Path):
    return pytest.importorskip("transformers").BertTokenizer.from_pretrained(str(folder))


FLAGS = [
    {"do_lower_case": lower, "strip_accents": strip, "tokenize_chinese_chars": chinese}
    for lower in (True, False)
    for strip in (None, True, False)
    for chinese in (True, False)
]
N = len(VOCAB)
SETTINGS = [
    *({"tokenizer_config": flags} for flags in FLAGS),
    {},
    {"tokenizer_config": {"additional_special_tokens": ["<ent>", "[unused1]"]}},
    {"tokenizer_config": {"extra_special_tokens": ["<ent>"]}},
    {
        "tokenizer_config": {
            "added_tokens_decoder": {
                "5": added("[unused1]"),
                str(N): added("MyTok"),
                str(N + 1): added("<ent>", special=True, normalized=False, lstrip=True),
            }
        }
    },
    {"added_tokens": {"<ent>": N + 1, "MyTok": N}},
    {"added_tokens": {"<ent>": N}, "special_tokens_map": {"additional_special_tokens": ["<ent>"]}},
    {"special_tokens_map": {"cls_token": "[unused1]", "mask_token": {"content": "[MASK]", "lstrip": False}}},
]


@pytest.mark.parametrize("files", SETTINGS, ids=str)
def test_vocab_txt_gives_the_ids_of_transformers(tmp_path, files):
    ours, theirs = load_tokenizer(write_vocab(tmp_path, **files)), oracle(tmp_path)
    for text in odd_texts(400):
        assert ours.encode(text).ids == theirs(text)["input_ids"], repr(text)
    batch = odd_texts(200, seed=1)
    for first, second in zip(batch[::2], batch[1::2], strict=True):
        encoding, expected = ours.encode(first, second), theirs(first, second)
        assert (encoding.ids, encoding.type_ids) == (expected["input_ids"], expected["token_type_ids"])


def test_special_tokens_surround_a_text_and_a_pair(tmp_path):
    tokenizer = load_tokenizer(write_vocab(tmp_path))
    assert tokenizer.encode("the film").tokens == ["[CLS]", "the", "film", "[SEP]"]
    pair = tokenizer.encode("the film", "was good")
    assert pair.tokens == ["[CLS]", "the", "film", "[SEP]", "was", "good", "[SEP]"]
    assert pair.type_ids == [0, 0, 0, 0, 1, 1, 1]
    assert tokenizer.encode("").tokens == ["[CLS]", "[SEP]"]


def test_vocab_txt_with_windows_line_ends_and_without_a_last_one(tmp_path):
    expected = load_tokenizer(write_vocab(tmp_path)).get_vocab()
    for content in ("\r\n".join(VOCAB) + "\r\n", "\n".join(VOCAB)):
        (tmp_path / "vocab.txt").write_bytes(content.encode())
        assert load_tokenizer(tmp_path).get_vocab() == expected


def test_an_id_is_the_number_of_its_line_whatever_the_line_holds(tmp_path):
    """A vocabulary has tokens that look like space; to strip or skip them would shift every id below."""
    vocab = [*SPECIAL, "\u2028", "\x85", "\u3000", "", "film"]
    tokenizer = load_tokenizer(write_vocab(tmp_path, vocab))
    assert [tokenizer.token_to_id(token) for token in vocab] == list(range(len(vocab)))


def test_tokenizer_json_comes_before_vocab_txt(tmp_path):
    tokenizer = load_tokenizer(write_vocab(tmp_path))
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.txt").write_text("only\n")
    assert load_tokenizer(tmp_path).encode("the film was good").tokens[1:-1] == ["the", "film", "was", "good"]


BROKEN = [
    ({"tokenizer": "{"}, "the tokenizer cannot be used"),
    ({"tokenizer": ""}, "the tokenizer cannot be used"),
    ({"tokenizer": "[]"}, "the tokenizer cannot be used"),
    ({"tokenizer": '{"model": {"type": "WordPiece", "vocab": {"a": -1}}}'}, "the tokenizer cannot be used"),
    ({"tokenizer_config": "{"}, "tokenizer_config.json: not JSON: Expecting property name"),
    ({"tokenizer_config": "[" * 100_000}, "tokenizer_config.json: not JSON: maximum recursion depth exceeded"),
    ({"tokenizer_config": "[1]"}, "tokenizer_config.json: a JSON object is needed, not a list"),
    ({"special_tokens_map": "null"}, "special_tokens_map.json: a JSON object is needed, not a NoneType"),
    ({"added_tokens": "3"}, "added_tokens.json: a JSON object is needed, not a int"),
    (
        {"tokenizer_config": {"do_lower_case": "yes"}},
        "do_lower_case = 'yes' should be true or false",
    ),
    ({"tokenizer_config": {"strip_accents": 3}}, "tokenizer_config.json: strip_accents = 3 should be true or false"),
    ({"tokenizer_config": {"cls_token": "<s>"}}, "vocab.txt: no token '<s>'"),
    ({"tokenizer_config": {"tokenizer_class": "BertJapaneseTokenizer"}}, "a BertJapaneseTokenizer is more than"),
    ({"tokenizer_config": {"added_tokens_decoder": {"1": added("film")}}}, "'film' should have the id 1, it gets"),
    (
        {"tokenizer_config": {"added_tokens_decoder": {"x": added("a")}}},
        "the tokenizer cannot be used: invalid literal",
    ),
    ({"tokenizer_config": {"added_tokens_decoder": {"1": {"nonsense": 1}}}}, "the added token '' should have the id 1"),
    ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "the tokenizer cannot be used"),
    ({"tokenizer_config": {"extra_special_tokens": {"a": "b"}}}, "the special tokens should be a list"),
    ({"added_tokens": {"<ent>": N + 7}}, f"'<ent>' should have the id {N + 7}, it gets {N}"),
]


@pytest.mark.parametrize(("files", "reason"), BROKEN, ids=lambda value: str(value)[:60])
def test_f14_broken_tokenizer_files_are_a_sentence(tmp_path, files, reason):
    with pytest.raises(DataError, match=re.escape(reason)) as caught:
        load_tokenizer(write_vocab(tmp_path, **files))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no token '[UNK]'"),
        (b"a\nb\n", "no token '[UNK]'"),
        (b"[UNK]\n[SEP]\n", "no token '[CLS]'"),
        ("\n".join(SPECIAL).encode() + b"\n\xff\n", "codec can't decode"),
    ],
)
def test_f14_broken_vocab_txt(tmp_path, content, reason):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(reason)):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer.json and no vocab.txt"):
        load_tokenizer(tmp_path)


def test_f14_a_tokenizer_that_panics_is_refused(tmp_path, capfd):
    load_tokenizer(write_vocab(tmp_path)).save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="the tokenizer cannot be used"):
        load_tokenizer(tmp_path)


def test_a_copied_tokenizer_is_the_same_one(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    files = {"tokenizer_config": {"do_lower_case": False}, "added_tokens": {"<ent>": N}, "special_tokens_map": {}}
    write_vocab(source, **files)
    copy_tokenizer(source, target)
    assert sorted(p.name for p in target.iterdir()) == sorted(p.name for p in source.iterdir())
    ids = load_tokenizer(source).encode("École <ent> film").ids
    shutil.rmtree(source)
    assert load_tokenizer(target).encode("École <ent> film").ids == ids
