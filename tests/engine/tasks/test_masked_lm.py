"""A masked language model: the loss of run_mlm on the same masks, what fills a mask, and fine-tuning after it."""

from __future__ import annotations

import csv
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import zoo
from support.evaluation import evaluation_context
from support.runs import run_training
from support.task_data import VOCABULARY, WORDS, write, write_model
from support.task_settings import task_settings
from tokenizers import Tokenizer

import models
from data import IGNORE_INDEX, Row, load_tokenizer
from engine import config as configs
from engine import evaluate, predict
from engine.config import Config, ConfigError
from engine.tasks import TASKS

MLM = TASKS["masked-lm"]
TYPES = [model_type for model_type, head in zoo.cases() if head == "masked-lm"]
SIZES = {"vocab_size": len(VOCABULARY), "pad_token_id": 0}


def rows_of(count: int, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    return [Row(str(i), i + 1, {"text": " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))}) for i in range(count)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(write_model("masked-lm", tmp_path / "tokenizer"))


def theirs(tokenizer: Tokenizer) -> Any:
    """Return transformers' tokenizer of the same tokens."""
    transformers = pytest.importorskip("transformers")
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "sep", "cls", "unk", "mask")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def in_training(folder: Path) -> models.TaskModel:
    """Return a model as training has it: without dropout here, and without logits."""
    model = models.from_pretrained(folder, head="masked-lm", dropout=0.0).double().train()
    model.head.keep_logits = False
    return model


@pytest.mark.parametrize("model_type", TYPES)
def test_loss_equals_run_mlms_on_the_same_masks(tmp_path, tokenizer, model_type):
    """Once the masks are those of transformers' collator, once ours, of an epoch; in fp64, twelve digits."""
    transformers = pytest.importorskip("transformers")
    oracle = zoo.save_oracle(tmp_path, model_type, "masked-lm", dtype=torch.float64, **SIZES)
    rows = rows_of(9)
    torch.manual_seed(0)
    collate = transformers.DataCollatorForLanguageModeling(theirs(tokenizer), mlm_probability=0.3)
    batch = collate([{"input_ids": tokenizer.encode(row.values["text"]).ids} for row in rows])
    batch["attention_mask"] = (
        torch.arange(batch["input_ids"].shape[1]) < batch["attention_mask"].sum(1)[:, None]
    ).long()
    lengths = batch["attention_mask"].sum(1).tolist()
    inputs = models.pack([ids[:n].tolist() for ids, n in zip(batch["input_ids"], lengths, strict=True)])
    labels = torch.cat([label[:n] for label, n in zip(batch["labels"], lengths, strict=True)])
    inputs = replace(inputs, labels=labels, num_targets=int((labels != IGNORE_INDEX).sum()))
    outputs = oracle(**batch)
    expected = outputs.loss
    if expected.dtype != torch.float64:  # transformers' ModernBERT computes its loss in fp32
        expected = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten())
    model = models.from_pretrained(tmp_path, head="masked-lm").double().eval()
    torch.testing.assert_close(model(inputs).loss_sum / inputs.num_targets, expected, rtol=1e-12, atol=0)
    out = in_training(tmp_path)(inputs)
    assert out.logits.shape == (0, len(VOCABULARY))  # those of all targets are never in memory
    torch.testing.assert_close(out.loss_sum / inputs.num_targets, expected, rtol=1e-12, atol=0)

    settings = task_settings("masked-lm", text_column="text", max_length=16, mask_probability=0.3)
    encode = MLM.encoder(tokenizer, settings, ())
    examples = MLM.augment(encode(rows), rows, encode, configs.AugmentSettings(), 3)
    ours = examples.batch(range(9), 2)
    expected, _ = zoo.run_oracle(oracle, model_type, "masked-lm", ours)
    torch.testing.assert_close(in_training(tmp_path)(ours).loss_sum / ours.num_targets, expected, rtol=1e-12, atol=0)


def test_metrics_are_those_of_transformers_logits(tmp_path, tokenizer):
    oracle = zoo.save_oracle(tmp_path, "bert", "masked-lm", **SIZES)
    model = models.from_pretrained(tmp_path, head="masked-lm").eval()
    settings = task_settings("masked-lm", text_column="text", max_length=16)
    examples = MLM.encoder(tokenizer, settings, ())(rows_of(40))
    found = MLM.compute_metrics(evaluate.sum_statistics(model, examples, evaluation_context("masked-lm", 50)), [])
    every = examples.batch(range(len(examples)))
    loss, logits = zoo.run_oracle(oracle, "bert", "masked-lm", every)
    is_target = every.labels != IGNORE_INDEX
    hits = (logits.argmax(-1) == every.labels)[is_target].double().mean()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss.item()), rel=1e-6)
    assert found["accuracy"] == pytest.approx(hits.item())


