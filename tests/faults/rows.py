"""F13: bad rows in the training file of every task: each is named as file:line: reason before training starts.

Here JSON lines of every task; row_formats.py has tables, CoNLL, SQuAD and folders of images.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.task_data import DATA, write

from engine import config as configs
from faults import row_formats
from faults.runs import Bench, Ended, Result, Run

Row = dict[str, Any]
COUNT = 24  # good rows of a file


def change(key: str, value: Any) -> Callable[[Row, random.Random], Row]:
    """Return a function that returns a row with another value."""
    return lambda row, rng: {**row, key: value}


def without(key: str) -> Callable[[Row, random.Random], Row]:
    return lambda row, rng: {name: value for name, value in row.items() if name != key}


def far(row: Row, key: str) -> Row:
    """Return the row with a span that ends beyond its text."""
    return {**row, key: {**row[key], "start": len(row["text"]) + 3, "end": len(row["text"]) + 9}}


# Rows of every task that is read from JSON lines: bytes in the place of a line.
LINES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes that are not UTF-8": lambda line, rng: line[: len(line) // 2] + b"\xff\xfe\xff" + line[len(line) // 2 :],
    "half a line": lambda line, rng: line[: rng.randrange(1, len(line) - 1)],
    "a list": lambda line, rng: b"[1, 2]",
    "a number": lambda line, rng: b"17",
    "no JSON": lambda line, rng: b"<row>text</row>",
    "two objects": lambda line, rng: line + line,
    "NaN bare": lambda line, rng: b'{"id": NaN',
    "NUL": lambda line, rng: line[:9] + b"\0" + line[9:],
    "10 MB": lambda line, rng: b'{"id": "' + b"x" * 10_000_000 + b'"}',
}
TEXT = {
    "empty": change("text", ""),
    "white": change("text", " \t"),
    "missing": without("text"),
    "list": change("text", [1]),
}
LABEL = {"label missing": without("label"), "label null": change("label", None), "label empty": change("label", "")}
MINE: dict[str, dict[str, Callable[[Row, random.Random], Row]]] = {
    "text-classification": TEXT | LABEL | {"label list": change("label", ["a", "b"])},
    "multi-label-classification": TEXT
    | {"labels missing": without("labels"), "labels nested": change("labels", [["a"]])},
    "text-regression": TEXT
    | {
        "score missing": without("score"),
        "score word": change("score", "good"),
        "score NaN": change("score", "nan"),
        "score infinite": change("score", "inf"),
        "score list": change("score", [1]),
    },
    "token-classification": {
        "fewer tags": lambda row, rng: {**row, "tags": row["tags"][:-1]},
        "more tags": lambda row, rng: {**row, "tags": [*row["tags"], "O"]},
        "tags missing": without("tags"),
        "tokens missing": without("tokens"),
        "tags a number": change("tags", 7),
        "tag of no entity": lambda row, rng: {**row, "tags": ["I-THING", *["O"] * (len(row["tokens"]) - 1)]},
        "tag null": lambda row, rng: {**row, "tags": [None] * len(row["tokens"])},
        "tokens empty": lambda row, rng: {**row, "tokens": [], "tags": []},
        "token number": lambda row, rng: {**row, "tokens": [{}] * len(row["tokens"])},
    },
    "multiple-choice": LABEL
    | {
        "label too large": change("label", 9),
        "label of no choice": change("label", "Z"),
        "choices missing": without("choices"),
        "choices a text": change("choices", "red"),
        "one choice": change("choices", ["red"]),
        "choice empty": change("choices", ["red", ""]),
        "choices equal": change("choices", ["red", "red"]),
        "context a number": change("context", 7),
    },
    "masked-lm": TEXT,
    "span-corruption": TEXT,
    "causal-lm": TEXT,
    "dialogue": {
        "no turns": change("messages", []),
        "turns missing": without("messages"),
        "turns a text": change("messages", "hello"),
        "unknown role": change("messages", [{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "b"}]),
        "no reply": change("messages", [{"role": "user", "content": "a"}]),
        "content missing": change("messages", [{"role": "user"}, {"role": "assistant", "content": "b"}]),
        "turn a number": change("messages", [1, 2]),
    },
    "summarization": TEXT | {"summary missing": without("summary"), "summary empty": change("summary", "")},
    "translation": {
        "source missing": without("source"),
        "source empty": change("source", ""),
        "target missing": without("target"),
        "target list": change("target", ["a"]),
        "target empty": change("target", ""),
    },
    "question-answering": {
        "answer elsewhere": change("answers", [{"text": "nowhere to be found", "answer_start": 0}]),
        # of texts that are not in the context, where a wrong place would be repaired
        "answer beyond": change("answers", [{"text": "nowhere", "answer_start": 100_000}]),
        "answer before": change("answers", [{"text": "nowhere", "answer_start": -5}]),
        "answers a number": change("answers", 5),
        "question empty": change("question", ""),
        "question missing": without("question"),
        "context missing": without("context"),
        "context empty": change("context", ""),
    },
    "relation-extraction": {
        "subject beyond": lambda row, rng: far(row, "subject"),
        "object beyond": lambda row, rng: far(row, "object"),
        "subject missing": without("subject"),
        "subject empty": lambda row, rng: {**row, "subject": {**row["subject"], "end": row["subject"]["start"]}},
        "object reversed": lambda row, rng: {**row, "object": {"start": 5, "end": 2, "type": "place"}},
        "relation missing": without("relation"),
        "relation null": change("relation", None),
        "subject number": change("subject", 3.5),
        "text missing": without("text"),
    },
}


def run(count: int, seed: int, folder: Path) -> Result:
    """Write `count` files, of each kind of bad row of each task and format in turn, with one to three bad rows each."""
    bench, rng, result = TaskBench(folder), random.Random(seed), Result()
    lines = [(task, kind) for task, own in MINE.items() for kind in [*LINES, *own]]
    cases = [*lines, *row_formats.CASES]
    rng.shuffle(cases)
    for i in range(count):
        name, kind = cases[i % len(cases)]
        act = refuse if name in MINE else row_formats.act
        problem = act(bench, name, kind, rng)
        result.add(problem and f"{kind}: {problem}", name)
    return result


class TaskBench(Bench):
    """Runs of the tiny model of every task."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        tasks = [*DATA, row_formats.IMAGES]
        self.settings = {task: write(task, folder / task, COUNT) for task in tasks}

    def config(self, folder: Path, settings: dict[str, object]) -> configs.Config:
        config = configs.override(configs.Config(), {"run.folder": str(folder), "train.max_steps": 2} | settings)
        configs.check(config)
        return config


