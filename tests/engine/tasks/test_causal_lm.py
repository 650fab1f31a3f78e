"""Texts for a causal language model: what is predicted of them, how it is measured, and how they are continued."""

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
from support.runs import run_training
from support.task_data import VOCABULARY, tiny_gpt2, write, write_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

import models
from data import DataError, MicroBatching, Row, TextExamples, evaluation_batches
from data.causal_lm import LanguageModelRecord, encode_language, encode_prompts, end_token, read_texts
from engine import config as configs
from engine import evaluate, predict
from engine.config import Config, GenerateSettings
from engine.metrics.causal_lm import language_metrics, language_statistics
from engine.tasks import TASKS
from engine.tasks.generation import generation_settings

LM = TASKS["causal-lm"]
END = "<|endoftext|>"
TEXTS = ["a very short one", "床前明月光，疑是地上霜。", "x", "smile 😀 é\u0301", "w " * 40, "  spaces  "]


@pytest.fixture(scope="module")
def by_bytes() -> Tokenizer:
    """A token for each byte, with GPT-2's alphabet, and for two pairs of them; the end of text is 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([END, *alphabet, "sh", "ver"])}
    tokenizer = Tokenizer(BPE(vocabulary | {"ve": 259}, [("s", "h"), ("v", "e"), ("ve", "r")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def rows_of(texts: list[str]) -> list[Row]:
    return [Row(str(i), i, {"text": text}) for i, text in enumerate(texts, 1)]


def measured(
    model: models.TaskModel, examples: TextExamples, batch_tokens: int, task: str = "causal-lm"
) -> torch.Tensor:
    return evaluate.sum_statistics(model, examples, evaluation_context(task, batch_tokens))


# What is predicted


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("max_length", [1, 2, 7, 64])
def test_each_token_and_each_end_is_a_target_once(by_bytes, join, max_length):
    examples = encode_language(rows_of(TEXTS), by_bytes, max_length=max_length, concatenate=join)
    assert by_bytes.decode(examples.token_labels.tolist(), skip_special_tokens=False) == END.join([*TEXTS, ""])
    assert examples.lengths.max() <= max_length
    assert examples.truncated == 0
    before = 0
    for i in range(len(examples)):
        ids, labels = (
            examples.sequence(i),
            examples.token_labels[examples.offsets[i] : examples.offsets[i + 1]].tolist(),
        )
        assert ids == [before, *labels[:-1]]  # the first of a continued text is the last target of what it continues
        before = labels[-1]
    if join:
        assert set(examples.lengths[:-1]) <= {max_length}


@pytest.mark.parametrize("join", [False, True])
def test_ids_say_which_part_of_which_text(by_bytes, join):
    examples = encode_language(rows_of(["abc", "abcdefg", "a"]), by_bytes, max_length=4, concatenate=join)
    assert examples.ids == (["block 1", "block 2", "block 3", "block 4"] if join else ["1", "2", "2#2", "3"])
    assert examples.lengths.tolist() == [4, 4, 4, 2]


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("max_length", [1, 3, 50])
def test_bytes_of_all_examples_are_those_of_the_texts(by_bytes, join, max_length):
    rng = random.Random(max_length)
    characters = "ab é床😀\u0301\t" + END[0]
    texts = TEXTS + ["".join(rng.choices(characters, k=rng.randint(1, 30))) for _ in range(200)]
    examples = encode_language(rows_of(texts), by_bytes, max_length=max_length, concatenate=join)
    assert examples.record.num_bytes.sum() == sum(len(text.encode()) for text in texts)
    assert (examples.record.num_bytes >= 0).all()
    if not join and max_length == 50:
        whole = [i for i, name in enumerate(examples.ids) if "#" not in name and f"{name}#2" not in examples.ids]
        assert [examples.record.num_bytes[i] for i in whole] == [
            len(texts[int(examples.ids[i]) - 1].encode()) for i in whole
        ]


def test_no_rows_make_no_examples(by_bytes):
    for examples in (encode_language([], by_bytes, max_length=4), encode_prompts([], by_bytes, max_length=4)):
        assert len(examples) == 0
        assert examples.batch([]).num_tokens == 0


def test_p13_end_of_text_is_learned_although_it_is_the_pad(by_bytes, tmp_path):
    model = tiny_gpt2(tmp_path, pad_token_id=0)
    examples = encode_language(rows_of(["ab", "abcd"]), by_bytes, max_length=64)
    assert (examples.token_labels == 0).sum() == 2
    assert not (examples.token_labels == IGNORE_INDEX).any()
    batch = examples.batch([0, 1])
    out = model(batch)
    (gradient,) = torch.autograd.grad(out.loss_sum, out.logits)
    ends = batch.labels == 0
    assert (gradient[ends, 0] < -0.5).all()  # p - 1: what only the target's own logit can have


def test_a_tokenizer_without_an_end_of_text_says_what_is_needed():
    with pytest.raises(DataError, match="no token that ends a text"):
        end_token(Tokenizer(BPE({"a": 0}, [])))


# Files


def test_lines_of_text_are_texts(tmp_path):
    file = tmp_path / "poems.txt"
    file.write_bytes("\ufeff床前明月光\r\n\r\n  \nsecond line \n".encode())
    rows = read_texts(str(file), "text")
    assert [(row.id, row.line, row.values["text"]) for row in rows] == [
        ("1", 1, "床前明月光"),
        ("2", 4, "second line "),
    ]
    renamed = file.rename(tmp_path / "poems")
    assert len(read_texts(str(renamed), "text", format="text")) == 2
    with pytest.raises(DataError, match=r"have no column 'poet'; drop data\.group"):
        read_texts(str(renamed), "text", group="poet", format="text")


BAD = {
    "not UTF-8": (b"good\n\xff\xfe\n", ".txt", "2: not UTF-8"),
    "NUL": (b"good\nno\0t\n", ".txt", "2: a NUL character"),
    "no line": (b"\n \n", ".txt", "no lines of text"),
    "too long": (b"x" * 1_000_001, ".txt", "1: 1,000,001 characters in one line"),
    "no column": (b'{"text": "a"}\n{"txt": "a"}\n', ".jsonl", "2: no column 'text'"),
    "empty": (b'{"text": "a"}\n{"text": " "}\n', ".jsonl", "2: 'text' is empty"),
    "number": (b'{"text": 3}\n', ".jsonl", "1: 'text' should be text, this is 3"),
    "null": (b'{"text": null}\n', ".jsonl", "1: column 'text' is null"),
    "twice": (b'{"text": "a", "id": 1}\n{"text": "a", "id": 1}\n', ".jsonl", "2: the id '1' is that of line 1 too"),
}


@pytest.mark.parametrize(("content", "suffix", "reason"), BAD.values(), ids=BAD)
def test_f13_a_bad_line_is_named(tmp_path, content, suffix, reason):
    file = tmp_path / f"bad{suffix}"
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_texts(str(file), "text")
    assert f"{file}:" in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(("name", "reason"), [("none.txt", "no such file"), ("", "cannot be read: Is a directory")])
def test_a_file_that_cannot_be_read(tmp_path, name, reason):
    with pytest.raises(DataError, match=reason):
        read_texts(str(tmp_path / name), "text", format="text")


# Measuring


def ours(model: models.TaskModel, folder: Path, ids: list[int]) -> torch.Tensor:
    """The logits of one text, all of them, (T, V)."""
    return model(models.pack([ids])).logits


def theirs(model: models.TaskModel, folder: Path, ids: list[int]) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    models.save_pretrained(model, folder)
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("logits_of", [ours, pytest.param(theirs, marks=pytest.mark.oracle)])
def test_p02_loss_is_plain_cross_entropy_for_any_batches(by_bytes, tmp_path, logits_of, join):
    """The oracle reads one text after another, with the logits of a whole text at once."""
    model = tiny_gpt2(tmp_path, seed=3)
    examples = encode_language(rows_of(TEXTS), by_bytes, max_length=64, concatenate=join)
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


def test_statistics_against_numpy_and_at_their_limits():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(9, 5)), rng.integers(0, 5, 12)
    labels[[0, 4, 11]] = IGNORE_INDEX
    statistics = language_statistics(torch.tensor(7.0), torch.tensor(logits), torch.tensor(labels), 20)
    hits = (logits.argmax(-1) == labels[labels != IGNORE_INDEX]).sum()
    assert statistics.tolist() == [7.0, hits, 9, 20]
    assert statistics.dtype == torch.float64
    nothing = language_statistics(torch.tensor(0.0), torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 0)
    assert nothing.tolist() == [0, 0, 0, 0]
    assert language_metrics(torch.tensor([9000.0, 0, 9, 20]).double())["perplexity"] == math.inf


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
    """100 times the data; its logits would be 1.4 GB."""
    import subprocess
    import sys

    arguments = [sys.executable, "-c", RSS, str(tmp_path), str(Path(__file__).parents[2])]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1.05


# Continuing


@pytest.fixture(scope="module")
def prompted(by_bytes, tmp_path_factory) -> tuple[models.TaskModel, TextExamples]:
    """A random model and prompts of all lengths, an empty one and a long one among them."""
    texts = ["", "a", "sh" * 9, "床前", "very", "x" * 200]
    model = tiny_gpt2(tmp_path_factory.mktemp("prompted"), seed=5, initializer_range=0.3)
    return model, encode_prompts(rows_of(texts), by_bytes, max_length=40)


def lines(model, examples, batch_tokens=4096, ranks=1, **changes) -> list[dict]:
    """What engine.predict writes, on so many ranks."""
    settings = GenerateSettings(**{"max_new_tokens": 7} | changes)
    found = {}
    for rank in range(ranks):
        for part in evaluation_batches(examples, MicroBatching(max_tokens=batch_tokens, rank=rank, world_size=ranks)):
            batch = examples.batch(part)
            found |= dict(zip(batch.indices, LM.predict_batch(model, batch, examples, settings), strict=True))
    return [found[i] for i in range(len(examples))]


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_p": 0.9},
    "beams": {"num_beams": 3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_p12_a_continuation_does_not_depend_on_company_or_ranks(prompted, way):
    alone, together, apart = (lines(*prompted, *how, **way) for how in ((1,), (4096,), (60, 2)))
    for a, b, c in zip(alone, together, apart, strict=True):
        assert a["text"] == b["text"] == c["text"]
        assert a["score"] == pytest.approx(b["score"], rel=1e-4) == pytest.approx(c["score"], rel=1e-4)
        assert len(a["text"]) > 0
        assert END not in a["text"]


def test_a_long_prompt_loses_its_beginning_and_says_so(prompted, by_bytes):
    model, examples = prompted
    assert examples.truncated == 1
    assert examples.lengths.max() == 40
    assert [row["dropped"] for row in lines(*prompted)] == [0, 0, 0, 0, 0, 161]
    # Of 64 positions 50 are wanted for what is written: the prompt keeps half of all.
    rows = lines(*prompted, max_new_tokens=50)
    assert [row["dropped"] for row in rows] == [0, 0, 0, 0, 0, 161 + 40 - 32]
    short = encode_prompts(rows_of(["x" * 200]), by_bytes, max_length=32)
    assert lines(model, short, max_new_tokens=50)[0]["text"] == rows[-1]["text"]


def test_a_score_is_what_evaluation_says_of_the_same_tokens(prompted, by_bytes):
    """One distribution: of generation with its cache, and of measuring."""
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
    examples = encode_language(rows_of(["床前明月光", "very good"]), by_bytes, max_length=64)
    shown = LM.show_generations(model, examples, GenerateSettings(max_new_tokens=3), 3).splitlines()
    assert [line.split(":")[0] for line in shown] == ["  sample 1", "  sample 2"]
    assert f"{END}ver' -> '" in shown[1].replace('"', "'")
    assert LM.show_generations(model, examples, GenerateSettings(), 0) == ""


# Learning


def test_a_text_is_copied_after_training(tmp_path):
    """`a b c . a b c`: what follows the point is certain."""
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
