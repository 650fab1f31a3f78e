"""Prepare the training data of a recipe: encode its texts once, into files that are mapped. As a command:

    python -m data.prepare [RECIPE] --out FOLDER [--workers N] [--verify] [--section.key=value ...]

`--data.train FOLDER` then trains from the folder as from the file, with the same losses, and holds none of it in
memory. The settings must be the same. Rows that are held out for validation are kept in the folder; validation and test
files are named as before. A command that was interrupted is given again, and continues.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

import models
from data.errors import DataError
from data.formats.lines import locate
from data.formats.memory import is_in_memory
from data.image_preprocessing import Preprocessing
from data.mapped import Facts
from data.mapped_images import compute_fingerprint
from data.notes import count_of
from data.prepared import (
    AGAIN,
    MANIFEST,
    PLAN,
    SAMPLE,
    VALIDATION,
    VERSION,
    Manifest,
    ShardEntry,
    checksum_of,
    is_prepared,
    open_parts,
    open_shards,
    read_manifest,
    write_manifest,
)
from data.writing import WRITING, sha256_of, write_text
from engine import cli, config, help_pages, validate
from engine.config import Config, ConfigError
from engine.disk import format_bytes, free_bytes
from engine.encoding import EncodingJob, encode_parts, make_blocks
from engine.errors import TrainingError
from engine.plugins import load_plugins
from engine.preparation import Division, Reading, divide, merge_notes, part_file, read_source
from engine.tasks import Task, TaskSettings, check_fetched, find_task
from engine.tasks.prepared import checksum_of_code, describe_settings, find_difference

USAGE = "python -m data.prepare [RECIPE] --out FOLDER [--workers N] [--verify] [--section.key=value ...]"
OPTIONS = {
    "out FOLDER": "the folder to write; one that was begun is continued",
    "workers N": "number of processes that encode; by default one for each core",
}
SWITCHES = {"verify": "compare the checksums of a folder that is finished, and write nothing"}
TEMPORARY = ("rows-*.jsonl", "part-*.json", "validation-*.jsonl", "sample-*.jsonl", f"{WRITING}*", PLAN)
SHARDS = ("shard-*.safetensors", "blocks-*.safetensors")


def main(argv: Sequence[str]) -> int:
    help_pages.answer(argv, USAGE, options=OPTIONS | SWITCHES)
    options, rest = _take_options(list(argv))
    cfg = config.parse(rest, USAGE)
    if "out" not in options:
        raise ConfigError(f"--out is missing: {USAGE}")
    workers = _read_workers(options.get("workers", ""))
    folder = Path(options["out"])
    if "verify" in options:
        _verify(folder)
        return 0
    load_plugins(cfg.run.plugins)
    try:
        prepare(cfg, folder, workers)
    except KeyboardInterrupt:
        print(f"stopped; the same command continues in {folder}", file=sys.stderr)
        raise
    except OSError as error:
        raise TrainingError(_explain_os_error(folder, error)) from None
    return 0


def _take_options(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return (the command's own options, the other arguments)."""
    names = [name.partition(" ")[0] for name in OPTIONS]
    own = {name: "true" for name in SWITCHES if f"--{name}" in argv}
    rest = list[str]()
    arguments = iter(argument for argument in argv if argument.removeprefix("--") not in SWITCHES)
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in names:
            own[name] = value if equals else next(arguments, "")
            if not own[name] or own[name].startswith("--"):
                raise ConfigError(f"--{name} needs a value: --{name}=VALUE")
        else:
            rest.append(argument)
    return own, rest


def _read_workers(text: str) -> int:
    if not text:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdecimal() or not 0 < int(text) <= 1000:
        raise ConfigError(f"--workers {text} should be a whole number from 1 to 1,000")
    return int(text)


