"""Training from 100 million prepared examples: in the memory and with the open files of a run on a thousandth."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from support.cases import settings_for

from engine import config as configs
from engine import prepare
from engine.config import Config

ROOT = Path(__file__).parents[2]
ROWS = 65_536  # of the one shard, which the manifest of the large folder has again and again
RUN = """
    import resource
    import sys
    from pathlib import Path

    from engine import train

    resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))  # fewer open files than shards
    train.main(sys.argv[1:])
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    print(peak)
"""


def run(*settings: str) -> int:
    """Train in a process of its own; return its peak memory in KiB."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RUN), *settings], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_hundred_million_examples_take_the_memory_of_few(tmp_path):
    rows = [{"text": f"the cat saw a house {i % 97}", "label": ["no", "yes"][i % 2]} for i in range(ROWS)]
    validation = tmp_path / "validation.jsonl"
    validation.write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    settings = settings_for(
        "text-classification", tmp_path, rows, data__validation=str(validation), eval__train_subset_size=5
    )
    small = tmp_path / "small"
    manifest = prepare.prepare(configs.override(Config(), settings), small, 1)
    assert manifest.num_rows == ROWS
    large, values = tmp_path / "large", json.loads((small / "manifest.json").read_text())
    large.mkdir()
    for entry in values["shards"]:
        for name in entry["files"]:
            (large / name).hardlink_to(small / name)
    (large / "sample.jsonl").hardlink_to(small / "sample.jsonl")
    times = -(-(10**8) // ROWS)
    values |= {"shards": values["shards"] * times, "num_rows": ROWS * times}
    for name in ("label_counts", "length_counts"):
        values[name] = (np.array(values[name]) * times).tolist()
    (large / "manifest.json").write_text(json.dumps(values))
    more = {
        "train.max_steps": 20,
        "log.every_steps": 1,
        "train.micro_batch_size": "auto",
        "train.global_batch_size": 64,
    }
    found = []
    for folder in (small, large):
        own = {"data.train": str(folder), "run.folder": str(tmp_path / f"run-{folder.name}")}
        found.append(run(*(f"--{key}={value}" for key, value in (settings | more | own).items())))
    logged = (tmp_path / "run-large/metrics.jsonl").read_text().splitlines()
    assert len([line for line in logged if '"loss"' in line]) >= 20
    assert found[1] - found[0] < 300_000  # KiB: mapped pages; one array of all examples would have 800 MB
