"""The logits of a teacher: reading them, refusing bad files, and a student that learns from engine.predict's output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.runs import run_training, tiny_config, write_reviews

from data import DataError
from data.teacher import read_teacher
from engine import predict
from engine.config import Config, override

LABELS = ["negative", "neutral", "positive"]


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(name: object, *logits: float) -> dict:
    return {"id": name, "logits": dict(zip(LABELS, logits, strict=True))}


def test_teacher_logits_follow_the_order_of_ids_and_labels(tmp_path):
    """The file's order does not matter; a list is in the order of the labels; other ids and columns are ignored."""
    backwards = {"id": "c", "label": "x", "logits": {"positive": 9, "neutral": 8.25, "negative": -7e-3}}
    path = write(
        tmp_path / "teacher.jsonl", backwards, {"id": 2, "logits": [4, 5, 6.5]}, row("validation", 0, 0, 0), ""
    )
    expected = torch.tensor([[4, 5, 6.5], [-7e-3, 8.25, 9]])
    found = read_teacher(str(path), ["2", "c"], LABELS)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


BAD = {
    '{"id": "a", "logits": {"negative": 1, "neutral": 2, "good": 3}}': (
        "a logit of the unknown label 'good', beside the 3 labels 'negative', 'neutral', 'positive'"
    ),
    '{"id": "a", "logits": {"negative": 1, "positive": 3}}': "no logit of the label 'neutral'",
    '{"id": "a", "logits": [1, 2]}': "2 logits for the 3 labels 'negative', 'neutral', 'positive'",
    '{"id": "a", "logits": [1, 2, null]}': "the logit of 'positive' should be a finite number, not None",
    '{"id": "a", "logits": [1, 2, "3"]}': "the logit of 'positive' should be a finite number, not '3'",
    '{"id": "a", "logits": [1, true, 3]}': "the logit of 'neutral' should be a finite number, not True",
    '{"id": "a", "logits": [1, 1e999, 3]}': "the logit of 'neutral' should be a finite number, not inf",
    '{"id": "a", "logits": [1, -1e39, 3]}': "the logit of 'neutral' should be a finite number, not -1e+39",
    '{"id": "a", "logits": [1, NaN, 3]}': "the logit of 'neutral' should be a finite number, not None",
    '{"id": "a", "logits": 3}': "'logits' should be {label: number}, or a list of numbers, not 3",
    '{"id": "a", "probabilities": [0, 0, 1]}': "no column 'logits'; this row has 'id', 'probabilities'",
    '{"logits": [1, 2, 3]}': "no column 'id'; this row has 'logits'",
    '{"id": ["a"], "logits": [1, 2, 3]}': "an 'id' should be text or a number, not ['a']",
    '{"id": "first", "logits": [1, 2, 3]}': "the id 'first' is that of line 1 too",
    '{"id": "a", "id": "b", "logits": [1, 2, 3]}': "key 'id' twice",
    "[1, 2, 3]": "a JSON object is needed, not a list",
}


@pytest.mark.parametrize("line", BAD)
def test_f13_bad_teacher_line_is_named_with_its_reason(tmp_path, line):
    path = write(tmp_path / "teacher.jsonl", row("first", 1, 2, 3), "", line)
    with pytest.raises(DataError) as raised:
        read_teacher(str(path), ["first"], LABELS)
    assert str(raised.value) == f"{path}:3: {BAD[line]}"


def test_f13_bad_teacher_lines_are_one_error_in_their_order(tmp_path):
    lines = [line.replace('"a"', f'"a{i}"') for i, line in enumerate(BAD)]  # an id once: repeated ids hide the rest
    path = write(tmp_path / "teacher.jsonl", row("first", 1, 2, 3), *lines)
    with pytest.raises(DataError) as raised:
        read_teacher(str(path), ["nobody"], LABELS)
    lines = str(raised.value).splitlines()
    assert [line.split(":")[1] for line in lines] == [str(i + 2) for i in range(len(BAD))]