def prepare(cfg: Config, folder: Path, workers: int) -> Manifest:
    """Write the prepared folder of a recipe, or what is missing of one that was begun; return its manifest.

    Raises ConfigError and DataError for what training would refuse, and for a folder of other settings.
    """
    task, _ = find_task(cfg.run.task)
    settings = validate.task_settings(cfg, task)
    settings = replace(settings, data=replace(settings.data, cache="", num_workers=0))
    _check_usable(cfg)
    model_folder = models.hub.resolve(cfg.model.name, cfg.model.revision)
    processor = task.load_processor(model_folder)
    tokenizer = getattr(processor, "tokenizer", processor)
    if isinstance(tokenizer, Tokenizer):
        validate.check_room(cfg, tokenizer)
    source = locate(settings.data.train)
    about = {
        "task": cfg.run.task,
        "settings": describe_settings(settings, task),
        "seed": cfg.run.seed,
        "tokenizer": checksum_of(tokenizer),
        "source": {"name": settings.data.train, "bytes": source.stat().st_size if source.exists() else 0},
        "code": checksum_of_code(),
        "subset_size": cfg.eval.train_subset_size,
        "decoder_start_id": getattr(processor, "decoder_start_id", 0),
        "version": VERSION,
    }
    _claim(folder, about)
    if (folder / MANIFEST).is_file():
        _remove(folder, TEMPORARY)
        try:
            return _verify(folder)
        except DataError as error:
            print(error, file=sys.stderr)
            write_text(folder / PLAN, [json.dumps(about, indent=1)])
            (folder / MANIFEST).unlink()
    reading, division = _read(task, settings, folder, cfg)
    job = EncodingJob(
        cfg.run.task, settings, model_folder, tuple(cfg.run.plugins), folder, replace(division, uses=np.empty(0))
    )
    uses = np.split(division.uses, np.cumsum(reading.parts)[:-1])
    descriptions = _encode(job, processor, uses, workers)
    manifest = _finish(job, processor, reading, division, descriptions, about)
    _report(folder, manifest)
    return manifest


