"""The predictions of benchmarks.scaling: exact where they count bytes, and with the right limits elsewhere."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.fake_gpu.rehearsal import ROOT, missing_names
from support.task_data import config_folder, tiny_gpt2
from torch import Tensor

import models
from benchmarks.flops import Sizes, model_flops
from benchmarks.scaling import __main__ as command
from benchmarks.scaling import measure, predict
from benchmarks.scaling.machines import H100, H200, Link, Machine
from benchmarks.scaling.predict import Group, Plan, Step, predict_step
from benchmarks.scaling.work import Work, build_on_meta, describe_work, layer_shapes
from benchmarks.workloads import SHRUNK, T5_BASE, VIT_BASE, WORKLOADS
from engine.sharding import Sharding, sharded_layers

WORLDS = (1, 2, 4, 8, 16, 64, 256, 1024)
TINY = {kind: {"model_type": kind, **sizes} for kind, sizes in SHRUNK.items()}
TINY["vit"] |= {"image_size": 32}
HEADS = {"bert": "sequence-classification", "gpt2": "causal-lm", "t5": "seq2seq-lm", "vit": "image-classification"}
SIZES = {
    "bert": Sizes(1, 1, (24,)),
    "gpt2": Sizes(1, 24, (24,)),
    "t5": Sizes(1, 32, (64,), (32,)),
    "vit": Sizes(1, 1, (5,)),
}


def work_of(kind: str, **config: object) -> Work:
    return describe_work(kind, TINY[kind] | config, HEADS[kind], SIZES[kind])


@pytest.fixture(scope="module")
def gpt2_xl() -> Work:
    model = command.MODELS[2]
    return describe_work(model.name, model.config, model.head, model.sizes)


# Collectives

SQUARE = replace(H100, start=0.0, inside=Link(100.0, 0.0, 0.0), between=Link(10.0, 0.0, 0.0), host_hop=0.0)


def test_collectives_have_the_limits_of_rings():
    assert predict.reduce_seconds(1e9, Group(1, 1), H100) == predict.gather_seconds(1e9, Group(1, 1), H100) == 0
    for n in (2, 4, 8):  # without latency, (n - 1) / n of the bytes pass each rank, in an all-reduce twice
        gather = predict.gather_seconds(800, Group(1, n), SQUARE)
        assert gather == pytest.approx((n - 1) / n * 800 / 100)
        assert predict.reduce_seconds(800, Group(1, n), SQUARE) == pytest.approx(2 * gather)
    # Between machines all links to the network carry a part, until those inside are slower.
    assert predict.bandwidth(Group(4, 8), SQUARE) == 80
    assert predict.bandwidth(Group(4, 32), SQUARE) == 100
    assert predict.bandwidth(Group(4, 1), SQUARE) == 10
    latency = replace(H100, start=0.0, inside=Link(math.inf, 2.0, 2.0), between=Link(math.inf, 5.0, 5.0))
    assert predict.gather_seconds(0, Group(3, 4), latency) == 9 * 2 + 2 * 5
    assert predict.reduce_seconds(0, Group(64, 4), latency) == 2 * (3 * 2 + 6 * 5)  # a tree, whose depth is a logarithm


@pytest.mark.parametrize("size", [1e3, 1e6, 1e9])
def test_more_ranks_never_make_a_collective_faster(size):
    groups = [predict.split_ranks(world_size, 8) for world_size in WORLDS]
    assert [group.size for group in groups] == [*WORLDS]
    for function in (predict.gather_seconds, predict.reduce_seconds):
        times = [function(size, group, H100) for group in groups]
        assert times == sorted(times)
        assert all(function(2 * size, group, H100) >= time for group, time in zip(groups, times, strict=True))


# Steps


def steps_of(work: Work, strategy: str, machine: Machine = H100, **plan: Any) -> list[Step]:
    return [predict_step(work, Plan(strategy, n, 8, **plan), machine) for n in WORLDS]


@pytest.mark.parametrize("strategy", predict.STRATEGIES)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_is_compute_and_what_is_exposed(gpt2_xl, strategy, accumulation):
    steps = steps_of(gpt2_xl, strategy, accumulation=accumulation)
    assert steps[0].communication == steps[0].exposed == steps[0].host == steps[0].sent == 0
    for step in steps:
        assert step.seconds == pytest.approx(step.compute + step.exposed + step.host)
        assert 0 <= step.exposed <= step.communication + 1e-12
        assert 0 < step.mfu < H100.products / H100.stated
    in_turn = steps_of(gpt2_xl, strategy, replace(H100, overlaps=False), accumulation=accumulation)
    for step, slower in zip(steps, in_turn, strict=True):
        assert slower.exposed == pytest.approx(slower.communication) == pytest.approx(step.communication)
        assert step.seconds <= slower.seconds


@pytest.mark.parametrize("strategy", predict.STRATEGIES)
def test_more_ranks_need_more_time_and_no_more_memory(gpt2_xl, strategy):
    steps = steps_of(gpt2_xl, strategy)[1:]  # a rank alone has no copies of what is gathered
    optimizer = [step.compute for step in steps]
    if strategy == "ddp":
        assert [step.seconds for step in steps] == sorted(step.seconds for step in steps)
        assert len(set(optimizer)) == 1
    else:
        assert optimizer == sorted(optimizer, reverse=True)  # each rank updates its part
    waits = [step.exposed + step.host for step in steps]
    assert waits == sorted(waits)
    memory = [step.total_memory for step in steps]
    assert memory == sorted(memory, reverse=True)
    if strategy == "hsdp":  # a machine has everything once
        assert memory[3:] == [memory[2]] * len(memory[3:])


def test_accumulation_hides_the_gradients_of_ddp_alone(gpt2_xl):
    one, four = (steps_of(gpt2_xl, "ddp", accumulation=n)[-1] for n in (1, 4))
    assert four.communication == one.communication
    assert four.sent == one.sent
    one, four = (steps_of(gpt2_xl, "fsdp", accumulation=n)[-1] for n in (1, 4))
    assert four.communication == pytest.approx(4 * one.communication)
    assert four.sent == pytest.approx(4 * one.sent)
    one, four = (steps_of(gpt2_xl, "hsdp", accumulation=n)[-1] for n in (1, 4))
    assert one.communication < four.communication < 4 * one.communication


def test_ranks_that_share_cores_take_turns(gpt2_xl):
    shared = replace(H100, cores=2, overlaps=False, host_hop=0.0)
    alone = replace(shared, cores=0)
    two, four = (predict_step(gpt2_xl, Plan("ddp", n, 1), shared).seconds for n in (2, 4))
    assert two == predict_step(gpt2_xl, Plan("ddp", 2, 1), alone).seconds
    assert four == pytest.approx(2 * predict_step(gpt2_xl, Plan("ddp", 4, 1), alone).seconds)


def test_plans_fit_and_the_fastest_is_found(gpt2_xl):
    found = predict.find_plans(gpt2_xl, 64, 16, H100)
    assert set(found) == {"ddp", "fsdp", "hsdp"}
    for strategy, step in found.items():
        assert step.total_memory <= predict.USABLE_SHARE * H100.memory
        larger = replace(step.plan, micro_batch=2 * step.plan.micro_batch)
        assert step.plan.micro_batch == 16 or not predict.fits(predict_step(gpt2_xl, larger, H100), H100), strategy
    small = replace(H100, memory=16 * gpt2_xl.parameters)  # no room for activations beside weights and states
    assert predict.find_plans(gpt2_xl, 8, 16, small)["ddp"] is None
    assert predict.find_plans(gpt2_xl, 8, 16, small)["fsdp"] is not None
    least = predict.least_examples(gpt2_xl, found["ddp"], H100, 0.1)
    for examples, is_hidden in ((least, True), (least // 2, False)):
        plan = Plan("ddp", 64, min(examples, 16), max(1, examples // 16), found["ddp"].plan.checkpointing)
        step = predict_step(gpt2_xl, plan, H100)
        assert (step.exposed + step.host <= 0.1 * step.seconds) == is_hidden


# Bytes and FLOPs


@pytest.mark.parametrize("kind", TINY)
def test_work_is_that_of_the_model(kind, tmp_path):
    config_folder(tmp_path, kind, **{name: value for name, value in TINY[kind].items() if name != "model_type"})
    labels = ["a", "b"] if models.HEADS[HEADS[kind]].has_labels else None
    model = models.from_pretrained(tmp_path, head=HEADS[kind], labels=labels, init="scratch")
    work = work_of(kind)
    raw = json.loads((tmp_path / "config.json").read_text())
    work = describe_work(kind, raw, HEADS[kind], SIZES[kind])
    assert work.parameters == sum(p.numel() for p in model.parameters())
    assert work.flops == pytest.approx(model_flops(model, SIZES[kind]))
    assert work.flops == pytest.approx(work.root.flops + sum(unit.flops for unit in work.layers))
    in_layers = [p for layer in sharded_layers(model) for p in layer.parameters()]
    assert work.matrices == sum(p.numel() for p in in_layers if p.ndim == 2)


def local(x: Tensor) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def bytes_after_a_step(model: models.TaskModel) -> dict[str, int]:
    """Return the bytes of this rank's weights, gradients and optimizer states."""
    optimizer = torch.optim.AdamW(model.parameters())
    model.train()(models.pack([[1, 2, 3]], labels=torch.tensor([2, 3, 4]))).loss_sum.backward()
    optimizer.step()
    states = [s for state in optimizer.state.values() for name, s in state.items() if name != "step"]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    named = {"weights": [*model.parameters()], "gradients": gradients, "optimizer": states}
    return {name: sum(local(x).numel() * x.element_size() for x in tensors) for name, tensors in named.items()}


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 1), ("fsdp", 3), ("fsdp", 4)])
def test_states_of_all_ranks_are_the_predicted_bytes(tmp_path, strategy, world_size):
    """One process is each rank in turn: torch's fake process group has shapes, but no other ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = tiny_gpt2(tmp_path)
    work = describe_work("tiny", json.loads((tmp_path / "config.json").read_text()), "causal-lm", SIZES["gpt2"])
    plan = Plan(strategy, world_size, 1)
    predicted = predict.memory_bytes(work, plan, 1 if strategy == "ddp" else world_size)
    measured = []
    for rank in range(world_size):
        if strategy == "ddp":
            measured.append(bytes_after_a_step(model))
            continue
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            model = tiny_gpt2(tmp_path)
            Sharding(init_device_mesh("cpu", (world_size,), mesh_dim_names=("shard",)), None)(model)
            measured.append(bytes_after_a_step(model))
        finally:
            dist.destroy_process_group()
    for name in ("weights", "gradients", "optimizer"):
        each = [found[name] for found in measured]
        assert sum(each) == pytest.approx(predicted[name] * world_size, rel=1e-12), name
        assert max(each) <= 1.02 * predicted[name]  # rows are not divided


def kept_by_autograd(model: models.TaskModel, inputs: models.Inputs) -> int:
    """Return the bytes that a forward in bf16 keeps on the simulated GPU, without parameters."""
    from support.fake_gpu.device import CUDA, FakeGpu

    kept, held = dict[int, int](), []

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        held.append(x)  # so that no address is used twice
        return x

    with FakeGpu(ROOT):
        model.to(CUDA)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with hooks, torch.autocast("cuda", torch.bfloat16):
            out = model.train()(inputs.to(CUDA))
        for p in model.parameters():
            kept.pop(p.untyped_storage()._cdata, None)
    del out
    return sum(kept.values())


LAYERS = {
    "bert": "num_hidden_layers",
    "gpt2": "n_layer",
    "vit": "num_hidden_layers",
    "t5": "num_layers",
    "t5 decoder": "num_decoder_layers",
}


@pytest.mark.skipif(bool(missing_names()), reason="the simulated GPU needs another torch")
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_keeps_the_predicted_bytes(tmp_path, name, checkpointing):
    kind = name.split()[0]
    found = []
    count = 8  # examples
    for layers in (2, 3):
        config = TINY[kind] | {LAYERS[name]: layers}
        (tmp_path / "config.json").write_text(json.dumps(config))
        labels = ["a", "b"] if models.HEADS[HEADS[kind]].has_labels else None
        model = models.from_pretrained(tmp_path, head=HEADS[kind], labels=labels, init="scratch")
        if checkpointing:
            models.checkpoint_activations(model)
        sizes = SIZES[kind]
        if kind == "vit":
            inputs = models.pack_images(torch.zeros(count, 3, 32, 32), labels=torch.zeros(count, dtype=torch.int64))
        else:
            decoder = [[1] * sizes.decoder_lengths[0]] * count if kind == "t5" else None
            targets = torch.ones(sizes.targets * count, dtype=torch.int64)
            inputs = models.pack([[1] * sizes.lengths[0]] * count, labels=targets, decoder=decoder)
        found.append(kept_by_autograd(model, inputs))
    shape = list(layer_shapes(build_on_meta(config, HEADS[kind]), sizes))[-1 if name == "t5 decoder" else 0]
    last = sharded_layers(build_on_meta(config, HEADS[kind]))[-1 if name == "t5 decoder" else 0]
    if checkpointing:
        assert found[1] - found[0] == 4 * count * shape.tokens * shape.width
    else:
        weights = 2 * sum(p.numel() for p in last.parameters() if p.ndim == 2)
        assert 0 <= found[1] - found[0] - count * shape.kept - weights <= 64  # seeds of dropout


@pytest.mark.parametrize(
    ("workload", "milliseconds"), [("bert-base-128", 11.0), ("vit-b16-224", 28.6), ("t5-base-512-128", 20.6)]
)
def test_one_device_is_as_fast_as_the_simulated_gpu(workload, milliseconds):
    """The times are those of benchmarks/README.md, the sum over all kernels of a step."""
    model = command.ONE_DEVICE[workload]
    work = describe_work(workload, model.config, model.head, model.sizes)
    step = predict_step(work, Plan("ddp", 1, WORKLOADS[workload].global_batch_size), H200)
    assert 1000 * step.seconds == pytest.approx(milliseconds, rel=0.15)
    assert {"vit-b16-224": VIT_BASE, "t5-base-512-128": T5_BASE}.get(workload, model.config) == model.config


# The command


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "MODELS", (command.MODELS[0], command.MODELS[-1]))
    monkeypatch.setattr(command, "DEVICES", (8, 1024))


def test_the_table_names_what_fits(few, tmp_path, capsys):
    output = tmp_path / "scaling.json"
    assert command.main(["--no-check", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "| T5-11B | 11,307 M | ddp | 204.0, 204.0, 204.0 | none fits |" in printed
    assert "| T5-11B | 1,024 | " in printed
    content = json.loads(output.read_text())
    assert content["inputs"]["name"] == "H100"
    tried = {(row["model"], row["world_size"]): row for row in content["predicted"] if row["strategy"] is None}
    assert tried[("T5-11B", 8)]["tried"] == "ddp"
    assert {row["strategy"] for row in content["predicted"]} == {"ddp", "fsdp", "hsdp", None}


def test_a_measured_step_corrects_the_compute(few, tmp_path, capsys):
    plain = command.correct({"bert-base-128": 1.0}, "NVIDIA H100 80GB HBM3")["bert-base-128"]
    assert command.main(["--no-check", f"--device-step=bert-base-128={2000 / plain}"]) == 0
    assert "bert-base-128: the measured step takes 2.00 times as long" in capsys.readouterr().out
    runs = [{"samples_per_second": 64 / 0.02}]
    rows = [
        {"work": "bert-base-128", "variant": "bf16", "runs": runs},
        {"work": "bert-base-128", "variant": "bf16 compiled", "runs": [{"samples_per_second": 1.0}]},
        {"work": "product", "variant": "bf16", "runs": [{"value": 1.0}]},
    ]
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"schema": 1, "results": rows, "machine": {"gpus": ["NVIDIA H200"]}}))
    assert command.read_gpu_record(file) == ("NVIDIA H200", {"bert-base-128": pytest.approx(0.02)})
    assert command.correct({"bert-base-128": 0.02}, "NVIDIA H200")["bert-base-128"] > 0.02 * plain  # of a faster GPU


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device-step", "bert=1"], "'bert' is not one of bert-base-128"),
        (["--device-step", "gpt2-1024=fast"], "'fast' is not a number of milliseconds"),
        (["--device-step", "gpt2-1024=-1"], "must be more than 0"),
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_the_plot_is_written(few, tmp_path):
    pytest.importorskip("matplotlib")
    assert command.main(["--no-check", "--plot", str(tmp_path / "scaling.png")]) == 0
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_this_machine_is_what_its_links_were_measured_to_be():
    found = {"all_reduce": [0.002, 1.002], "all_gather": [0.001, 0.501], "reduce_scatter": [0.001, 0.251]}
    machine = measure.machine_of(found, cores=2, memory=1e9)
    two = Group(1, 2)
    assert predict.reduce_seconds(measure.SIZES[1], two, machine) == pytest.approx(1.002)
    gather, scatter = (
        predict.gather_seconds(measure.SIZES[1], two, machine, rate)
        for rate in (machine.gather_rate, machine.scatter_rate)
    )
    assert gather == pytest.approx(0.501)
    assert scatter == pytest.approx(0.251)


def test_a_rank_that_fails_is_named_by_its_last_line():
    ranks = measure.start_ranks(["-c", "raise SystemExit('no such thing')"], 2)
    with pytest.raises(measure.MeasureError, match="no such thing"):
        measure.wait_for(ranks)


@pytest.mark.slow
def test_the_check_runs_on_ranks_of_this_machine(monkeypatch):
    monkeypatch.setattr(command, "RUNS", command.RUNS[:2] + command.RUNS[-1:])
    rows = command.check_here(rounds=1, shrink=True)
    assert [row["run"] for row in rows] == ["1 process", "ddp 2", "fsdp 2", "hsdp 2x2"]
    assert rows[0]["predicted_seconds"] == pytest.approx(rows[0]["measured_seconds"])
    assert all(row["communication_seconds"] > 0 for row in rows[1:])
    for row in rows:  # a step counter of each parameter, and rows that are not divided
        assert row["measured_states"] == pytest.approx(row["predicted_states"], rel=0.02)
    assert all(set(times) == set(measure.SIZES) for times in rows[0]["links"].values())
