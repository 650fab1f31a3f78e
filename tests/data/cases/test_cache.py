"""data.cache: a second run has the same examples without encoding, and nothing out of date or damaged is taken."""

from __future__ import annotations

import json
import random
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from support import task_data
from support.cases import dry_run, evaluation, predictions, run, settings_for, write_file
from tokenizers import Tokenizer

import engine.tasks
from data import DataError, cache
from engine import config as configs
from engine import validate
from engine.config import ConfigError
from engine.tasks import TASKS, read_file

CACHED = [name for name, task in TASKS.items() if task.caches]
OTHERS = [name for name in TASKS if name not in CACHED]
ROWS = [{"id": f"r{i}", "text": f"the {colour} cat", "label": colour} for i, colour in enumerate(["red", "blue"] * 6)]


def equal(a: object, b: object) -> bool:
    """Return whether two values of examples or records are equal; tokenizers count as equal."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return isinstance(a, Tokenizer) or a == b


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("labelled", [True, False])
def test_examples_from_the_cache_are_equal_in_all_they_hold(tmp_path, monkeypatch, name, labelled):
    settings = task_data.write(name, tmp_path) | {"data.cache": str(tmp_path / "cache")}
    settings.pop("model.init")
    if "classification" in name or "regression" in name:
        settings |= {"data.long_texts": "windows", "data.window_overlap": 3}
    config = configs.override(configs.Config(), settings)
    task = TASKS[name]
    read = validate.task_settings(config, task)
    rows = read_file(task, config.data.train, read, True)
    labels = task.find_labels(config.data.train, rows, read)
    encode = task.encoder(task.load_processor(tmp_path / "model"), read, labels)
    first = encode(rows, labelled)
    monkeypatch.setattr(type(encode), "without_notes", None)
    second = encode(rows, labelled)
    assert (first.cache_note[:7], second.cache_note[:5]) == ("encoded", "taken")
    assert equal(replace(first, cache_note=""), replace(second, cache_note=""))
    assert first.fingerprint() == second.fingerprint()
    assert second.input_ids.flags.writeable


def cached(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("*"))


def test_a_second_run_says_that_it_took_the_data_from_the_cache(tmp_path, capsys):
    folder = tmp_path / "cache"
    settings = settings_for("text-classification", tmp_path, ROWS, data__cache=str(folder), eval__train_subset_size=4)
    plain = run(settings | {"data.cache": "", "run.folder": str(tmp_path / "plain")}, capsys)
    first = run(settings, capsys)
    second = run(settings | {"run.folder": str(tmp_path / "second")}, capsys)
    note, taken = f": encoded, and kept in data.cache = {folder}\n", f": taken from data.cache = {folder}\n"
    assert first.count(note) == second.count(taken) == 2
    assert note not in second
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("plain", "run", "second")]
    losses = [[json.loads(line).get("loss") for line in log] for log in logs]
    assert losses[0] == losses[1] == losses[2]
    assert plain.count("cache") == 0
    before, file = cached(tmp_path), write_file(tmp_path / "rows.jsonl", [{"id": "n", "text": "a dog", "label": "red"}])
    assert len(predictions(tmp_path / "run", file)) == evaluation(tmp_path / "run", file)["examples"] == 1
    assert cached(tmp_path) == before  # the folder is of training: another machine may not have it


@pytest.mark.parametrize(
    "change",
    [
        {"data.max_length": 20},
        {"data.split_special_tokens": False},
        {"data.long_texts": "head+tail"},
        {"row": "the green dog"},
        {"id": "another"},
        {"tokenizer": True},
        {"code": True},
    ],
)
def test_what_changes_the_examples_makes_another_file(tmp_path, capsys, monkeypatch, change):
    settings = settings_for("text-classification", tmp_path, ROWS, data__cache=str(tmp_path / "cache"))
    dry_run(settings, capsys)
    before = cached(tmp_path)
    rows = [dict(row) for row in ROWS]
    rows[0] |= {"text": change["row"]} if "row" in change else {"id": change["id"]} if "id" in change else {}
    write_file(tmp_path / "train.jsonl", rows)
    if "tokenizer" in change:
        tokenizer = Tokenizer.from_file(str(tmp_path / "model/tokenizer.json"))
        tokenizer.add_tokens(["never"])
        tokenizer.save(str(tmp_path / "model/tokenizer.json"))
        settings["model.init"] = "scratch"
        config = tmp_path / "model/config.json"
        size = len(tokenizer.get_vocab())
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": size}))
    if "code" in change:
        monkeypatch.setattr(cache, "VERSION", "0")
    dry_run(settings | {key: value for key, value in change.items() if "." in key}, capsys)
    assert len(cached(tmp_path)) > len(before)


def test_settings_that_change_nothing_keep_the_file(tmp_path, capsys):
    settings = settings_for("text-classification", tmp_path, ROWS, data__cache=str(tmp_path / "cache"))
    dry_run(settings, capsys)
    before = cached(tmp_path)
    other = write_file(tmp_path / "elsewhere.jsonl", ROWS)
    dry_run(settings | {"data.train": str(other), "train.max_steps": 3}, capsys)
    assert cached(tmp_path) == before


@pytest.mark.parametrize("damage", ["changed", "cut", "empty", "other"])
def test_a_damaged_file_is_said_and_made_again(tmp_path, capsys, damage):
    settings = settings_for("text-classification", tmp_path, ROWS, data__cache=str(tmp_path / "cache"))
    dry_run(settings, capsys)
    content = {file: file.read_bytes() for file in cached(tmp_path)}
    for i, (file, data) in enumerate(content.items()):
        others = [other for other in content.values() if other != data]
        place = random.Random(i).randrange(len(data) - 30, len(data))
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        file.write_bytes({"changed": changed, "cut": data[:-3], "empty": b"", "other": others[0][::-1]}[damage])
    assert dry_run(settings, capsys).count("is damaged") == 2
    assert {file: file.read_bytes() for file in cached(tmp_path)} == content


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    settings = settings_for("text-classification", tmp_path, ROWS, data__cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"data\.cache = .*; choose another folder, or leave it out"):
        dry_run(settings, capsys)


@pytest.mark.parametrize("name", OTHERS)
def test_tasks_whose_examples_are_not_kept_refuse_the_setting(tmp_path, name):
    config = configs.override(configs.Config(), {"run.task": name, "data.cache": "somewhere"})
    with pytest.raises(ConfigError, match=r"keeps no examples of .*: leave it out"):
        validate.task_settings(config, TASKS[name])


def test_a_plugin_that_encodes_is_refused(monkeypatch):
    base = TASKS["text-classification"]
    own = replace(base, encode=lambda *args: base.encode(*args))
    monkeypatch.setitem(engine.tasks.TASKS, "own", own)
    config = configs.override(configs.Config(), {"data.cache": "somewhere"})
    with pytest.raises(ConfigError, match="cannot tell when the code of a plugin changes"):
        validate.task_settings(config, own)
