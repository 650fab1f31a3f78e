"""The second part of engine.prepare: the rows of each part are encoded, in several processes, into a shard.

A part is done once its description, part-00000.json, has been written: last, and as a whole. So a run that ended in
between continues with the parts that are not done.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.causal_lm import note_blocks, split_into_blocks
from data.errors import DataError
from data.examples import TextExamples
from data.image_classification import ImageExamples
from data.mapped import Shard
from data.mapped_images import write_image_shard
from data.prepared import iterate_rows, write_arrays, write_rows_file, write_shard
from data.row import Row
from data.writing import sha256_of, write_text
from engine.errors import TrainingError
from engine.plugins import load_plugins
from engine.preparation import HELD_OUT, SAMPLE, TRAIN, Division, apply_labels, part_file
from engine.tasks import TaskSettings, find_task

LONGEST = 2**30  # tokens of a text that is no part of a block yet


@dataclass(frozen=True)
class EncodingJob:
    """The task, settings and labels that all parts are encoded with."""

    task: str
    settings: TaskSettings
    model_folder: Path
    plugins: tuple[str, ...]
    folder: Path
    division: Division  # without `uses`

    @property
    def makes_blocks(self) -> bool:
        """Whether texts are concatenated and split into blocks, once all of them are encoded."""
        return bool(getattr(self.settings.own, "concatenate_texts", False))


_worker: tuple[EncodingJob, Any] | None = None  # the job of this process, and the processor of its model


def _start_worker(job: EncodingJob) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, to all of its processes: the main one ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are what runs at once
    load_plugins(job.plugins)
    _worker = (job, find_task(job.task)[0].load_processor(job.model_folder))


def _encode_in_worker(number: int, uses: np.ndarray) -> dict[str, Any]:
    if _worker is None:
        raise RuntimeError("a worker that was not started")
    return encode_part(*_worker, number, uses)


def encode_part(job: EncodingJob, processor: Any, number: int, uses: np.ndarray) -> dict[str, Any]:
    """Encode the training rows of a part into its shard, write its other rows, and return its description."""
    task, _ = find_task(job.task)
    read = list(iterate_rows(part_file(job.folder, "rows", number, "jsonl")))
    use_of = {id(row): use for row, use in zip(read, uses.tolist(), strict=True)}
    rows = apply_labels(task, [row for row in read if use_of[id(row)]], job.settings, job.division)
    settings = job.settings
    if job.makes_blocks:
        of_blocks = ("concatenate_texts", "document_mask")
        own = replace(settings.own, **{name: False for name in of_blocks if hasattr(settings.own, name)})
        settings = replace(settings, own=own, data=replace(settings.data, max_length=LONGEST))

    def used(bit: int) -> list[Row]:
        return [row for row in rows if use_of[id(row)] & bit]

    encode = task.encoder(processor, settings, job.division.labels)
    examples = encode(used(TRAIN))
    file = part_file(job.folder, "shard", number, "safetensors")
    if isinstance(examples, ImageExamples):
        description = write_image_shard(file, examples)
    elif isinstance(examples, TextExamples):
        description = write_shard(file, examples)
    else:
        raise DataError(f"run.task = {job.task!r} encodes no texts: there is nothing to prepare")
    counts = examples.label_counts(len(job.division.labels))
    description["label_counts"] = None if counts is None else counts.tolist()
    for kind, bit in (("validation", HELD_OUT), ("sample", SAMPLE)):
        write_rows_file(part_file(job.folder, kind, number, "jsonl"), used(bit))
    write_text(part_file(job.folder, "part", number, "json"), [json.dumps(description)])
    return description


def encode_parts(
    job: EncodingJob, processor: Any, uses: Sequence[np.ndarray], workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, description) of each part, those first that were done before.

    uses: those of the rows of each part. Raises TrainingError where a process was killed.
    """
    left = []
    for number in range(len(uses)):
        if (description := read_description(job.folder, number)) is not None:
            yield number, description
        else:
            left.append(number)
    if workers == 1 or len(left) < 2:
        for number in left:
            yield number, encode_part(job, processor, number, uses[number])
        return
    context = multiprocessing.get_context("forkserver")  # a fork of this process would copy its threads' locks
    context.set_forkserver_preload(["engine.encoding"])
    with ProcessPoolExecutor(min(workers, len(left)), context, _start_worker, (job,)) as pool:
        futures: dict[Future[dict[str, Any]], int] = {}
        try:
            futures = {pool.submit(_encode_in_worker, number, uses[number]): number for number in left}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise TrainingError(
                "a process that encodes was killed; if memory ran out, use fewer with --workers; the same command "
                "continues with what is left"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def read_description(folder: Path, number: int) -> dict[str, Any] | None:
    """Return the description of a part that is done, whose shard is as it was written; None for another one."""
    try:
        known: dict[str, Any] = json.loads(part_file(folder, "part", number, "json").read_text())
        is_same = all(sha256_of(folder / name) == checksum for name, checksum in known["sha256"].items())
    except (OSError, ValueError, LookupError):
        return None
    return known if is_same else None


def make_blocks(folder: Path, descriptions: list[dict[str, Any]], max_length: int, document_mask: bool) -> list[str]:
    """Split the texts of all shards, end to end, into blocks of max_length tokens; return the notes on them.

    The arrays of the blocks that begin in a shard are written into blocks-00000.safetensors beside it. The last tokens
    of a block may be those of the next shard. descriptions: of the shards; they become those of the blocks.
    """
    total, begin = sum(known["sizes"]["tokens"] for known in descriptions), 0
    counts = np.zeros(max_length + 1, dtype=np.int64)
    of_texts: list[np.ndarray] = []
    for number, known in enumerate(descriptions):
        size = known["sizes"]["tokens"]
        texts = Shard([folder / name for name in known["files"]]).array("offsets")
        begins = np.array([] if texts is None else texts, dtype=np.int64)
        of_texts.append(np.diff(begins, append=size))
        blocks = np.arange(-begin % max_length, size, max_length, dtype=np.int64)  # within the shard
        offsets = np.union1d(blocks, begins) if document_mask else blocks
        lengths = np.minimum(max_length, total - begin - blocks)
        arrays = {"offsets": offsets, "lengths": lengths}
        if document_mask:
            arrays["sequences"] = np.searchsorted(offsets, blocks)
            known["arrays"]["sequences"] = ("int64", [])
        file = part_file(folder, "blocks", number, "safetensors")
        write_arrays(file, arrays)
        known["files"][file.name], known["sha256"][file.name] = file.stat().st_size, sha256_of(file)
        known["sizes"] |= {"examples": len(blocks), "sequences": len(offsets)}
        counts += np.bincount(lengths, minlength=max_length + 1)
        begin += size
    for number, known in enumerate(descriptions):
        known["length_counts"] = counts.tolist() if number == 0 else []
        known["longest_sequence"] = int(np.flatnonzero(counts).max(initial=0))
    texts_of_all = np.concatenate(of_texts)
    return list(note_blocks(split_into_blocks(texts_of_all, max_length), texts_of_all, max_length))
