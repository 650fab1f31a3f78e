"""Image classification: one class for each image, with a vision transformer (ViT, DeiT, DINOv2, BEiT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

import models
from data import Batch, Examples, Row, Rows
from data.augmentation.image import ImageAugmentation
from data.errors import DataError
from data.formats.folders import class_folders, hint_at_nested
from data.formats.lines import locate
from data.image_classification import (
    ImageExamples,
    encode_images,
    find_format,
    image_digest,
    read_images,
    save_augmented_images,
)
from data.image_preprocessing import FILE, Preprocessing, read_preprocessing
from data.label_spelling import canonical_label, similar_key
from data.labels import check_label_names, hint_at_similar, match_labels
from data.notes import list_some
from engine.calibration import choose_class
from engine.config import AugmentSettings, ConfigError, GenerateSettings
from engine.metrics import by_example, tables, unusable
from engine.metrics import image_classification as metrics
from engine.tasks import text_classification
from engine.tasks.augmentation import RowEncoder, changed_settings
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from models import TaskModel


def read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    """Read rows of images, from folders, archives, lists of paths or IDX files, and with labels their classes."""
    return read_images(
        name,
        image=settings.data.text_column,
        label=settings.label_column(labelled),
        group=settings.group_column(name, labelled),
        labels=settings.data.labels,
        max_pixels=settings.own.max_pixels,
        options=settings.file_options,
    )


def find_labels(name: str, rows: Rows, settings: TaskSettings) -> list[str]:
    """Return data.labels, else the classes that occur, sorted; DataError for one, with what to set if it is nested."""
    try:
        return text_classification.find_labels(name, rows, settings)
    except DataError as error:
        is_folder = rows and find_format(name, settings.file_options) == "folder"
        folder = str(rows[0].values[settings.data.label_column]) if is_folder else ""
        raise DataError(f"{error}{hint_at_nested(locate(name), folder, 'data.train') if folder else ''}") from None


def check_labels(name: str, rows: Rows, settings: TaskSettings, labels: Sequence[str]) -> None:
    """Write into each row the label that its class means; DataError for an unknown class, once for each folder."""
    root, column = locate(name), settings.data.label_column
    format = find_format(name, settings.file_options)
    unit = "image" if format in ("folder", "tar") else "line"
    if format == "folder":
        folders = {str(row.values[column]) for row in rows}
        unknown = sorted(folders - match_labels(folders, labels).keys())
        known = f"the labels are {list_some([repr(label) for label in labels])}"
        similar = {similar_key(label): label for label in labels} if unknown else {}
        errors = [
            f"{root / folder}: a folder of an unknown class; {known}"
            + (hint_at_similar(folder, similar) or _hint_at_folder(folder, name, settings))
            for folder in unknown
        ]
        if errors:
            raise DataError("\n".join(errors))
    check_label_names(name, rows, column, labels, unit, skips=settings.data.bad_rows == "skip")


def _hint_at_folder(folder: str, name: str, settings: TaskSettings) -> str:
    """Return why a folder's class may be unknown: that in data.train is empty, or this one contains the classes."""
    data, train = settings.data, locate(settings.data.train)
    if data.train and name != data.train and train.is_dir() and not data.labels:
        same = [other for other in class_folders(train) if canonical_label(other) == canonical_label(folder)]
        if same:
            return f"; {train / same[0]} exists, but has no image"
    setting = next((f"data.{key}" for key in ("validation", "test") if getattr(data, key) == name), "data.train")
    hint = hint_at_nested(locate(name), folder, setting)
    takes_names = name == data.train and data.labels and not hint
    return '; data.labels = "" takes the names of the folders' if takes_names else hint


def checksums(row: Row, settings: TaskSettings) -> list[str]:
    """Return the checksum of the image, which finds images that are in two splits or have several labels."""
    return [image_digest(row, settings.data.text_column)]


