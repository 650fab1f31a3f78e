"""Train every shipped recipe and print the task table of README.md:

    python -m benchmarks.tasks                         # all recipes, about an hour on two idle cores
    python -m benchmarks.tasks --only movie_reviews relations
    python -m benchmarks.tasks --print                 # the table of results/tasks.json; nothing is trained

Each training is `python -m engine.train NAME` in a process of its own, in fp32 on the CPU. Two numbers of each recipe:

- after: its watched metric on the test file, or without one the best evaluation on the held-out part;
- before, for a recipe with pretrained weights: the same recipe from random weights (`--model.init scratch`);
  for a classification from random weights: the share of the largest class;
  for every other recipe: the model before its first step (`--eval.at_start`), on the same examples.

Each training has one thread, unless --threads says otherwise. Its CPU seconds (user and system), which the table shows,
are then about its time on one idle core, even where they were measured on a busy machine: no thread waits for another.
results/tasks.json also has wall seconds, peak memory, steps, seed and commit. A measurement that was stopped continues:
what is known for the same commit, seed and number of threads is not measured again. A recipe whose data is missing is
left out, with the command that fetches it.

Options that begin with --SECTION. go to every training, as in --train.max_steps=2, and need another --output.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import record
from benchmarks.prepare.__main__ import NAMES as PREPARED
from engine.config import Config, ConfigError, read_recipe
from engine.log import read_rows
from engine.multi_task import open_task
from engine.tasks import read_training_data
from engine.validate import task_settings

OUTPUT = Path(__file__).parent / "results" / "tasks.json"
CLASSIFICATION = ("text-classification", "image-classification")
LARGEST_CLASS, RANDOM_WEIGHTS, UNTRAINED = "largest class", "random weights", "before training"
Measured = dict[str, Any]


class Shown(NamedTuple):
    """What the table says about a recipe, beside its numbers."""

    recipe: str
    task: str
    data: str
    model: str


TABLE = [
    Shown("movie_reviews", "classification", "10,568 sentences of film reviews", "MiniLM"),
    Shown("few_reviews", "classification", "200 film reviews, overfitted", "MiniLM"),
    Shown("review_modernbert", "classification", "film reviews", "ModernBERT"),
    Shown("chinese_sentiment", "classification, Chinese", "reviews of shops", "BERT"),
    Shown("package_tags", "several labels", "Debian packages, 63 tags", "MiniLM"),
    Shown("review_scores", "regression", "3,708 sentences of product reviews", "MiniLM"),
    Shown("capitals", "tagging: names", "film reviews, by their capitals", "MiniLM"),
    Shown("peoples_daily", "tagging: NER, Chinese", "People's Daily, 1998", "BERT"),
    Shown("questions", "question answering", "374 hand-made questions", "MiniLM"),
    Shown("relations", "relation extraction", "428 hand-made sentences", "MiniLM"),
    Shown("choices", "multiple choice", "film reviews, made by rule", "MiniLM"),
    Shown("message_embeddings", "sentence embeddings", "messages, English and Chinese", "MiniLM"),
    Shown("reviews_and_relations", "two tasks, one model", "200 reviews, 320 relations", "MiniLM"),
    Shown("review_adaptation", "masked language model", "film reviews, no labels", "MiniLM"),
    Shown("message_spans", "span corruption", "705 Chinese messages", "T5"),
    Shown("review_sentences", "language model", "film reviews", "GPT-2"),
    Shown("chinese_poems", "language model, Chinese", "400 old poems", "GPT-2"),
    Shown("dialogue", "dialogue", "1,449 conversations", "GPT-2"),
    Shown("package_descriptions", "summarisation", "Debian packages", "T5"),
    Shown("django_messages", "translation to Chinese", "783 messages of a framework", "T5"),
    Shown("fashion_mnist", "images", "2,000 + 1,000 images of clothes", "ViT, pretrained"),
    Shown("fashion_mnist_scratch", "images", "the same", "ViT"),
    Shown("fashion_mnist_dinov2", "images", "the same", "DINOv2"),
    Shown("clothes_collages", "images, several labels", "3,500 collages", "ViT"),
]
METRICS = {"f1": "F1", "f1_micro": "micro F1", "rougeL": "ROUGE-L", "bleu": "BLEU", "pearson": "Pearson"}


class FailedError(Exception):
    """A training that ended with an error; its message is the last line of its output."""


def train(recipe: str, settings: Sequence[str], threads: int) -> tuple[list[dict[str, Any]], Measured]:
    """Train a recipe in a process; return the rows of its metrics.jsonl, and what the process took.

    Raises FailedError if it ends with an error.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder, log = Path(scratch) / "run", Path(scratch) / "log"
        command = [sys.executable, "-m", "engine.train", recipe, *settings]
        command += ["--run.folder", str(folder), "--run.device", "cpu"]
        with log.open("w") as stream:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            start = time.perf_counter()
            process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)  # of this process and of those that it waited for
            seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise FailedError((log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1])
        rows = read_rows(folder / "metrics.jsonl")
    took = {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_mb": usage.ru_maxrss // 1024,
        "load": round(os.getloadavg()[0], 2),
    }
    return rows, took


