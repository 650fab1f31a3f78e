"""What happens to a run on two machines: a cut cable, a machine that dies or leaves, and one that comes back."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from faults.ranks import compare_losses
from faults.runs import Bench, Result, prepare_ranks
from safetensors.torch import load_file, save_file
from support.runs import write_reviews

import models
from machines.network import Network, missing
from machines.pairs import DEADLINE, Pair

TIMEOUT = 8  # distributed.timeout_seconds
SLACK = 6.0  # seconds: a beat of each rank that notices, two for the other machine to read why, a busy machine
STEPS = 24
SETTINGS: dict[str, object] = {"train.max_steps": STEPS, "eval.every_steps": 4, "distributed.timeout_seconds": TIMEOUT}
NO_DROPOUT: dict[str, object] = {"model.dropout.all": 0.0, "optim.lr": 1e-4}
RESTARTS = ("--max-restarts", "3")
Scenario = Callable[[Bench, Network, random.Random, Result], str]


def through(bench: Bench, network: Network, rng: random.Random, result: Result) -> str:
    """Train on two machines that nothing happens to."""
    attempt = Attempt(bench, network, SETTINGS)
    with attempt as pair:
        pair.start_both("engine.train")
        return attempt.check_end("a", "b")


def short_cut(bench: Bench, network: Network, rng: random.Random, result: Result) -> str:
    """Cut the cable for less than distributed.timeout_seconds: nothing may come of it."""
    attempt = Attempt(bench, network, SETTINGS)
    with attempt as pair:
        pair.start_both()
        attempt.unplug(rng)
        time.sleep(rng.uniform(0.3, TIMEOUT / 4))
        network.plug()
        return attempt.check_end("a", "b") or (f"ended by {pair.errors('a')}" if pair.errors("a") else "")


def cut(bench: Bench, network: Network, rng: random.Random, result: Result) -> str:
    """Cut the cable until all ranks have ended, and some seconds more; torchrun restarts them."""
    attempt = Attempt(bench, network, SETTINGS, options=RESTARTS)
    with attempt as pair:
        pair.start_both()
        attempt.unplug(rng)
        problem = attempt.check_ranks(result) or attempt.check_sentences()
        time.sleep(rng.uniform(0.0, 15.0))
        network.plug()
        return problem or attempt.check_end("a", "b")


def no_restart(bench: Bench, network: Network, rng: random.Random, result: Result) -> str:
    """Cut the cable until all ranks have ended, without --max-restarts; then start both torchruns anew."""
    attempt = Attempt(bench, network, SETTINGS)
    with attempt as pair:
        pair.start_both()
        attempt.unplug(rng)
        problem = attempt.check_ranks(result) or attempt.check_sentences()
        network.plug()  # torchrun itself waits for it
        codes = pair.wait()
        if None in codes.values() or 0 in codes.values():
            return problem or f"torchrun ended with {codes}"
        pair.start_both()
        return problem or attempt.check_end("a", "b")


def death_of_rank(bench: Bench, network: Network, rng: random.Random, result: Result) -> str:
    """Kill a rank; torchrun restarts both, though the machines count their restarts differently."""
    attempt = Attempt(bench, network, SETTINGS, options=RESTARTS)
    with attempt as pair:
        pair.start_both()
        pair.wait_for(lambda: pair.is_past(rng.randrange(2, STEPS - 4)))
        attempt.kill_rank(rng.randrange(2))
        return attempt.check_end("a", "b")


def leave(bench: Bench, network: Network, rng: random.Random, result: Result) -> str:
    """Let a machine of --nnodes 1:2 die or leave; the other one goes on alone."""
    attempt = Attempt(bench, network, SETTINGS | NO_DROPOUT, nodes="1:2", options=RESTARTS)
    with attempt as pair:
        pair.start_both()
        pair.wait_for(lambda: pair.is_past(rng.randrange(2, STEPS - 8)))
        attempt.part(rng.choice(("dies", "leaves")), result)
        return attempt.check_end("a", is_same=False, result=result)


def come_back(bench: Bench, network: Network, rng: random.Random, result: Result) -> str:
    """Let a machine of --nnodes 1:2 die or leave, and come back while the other one trains alone."""
    settings = SETTINGS | NO_DROPOUT | {"train.max_steps": 150, "eval.every_steps": 10}
    attempt = Attempt(bench, network, settings, nodes="1:2", options=RESTARTS)
    with attempt as pair:
        pair.start_both()
        pair.wait_for(lambda: pair.is_past(12))
        attempt.part(rng.choice(("dies", "leaves")), result)
        if not pair.wait_for(lambda: "= 1 rank" in pair.screen("a") or pair.screen("a").count("\noutput ") > 1, 60):
            return f"did not go on alone: {pair.screen('a')[-300:]}"
        time.sleep(rng.uniform(1.0, 3.0))
        pair.start("b")
        problem = attempt.check_end("a", "b", is_same=False, result=result)
        if not problem and pair.screen("a").count("step = 2 ranks") < 2:
            return "the machine that came back was not used"
        return problem


def bad_input(bench: Bench, network: Network, rng: random.Random, result: Result) -> str:
    """Give machine b another input than machine a: both end before the first step, with one sentence."""
    name, (make, expected) = [*BAD_INPUTS.items()][result.tries % len(BAD_INPUTS)]
    result.note(name)
    attempt = Attempt(bench, network, SETTINGS)
    with attempt as pair:
        settings, environment = make(bench.folder)
        pair.start("a", module="engine.train", **(environment if name == "another network" else {}))
        pair.start("b", *settings, module="engine.train", **environment)
        codes = pair.wait(seconds=120.0)
        if None in codes.values() or 0 in codes.values():
            return f"{name}: torchrun ended with {codes}"
        for machine in "a", "b":
            errors = pair.errors(machine)
            if len(errors) != 1 or not re.search(expected, errors[0]) or "step      1" in pair.screen(machine):
                return f"{name}: machine {machine} printed {errors or pair.screen(machine)[-600:]}"
            if machine == "a" and "rank 1 (machine machine-b" not in errors[0] and name != "another network":
                return f"{name}: machine {machine} did not name b: {errors}"
    return ""


Given = tuple[tuple[str, ...], dict[str, str]]  # settings, environment variables


def other_data(folder: Path) -> Given:
    return ("--data.train", str(write_reviews(folder / "other.jsonl", 120, seed=1))), {}


def other_weights(folder: Path) -> Given:
    shutil.copytree(folder / "model", folder / "other model", dirs_exist_ok=True)
    tensors = load_file(folder / "model" / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, folder / "other model" / "model.safetensors")
    return ("--model.name", str(folder / "other model")), {}


def other_source(folder: Path) -> Given:
    """Copy the engine's source, with a comment more."""
    root, copy = Path(models.__file__).parent.parent, folder / "other source"
    for file in [file for package in ("engine", "models", "data") for file in (root / package).rglob("*")]:
        if file.suffix in (".py", ".toml"):
            (copy / file.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy / file.relative_to(root))
    with (copy / "engine" / "ema.py").open("a") as stream:
        stream.write("# another version\n")
    return (), {"PYTHONPATH": str(copy)}


