"""What is rehearsed: every task in every precision, and every option that touches the device."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.tasks import TASKS
from support.fake_gpu.report import (
    EVALUATION,
    GENERATION,
    LOG,
    LOOP,
    NOT_DETERMINISTIC,
    STEP,
    TRAINING,
    Copy,
    Report,
    Update,
    Wait,
)
from support.task_data import COLOURS, write

PRECISIONS = ("bf16", "fp16", "fp32")
TOLERANCE = 0.05  # of the number of kernels
# Two steps of two micro-batches. The second is logged and evaluated, in several batches.
SETTINGS: dict[str, Any] = {
    "train.max_steps": 2,
    "train.micro_batch_size": 4,
    "eval.every_steps": 2,
    "log.every_steps": 2,
    "eval.batch_tokens": 64,
}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (task, settings)
    "r-drop": ("text-classification", {"regularize.r_drop_weight": 1.0}),
    "r-drop, sets of labels": ("multi-label-classification", {"regularize.r_drop_weight": 1.0}),
    "r-drop, tags": ("token-classification", {"regularize.r_drop_weight": 1.0}),
    "r-drop, language model": ("causal-lm", {"regularize.r_drop_weight": 1.0}),
    "r-drop, answers": ("question-answering", {"regularize.r_drop_weight": 1.0}),
    "fgm": ("text-classification", {"regularize.fgm_epsilon": 1.0}),
    "distillation": ("text-classification", {"regularize.distillation_weight": 0.5}),
    "ema": ("text-classification", {"regularize.ema_decay": 0.9}),
    "penalties": ("text-classification", {"regularize.l1": 1e-4, "regularize.l2": 1e-4}),
    "label smoothing": ("text-classification", {"regularize.label_smoothing": 0.1}),
    "class weights": ("text-classification", {"regularize.class_weights": ("balanced",)}),
    "pos_weight": ("multi-label-classification", {"regularize.pos_weight": ("balanced",)}),
    "lora": ("causal-lm", {"model.lora.rank": 2}),
    "gradual unfreezing": ("text-classification", {"model.gradual_unfreezing": 1, "train.max_steps": 6}),
    "drop path": ("image-classification", {"model.dropout.drop_path": 0.2}),
    "micro-batches auto": ("text-classification", {"train.micro_batch_size": "auto"}),
    "token budget": ("text-classification", {"train.micro_batch_size": 0, "train.micro_batch_tokens": 48}),
    "activation checkpointing": ("causal-lm", {"train.activation_checkpointing": True}),
    "windows": ("text-classification", {"data.long_texts": "windows", "data.max_length": 12, "data.window_overlap": 4}),
    "workers": ("image-classification", {"data.num_workers": 1}),
    "mixup": ("image-classification", {"augment.image.mixup": 0.4}),
    "beams": ("summarization", {"generate.num_beams": 2}),
    "no clipping": ("text-classification", {"train.max_grad_norm": 0.0}),
}


@dataclass(frozen=True)
class Case:
    """A run that is rehearsed. `settings` are those it has beside the task's and SETTINGS."""

    name: str
    task: str
    settings: dict[str, Any] = field(default_factory=dict)

    def prepare(self, folder: Path) -> dict[str, Any]:
        """Write the files of the run; return its settings."""
        settings = write(self.task, folder, count=16) | SETTINGS | {"run.folder": str(folder / "run")} | self.settings
        if TASKS[self.task].generates:
            settings["generate.max_new_tokens"] = 3
        if "regularize.distillation_weight" in settings:
            settings["data.teacher_file"] = str(_write_teacher(folder))
        return settings


def _write_teacher(folder: Path) -> Path:
    rows = [{"id": f"train-{i}", "logits": dict.fromkeys(COLOURS, i / 8)} for i in range(16)]
    path = folder / "teacher.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


CASES = {
    **{f"{task} {p}": Case(f"{task} {p}", task, {"train.precision": p}) for task in TASKS for p in PRECISIONS},
    **{name: Case(name, task, {"train.precision": "bf16", **more}) for name, (task, more) in OPTIONS.items()},
}