def measure_after(cfg: Config, recipe: str, settings: Sequence[str], threads: int) -> Measured:
    """Train the recipe; return its metric, the steps it took, and what the process took."""
    rows, took = train(recipe, settings, threads)
    final = rows[-1]
    metric = next(key.removeprefix("best_") for key in final if key.startswith("best_") and key != "best_step")
    value = final.get(f"test_{metric}", final[f"best_{metric}"])
    return {"metric": metric, "after": value, "steps": final["step"]} | took


def measure_before(cfg: Config, recipe: str, settings: Sequence[str], threads: int) -> Measured:
    """Return the number that the trained model is compared with, and in words what it is."""
    if cfg.model.init == "pretrained":
        scratch = measure_after(cfg, recipe, ["--model.init", "scratch", *settings], threads)
        return {"before": scratch["after"], "before_is": RANDOM_WEIGHTS, "before_cpu_seconds": scratch["cpu_seconds"]}
    if cfg.run.task in CLASSIFICATION:
        return {"before": share_of_largest_class(cfg), "before_is": LARGEST_CLASS}
    held_out = ["--data.validation", cfg.data.test, "--data.test", ""] if cfg.data.test else []
    shortest = ["--eval.at_start", "true", "--train.max_steps", "1"]
    rows, _ = train(recipe, [*settings, *held_out, *shortest], threads)
    metric = next(key.removeprefix("best_") for key in rows[-1] if key.startswith("best_") and key != "best_step")
    at_start = next(row["evaluation"] for row in rows if row["step"] == 0)
    return {"before": at_start[metric], "before_is": UNTRAINED}


def share_of_largest_class(cfg: Config) -> float:
    """Return the accuracy of a model that always answers with the most frequent label of the examples of `after`."""
    task, _ = open_task(cfg)
    settings = task_settings(cfg, task)
    _, validation_rows, test_rows, *_ = read_training_data(task, settings, cfg.run.seed)
    counts = Counter(str(row.values[settings.data.label_column]) for row in test_rows or validation_rows)
    return max(counts.values()) / counts.total()


PARTS: dict[str, Callable[[Config, str, Sequence[str], int], Measured]] = {
    "after": measure_after,
    "before": measure_before,
}


def missing_file(cfg: Config) -> str:
    """Return a file or folder under datasets/ that the recipe reads and that is not there, or ""."""
    paths = (cfg.model.name, cfg.data.train, cfg.data.validation, cfg.data.test)
    return next((path for path in paths if path.startswith("datasets/") and not Path(path).exists()), "")


def measure(recipe: str, part: str, known: Measured, settings: Sequence[str], seed: int, threads: int) -> Measured:
    """Return the row of a recipe with a part ("after" or "before"), measured unless `known` has it; else `known`."""
    cfg = read_recipe(recipe)
    if path := missing_file(cfg):
        print(f"{recipe}: left out, {path} is missing: python -m benchmarks.prepare {recipe}", flush=True)
        return known
    now = record.describe("tasks", [])
    of_now = {
        "commit": now["commit"],
        "changed": now["changed"],
        "torch": now["versions"]["torch"],
        "seed": seed,
        "threads": threads,
    }
    row = {"recipe": recipe, "task": cfg.run.task} | of_now
    if all(known.get(key) == value for key, value in of_now.items()):
        row = known
    if part in row or (part == "before" and "after" not in row):
        return row if "after" in row else known
    try:
        row = row | PARTS[part](cfg, recipe, ["--run.seed", str(seed), *settings], threads)
    except (FailedError, ConfigError) as error:
        print(f"{recipe}: {part} failed: {error}", flush=True)
        return known
    print(f"{recipe}: {part} {row[part]:.4g}, {row['cpu_seconds']} CPU s", flush=True)
    return row


