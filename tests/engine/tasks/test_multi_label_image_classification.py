"""Images with several labels or none: how they are listed, how labels are mixed, and the export in transformers."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cases import dry_run, evaluation, predictions, run, settings_for
from support.pictures import folder_of_colours
from support.task_data import write
from support.task_settings import task_settings

from data import DataError
from data.augmentation.image import ImageAugmentation, choose_mix
from engine.config import ConfigError
from engine.tasks import TASKS

NAME = "multi-label-image-classification"
TASK = TASKS[NAME]


@pytest.fixture
def pictures(tmp_path) -> tuple[Path, list[dict]]:
    """Return a list of 24 pictures, and its rows."""
    path = Path(write(NAME, tmp_path)["data.train"])
    return path, [json.loads(line) for line in path.read_text().splitlines()]


def write_table(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_lists_texts_and_columns_are_the_same_labels(pictures, tmp_path):
    path, rows = pictures
    names = sorted({label for row in rows for label in row["labels"]})
    joined = [{"path": row["path"], "labels": "|".join(row["labels"])} for row in rows]
    columns = [{"path": row["path"]} | {name: int(name in row["labels"]) for name in names} for row in rows]
    found = []
    for name, content, more in (
        ("a.csv", joined, {"label_separator": "|"}),
        ("b.csv", columns, {"labels": tuple(names)}),
        ("", [], {}),
    ):
        source = str(write_table(tmp_path / name, content) if content else path)
        settings = task_settings(NAME, train=source, **more)
        read = TASK.read(source, settings, True)
        assert TASK.find_labels(source, read, settings) == names
        TASK.check_labels(source, read, settings, names)
        found.append([row.values["labels"] for row in read])
    assert [sorted(labels) for labels in found[0]] == [sorted(labels) for labels in found[1]]
    assert [sorted(labels) for labels in found[2]] == [sorted(labels) for labels in found[0]]
    assert [] in found[2]


def test_what_has_one_class_for_each_image_is_refused(pictures, tmp_path):
    folder, (_, rows) = folder_of_colours(tmp_path / "colours", 2), pictures
    with pytest.raises(DataError, match=r"one class for each image; list the images, with their labels, in a \.csv"):
        TASK.read(str(folder), task_settings(NAME), True)
    assert len(TASK.read(str(folder), task_settings(NAME), False)) == 6  # to predict
    listed = [{"path": row["path"], "labels": json.dumps(row["labels"])} for row in rows]
    path = write_table(tmp_path / "a.csv", listed)
    single = task_settings("image-classification", label_column="labels")
    with pytest.raises(DataError, match=r'run\.task = "multi-label-image-classification" reads lists'):
        TASKS["image-classification"].read(str(path), single, True)


def test_bad_rows_are_named(pictures, tmp_path):
    _, rows = pictures
    path = tmp_path / "bad.jsonl"
    rows[1]["labels"], rows[2]["path"] = {"red": "much"}, "none.png"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as error:
        TASK.read(str(path), task_settings(NAME), True)
    assert [line.partition(": ")[0] for line in str(error.value).split("\n")] == [f"{path}:2", f"{path}:3"]


@pytest.mark.parametrize("how", ["mixup", "cutmix"])
def test_labels_are_mixed_in_the_shares_of_the_images(pictures, how):
    """The share of an image times its row of 0 and 1, plus the rest times the other's, to the last bit."""
    path, _ = pictures
    settings = task_settings(NAME)
    rows = TASK.read(str(path), settings, True)
    labels = TASK.find_labels(str(path), rows, settings)
    TASK.check_labels(str(path), rows, settings, labels)
    plain = TASK.encode(rows, TASK.load_processor(path.parent / "model"), settings, labels, True)
    augmentation = ImageAugmentation(0, **{how: 1.0})
    mixed = replace(plain, augmentation=augmentation)
    batch, num_mixed = mixed.batch(range(len(rows)), epoch=3), 0
    assert batch.num_targets == len(rows) * len(labels)
    for i, found in enumerate(batch.labels):
        mix = choose_mix(augmentation, 3, plain.ids[i], len(rows))
        expected = torch.from_numpy(plain.labels[i].copy())
        if mix is not None:
            images = [plain.batch([k]).pixel_values[0] for k in (i, mix.partner)]
            _, share = mix.blend(*images)
            expected = expected * share + (1 - share) * torch.from_numpy(plain.labels[mix.partner])
            num_mixed += 0 < share < 1
        assert torch.equal(found, expected)
    assert num_mixed > len(rows) / 2
    assert torch.equal(plain.batch([0, 5]).labels, torch.from_numpy(plain.labels[np.array([0, 5])]))


def test_the_export_is_transformers_with_several_labels(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    settings = write(NAME, tmp_path) | {"run.folder": str(tmp_path / "run"), "train.max_steps": 3, "optim.lr": 1e-2}
    run(settings, capsys)
    best, source = tmp_path / "run/best", Path(settings["data.validation"])
    oracle = transformers.AutoModelForImageClassification.from_pretrained(best).eval().double()
    assert oracle.config.problem_type == "multi_label_classification"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    task_set = task_settings(NAME)
    examples = TASK.encode(TASK.read(str(source), task_set, False), TASK.load_processor(best), task_set, (), False)
    labels = [oracle.config.id2label[i] for i in range(3)]
    targets = torch.tensor([[float(name in row["labels"]) for name in labels] for row in rows], dtype=torch.float64)
    with torch.no_grad():
        out = oracle(pixel_values=examples.batch(range(len(rows))).pixel_values.double(), labels=targets)
    found = predictions(tmp_path / "run", source)
    for row, logits in zip(found, out.logits.tolist(), strict=True):
        assert [row["logits"][name] for name in labels] == pytest.approx(logits, abs=1e-5)
        assert {*row["labels"]} == {name for name, z in zip(labels, logits, strict=True) if z > 0}
    assert evaluation(tmp_path / "run", source)["loss"] == pytest.approx(out.loss.item(), rel=1e-5)


def test_settings_of_texts_and_of_single_classes_are_refused(pictures, tmp_path, capsys):
    path, _ = pictures
    for setting, value, reason in (
        ("augment__text__mask", 0.1, "without effect on images"),
        ("data__long_texts", "head+tail", "an image is not a text"),
        ("regularize__class_weights", ("balanced",), "regularize.pos_weight weights the labels"),
        ("train__sampler", "balanced", "regularize.pos_weight weights the labels"),
    ):
        with pytest.raises(ConfigError, match=reason):
            dry_run(settings_for(NAME, tmp_path, path, **{setting: value}), capsys)
    printed = dry_run(settings_for(NAME, tmp_path, path, regularize__pos_weight=("balanced",)), capsys)
    assert "no label" in printed
