"""Summarization and translation: training from files, encoding, evaluation and the texts that are written."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import run_training
from support.task_settings import task_settings
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

import models as native
from benchmarks.prepare.django_messages import read_catalogue, select_pairs
from data import DataError, Row, TextExamples
from data.formats.lines import locate
from data.seq2seq import PairTokenizer, encode_pairs, read_pairs
from engine import config as configs
from engine import evaluate, predict
from engine.config import Config, GenerateSettings
from engine.metrics.translation import choose_tokenizer
from engine.tasks import TASKS
from engine.tasks.seq2seq import write_texts

WORDS = list("abcdefgh")
CHINESE = list("一二三四五六七八")  # each is a token, without spaces between them
SPECIAL = ["<pad>", "</s>", "<unk>"]
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL, *WORDS, *CHINESE, "go:"])}
T5 = {"d_model": 32, "d_kv": 16, "num_heads": 4, "d_ff": 64, "num_layers": 1, "dropout_rate": 0.0}


def write_t5(folder: Path, ends: bool = True, **changes: Any) -> Path:
    """Write the config.json of a tiny T5, with an embedding larger than the vocabulary, and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[一-龥]"), "isolated")]
    )
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"model_type": "t5", "vocab_size": len(VOCABULARY) + 12, "pad_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(fields | T5 | changes))
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def problem(kind: str, count: int, seed: int, shortest: int = 3, longest: int = 3) -> list[dict[str, Any]]:
    """Return rows to learn. kind: copy or reverse the words, or translate each letter to a Chinese character."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        source = rng.choices(WORDS, k=rng.randint(shortest, longest))
        if kind == "translate":
            target = "".join(CHINESE[WORDS.index(word)] for word in source)
        else:
            target = " ".join(source if kind == "copy" else reversed(source))
        rows.append({"id": f"r{i}", "text": " ".join(source), "summary": target})
    return rows


def config_of(folder: Path, kind: str, **changes: Any) -> Config:
    """Return the configuration of 300 steps of 64 examples, enough to learn a problem, with `changes`."""
    train, validation = problem(kind, 4000, 0), problem(kind, 60, 1)
    values = {
        "run.task": "translation" if kind == "translate" else "summarization",
        "run.folder": str(folder / "run"),
        "run.device": "cpu",
        "model.name": str(write_t5(folder / "t5")),
        "model.init": "scratch",
        "data.train": str(write_rows(folder / "train.jsonl", train)),
        "data.validation": str(write_rows(folder / "validation.jsonl", validation)),
        "data.text_column": "text",
        "data.label_column": "summary",
        "train.global_batch_size": 64,
        "train.max_steps": 300,
        "optim.lr": 5e-3,
        "eval.every_steps": 300,
        "generate.max_new_tokens": 8,
    }
    config = configs.override(Config(), values | changes)
    configs.check(config)
    return config


@pytest.mark.parametrize(
    ("kind", "metric"),
    [
        ("copy", "rouge2"),
        pytest.param("reverse", "rouge2", marks=pytest.mark.slow),
        pytest.param("translate", "chrf", marks=pytest.mark.slow),
    ],
)
def test_tiny_model_learns_and_predicts_as_evaluated(kind, metric, tmp_path, capfd):
    config = config_of(
        tmp_path, kind, **{"eval.metric": "loss" if kind == "translate" else metric, "eval.num_shown_generations": 2}
    )
    assert run_training(config) is not None
    shown = capfd.readouterr().out
    assert shown.count("reference: ") == shown.count("written: ") == 2

    run, file = str(tmp_path / "run"), config.data.validation
    assert evaluate.main([run, "--data.test", file, "--output", str(tmp_path / "metrics.json")]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert ("tok:zh" in capfd.readouterr().out) == (kind == "translate")
    assert predict.main([run, "--input", file, "--output", str(tmp_path / "out.jsonl")]) == 0
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    assert all(set(row) == {"id", "text", "score", "finished"} for row in written)
    texts = [row["text"].replace(" ", "") if kind == "translate" else row["text"] for row in written]
    exact = sum(text == row["summary"] for text, row in zip(texts, rows, strict=True)) / len(rows)
    assert exact > 0.95
    assert metrics[metric] > (0.95 if kind != "translate" else 95)
    assert metrics["length_ratio"] == pytest.approx(1, abs=0.02)


def write_parallel(folder: Path, en: bytes, zh: bytes) -> str:
    (folder / "corpus.en").write_bytes(en)
    (folder / "corpus.zh").write_bytes(zh)
    return str(folder / "corpus")


def test_a_recipe_reads_parallel_files(tmp_path):
    name = write_parallel(tmp_path, b"a b\nc\n", "一二\n三\n".encode())
    task = TASKS["translation"]
    settings = task_settings("translation", train=name, format="parallel", text_column="en", label_column="zh")
    processor = task.load_processor(write_t5(tmp_path / "t5"))
    examples = task.encode(task.read(name, settings, True), processor, settings, (), True)
    assert examples.target(0) == [VOCABULARY["一"], VOCABULARY["二"], 1]


# Examples


def encoded(tmp_path: Path, rows: list[dict[str, str]], **settings: Any) -> TextExamples:
    processor = TASKS["summarization"].load_processor(write_t5(tmp_path / "t5"))
    pairs = [Row(str(i), i, row) for i, row in enumerate(rows, 1)]
    return encode_pairs(pairs, processor, **{"source": "text", "target": "summary", "max_length": 20} | settings)


def test_a_prefix_stands_before_every_source_and_no_target(tmp_path):
    examples = encoded(tmp_path, [{"text": "a b", "summary": "c"}], prefix="go: ")
    assert examples.sequence(0) == [VOCABULARY["go:"], VOCABULARY["a"], VOCABULARY["b"], 1]
    assert examples.target(0) == [VOCABULARY["c"], 1]


def test_sources_and_targets_are_truncated_and_counted(tmp_path):
    rows = [
        {"text": "a b c d e", "summary": "a b c d"},
        {"text": "a", "summary": "一二三四五"},
        {"text": "a b c", "summary": "a b"},
    ]
    examples = encoded(tmp_path, rows, max_length=4, max_target_length=3)
    assert [len(examples.sequence(i)) for i in range(3)] == [4, 2, 4]
    assert [len(examples.target(i)) for i in range(3)] == [3, 3, 3]
    assert {ids[-1] for i in range(3) for ids in (examples.sequence(i), examples.target(i))} == {1}  # the end remains
    assert examples.truncated == 1
    assert examples.notes == (
        "warning: 1 of 3 texts truncated to data.max_length = 4, 16.7% of all tokens lost",
        "warning: 2 of 3 targets truncated to seq2seq.max_target_length = 3, 35.7% of all tokens lost",
    )
    long = encoded(tmp_path, rows, max_new_tokens=3).notes
    assert long == (
        "warning: 2 of 3 targets are longer than generate.max_new_tokens = 3: their ends are never written",
    )


def test_decoder_reads_the_shifted_target_after_the_start_token(tmp_path):
    folder = write_t5(tmp_path / "t5", decoder_start_token_id=5)
    processor = TASKS["summarization"].load_processor(folder)
    rows = [Row("1", 1, {"text": "a b", "summary": "b"}), Row("2", 2, {"text": "c", "summary": "d e f"})]
    batch = encode_pairs(rows, processor, source="text", target="summary", max_length=9).batch([1, 0])
    d, e, f, b = (VOCABULARY[word] for word in "defb")
    assert batch.labels.tolist() == [d, e, f, 1, b, 1]
    assert batch.decoder_input_ids.tolist() == [5, d, e, f, 5, b]
    assert batch.decoder_lengths == (4, 2)
    assert batch.num_targets == 6


def test_the_loss_of_teacher_forcing_is_that_of_transformers(tmp_path):
    """transformers pads labels with -100 and shifts them in the model; ours are packed, and shifted in the data."""
    folder = write_t5(tmp_path / "t5")
    model = native.from_pretrained(folder, head="seq2seq-lm", init="scratch", seed=3).eval()
    native.save_pretrained(model, tmp_path / "saved")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    examples = encoded(tmp_path, problem("reverse", 7, 0, shortest=1, longest=6))
    batch = examples.batch(range(len(examples)))
    sources = [torch.tensor(examples.sequence(i)) for i in range(len(examples))]
    targets = [torch.tensor(examples.target(i)) for i in range(len(examples))]
    ids = torch.nn.utils.rnn.pad_sequence(sources, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in sources], batch_first=True)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
        found = model(batch).loss_sum / batch.num_targets
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"eos_token_id": 2}, r"tokenizer does not end a text with eos_token_id = 2 of config.json"),
        ({"eos_token_id": None}, r"does not end a text with eos_token_id = None"),
        ({"ends": False}, r"does not end a text with eos_token_id = 1"),
        ({"pad_token_id": None}, r"decoder_start_token_id = None should be the id of a token"),
    ],
)
def test_a_model_that_could_not_begin_or_end_a_text_is_an_error(changes, reason, tmp_path):
    with pytest.raises(DataError, match=reason):
        TASKS["summarization"].load_processor(write_t5(tmp_path / "t5", **changes))


def test_the_first_examples_show_what_is_to_be_written(tmp_path):
    examples = encoded(tmp_path, [{"text": "a 一", "summary": "c"}])
    lines = examples.show(0, PairTokenizer(Tokenizer.from_file(str(tmp_path / "t5/tokenizer.json")), 0), ())
    assert lines[1] == "a 一 </s>"
    assert "target: c </s>" in lines


# Written texts


@pytest.mark.parametrize("beams", [1, 3])
def test_p12_generated_texts_have_valid_ids_and_no_padding(beams, tmp_path):
    """A random model writes any id, also ids that the tokenizer lacks, and texts of any length."""
    task = TASKS["summarization"]
    model = native.from_pretrained(write_t5(tmp_path / "t5"), head="seq2seq-lm", init="scratch", seed=5)
    settings = task_settings("summarization")
    rows = [Row(str(i), i, row) for i, row in enumerate(problem("copy", 40, 2, 1, 9))]
    examples = task.encode(rows, task.load_processor(tmp_path / "t5"), settings, (), True)
    written = write_texts(model, range(40), examples, GenerateSettings(max_new_tokens=7, num_beams=beams))
    assert len(written) == 40
    for text, one in written:
        assert 0 < len(one.ids) <= 7
        assert all(0 <= i < model.backbone.config.vocab_size for i in one.ids)
        assert 1 not in one.ids[:-1]  # the end comes last
        assert not any(special in text for special in SPECIAL)


def test_sampled_texts_do_not_depend_on_their_company(tmp_path):
    task, generate = TASKS["summarization"], GenerateSettings(max_new_tokens=6, do_sample=True)
    model = native.from_pretrained(write_t5(tmp_path / "t5"), head="seq2seq-lm", init="scratch", seed=5)
    rows = [Row(str(i), i, row) for i, row in enumerate(problem("copy", 9, 2, 1, 9))]
    examples = task.encode(rows, task.load_processor(tmp_path / "t5"), task_settings("summarization"), (), True)
    together = [text for text, _ in write_texts(model, range(9), examples, generate)]
    assert [text for i in range(9) for text, _ in write_texts(model, [i], examples, generate)] == together
    assert len(set(together)) > 5


# Shipped samples


def test_shipped_tokenizer_knows_the_shipped_messages():
    folder = "package:data/samples/django_messages"
    rows = read_pairs(f"{folder}/messages.jsonl", "source", "target")
    assert len(rows) == len({row.values["source"].lower() for row in rows}) == 783
    processor = TASKS["translation"].load_processor(locate(f"{folder}/model"))
    unknown = processor.token_to_id("<unk>")
    examples = encode_pairs(rows, processor, target="target", max_length=200, max_target_length=200)
    assert unknown not in [*examples.input_ids, *examples.target_ids]
    assert choose_tokenizer([row.values["target"] for row in rows]) == "zh"
    tokenizer = processor.tokenizer
    for i in range(0, 783, 10):  # every target can be written
        assert tokenizer.decode(examples.target(i)) == rows[i].values["target"]


def test_a_catalogue_is_read_message_by_message():
    text = r"""
msgid ""
msgstr "Project-Id-Version: a header\n"

#, fuzzy
msgid "unsure"
msgstr "不确定"

#, python-format
msgid "Please correct the error "
"below."
msgstr "请修正"
"以下错误。"

msgid "%(n)d week"
msgid_plural "%(n)d weeks"
msgstr[0] "%(n)d 周"

msgid "untranslated"
msgstr ""
"""
    pairs = [*read_catalogue(text)]
    assert pairs == [("Please correct the error below.", "请修正以下错误。"), ("%(n)d weeks", "%(n)d 周")]
    same = select_pairs(iter([*pairs, ("URL", "URL"), ("%s", "%s 个"), ("%(n)d Weeks", "%(n)d 星期")]))
    assert [row["id"] for row in same] == ["1", "2"]