def _check_usable(cfg: Config) -> None:
    name = cfg.data.train
    if is_in_memory(name):
        raise ConfigError("data.train: rows in memory are trained on as they are; name a file")
    if is_prepared(name):
        raise ConfigError(f"data.train = {name!r} is a prepared folder; name the file that it was made from")
    if cfg.span_corruption.concatenate_texts:
        raise ConfigError(
            "span_corruption.concatenate_texts = True makes blocks before their spans are cut out, which a folder "
            "cannot hold: leave it out, or name the file in data.train"
        )
    if cfg.data.fold:
        raise ConfigError(f"data.fold = {cfg.data.fold!r} is of runs on the file itself: leave it out")
    check_fetched([name])


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Make the folder, or check that it was begun from the same; ConfigError for another one."""
    folder.mkdir(parents=True, exist_ok=True)
    known = _read_origin(folder)
    if known is not None:
        if difference := find_difference(about["settings"], known["settings"], folder):
            raise ConfigError(f"--out: {difference}")
        for key, what in (
            ("task", "run.task"),
            ("seed", "run.seed"),
            ("subset_size", "eval.train_subset_size"),
            ("tokenizer", "the tokenizer or preprocessing of model.name"),
            ("source", "data.train"),
            ("code", "the code that encodes"),
        ):
            if known[key] != about[key] and not (key == "code" and (folder / MANIFEST).is_file()):
                shown = "" if key in ("tokenizer", "code") else f": {about[key]!r}, and before {known[key]!r}"
                raise ConfigError(
                    f"--out {str(folder)!r} was begun with another value of {what}{shown}; choose another folder, or "
                    "remove this one"
                )
        return
    if (folder / PLAN).is_file():
        _remove(folder, (*TEMPORARY, *SHARDS))
    elif any(not path.name.startswith(WRITING) for path in folder.iterdir()):
        raise ConfigError(f"--out {str(folder)!r} is a folder with other files; name a new one")
    write_text(folder / PLAN, [json.dumps(about, indent=1)])


def _read_origin(folder: Path) -> dict[str, Any] | None:
    """Return what a folder is made from; None where no part of it is done, as after an error in the file.

    DataError for a damaged manifest.
    """
    if (folder / MANIFEST).is_file():
        return asdict(read_manifest(folder, check_shards=False))
    if not (folder / PLAN).is_file() or not any(folder.glob("part-*.json")):
        return None
    try:
        known: dict[str, Any] = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{folder / PLAN} is damaged: {error}; remove the folder, and prepare it again") from None
    return known


def _read(task: Task, settings: TaskSettings, folder: Path, cfg: Config) -> tuple[Reading, Division]:
    """Read the file, also where a command continues: what has to be known of all rows is not kept."""
    with tqdm(desc="reading", unit="row", leave=False, delay=1, disable=not sys.stderr.isatty()) as bar:
        reading = read_source(task, settings, folder, bar.update)
    division = divide(reading, cfg.run.seed, cfg.eval.train_subset_size)
    if reading.is_held and task.noun != "image":  # of which the places alone are read
        source = locate(settings.data.train)
        shown = format_bytes(source.stat().st_size) if source.is_file() else "a folder"
        reading.notes.append(
            f"it was read into memory as a whole ({shown}); files of .jsonl, .csv, .tsv, .txt or .parquet are not"
        )
    return reading, division


def _encode(job: EncodingJob, processor: Any, uses: list[np.ndarray], workers: int) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    rows = sum(map(len, uses))
    with tqdm(total=rows, desc="encoding", unit="row", leave=False, delay=1, disable=not sys.stderr.isatty()) as bar:
        for number, description in encode_parts(job, processor, uses, workers):
            found[number] = description
            bar.update(len(uses[number]))
    return [found[number] for number in range(len(uses))]


def _finish(
    job: EncodingJob,
    processor: Any,
    reading: Reading,
    division: Division,
    descriptions: list[dict[str, Any]],
    about: dict[str, Any],
) -> Manifest:
    """Write what needs all parts, and the manifest last; then remove what it was made from."""
    notes = merge_notes(note for known in descriptions for note in known["encoding_notes"])
    if job.makes_blocks:
        own, max_length = job.settings.own, job.settings.data.max_length
        notes += make_blocks(job.folder, descriptions, max_length, getattr(own, "document_mask", False))
    for kind, file in (("validation", VALIDATION), ("sample", SAMPLE)):
        parts = (part_file(job.folder, kind, number, "jsonl") for number in range(len(descriptions)))
        write_text(job.folder / file, (part.read_text(encoding="utf-8") for part in parts))
    lengths = [np.array(known["length_counts"], dtype=np.int64) for known in descriptions]
    by_length = np.zeros(max(map(len, lengths)), dtype=np.int64)
    for values in lengths:
        by_length[: len(values)] += values
    counts = [known["label_counts"] for known in descriptions]
    largest: dict[str, int] = {}
    arrays: dict[str, Any] = {}
    for known in sorted(descriptions, key=lambda known: bool(known["sizes"]["tokens"])):  # empty shards first
        arrays |= known["arrays"]
        largest |= {name: max(value, largest.get(name, 0)) for name, value in known["largest"].items()}
    manifest = Manifest(
        **about,
        labels=division.labels,
        shards=[ShardEntry(known["files"], known["sha256"], known["sizes"]) for known in descriptions],
        arrays=arrays,
        num_rows=int(np.count_nonzero(division.uses & 1)),
        notes=[*reading.notes, *division.notes],
        encoding_notes=notes,
        truncated=sum(known["truncated"] for known in descriptions),
        label_counts=None if None in counts else np.sum(counts, axis=0).tolist(),
        length_counts=by_length.tolist(),
        largest=largest,
        longest_sequence=max(known["longest_sequence"] for known in descriptions),
        num_empty=sum(known["num_empty"] for known in descriptions),
        first_empty=next((known["first_empty"] for known in descriptions if known["num_empty"]), ""),
        are_blocks=job.makes_blocks,
    )
    if isinstance(processor, Preprocessing):
        fingerprint = compute_fingerprint(open_parts(job.folder, manifest), processor, manifest.arrays)
    else:
        no_facts = Facts("", (), 0, None, np.array(manifest.length_counts), {}, 0, 0, "")
        fingerprint = open_shards(job.folder, manifest, no_facts, None).compute_fingerprint()
    manifest = replace(manifest, fingerprint=fingerprint)
    write_manifest(job.folder, manifest)
    _remove(job.folder, TEMPORARY)
    return manifest


def _remove(folder: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


def _verify(folder: Path) -> Manifest:
    """Compare the checksums of all shards; DataError for one that differs."""
    manifest = read_manifest(folder)
    for entry in tqdm(manifest.shards, desc="verifying", leave=False, delay=1, disable=not sys.stderr.isatty()):
        for name, checksum in entry.sha256.items():
            if sha256_of(folder / name) != checksum:
                raise DataError(f"{folder / name} is damaged: its checksum is not that of the manifest; {AGAIN}")
    print(f"{folder} is complete: {count_of(len(manifest.shards), 'shard')}, all as they were written")
    return manifest


def _report(folder: Path, manifest: Manifest) -> None:
    examples = sum(entry.sizes["examples"] for entry in manifest.shards)
    size = sum(path.stat().st_size for path in folder.iterdir())
    shards = count_of(len(manifest.shards), "shard")
    print(f"{folder}: {count_of(examples, 'example')} in {shards}, {format_bytes(size)}")
    print("".join(f"  {note}\n" for note in (*manifest.notes, *manifest.encoding_notes)), end="")
    print(f"train from it with --data.train {shlex.quote(str(folder))}")


def _explain_os_error(folder: Path, error: OSError) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"--out {str(folder)!r}: {error.strerror or error}"
    done, total = len([*folder.glob("part-*.json")]), len([*folder.glob("rows-*.jsonl")])
    written = sum(path.stat().st_size for path in folder.glob("shard-*"))
    needed = f"about {format_bytes(written / done * (total - done))} more are needed" if done else "more is needed"
    return (
        f"--out {str(folder)!r}: the disk is full, with {format_bytes(free_bytes(folder))} free; {needed}. Free them, "
        "and give the same command again: it continues"
    )


if __name__ == "__main__":
    cli.run_command(main)
