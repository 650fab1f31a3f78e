"""Rows without a text: predicted as null with a reason, and counted by evaluation."""

from __future__ import annotations

from support.cases import evaluation, predictions, run, settings_for, write_file

REVIEWS = [{"text": f"{colour} house {i}", "label": colour} for i in range(8) for colour in ("red", "green")]


def test_every_row_gets_one_prediction_with_its_id(tmp_path, capsys):
    settings = settings_for("text-classification", tmp_path, REVIEWS)
    run(settings, capsys)
    rows = [{"text": "a red house"}, {"text": " "}, {"text": "the green cat"}]
    found = predictions(settings["run.folder"], write_file(tmp_path / "new.jsonl", rows))
    assert [row["id"] for row in found] == ["1", "2", "3"]
    assert found[1] == {"id": "2", "label": None, "reason": "'text' is empty"}
    assert "1 of 3 rows left out: " in capsys.readouterr().out
    labelled = [row | {"label": "red"} for row in rows]
    result = evaluation(settings["run.folder"], write_file(tmp_path / "test.jsonl", labelled))
    assert (result["examples"], result["left_out"]) == (2, 1)
