"""Micro-batches that fit into memory: found before a run, halved during it, without an effect on the loss."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from support.runs import CPU, arguments_of, limit_memory, logged_rows, run_module, run_training

from data import MicroBatching
from engine import api, evaluation_batches, memory
from engine.allocator import keep_freed_memory
from engine.config import TrainSettings
from engine.distributed import Ranks
from engine.errors import TrainingError
from engine.evaluation_batches import EvaluationContext, tokens_that_fit
from engine.kept_limit import KeptLimit
from engine.precision import Precision
from engine.tasks import TASKS
from models.heads import CausalLM, HeadShape, TokenClassification

SHORT = {"model.dropout.all": 0.0, "train.max_steps": 8, "eval.every_steps": 100}


def losses_of(config):
    return [row["loss"] for row in logged_rows(config.run.folder) if "lr" in row]


@pytest.fixture
def expected(tiny, tmp_path):
    """Return the losses of a run whose steps are one micro-batch each."""
    config = tiny(**SHORT, **{"run.folder": str(tmp_path / "expected")})
    run_training(config)
    return losses_of(config)


# Found when the run starts


def set_free_memory(monkeypatch, share):
    """Patch the free memory so that by the model of memory `share` of the longest 16 reviews fit."""
    measure = memory.kept_bytes

    def measured(objective, batch, amp):
        kept = measure(objective, batch, amp)
        states = 3 * sum(4 * p.numel() for p in objective.parameters())  # a gradient and two averages
        wanted = states + share * 16 / len(batch.ids) * kept
        monkeypatch.setattr(memory, "free_bytes", lambda device: wanted / memory.USABLE_SHARE)
        return kept

    monkeypatch.setattr(memory, "kept_bytes", measured)


def limit_shown(capsys):
    found = re.search(r"of at most ([\d,]+) tokens", capsys.readouterr().out)
    return int(found[1].replace(",", "")) if found else 0


@pytest.mark.parametrize("share", [1.1, 0.5, 0.01])
def test_p01_auto_finds_a_limit_that_changes_no_loss(tiny, expected, monkeypatch, capsys, share):
    set_free_memory(monkeypatch, share)
    fitted = limit_memory(monkeypatch, 10**9)
    config = tiny(**SHORT, **{"train.micro_batch_size": "auto"})
    capsys.readouterr()
    run_training(config)
    limit = limit_shown(capsys)
    assert (limit == 0) == (share > 1)
    if share == 0.5:
        assert 16 * 30 * 0.4 < limit < 16 * 34 * 0.6
        assert max(fitted) <= limit
    assert losses_of(config) == pytest.approx(expected, rel=1e-5)


def test_limit_is_halved_when_the_trial_does_not_fit(tiny, expected, monkeypatch, capsys):
    fitted = limit_memory(monkeypatch, 150)
    config = tiny(**SHORT, **{"train.micro_batch_size": "auto"})
    capsys.readouterr()
    run_training(config)
    assert 75 < limit_shown(capsys) <= 150
    assert 75 < max(fitted) <= 150
    assert losses_of(config) == pytest.approx(expected, rel=1e-5)


def test_dry_run_shows_the_limit_and_trains_nothing(tiny, monkeypatch, capsys):
    set_free_memory(monkeypatch, 0.5)
    config = tiny(**SHORT, **{"train.micro_batch_size": "auto", "run.dry_run": True})
    assert run_training(config) == {}
    assert limit_shown(capsys)


def test_p20_too_long_example_is_refused_before_training(tiny, monkeypatch):
    limit_memory(monkeypatch, 20)
    with pytest.raises(TrainingError, match=r"^one example of \d+ tokens does not fit into memory; train.activation_"):
        run_training(tiny(**SHORT, **{"train.micro_batch_size": "auto"}))


def test_other_runtime_errors_pass(tiny, monkeypatch):
    limit_memory(monkeypatch, 20, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    for changes in ({"train.micro_batch_size": "auto"}, {}):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            run_training(tiny(**SHORT, **changes))


def test_kept_bytes_count_storages_without_parameters():
    layer = torch.nn.Linear(3, 5)

    class Objective(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, batch):
            x = self.layer(batch)  # keeps the batch, and the weight, which is a parameter
            return x.sigmoid().exp()  # keeps both results

    amp = Precision("fp32", CPU.device)
    assert memory.kept_bytes(Objective(), torch.randn(7, 3), amp) == 4 * (7 * 3 + 7 * 5 + 7 * 5)


def test_two_ranks_find_one_limit_and_train_as_one(tiny, tmp_path, reviews, checkpoint_folder):
    one = tiny(**SHORT)
    run_training(one)
    two = tiny(**SHORT, **{"run.folder": str(tmp_path / "two"), "train.micro_batch_size": "auto"})
    done = run_module("engine.train", *arguments_of(two, tmp_path / "two.toml"), ranks=2)
    assert done.returncode == 0, done.stderr
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-5)


# Halved during the run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"train.micro_batch_size": 9}, {"train.micro_batch_tokens": 250}])
def test_p01_out_of_memory_halves_micro_batches_with_equal_loss(
    tiny, tmp_path, monkeypatch, capsys, settings, precision
):
    settings = SHORT | settings | {"train.precision": precision}
    config = tiny(**settings, **{"run.folder": str(tmp_path / "fits")})
    run_training(config)
    fitted = limit_memory(monkeypatch, 140)
    other = tiny(**settings)
    capsys.readouterr()
    run_training(other)
    assert "step 1: out of memory; from here on " in capsys.readouterr().out
    assert 70 < max(fitted) <= 140
    assert losses_of(other) == pytest.approx(losses_of(config), rel=1e-5 if precision == "fp32" else 1e-2)


def test_p20_out_of_memory_on_one_example_names_settings(tiny, monkeypatch):
    limit_memory(monkeypatch, 20)
    with pytest.raises(
        TrainingError, match=r"^step 1: one example of \d+ tokens does not fit into memory; train.activation_"
    ):
        run_training(tiny(**SHORT))


def caught_error():
    with memory.catch_out_of_memory() as caught:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return caught


def test_limit_is_half_of_the_largest_micro_batch():
    class Batch:
        num_tokens, ids = 300, ("a", "b")

    limits = memory.halve_micro_batches(MicroBatching(max_examples=4), [Batch()], caught_error(), 6, CPU)
    assert limits == MicroBatching(max_tokens=150)


def test_p20_out_of_memory_in_the_exchange_names_the_command(tmp_path):
    """The next attempt takes half the tokens, unless its recipe sets other limits."""

    class Batch:
        num_tokens, ids = 300, ("a", "b")

    ranks = Ranks(rank=1, world_size=2, device=CPU.device)
    kept = KeptLimit(tmp_path, TrainSettings(micro_batch_size=4))
    with pytest.raises(TrainingError, match=r"^step 7: rank 1 ran out of memory while .* --resume.* 150 tokens"):
        memory.check_can_repeat(caught_error(), torch.nn.Identity(), [Batch()], True, kept, 6, ranks)
    limits = MicroBatching(max_examples=4)
    assert kept.apply(limits, CPU) == MicroBatching(max_tokens=150)
    assert "at most 150 tokens" in kept.describe(kept.apply(limits, CPU))[0]
    assert KeptLimit(tmp_path, TrainSettings(micro_batch_size=2)).apply(limits, CPU) == limits
    (tmp_path / "out_of_memory.json").write_text("{")
    assert kept.apply(limits, CPU) == limits
    Batch.ids = ("a",)
    with pytest.raises(TrainingError, match=r"^step 7: one example of 300 tokens does not fit"):
        memory.check_can_repeat(caught_error(), torch.nn.Identity(), [Batch()], True, kept, 6, ranks)


SHORT_OF_MEMORY = """
import os
import torch
from models import TaskModel

