"""Export a trained model: as a graph for other runtimes, or to the hub. As a command:

    python -m engine.export RUN --to onnx | torch-export [--output FOLDER] [--int8] [--rows FILE]
    python -m engine.export RUN --to hub --repo USER/NAME [--private] [--dry-run]

RUN is a run folder, whose best/ is used, or a checkpoint folder. The graph takes padded inputs under the names of
transformers, any number of texts of any length, and is compared with the model on up to 100 rows: where their logits
differ, nothing is written. The folder also has config.json, the tokenizer and a README.md that runs the graph.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data import IGNORE_INDEX, Batch, DataError, Examples, Rows, copy_tokenizer, sample_rows
from data.writing import WRITING, to_json
from engine import cli, disk, graphs, hub_upload, validate
from engine.config import Config, ConfigError
from engine.errors import TrainingError
from engine.evaluate import load_trained
from engine.graphs import Comparison
from engine.tasks import MULTI_TASK, Task, TaskSettings, check_labels, find_task, read_file, read_training_data
from models import TaskModel
from models.padded import Graph, GraphModel, graphs_of

USAGE = (
    "python -m engine.export RUN --to onnx|torch-export|hub [--output FOLDER] [--int8] [--rows FILE] "
    "[--repo USER/NAME] [--private] [--dry-run]"
)
FORMATS = ("onnx", "torch-export", "hub")
OPTIONS = {
    "to FORMAT": "onnx: for onnxruntime; torch-export: a program of torch.export, *.pt2; hub: upload the checkpoint",
    "output FOLDER": "where the graph goes; default: beside the checkpoint, as runs/mine/best-onnx",
    "rows FILE": "rows to compare graph and model on; default: validation rows of the run",
    "repo USER/NAME": "the repository on the hub, which is created where there is none",
}
SWITCHES = {
    "int8": "with --to onnx: also a graph in int8, and what that costs and gains",
    "private": "with --to hub: create the repository as a private one",
    "dry-run": "with --to hub: show the files and the model card; send nothing",
}
FIXED = dict.fromkeys(
    ("run.device", "run.deterministic", "train.precision", "train.tf32", "distributed.timeout_seconds"),
    "an export is made on the CPU in fp32",
)
MAX_ROWS = 100
RESULT = "export.json"  # what was exported and measured; a folder with it may be replaced


@dataclass(frozen=True)
class Request:
    """What a command line asks for, beside the checkpoint."""

    to: str
    switches: frozenset[str]
    options: Mapping[str, str]


def main(argv: Sequence[str]) -> int:
    switches = {name for name in SWITCHES if f"--{name}" in argv}
    rest = [argument for argument in argv if argument not in {f"--{name}" for name in SWITCHES}]
    folder, config, options = cli.open_model(rest, USAGE, OPTIONS | SWITCHES, fixed=FIXED)
    request = check_request(Request(options.pop("to", ""), frozenset(switches), options))
    if request.to == "hub":
        hub_upload.upload(folder, options["repo"], "private" in switches, "dry-run" in switches)
    else:
        export_graphs(folder, config, request)
    return 0


def check_request(request: Request) -> Request:
    """Raise ConfigError for options that do not fit together; TrainingError for a missing package."""
    if request.to not in FORMATS:
        raise ConfigError(f"--to {request.to!r}: choose from {', '.join(FORMATS)}: {USAGE}")
    of_hub = {"repo", "private", "dry-run"}
    valued = next((name for name in SWITCHES if name in request.options), None)
    if valued:  # --private=true is no --private, and would create a public repository
        raise ConfigError(f"--{valued}={request.options[valued]}: --{valued} takes no value")
    unused = [
        name
        for name in (*request.options, *sorted(request.switches))
        if (name in of_hub) != (request.to == "hub") or (name == "int8" and request.to != "onnx")
    ]
    if unused:
        raise ConfigError(f"--{unused[0]} has no effect with --to {request.to}")
    if request.to == "hub" and not request.options.get("repo"):
        raise ConfigError("--to hub needs --repo USER/NAME, the repository on the hub")
    graphs.check_packages(request.to)
    return request


def export_graphs(folder: Path, config: Config, request: Request) -> None:
    """Export the graphs of a checkpoint, compare them with it, and print what was written and measured."""
    if config.run.task == MULTI_TASK:
        raise ConfigError(f"{folder} has the heads of several tasks; name the folder of one, such as {folder}/TASK")
    output = check_folder(Path(request.options.get("output", "") or f"{folder}-{request.to}"), folder)
    config = replace(config, run=replace(config.run, device="cpu"), train=replace(config.train, precision="fp32"))
    config = replace(config, data=replace(config.data, cache=""))
    task, _ = find_task(config.run.task)
    settings = validate.task_settings(config, task)
    model, processor = load_trained(folder, config, task)
    check_space(output, sum(p.nbytes for p in model.parameters()))
    with_labels = "int8" in request.switches or task.generates or task.head.endswith("-lm")
    rows, source = read_rows(task, config, settings, request.options.get("rows", ""), model, with_labels)
    examples = task.encoder(processor, settings, model.labels)(rows, with_labels)
    print(f"{folder}: comparing on {len(examples)} examples of {source}", flush=True)
    size = getattr(processor, "shape", None)
    parts = graphs_of(model, size)
    temporary = output.with_name(f"{WRITING}{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        result = write_all(temporary, request, parts, model, examples, evaluator(task, config, examples))
        shutil.copyfile(folder / "config.json", temporary / "config.json")
        copy_tokenizer(folder, temporary)
        result = {"checkpoint": str(folder), "to": request.to, "rows": source, **result}
        (temporary / RESULT).write_text(to_json(result, indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(usage_of(request.to, parts), encoding="utf-8")
        if output.exists():
            shutil.rmtree(output)
        os.replace(temporary, output)
    except OSError as error:
        raise TrainingError(f"--output {str(output)!r} could not be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"written: {output}", flush=True)


def check_folder(output: Path, checkpoint: Path) -> Path:
    """Return the folder to write; ConfigError unless it is new or an earlier export, and outside the checkpoint."""
    try:
        return _check_folder(output, checkpoint)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # a name that is too long, or with a NUL
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--output {str(output)!r:.80} cannot be written: {reason}") from None


def _check_folder(output: Path, checkpoint: Path) -> Path:
    if output.is_symlink():
        raise ConfigError(f"--output {str(output)!r} is a link; name the folder itself")
    if output.exists() and not (output / RESULT).is_file():
        raise ConfigError(f"--output {str(output)!r} exists and is no earlier export; name another folder")
    if checkpoint.resolve() in (output.resolve(), *output.resolve().parents):
        raise ConfigError(f"--output {str(output)!r} would be in the checkpoint; name a folder elsewhere")
    parent = next(path for path in output.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"--output {str(output)!r}: {str(parent)!r} cannot be written")
    return output


def check_space(output: Path, needed: int) -> None:
    """Raise TrainingError where the weights do not fit on the disk: torch ends the process if it is full."""
    if (free := disk.free_bytes(output)) < needed:
        raise TrainingError(
            f"--output {str(output)!r}: the weights take {disk.format_bytes(needed)}, and {disk.format_bytes(free)} "
            "are free there"
        )


def read_rows(
    task: Task, config: Config, settings: TaskSettings, name: str, model: TaskModel, labelled: bool
) -> tuple[Rows, str]:
    """Return up to MAX_ROWS rows and where they are from: the file `name`, or the validation rows of the run."""
    file = name or config.data.validation
    source = file or f"the validation rows of {config.data.train}"
    try:
        if file:
            rows = read_file(task, file, settings, labelled)
        else:
            rows = Rows(read_training_data(task, settings, config.run.seed).validation)
        if file and labelled:
            check_labels(task, file, rows, settings, model.labels)
    except (DataError, OSError) as error:
        if name:
            raise
        raise DataError(f"{error}\n--rows FILE names rows to compare the graph on, in place of {source}") from None
    if not rows:
        raise DataError(f"{source}: there are no rows to compare the graph on; --rows FILE names others")
    return Rows(sample_rows(rows, MAX_ROWS, config.run.seed)), source  # not the first: a file may be sorted


def write_all(
    folder: Path,
    request: Request,
    parts: Sequence[Graph],
    model: TaskModel,
    examples: Examples,
    evaluate: Callable[[TaskModel], dict[str, float]],
) -> dict[str, Any]:
    """Write and compare the graphs; return what was measured. Raises TrainingError where logits differ."""
    files = []
    for graph in parts:
        files.append(graphs.write_graph(graph, request.to, folder))
        print(f"  {files[-1].name}: {size_of(files[-1]):,} bytes; inputs {', '.join(graph.inputs)}", flush=True)
    exported = GraphModel(model, parts, [graphs.open_graph(*pair) for pair in zip(files, parts, strict=True)])
    batches = graphs.batches_of(examples)
    difference, largest = graphs.compare_logits(model, exported, batches)
    print(f"  largest difference of a logit: {difference:.3g} (largest logit {largest:.4g})", flush=True)
    graphs.check_parity(difference, largest)
    result = {"examples": len(examples), "largest_difference": difference, "largest_logit": largest}
    if "int8" not in request.switches:
        return result
    quantised = [graphs.quantise(path) for path in files]
    runners = [graphs.open_graph(*pair) for pair in zip(quantised, parts, strict=True)]
    in_int8 = GraphModel(model, parts, runners)
    found = Comparison(
        graphs.compare_metrics(evaluate, exported, in_int8),
        graphs.compare_speed(exported, in_int8, batches),
        (sum(map(size_of, files)), sum(map(size_of, quantised))),
    )
    print("\n".join(describe_quantisation(found, [path.name for path in quantised])), flush=True)
    return result | {"int8": asdict(found)}


def size_of(path: Path) -> int:
    """Return the bytes of a file, with those of the weights beside it."""
    return sum(other.stat().st_size for other in path.parent.glob(f"{path.name}*"))


def describe_quantisation(found: Comparison, names: Sequence[str]) -> list[str]:
    """Return lines on the size, the speed and the metrics of a graph in int8."""
    before, after = found.bytes
    lines = [f"  int8, {' and '.join(names)}: {after:,} bytes, {after / before:.0%} of fp32's"]
    lines.append(f"  {found.speed:.2f} times as fast on this CPU, measured in turns")
    lines += [f"  {name}: {first:.4f} -> {second:.4f} in int8" for name, (first, second) in found.metrics.items()]
    return lines


def evaluator(task: Task, config: Config, examples: Examples) -> Callable[[TaskModel], dict[str, float]]:
    """Return the function that evaluates a model on the examples: by the task, or without generating by its tokens."""

    @torch.no_grad()
    def evaluate(model: TaskModel) -> dict[str, float]:
        if task.generates:
            return token_metrics(model, graphs.batches_of(examples))
        batches = graphs.batches_of(examples)
        found = [task.evaluate_batch(model, batch, examples, config.generate) for batch in batches]
        return task.compute_metrics(torch.stack(found).sum(0).cpu(), model.labels)

    return evaluate


def token_metrics(model: TaskModel, batches: Sequence[Batch]) -> dict[str, float]:
    """Return the loss and the accuracy of the next token, where the tokens before it are the right ones."""
    loss, right, count = 0.0, 0, 0
    for batch in batches:
        labels = batch.required_labels
        out = model(batch)
        targets = labels[labels != IGNORE_INDEX]
        loss += out.loss_sum.item()
        right += int((out.logits.argmax(-1) == targets).sum())
        count += len(targets)
    return {"loss": loss / max(count, 1), "token_accuracy": right / max(count, 1)}


USE = {
    "onnx": """```python
import json, numpy as np, onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_padding()
session = onnxruntime.InferenceSession("model.onnx")
encoded = tokenizer.encode_batch(["A fine film.", "Dull."])
inputs = {"input_ids": [e.ids for e in encoded], "attention_mask": [e.attention_mask for e in encoded]}
inputs["token_type_ids"] = [e.type_ids for e in encoded]
names = {given.name for given in session.get_inputs()}
logits = session.run(None, {name: np.array(x) for name, x in inputs.items() if name in names})[0]
print(logits)
```""",
    "torch-export": """```python
import torch

model = torch.export.load("model.pt2").module()
```""",
}


def usage_of(to: str, parts: Sequence[Graph]) -> str:
    """Return the README.md of an exported folder: the inputs and outputs of each graph, and how to run one."""
    lines = [f"# A model exported by `python -m engine.export --to {to}`", ""]
    for graph in parts:
        inputs = [f"`{name}` ({', '.join(axes_of(graph, name))})" for name in graph.inputs]
        lines.append(f"- `{graph.name}{graphs.SUFFIXES[to]}`: {', '.join(inputs)} -> {', '.join(graph.outputs)}")
    lines += ["", "Padding has attention_mask 0. `export.json` has what was compared and measured.", ""]
    is_text_model = len(parts) == 1 and "input_ids" in parts[0].inputs and "markers" not in parts[0].inputs
    return "\n".join([*lines, USE[to], ""] if is_text_model else lines)


def axes_of(graph: Graph, name: str) -> list[str]:
    """Return the axes of an input: their names, or their sizes where these are fixed."""
    return [graph.axes[name].get(place, str(size)) for place, size in enumerate(graph.inputs[name].shape)]


if __name__ == "__main__":
    cli.run_command(main)
