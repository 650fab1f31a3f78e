"""F20: the same command three times, in three new processes, gives the same files, byte for byte."""

from __future__ import annotations

import json
import random
from pathlib import Path

from support.runs import logged_rows, run_module

from faults.runs import Bench, Result

VARIANTS: tuple[dict[str, object], ...] = (
    {},
    {"data.num_workers": 2},
    {"train.micro_batch_size": 3},
    {"train.precision": "bf16"},
    {"regularize.ema_decay": 0.9, "regularize.r_drop_weight": 0.5},
    {"model.lora.rank": 4},
)
SETTINGS: dict[str, object] = {"train.max_steps": 10, "eval.every_steps": 5}


def run(count: int, seed: int, folder: Path) -> Result:
    """Run `count` variants of a recipe three times, the first of them also on two ranks."""
    bench, result = Bench(folder), Result()
    chosen = list(VARIANTS[1:])
    random.Random(seed).shuffle(chosen)
    cases = [(VARIANTS[0], 1), *([(VARIANTS[0], 2)] if count > 1 else []), *((v, 1) for v in chosen)]
    for variant, ranks in cases[:count]:
        runs = [bench.run(SETTINGS | variant) for _ in range(3)]
        codes = [run_module("engine.train", run.recipe, ranks=ranks).returncode for run in runs]
        problem = "" if set(codes) == {0} else f"exit codes {codes}"
        contents = [read(run.folder) for run in runs] if not problem else []
        for i, content in enumerate(contents[1:], 2):
            differing = [name for name in contents[0] if content.get(name) != contents[0][name]]
            problem = problem or (f"run {i} differs in {differing}" if differing else "")
        result.add(problem, f"{json.dumps(variant)}, {ranks} rank{'s' * (ranks > 1)}")
    return result


def read(folder: Path) -> dict[str, object]:
    """Return the content of a run folder without what depends on the machine or on the name of the folder."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found: dict[str, object] = {"metrics.jsonl": logged_rows(folder)}
    for name, path in files.items():
        if Path(name).name not in ("metrics.jsonl", "recipe.toml", "manifest.json", "report.html"):
            found[name] = path.read_bytes().replace(folder.name.encode(), b"RUN")  # the model card names the run
    return found