forward = TaskModel.forward


def limited(self, batch):
    if self.training and os.environ["RANK"] == "1" and sum(batch.lengths) > 100:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return forward(self, batch)


TaskModel.forward = limited
LOSSES = {"unused": lambda logits, batch: logits.sum()}
"""


def test_out_of_memory_on_one_of_two_ranks_repeats_the_step(tiny, tmp_path):
    (tmp_path / "short.py").write_text(SHORT_OF_MEMORY)
    one = tiny(**SHORT)
    run_training(one)
    two = tiny(
        **SHORT | {"train.micro_batch_size": 5},
        **{"run.folder": str(tmp_path / "two"), "run.plugins": (str(tmp_path / "short.py"),)},
    )
    done = run_module("engine.train", *arguments_of(two, tmp_path / "two.toml"), ranks=2)
    assert done.returncode == 0, done.stderr
    assert "step 1: out of memory; from here on " in done.stdout
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-5)


@pytest.mark.slow
def test_sharded_run_out_of_memory_goes_on_with_less(tiny, tmp_path):
    """Its ranks wait for each other's layers, so torchrun starts them again, with the limit that they left behind."""
    (tmp_path / "short.py").write_text(SHORT_OF_MEMORY)
    one = tiny(**SHORT)
    run_training(one)
    folder = tmp_path / "two"
    two = tiny(
        **SHORT | {"train.micro_batch_size": 5, "distributed.strategy": "fsdp", "run.resume": "auto"},
        **{"run.folder": str(folder), "run.plugins": (str(tmp_path / "short.py"),)},
    )
    done = run_module("engine.train", *arguments_of(two, tmp_path / "two.toml"), ranks=2, restarts=4)
    assert done.returncode == 0, done.stderr
    assert "rank 1 ran out of memory while the ranks exchanged their layers or gradients" in done.stderr
    assert "out_of_memory.json: an earlier attempt ran out of memory" in done.stdout
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-5)


