"""From a pickle of tensors to safetensors, on request only (F15)."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.payloads import PAYLOADS, Call
from support.runs import run_module

import models
from models import ModelError
from models.checkpoints.convert import convert, main

STATE = {
    "embedding.weight": torch.arange(12.0).view(4, 3),
    "half": torch.ones(2, dtype=torch.float16),
    "strided": torch.arange(6.0).view(2, 3).T,
    "empty": torch.zeros(0, 3),
}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "other.pt"])
@pytest.mark.parametrize("nested", [False, True])
def test_tensors_come_over_as_they_are_and_a_shared_one_once(tmp_path, name, nested):
    state = STATE | {"decoder.weight": STATE["embedding.weight"]}
    torch.save({"state_dict": state, "epoch": 3} if nested else state, tmp_path / name)
    target = convert(tmp_path / name)
    assert target.name == ("model.safetensors" if name == "pytorch_model.bin" else "other.safetensors")
    found = load_file(target)
    assert found.keys() == STATE.keys()
    for key, expected in STATE.items():
        assert found[key].dtype == expected.dtype
        assert torch.equal(found[key], expected)
    with pytest.raises(ModelError, match="exists already"):
        convert(tmp_path / name)


def test_a_converted_checkpoint_loads(tmp_path, checkpoint_folder):
    torch.save(load_file(checkpoint_folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((checkpoint_folder / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"models\.checkpoints\.convert"):
        models.from_pretrained(tmp_path)
    done = run_module("models.checkpoints.convert", tmp_path / "pytorch_model.bin")
    assert done.returncode == 0, done.stderr
    ours, original = models.from_pretrained(tmp_path), models.from_pretrained(checkpoint_folder)
    assert all(map(torch.equal, ours.parameters(), original.parameters()))


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda p: p[0].__name__)
@pytest.mark.parametrize("plain", [False, True])
def test_f15_no_payload_is_executed(tmp_path, monkeypatch, capsys, payload, plain):
    monkeypatch.chdir(tmp_path)
    content = {"weight": torch.zeros(2), "bad": Call(*payload)}
    if plain:
        Path("pytorch_model.bin").write_bytes(pickle.dumps({"bad": Call(*payload)}))
    else:
        torch.save(content, "pytorch_model.bin")
    assert main(["pytorch_model.bin"]) == 2
    message = capsys.readouterr().err
    assert "pytorch_model.bin" in message
    assert "Traceback" not in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pytorch_model.bin"]


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda p: p[0].__name__)
def test_f15_an_array_file_is_no_checkpoint(tmp_path, monkeypatch, payload):
    monkeypatch.chdir(tmp_path)
    np.save("weights.npy", np.array([Call(*payload)], dtype=object), allow_pickle=True)
    with pytest.raises(ModelError, match=r"weights\.npy"):
        convert(Path("weights.npy"))
    assert os.listdir(".") == ["weights.npy"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "should have a dictionary of one tensor or more, not a list"),
        ({}, "should have a dictionary of one tensor or more"),
        ({"weight": torch.zeros(2), "step": 3}, "'step' should be a tensor, not a int"),
    ],
)
def test_what_is_no_state_dict_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ModelError, match=message):
        convert(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x02garbage", b"text"])
def test_a_damaged_file_is_one_sentence(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.pt"):
        convert(tmp_path / "model.pt")
    torch.save(STATE, tmp_path / "truncated.pt")
    (tmp_path / "truncated.pt").write_bytes((tmp_path / "truncated.pt").read_bytes()[:-50])
    with pytest.raises(ModelError, match=r"truncated\.pt"):
        convert(tmp_path / "truncated.pt")


def test_checkpoint_published_as_a_pickle_says_how_to_fetch_it(tmp_path, monkeypatch, checkpoint_folder, capsys):
    """A hub whose repository has config.json and pytorch_model.bin."""
    hub = pytest.importorskip("huggingface_hub")
    snapshot = tmp_path / "models--some-org--old-model" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((checkpoint_folder / "config.json").read_bytes())

    def download(name, file, local_files_only):
        assert (name, file) == ("some-org/old-model", "pytorch_model.bin")
        torch.save(load_file(checkpoint_folder / "model.safetensors"), snapshot / file)
        return str(snapshot / file)

    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: str(snapshot))
    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert models.from_pretrained("some-org/old-model", init="scratch")
    with pytest.raises(
        ModelError, match=r"`python -m models\.checkpoints\.convert some-org/old-model` fetches and converts it"
    ):
        models.from_pretrained("some-org/old-model")
    assert main(["some-org/old-model"]) == 0
    assert str(snapshot / "model.safetensors") in capsys.readouterr().out
    ours, original = models.from_pretrained("some-org/old-model"), models.from_pretrained(checkpoint_folder)
    assert all(map(torch.equal, ours.parameters(), original.parameters()))


def test_a_hub_name_that_cannot_be_fetched_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(pytest.importorskip("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    assert main(["some-org/no-such-model"]) == 2
    assert "'some-org/no-such-model': no such file" in capsys.readouterr().err


def test_a_missing_file_and_no_argument_say_so(capsys, tmp_path):
    assert main([str(tmp_path / "none.bin")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0
