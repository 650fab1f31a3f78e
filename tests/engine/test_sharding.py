"""fsdp and hsdp train as one process does. One launch of torchrun trains all cases of a world size and strategy."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import zoo
from support.runs import CPU, run_module
from support.sharded import CASES, LAST, REFUSED, settings_of_case, train_case

import models
from engine import config, sharding
from engine.config import ConfigError
from engine.distributed import Ranks
from engine.sharding import plan_sharding
from engine.state import HIGHER_IS_BETTER

# Relative. In bf16 and fp16 the sums of several micro-batches are in another order than under DDP: a number that is
# then rounded to the next one changes a loss by 1e-4 some steps later. FGM divides by a small norm.
TOLERANCE, OF_NORMS, ROUNDED = 2e-6, 1e-5, 1e-2
OF_METRICS = 0.1  # in 16 bits, absolute: rounding may swap two examples of the validation data
SAMPLE = ("accumulation", "bf16 GPT-2", "average", "SGD", "sentence embedding", "NaN is skipped")
LAUNCHES = {  # name: (ranks, strategy, cases)
    "sample": (2, "fsdp", SAMPLE),
    "fsdp 2": (2, "fsdp", tuple(CASES)),
    "fsdp 3": (3, "fsdp", tuple(random.Random(3).sample([*CASES], 30))),
    "hsdp 2x2": (4, "hsdp", tuple(random.Random(4).sample([*CASES], 20))),
    "fsdp 3, all": (3, "fsdp", tuple(CASES)),
    "fsdp 4, all": (4, "fsdp", tuple(CASES)),
    "hsdp 2x2, all": (4, "hsdp", tuple(CASES)),
}
MARKS = {name: [pytest.mark.long if name.endswith("all") else pytest.mark.slow] for name in LAUNCHES} | {"sample": []}


class Launch:
    """All cases of one world size and strategy, trained on these ranks; each `beside` is trained when asked for."""

    def __init__(self, folder: Path, ranks: int, strategy: str, names: tuple[str, ...]):
        self.folder, self.ranks, self.strategy, self.names = folder, ranks, strategy, names
        last = [*REFUSED, *LAST]
        order = []
        for name in (*names, *last):
            case = (CASES | REFUSED | LAST)[name]
            settings_of_case(case, folder)  # its files, which the ranks would write at the same time
            order += [(name, "ddp")] * (case.beside == "ddp") + [(name, strategy)]
        (folder / "cases.json").write_text(json.dumps(order))
        self.error = self.start()

    def start(self) -> str:
        """Run the cases; return what the ranks print to stderr. hsdp: two launches, as of two machines."""
        if self.strategy != "hsdp":
            done = run_module("support.sharded", self.folder, ranks=self.ranks, timeout=600, is_new=True)
            assert done.returncode != 0  # the last case ends it
            return done.stderr
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={self.ranks // 2}"]
        launcher += ["--master-addr=127.0.0.1", f"--master-port={port}"]
        root = Path(models.__file__).parent.parent
        path = f"{root}{os.pathsep}{root / 'tests'}"
        processes = [
            subprocess.Popen(
                [*launcher, f"--node-rank={node}", "-m", "support.sharded", str(self.folder)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
            for node in range(2)
        ]
        return "".join(process.communicate(timeout=600)[1] for process in processes)

    def read(self, name: str, strategy: str, rank: int = 0) -> dict:
        """Return the result of a case, with the weights."""
        run = self.folder / f"{name}.{strategy}"
        file = Path(f"{run}.{rank}.json")
        assert file.is_file(), self.error[-3000:]
        return json.loads(file.read_text()) | {"weights": load_file(f"{run}.safetensors")}

    def read_beside(self, name: str) -> dict:
        """Return the result of the same case on one process, or under DDP."""
        case = CASES[name]
        if case.beside == "ddp":
            return self.read(name, "ddp")
        cfg = settings_of_case(case, self.folder)
        return train_case(case, config.override(cfg, {"run.folder": str(self.folder / f"{name}.one")}), CPU)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Return launched(name of LAUNCHES), which launches it once."""
    return functools.cache(lambda name: Launch(tmp_path_factory.mktemp("sharded"), *LAUNCHES[name]))


@pytest.fixture(params=[pytest.param(name, marks=marks) for name, marks in MARKS.items()])
def launch(request, launched):
    return launched(request.param)


def kind_of(key: str) -> str:
    """Return what a number of a log is: the norm of a gradient, a metric that counts or ranks, or another one."""
    return "norm" if key == "grad_norm" else "metric" if key in HIGHER_IS_BETTER else "other"


def numbers(rows: list[dict], kind: str) -> list[float]:
    """Return all numbers of a log that are of a kind, with those of its evaluations."""
    found = []
    for row in rows:
        for key, value in sorted(row.items()):
            found += numbers([value], kind) if isinstance(value, dict) else []
            wanted = kind_of(key.removeprefix("best_")) == kind and "threshold" not in key
            found += [float(value)] if isinstance(value, int | float) and wanted else []
    return found


