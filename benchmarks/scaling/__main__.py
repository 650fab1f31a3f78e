"""Predict what many devices make of one: step time, memory and communication of DDP, FSDP and HSDP.

    python -m benchmarks.scaling                                    check the predictions here, then the table of H100s
    python -m benchmarks.scaling --no-check                         only the table, in seconds
    python -m benchmarks.scaling --output benchmarks/results/scaling.json --plot benchmarks/results/scaling.png
    python -m benchmarks.scaling --no-check --gpu-record FILE.json  with the steps that gpu_check measured on a GPU
    python -m benchmarks.scaling --no-check --device-step gpt2-1024=31.5    with a step measured on an H100, in ms

The check trains a small BERT on 1, 2 and 4 gloo ranks of this machine, each with as many examples, and compares the
steps with predictions from the step of one rank and from the bandwidth of gloo, which are measured in the same call.
More ranks than cores share the cores.

The table takes the machines of machines.py and the terms of predict.py. Each device has the largest micro-batch that
fits, up to that of the workload, in one micro-batch a step, so that communication has the least to hide behind.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import record
from benchmarks.flops import Sizes
from benchmarks.scaling import measure, report
from benchmarks.scaling.machines import GPUS, H100, Machine
from benchmarks.scaling.measure import Measured, MeasureError
from benchmarks.scaling.predict import Plan, Step, find_plans, fits, least_examples, predict_step
from benchmarks.scaling.work import FP32, Work, describe_work
from benchmarks.workloads import BERT_SMALL, T5, T5_BASE, VIT_BASE, WORKLOADS, prepare, shrunk

Row = dict[str, Any]
DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024)
SHOWN_DEVICES = (8, 64, 256, 1024)
MEMORY_DEVICES = (8, 64, 1024)
WAITING = (0.1, 0.5)  # shares of a step: communication is hidden, communication dominates
CHECKED = "bert-small-32"
CHECKED_SIZES = Sizes(1, 1, (32,))
ROUNDS = 2
RUNS = (("ddp", 2, 1), ("fsdp", 2, 1), ("ddp", 4, 1), ("fsdp", 4, 1), ("hsdp", 4, 2))  # (strategy, ranks, machines)
T5_LARGE = T5 | {"d_model": 1024, "d_kv": 128, "num_layers": 24, "num_decoder_layers": 24}


class Model(NamedTuple):
    """A row of the table: a published shape, the examples it reads, and how many of them a device takes at most."""

    name: str
    config: dict[str, Any]
    head: str
    sizes: Sizes
    largest: int  # micro-batch
    workload: str  # of benchmarks/workloads.py, whose measured step corrects the predicted compute


MODELS = (
    Model("BERT-base", {"model_type": "bert"}, "sequence-classification", Sizes(1, 1, (128,)), 64, "bert-base-128"),
    Model("ViT-B", VIT_BASE, "image-classification", Sizes(1, 1, (197,)), 128, "vit-b16-224"),
    Model(
        "GPT-2 XL",
        {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25},
        "causal-lm",
        Sizes(1, 1024, (1024,)),
        16,
        "gpt2-1024",
    ),
    *(
        Model(name, T5_LARGE | sizes, "seq2seq-lm", Sizes(1, 128, (512,), (128,)), 16, "t5-base-512-128")
        for name, sizes in (
            ("T5-3B", {"d_ff": 16384, "num_heads": 32}),
            ("T5-11B", {"d_ff": 65536, "num_heads": 128}),
        )
    ),
)
ONE_DEVICE = {  # the workloads of gpu_check, as the model of `predict.py` sees them
    "bert-base-128": MODELS[0],
    "vit-b16-224": MODELS[1],
    "gpt2-1024": MODELS[2]._replace(config={"model_type": "gpt2"}),
    "t5-base-512-128": MODELS[3]._replace(config=T5_BASE),
}


# The check on this machine


def check_here(rounds: int, shrink: bool) -> list[Row]:
    """Measure steps of several ranks here, and return them beside their predictions."""
    cores = int(record.machine()["cores"])
    config = record_config(shrink)
    work = describe_work(CHECKED, config, "sequence-classification", CHECKED_SIZES)
    each = WORKLOADS[CHECKED].global_batch_size if not shrink else 4
    alone, loaded = list[Measured](), list[Measured]()
    found: dict[tuple[str, int, int], list[Measured]] = {run: [] for run in RUNS}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        scratch = Path(temporary) / "runs"
        scratch.mkdir()
        (recipe,) = prepare(CHECKED, Path(temporary), shrink)
        collectives = measure.links(scratch)
        for _ in range(rounds):
            alone += measure.train(Path(recipe), scratch, 1, f"--train.global_batch_size={each}")
            loaded += measure.train(Path(recipe), scratch, 1, f"--train.global_batch_size={each}", copies=cores)
            for strategy, ranks, machines in RUNS:
                settings = (f"--train.global_batch_size={each * ranks}", f"--distributed.strategy={strategy}")
                found[strategy, ranks, machines] += measure.train(
                    Path(recipe), scratch, ranks, *settings, machines=machines
                )
    machine = measure.machine_of(collectives, cores, record.machine()["memory_gb"] * 2**30)
    rows = [checked_row("1 process", alone, alone, work, Plan("ddp", 1, each), machine, is_input=True)]
    for (strategy, ranks, machines), measured in found.items():
        plan = Plan(strategy, ranks, each, weight_bytes=FP32, local_size=ranks // machines)
        name = f"{strategy} {ranks}" if machines == 1 else f"{strategy} {machines}x{ranks // machines}"
        rows.append(checked_row(name, measured, loaded, work, plan, machine))
    rows[0]["links"] = {name: dict(zip(measure.SIZES, times, strict=True)) for name, times in collectives.items()}
    return rows


def record_config(shrink: bool) -> dict[str, Any]:
    """Return the config.json of the model that is checked."""
    return shrunk(WORKLOADS[CHECKED]).config if shrink else BERT_SMALL


def checked_row(
    name: str,
    measured: Sequence[Measured],
    alone: Sequence[Measured],
    work: Work,
    plan: Plan,
    machine: Machine,
    is_input: bool = False,
) -> Row:
    """Return a row of the check. alone: the runs of one rank from which the step is predicted."""
    middle = sorted(alone, key=lambda run: run.seconds)[len(alone) // 2]
    step = predict_step(work, plan, machine, compute=measure.compute_of(middle, work))
    return {
        "run": name,
        "is_input": is_input,
        "predicted_seconds": step.seconds,
        "measured_seconds": statistics.median(run.seconds for run in measured),
        "communication_seconds": step.communication + step.host,
        "predicted_states": step.memory["weights"] + step.memory["optimizer"],
        "measured_states": measured[0].states,
        "runs": [asdict(run) for run in measured],
    }


# The table


def predict_models(machine: Machine, corrections: dict[str, float]) -> tuple[list[Row], list[Row]]:
    """Return (the fastest plan of each strategy on each number of devices, the memory of one example)."""
    rows, memory = [], []
    for model in MODELS:
        work = describe_work(model.name, model.config, model.head, model.sizes)
        correction = corrections.get(model.workload, 1.0)
        for world_size in DEVICES:
            found = find_plans(work, world_size, model.largest, machine, correction=correction)
            for strategy, step in found.items():
                if step is not None:
                    least = [least_examples(work, step, machine, share, correction=correction) for share in WAITING]
                    rows.append(predicted_row(model.name, step) | {"least_examples": least})
                else:
                    rows.append({"model": model.name, "world_size": world_size, "strategy": None, "tried": strategy})
        memory += [memory_row(work, strategy, machine) for strategy in ("ddp", "fsdp", "hsdp")]
    return rows, memory


def predicted_row(model: str, step: Step) -> Row:
    """Return a row of the record."""
    return {
        "model": model,
        **asdict(step.plan),
        "memory": step.total_memory,
        "memory_by_use": step.memory,
        "seconds": step.seconds,
        "compute": step.compute,
        "communication": step.communication,
        "exposed": step.exposed,
        "host": step.host,
        "sent": step.sent,
        "mfu": step.mfu,
    }


def memory_row(work: Work, strategy: str, machine: Machine) -> Row:
    """Return the memory of one example with activation checkpointing, and the least devices on which it fits."""
    steps = {
        n: predict_step(work, Plan(strategy, n, 1, checkpointing=True), machine)
        for n in (1, 2, 4, *DEVICES, *MEMORY_DEVICES)
    }
    return {
        "model": work.name,
        "parameters": work.parameters,
        "strategy": strategy,
        "memory": [steps[n].total_memory for n in MEMORY_DEVICES],
        "least": next((n for n, step in steps.items() if fits(step, machine)), None),
    }


def fastest(rows: Sequence[Row]) -> list[Row]:
    """Return the fastest strategy of each model on SHOWN_DEVICES, by examples per second."""
    shown = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for world_size in SHOWN_DEVICES:
            same = [row for row in rows if (row["model"], row["world_size"]) == (model, world_size)]
            found = [row for row in same if row["strategy"]]
            shown += [max(found, key=lambda row: row["mfu"])] if found else same[:1]
    return shown


# Measured steps of a GPU


def read_gpu_record(path: Path) -> tuple[str, dict[str, float]]:
    """Return (name of the GPU, {workload: seconds of a step}) of a record of benchmarks.gpu_check."""
    content = record.read(path)
    steps = {
        row["work"]: WORKLOADS[row["work"]].global_batch_size / row["runs"][0]["samples_per_second"]
        for row in content["results"]
        if row["work"] in ONE_DEVICE and row["variant"] == "bf16" and row["runs"]
    }
    return " ".join(content["machine"]["gpus"]), steps


def correct(steps: dict[str, float], gpu: str) -> dict[str, float]:
    """Return {workload: measured over predicted seconds of a step on one device}. gpu: its name."""
    machine = next((machine for machine in GPUS if machine.name in gpu), H100)
    found = {}
    for workload, seconds in steps.items():
        model = ONE_DEVICE[workload]
        work = describe_work(workload, model.config, model.head, model.sizes)
        plan = Plan("ddp", 1, WORKLOADS[workload].global_batch_size)
        found[workload] = seconds / predict_step(work, plan, machine).seconds
    return found


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments. A mistake ends the process with one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--no-check", action="store_true", help="only the table; nothing is measured")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"runs of each case of the check; default {ROUNDS}")
    parser.add_argument("--shrink", action="store_true", help="a tiny model in the check, to try the command")
    parser.add_argument("--gpu-record", type=Path, metavar="FILE", help="a record of benchmarks.gpu_check")
    parser.add_argument(
        "--device-step",
        action="append",
        default=[],
        metavar="WORKLOAD=MS",
        help=f"a step measured on an H100, of {', '.join(ONE_DEVICE)}",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write all numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot MFU and waiting to this .png or .svg file")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds} must be at least 1")
    steps = {}
    for text in arguments.device_step:
        name, _, number = text.partition("=")
        if name not in ONE_DEVICE:
            parser.error(f"--device-step {text}: {name!r} is not one of {', '.join(ONE_DEVICE)}")
        try:
            steps[name] = float(number) / 1000
        except ValueError:
            parser.error(f"--device-step {text}: {number!r} is not a number of milliseconds")
        if not 0 < steps[name] < float("inf"):
            parser.error(f"--device-step {text}: the milliseconds must be more than 0")
    arguments.device_step = steps
    return arguments


def main(argv: Sequence[str]) -> int:
    """Check the predictions here, print the tables, write the record and the plot."""
    arguments = parse(argv)
    checked: list[Row] = []
    if not arguments.no_check:
        try:
            checked = check_here(arguments.rounds, arguments.shrink)
        except MeasureError as error:
            print(f"the check failed: {error}", file=sys.stderr)
            return 1
        print(report.format_checked(checked), end="\n\n")
    corrections = correct(arguments.device_step, H100.name)
    if arguments.gpu_record:
        gpu, steps = read_gpu_record(arguments.gpu_record)
        corrections |= correct(steps, gpu)
    for workload, correction in corrections.items():
        print(f"{workload}: the measured step takes {correction:.2f} times as long as the predicted one", end="\n\n")
    rows, memory = predict_models(H100, corrections)
    print(report.format_memory(memory), report.format_predicted(fastest(rows)), sep="\n\n")
    if arguments.output:
        results = {"checked": checked, "corrections": corrections, "memory": memory, "predicted": rows}
        content = record.describe("scaling", [], list(argv)) | results | {"inputs": asdict(H100)}
        record.save(arguments.output, content)
    if arguments.plot:
        report.plot([row for row in rows if row["strategy"]], arguments.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
