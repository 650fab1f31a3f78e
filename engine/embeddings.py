"""Vectors of texts by any checkpoint, for engine.predict --embeddings: how they are pooled, and the task that does it.

The texts (or images) are read and encoded by themselves, as data.text_column says, whatever the checkpoint's task. The
hidden states of its last layer are pooled. How, is said by, in this order:

1. model.pooling and sentence_embedding.similarity of the command;
2. the files of sentence-transformers in the folder (models/checkpoints/sentence_files.py);
3. the pooling in config.json, as a trained classifier has it; else the mean of all tokens, in a causal model the last.

Without 1. and 2. the vectors keep their length.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import models
from data import Batch, Examples
from data.vector_files import WRITERS, ids_file
from data.writing import is_stream, sha256_of
from engine import checkpoint, cli, validate
from engine.config import Config, ConfigError, GenerateSettings, check, override
from engine.contrastive import comparable_vectors
from engine.manifest import MANIFEST
from engine.prediction_output import Write
from engine.tasks import TASKS, Task
from models import TaskModel
from models.checkpoints import hub
from models.checkpoints.sentence_files import SentenceFiles, read_sentence_files

HEAD, TASK, IMAGES = "sentence-embedding", "sentence-embedding", "image-classification"
SETTINGS = ("model.pooling", "sentence_embedding.similarity")
PAIR = "data.text_pair_column"
KEPT = ("device", "deterministic", "plugins")  # of [run]


class Embedder(NamedTuple):
    """The folder of a checkpoint, and how it embeds. notes: what it leaves out of the texts or does not apply."""

    folder: Path
    config: Config
    similarity: str
    notes: list[str]


def open_embedder(name: str, given: Mapping[str, Any]) -> Embedder:
    """Open a run, a checkpoint or a published model.

    given: settings by their names. Raises ConfigError or ModelError where there is none, and for unused settings.
    """
    if PAIR in given:
        raise ConfigError(f"--{PAIR} has no effect on embeddings: a vector is of one text, that of data.text_column")
    folder = Path(name)
    is_run = (folder.is_dir() and not (folder / "config.json").is_file()) or (folder / MANIFEST).is_file()
    if is_run:
        folder = checkpoint.open_run(name)
        recipe = cli.configure(folder, dict(given), more=SETTINGS)
    else:
        folder = hub.resolve(name)
        for key in given:
            if not cli.is_used(key, SETTINGS):
                raise ConfigError(f"--{key} has no effect on embeddings; --help lists the settings that have one")
        recipe = override(Config(), {**dict(given), "model.name": str(folder), "data.train": "no file"})
        check(recipe)
    files = None if "model.pooling" in given else read_sentence_files(folder)
    similarity = recipe.sentence_embedding.similarity
    if "sentence_embedding.similarity" not in given and not (is_run and recipe.run.task == TASK):
        similarity = "cosine" if files is not None and files.normalize else "dot"
    config = _config_of(folder, recipe, given, files)
    return Embedder(folder, config, similarity, _describe_left_out(config, recipe, given, files))


def _describe_left_out(
    config: Config, recipe: Config, given: Mapping[str, Any], files: SentenceFiles | None
) -> list[str]:
    """Return notes on the second text of a pair, and on what the files of sentence-transformers want of the texts."""
    notes = list[str]()
    task = TASKS.get(recipe.run.task)
    pair = recipe.data.text_pair_column or (task.columns.text_pair if task is not None else "")
    if pair and config.run.task == TASK and "data.text_column" not in given:
        column = config.data.text_column
        notes.append(f"vectors of the column {column!r} alone, not of {pair!r}: --data.text_column {pair} embeds that")
    if files is not None and files.unapplied:
        found = "; ".join(files.unapplied)
        notes.append(f"the files of sentence-transformers also have {found}: not applied, the texts are read as given")
    return notes


def _config_of(folder: Path, recipe: Config, given: Mapping[str, Any], files: SentenceFiles | None) -> Config:
    """Return the configuration of the task that embeds, with what a recipe and the files say about reading texts."""
    raw = models.read_config(folder)
    architecture = models.ARCHITECTURES[str(raw["model_type"])]
    is_run, is_images = (folder / MANIFEST).is_file(), IMAGES in architecture.heads
    pooling = str(given.get("model.pooling", ""))
    if is_images and not pooling:  # the mean of the patches is rarely what was trained
        pooling = str(raw.get("pooling") or architecture.pooling)
    data = replace(recipe.data, labels=(), cache="")
    if not is_images:
        column = recipe.data.text_column or _column_of(recipe)
        pair = "anchor" if column == "positive" else "positive"  # another one, which is not read
        long_texts = "head+tail" if recipe.data.long_texts == "head+tail" else "truncate"
        data = replace(data, text_column=column, text_pair_column=pair, label_column="", long_texts=long_texts)
    if not is_run and "data.max_length" not in given:
        most = raw.get("max_position_embeddings")
        limit = files.max_length if files is not None else None
        data = replace(data, max_length=limit or min(512, most if isinstance(most, int) and most > 0 else 512))
    default = Config()
    return replace(
        default,
        run=replace(default.run, task=IMAGES if is_images else TASK, **{k: getattr(recipe.run, k) for k in KEPT}),
        model=replace(default.model, name=str(folder), pooling=pooling),
        data=data,
        train=recipe.train,
        eval=recipe.eval,
        distributed=recipe.distributed,
        image_classification=recipe.image_classification,
    )


def _column_of(recipe: Config) -> str:
    """Return the usual column of texts of a recipe's task; "text" where its column has lists."""
    column = TASKS[recipe.run.task].columns.text if recipe.run.task in TASKS else "text"
    return "text" if column in ("tokens", "messages") else column


