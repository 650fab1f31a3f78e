"""A causal language model: its evaluation against plain cross entropy, its continuations, and what it learns."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.evaluation import evaluation_context
from support.language import END, TEXTS, byte_tokenizer, rows_of
from support.runs import run_training
from support.task_data import VOCABULARY, tiny_gpt2, write, write_model
from tokenizers import Tokenizer

import models
from data import MicroBatching, TextExamples, evaluation_batches
from data.batch import IGNORE_INDEX
from data.causal_lm import LanguageModelRecord, encode_prompts, encode_texts_for_lm
from engine import config as configs
from engine import evaluate, predict
from engine.config import Config, ConfigError, GenerateSettings
from engine.tasks import TASKS
from engine.tasks.generation import generation_settings

LM = TASKS["causal-lm"]


@pytest.fixture(scope="module")
def by_bytes() -> Tokenizer:
    return byte_tokenizer()


def measured(
    model: models.TaskModel, examples: TextExamples, batch_tokens: int, task: str = "causal-lm"
) -> torch.Tensor:
    return evaluate.sum_statistics(model, examples, evaluation_context(task, batch_tokens))


# Evaluation


def ours(model: models.TaskModel, folder: Path, ids: list[int]) -> torch.Tensor:
    """Return all logits of one text, (T, V)."""
    return model(models.pack([ids])).logits


def theirs(model: models.TaskModel, folder: Path, ids: list[int]) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    models.save_pretrained(model, folder)
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()(torch.tensor([ids])).logits[0]


DIVISIONS = {
    "each text": {},
    "blocks": {"concatenate": True},
    "document mask": {"concatenate": True, "document_mask": True},
}


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("logits_of", [ours, pytest.param(theirs, marks=pytest.mark.oracle)])
def test_p02_loss_is_plain_cross_entropy_for_any_batches(by_bytes, tmp_path, logits_of, division):
    """The oracle reads one text after another, with the logits of a whole text at once."""
    model = tiny_gpt2(tmp_path, seed=3)
    examples = encode_texts_for_lm(rows_of(TEXTS), by_bytes, max_length=64, **DIVISIONS[division])
    loss_sum, hits, tokens = 0.0, 0, 0
    ends = examples.offsets.tolist()
    for begin, end in itertools.pairwise(ends):
        ids = [int(examples.input_ids[begin]), *examples.token_labels[begin:end].tolist()]
        with torch.no_grad():
            logits = logits_of(model, tmp_path, ids[:-1]).double()
        target = torch.tensor(ids[1:])
        loss_sum += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
        hits += (logits.argmax(-1) == target).sum().item()
        tokens += len(target)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    for batch_tokens in (1, 50, 4096):
        metrics = LM.compute_metrics(measured(model, examples, batch_tokens), ())
        assert metrics["perplexity"] == pytest.approx(math.exp(loss_sum / tokens), rel=1e-6)
        assert metrics["bits_per_byte"] == pytest.approx(loss_sum / math.log(2) / num_bytes, rel=1e-6)
        assert metrics["loss"] == pytest.approx(loss_sum / tokens, rel=1e-6)
        assert metrics["token_accuracy"] == hits / tokens


@pytest.mark.oracle
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_document_mask_is_block_diagonal_attention(by_bytes, tmp_path, dtype, tolerance):
    """The oracle reads a whole block at once, with a mask over (tokens, tokens) and positions that restart."""
    transformers = pytest.importorskip("transformers")
    model = tiny_gpt2(tmp_path, seed=3, initializer_range=0.3).to(dtype)
    models.save_pretrained(model, tmp_path)
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=dtype).eval()
    examples = encode_texts_for_lm(rows_of(TEXTS), by_bytes, max_length=64, concatenate=True, document_mask=True)
    total = torch.zeros((), dtype=dtype)
    for i in range(len(examples)):
        batch = examples.batch([i])
        parts = torch.repeat_interleave(torch.arange(len(batch.lengths)), torch.tensor(batch.lengths))
        positions = torch.cat([torch.arange(length) for length in batch.lengths])
        sees = (parts[:, None] == parts) & (positions[:, None] >= positions)
        mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[None, None]
        logits = peer(batch.input_ids[None], attention_mask=mask, position_ids=positions[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
    total.backward()
    whole = model(examples.batch(range(len(examples)))).loss_sum
    whole.backward()
    assert whole.item() == pytest.approx(total.item(), rel=tolerance)
    gradient, expected = model.embedding.weight.grad, peer.transformer.wte.weight.grad  # of the head too: they are tied
    torch.testing.assert_close(gradient, expected, rtol=0, atol=10 * tolerance * expected.abs().max().item())
    alone = replace(examples, ids=[""] * (len(examples.offsets) - 1), sequences=None)  # each part an example
    parts_alone = sum(model(alone.batch([i])).loss_sum.item() for i in range(len(alone)))
    assert len(alone) > len(examples) + 3
    assert parts_alone == pytest.approx(total.item(), rel=tolerance)
    across = encode_texts_for_lm(rows_of(TEXTS), by_bytes, max_length=64, concatenate=True)
    seen_across = model(across.batch(range(len(across)))).loss_sum.item()
    assert seen_across != pytest.approx(total.item(), rel=1e-3)


RSS = """
import resource, sys
sys.path.insert(0, sys.argv[2])  # tests/
import numpy as np
from pathlib import Path
from data import TextExamples
from data.causal_lm import LanguageModelRecord
from support.evaluation import evaluation_context
from support.task_data import tiny_gpt2
from engine.evaluate import sum_statistics