# Evaluations that need the host in each batch: why.
READS_EACH_BATCH = {
    "token-classification": "entities are found on the host, from the tag of each word",
    "question-answering": "answers are found on the host, from the scores of all tokens of a question's windows",
}


def find_problems(case: Case, report: Report) -> list[str]:
    """Return what is wrong: waits in training and in evaluation beyond the limits, and copies that may wait."""
    problems = [str(wait) for wait in report.waits(*TRAINING) if wait.phase not in (STEP, LOG)]
    problems += [str(copy) for copy in report.copies(*TRAINING) if copy.kind != "pinned"]
    problems += _find_late_copies(report) + _find_early_reads(report)
    for phase, step in itertools.product((STEP, LOG), range(report.steps + 1)):
        waits = [wait for wait in report.waits(phase) if wait.step == step]
        problems += [f"more than one wait in a phase of step {step}: {wait}" for wait in waits[1:]]
    used = {(phase, name) for phase, counts in report.ops.items() for name in NOT_DETERMINISTIC & counts.keys()}
    problems += [f"[{phase}] no deterministic kernel: {name}" for phase, name in sorted(used)]
    waits = report.waits(EVALUATION)
    allowed = report.passes + (report.batches if case.task in READS_EACH_BATCH else 0)
    if len(waits) > allowed:
        problems += [f"{len(waits)} waits in {report.passes} passes of {report.batches} batches: {w}" for w in waits]
    waits = report.waits(GENERATION)
    if len(waits) > report.reads:
        problems += [f"{len(waits)} waits for {report.reads} tokens: {w}" for w in waits]
    problems += [str(copy) for copy in report.copies(EVALUATION, GENERATION) if copy.kind != "pinned"]
    return problems


def _find_late_copies(report: Report) -> list[str]:
    """Return copies of micro-batches that start after the host has waited for the step before theirs."""
    problems: list[str] = []
    waited = -1  # the last step whose norm was read
    for event in report.events:
        if isinstance(event, Wait) and event.phase == STEP:
            waited = event.step
        elif isinstance(event, Copy) and event.phase == LOOP and event.step + waited > -1:
            is_early = any("prefetch.py" in place for place in event.where) and waited < event.step
            is_early |= any("in_batch_negatives_loss" in place for place in event.where)  # the order of a whole step
            problems += [] if is_early else [f"not copied ahead: {event}"]
    return problems


def _find_early_reads(report: Report) -> list[str]:
    """Return waits for the norm of a step whose update of the weights was not launched before."""
    problems: list[str] = []
    updated = -1  # the last step whose update was launched
    for event in report.events:
        if isinstance(event, Update):
            updated = event.step
        elif isinstance(event, Wait) and event.phase == STEP and event.step > updated:
            problems.append(f"before the weights are updated: {event}")
    return problems


def compare(row: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """Return how a case differs from its row in the table: kernels by more than 5%, more waits, other sizes."""
    problems = []
    for phase in sorted(row["kernels"].keys() | measured["kernels"].keys()):
        before, now = row["kernels"].get(phase, 0), measured["kernels"].get(phase, 0)
        if abs(now - before) > max(TOLERANCE * before, 1):
            problems.append(f"{phase}: {now} kernels, in the table {before}")
    for phase, now in measured["waits"].items():
        before = row["waits"].get(phase, 0)
        if now > before:
            problems.append(f"{phase}: {now} waits, in the table {before}")
    for name in sorted(row.keys() - {"kernels", "waits"}):
        if measured.get(name) != row[name]:
            problems.append(f"{name}: {measured.get(name)}, in the table {row[name]}")
    return problems


def measure(report: Report) -> dict[str, Any]:
    """Return the row of a case in the committed table."""
    kernels = {phase: report.kernels[phase] for phase in (*TRAINING, EVALUATION, GENERATION) if phase != LOG}
    waits = {phase: len(report.waits(phase)) for phase in (*TRAINING, EVALUATION, GENERATION)}
    sizes = {name: getattr(report, name) for name in ("steps", "micro_batches", "passes", "batches", "reads")}
    return {"kernels": _without_zeros(kernels), "waits": _without_zeros(waits), **_without_zeros(sizes)}


def _without_zeros(values: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in values.items() if value}
