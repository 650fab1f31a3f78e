"""Mutated data files in every format, for every task that reads them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from support.task_data import DATA, SIDE
from support.task_settings import task_settings

from data.formats import idx
from data.formats.image_files import check_image
from engine.tasks import TASKS
from faults.mutation import attempt, count, mutate

ROWS = 12
TAGGED = "# a comment\nthe\tO\ncat\tB-NAME\nsaw\tI-NAME\n\n-DOCSTART-\tO\n\nrome\tS-NAME\n.\tO\n"
CONLLU = "# sent_id = 1\n1\tThe\tthe\tDET\tDT\t_\t2\tdet\t_\t_\n2-3\tcats" + "\t_" * 8 + "\n"
CONLLU += "2\tcat\tcat\tNOUN\t_\t_\t0\troot\t_\t_\n"
SQUAD = {"data": [{"title": "a", "paragraphs": [{"context": "the cat is in rome .", "qas": [
    {"id": "1", "question": "where ?", "answers": [{"text": "rome", "answer_start": 14}], "is_impossible": False},
    {"id": "2", "question": "who ?", "answers": [], "is_impossible": True},
]}]}]}  # fmt: skip
STUDIO = [{"id": 1, "data": {"text": "a cat in rome"}, "annotations": [{"result": [
    {"id": "x", "type": "labels", "from_name": "label", "to_name": "text",
     "value": {"start": 9, "end": 13, "text": "rome", "labels": ["NAME"]}}]}]}]  # fmt: skip
SPANS = [
    {"text": "a cat in rome", "entities": [{"start": 9, "end": 13, "label": "NAME"}]},
    ["b", {"entities": [[0, 1, "X"]]}],
]
SHAREGPT = [{"conversations": [{"from": "human", "value": "a ?"}, {"from": "gpt", "value": "b"}], "system": "s"}]
ALPACA = [{"instruction": "a", "input": "", "output": "b", "history": [["x", "y"]]}]
C3 = [[["a cat", "in rome"], [{"question": "what ?", "choice": ["red", "ulm"], "answer": "ulm"}], "1-1"]] * 2
RACE = b'{"article": "a", "questions": ["b", "_"], "options": [["c", "d"], ["e", "f"]], "answers": ["A", "B"]}'


def rows_of(task: str, rng: random.Random) -> list[dict[str, Any]]:
    return [{"id": f"{i}", **DATA[task](rng)} for i in range(ROWS)]


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    lines = [[str(value).replace(delimiter, " ") for value in row.values()] for row in rows]
    return "\n".join(delimiter.join(line) for line in [list(rows[0]), *lines]).encode()


def parquet(rows: list[dict[str, Any]], suffix: str) -> bytes:
    import pyarrow
    from pyarrow import feather
    from pyarrow.parquet import write_table

    stream = io.BytesIO()
    content = pyarrow.Table.from_pylist(rows)
    (write_table if suffix == "parquet" else feather.write_feather)(content, stream)
    return stream.getvalue()


def seeds(rng: random.Random) -> list[tuple[str, str, dict[str, Any], bytes]]:
    """Return (task, name of a file, settings, content) of files that can be read."""
    found: list[tuple[str, str, dict[str, Any], bytes]] = []
    for task in DATA:
        rows = rows_of(task, rng)
        lines = json_lines(rows)
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        found += [(task, "a.jsonl", {}, lines), (task, "a.json", {}, json.dumps(rows, indent=1).encode())]
        found += [(task, "a.json", {}, json.dumps({"data": rows, "version": 1}).encode())]
        found += [(task, "a.json", {}, json.dumps(columns).encode()), (task, "a.csv", {}, table(rows, ","))]
        found += [(task, "a.tsv", {}, table(rows, "\t")), (task, "a.jsonl.gz", {}, gzip.compress(lines))]
        found += [(task, "a.jsonl.bz2", {}, bz2.compress(lines)), (task, "a.jsonl", {"bad_rows": "skip"}, lines)]
        found += [(task, "a.tsv", {"encoding": "utf-16"}, table(rows, "\t").decode().encode("utf-16"))]
        found += [(task, f"a.{end}", {}, parquet(rows, end)) for end in ("parquet", "arrow")]
    tags, answers = "token-classification", "question-answering"
    for bad_tags in ("raise", "repair"):
        found += [(tags, "a.conll", {"format": "conll", "bad_tags": bad_tags}, TAGGED.encode())]
    found += [(tags, "a.conllu", {"format": "conll"}, CONLLU.encode())]
    found += [(tags, "a.txt", {"format": "word/tag"}, b"the/O cat/B-NAME saw/I-NAME\nrome/B-NAME ./O\n")]
    for how in ("raise", "expand", "skip"):
        columns = {"bad_spans": how, "text_column": "text"}
        found += [(tags, "a.json", columns | {"label_column": "label"}, json.dumps(STUDIO).encode())]
        found += [(tags, "a.jsonl", columns | {"label_column": "entities"}, json_lines(SPANS))]
    found += [(answers, "a.json", {"format": how}, json.dumps(SQUAD).encode()) for how in ("auto", "squad")]
    found += [("multiple-choice", "a.json", {}, json.dumps(C3).encode()), ("multiple-choice", "a.txt", {}, RACE)]
    found += [("dialogue", "a.json", {}, json.dumps(rows).encode()) for rows in (SHAREGPT, ALPACA)]
    found += [("causal-lm", "a.txt", {"format": "text"}, b"a cat\n\nin rome\n")]
    found += [("multi-label-classification", "a.csv", {}, b"text,labels\na,\"red,blue\"\nb,['green']\nc,{red}\n")]
    return found


def read(task: str, path: Path, settings: dict[str, Any]) -> None:
    """Read a file as training does, up to the names of the classes; and as a prediction does."""
    options = task_settings(task, **settings)
    rows = TASKS[task].read(str(path), options, True)
    labels = TASKS[task].find_labels(str(path), rows, options)
    TASKS[task].check_labels(str(path), rows, options, labels)
    TASKS[task].split_labels(rows, options)
    TASKS[task].read(str(path), options, False)


def pictures(rng: random.Random) -> list[bytes]:
    """Return image files of every format that is read."""
    noise = np.random.default_rng(rng.randrange(99)).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    made = []
    for format in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, format)
        made.append(stream.getvalue())
    return made


def read_idx(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    idx.read(path, 3)


def run(count_: int, seed: int) -> dict[str, Any]:
    """Mutate and read `count_` files; one in eight is an image."""
    return count(outcomes(count_, seed))


def outcomes(count_: int, seed: int) -> Iterator[tuple[str, str]]:
    rng = random.Random(seed)
    files, images = seeds(rng), pictures(rng)
    numbers = bytes([0, 0, 8, 3]) + np.array([2, SIDE, SIDE], ">u4").tobytes() + bytes(2 * SIDE * SIDE)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        for i in range(count_):
            if i % 8 == 0:
                content = mutate(rng, rng.choice(images))
                yield f"image, try {i}", attempt(check_image, content)
                continue
            if i % 64 == 1:
                yield f"idx, try {i}", attempt(read_idx, folder / "train-images-idx3-ubyte", mutate(rng, numbers))
                continue
            task, file, settings, content = rng.choice(files)
            path = folder / file
            path.write_bytes(mutate(rng, content))
            yield f"{task}, {file}, try {i}", attempt(read, task, path, settings)
            path.unlink()
