"""Classes of images, by a ViT or a DeiT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import models
from data import Batch, Examples, Row
from data import text_classification as texts
from data.augmentation.image import ImageAugmentation, sheet
from data.errors import DataError
from data.formats.rows import locate
from data.image_classification import ImageExamples, encode_images, read_images
from data.image_preprocessing import FILE, Preprocessing, read_preprocessing
from engine.config import AugmentSettings, ConfigError, GenerateSettings, TextAugmentSettings
from engine.metrics import image_classification as metrics
from engine.tasks.augmentation import Encode
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from engine.tasks.text_classification import predict_classes
from models import TaskModel


def load_preprocessing(folder: Path) -> Preprocessing:
    """How the checkpoint in `folder` wants its images; DataError where they cannot be what its model reads."""
    how, model = read_preprocessing(folder), models.read_config(folder)
    config = models.ARCHITECTURES[model["model_type"]].read_config(model)
    if not hasattr(config, "patch_size"):
        raise DataError(f"{folder}: a {model['model_type']} model reads no images; name a ViT or a DeiT")
    if how.shape is None:
        raise DataError(
            f"{folder / FILE}: size = {how.size} is of the shorter side, and nothing is cropped: images of several "
            "sizes make no batch; give height and width, or crop"
        )
    if len(how.mean) != config.num_channels:
        raise DataError(f"{folder / FILE}: image_mean has {len(how.mean)} channels, the model {config.num_channels}")
    (height, width), (patch_height, patch_width) = how.shape, config.patch_size
    if height % patch_height or width % patch_width:
        raise DataError(
            f"{folder / FILE}: images of {height} x {width} pixels are no multiple of the model's patches of "
            f"{patch_height} x {patch_width}"
        )
    special = 2 if config.distilled else 1
    return replace(how, tokens=special + (height // patch_height) * (width // patch_width))


def _read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    is_split = settings.is_training_split(name, labelled)
    return read_images(
        name,
        image=settings.data.text_column,
        label=settings.data.label_column if labelled else "",
        group=settings.data.group_column if is_split else "",
        id_column=settings.data.id_column,
        labels=settings.data.labels,
        bad_images=settings.own.bad_images,
        format=settings.data.format,
    )


def _find_labels(name: str, rows: list[Row], settings: TaskSettings) -> list[str]:
    return texts.label_names(name, rows, settings.data.label_column, settings.data.labels)


def _check_labels(name: str, rows: list[Row], settings: TaskSettings, labels: Sequence[str]) -> None:
    """Each label must be known; of a folder per class each unknown one is said once."""
    if not locate(name).is_dir():
        return texts.check_labels(name, rows, settings.data.label_column, labels)
    if unknown := sorted({str(row.values[settings.data.label_column]) for row in rows} - set(labels)):
        known = f"the labels are {', '.join(map(repr, labels))}"
        raise DataError(
            "\n".join(f"{locate(name) / label}: a folder of an unknown class; {known}" for label in unknown)
        )


def _encode(
    rows: list[Row], processor: Preprocessing, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> ImageExamples:
    return encode_images(
        rows,
        processor,
        image=settings.data.text_column,
        label=settings.data.label_column if labelled else "",
        labels=labels,
    )


def _augment(examples: Any, rows: list[Row], encode: Encode, settings: AugmentSettings, seed: int) -> Examples:
    """[augment.image]; ConfigError for changes of text."""
    default = TextAugmentSettings()
    given = [
        f"augment.text.{f.name}" for f in fields(default) if getattr(settings.text, f.name) != getattr(default, f.name)
    ]
    if given:
        raise ConfigError(f"{', '.join(given)}: without effect on images, leave it out; those are in augment.image")
    augmentation = ImageAugmentation(seed, **asdict(settings.image))
    return replace(examples, augmentation=augmentation) if augmentation.is_on else examples


def _sheet(examples: Any, path: Path) -> str:
    if examples.augmentation is None:
        return ""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(examples, path)
    return f"augmented samples: {path}, a line for each image, first as it is, then as in each epoch"


def _measure(model: TaskModel, batch: Batch, examples: Any, generate: GenerateSettings) -> Tensor:
    if batch.labels is None:
        raise TypeError("only labelled examples can be measured")
    out = model(batch)
    return metrics.image_statistics(out.loss_sum, out.logits, batch.labels)


IMAGE_CLASSIFICATION = Task(
    head="image-classification",
    section="image_classification",
    metrics=("accuracy", "top5_accuracy", "f1", "precision", "recall", "loss"),
    columns=Columns(text_pair=None, text="path"),
    problem="single-label",
    stratify=True,
    load_processor=load_preprocessing,
    read=_read,
    find_labels=_find_labels,
    check_labels=_check_labels,
    encode=_encode,
    evaluate_batch=_measure,
    compute_metrics=lambda statistics, labels: metrics.image_metrics(statistics),
    predict_batch=predict_classes,
    format_table=metrics.image_table,
    augment=_augment,
    show_augmented=_sheet,
)