model = tiny_gpt2(Path(sys.argv[1]), vocab_size=3000)

def peak(texts):
    ids = np.arange(texts * 60) % 3000
    examples = TextExamples(
        input_ids=ids.astype(np.int32), token_type_ids=np.zeros(len(ids), np.uint8),
        offsets=np.arange(texts + 1, dtype=np.int64) * 60, labels=None, token_labels=ids,
        ids=[str(i) for i in range(texts)], truncated=0, record=LanguageModelRecord(None, 0, np.ones(texts, np.int64)),
    )
    sum_statistics(model, examples, evaluation_context("causal-lm", 600))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

few = peak(20)
print(peak(2000) / few)
"""


@pytest.mark.slow
def test_p07_memory_does_not_grow_with_the_data(tmp_path):
    """100 times the data, whose logits would take 1.4 GB, needs no more memory."""
    import subprocess
    import sys

    arguments = [sys.executable, "-c", RSS, str(tmp_path), str(Path(__file__).parents[2])]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1.05


# Continuations


@pytest.fixture(scope="module")
def prompted(by_bytes, tmp_path_factory) -> tuple[models.TaskModel, TextExamples]:
    """Return a random model, and prompts of all lengths, including an empty one and a long one."""
    texts = ["", "a", "sh" * 9, "床前", "very", "x" * 200]
    model = tiny_gpt2(tmp_path_factory.mktemp("prompted"), seed=5, initializer_range=0.3)
    return model, encode_prompts(rows_of(texts), by_bytes, max_length=40)


def lines(model, examples, batch_tokens=4096, ranks=1, **changes) -> list[dict]:
    """Return what engine.predict writes on `ranks` ranks."""
    settings = GenerateSettings(**{"max_new_tokens": 7} | changes)
    found = {}
    for rank in range(ranks):
        for indices in evaluation_batches(
            examples, MicroBatching(max_tokens=batch_tokens, rank=rank, world_size=ranks)
        ):
            batch = examples.batch(indices)
            found |= dict(zip(batch.indices, LM.predict_batch(model, batch, examples, settings), strict=True))
    return [found[i] for i in range(len(examples))]


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_p": 0.9},
    "beams": {"num_beams": 3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_p12_a_continuation_does_not_depend_on_company_or_ranks(prompted, way):
    alone, together, on_two_ranks = (lines(*prompted, *batching, **way) for batching in ((1,), (4096,), (60, 2)))
    for a, b, c in zip(alone, together, on_two_ranks, strict=True):
        assert a["text"] == b["text"] == c["text"]
        assert a["score"] == pytest.approx(b["score"], rel=1e-4) == pytest.approx(c["score"], rel=1e-4)
        assert len(a["text"]) > 0
        assert END not in a["text"]


def test_a_long_prompt_loses_its_beginning_and_says_so(prompted, by_bytes):
    model, examples = prompted
    assert examples.truncated == 1
    assert examples.lengths.max() == 40
    assert [row["dropped"] for row in lines(*prompted)] == [0, 0, 0, 0, 0, 161]
    # New tokens may take 50 of 64 positions, so the prompt keeps half of all.
    rows = lines(*prompted, max_new_tokens=50)
    assert [row["dropped"] for row in rows] == [0, 0, 0, 0, 0, 161 + 40 - 32]
    short = encode_prompts(rows_of(["x" * 200]), by_bytes, max_length=32)
    assert lines(model, short, max_new_tokens=50)[0]["text"] == rows[-1]["text"]


def test_a_score_is_what_evaluation_says_of_the_same_tokens(prompted, by_bytes):
    """Generation with its cache and evaluation have the same distribution."""
    model, prompts = prompted
    for i, row in enumerate(lines(model, prompts)[:5]):
        ids = models.generate(
            model, [prompts.sequence(i)], generation_settings(model, GenerateSettings(max_new_tokens=7)), examples=[i]
        )[0].ids
        assert by_bytes.decode(ids) == row["text"]
        labels = np.array([*[IGNORE_INDEX] * (len(prompts.sequence(i)) - 1), *ids])
        text = replace(
            encode_prompts([], by_bytes, max_length=64),
            ids=["1"],
            input_ids=np.array([*prompts.sequence(i), *ids[:-1]], dtype=np.int32),
            token_type_ids=np.zeros(len(labels), dtype=np.uint8),
            offsets=np.array([0, len(labels)]),
            token_labels=labels,
            record=LanguageModelRecord(None, 0, np.array([1])),
        )
        loss_sum, _, tokens, _ = measured(model, text, 4096).tolist()
        assert row["score"] == pytest.approx(-loss_sum / tokens, rel=1e-5)


def test_generation_settings_come_from_recipe_and_config(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"num_beams": 5, "eos_token_id": 9}))
    model = tiny_gpt2(tmp_path, eos_token_id=[3, 4])
    settings = generation_settings(model, GenerateSettings(top_k=7, length_penalty=0.5))
    assert (settings.num_beams, settings.top_k, settings.length_penalty) == (1, 7, 0.5)
    assert settings.eos_token_id == (3, 4)
    assert settings.decoder_start_token_id is None
    assert generation_settings(model, GenerateSettings(), eos_token_id=(5,), max_new_tokens=2).eos_token_id == (5,)
    with pytest.raises(models.ModelError, match="choose one"):
        generation_settings(model, GenerateSettings(num_beams=2, do_sample=True))


def test_samples_show_texts_and_their_continuations(prompted, by_bytes):
    model, _ = prompted
    examples = encode_texts_for_lm(rows_of(["床前明月光", "very good"]), by_bytes, max_length=64)
    shown = LM.show_generations(model, examples, GenerateSettings(max_new_tokens=3), 3).splitlines()
    assert [line.split(":")[0] for line in shown] == ["  sample 1", "  sample 2"]
    assert f"{END}ver' -> '" in shown[1].replace('"', "'")
    assert LM.show_generations(model, examples, GenerateSettings(), 0) == ""
    blocks = encode_texts_for_lm(
        rows_of(["a", "b", "ccc", "dd"]), by_bytes, max_length=4, concatenate=True, document_mask=True
    )
    shown = LM.show_generations(model, blocks, GenerateSettings(max_new_tokens=3), 9).splitlines()
    assert [line.split(" -> ")[0] for line in shown] == [f"  sample block {i}: {END!r}" for i in (1, 2, 3)]


def test_blocks_with_a_document_mask_train_and_evaluate(tmp_path, capsys):
    """Any split of a step into micro-batches gives the same run, also from the cache."""
    settings = write("causal-lm", tmp_path, 40) | {
        "causal_lm.concatenate_texts": True,
        "causal_lm.document_mask": True,
        "data.max_length": 16,
        "data.cache": str(tmp_path / "cache"),
        "model.dropout.all": 0.0,
        "train.global_batch_size": 6,
        "train.max_steps": 3,
        "log.every_steps": 1,
    }
    losses = {}
    for limits in ({}, {"train.micro_batch_size": 2}, {"train.micro_batch_tokens": 20}):
        folder = tmp_path / f"run{len(losses)}"
        result = run_training(configs.override(Config(), settings | limits | {"run.folder": str(folder)}))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[str(limits)] = [row["loss"] for row in rows if "loss" in row], result["best_perplexity"]
    first = losses.pop("{}")
    assert len(first[0]) == 3
    for logged, perplexity in losses.values():
        assert logged == pytest.approx(first[0], rel=1e-6)
        assert perplexity == pytest.approx(first[1], rel=1e-6)
    shown = capsys.readouterr().out
    assert "texts in " in shown
    assert " blocks of data.max_length = 16 tokens; " in shown
    assert "taken from data.cache" in shown


def test_a_document_mask_without_blocks_is_refused(tmp_path):
    settings = write("causal-lm", tmp_path, 4) | {"causal_lm.document_mask": True, "run.folder": str(tmp_path / "run")}
    message = r"document_mask = True has no effect .*: leave it out, or set causal_lm\.concatenate_texts = true"
    with pytest.raises(ConfigError, match=message):
        run_training(configs.override(Config(), settings))


# Learning


def test_a_text_is_copied_after_training(tmp_path):
    """In `a b c . a b c` the tokens after the point are certain."""
    rng = random.Random(0)
    folder = write_model("causal-lm", tmp_path / "model")
    words = [word for word in VOCABULARY if word.isalpha()][:8]
    halves = [rng.choices(words, k=rng.randint(1, 3)) for _ in range(1600)]
    (tmp_path / "train.txt").write_text("\n".join(" ".join([*half, ".", *half]) for half in halves))
    values = write("causal-lm", tmp_path / "unused", 2) | {
        "run.folder": str(tmp_path / "run"),
        "model.name": str(folder),
        "model.dropout.all": 0.0,
        "data.train": str(tmp_path / "train.txt"),
        "data.validation": "",
        "train.global_batch_size": 64,
        "train.max_steps": 200,
        "optim.lr": 1e-2,
        "eval.every_steps": 200,
        "eval.num_shown_generations": 0,
        "log.every_steps": 100,
    }
    config = configs.override(Config(), values)
    run_training(config)
    prompts = [" ".join([*half, "."]) for half in halves[:100]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"text": prompt}) for prompt in prompts))
    output = tmp_path / "out.jsonl"
    assert predict.main([str(tmp_path / "run"), f"--input={tmp_path / 'prompts.jsonl'}", f"--output={output}"]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    right = [row["text"] == " ".join(half) and row["finished"] for row, half in zip(rows, halves, strict=False)]
    assert sum(right) > 95
