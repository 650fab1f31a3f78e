"""Span corruption: the loss of transformers' T5 on the same pairs, what fills a sentinel, and fine-tuning after it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support import zoo
from support.evaluation import evaluation_context
from support.runs import run_training
from support.task_data import VOCABULARY, WORDS, write, write_model
from support.task_settings import task_settings

import models
from data import DataError, Row
from engine import config as configs
from engine import evaluate, predict
from engine.config import Config, ConfigError
from engine.tasks import TASKS

SPANS = TASKS["span-corruption"]
SIZES = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "eos_token_id": VOCABULARY["</s>"]}


def rows_of(count: int, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    return [Row(str(i), i + 1, {"text": " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))}) for i in range(count)]


@pytest.fixture
def processor(tmp_path: Path) -> Any:
    return SPANS.load_processor(write_model("span-corruption", tmp_path / "tokenizer"))


@pytest.mark.parametrize("model_type", ["t5", "mt5"])
def test_loss_equals_transformers_on_the_same_pairs(tmp_path, processor, model_type):
    """In an epoch of training, in fp64; transformers makes the inputs of the decoder from the labels itself."""
    oracle = zoo.save_oracle(tmp_path, model_type, "seq2seq-lm", dtype=torch.float64, **SIZES)
    rows = rows_of(9)
    settings = task_settings("span-corruption", text_column="text", max_length=16, noise_density=0.3)
    encode = SPANS.encoder(processor, settings, ())
    batch = SPANS.augment(encode(rows), rows, encode, configs.AugmentSettings(), 3).batch(range(9), 2)
    theirs = zoo.oracle_inputs(model_type, "seq2seq-lm", batch)
    del theirs["decoder_input_ids"], theirs["decoder_attention_mask"]
    expected = oracle(**theirs).loss
    model = models.from_pretrained(tmp_path, head="seq2seq-lm", dropout=0.0).double().train()
    model.head.keep_logits = False
    torch.testing.assert_close(model(batch).loss_sum / batch.num_targets, expected, rtol=1e-12, atol=0)


def test_metrics_are_those_of_transformers_logits(tmp_path, processor):
    oracle = zoo.save_oracle(tmp_path, "t5", "seq2seq-lm", **SIZES)
    model = models.from_pretrained(tmp_path, head="seq2seq-lm").eval()
    settings = task_settings("span-corruption", text_column="text", max_length=16)
    examples = SPANS.encoder(processor, settings, ())(rows_of(40))
    found = SPANS.compute_metrics(
        evaluate.sum_statistics(model, examples, evaluation_context("span-corruption", 50)), []
    )
    every = examples.batch(range(40))
    loss, logits = zoo.run_oracle(oracle, "t5", "seq2seq-lm", every)
    assert found["perplexity"] == pytest.approx(math.exp(loss.item()), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == every.labels).double().mean().item())


@torch.no_grad()
def test_spans_are_what_transformers_generates(tmp_path, processor):
    oracle = zoo.save_oracle(tmp_path, "t5", "seq2seq-lm", **SIZES)
    model = models.from_pretrained(tmp_path, head="seq2seq-lm").eval()
    settings = task_settings("span-corruption", text_column="text", max_length=16)
    text = "the <extra_id_0> saw a <extra_id_1> ."
    examples = SPANS.encoder(processor, settings, ())([Row("0", 1, {"text": text})], False)
    (row,) = SPANS.predict_batch(model, examples.batch([0]), examples, configs.GenerateSettings(max_new_tokens=9))
    source = torch.tensor([examples.sequence(0)])
    ids = oracle.generate(source, max_new_tokens=9, do_sample=False, use_cache=False)[0]
    written = " ".join(processor.tokenizer.id_to_token(i) for i in ids.tolist())
    for i, span in enumerate(row["spans"]):
        after = written.partition(f"<extra_id_{i}>")[2]
        assert span.split() == after.partition("<extra_id_")[0].replace("</s>", "").split()
    filled = text.replace("<extra_id_0>", row["spans"][0]).replace("<extra_id_1>", row["spans"][1])
    assert row["text"].split() == filled.split()


@pytest.mark.slow
def test_a_learned_text_is_filled(tmp_path, capsys):
    """A model that has learned three sentences by heart writes what is missing, through the commands."""
    texts = ["anna likes the red cat in rome .", "bob saw a very green house and dog", "what is the blue cat in ulm ?"]
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 4))
    settings = write("span-corruption", tmp_path) | {"data.train": str(file), "data.validation": str(file)}
    settings |= {"run.folder": str(tmp_path / "run"), "train.max_steps": 150, "optim.lr": 1e-2, "eval.every_steps": 150}
    settings |= {"model.dropout.all": 0.0, "span_corruption.noise_density": 0.3}
    settings["span_corruption.mean_span_length"] = 1.0
    assert run_training(configs.override(Config(), settings))["best_perplexity"] < 1.2
    source = tmp_path / "in.jsonl"
    # The last tokens of a text are always cut out, as by T5's own code.
    rows = [
        "anna likes the red <extra_id_0> in rome <extra_id_1>",
        "bob saw a very <extra_id_0> house and <extra_id_1>",
    ]
    source.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(rows)))
    assert predict.main([str(tmp_path / "run"), "--input", str(source), "--output", str(tmp_path / "out.jsonl")]) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["spans"] for row in found] == [["cat", "."], ["green", "dog"]]
    assert [row["text"] for row in found] == texts[:2]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    settings = write("span-corruption", folder) | {"run.folder": str(folder / "run"), "train.max_steps": 3}
    assert run_training(configs.override(Config(), settings)) is not None
    return folder / "run"


@pytest.mark.parametrize("task", ["summarization", "translation"])
def test_texts_are_written_from_the_adapted_model(adapted, tmp_path, task):
    """All weights are the adapted ones, the output matrix too."""
    settings = write(task, tmp_path) | {"model.name": str(adapted / "best"), "model.init": "pretrained"}
    settings |= {"run.folder": str(tmp_path / "run"), "train.max_steps": 1, "optim.lr": 1e-9}
    assert run_training(configs.override(Config(), settings)) is not None
    before, after = (models.from_pretrained(run / "best", head="seq2seq-lm") for run in (adapted, tmp_path / "run"))
    for name, parameter in before.named_parameters():
        torch.testing.assert_close(after.get_parameter(name), parameter, rtol=0, atol=1e-6)


def begin(settings: dict[str, Any]) -> None:
    config = configs.override(Config(), settings)
    configs.check(config)
    run_training(config)


def test_what_cannot_be_trained_is_refused(tmp_path):
    settings = write("span-corruption", tmp_path) | {"run.folder": str(tmp_path / "run")}
    for changes, message in (
        (
            {"data.long_texts": "windows"},
            r"data.long_texts = 'windows' has no effect on span-corruption: all of a text",
        ),
        ({"span_corruption.noise_density": 0.0}, r"span_corruption.noise_density"),
        ({"masked_lm.whole_words": True}, r"masked_lm.whole_words = True has no effect on span-corruption"),
        (
            {"span_corruption.mean_span_length": 1.0, "span_corruption.noise_density": 0.4},
            r"a text of \d+ tokens makes 9 spans, and the tokenizer has 3 sent",
        ),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            begin(settings | changes)


def test_masked_lm_names_the_task_of_a_t5(tmp_path):
    settings = write("span-corruption", tmp_path) | {"run.folder": str(tmp_path / "run"), "run.task": "masked-lm"}
    del settings["generate.max_new_tokens"]
    with pytest.raises(
        models.ModelError, match=r'a t5 model predicts no masked tokens; .*run.task = "span-corruption"'
    ):
        begin(settings)


def test_examples_are_kept_in_a_cache(tmp_path, capsys):
    settings = write("span-corruption", tmp_path) | {"data.cache": str(tmp_path / "cache"), "train.max_steps": 2}
    losses = []
    for name, note in (("a", "kept in"), ("b", "taken from")):
        assert run_training(configs.override(Config(), settings | {"run.folder": str(tmp_path / name)})) is not None
        assert f"{note} data.cache" in capsys.readouterr().out
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if "lr" in json.loads(line)])
    assert losses[0] == losses[1]