@pytest.mark.parametrize(
    ("key", "name"),
    [pytest.param(key, name, marks=MARKS[key]) for key, (*_, names) in LAUNCHES.items() for name in names],
)
def test_p17_sharded_run_equals_the_whole(launched, key, name):
    """Losses, gradient norms, penalties and metrics of every step, what is said, and the weights at the end."""
    launch = launched(key)
    ours, theirs = launch.read(name, launch.strategy), launch.read_beside(name)
    precision = CASES[name].changes.get("train.precision", "fp32")
    limit, weight_limit = (TOLERANCE, 1e-6) if precision == "fp32" else (ROUNDED, 1e-4)
    limits = {"norm": max(limit, OF_NORMS), "metric": limit, "other": OF_NORMS if "FGM" in name else limit}
    assert ours["error"] == theirs["error"]
    assert ours["said"] == theirs["said"]
    has_fault = CASES[name].patch in ("bad example", "bad gradient", "overflow")
    assert bool(ours["error"] or ours["said"]) == has_fault or precision == "fp16"  # which looks for its scale
    assert ours["rows"] or ours["error"]
    for kind, rel in limits.items():
        found, expected = (numbers(run["rows"], kind) for run in (ours, theirs))
        least = 1e-7 if kind != "metric" else 2e-6 if precision == "fp32" else OF_METRICS  # correlations amplify
        assert found == pytest.approx(expected, rel=rel, abs=least, nan_ok=True)
    assert ours["weights"].keys() == theirs["weights"].keys()
    for key, weight in theirs["weights"].items():
        torch.testing.assert_close(ours["weights"][key], weight, rtol=0, atol=weight_limit, msg=key)


def test_sharded_step_in_bf16_is_that_of_ddp(launch):
    """Before rounding has any effect: the first loss and gradient norm."""
    names = [name for name in launch.names if CASES[name].changes.get("train.precision") == "bf16"]
    assert names
    for name in names:
        ours, theirs = (launch.read(name, strategy)["rows"][0] for strategy in (launch.strategy, "ddp"))
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)


def test_all_ranks_skip_the_same_steps(launch):
    for name in launch.names:
        said = [launch.read(name, launch.strategy, rank)["said"] for rank in range(launch.ranks)]
        assert said == [said[0]] * launch.ranks


def test_parameter_beside_a_sharded_model_is_refused(launch):
    """Nothing would sum its gradient over the ranks."""
    for rank in range(launch.ranks):
        error = launch.read("own module", launch.strategy, rank)["error"]
        assert "scale" in error
        assert "distributed.strategy = ddp" in error


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_optimizer_that_needs_whole_weights_is_refused(launch, name):
    for rank in range(launch.ranks):
        error = launch.read(name, launch.strategy, rank)["error"]
        assert error.startswith(f"optim.name = '{name}' needs each weight as a whole, and a rank has a part of it")


def test_out_of_memory_ends_sharded_ranks_with_a_sentence(launch):
    assert "ran out of memory while the ranks exchanged their layers" in launch.error
    assert "resume from the last checkpoint with --resume" in launch.error
    assert "Error: " not in re.sub(r"ChildFailedError", "", launch.error).replace("error: ", "")
    assert not list(launch.folder.glob("out of memory.*.json"))


# Refused before the model is loaded


def test_older_torch_is_refused_for_sharding(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    for strategy in ("fsdp", "hsdp"):
        with pytest.raises(ConfigError, match=rf"{strategy} needs torch 2.9 or newer, and this is torch 2.8.1"):
            plan_sharding(strategy, "fp32", False, Ranks(0, 2, torch.device("cpu")))
    assert plan_sharding("ddp", "fp32", False, Ranks(0, 2, torch.device("cpu"))) is None
    assert plan_sharding("fsdp", "fp32", False, CPU) is None


def test_machines_with_other_numbers_of_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(sharding, "all_gather", lambda value: [4, 4, 4, 4, 2, 2])
    with pytest.raises(ConfigError, match="the same number of ranks on each machine, and they have 2 to 4"):
        plan_sharding("hsdp", "fp32", False, Ranks(0, 6, torch.device("cpu")))


@pytest.mark.parametrize("of_machine", [0, 2, 6])
def test_numbers_of_ranks_that_do_not_divide_are_refused(of_machine, monkeypatch):
    monkeypatch.setattr(sharding, "all_gather", lambda value: [of_machine] * 3)
    with pytest.raises(ConfigError, match=f"LOCAL_WORLD_SIZE = {of_machine} on each machine, which should divide "):
        plan_sharding("hsdp", "fp32", False, Ranks(0, 3, torch.device("cpu")))


def test_cases_name_every_architecture():
    assert {case.data[1] for case in CASES.values() if case.data} == {*zoo.ZOO}
    assert {*SAMPLE} <= {*CASES}