def print_notes(notes: Sequence[str]) -> None:
    """Print notes for a caller whose standard output is its own."""
    for note in notes:
        print(note, file=sys.stderr)


def embedding_task(task: Task, similarity: str, as_text: bool) -> Task:
    """Return a task that predicts vectors of what `task` reads. as_text: as base64 of fp32, for files of vectors."""

    def predict_batch(
        model: TaskModel, batch: Batch, examples: Examples, generate: GenerateSettings
    ) -> list[dict[str, Any]]:
        vectors = comparable_vectors(model(batch).logits, similarity)
        if not as_text:
            return [{"embedding": vector} for vector in vectors.tolist()]
        rows = vectors.float().cpu().numpy().astype("<f4")
        return [{"embedding": base64.b64encode(row.tobytes()).decode("ascii")} for row in rows]

    return replace(task, head=HEAD, predicts="embedding", predict_batch=predict_batch)


def load_embedder(folder: Path, config: Config, task: Task) -> tuple[TaskModel, Any]:
    """Return the model of a checkpoint with a head that pools, without its own head, and its tokenizer or images'."""
    model = models.from_pretrained(folder, head=HEAD, head_init="reset", pooling=config.model.pooling or None)
    processor = task.load_processor(folder)
    validate.check_fit(config, model, processor)
    return model.eval(), processor


def describe_pooling(model: TaskModel, similarity: str) -> str:
    """Return a phrase on how the vectors are made."""
    pooling = model.head.shape.pooling if model.head is not None else ""
    what = {"mean": "the mean of all tokens", "cls": "the first token", "last": "the last token"}.get(pooling, pooling)
    length = "of length 1" if similarity == "cosine" else "of their own length"
    return f"{what} ({pooling}), {length}"


def checksum_of(folder: Path) -> str:
    """Return a checksum of a checkpoint: of its manifest, else of its weights."""
    if (folder / MANIFEST).is_file():
        return sha256_of(folder / MANIFEST)
    return ",".join(sha256_of(path) for path in sorted(folder.glob("*.safetensors")))


def find_writer(output: Path, source: str) -> Write | None:
    """Return what writes vectors into a file of this name, .npy or .parquet; None for other names, and for pipes."""
    if is_stream(output) or output.suffix.lower() not in WRITERS:
        return None
    ids = ids_file(output)
    if output.suffix.lower() == ".npy" and ids.exists() and Path(source).exists() and ids.samefile(source):
        raise ConfigError(f"--output {str(output)!r} writes the ids into {str(ids)!r}, which is read; name another one")
    return WRITERS[output.suffix.lower()]


def as_matrix(predictions: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the vectors of predictions, (N, D) fp32; NaN where there is none."""
    width = next((len(row["embedding"]) for row in predictions if row["embedding"] is not None), 0)
    vectors = np.full((len(predictions), width), np.nan, dtype=np.float32)
    for i, row in enumerate(predictions):
        vectors[i] = np.nan if row["embedding"] is None else row["embedding"]
    return vectors