def test_training_examples_unknown_to_the_teacher_are_counted(tmp_path):
    path = write(tmp_path / "teacher.jsonl", row("b", 1, 2, 3))
    with pytest.raises(DataError) as raised:
        read_teacher(str(path), ["b", "d", "c"], LABELS)
    assert str(raised.value) == (
        f"{path}: no logits for 2 of the 3 training examples, the first with the id 'd'; "
        "let the teacher predict the file of data.train"
    )


@pytest.mark.parametrize("name", ["nowhere.jsonl", "empty.jsonl"])
def test_teacher_file_without_rows_is_an_error(tmp_path, name):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=f"{name}: no"):
        read_teacher(str(tmp_path / name), ["a"], LABELS)


# From a teacher's run to a student


@pytest.fixture(scope="module")
def taught(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """Return (the recipe of a teacher that has learnt something, its predictions of the training file)."""
    folder = tmp_path_factory.mktemp("taught")
    reviews = write_reviews(folder / "reviews.jsonl", 120)
    cfg = tiny_config(checkpoint_folder, reviews, folder / "run", {"optim.lr": 3e-3, "train.max_steps": 40})
    run_training(cfg)
    output = folder / "teacher.jsonl"
    assert predict.main([cfg.run.folder, "--input", str(reviews), "--output", str(output)]) == 0
    return cfg, output


def test_predictions_are_a_teacher_file_with_its_logits(taught):
    _, file = taught
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    ids = [line["id"] for line in lines][::-1]
    logits = read_teacher(str(file), ids, ["positive", "negative"])
    for line, of_one in zip(lines, logits.flip(0), strict=True):
        assert [*line["logits"]] == ["negative", "positive"]
        p = of_one.double().softmax(-1)
        assert [line["probabilities"][label] for label in ("positive", "negative")] == pytest.approx(p.tolist())


def disagreement(cfg: Config, teacher: Path, output: Path) -> float:
    """Return the mean KL(teacher || model) over the training file, for the weights at the end of a run."""
    last = Path(cfg.run.folder) / "last"
    assert predict.main([str(last), "--input", cfg.data.train, "--output", str(output)]) == 0
    ids = [json.loads(line)["id"] for line in teacher.read_text().splitlines()]
    ours, theirs = (read_teacher(str(file), ids, ["negative", "positive"]) for file in (output, teacher))
    return F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean").item()


def test_student_approaches_its_teacher_only_by_distillation(taught, tmp_path):
    """The labels of the student's file are noise, so it can learn from the teacher only."""
    cfg, teacher = taught
    rows = [json.loads(line) for line in Path(cfg.data.train).read_text().splitlines()]
    noise = [{**row, "label": ("negative", "positive")[i // 2 % 2]} for i, row in enumerate(rows)]
    changes = {"data.train": str(write(tmp_path / "noise.jsonl", *noise)), "model.dropout.all": 0.0}
    divergence = {}
    for share in (0.0, 0.5, 1.0):
        given = {"data.teacher_file": str(teacher), "regularize.distillation_temperature": 2.0} if share else {}
        student = override(
            cfg, {"run.folder": str(tmp_path / f"{share}"), "regularize.distillation_weight": share, **changes, **given}
        )
        run_training(student)
        divergence[share] = disagreement(student, teacher, tmp_path / f"{share}.jsonl")
    assert divergence[1.0] < divergence[0.5] < divergence[0.0]
    assert divergence[1.0] < 0.1 * divergence[0.0]


def test_teacher_of_other_examples_is_refused_before_training(taught, tmp_path):
    cfg, teacher = taught
    few = tmp_path / "few.jsonl"
    few.write_text("".join(teacher.read_text().splitlines(keepends=True)[:50]))
    changes = {
        "run.folder": str(tmp_path / "run"),
        "data.teacher_file": str(few),
        "regularize.distillation_weight": 0.5,
    }
    with pytest.raises(DataError, match=r"few\.jsonl: no logits for \d\d of the 108 training examples, the first"):
        run_training(override(cfg, changes))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*/model.safetensors"))