# In an evaluation


@pytest.mark.parametrize("tokens", [150, 40])
def test_p02_out_of_memory_in_evaluation_changes_no_metric(tiny, tmp_path, monkeypatch, capsys, tokens):
    changes = {"train.max_steps": 4, "eval.every_steps": 2, "eval.train_subset_size": 20}
    config = tiny(**changes, **{"run.folder": str(tmp_path / "fits")})
    run_training(config)
    fitted = limit_memory(monkeypatch, tokens, training=False)
    other = tiny(**changes)
    capsys.readouterr()
    run_training(other)
    told = re.findall(r"evaluating: out of memory; from here on (\d+) tokens at a time", capsys.readouterr().err)
    assert len(set(told)) == len(told)  # later evaluations begin with batches that fit
    assert max(fitted) <= tokens
    expected, found = ([row for row in logged_rows(run.run.folder) if "evaluation" in row] for run in (config, other))
    assert len(found) == len(expected) == 2
    for row, same in zip(found, expected, strict=True):
        for name in ("evaluation", "training"):
            assert row[name] == pytest.approx(same[name], rel=1e-6)


def test_p03_predictions_that_do_not_fit_at_once_are_all_made(tiny, monkeypatch, capsys, reviews):
    config = tiny(**{"train.max_steps": 1})
    run_training(config)
    expected = api.predict_rows(config.run.folder, [{"text": "good film " * n} for n in range(1, 15)])
    fitted = limit_memory(monkeypatch, 60, training=False)
    found = api.predict_rows(config.run.folder, [{"text": "good film " * n} for n in range(1, 15)])
    assert "predicting: out of memory; from here on" in capsys.readouterr().err
    assert max(fitted) <= 60
    for row, same in zip(found, expected, strict=True):
        assert row["id"] == same["id"]
        assert row["logits"] == pytest.approx(same["logits"], rel=1e-4, abs=1e-5)


def test_p20_one_example_too_long_to_evaluate_names_the_setting(tiny, monkeypatch):
    limit_memory(monkeypatch, 20, training=False)
    message = r"^evaluating: one example of \d+ tokens does not fit into memory; a lower data.max_length"
    with pytest.raises(TrainingError, match=message):
        run_training(tiny(**{"train.max_steps": 1}))


def test_batches_of_an_evaluation_are_larger_on_a_gpu():
    def tokens(setting, device):
        ranks = Ranks(0, 1, torch.device(device))
        return EvaluationContext(TASKS["text-classification"], None, ranks, setting, None).limits.max_tokens

    assert [tokens("auto", "cpu"), tokens("auto", "cuda"), tokens(7, "cuda")] == [4096, 32_768, 7]


@pytest.mark.parametrize(
    ("head", "vocabulary", "free", "expected"),
    [
        (CausalLM, 50_257, 130 * 2**30, 32_768),
        (CausalLM, 50_257, 13 * 2**30, 11_572),
        (CausalLM, 50_257, 1, 1),
        (TokenClassification, 0, 13 * 2**30, 32_768),
    ],
)
def test_logits_of_an_evaluation_fit_into_a_gpu(monkeypatch, head, vocabulary, free, expected):
    monkeypatch.setattr(evaluation_batches, "free_bytes", lambda device: free)
    model = SimpleNamespace(head=head(HeadShape(1, vocab_size=vocabulary)))
    assert tokens_that_fit(model, torch.device("cuda")) == expected
    assert tokens_that_fit(model, torch.device("cpu")) == 4096


SHORT_IN_THE_EXCHANGE = """
import os
import torch
from models import TaskModel

forward, steps = TaskModel.forward, []


def fail(gradient):
    raise torch.OutOfMemoryError("CUDA out of memory")


def limited(self, batch):
    steps.extend([1] * (self.training and len(batch.ids) > 0))
    if len(steps) == 3 and os.environ["RANK"] == os.environ.get("FAILING_RANK"):
        self.embedding.weight.register_hook(fail)
    return forward(self, batch)


TaskModel.forward = limited
LOSSES = {"unused": lambda logits, batch: logits.sum()}
"""


