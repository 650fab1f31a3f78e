"""Training from a prepared folder of images: an index of a folder or of .tar archives, checked once."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from support.cases import settings_for
from support.pictures import folder_of_colours
from support.runs import StopAfter, assert_same_run, run_training
from support.task_data import write
from support.task_settings import settings_of

from data import DataError
from data.formats import image_files
from data.mapped_images import MappedImageExamples
from engine import config as configs
from engine import preparation, prepare
from engine.config import Config
from engine.tasks import TASKS, read_training_data

AUGMENTED = {"augment.image.horizontal_flip": 0.5, "augment.image.mixup": 0.4, "train.sampler": "balanced"}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard has 7 rows."""
    monkeypatch.setattr(preparation, "PART_ROWS", 7)


@pytest.fixture(params=["folder", "tar"])
def config(request, tmp_path) -> Config:
    folder = folder_of_colours(tmp_path / "set", 8)
    (folder / "red/bad.png").write_bytes(b"no picture")
    source = folder
    if request.param == "tar":
        source = tmp_path / "shards"
        source.mkdir()
        for name in ("red", "green", "blue"):
            with tarfile.open(source / f"{name}.tar", "w") as archive:
                archive.add(folder / name, name)
    values = settings_for("image-classification", tmp_path, source, run__folder=str(tmp_path / "file"))
    more = {"data.bad_rows": "skip", "train.max_steps": 6, "eval.every_steps": 3, "log.every_steps": 1}
    config = configs.override(Config(), values | more | {"eval.train_subset_size": 5})
    configs.check(config)
    return config


def prepared(config: Config, folder: Path, **changes) -> Config:
    prepare.prepare(config, folder / "prepared", 1)
    names = {"data.train": str(folder / "prepared"), "run.folder": str(folder / "from-folder")}
    return configs.override(config, names | changes)


def encoded(config: Config) -> MappedImageExamples:
    task, settings = TASKS[config.run.task], settings_of(config)
    rows = read_training_data(task, settings, config.run.seed)
    return task.encoder(task.load_processor(Path(config.model.name)), settings, rows.labels)(rows.train)


def test_a_run_is_that_on_the_images(config, tmp_path, monkeypatch):
    """Losses, metrics and weights are equal, of a resumed run with workers too; images are not checked again."""
    changes = AUGMENTED if config.data.train.endswith("shards") else {}
    from_folder = prepared(config, tmp_path, **changes)
    config = configs.override(config, changes)
    assert run_training(config) is not None
    monkeypatch.setattr(image_files, "check_image", None)
    from_folder = configs.override(from_folder, {"data.num_workers": 1 if changes else 0})
    assert run_training(from_folder, StopAfter(4)) is None
    assert run_training(configs.override(from_folder, {"run.resume": "yes"})) is not None
    assert_same_run(config.run.folder, from_folder.run.folder)


def test_examples_are_those_of_the_images(config, tmp_path):
    theirs = encoded(config)
    mine = encoded(prepared(config, tmp_path))
    assert isinstance(mine, MappedImageExamples)
    assert len(mine.images.shards) > 2
    assert [*mine.ids] == theirs.ids
    assert [str(image) for image in mine.images] == [str(image) for image in theirs.images]
    assert mine.fingerprint() == theirs.fingerprint()
    assert mine.label_counts(3).tolist() == theirs.label_counts(3).tolist()
    assert mine.labels[np.arange(len(mine))].tolist() == theirs.labels.tolist()


@pytest.mark.parametrize("kind", ["list", "tar"])
def test_sets_of_labels_are_prepared_as_they_are_read(tmp_path, kind):
    """Of a list, and of webdataset's .json files; mixing gives the same shares, and a run the same losses."""
    task = "multi-label-image-classification"
    values = write(task, tmp_path) | {"run.folder": str(tmp_path / "file"), "train.max_steps": 3, "data.validation": ""}
    if kind == "tar":
        rows = [json.loads(line) for line in Path(values["data.train"]).read_text().splitlines()]
        values["data.train"] = str(tmp_path / "set.tar")
        with tarfile.open(values["data.train"], "w") as archive:
            for row in rows:
                image, labels = Path(row["path"]), tmp_path / "labels.json"
                labels.write_text(json.dumps({"labels": row["labels"]}))
                archive.add(image, image.name)
                archive.add(labels, f"{image.stem}.json")
    config = configs.override(Config(), values | {"augment.image.mixup": 0.4, "augment.image.cutmix": 0.4})
    theirs = encoded(config)
    from_folder = prepared(config, tmp_path)
    mine = encoded(from_folder)
    assert theirs.labels.ndim == 2
    assert {0, 2} <= {*theirs.labels.sum(1).tolist()}
    assert mine.fingerprint() == theirs.fingerprint()
    assert mine.label_counts(3).tolist() == theirs.label_counts(3).tolist() == theirs.labels.sum(0).tolist()
    assert mine.labels[np.arange(len(mine))].tolist() == theirs.labels.tolist()
    assert mine.show(0, None, ("blue", "green", "red")) == theirs.show(0, None, ("blue", "green", "red"))
    assert run_training(config) is not None
    assert run_training(from_folder) is not None
    assert_same_run(config.run.folder, from_folder.run.folder)


def test_the_same_command_verifies_or_continues(config, tmp_path, capsys):
    prepare.prepare(config, tmp_path / "out", 1)
    printed = capsys.readouterr().out
    assert "1 of 25 rows left out: " in printed
    assert "bad.png: not an image of a kind that is read" in printed
    manifest = (tmp_path / "out/manifest.json").read_text()
    prepare.prepare(config, tmp_path / "out", 1)
    assert "is complete: 4 shards, all as they were written" in capsys.readouterr().out
    (tmp_path / "out/shard-00001.safetensors").write_bytes(b"?")
    prepare.prepare(config, tmp_path / "out", 1)
    assert (tmp_path / "out/manifest.json").read_text() == manifest


def test_images_that_changed_since_are_refused(config, tmp_path):
    from_folder = prepared(config, tmp_path)
    source = Path(config.data.train)
    first = source / ("blue.tar" if (source / "blue.tar").exists() else "blue/000.png")
    first.write_bytes(first.read_bytes() + b"x")
    with pytest.raises(DataError, match=rf"{first.name} has .* bytes, .*shard-00000\.safetensors was made when it had"):
        run_training(from_folder)


def test_images_that_are_no_files_are_refused(tmp_path):
    config = configs.override(
        Config(), settings_for("image-classification", tmp_path, tmp_path / "t10k-images-idx3-ubyte")
    )
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(
        bytes([0, 0, 8, 3]) + np.array([2, 4, 4], ">u4").tobytes() + bytes(32)
    )
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + np.array([2], ">u4").tobytes() + b"\0\1")
    with pytest.raises(DataError, match="of a row cannot be kept in a prepared folder: train from the file"):
        prepare.prepare(config, tmp_path / "out", 1)
