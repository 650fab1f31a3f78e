"""Write tests/goldens: the results of transformers on a tiny checkpoint of every architecture and head.

    python tests/support/make_goldens.py

A folder for each (architecture, head) of zoo.cases():
    config.json, model.safetensors   the checkpoint, as transformers saved it, in fp32
    expected.safetensors             inputs.*, the logits, the mean loss, and gradients.* under the names of the file

Computed in fp64 and rounded to fp32, so that a comparison tests one side's rounding only. tests/models/test_goldens.py
compares ours with them where no transformers is installed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from models import Inputs
from support import zoo

FOLDER = Path(__file__).parent.parent / "goldens"
# Replaces the kind's own value where it has such a field: the folder is committed, and should stay small.
SMALL = {
    **dict.fromkeys(("hidden_size", "dim", "n_embd", "d_model"), 12),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "n_inner", "d_ff"), 10),
    "num_decoder_layers": 1,  # of T5, whose encoder has two
}


def small(kind: str, head: str) -> dict[str, int]:
    """Return the changes of a kind's fields."""
    changes = {name: value for name, value in SMALL.items() if name in zoo.ZOO[kind].fields}
    return (
        changes
        if models.HEADS[head].is_language_model
        else changes | {"num_labels": 2 if head == "question-answering" else 3}
    )


def stored_inputs(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the fields with a value; lengths as int64."""
    for declared in fields(inputs):
        value = getattr(inputs, declared.name)
        if isinstance(value, tuple) and value:
            value = torch.tensor(value)
        if isinstance(value, Tensor):
            yield declared.name, value


def make(kind: str, head: str, folder: Path) -> None:
    """Write the golden of one (architecture, head)."""
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch)
        oracle = zoo.save_oracle(saved, kind, head, dtype=torch.float64, **small(kind, head))
        inputs = zoo.make_inputs(kind, head, oracle.config)
        if inputs.pixel_values is not None:
            inputs = replace(inputs, pixel_values=inputs.pixel_values.double())
        loss, logits = zoo.run_oracle(oracle, kind, head, inputs)
        loss.backward()
        folder.mkdir(parents=True, exist_ok=True)
        config = (saved / "config.json").read_text().replace('"dtype": "float64"', '"dtype": "float32"')
        (folder / "config.json").write_text(config)
        weights = load_file(saved / "model.safetensors")
        gradients = zoo.oracle_gradients(oracle, saved / "gradients")
    save_file({name: tensor.float() for name, tensor in weights.items()}, folder / "model.safetensors")
    expected = {f"inputs.{name}": tensor for name, tensor in stored_inputs(inputs)}
    expected |= {f"gradients.{name}": gradient for name, gradient in gradients.items() if not gradient.isnan().all()}
    expected |= {"loss": loss.detach(), "logits": logits.detach()}
    save_file(
        {name: value.float() if value.is_floating_point() else value for name, value in expected.items()},
        folder / "expected.safetensors",
    )


def main(folder: Path) -> None:
    for kind, head in zoo.cases():
        make(kind, head, folder / f"{kind}-{head}")
        print(f"{kind}-{head}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
