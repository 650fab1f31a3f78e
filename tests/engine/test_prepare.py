"""Training from a prepared folder: the examples, losses and weights are those of the file, for every task of texts."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs import (
    StopAfter,
    arguments_of,
    assert_same_run,
    assert_same_tensors,
    logged_rows,
    run_module,
    run_training,
)
from support.task_data import DATA, write
from support.task_settings import settings_of

from data import MicroBatching, training_steps
from data.errors import DataError
from data.examples import TextExamples
from data.mapped import MappedExamples
from data.prepared import ShardEntry, read_manifest, write_manifest, write_shard
from data.writing import WRITING
from engine import config as configs
from engine import preparation, prepare
from engine.config import Config, ConfigError
from engine.errors import TrainingError
from engine.tasks import TASKS, read_training_data

ROOT = Path(preparation.__file__).parent.parent
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{task: (task, {}) for task in DATA},
    "windows": ("text-classification", {"data.long_texts": "windows", "data.max_length": 12, "data.window_overlap": 4}),
    "words in windows": ("token-classification", {"data.long_texts": "windows", "data.window_overlap": 4}),
    "whole words": ("masked-lm", {"masked_lm.whole_words": True, "data.max_length": 9}),
    "masked blocks": ("masked-lm", {"masked_lm.whole_words": True, "masked_lm.concatenate_texts": True}),
    "spans of long texts": ("span-corruption", {"data.max_length": 9}),
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


@pytest.fixture
def reviews(tmp_path: Path) -> Config:
    return config_of(tmp_path / "file", write("text-classification", tmp_path) | {"data.validation": ""})


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
    assert run_training(config) is not None
    assert run_training(from_folder) is not None
    assert logged_rows(config.run.folder) == logged_rows(from_folder.run.folder)
    for name in ("best", "last"):
        assert_same_tensors(*(Path(c.run.folder) / name / "model.safetensors" for c in (config, from_folder)))


def test_every_example_is_that_of_the_file(config, tmp_path):
    mine, theirs = encoded(prepared(config, tmp_path)), encoded(config)
    assert isinstance(mine, MappedExamples)
    assert isinstance(theirs, TextExamples)
    assert [*mine.ids] == theirs.ids
    assert mine.truncated == theirs.truncated
    assert mine.lengths[np.arange(len(mine))].tolist() == theirs.lengths.tolist()
    assert mine.fingerprint() == theirs.fingerprint() == mine.compute_fingerprint()
    every = list(range(len(mine)))
    for chosen in ([], every, every[::-1], every[3:1:-1]):
        assert repr(mine.batch(chosen)) == repr(theirs.batch(chosen))


def train_both(config: Config, tmp_path: Path, stop_after: int = 0, **changes: Any) -> None:
    """Train from the file and from the folder, the latter resumed after `stop_after` steps; assert equal runs."""
    from_folder = prepared(config, tmp_path, **changes)
    config = configs.override(config, changes)
    assert run_training(config) is not None
    if stop_after:
        assert run_training(from_folder, StopAfter(stop_after)) is None
        from_folder = configs.override(from_folder, {"run.resume": "yes"})
    assert run_training(from_folder) is not None
    assert_same_run(config.run.folder, from_folder.run.folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"data.num_workers": 2, "train.micro_batch_tokens": 60},
        {"train.sampler": "balanced", "train.micro_batch_size": "auto"},
        {"regularize.class_weights": ("balanced",), "stop_after": 2},
        {"data.teacher_file": "{}/teacher.jsonl", "regularize.distillation_weight": 0.5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_reads_the_examples_reads_those_of_a_folder(changes, reviews, tmp_path):
    with (tmp_path / "teacher.jsonl").open("w") as stream:
        for i in range(24):
            stream.write(json.dumps({"id": f"train-{i}", "logits": [i, 1, -i / 7]}) + "\n")
    named = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in changes.items()}
    train_both(reviews, tmp_path, **named)


def test_a_head_may_have_the_labels_in_another_order(reviews, tmp_path):
    first = configs.override(reviews, {"data.labels": ("red", "blue", "green"), "run.folder": str(tmp_path / "first")})
    assert run_training(first) is not None
    config = configs.override(reviews, {"model.name": str(tmp_path / "first" / "best"), "model.init": "pretrained"})
    from_folder = prepared(config, tmp_path)
    assert run_training(config) is not None
    assert run_training(from_folder) is not None
    assert logged_rows(config.run.folder) == logged_rows(from_folder.run.folder)
    assert logged_rows(config.run.folder)[0]["loss"] > 0


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


# Interrupted, damaged, of other settings


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupted_command_continues_to_the_same_bytes(stride, reviews, tmp_path, monkeypatch):
    """It is interrupted when it writes its first file, or the sixth, and so on, until it is not any more."""
    prepare.prepare(reviews, tmp_path / "whole", 1)
    rename, calls, whole = os.replace, [], contents(tmp_path / "whole")

    def fail_at(number: int) -> Callable[..., None]:
        def replace_or_fail(*paths: Any) -> None:
            calls.append(paths)
            if len(calls) == number:
                raise KeyboardInterrupt
            rename(*paths)

        return replace_or_fail

    for number in itertools.count(1, stride):
        folder = tmp_path / f"stopped-{number}"
        calls.clear()
        monkeypatch.setattr(os, "replace", fail_at(number))
        try:
            prepare.prepare(reviews, folder, 1)
            break  # there are no more files to write
        except KeyboardInterrupt:
            (folder / f"{WRITING}00").write_text("as a process leaves it that is killed")
        monkeypatch.setattr(os, "replace", rename)
        done = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
        prepare.prepare(reviews, folder, 1)
        assert contents(folder) == whole
        parts = len([path for path, time in done.items() if path.stat().st_mtime_ns == time])
        assert parts >= len(done) - 1  # only the last one may not have been done
    assert number > 20


@pytest.mark.slow
def test_a_killed_command_continues_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.undo()  # parts of the real size, as the processes of the command make
    config = config_of(tmp_path, write("causal-lm", tmp_path, count=200_000) | {"data.validation": ""})
    arguments = [*arguments_of(config, tmp_path / "recipe.toml"), "--workers", "2", "--out"]
    prepare.prepare(config, tmp_path / "whole", 1)
    rng, folder = random.Random(0), tmp_path / "killed"
    for seconds in (2.0, *(rng.uniform(2, 12) for _ in range(8)), 1000.0):
        command = [sys.executable, "-m", "data.prepare", *arguments, str(folder)]
        try:
            subprocess.run(command, cwd=ROOT, check=True, timeout=seconds)  # SIGKILL
        except subprocess.TimeoutExpired:
            continue
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_read_a_folder_as_the_file(reviews, tmp_path):
    from_folder = prepared(reviews, tmp_path)
    for config in (reviews, from_folder):
        done = run_module("engine.train", *arguments_of(config, tmp_path / "recipe.toml"), ranks=2)
        assert done.returncode == 0, done.stderr
    assert_same_run(reviews.run.folder, from_folder.run.folder)


def test_a_full_disk_is_one_sentence_with_what_is_needed(reviews, tmp_path, monkeypatch):
    def fail(*paths: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(configs.to_toml(reviews))
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(TrainingError, match=r"the disk is full, with .* free; more is needed.*it continues"):
        prepare.main([str(recipe), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data.max_length": 12}, "data.max_length = 12, but .* was prepared with 24"),
        ({"data.labels": ("green", "blue", "red")}, r"data.labels = \['green', 'blue', 'red'\], but .* with \[\]"),
        ({"run.seed": 3}, "run.seed = 3, but .* was prepared with 0"),
        ({"data.validation_fraction": 0.2}, "data.validation_fraction = 0.2, but .* was prepared with 0.1"),
        ({"data.validation": "{}/validation.jsonl"}, r"rows that are held out, and now they are a file of its own"),
        ({"eval.train_subset_size": 7}, "eval.train_subset_size = 7, but .* was prepared with 5"),
        ({"augment.text.delete": 0.1}, "augment.text.delete = 0.1: .* has the tokens of the texts alone"),
        ({"model.name": "{}/other"}, "was prepared with another tokenizer"),
        ({"run.task": "text-regression"}, "run.task = 'text-regression', but .* was prepared with 'text-class"),
    ],
)
def test_other_settings_are_one_sentence(change, words, reviews, tmp_path):
    shutil.copytree(reviews.model.name, tmp_path / "other")
    tokenizer = (tmp_path / "other" / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(tokenizer.replace('"cat"', '"cats"'))
    named = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in change.items()}
    config = prepared(reviews, tmp_path, **named)
    with pytest.raises((ConfigError, DataError), match=words) as caught:
        run_training(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "from-folder").exists()


def test_a_damaged_shard_is_named_and_made_again(reviews, tmp_path):
    config = prepared(reviews, tmp_path)
    folder, whole = tmp_path / "prepared", contents(tmp_path / "prepared")
    shard = folder / "shard-00001.safetensors"
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00001.safetensors is missing; .*makes it again"):
        run_training(config)
    shard.write_bytes(b"short")
    with pytest.raises(DataError, match=r"has 5 bytes, its manifest says [\d,]+: it is damaged"):
        run_training(config)
    shard.write_bytes(whole[shard.name][:-1] + b"?")  # of the same size
    with pytest.raises(DataError, match="its checksum is not that of the manifest"):
        prepare.main(["--verify", "--out", str(folder)])
    prepare.prepare(reviews, folder, 1)
    assert contents(folder) == whole


# Larger than memory


def write_large(folder: Path, shards: int, examples: int) -> None:
    """Write a folder whose shards are all the same file: texts of 4 tokens, in two classes in turn."""
    offsets = 4 * np.arange(examples + 1, dtype=np.int64)
    tokens = np.zeros(4 * examples, dtype=np.int32)
    tokens[:4] = 2
    labels, ids = np.arange(examples) % 2, [str(i) for i in range(examples)]
    types = np.zeros(len(tokens), dtype=np.uint8)
    known = write_shard(folder / "shard.safetensors", TextExamples(tokens, types, offsets, labels, ids, 0))
    entry = ShardEntry(known["files"], known["sha256"], known["sizes"])
    manifest = read_manifest(folder)
    half, lengths = shards * examples // 2, [0, 0, 0, 0, shards * examples]
    changes = {"num_rows": 2 * half, "label_counts": [half, half], "length_counts": lengths, "longest_sequence": 4}
    write_manifest(folder, replace(manifest, shards=[entry] * shards, labels=["blue", "red"], **changes))


def memory() -> np.ndarray:
    """Return the resident memory of this process, in MB: its own, and pages of files, which the system takes back."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if "Rss" in line)
    return np.array([int(lines[name].split()[0]) / 1000 for name in ("RssAnon", "RssFile")])


@pytest.mark.parametrize(("shards", "examples"), [(20, 200_000), pytest.param(100, 1_000_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_examples(shards, examples, reviews, tmp_path):
    """Neither when a folder of 4 or 100 million examples is opened, nor in steps of random ones."""
    config = prepared(reviews, tmp_path)
    write_large(tmp_path / "prepared", shards, examples)
    task, settings = TASKS[config.run.task], settings_of(config)
    rows = read_training_data(task, settings, 0)
    encode = task.encoder(task.load_processor(Path(config.model.name)), settings, rows.labels)
    before = memory()
    train_set = encode(rows.train)
    assert len(train_set) == shards * examples
    steps = training_steps(train_set, 512, 0, MicroBatching(max_examples=64))
    for _ in range(40):
        assert sum(batch.num_targets for batch in next(steps)) == 512
    own, of_files = memory() - before
    assert own < shards * examples / 1e6  # MB: a byte for each example
    assert of_files < 250