def refuse(bench: TaskBench, task: str, kind: str, rng: random.Random) -> str:
    """Train on a file with bad rows; return what was wrong with the answer."""
    settings = bench.settings[task]
    good = Path(settings["data.train"]).read_bytes().splitlines()
    places = sorted(rng.sample(range(len(good)), rng.randint(1, 3)))
    lines = [spoil(task, kind, line, rng) if i in places else line for i, line in enumerate(good)]
    file = bench.folder / task / "spoiled.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n")
    run = bench.run(settings | {"data.train": str(file)})
    ended = run.finish()
    problem = check(ended, run, [f"{file}:{place + 1}: " for place in places])
    run.remove()
    return problem


def spoil(task: str, kind: str, line: bytes, rng: random.Random) -> bytes:
    if kind in LINES:
        return LINES[kind](line, rng)
    return json.dumps(MINE[task][kind](json.loads(line), rng)).encode()


def check(ended: Ended, run: Run, names: list[str]) -> str:
    """Return what was wrong with the end of a run with bad rows, which should be named so; "" if nothing."""
    if not ended.has_sentence():
        return f"ended otherwise: {ended.tail()}"
    missing = [name for name in names if name not in ended.err]
    counted = re.search(r"one of (\d+) such lines", ended.err)  # of a wrong encoding, which spoils many lines alike
    if missing and not (len(missing) < len(names) and counted and int(counted[1]) == len(names)):
        return f"{missing} of {names} were not named: {ended.err[:300]}"
    return "it left a run folder" if run.folder.exists() else ""
