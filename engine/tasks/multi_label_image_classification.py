"""Multi-label image classification: any number of labels for each image.

The images and their preprocessing are those of image_classification.py, the labels those of
multi_label_classification.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from data import Row, Rows
from data.image_classification import ImageExamples, ReadTargets, read_images
from data.image_preprocessing import Preprocessing
from data.multi_label_classification import multi_hot
from engine.tasks import image_classification
from engine.tasks.image_classification import IMAGE_CLASSIFICATION
from engine.tasks.multi_label_classification import MULTI_LABEL_CLASSIFICATION, read_sets_or_columns
from engine.tasks.settings import Columns, TaskSettings


def read(name: str, settings: TaskSettings, labelled: bool) -> Rows:
    """Read rows of images, and with labels a set of labels: from a list of paths, or files beside images in archives.

    The labels are in one column, or, where a list lacks it, in a column of 0 and 1 for each name in data.labels.
    """

    def read_with(read_targets: ReadTargets, columns: Sequence[str]) -> Rows:
        return read_images(
            name,
            image=settings.data.text_column,
            label=settings.label_column(labelled),
            group=settings.group_column(name, labelled),
            labels=settings.data.labels,
            max_pixels=settings.own.max_pixels,
            options=settings.file_options,
            read_targets=read_targets,
            target_columns=columns,
        )

    return read_sets_or_columns(name, settings, labelled, read_with)


def encode(
    rows: list[Row], processor: Preprocessing, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> ImageExamples:
    """Encode the images, and with labels a row of 0 and 1 for each."""
    examples = image_classification.encode(rows, processor, settings, labels, False)
    if not labelled:
        return examples
    return replace(examples, labels=multi_hot(rows, settings.data.label_column, labels))


MULTI_LABEL_IMAGE_CLASSIFICATION = replace(
    MULTI_LABEL_CLASSIFICATION,
    head=IMAGE_CLASSIFICATION.head,
    caches=False,
    long_texts=IMAGE_CLASSIFICATION.long_texts,
    columns=Columns(text_pair=None, text="path", label="labels"),
    section=IMAGE_CLASSIFICATION.section,
    noun=IMAGE_CLASSIFICATION.noun,
    read=read,
    load_processor=IMAGE_CLASSIFICATION.load_processor,
    encode=encode,
    texts=IMAGE_CLASSIFICATION.texts,
    augment=IMAGE_CLASSIFICATION.augment,
    show_augmented=IMAGE_CLASSIFICATION.show_augmented,
)
