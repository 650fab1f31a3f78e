"""Image classification: the checkpoint's preprocessing, training, resume, evaluation and prediction."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.evaluation import evaluation_context
from support.pictures import folder_of_colours, picture, write
from support.runs import StopAfter, assert_same_run, logged_rows, run_training
from support.task_settings import task_settings
from support.tiny_models import config_folder

import models
from data import DataError, MicroBatching, evaluation_batches
from data.image_classification import encode_images, read_images
from engine import config as configs
from engine import evaluate, predict
from engine.config import AugmentSettings, Config, ConfigError, ImageAugmentSettings, TextAugmentSettings, override
from engine.tasks import TASKS, read_training_data

TASK = TASKS["image-classification"]


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    """Return the folder of a random ViT of 2 layers, for images of 16 x 16 pixels in 4 patches."""
    folder = tmp_path_factory.mktemp("tiny-vit")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = {"model_type": "vit", "image_size": 16, "patch_size": 8, "hidden_dropout_prob": 0.1, **shape}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}}))
    models.save_pretrained(models.from_pretrained(folder, init="scratch", seed=1), folder)
    return folder


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    return folder_of_colours(tmp_path_factory.mktemp("colours"), 20)


def recipe(vit: Path, train: Path, folder: Path, **changes: object) -> Config:
    """Return the configuration of 6 steps of 16 out of 54 images: 4 steps an epoch, an evaluation every 3 steps."""
    values: dict[str, object] = {
        "run.task": "image-classification",
        "run.folder": str(folder),
        "run.device": "cpu",
        "model.name": str(vit),
        "data.train": str(train),
        "train.global_batch_size": 16,
        "train.max_steps": 6,
        "eval.every_steps": 3,
        "optim.lr": 2e-3,
        "log.every_steps": 1,
    }
    config = override(Config(), values | changes)
    configs.check(config)
    return config


AUGMENTED = {
    "augment.image.random_crop_min_scale": 0.5,
    "augment.image.horizontal_flip": 0.5,
    "augment.image.color_jitter": 0.1,
    "augment.image.auto_augment": "trivialaugment",
    "augment.image.mixup": 0.2,
    "augment.image.cutmix": 0.5,
}


# The checkpoint's preprocessing


@pytest.mark.parametrize(
    ("changes", "preparation", "message"),
    [
        ({}, None, "no preprocessor_config.json"),
        ({}, {"size": {"height": 20, "width": 16}}, "20 x 16 pixels are not a multiple of the model's patches of 8"),
        ({}, {"image_mean": [0.5], "image_std": [0.5]}, "image_mean has 1 channels, the model 3"),
        ({}, {"size": {"shortest_edge": 16}}, "so images would differ in size"),
        ({"model_type": "bert", "vocab_size": 9}, {"size": 16}, "a bert model reads no images"),
    ],
)
def test_preparation_that_does_not_fit_the_model(tmp_path, changes, preparation, message):
    config = {"model_type": "vit", "image_size": 16, "patch_size": 8} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    if preparation is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(preparation))
    with pytest.raises(DataError, match=message):
        TASK.load_processor(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "tokens"), [("vit", 1 + 6), ("deit", 2 + 6), ("dinov2_with_registers", 5 + 6), ("beit", 1 + 6)]
)
def test_the_tokens_of_an_image_are_those_of_the_model(tmp_path, model_type, tokens):
    config = {"model_type": model_type, "image_size": 16, "patch_size": 8, "hidden_size": 8, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "intermediate_size": 8}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 24}}))
    preprocessing = TASK.load_processor(tmp_path)
    assert preprocessing.tokens == tokens
    model = models.from_pretrained(tmp_path, init="scratch")
    hidden = model(models.pack_images(torch.zeros(2, 3, 16, 24))).logits
    assert len(hidden) == 2 * tokens


# A run


def test_colour_by_class_is_learned(vit, colours, tmp_path):
    config = recipe(
        vit, colours, tmp_path / "run", **{"train.max_steps": 40, "eval.every_steps": 20, "model.init": "scratch"}
    )
    assert run_training(config)["best_accuracy"] > 0.95
    new = folder_of_colours(tmp_path / "new", 4)
    assert evaluate.main([config.run.folder, f"--data.test={new}", f"--output={tmp_path}/metrics.json"]) == 0
    assert predict.main([config.run.folder, f"--input={new}", f"--output={tmp_path}/out.jsonl"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [row.id for row in read_images(str(new))]
    right = np.mean([row["label"] == row["id"].split("/")[0] for row in rows])
    assert right > 0.95
    assert json.loads((tmp_path / "metrics.json").read_text())["accuracy"] == pytest.approx(right)
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_p04_resume_of_an_augmented_run_is_exact(vit, colours, tmp_path, workers):
    """Stops within the second epoch. The number of workers may differ; other micro-batches would draw other dropout."""
    through = recipe(vit, colours, tmp_path / "through", **AUGMENTED)
    result = run_training(through)
    stopped = recipe(vit, colours, tmp_path / "run", **AUGMENTED, **{"data.num_workers": workers})
    assert run_training(stopped, StopAfter(5)) is None
    assert run_training(override(stopped, {"run.resume": "yes"})) == result
    assert_same_run(through.run.folder, stopped.run.folder)


@pytest.mark.parametrize("model_type", ["dinov2_with_registers", "beit"])
def test_p04_other_encoders_resume_on_images_of_other_sizes(colours, tmp_path, model_type):
    """Their positions are interpolated; with dropout, drop path and LoRA."""
    folder = config_folder(tmp_path / "model", model_type)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 12}}))
    models.save_pretrained(models.from_pretrained(folder, init="scratch", seed=1), folder)
    changes = {"model.dropout.all": 0.2, "model.dropout.drop_path": 0.2, "model.lora.rank": 2}
    through = recipe(folder, colours, tmp_path / "through", **changes)
    result = run_training(through)
    stopped = recipe(folder, colours, tmp_path / "run", **changes)
    assert run_training(stopped, StopAfter(5)) is None
    assert run_training(override(stopped, {"run.resume": "yes"})) == result
    assert_same_run(through.run.folder, stopped.run.folder)


def test_p04_images_that_are_left_out_stay_out_on_resume(vit, colours, tmp_path):
    root = folder_of_colours(tmp_path / "data", 8)
    for i in range(5):
        (root / f"red/0{i}x.png").write_bytes(b"?")
    skip = {"data.bad_rows": "skip", "train.max_steps": 4, "eval.every_steps": 2}
    through = run_training(recipe(vit, root, tmp_path / "through", **skip))
    stopped = recipe(vit, root, tmp_path / "run", **skip)
    assert run_training(stopped, StopAfter(3)) is None
    assert run_training(override(stopped, {"run.resume": "yes"})) == through
    with pytest.raises(DataError, match="01x"):
        run_training(recipe(vit, root, tmp_path / "raise"))


def test_p01_micro_batches_of_a_mixed_step_keep_its_loss(vit, colours, tmp_path):
    runs = []
    for name, limit in (
        ("whole", {}),
        ("examples", {"train.micro_batch_size": 3}),
        ("tokens", {"train.micro_batch_tokens": 25}),
    ):
        exact = {"model.dropout.all": 0.0, "regularize.label_smoothing": 0.1}
        config = recipe(vit, colours, tmp_path / name, **AUGMENTED, **limit, **exact)
        run_training(config)
        runs.append([row["loss"] for row in logged_rows(config.run.folder) if "loss" in row])
    for other in runs[1:]:
        assert other == pytest.approx(runs[0], rel=1e-5)


def examples_and_model(vit, colours):
    rows = read_images(str(colours))
    labels = ("blue", "green", "red")
    examples = encode_images(rows, TASK.load_processor(vit), labels=labels)
    return examples, models.from_pretrained(vit, head=TASK.head, labels=labels, seed=3)


def test_p02_metrics_do_not_depend_on_the_batch_or_the_ranks(vit, colours):
    examples, model = examples_and_model(vit, colours)
    generate = Config().generate

    def statistics(tokens):
        return evaluate.sum_statistics(model, examples, evaluation_context("image-classification", tokens))

    whole = statistics(10**6)
    for tokens in (1, 15, 5 * 16):
        torch.testing.assert_close(statistics(tokens), whole, rtol=1e-6, atol=1e-6)
    model.eval()
    for world_size in (2, 3, 7):
        total = torch.zeros_like(whole)
        for rank in range(world_size):
            for indices in evaluation_batches(examples, MicroBatching(max_tokens=20, rank=rank, world_size=world_size)):
                with torch.no_grad():
                    total += TASK.evaluate_batch(model, examples.batch(indices), examples, generate)
        torch.testing.assert_close(total, whole, rtol=1e-6, atol=1e-6)
    empty = TASK.evaluate_batch(model, examples.batch([]), examples, generate)
    assert (empty.shape, empty.sum().item()) == (whole.shape, 0)


@pytest.mark.parametrize("count", [1, 2, 5, 17])
def test_p03_every_image_is_predicted_once_in_order(vit, colours, count):
    examples, model = examples_and_model(vit, colours)
    first = replace(examples, images=examples.images[:count], labels=examples.labels[:count], ids=examples.ids[:count])
    rows = predict.predict(model, first, evaluation_context("image-classification", 15))
    assert [row["id"] for row in rows] == examples.ids[:count]


def test_a_dry_run_writes_a_sheet(vit, colours, tmp_path, capsys):
    config = recipe(vit, colours, tmp_path / "run", **AUGMENTED, **{"run.dry_run": True})
    assert run_training(config) == {}
    said = capsys.readouterr().out
    assert f"augmented samples: {tmp_path}/run-augmented.png" in said
    with Image.open(tmp_path / "run-augmented.png") as sheet:
        assert sheet.size == (7 * 20, 8 * 20)
    assert "id blue/" in said
    assert "(3, 16, 16)" in said or "[3, 16, 16]" in said


def test_unknown_classes_are_named_once_each(vit, colours, tmp_path):
    new = folder_of_colours(tmp_path, 2)
    write(new / "violet/a.png", picture())
    write(new / "violet/b.png", picture())
    settings = task_settings("image-classification", train=str(colours), validation=str(new))
    with pytest.raises(DataError) as error:
        read_training_data(TASK, settings, 0)
    assert str(error.value) == f"{new}/violet: a folder of an unknown class; the labels are 'blue', 'green', 'red'"


def test_text_augmentation_is_refused_for_images(vit, colours):
    examples, _ = examples_and_model(vit, colours)
    with pytest.raises(ConfigError, match=r"augment\.text\.crop, augment\.text\.mask: without effect on images"):
        TASK.augment(examples, [], None, AugmentSettings(text=TextAugmentSettings(crop=0.1, mask=0.1)), 0)
    assert TASK.augment(examples, [], None, AugmentSettings(), 0) is examples
    augmented = TASK.augment(examples, [], None, AugmentSettings(image=ImageAugmentSettings(horizontal_flip=0.5)), 7)
    assert (augmented.augmentation.seed, augmented.augmentation.horizontal_flip) == (7, 0.5)
