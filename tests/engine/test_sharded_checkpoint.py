"""P4, P6, F3, F4 of a sharded run: last/ is in shards, which any number of ranks resume from, and best/ is whole."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from support.runs import CPU, logged_rows

import models
from engine import checkpoint, config, pending_save, predict
from engine.checkpoint import verify
from engine.config import CheckpointSettings, ConfigError
from engine.errors import TrainingError
from engine.save_schedule import SaveSchedule
from engine.state import TrainState
from models.checkpoints.tensor_files import open_tensors

TESTS = Path(__file__).parents[1]
PAIRS = ["fsdp to one", "fsdp to fsdp"]
MORE_PAIRS = ["one to fsdp4", "one to hsdp", "fsdp to ddp", "fsdp to fsdp4", "fsdp4 to fsdp", "fsdp4 to hsdp"]
MORE_PAIRS += ["hsdp to one", "hsdp to fsdp", "hsdp to fsdp4", "ddp to fsdp", "fsdp3 to fsdp", "hsdp to ddp"]


def launch(folder: Path, *scenarios: str) -> Path:
    """Make the runs of some scenarios; return their folder."""
    command = [sys.executable, "-m", "support.sharded_saves", str(folder), *scenarios]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, env=environment(), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("saves"), ":".join(["move", *PAIRS]), "full:shard", "overlap")


@pytest.fixture(scope="module")
def launched_more(tmp_path_factory):
    moves = ":".join(["move", *MORE_PAIRS])
    return launch(tmp_path_factory.mktemp("more"), moves, "repeat", "full:best", "cleared:best", "others")


def ended(folder: Path, name: str) -> dict:
    return json.loads((folder / "results.json").read_text())[name]


def tensors_of(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    with ExitStack() as stack:
        files = open_tensors(folder, kind, stack)
        return {key: files.read(key) for key in files.entries}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def assert_same_run(folder: Path, name: str) -> None:
    """Assert that a run ended as the one that was never stopped, up to the order of additions."""
    result = ended(folder, name)
    assert {*result["codes"]} == {0}, result["err"]
    assert result["left"] == []
    assert f"resuming from {folder / name / 'last'}, after step 2" in result["out"]
    ours, theirs = ([row for row in logged_rows(folder / run) if "loss" in row] for run in (name, "through"))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-6)
    for part, kind in (("last", "model"), ("last", "optimizer"), ("best", "model")):
        a, b = tensors_of(folder / name / part, kind), tensors_of(folder / "through" / part, kind)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pair", PAIRS)
def test_p04_a_run_resumes_elsewhere_as_if_never_stopped(launched, pair):
    """The optimizer, and in it the average of the weights, are among what is compared."""
    assert_same_run(launched, pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", MORE_PAIRS)
def test_p04_a_run_resumes_at_any_other_place(launched_more, pair):
    assert_same_run(launched_more, pair)


@pytest.mark.slow
def test_p04_a_sharded_run_resumes_bit_for_bit(launched_more):
    """With dropout, an average and a loss scale."""
    exact, through = launched_more / "exact", launched_more / "exact through"
    for part, kind in (("last", "model"), ("last", "optimizer"), ("best", "model")):
        assert_equal(tensors_of(exact / part, kind), tensors_of(through / part, kind))
    for part in ("last", "best"):
        assert (exact / part / "state.json").read_text() == (through / part / "state.json").read_text()
    assert json.loads((exact / "last/state.json").read_text())["scaler"]["scale"] > 0
    assert logged_rows(exact) == logged_rows(through)


def test_steps_are_taken_while_last_is_written(launched):
    result = ended(launched, "overlap")
    assert {*result["codes"]} == {0}, result["err"]
    assert result["out"].count("a step was taken meanwhile: True") == 2


# What is written


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_f15_shards_are_no_pickles_and_torch_reads_them(launched):
    """The reader of torch.distributed.checkpoint finds the same tensors in the files of last/."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    last = launched / "overlap/last"
    for path in last.iterdir():
        assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04"), path
    ours = tensors_of(last, "model") | tensors_of(last, "optimizer")
    theirs = {key: torch.empty_like(tensor) for key, tensor in ours.items()}
    load(theirs, storage_reader=HuggingFaceStorageReader(str(last)), no_dist=True)
    assert_equal(ours, theirs)


def check_best(run: Path, head: str, tmp_path: Path) -> None:
    """Check that best/ has the weights of last/, of the same step, in the very file that one process saves."""
    steps = [json.loads((run / name / "state.json").read_text())["train"]["step"] for name in ("best", "last")]
    assert steps[0] == steps[1]
    assert_equal(tensors_of(run / "best", "model"), tensors_of(run / "last", "model"))
    models.save_pretrained(models.from_pretrained(run / "best", head=head), tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (run / "best" / name).read_bytes()
    assert [path.name for path in (run / "best").glob("*.safetensors")] == ["model.safetensors"]


def test_best_is_the_file_that_one_process_saves(launched, tmp_path):
    """GPT-2's has transposed matrices."""
    check_best(launched / "overlap", "causal-lm", tmp_path)


@pytest.mark.slow
def test_best_is_whole_with_lora_and_uneven_shards(launched_more, tmp_path):
    check_best(launched_more / "t5", "seq2seq-lm", tmp_path / "t5")
    check_best(launched_more / "lora", "sequence-classification", tmp_path / "lora")
    for name in ("best", "last"):  # a LoRA is resumed from its adapter
        folder = launched_more / "lora" / name
        model = models.from_pretrained(launched_more / "model", head="sequence-classification", labels=["a", "b"])
        models.add_lora(model, 2)
        models.load_adapter(model, folder / "adapter")
        models.save_pretrained(model, tmp_path / name)
        ours, theirs = tensors_of(tmp_path / name, "model"), tensors_of(folder, "model")
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-7)


