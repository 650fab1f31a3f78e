"""F12: 200 bad images among good ones: refused with reasons, or left out and counted, the same at a resume."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

from support.pictures import COLOURS, bad_images, picture, write
from support.task_data import write as write_task

from faults.runs import Bench, Ended, Result, Run

SETTINGS: dict[str, object] = {"train.max_steps": 8, "eval.every_steps": 4, "train.global_batch_size": 8}
MEMORY = 400  # MiB that bad images may take more than good ones


def run(count: int, seed: int, folder: Path) -> Result:
    """Train on folders of good images, each time with `count` more bad ones."""
    bench, result = ImageBench(folder), Result()
    good = write_folder(folder / "good", 0)
    bad = write_folder(folder / "bad", count)
    names = sorted(
        path.relative_to(bad).as_posix() for path in bad.rglob("*") if "good" not in path.name and path.is_file()
    )
    plain = bench.run(SETTINGS | {"data.train": str(good)})
    if plain.finish().code != 0:
        raise RuntimeError(f"the run without bad images failed: {plain.finish().tail()}")
    refused = bench.run(SETTINGS | {"data.train": str(bad)}).finish()
    for name in names:
        result.add(check_refused(refused, name, len(names)), "refused")
    skip = SETTINGS | {"data.train": str(bad), "data.bad_rows": "skip"}
    through, resumed = bench.run(skip), bench.run(skip)
    ended = through.finish()
    result.add(check_left_out(ended, len(names)), f"{len(names)} bad images left out")
    result.add(through.differs_from(plain_of(bench, bad, folder)), "as if they were not there")
    started = resumed.start()
    started.wait_for(lambda: "\nstep " in started.printed())
    started.send(signal.SIGKILL)
    started.wait()
    again = resumed.finish()
    result.add(resumed.differs_from(through) if again.code == 0 else again.tail(), "killed and resumed")
    more = peak(through) - peak(plain)
    result.add(f"{more} MiB more memory" if more > MEMORY else None, "memory bounded")
    return result


class ImageBench(Bench):
    """Runs of a tiny ViT."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        settings = write_task("image-classification", folder / "task")
        self.settings = {key: value for key, value in settings.items() if key != "data.train"}

    def run(self, settings: dict[str, object]) -> Run:
        text_only = {"model.pooling": "", "data.text_column": "", "data.label_column": ""}
        return super().run(self.settings | text_only | settings)


def write_folder(root: Path, bad: int) -> Path:
    """Write 12 good images of each colour, and `bad` bad ones among them."""
    for name, colour in COLOURS.items():
        for i in range(12):
            write(root / name / f"good-{i}.png", picture(colour, (10, 10), seed=i))
    for i, path in enumerate(sorted(bad_images(root)) if bad else ()):
        target = root / list(COLOURS)[i % 3] / Path(path).name
        (root / path).rename(target)
        if i >= bad:
            target.unlink()
    for name in ("a", "b"):
        if (root / name).is_dir():
            (root / name).rmdir()
    return root


def plain_of(bench: Bench, bad: Path, folder: Path) -> Run:
    """Return a run on the good images of a folder alone, in the folder's place, so that the ids are the same."""
    for path in bad.rglob("*"):
        if path.is_file() and "good" not in path.name:
            path.rename(folder / f"away-{path.parent.name}-{path.name}")
    run = bench.run(SETTINGS | {"data.train": str(bad), "data.bad_rows": "skip"})
    run.finish()
    for path in folder.glob("away-*"):
        _, label, name = path.name.split("-", 2)
        path.rename(bad / label / name)
    return run


def check_refused(ended: Ended, name: str, count: int) -> str:
    """Return what was wrong with the refusal, which shows the first ones of each reason and counts the rest."""
    if not ended.has_sentence():
        return f"ended otherwise: {ended.tail()}"
    more = re.search(r"and ([\d,]+) more", ended.err)
    shown = len(re.findall(r"^(?:error: )?\S*bad: ", ended.err, re.MULTILINE))
    if shown + (int(more[1].replace(",", "")) if more else 0) != count:
        return f"{shown} shown and {more and more[1]} more are not {count}"
    return ""


def check_left_out(ended: Ended, count: int) -> str:
    if ended.code != 0:
        return f"ended: {ended.tail()}"
    return "" if f"{count} of {count + 36} rows left out" in ended.out else "the number was not said"


def peak(run: Run) -> int:
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return max(int(row.get("peak_memory_mb", 0)) for row in rows)
