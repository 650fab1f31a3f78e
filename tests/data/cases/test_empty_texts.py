"""Rows without a text: predicted as null with a reason, and counted by evaluation."""

from __future__ import annotations

import pytest
from support.cases import evaluation, predictions, run, settings_for, write_file

import engine
from data import DataError

REVIEWS = [{"text": f"{colour} house {i}", "label": colour} for i in range(8) for colour in ("red", "green")]


def test_every_row_gets_one_prediction_with_its_id(tmp_path, capsys):
    settings = settings_for("text-classification", tmp_path, REVIEWS)
    run(settings, capsys)
    rows = [{"text": "a red house"}, {"text": " "}, {"text": "the green cat"}, {"text": None}]
    found = predictions(settings["run.folder"], write_file(tmp_path / "new.jsonl", rows))
    assert [row["id"] for row in found] == ["1", "2", "3", "4"]
    assert found[1] == {"id": "2", "label": None, "reason": "'text' is empty"}
    assert found[3] == {"id": "4", "label": None, "reason": "column 'text' is null"}
    assert "2 of 4 rows left out: " in capsys.readouterr().out
    labelled = [row | {"label": "red"} for row in rows]
    result = evaluation(settings["run.folder"], write_file(tmp_path / "test.jsonl", labelled))
    assert (result["examples"], result["left_out"]) == (2, 2)
    assert engine.evaluate_rows(settings["run.folder"], labelled)["left_out"] == 2
    assert [row["id"] for row in engine.predict_rows(settings["run.folder"], ["a", None, ""])] == ["1", "2", "3"]
    with pytest.raises(DataError, match="rows:2: column 'label' is null"):
        engine.evaluate_rows(settings["run.folder"], [rows[0] | {"label": "red"}, rows[0] | {"label": None}])