@torch.no_grad()
def test_a_mask_is_filled_as_by_the_pipeline_of_transformers(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    oracle = zoo.save_oracle(tmp_path, "bert", "masked-lm", **SIZES)
    model = models.from_pretrained(tmp_path, head="masked-lm").eval()
    texts = ["the [MASK] saw a dog .", "anna likes [MASK] and [MASK]", "no mask is in this text"]
    rows = [Row(str(i), i, {"text": text}) for i, text in enumerate(texts)]
    settings = task_settings("masked-lm", text_column="text", max_length=16)
    examples = MLM.encoder(tokenizer, settings, ())(rows, False)
    assert examples.notes[0] == "1 of 3 texts without [MASK]: nothing is filled there"
    assert not any("special token" in note for note in examples.notes)  # the mask is read as what it is
    ours = MLM.predict_batch(model, examples.batch([2, 0, 1]), examples, configs.GenerateSettings())
    fill = transformers.pipeline("fill-mask", model=oracle, tokenizer=theirs(tokenizer), top_k=5)
    expected = [[], [fill(texts[0])], fill(texts[1])]
    for row, masks in zip(ours, expected, strict=True):
        assert len(row["masks"]) == len(masks)
        for mine, other in zip(row["masks"], masks, strict=True):
            assert [p["token"] for p in mine] == [p["token_str"] for p in other]
            assert [p["probability"] for p in mine] == pytest.approx([p["score"] for p in other], rel=1e-4)
    assert "MASK" not in ours[0]["text"]
    assert ours[1]["text"] == texts[0].replace("[MASK]", ours[1]["masks"][0][0]["token"])


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    settings = write("masked-lm", folder) | {"run.folder": str(folder / "run"), "train.max_steps": 3}
    assert run_training(configs.override(Config(), settings)) is not None
    return folder / "run"


FINE_TUNED = ["text-classification", "token-classification", "question-answering"]


@pytest.mark.parametrize("task", FINE_TUNED)
def test_any_task_continues_from_the_adapted_model(adapted, tmp_path, task):
    """The encoder is the adapted one; the head is new, and the load report says so."""
    settings = write(task, tmp_path) | {"model.name": str(adapted / "best"), "model.init": "pretrained"}
    settings |= {"run.folder": str(tmp_path / "run"), "train.max_steps": 1}
    assert run_training(configs.override(Config(), settings)) is not None
    described = (tmp_path / "run" / "summary.txt").read_text()
    assert "head.classifier.weight" in described or "head.span.weight" in described
    assert "initialised" in described
    before = models.from_pretrained(adapted / "best", head="masked-lm")
    after = models.from_pretrained(adapted / "best", head=TASKS[task].head, labels=None)
    for name, parameter in before.backbone.named_parameters():
        torch.testing.assert_close(after.backbone.get_parameter(name), parameter, rtol=0, atol=0)


def test_masks_of_a_file_are_filled_in_every_format(adapted, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    texts = ["the [MASK] saw a dog", "a cat", ""]
    source.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    for suffix in ("jsonl", "csv"):
        assert predict.main([str(adapted), "--input", str(source), "--output", str(tmp_path / f"out.{suffix}")]) == 0
    first, second, third = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert [len(row["masks"]) for row in (first, second)] == [1, 0]
    assert first["text"] == f"the {first['masks'][0][0]['token']} saw a dog"
    assert third == {"id": "2", "text": None, "reason": "'text' is empty"}
    with (tmp_path / "out.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert json.loads(table[0]["masks"]) == first["masks"]


def begin(config: Config) -> None:
    configs.check(config)
    run_training(config)


def test_settings_without_effect_are_refused(tmp_path):
    settings = write("masked-lm", tmp_path) | {"run.folder": str(tmp_path / "run")}
    for changes, message in (
        ({"masked_lm.segmenter": "jieba"}, r"masked_lm.segmenter = 'jieba' has no effect .*whole_words = true"),
        ({"data.long_texts": "windows"}, r"data.long_texts = 'windows' has no effect on masked-lm: all of a text is"),
        ({"masked_lm.mask_probability": 0.0}, r"masked_lm.mask_probability"),
    ):
        with pytest.raises(ConfigError, match=message):
            begin(configs.override(Config(), settings | changes))


def test_examples_are_kept_in_a_cache(tmp_path, capsys):
    """A list of words is part of what they depend on."""
    words = tmp_path / "words.txt"
    words.write_text("北京\n")
    settings = write("masked-lm", tmp_path) | {"data.cache": str(tmp_path / "cache"), "train.max_steps": 2}
    settings |= {"masked_lm.whole_words": True, "masked_lm.segmenter": str(words)}
    losses = []
    for name, note in (("a", "kept in"), ("b", "taken from"), ("c", "kept in")):
        if name == "c":
            words.write_text("北京\n大学\n")
        assert run_training(configs.override(Config(), settings | {"run.folder": str(tmp_path / name)})) is not None
        assert f"{note} data.cache" in capsys.readouterr().out
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if "lr" in json.loads(line)])
    assert losses[0] == losses[1] == losses[2]  # these texts have no Chinese words
