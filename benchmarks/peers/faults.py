"""Put the same faults to engine.train and to HF Trainer, side by side:

    python -m benchmarks.peers.faults [FAULT ...] [--count 20] [--seed 0] [--output FILE]

Both fine-tune the same tiny BERT on the same 120 reviews on a CPU, with a checkpoint every second step, in the runs
that a SIGTERM ends every 18th. Otherwise HF Trainer has its defaults. Its command resumes from get_last_checkpoint,
as transformers' own examples do.

- `kill in a save`: kill -9 while a checkpoint is written; then the same command again.
- `no optimizer file`: the newest checkpoint of a killed run lost its optimizer file; then the same command again.
- `bit flip`: a bit of a file of that checkpoint has changed; then the same command again.
- `SIGTERM`: sent between two checkpoints; then the same command again. `hf-jit` has enable_jit_checkpoint, which waits
  3 s and saves at the trainer's next callback. Mostly this is on_pre_optimizer_step: then the random state that it
  saves is that after the forward of the step which the resumed run takes again, with other dropout.
  `hf-jit-no-dropout` is the same without dropout.
- `NaN loss`: the loss of one step is NaN.

What counts as survived: the run resumes, no completed step is lost, and it ends with the weights of the undisturbed
run, bit for bit. For a NaN: it is said, and neither the weights nor a checkpoint have one. Other outcomes are counted.

transformers and accelerate are required, and the harness of tests/faults, whose forks this uses.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2] / "tests"
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, since runs are forks
sys.path.insert(0, str(TESTS))
# Without this, transformers takes a folder ./datasets for the package of that name.
sys.modules["datasets"] = None  # type: ignore[assignment]

import torch  # noqa: E402

torch.set_num_threads(1)

import transformers  # noqa: E402
from faults.runs import Bench, Ended, Started  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402

from benchmarks import record  # noqa: E402

STEPS, SAVE_EVERY = 12, 2
# The runs that a SIGTERM ends are slow, since hf-jit waits 3 s before it saves. That is at most 12 steps later, and not
# in the step before a checkpoint, which would replace that one.
SLOW_STEPS, SLOW_SAVE_EVERY, SECONDS_PER_STEP = 40, 18, 0.25
SIDES = ("ours", "hf")
JIT = ("hf-jit", "hf-jit-no-dropout")


class OurSide:
    """engine.train: last/ is the newest checkpoint, previous/ the one before."""

    optimizer = "optimizer.safetensors"

    def __init__(self, bench: Bench, slow: bool):
        steps, every = (SLOW_STEPS, SLOW_SAVE_EVERY) if slow else (STEPS, SAVE_EVERY)
        self.run = bench.run({"train.max_steps": steps, "eval.every_steps": every})

    def start(self, in_child: Callable[[], object] | None = None) -> Started:
        return self.run.start(in_child=in_child)

    def is_saving(self) -> bool:
        return self.run.is_saving()

    def newest(self) -> Path:
        return self.run.folder / "last"

    def saved_step(self) -> int:
        return max(0, self.run.step())

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.run.folder / "last/model.safetensors")

    def done_steps(self, started: Started) -> int:
        return sum(
            line.startswith("step ") and " loss " in line and "validation" not in line for line in lines(started)
        )

    def slow_down(self) -> None:
        from engine import train

        delay(train.Penalties, "add_gradients_")

    def spoil(self, step: int) -> None:
        from faults.numbers import with_model

        with_model(lambda model: model.head.classifier.register_forward_hook(nan_at(step, model)))


class TheirSide:
    """HF Trainer: checkpoint-N is the checkpoint of step N."""

    optimizer = "optimizer.pt"

    def __init__(self, bench: Bench, slow: bool, jit: bool = False, dropout: bool = True):
        self.run = bench.run({"train.max_steps": 1})
        steps, every = (SLOW_STEPS, SLOW_SAVE_EVERY) if slow else (STEPS, SAVE_EVERY)
        numbers = (str(number) for number in (steps, every, int(jit), int(dropout)))
        self.arguments = [str(bench.model), str(bench.reviews), str(self.run.folder), *numbers]

    def start(self, in_child: Callable[[], object] | None = None) -> Started:
        return Started([train_hf], self.arguments, self.run.logs, in_child)

    def is_saving(self) -> bool:
        return not all(is_whole(folder) for folder in self.checkpoints())

    def checkpoints(self) -> list[Path]:
        found = self.run.folder.glob("checkpoint-*") if self.run.folder.is_dir() else ()
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def newest(self) -> Path:
        return self.checkpoints()[-1]

    def saved_step(self) -> int:
        whole = [path for path in self.checkpoints() if is_whole(path)]
        return int(whole[-1].name.split("-")[1]) if whole else 0

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.run.folder / "final.safetensors")

    def done_steps(self, started: Started) -> int:
        return sum("'grad_norm'" in line for line in lines(started))

    def slow_down(self) -> None:
        delay(transformers.Trainer, "training_step")

    def spoil(self, step: int) -> None:
        original, calls = transformers.Trainer.compute_loss, []

        def spoiled(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            loss = original(*args, **kwargs)
            return loss * math.nan if len(calls) == step else loss

        transformers.Trainer.compute_loss = spoiled


def train_hf(argv: Sequence[str]) -> int:
    """Fine-tune with HF Trainer; the arguments: model, data and output folder, steps, steps of a save, jit, dropout."""
    model_folder, data, folder, steps, every, jit, dropout = argv
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # so that its steps are seen at once
    transformers.set_seed(0)
    rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{model_folder}/tokenizer.json", pad_token="[PAD]")
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=32)
    examples = [
        {"input_ids": ids, "attention_mask": mask, "labels": int(row["label"] == "positive")}
        for ids, mask, row in zip(encoded["input_ids"], encoded["attention_mask"], rows, strict=True)
    ]
    rates = {} if dropout == "1" else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(model_folder, **rates)
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=int(steps),
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        save_steps=int(every),
        logging_steps=1,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        enable_jit_checkpoint=jit == "1",
    )
    collate = transformers.DataCollatorWithPadding(tokenizer)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collate)
    Path(folder).mkdir(exist_ok=True)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    if trainer.state.global_step < int(steps):  # hf-jit ends the training after its checkpoint
        return 143
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, f"{folder}/final.safetensors")
    return 0


def is_whole(checkpoint: Path) -> bool:
    """Return whether HF Trainer has written trainer_state.json, the last file of a checkpoint."""
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def lines(started: Started) -> list[str]:
    return started.printed().splitlines()


def delay(owner: Any, name: str) -> None:
    original = getattr(owner, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(SECONDS_PER_STEP)
        return original(*args, **kwargs)

    setattr(owner, name, slow)


def nan_at(step: int, model: Any) -> Callable[..., Any]:
    """Return a forward hook that makes the logits of the `step`-th training forward NaN."""
    calls: list[int] = []

    def replace(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        if not model.training or not len(out):
            return out
        calls.append(1)
        return out * math.nan if len(calls) == step else out

    return replace


def compare(side: Any, ended: Ended, through: dict[str, torch.Tensor]) -> str:
    """Return how a resumed run ended."""
    if ended.code != 0:
        return "stopped with a traceback" if "Traceback" in ended.err else "stopped with a sentence"
    found = side.weights()
    same = found.keys() == through.keys() and all(torch.equal(found[name], through[name]) for name in found)
    return "survived" if same else "went on silently, other weights"


def kill_in_save(side: Any, through: dict[str, torch.Tensor], rng: random.Random) -> str:
    started = side.start()
    for _ in range(rng.randrange(2, STEPS // SAVE_EVERY)):
        started.wait_for(lambda: not side.is_saving())
        started.wait_for(side.is_saving)
    time.sleep(rng.uniform(0.0, 0.004))
    started.send(signal.SIGKILL)
    started.wait()
    if not side.is_saving():
        return ""  # too late; tried again
    return compare(side, side.start().wait(), through)


def killed_after_saves(side: Any, rng: random.Random) -> None:
    """Start a run and kill it when it has two checkpoints or more, and is not writing one."""
    step = rng.randrange(2, STEPS // SAVE_EVERY) * SAVE_EVERY
    started = side.start()
    started.wait_for(lambda: side.saved_step() >= step and not side.is_saving())
    started.send(signal.SIGKILL)
    started.wait()
    if side.is_saving() and isinstance(side, TheirSide):
        shutil.rmtree(side.newest())


def no_optimizer_file(side: Any, through: dict[str, torch.Tensor], rng: random.Random) -> str:
    killed_after_saves(side, rng)
    (side.newest() / side.optimizer).unlink()
    return compare(side, side.start().wait(), through)


def bit_flip(side: Any, through: dict[str, torch.Tensor], rng: random.Random) -> str:
    killed_after_saves(side, rng)
    files = sorted(path for path in side.newest().iterdir() if path.suffix in (".safetensors", ".pt", ".pth", ".json"))
    file = rng.choice([path for path in files if "tokenizer" not in path.name])
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return compare(side, side.start().wait(), through)


def sigterm(side: Any, through: dict[str, torch.Tensor], rng: random.Random) -> str:
    started = side.start(side.slow_down)
    step = rng.randrange(SLOW_SAVE_EVERY + 1, SLOW_SAVE_EVERY + 4)
    started.wait_for(lambda: side.done_steps(started) >= step)
    time.sleep(rng.uniform(0.0, SECONDS_PER_STEP))
    before = side.done_steps(started)
    if not started.alive():
        raise RuntimeError("the run has ended before its signal came")
    started.send(signal.SIGTERM, 0)
    started.wait()
    lost = before - side.saved_step()
    outcome = compare(side, side.start().wait(), through)
    return "resumed, completed steps lost" if outcome == "survived" and lost > 0 else outcome


def nan_loss(side: Any, through: dict[str, torch.Tensor], rng: random.Random) -> str:
    step = rng.randrange(2, STEPS - 2)
    started = side.start(lambda: side.spoil(step))
    ended = started.wait()
    broken = any(
        not tensor.isfinite().all()
        for file in side.run.folder.rglob("*.safetensors")
        for tensor in load_file(file).values()
        if tensor.is_floating_point()
    )
    if broken:
        return "went on silently, checkpoints of NaN" if ended.code == 0 else "stopped, checkpoints of NaN"
    return "survived" if ended.code != 0 and "not finite" in ended.err else "went on silently"


FAULTS: dict[str, Callable[..., str]] = {
    "kill in a save": kill_in_save,
    "no optimizer file": no_optimizer_file,
    "bit flip": bit_flip,
    "SIGTERM": sigterm,
    "NaN loss": nan_loss,
}


def put(fault: str, name: str, count: int, seed: int, bench: Bench) -> dict[str, Any]:
    """Put a fault to a side `count` times; return its row."""
    slow, rng = fault == "SIGTERM", random.Random(seed)

    def make() -> OurSide | TheirSide:
        return OurSide(bench, slow) if name == "ours" else TheirSide(bench, slow, name in JIT, name != JIT[1])

    undisturbed = make()
    if undisturbed.start().wait().code != 0:
        raise SystemExit(f"{name} failed without a fault: {undisturbed.start().wait().tail()}")
    through, outcomes = undisturbed.weights(), Counter[str]()
    while outcomes.total() < count:
        side = make()
        outcome = FAULTS[fault](side, through, rng)
        if outcome:
            outcomes[outcome] += 1
        side.run.remove()
    return {"fault": fault, "side": name, "tries": count, "survived": outcomes["survived"], "outcomes": dict(outcomes)}


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a line per fault: our counts, theirs, and what became of theirs."""
    by_fault: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_fault.setdefault(row["fault"], {})[row["side"]] = row
    shown = ["| fault | tries | engine.train | HF Trainer | the others of HF Trainer |", "|---|---|---|---|---|"]
    for fault, sides in by_fault.items():
        for theirs in (side for name, side in sides.items() if name != "ours"):
            ours = sides.get("ours", {"survived": "-", "tries": theirs["tries"]})
            rest = ", ".join(f"{n} {what}" for what, n in theirs["outcomes"].items() if what != "survived")
            label = fault + (", enable_jit_checkpoint" if theirs["side"] in JIT else "")
            label += ", no dropout" if theirs["side"] == JIT[1] else ""
            shown.append(f"| {label} | {theirs['tries']} | {ours['survived']} | {theirs['survived']} | {rest or '-'} |")
    return "\n".join(shown)


def main() -> None:
    """Run the faults, print the table, and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; none: all")
    parser.add_argument("--count", type=int, default=20, help="tries of each fault on each side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    if unknown := [fault for fault in arguments.faults if fault not in FAULTS]:
        parser.error(f"no fault {', '.join(unknown)}")
    transformers.utils.logging.set_verbosity_error()
    rows = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        bench = Bench(Path(folder))
        for fault in arguments.faults or FAULTS:
            for name in SIDES + (JIT if fault == "SIGTERM" else ()):
                rows.append(put(fault, name, arguments.count, arguments.seed, bench))
                print(
                    f"{fault}, {name}: {rows[-1]['survived']} of {arguments.count}  {rows[-1]['outcomes']}", flush=True
                )
    print(f"\n{table(rows)}")
    if arguments.output:
        content = record.describe("faults-of-peers", rows)
        record.save(arguments.output, {key: content[key] for key in ("schema", "commit", "versions", "results")})


if __name__ == "__main__":
    main()