BAD_INPUTS: dict[str, tuple[Callable[[Path], Given], str]] = {
    "other learning rate": (lambda folder: (("--optim.lr", "0.5"), {}), "has optim.lr = 0.5, and rank 0 .machine mach"),
    "other data": (other_data, "the checksum of the data"),
    "other weights": (other_weights, "the checksum of the pretrained checkpoint"),
    "other source": (other_source, "the checksum of the engine's source"),
    "missing data file": (lambda folder: (("--data.train", "missing.jsonl"), {}), "missing.jsonl"),
    "unknown setting": (lambda folder: (("--optim.speed", "1"), {}), "optim.speed"),
    "own run folder": (
        lambda folder: (("--run.folder", str(folder / "own")), {}),
        "is not the folder of rank 0",
    ),
    "another network": (lambda folder: ((), {"GLOO_SOCKET_IFNAME": "lo"}), "GLOO_SOCKET_IFNAME"),
}


class Attempt:
    """A run on two machines, as a context that leaves nothing of it."""

    def __init__(
        self,
        bench: Bench,
        network: Network,
        settings: dict[str, object],
        nodes: str = "2",
        options: tuple[str, ...] = (),
    ):
        self.bench, self.network, self.settings, self.run = bench, network, settings, bench.run(settings)
        self.pair = Pair(network, self.run, nodes, options)
        self.cut_at = 0.0

    def __enter__(self) -> Pair:
        return self.pair

    def __exit__(self, *_: object) -> None:
        self.pair.end()
        self.network.plug()
        self.run.remove()

    def unplug(self, rng: random.Random) -> None:
        """Cut the cable at a random step of the run, anywhere within the step."""
        step = rng.randrange(1, STEPS - 8)
        self.pair.wait_for(lambda: self.pair.is_past(step))
        time.sleep(rng.uniform(0.0, 0.2))
        self.network.unplug()
        self.cut_at = time.monotonic()

    def check_ranks(self, result: Result) -> str:
        """Return "" if all ranks end within the time-out and the slack."""
        self.pair.wait_for(lambda: not self.pair.ranks(), 3 * TIMEOUT)
        seconds, kind = time.monotonic() - self.cut_at, "seconds from the cut to the end of the last rank, at most"
        result.details[kind] = f"{max(seconds, float(result.details.get(kind, 0))):.1f}"
        return f"the ranks ended after {seconds:.1f} s" if seconds > TIMEOUT + SLACK else ""

    def check_sentences(self) -> str:
        """Return "" if each machine printed one sentence, which names the rank of b and its machine."""
        for name in "a", "b":
            errors = self.pair.errors(name)
            if len(errors) != 1 or not errors[0].startswith("error: rank 1 (machine machine-b, process "):
                return f"machine {name} printed {errors}"
            if "distributed.timeout_seconds" not in errors[0]:
                return f"machine {name} said {errors[0]}"
        return ""

    def kill_rank(self, rank: int) -> None:
        for file in self.run.logs.glob("process.*"):
            if file.read_text() == str(rank):
                with suppress(ProcessLookupError):
                    os.kill(int(file.suffix[1:]), signal.SIGKILL)

    def part(self, way: str, result: Result) -> None:
        """Make machine b die (as by a power cut) or leave (by SIGTERM to its torchrun)."""
        result.note(f"machine b {way}")
        if way == "dies":
            self.pair.kill("b")
        else:
            self.pair.processes["b"].terminate()
        self.pair.processes["b"].wait(60)

    def check_end(self, *names: str, is_same: bool = True, result: Result | None = None) -> str:
        """Return "" if the torchruns end well, and the run as the same one on a single machine; else what is wrong."""
        codes = self.pair.wait(*names, seconds=DEADLINE)
        if set(codes.values()) != {0}:
            return f"torchrun ended with {codes}: {[self.pair.screen(name)[-500:] for name in names]}"
        expected = self.bench.uninterrupted(self.settings, 2)
        if is_same:
            return self.run.differs_from(expected)
        problem, worst = compare_losses(self.run, expected)
        if result is not None:
            kind = "largest difference of a loss, relative"
            result.details[kind] = f"{max(worst, float(result.details.get(kind, 0))):.1e}"
        return problem


SCENARIOS: dict[str, tuple[str, Scenario]] = {
    "through": ("two machines that nothing happens to", through),
    "short cut": ("the cable is cut for less than the time-out", short_cut),
    "cut": ("the cable is cut for longer; torchrun restarts the ranks", cut),
    "no restart": ("the cable is cut for longer; both torchruns end and are started anew", no_restart),
    "death": ("a rank is killed; torchrun restarts both", death_of_rank),
    "leave": ("--nnodes 1:2: a machine dies or leaves; the run goes on with the other", leave),
    "bad input": ("machine b has another recipe, data, checkpoint, source, folder or network", bad_input),
    "come back": ("--nnodes 1:2: a machine dies or leaves, and comes back", come_back),
}


def run_scenario(name: str, count: int, seed: int, folder: Path) -> tuple[Result, str]:
    """Return (what became of `count` tries, why there could be none)."""
    if reason := missing(folder):
        return Result(), reason
    prepare_ranks()
    result, rng, bench = Result(), random.Random(f"{seed} {name}"), Bench(folder)
    with Network(folder) as network:
        for _ in range(count):
            result.add(SCENARIOS[name][1](bench, network, rng, result))
    return result, ""
