"""Mistakes with a prepared folder: named where a file belongs, unfinished, damaged, begun from a file with errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError
from support.task_data import write
from support.task_settings import settings_of

from data import prepared
from data.errors import DataError
from engine import config as configs
from engine import prepare
from engine.config import Config, ConfigError
from engine.errors import TrainingError
from engine.tasks import TASKS, read_file


@pytest.fixture
def reviews(tmp_path: Path) -> Config:
    """A recipe whose validation rows are held out."""
    return configs.override(Config(), write("text-classification", tmp_path) | {"data.validation": ""})


def test_a_folder_that_is_no_file_of_rows_says_what_it_is(reviews, tmp_path):
    prepare.prepare(reviews, tmp_path / "prepared", 1)
    folder = tmp_path / "prepared"
    task, settings = TASKS[reviews.run.task], settings_of(reviews)
    with pytest.raises(DataError, match=r"this is a prepared folder, which only data.train may be"):
        read_file(task, str(folder), settings, True)
    (folder / "manifest.json").rename(folder / "plan.json")
    with pytest.raises(DataError, match="a prepared folder that is not finished: give the same"):
        read_file(task, str(folder), settings, True)
    with pytest.raises(DataError, match=r"no finished folder of prepared data: it has no manifest.json"):
        prepare.main(["--verify", "--out", str(folder)])
    (folder / "plan.json").unlink()
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest.json is damaged: .* remove the folder, and prepare it again"):
        prepare.prepare(reviews, folder, 1)


def test_a_corrected_file_goes_into_the_same_folder(reviews, tmp_path):
    """Nothing was encoded when its error was found, so that nothing of the folder is lost."""
    file = Path(reviews.data.train)
    good = file.read_text()
    file.write_text(good + "{}\n")
    with pytest.raises(DataError):
        prepare.prepare(reviews, tmp_path / "out", 1)
    file.write_text(good)
    prepare.prepare(reviews, tmp_path / "out", 1)
    prepare.prepare(reviews, tmp_path / "other", 1)
    assert all(
        path.read_bytes() == (tmp_path / "other" / path.name).read_bytes() for path in (tmp_path / "out").iterdir()
    )


def test_a_recipes_validation_file_goes_with_its_folder(tmp_path):
    recipe, config = tmp_path / "recipe.toml", configs.override(Config(), write("text-classification", tmp_path))
    recipe.write_text(configs.to_toml(config))
    prepare.prepare(config, tmp_path / "prepared", 1)
    given = configs.parse([str(recipe), "--data.train", str(tmp_path / "prepared")], "")
    assert given.data.validation == config.data.validation
    recipe.write_text(recipe.read_text().replace(config.data.train, "another.jsonl"))
    with pytest.raises(ConfigError, match=r"is not the recipe's, but data.validation"):
        configs.parse([str(recipe), "--data.train", str(tmp_path / "prepared")], "")


def test_a_disk_that_is_full_at_a_shard_is_one_sentence(reviews, tmp_path, monkeypatch):
    """safetensors has an error of its own for what the system refuses."""

    def fail(*given: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(configs.to_toml(reviews))
    monkeypatch.setattr(prepared, "save_file", fail)
    with pytest.raises(TrainingError, match="the disk is full, with"):
        prepare.main([str(recipe), "--out", str(tmp_path / "out")])


def test_data_to_be_fetched_first_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no such file; `python -m benchmarks.prepare chinese_poems` writes it"):
        prepare.main(["chinese_poems", "--out", "prepared"])
