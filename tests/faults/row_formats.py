"""F13 beside JSON lines: bad rows in CSV, TSV, CoNLL and SQuAD files, bad files in folders of images.

A byte order mark and line ends of Windows are no fault: the run must be that on the plain file.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.runs import logged_rows

if TYPE_CHECKING:
    from faults.rows import TaskBench

Row = dict[str, Any]
IMAGES = "image-classification"
LONG = 10_000_000  # bytes of a line

# Lines of a table, of which D is the delimiter.
TABLE: dict[str, bytes] = {
    "one field": b"x",
    "two fields": b"xDa cat",
    "four fields": b"xDa catDredDred",
    "bytes that are not UTF-8": b"xDa \xff\xfe\xffDred",
    "NUL": b"xDa \0 catDred",
    "text empty": b"xDDred",
    "text white": b"xD  Dred",
    "label empty": b"xDa catD",
    "10 MB": b"xD" + b"a " * (LONG // 2) + b"Dred",
}
# Lines at the end of a sentence.
WORDS: dict[str, bytes] = {
    "one column": b"cat",
    "three columns": b"cat O red",
    "no word": b" O",
    "bytes that are not UTF-8": b"c\xff\xfe\xfft O",
    "NUL": b"c\0t O",
    "tag of no entity": b"cat I-THING",
    "10 MB": b"a" * LONG + b" O",
}
QUESTIONS: dict[str, Callable[[Row, Row], object]] = {  # of a paragraph and its question
    "answer elsewhere": lambda part, one: one.update(answers=[{"text": "nowhere", "answer_start": 0}]),
    "answer beyond": lambda part, one: one.update(answers=[{"text": "anna", "answer_start": 10**6}]),
    "question missing": lambda part, one: one.pop("question"),
    "question empty": lambda part, one: one.update(question=""),
    "context missing": lambda part, one: part.pop("context"),
    "context empty": lambda part, one: part.update(context=""),
}
FILES: dict[str, Callable[[Path], object]] = {  # of an image
    "a text": lambda file: file.write_text("hello"),
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:60]),
    "a link to nothing": lambda file: (file.unlink(), file.symlink_to("nowhere.png")),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "no class": lambda file: file.rename(file.parent.parent / file.name),
}
HARMLESS: dict[str, Callable[[bytes], bytes]] = {
    "BOM": lambda content: b"\xef\xbb\xbf" + content,
    "CRLF": lambda content: content.replace(b"\n", b"\r\n"),
}
TASKS = {"csv": "text-classification", "tsv": "text-classification", "jsonl": "text-classification"}
TASKS |= {"conll": "token-classification", "json": "question-answering", "folder": IMAGES}
KINDS = {"csv": TABLE, "tsv": TABLE, "conll": WORDS, "json": QUESTIONS, "folder": FILES}
CASES = [(name, kind) for name, kinds in KINDS.items() for kind in kinds]
CASES += [(name, kind) for name in TASKS if name != "folder" for kind in HARMLESS] + [("jsonl", "unknown label")]


def act(bench: TaskBench, name: str, kind: str, rng: random.Random) -> str:
    """Train on a file of this format with faults of this kind; return what was wrong with the answer."""
    from faults.rows import check

    task = TASKS[name]
    settings, place = bench.settings[task], bench.folder / task / f"spoiled.{name}"
    if kind in HARMLESS:
        return compare(bench, settings, place, kind)
    if kind == "unknown label":
        names = spoil_label(Path(settings["data.validation"]), place, rng)
        run = bench.run(settings | {"data.validation": str(place)})
    else:
        names = SPOIL[name](Path(settings["data.train"]), place, kind, rng)
        run = bench.run(settings | {"data.train": str(place)})
    problem = check(run.finish(), run, names)
    run.remove()
    return problem


def compare(bench: TaskBench, settings: Row, place: Path, kind: str) -> str:
    """Train on a file and on its harmless variant; return whether the logs differ."""
    content = CONTENT[place.suffix[1:]](Path(settings["data.train"]))
    logs = []
    for variant in (content, HARMLESS[kind](content)):
        place.write_bytes(variant)
        run = bench.run(settings | {"data.train": str(place)})
        ended = run.finish()
        if ended.code != 0:
            return f"ended otherwise: {ended.tail()}"
        logs.append(logged_rows(run.folder))
        run.remove()
    return "" if logs[0] == logs[1] else "another run than on the plain file"


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def table(file: Path, delimiter: str) -> list[bytes]:
    fields = ("id", "text", "label")
    return [delimiter.join(row).encode() for row in (fields, *([row[key] for key in fields] for row in read(file)))]


def sentences(file: Path) -> list[list[bytes]]:
    return [
        [f"{word} {tag}".encode() for word, tag in zip(row["tokens"], row["tags"], strict=True)] for row in read(file)
    ]


def squad(file: Path) -> Row:
    """Return a SQuAD file with a paragraph for each question."""
    keys = ("id", "question", "answers")
    parts = [{"context": row["context"], "qas": [{key: row[key] for key in keys}]} for row in read(file)]
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": parts}]}


def lines_of(lines: list[bytes]) -> bytes:
    return b"\n".join(lines) + b"\n"


CONTENT: dict[str, Callable[[Path], bytes]] = {
    "csv": lambda file: lines_of(table(file, ",")),
    "tsv": lambda file: lines_of(table(file, "\t")),
    "jsonl": lambda file: file.read_bytes(),
    "conll": lambda file: b"\n".join(lines_of(each) for each in sentences(file)),
    "json": lambda file: json.dumps(squad(file), indent=1).encode(),
}


def choose(count: int, rng: random.Random) -> list[int]:
    return sorted(rng.sample(range(count), rng.randint(1, 3)))


def spoil_table(train: Path, place: Path, kind: str, rng: random.Random) -> list[str]:
    """Write a table with bad lines; return how they are to be named. The same for the functions below."""
    delimiter = "," if place.suffix == ".csv" else "\t"
    lines = table(train, delimiter)
    places = [1 + i for i in choose(len(lines) - 1, rng)]
    for number, i in enumerate(places):  # ids do not repeat
        lines[i] = TABLE[kind].replace(b"D", delimiter.encode()).replace(b"x", f"x{number}".encode(), 1)
    place.write_bytes(lines_of(lines))
    return [f"{place}:{i + 1}: " for i in places]


def spoil_sentences(train: Path, place: Path, kind: str, rng: random.Random) -> list[str]:
    every = sentences(train)
    names, number, places = [], 0, choose(len(every), rng)
    for i, lines in enumerate(every):
        if i in places:
            lines.append(WORDS[kind])
            names.append(f"{place}:{number + len(lines)}: ")
        number += len(lines) + 1
    place.write_bytes(b"\n".join(map(lines_of, every)))
    return names


def spoil_questions(train: Path, place: Path, kind: str, rng: random.Random) -> list[str]:
    content = squad(train)
    parts = content["data"][0]["paragraphs"]
    places = choose(len(parts), rng)
    for i in places:
        QUESTIONS[kind](parts[i], parts[i]["qas"][0])
    place.write_text(json.dumps(content, indent=1))
    return [f"{place}: question {parts[i]['qas'][0]['id']}: " for i in places]


def spoil_images(train: Path, place: Path, kind: str, rng: random.Random) -> list[str]:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(train, place)
    files = sorted(place.rglob("*.png"))
    names = []
    for i in choose(len(files), rng):
        FILES[kind](files[i])
        name = files[i].name if kind == "no class" else str(files[i].relative_to(place))
        names.append(f"{place}: {name}: ")
    return names


def spoil_label(file: Path, place: Path, rng: random.Random) -> list[str]:
    rows = read(file)
    i = rng.randrange(len(rows))
    rows[i]["label"] = "mauve"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"{place}:{i + 1}: unknown label 'mauve'"]


SPOIL: dict[str, Callable[[Path, Path, str, random.Random], list[str]]] = {
    "csv": spoil_table,
    "tsv": spoil_table,
    "conll": spoil_sentences,
    "json": spoil_questions,
    "folder": spoil_images,
}