def shown_number(metric: str, value: float) -> str:
    """Return a metric as the table shows it: a perplexity of at least 100 without decimals, a share with three."""
    if metric in ("perplexity", "bleu"):
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:.3f}"


def numbers(row: Measured) -> tuple[str, str, str]:
    """Return the last three cells of a row of the table: before, after, CPU seconds."""
    before = shown_number(row["metric"], row["before"]) if "before" in row else ""
    mark = " (2)" if row.get("before_is") == LARGEST_CLASS else ""
    return before + mark, shown_number(row["metric"], row["after"]), f"{row['cpu_seconds']:.0f}"


def table(rows: Sequence[Measured]) -> list[str]:
    """Return the lines of the Markdown table of the recipes that were measured."""
    known = {row["recipe"]: row for row in rows if "after" in row}
    lines = ["| task | recipe | data | model | metric | before | after | CPU s |", "|" + "---|" * 8]
    for shown in TABLE:
        if shown.recipe in known:
            row = known[shown.recipe]
            mark = " (3)" if row["task"] == "translation" else " (1)" if shown.recipe in PREPARED else ""
            metric = METRICS.get(row["metric"]) or str(row["metric"])
            cells = (shown.task, f"`{shown.recipe}`{mark}", shown.data, shown.model, metric, *numbers(row))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def differences(page: str, rows: Sequence[Measured]) -> list[str]:
    """Return the rows of a page's task table, in any language, whose last three cells are not those of `rows`.

    page: the text of a Markdown file. A row of the table has a recipe's name in backticks in its second cell.
    """
    wanted = {row["recipe"]: numbers(row) for row in rows if "after" in row}
    found: dict[str, tuple[str, ...]] = {}
    for line in page.splitlines():
        if match := re.match(r"\|[^|]+\| `(\w+)`[^|]*\|.+\|$", line):
            found[match[1]] = tuple(cell.strip() for cell in line.split("|")[-4:-1])
    listed = {name: cells for name, cells in found.items() if name in {shown.recipe for shown in TABLE}}
    return [
        f"{name}: the page has {', '.join(listed.get(name, ('no row',)))}; measured {', '.join(cells)}"
        for name, cells in wanted.items()
        if listed.get(name) != cells
    ]


def main(argv: Sequence[str]) -> int:
    """Measure, write the record, and print the table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [shown.recipe for shown in TABLE]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="these recipes only")
    parser.add_argument("--seed", type=int, default=0, help="run.seed of every training")
    parser.add_argument("--threads", type=int, default=1, help="of every training")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="the record; results/tasks.json")
    parser.add_argument("--print", action="store_true", help="print the table of the record and train nothing")
    arguments, settings = parser.parse_known_args(argv)
    if strange := [word for word in settings if word.startswith("-") and "." not in word]:
        parser.error(f"unknown option {strange[0]}")
    if settings and arguments.output == OUTPUT:
        parser.error(
            f"{shlex.join(settings)} changes the recipes, whose results are not those of {OUTPUT.name}: "
            "add --output FILE"
        )
    rows = {row["recipe"]: row for row in record.read(arguments.output)["results"]} if arguments.output.exists() else {}

    for part, name in [] if arguments.print else [(part, name) for part in PARTS for name in arguments.only]:
        if row := measure(name, part, rows.get(name, {}), settings, arguments.seed, arguments.threads):
            rows[name] = row
            in_order = [rows[name] for name in names if name in rows]
            record.save(arguments.output, record.describe("tasks", in_order, list(argv)))
    print("\n".join(table(list(rows.values()))))
    commits = Counter(row["commit"][:7] for row in rows.values())
    print("commits:", ", ".join(f"{commit} ({count} recipes)" for commit, count in commits.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