@pytest.mark.parametrize("rank", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_f09_out_of_memory_in_the_exchange_ends_both_ranks(tiny, tmp_path, rank):
    """Some gradients of the last backward may be under way, so the step cannot be run again; nobody waits forever."""
    (tmp_path / "short.py").write_text(SHORT_IN_THE_EXCHANGE)
    settings = {"train.max_steps": 4, "eval.every_steps": 2, "run.plugins": (str(tmp_path / "short.py"),)}
    arguments = arguments_of(tiny(**settings), tmp_path / "two.toml")
    done = run_module("engine.train", *arguments, ranks=2, timeout=60, FAILING_RANK=rank)
    assert done.returncode != 0
    said = f"step 3: rank {rank} ran out of memory while the ranks exchanged their layers or gradients; resume from"
    assert said in done.stderr[done.stderr.index("Root Cause") :]  # the last thing on screen
    assert "Traceback" not in done.stderr.split(said)[0]
    assert re.search(r"The run then goes on with \d+ tokens at a time", done.stderr)
    if rank == "0":  # the checkpoint of step 2 is there
        done = run_module("engine.train", *arguments, "--resume", ranks=2, timeout=60)
        assert done.returncode == 0, done.stderr


class Holder:
    pass


MESSAGES = [
    "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasGemmEx( handle, opa, opb)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'",
    "NCCL error: unhandled cuda error. Last error: Failed to CUDA calloc 6291456 bytes",
    "HIP out of memory. Tried to allocate 2.00 GiB",
]


@pytest.mark.parametrize("message", MESSAGES)
def test_every_form_of_out_of_memory_in_a_backward_is_known(tiny, monkeypatch, capsys, message):
    backward, failed = Precision.backward, []

    def limited(self, loss):
        if not failed:
            failed.append(loss)
            raise RuntimeError(message)
        backward(self, loss)

    monkeypatch.setattr(Precision, "backward", limited)
    run_training(tiny(**SHORT | {"train.max_steps": 1}))
    assert "step 1: out of memory; from here on " in capsys.readouterr().out


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_caught_out_of_memory_keeps_no_frame_alive(error):
    """Without the garbage collector, as reference counts alone must free the tensors of the frames."""

    def fails():
        tensor = Holder()
        alive.append(weakref.ref(tensor))
        try:
            raise KeyError(tensor)
        finally:
            raise error

    alive: list[weakref.ref[Holder]] = []
    gc.disable()
    try:
        with memory.catch_out_of_memory() as out_of_memory:
            assert not out_of_memory
            fails()
        assert out_of_memory
        assert out_of_memory.error is error
        assert error.__traceback__ is None
        assert alive[0]() is None
    finally:
        gc.enable()


def test_catch_out_of_memory_lets_other_errors_pass():
    for error in (RuntimeError("mat1 and mat2"), KeyError("can't allocate memory")):
        with pytest.raises(type(error)), memory.catch_out_of_memory():
            raise error
    with memory.catch_out_of_memory() as out_of_memory:
        pass
    assert not out_of_memory


# Free memory


def test_ranks_share_the_free_memory_of_the_host(monkeypatch):
    alone = memory.free_bytes(CPU.device)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_bytes(CPU.device) == pytest.approx(alone / 4, rel=0.3)


def test_free_memory_of_containers_and_of_unknown_systems(tmp_path):
    assert memory._free_bytes_of_cgroup(tmp_path) == memory._available_bytes(tmp_path / "meminfo") == float("inf")
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._free_bytes_of_cgroup(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._free_bytes_of_cgroup(tmp_path) == 700
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   5 kB\n")
    assert memory._available_bytes(tmp_path / "meminfo") == 5 * 1024


# The C library's allocator

FAULTS = """
import resource, torch
from engine.allocator import keep_freed_memory, return_freed_memory
from engine.config import TrainSettings
def faults():
    for i in range(30):
        if i == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
cpu = torch.device("cpu")
keeps = keep_freed_memory(cpu)
return_freed_memory(cpu)  # as sharded runs do
returned = faults()
keep_freed_memory(cpu)
print(keeps, faults(), returned)
"""


def test_kept_memory_causes_no_page_faults():
    def run(**env):
        command = [sys.executable, "-c", FAULTS]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env, check=True)
        keeps, kept, returned = done.stdout.split()
        return keeps == "True", int(kept), int(returned)

    (keeps, faults, returned), (tuned_keeps, tuned_faults, _) = run(), run(MALLOC_ARENA_MAX="8")
    assert not tuned_keeps  # the user has tuned it
    if sys.platform == "linux" and keeps:
        assert faults < tuned_faults / 10
        assert returned > 10 * faults
    assert not keep_freed_memory(torch.device("cuda"))
