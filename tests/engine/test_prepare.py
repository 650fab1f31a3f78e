"""Training from a prepared folder: the examples, losses and weights are those of the file, for every task of texts."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs import assert_same_tensors, logged_rows, run_training
from support.task_data import DATA, write, write_rows
from support.task_settings import settings_of

from data.examples import TextExamples
from data.mapped import MappedExamples
from engine import config as configs
from engine import preparation, prepare
from engine.config import Config, ConfigError
from engine.tasks import TASKS, read_training_data

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{task: (task, {}) for task in DATA},
    "windows": ("text-classification", {"data.long_texts": "windows", "data.max_length": 12, "data.window_overlap": 4}),
    "words in windows": ("token-classification", {"data.long_texts": "windows", "data.window_overlap": 4}),
    "blocks": ("causal-lm", {"causal_lm.concatenate_texts": True}),
    "documents": ("causal-lm", {"causal_lm.concatenate_texts": True, "causal_lm.document_mask": True}),
    "some": ("multi-label-classification", {"data.max_train_examples": 11}),
}


def config_of(folder: Path, settings: dict[str, Any], **changes: Any) -> Config:
    values = {"run.folder": str(folder), "train.max_steps": 4, "eval.every_steps": 2, **settings, **changes}
    config = configs.override(Config(), values | {"eval.train_subset_size": 5})
    configs.check(config)
    return config


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard has 7 rows, which three windows bring."""
    monkeypatch.setattr(preparation, "PART_ROWS", 7)
    monkeypatch.setattr(preparation, "WINDOW_ROWS", 3)


@pytest.fixture(params=VARIANTS)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    """A recipe whose validation rows are held out."""
    task, changes = VARIANTS[request.param]
    return config_of(tmp_path / "file", write(task, tmp_path) | {"data.validation": ""} | changes)


def prepared(config: Config, folder: Path, **changes: Any) -> Config:
    """Prepare the data of a recipe; return the recipe that trains from the folder."""
    prepare.prepare(config, folder / "prepared", 1)
    names = {"data.train": str(folder / "prepared"), "run.folder": str(folder / "from-folder")}
    return configs.override(config, names | changes)


def encoded(config: Config) -> Any:
    task, settings = TASKS[config.run.task], settings_of(config)
    rows = read_training_data(task, settings, config.run.seed)
    return task.encoder(task.load_processor(Path(config.model.name)), settings, rows.labels)(rows.train)


def test_the_losses_and_weights_are_those_of_the_file(config, tmp_path):
    from_folder = prepared(config, tmp_path)
    assert run_training(config) is not None and run_training(from_folder) is not None
    assert logged_rows(config.run.folder) == logged_rows(from_folder.run.folder)
    for name in ("best", "last"):
        assert_same_tensors(*(Path(c.run.folder) / name / "model.safetensors" for c in (config, from_folder)))


def test_every_example_is_that_of_the_file(config, tmp_path):
    mine, theirs = encoded(prepared(config, tmp_path)), encoded(config)
    assert isinstance(mine, MappedExamples) and isinstance(theirs, TextExamples)
    assert len(mine) == len(theirs) and [*mine.ids] == theirs.ids and mine.truncated == theirs.truncated
    assert mine.lengths[np.arange(len(mine))].tolist() == theirs.lengths.tolist()
    assert mine.fingerprint() == theirs.fingerprint() == mine.compute_fingerprint()
    every = list(range(len(mine)))
    for chosen in ([], every, every[::-1], every[3:1:-1]):
        assert repr(mine.batch(chosen)) == repr(theirs.batch(chosen))


# Formats: the same rows from other files


def as_table(rows: list[dict[str, Any]], file: Path) -> None:
    columns = [*rows[0]]
    separator = {".csv": ",", ".tsv": "\t"}[file.suffix]
    quoted = [
        [f'"{row[c]}\n{row[c]}"' if file.suffix == ".csv" and c == "text" else str(row[c]) for c in columns]
        for row in rows
    ]
    file.write_text("\n".join(separator.join(line) for line in [columns, *quoted]) + "\n")


def as_parquet(rows: list[dict[str, Any]], file: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def as_conll(rows: list[dict[str, Any]], file: Path) -> None:
    sentences = ["".join(f"{w}\t{t}\n" for w, t in zip(row["tokens"], row["tags"], strict=True)) for row in rows]
    file.write_text("\n".join(sentences))


def as_squad(rows: list[dict[str, Any]], file: Path) -> None:
    paragraphs = [
        {"context": row["context"], "qas": [{k: row[k] for k in ("id", "question", "answers")}]} for row in rows
    ]
    file.write_text(json.dumps({"data": [{"title": "", "paragraphs": paragraphs}]}))


def as_lines(rows: list[dict[str, Any]], file: Path) -> None:
    file.write_text("".join(f"{row['text']}\n\n" for row in rows))


def as_array(rows: list[dict[str, Any]], file: Path) -> None:
    file.write_text(json.dumps(rows))


FORMATS = {
    "csv": ("text-classification", as_table),
    "tsv": ("text-classification", as_table),
    "json": ("text-classification", as_array),
    "parquet": ("multi-label-classification", as_parquet),
    "conll": ("token-classification", as_conll),
    "squad": ("question-answering", as_squad),
    "txt": ("causal-lm", as_lines),
}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_examples_of_its_file(format, tmp_path):
    task, convert = FORMATS[format]
    settings = write(task, tmp_path) | {"data.validation": ""}
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    file = tmp_path / f"train.{'json' if format == 'squad' else format}"
    convert(rows, file)
    config = config_of(tmp_path, settings, **{"data.train": str(file)})
    mine, theirs = encoded(prepared(config, tmp_path)), encoded(config)
    assert mine.fingerprint() == theirs.fingerprint()
    assert [*mine.ids] == theirs.ids
