"""Exported tokenizers: AutoTokenizer of transformers opens each, and gives the ids of load_tokenizer on odd texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import runs

from data import copy_tokenizer, load_tokenizer
from data.tokenizers.copying import AS_IT_IS, SETTINGS

SAMPLES = Path(__file__).parents[3] / "data" / "samples"
FOLDERS = sorted(path.parent for path in SAMPLES.glob("*/*/tokenizer.json"))
ODD_TEXTS = (
    *("", " ", "Hello world", "  two  spaces ", "ÀÉ naïve café", "日本語 テスト", "emoji 🎉🎉", "a\tb\nc", "x" * 60),
    *("İstanbul ǅ", "\u200bzero", "don't stop", "1,234.5%", "<extra_id_0> x", "<pad> </s> [SEP] <unk> <|endoftext|>"),
)


def assert_opens_the_same(folder: Path):
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    for text in ODD_TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text).ids, text
    assert theirs(*ODD_TEXTS[2:4])["input_ids"] == ours.encode(*ODD_TEXTS[2:4]).ids
    return theirs


def test_there_are_samples():
    assert len(FOLDERS) >= 3


@pytest.mark.parametrize("source", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_sample_opens_in_transformers(tmp_path, source):
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    copy_tokenizer(source, tmp_path)
    assert_opens_the_same(tmp_path)
    named = (source / SETTINGS).is_file()
    assert named  # transformers opens the sample itself, too


@pytest.mark.parametrize("model_type", ["bert", "t5", "roberta", "gpt2", "unknown"])
def test_without_a_named_class_it_is_used_as_it_is(tmp_path, model_type):
    """By model_type alone transformers would build another one, or none from a vocabulary that is not the usual."""
    source = runs.write_tiny_bert(tmp_path / "tiny")
    (source / "config.json").write_text(json.dumps({"model_type": model_type, "pad_token_id": 0}))
    (tmp_path / "copy").mkdir()
    copy_tokenizer(source, tmp_path / "copy")
    settings = json.loads((tmp_path / "copy" / SETTINGS).read_text())
    assert settings["tokenizer_class"] == AS_IT_IS
    assert ("token_type_ids" in settings["model_input_names"]) == (model_type == "bert")
    theirs = assert_opens_the_same(tmp_path / "copy")
    assert theirs.pad_token == "[PAD]"
    assert theirs(["good film", "bad"], padding=True)["attention_mask"] == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_a_named_class_is_copied_byte_for_byte(tmp_path):
    source = runs.write_tiny_bert(tmp_path / "tiny")
    (source / SETTINGS).write_text('{"tokenizer_class":   "BertTokenizer"}')
    (tmp_path / "copy").mkdir()
    copy_tokenizer(source, tmp_path / "copy")
    assert (tmp_path / "copy" / SETTINGS).read_bytes() == (source / SETTINGS).read_bytes()
