"""F17, F18: two runs in one folder; a recipe, data or a tokenizer that changed before a resume."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

from support.runs import write_reviews

from faults.runs import Bench, Result, Run

SETTINGS: dict[str, object] = {"train.max_steps": 10, "eval.every_steps": 5}
CHANGES: dict[str, str] = {
    "optim.lr": "0.002",
    "optim.weight_decay": "0.2",
    "optim.warmup_steps": "3",
    "train.global_batch_size": "8",
    "train.max_steps": "14",
    "train.max_grad_norm": "0.5",
    "data.max_length": "24",
    "data.validation_fraction": "0.2",
    "regularize.label_smoothing": "0.1",
    "regularize.ema_decay": "0.9",
    "model.dropout.all": "0.3",
    "model.pooling": "mean",  # refused for good, since the head was trained on the other one
    "run.seed": "5",
    "eval.patience": "3",
}


def share(count: int, seed: int, folder: Path) -> Result:
    """F17: start two runs on one folder at nearly the same time; kill one and start another at once."""
    bench, rng, result = Bench(folder), random.Random(seed), Result()
    for _ in range(count):
        run = bench.run(SETTINGS)
        other = Run.__new__(Run)
        other.__dict__.update(run.__dict__, logs=run.logs / "other")
        other.logs.mkdir()
        first = run.start()
        time.sleep(rng.choice((0.0, rng.uniform(0, 0.5))))
        second = other.start()
        ended = [first.wait(), second.wait()]
        result.add(check_two(run, bench, ended), "two at a time")
        run.remove()
    for _ in range(count):
        run = bench.run(SETTINGS)
        started = run.start()
        time.sleep(rng.uniform(0.1, 0.8))
        started.send(signal.SIGKILL)
        ended = run.finish()  # without waiting for the death
        if "in use by another run" in ended.err:
            ended = run.finish()
        result.add(run.differs_from(bench.uninterrupted(SETTINGS)) if ended.code == 0 else ended.tail(), "stale lock")
        run.remove()
    return result


def check_two(run: Run, bench: Bench, ended: list) -> str:  # type: ignore[type-arg]
    """Return what was wrong with two runs on one folder; the loser may come when the winner is done."""
    refused = [each for each in ended if each.code != 0]
    if len(refused) == 2:
        return f"none ran: {ended[0].tail()} and {ended[1].tail()}"
    for each in refused:
        if not each.has_sentence() or "is in use by another run" not in each.err:
            return f"ended otherwise: {each.tail()}"
    return run.differs_from(bench.uninterrupted(SETTINGS))


def alter(count: int, seed: int, folder: Path) -> Result:
    """F18: change `count` settings, the data, or the tokenizer of an interrupted run, then resume it."""
    bench, rng, result = Bench(folder), random.Random(seed), Result()
    begun = interrupt(bench, SETTINGS)
    names = list(CHANGES)
    for i in range(count):
        name = names[i % len(names)] if count >= len(names) else rng.choice(names)
        option = f"--{name}={CHANGES[name]}"
        result.add(refuse_then_allow(copy(begun), [option], f"{name}: "), "settings")
    for i in range(max(1, count // 4)):
        result.add(change_data(bench, i + seed), "data")
        result.add(change_tokenizer(bench, folder / f"tokenizer{i}", rng), "tokenizer")
    return result


def interrupt(bench: Bench, settings: dict[str, object]) -> Run:
    """Return a run with a checkpoint that a signal stopped."""
    run = bench.run(settings)
    started = run.start()
    started.wait_for(lambda: run.step() >= 5)
    started.send(signal.SIGTERM)
    started.wait()
    if run.step() < 5:
        raise RuntimeError("the run was not stopped after its first checkpoint")
    return run


def copy(begun: Run) -> Run:
    run = begun.bench.run(SETTINGS)
    shutil.copytree(begun.folder, run.folder)
    return run


def refuse_then_allow(run: Run, options: list[str], named: str) -> str:
    """Resume with a change, which is refused by name, then with run.allow_changes; return what went wrong."""
    before = contents(run)
    refused = run.finish(*options)
    if not refused.has_sentence() or named not in refused.err:
        return f"{named} was not refused: {refused.tail()}"
    if before != contents(run):
        return f"{named} the refusal changed the run folder"
    allowed = run.finish(*options, "--run.allow_changes")
    if named == "model.pooling: ":
        return "" if allowed.has_sentence() and "--model.head_init reset" in allowed.err else allowed.tail()
    problem = "" if allowed.code == 0 else f"{named} was not allowed: {allowed.tail()}"
    problem = problem or ("" if named in allowed.out else f"{named} was not said")
    run.remove()
    return problem


def contents(run: Run) -> dict[Path, bytes]:
    """Return every file of a run folder except the lock, which is empty."""
    return {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file() and path.name != ".lock"}


def change_data(bench: Bench, seed: int) -> str:
    """Interrupt a run, change one row of its data, and resume."""
    file = write_reviews(bench.folder / f"changed{seed}.jsonl", 120)
    run = interrupt(bench, SETTINGS | {"data.train": str(file)})
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    row = rows[random.Random(seed).randrange(len(rows))]
    row["text"] += " plot"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return refuse_then_allow(run, [], "the encoded training or validation data is not the same")


def change_tokenizer(bench: Bench, folder: Path, rng: random.Random) -> str:
    """Interrupt a run, swap two words of its tokenizer, and resume."""
    shutil.copytree(bench.model, folder)
    run = interrupt(bench, SETTINGS | {"model.name": str(folder)})
    for path in (folder, *run.folder.glob("*/")):
        file = path / "tokenizer.json"
        if path == folder:
            tokenizer = json.loads(file.read_text())
            words = tokenizer["model"]["vocab"]
            one, two = rng.sample([word for word in words if word.isalpha()], 2)
            words[one], words[two] = words[two], words[one]
            file.write_text(json.dumps(tokenizer))
    # The checkpoint has its own tokenizer, verified by its manifest; a run resumes from that one.
    ended = run.finish()
    if ended.code == 0:
        return run.differs_from(bench.uninterrupted(SETTINGS))
    return "" if ended.has_sentence() else f"ended otherwise: {ended.tail()}"
