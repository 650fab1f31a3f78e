"""P1, settings of the machine alone: compiled or recomputed layers give the same run. The kernels of a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from support.runs import logged_rows, run_training

import models
from engine.config import RunSettings, TrainSettings
from engine.errors import TrainingError
from engine.kernels import choose_kernels, describe_kernels, explain_missing_kernel
from engine.optim import check_compiled_gradients

SHORT = {"model.dropout.all": 0.0, "train.max_steps": 6, "train.micro_batch_tokens": 120, "eval.every_steps": 3}
SETTINGS = {
    "checkpointed": {"train.activation_checkpointing": True},
    "compiled": {"train.compile": True},
    "both": {"train.compile": True, "train.activation_checkpointing": True},
}


def losses_of(config):
    """Return the losses of the steps and of the evaluations."""
    return [row["loss"] for row in logged_rows(config.run.folder) if "loss" in row]


def run(tiny, folder, **changes):
    config = tiny(**SHORT, **changes, **{"run.folder": str(folder)})
    run_training(config)
    return losses_of(config)


@pytest.mark.parametrize("name", SETTINGS)
def test_p01_compiled_or_recomputed_layers_change_no_loss(tiny, tmp_path, monkeypatch, name):
    calls, compiled = [], models.compile_layers

    def compile_layers(model):
        calls.append(model)
        compiled(model, backend="aot_eager")

    monkeypatch.setattr(models, "compile_layers", compile_layers)
    plain = run(tiny, tmp_path / "plain")
    assert calls == []
    found = run(tiny, tmp_path / "other", **SETTINGS[name])
    assert len(calls) == ("train.compile" in SETTINGS[name])
    assert found == pytest.approx(plain, rel=1e-5)


def test_compiled_layers_that_are_unfrozen_later_are_trained(tiny, tmp_path, monkeypatch):
    """Without drop_graphs, the last layer to be unfrozen has no gradient on torch 2.6 to 2.11, and the run ends."""
    compile_layers = models.compile_layers
    monkeypatch.setattr(models, "compile_layers", lambda model: compile_layers(model, backend="aot_eager"))
    unfrozen = {"model.lora.rank": 2, "model.lora.target_modules": ["*.up"], "model.gradual_unfreezing": 2}
    plain = run(tiny, tmp_path / "plain", **unfrozen)
    assert run(tiny, tmp_path / "compiled", **unfrozen, **SETTINGS["compiled"]) == pytest.approx(plain, rel=1e-5)


def test_parameters_without_a_compiled_gradient_are_named():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(model.parameters())
    model["a"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(TrainingError, match=r"step 8: .* no gradient to b\.weight, b\.bias, .*train\.compile = false"):
        check_compiled_gradients(optimizer, model, 7)
    model["b"].requires_grad_(False)
    check_compiled_gradients(optimizer, model, 7)


@pytest.mark.slow
def test_run_compiled_by_inductor_learns_the_same(tiny, tmp_path):
    assert run(tiny, tmp_path / "a", **SETTINGS["compiled"]) == pytest.approx(run(tiny, tmp_path / "b"), rel=1e-4)


# TF32, deterministic kernels, and the advice of bf16

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


def switches():
    cudnn = torch.backends.cudnn
    return {
        "products": torch.get_float32_matmul_precision(),
        "convolutions": cudnn.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled() and cudnn.deterministic and not cudnn.benchmark,
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


@pytest.fixture
def before(monkeypatch):
    """Return the switches, which are the same again after the test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    found, fill = switches(), torch.utils.deterministic.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield found
    torch.set_float32_matmul_precision(found["products"])
    torch.backends.cudnn.allow_tf32 = found["convolutions"]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_of_a_gpu_are_those_of_the_settings(before, tf32, deterministic):
    choose_kernels(CPU, tf32, deterministic)
    assert switches() == before
    choose_kernels(GPU, tf32, deterministic)
    assert switches() == {
        "products": "high" if tf32 else "highest",
        "convolutions": tf32,
        "deterministic": deterministic,
        "workspace": ":4096:8",  # torch reads it once in a process
    }


@pytest.mark.parametrize(
    ("device", "capability", "train", "expected"),
    [
        (CPU, None, {}, []),
        (CPU, None, {"tf32": True, "precision": "bf16"}, ["train.tf32 has no effect on a CPU"]),
        (GPU, (7, 5), {"tf32": True}, ["train.tf32 has no effect on this GPU"]),
        (GPU, (7, 5), {}, []),
        (GPU, (9, 0), {}, ["train.precision = fp32: --train.precision bf16 is"]),
        (GPU, (9, 0), {"tf32": True}, ["train.precision = fp32: --train.precision bf16 is"]),
        (GPU, (8, 0), {"tf32": True, "precision": "bf16"}, []),
    ],
)
def test_settings_without_effect_and_slow_ones_are_told(monkeypatch, device, capability, train, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    lines = describe_kernels(device, TrainSettings(**train), RunSettings())
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))


def test_missing_deterministic_kernel_is_told_in_a_sentence():
    said = "nll_loss2d_forward_out_cuda_template does not have a deterministic implementation, but you set it.\nMore."
    assert explain_missing_kernel(RuntimeError("another")) == explain_missing_kernel(ValueError(said)) == ""
    sentence = explain_missing_kernel(RuntimeError(said))
    assert sentence.startswith("run.deterministic = true: ")
    assert sentence.endswith("but you set it.")


def test_settings_of_a_gpu_change_nothing_on_a_cpu(tiny, tmp_path, capsys):
    plain = run(tiny, tmp_path / "plain")
    assert run(tiny, tmp_path / "other", **{"train.tf32": True, "run.deterministic": True}) == plain
    out = capsys.readouterr().out
    assert "train.tf32 has no effect on a CPU" in out
    assert "run.deterministic has no effect on a CPU, where equal runs are bit-equal anyway" in out
