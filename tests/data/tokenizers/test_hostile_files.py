"""A tokenizer.json that would use time or memory without bound, or crash the library: one sentence, no panic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from data import DataError, load_tokenizer
from data.tokenizers import limits
from data.tokenizers.limits import panics_as_errors

WORDS = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1, "text": 2}, "unk_token": "[UNK]"}
PLAIN = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "model": WORDS}
PLAIN |= dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
PIECES = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": {"[UNK]": 0, "a": 1}}
PIECES |= {"max_input_chars_per_word": 100}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
TEXT, MARK = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[X]", "type_id": 0}}
# Of GPT-2, Llama 3, GPT-4o and DeepSeek, and of numbers in groups of three from the right.
PUBLISHED = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t)?| ?[^\s\p{L}]+[\r\n/]*",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
    r"(?:\r?\n)+|\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))| ?[^(\s|[.,!?…。，、।۔،])]+| {2,}",
]


def replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def template(*pieces: Any, **special: Any) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": list(pieces), "pair": [], "special_tokens": special}


HOSTILE = {
    "prepend": ({"normalizer": {"type": "Prepend", "prepend": "a" * 1_000_000}}, "prepend of its normalizer has 1,0"),
    "one replacement": ({"normalizer": replace("a", "b" * 900)}, "a text 900 times as long; at most 100"),
    "nested": ({"normalizer": sequence(*[replace("a", "aa")] * 40)}, "a text 128 times as long; at most 100"),
    "in turns": ({"normalizer": sequence(*[replace("a", "BB"), replace("b", "aaa")] * 9)}, "216 times as long"),
    "folded": ({"normalizer": sequence(replace("a", "é" * 50), replace("e\u0301", "x" * 50))}, "times as long"),
    "many steps": ({"normalizer": sequence(*[{"type": "NFC"}] * 2000)}, "more than 1,000 steps"),
    "repetition": ({"pre_tokenizer": split(r"(a+)+$")}, r"'\(a\+\)\+\$' in its pre_tokenizer repeats a repetition"),
    "nested repetition": ({"pre_tokenizer": split(r"((x|\w*)b?){2,}")}, "repeats a repetition"),
    "alternatives": ({"pre_tokenizer": split(r"(a|a)*$")}, "take too many steps for short texts"),
    "of a decoder": ({"decoder": {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "x"}}, "repetition"),
    "bad expression": ({"pre_tokenizer": split("((((")}, "unmatched parenthesis"),
    "long expression": ({"pre_tokenizer": split("a" * 30_000)}, "a regular expression of 30,000 characters"),
    "template": ({"post_processor": template(*[MARK] * 3000, TEXT)}, "more than 1,000 steps"),
    "template's ids": (
        {"post_processor": template(MARK, TEXT, **{"[X]": {"id": "[X]", "ids": [0] * 2000, "tokens": ["a"] * 2000}})},
        "more than 1,000 steps",
    ),
    "template without its token": ({"post_processor": template(MARK, TEXT)}, "the tokenizer cannot be used"),
    "no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "length = 0 of its pre_tokenizer"),
    "no table": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "cannot be used"),
    "table": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAA="}}, "leads out of itself"),
    "long prefix": ({"model": PIECES | {"continuing_subword_prefix": "#" * 10**6}}, "has 1,000,000 characters"),
    "long words": ({"model": PIECES | {"max_input_chars_per_word": 10**9}}, "should be at most 1,000"),
    "no unknown": ({"model": PIECES | {"vocab": {"a": 1}}}, r"Missing \[UNK\] token"),
    "long token": ({"added_tokens": [{"id": 9, "content": "z" * 10**5, **ADDED}]}, "a token of its added_tokens has"),
    "large id": ({"model": WORDS | {"vocab": {"[UNK]": 0, "a": 2**64}}}, "cannot be used"),
    "negative id": ({"model": WORDS | {"vocab": {"[UNK]": -1}}}, "cannot be used"),
    "null": ({"model": WORDS | {"vocab": None}}, "invalid type: null"),
    "wrong type": ({"added_tokens": [{"id": "x"}]}, "cannot be used"),
    "unigrams": ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a" * 7_000_000, 0.0]]}}, "7,000,000 bytes; at"),
    "no unigrams": ({"model": {"type": "Unigram", "unk_id": 3, "vocab": [["a", 0.0]]}}, "UnkIdNotInVocabulary"),
}


def write(folder: Path, **parts: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(PLAIN | parts))
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_a_sentence(tmp_path, name, capfd):
    parts, reason = HOSTILE[name]
    with pytest.raises(DataError, match=reason) as caught:
        load_tokenizer(write(tmp_path, **parts))
    assert str(caught.value).startswith(str(tmp_path))
    assert capfd.readouterr().err == ""


def test_deep_and_large_files_are_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text('{"normalizer": ' + "[" * 100_000)
    with pytest.raises(DataError, match="the tokenizer cannot be used"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr(limits, "MAX_FILE", 100)
    for name in ("tokenizer.json", "vocab.txt", "spiece.model"):
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        if name == "spiece.model":
            (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
        (tmp_path / name).write_text("x" * 101)
        with pytest.raises(DataError, match=f"{name}: more than 100 bytes, too many for a file of a tokenizer"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_published_expressions_are_read(tmp_path, pattern):
    folder = write(tmp_path, pre_tokenizer=split(pattern))
    assert load_tokenizer(folder).encode("a text").tokens[0] == "a"


@pytest.mark.parametrize(
    "steps",
    [
        [replace("ﬁ", "fi"), replace("ﬂ", "fl"), replace("ß", "ss"), replace("…", "..."), replace("œ", "oe")] * 3,
        [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")],
        [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}],
    ],
)
def test_ordinary_normalizers_are_read(tmp_path, steps):
    load_tokenizer(write(tmp_path, normalizer=sequence(*steps)))


def test_the_limit_of_growth_is_that_of_real_texts(tmp_path):
    """The longest normalizers that are read make no text longer than the limit says."""
    chains = [[replace("a", "b" * 9), replace("b", "c" * 9)], [replace("a", "a" * 9)], [replace("", "xy" * 20)]]
    for steps in chains:
        tokenizer = load_tokenizer(write(tmp_path, normalizer=sequence(*steps)))
        assert len(tokenizer.normalizer.normalize_str("aab" * 99)) <= limits.MAX_GROWTH * 297


def test_a_panic_on_a_later_text_is_a_sentence():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(a|a)*$"), "isolated")
    with pytest.raises(DataError, match="row 7: the tokenizer fails on a text"), panics_as_errors("row 7"):
        tokenizer.encode("a" * 40 + "!")