def test_a_sharded_last_predicts_as_the_same_weights_whole(launched, tmp_path):
    rows = launched / "reviews.jsonl"
    written = []
    for name in ("sharded", "whole"):
        folder = Path(shutil.copytree(launched / "fsdp to fsdp/last", tmp_path / name))
        if name == "whole":
            model = models.from_pretrained(folder, head="sequence-classification")
            for path in folder.glob("*shard*"):
                path.unlink()
            models.save_pretrained(model, folder)
            (folder / "manifest.json").unlink()
            checkpoint.seal(folder)
        predict.main([str(folder), "--input", str(rows), "--output", str(tmp_path / f"{name}.jsonl")])
        written.append((tmp_path / f"{name}.jsonl").read_text())
    assert written[0] == written[1]
    assert len(written[0].splitlines()) == 120


# Damage and full disks


def test_f03_every_damage_to_a_shard_is_seen_and_named(launched, tmp_path):
    rng = random.Random(0)
    last = Path(shutil.copytree(launched / "fsdp to fsdp/last", tmp_path / "last"))
    assert verify(last, to_resume=True) is None
    paths = sorted(last.glob("*-shard-*"))
    assert len(paths) == 4
    for path in paths:
        whole = path.read_bytes()
        for _ in range(10):
            place, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
            for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :]):
                path.write_bytes(damaged)
                assert path.name in str(verify(last))
        path.unlink()
        assert verify(last) == f"{path} is missing"
        path.write_bytes(whole)
    added = last / "model-shard-00003-of-00003.safetensors"
    added.write_bytes(paths[0].read_bytes())
    assert f"{added} was added after the checkpoint was written" in str(verify(last))


@pytest.mark.parametrize("number", [1, 2])
def test_f03_a_manifest_without_a_shard_is_incomplete(launched, tmp_path, number):
    last = Path(shutil.copytree(launched / "fsdp to fsdp/last", tmp_path / "last"))
    manifest = json.loads((last / "manifest.json").read_text())
    name = f"optimizer-shard-0000{number}-of-00002.safetensors"
    del manifest["files"][name]
    (last / name).unlink()
    (last / "manifest.json").write_text(json.dumps(manifest))
    assert verify(last) is None  # it is enough to predict with
    assert f"lacks {name}: the checkpoint is incomplete" in str(verify(last, to_resume=True))


def test_f03_a_missing_shard_goes_back_to_previous(launched, tmp_path, capsys):
    run = Path(shutil.copytree(launched / "fsdp to fsdp", tmp_path / "run"))
    (run / "last/model-shard-00002-of-00002.safetensors").unlink()
    cfg = config.read_recipe(str(run / "last/recipe.toml"))
    with checkpoint.claim(config.override(cfg, {"run.folder": str(run), "run.resume": "yes"}), CPU) as found:
        assert found == run / "previous"
    said = capsys.readouterr().out
    assert f"warning: {run}/last/model-shard-00002-of-00002.safetensors is missing; resuming from {found}" in said
    shutil.rmtree(run / "previous")
    (run / "damaged").rename(run / "last")
    with pytest.raises(ConfigError, match=r"model-shard-00002-of-00002\.safetensors is missing"):
        checkpoint.claim(config.override(cfg, {"run.folder": str(run), "run.resume": "yes"}), CPU).__enter__()


def test_f04_a_full_disk_of_one_rank_ends_the_run_clearly(launched):
    result = ended(launched, "full shard")
    assert result["codes"] == [2, 2]
    assert result["left"] == []
    assert "Traceback" not in result["err"]
    sentences = {line.partition(": ")[2] for line in result["err"].splitlines() if line.startswith("error")}
    (sentence,) = sentences  # of both ranks
    assert f"could not be written to {launched / 'full shard/last'} by rank 1 (machine " in sentence
    assert "No space left on device" in sentence
    assert sentence.endswith("earlier checkpoints are untouched")
    assert verify(launched / "full shard/last", to_resume=True) is None
    assert json.loads((launched / "full shard/last/state.json").read_text())["train"]["step"] == 2


@pytest.mark.slow
def test_f04_a_full_disk_for_best_ends_the_run_clearly(launched_more):
    result = ended(launched_more, "full best")
    assert result["codes"] == [2, 2]
    assert result["left"] == []
    assert f"could not be written to {launched_more / 'full best/best'}: [Errno 28]" in result["err"]
    assert_same_run(launched_more, "cleared best")


# The save in the background


def test_an_error_in_the_background_is_raised_once(monkeypatch):
    future: Future[None] = Future()
    monkeypatch.setattr(pending_save, "_pending", None)
    saves = SaveSchedule(CheckpointSettings(), CPU, None)
    pending_save.begin(future, lambda error: TrainingError(f"no room: {error}"))
    assert not pending_save.has_failed()
    assert math.isfinite(saves.elapsed())
    future.set_exception(OSError("full"))
    assert saves.elapsed() == math.inf
    assert saves.is_due(TrainState(), math.inf)  # on all ranks, whose seconds are summed
    with pytest.raises(TrainingError, match="no room: full"):
        pending_save.wait()
    pending_save.wait()
    assert math.isfinite(saves.elapsed())


def test_a_run_that_fails_lets_its_last_save_end(monkeypatch):
    future: Future[None] = Future()
    monkeypatch.setattr(pending_save, "_pending", None)
    pending_save.begin(future, lambda error: TrainingError("no room"))
    future.set_exception(OSError("full"))
    pending_save.end()
    assert not pending_save.has_failed()