def load_processor(folder: Path) -> Preprocessing:
    """Load the preprocessing of a checkpoint; DataError if its images do not fit the model."""
    preprocessing, model = read_preprocessing(folder), models.read_config(folder)
    config = models.ARCHITECTURES[str(model["model_type"])].read_config(model)
    if not hasattr(config, "patch_size"):
        known = "name a ViT, DeiT, DINOv2 or BEiT in model.name"
        raise DataError(f"{folder}: a {model['model_type']} model reads no images; {known}")
    if preprocessing.shape is None:
        raise DataError(
            f"{folder / FILE}: size = {preprocessing.size} is the shorter side, and there is no crop, so images would "
            "differ in size; give height and width, or a crop"
        )
    if len(preprocessing.mean) != config.num_channels:
        raise DataError(
            f"{folder / FILE}: image_mean has {len(preprocessing.mean)} channels, the model {config.num_channels}"
        )
    (height, width), (patch_height, patch_width) = preprocessing.shape, config.patch_size
    if height % patch_height or width % patch_width:
        raise DataError(
            f"{folder / FILE}: images of {height} x {width} pixels are not a multiple of the model's patches of "
            f"{patch_height} x {patch_width}"
        )
    return replace(preprocessing, tokens=config.num_special + (height // patch_height) * (width // patch_width))


def encode(
    rows: list[Row], processor: Preprocessing, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> ImageExamples:
    """Encode the images, which are decoded when a batch needs them, and with labels the number of each class."""
    return encode_images(
        rows,
        processor,
        image=settings.data.text_column,
        label=settings.label_column(labelled),
        labels=labels,
        max_pixels=settings.own.max_pixels,
    )


def augment(
    examples: ImageExamples, rows: list[Row], encode: RowEncoder, settings: AugmentSettings, seed: int
) -> ImageExamples:
    """Apply [augment.image]; ConfigError for any setting of [augment.text]."""
    if given := [f"augment.text.{name}" for name in changed_settings(settings.text)]:
        raise ConfigError(f"{', '.join(given)}: without effect on images; leave it out, and see augment.image")
    augmentation = ImageAugmentation(seed, **asdict(settings.image))
    return replace(examples, augmentation=augmentation) if augmentation.is_on else examples


def show_augmented(examples: ImageExamples, path: Path) -> str:
    """Write a picture of augmented images to `path` and return a line about it; "" where nothing is augmented."""
    if examples.augmentation is None:
        return ""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_augmented_images(examples, path)
    return f"augmented samples: {path}, a row for each image: first unchanged, then as in each epoch"


def evaluate_batch(model: TaskModel, batch: Batch, examples: Examples, generate: GenerateSettings) -> Tensor:
    """Return [hits among the first five, sum of losses, confusion matrix], (2 + C * C,), and scores of two classes."""
    labels = batch.required_labels
    out = model(batch)
    predicted = choose_class(model, out.logits)
    return metrics.image_statistics(out.loss_sum, out.logits, labels, batch.indices, len(examples), predicted)


def compute_metrics(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Return the metrics of classes, and top-5 accuracy."""
    return metrics.image_metrics(statistics)


IMAGE_CLASSIFICATION = Task(
    head="image-classification",
    metrics=metrics.METRICS,
    details=("f1_present", "precision_positive", "recall_positive"),
    columns=Columns(text_pair=None, text="path"),
    section="image_classification",
    problem="single-label",
    stratify=True,
    noun="image",
    read=read,
    find_labels=find_labels,
    check_labels=check_labels,
    load_processor=load_processor,
    encode=encode,
    texts=checksums,
    augment=augment,
    show_augmented=show_augmented,
    evaluate_batch=evaluate_batch,
    has_thresholds=True,
    evaluate_examples=text_classification.evaluate_examples,
    collect=by_example.collect_images,
    references=text_classification.references,
    compute_metrics=compute_metrics,
    unusable_metrics=unusable.for_classes,
    format_table=metrics.image_table,
    tables=tables.of_images,
    predict_batch=text_classification.predict_batch,
)
