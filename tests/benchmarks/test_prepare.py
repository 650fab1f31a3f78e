"""Data that is prepared for benchmarks: packages with tags, and a vocabulary of characters."""

from __future__ import annotations

import json

from benchmarks.prepare.__main__ import main
from benchmarks.prepare.chinese_sentiment import build_vocabulary
from benchmarks.prepare.package_tags import read_packages
from data import load_tokenizer


def test_packages_are_read_from_the_index_of_apt():
    index = (
        "Package: libfoo1\nSource: foo (1.2-3)\nVersion: 1\nDescription: does foo: well\n"
        "Tag: role::shared-lib, devel::library,\n implemented-in::c\nSize: 3\n\n"
        "Package: bar\nDescription: no tags\n\n"
        "Package: baz\nDescription: itself\nTag: role::program\n"
    )
    tags = ["devel::library", "implemented-in::c", "role::shared-lib"]
    assert list(read_packages(index)) == [
        {"id": "libfoo1", "text": "does foo: well", "labels": tags, "source": "foo"},
        {"id": "baz", "text": "itself", "labels": ["role::program"], "source": "baz"},
    ]


def test_character_vocabulary_encodes_chinese_and_english(tmp_path):
    texts = ["我爱北京。Good 5!"] * 3 + ["一"]
    vocab = build_vocabulary(texts)
    assert vocab[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(vocab) == len(set(vocab))
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    tokens = load_tokenizer(tmp_path).encode("我 爱北京，一 good。").tokens
    assert tokens == ["[CLS]", "我", "爱", "北", "京", "[UNK]", "[UNK]", "g", "##o", "##o", "##d", "。", "[SEP]"]


def test_the_command_says_what_can_be_prepared(capsys):
    assert main(["--help"]) == 0
    assert "names are capitals, " in capsys.readouterr().out
    assert main(["capitals", "capitol"]) == 2
    assert capsys.readouterr().err.startswith("error: no data set 'capitol': python -m benchmarks.prepare NAME")
