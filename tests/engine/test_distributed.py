"""P17, P21, F8, F9: runs on several ranks. One launch of torchrun runs all scenarios of a world size.

torchrun runs this file too: each scenario is a function that is called on every rank, and the tests read its results.
"""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.runs import (
    CPU,
    StopAfter,
    assert_same_run,
    logged_rows,
    run_module,
    run_training,
    tiny_config,
    write_reviews,
)
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import models
from data import DataError, TextExamples
from engine import checkpoint, cli, config, distributed, evaluate, predict, train
from engine.cli import StopRequest
from engine.config import Config, ConfigError, override
from engine.distributed import Ranks
from engine.errors import TrainingError
from engine.precision import Precision
from engine.tasks import TASKS
from models import ModelError

WITHOUT_DROPOUT = {"model.dropout.all": 0.0, "optim.lr": 1e-4, "train.max_steps": 8, "eval.every_steps": 4}
SETTINGS = {
    "interrupted": {"train.max_steps": 10, "train.global_batch_size": 13, "train.micro_batch_size": 3},
    "single example": WITHOUT_DROPOUT | {"train.global_batch_size": 1},
    "token budget": WITHOUT_DROPOUT | {"train.global_batch_size": 15, "train.micro_batch_tokens": 60},
    "to one rank": WITHOUT_DROPOUT | {"train.micro_batch_size": 3},
    "from one rank": WITHOUT_DROPOUT | {"train.micro_batch_size": 3},
    "unfreezing": WITHOUT_DROPOUT | {"train.micro_batch_size": 3, "model.gradual_unfreezing": 2},
}
COUNTS = [1, 2, 5, 33]
PRINTS_STATISTICS = replace(
    TASKS["text-classification"], format_table=lambda statistics, labels: json.dumps(statistics.tolist())
)


class Watch:
    """Records of a run on one rank, taken by patches of what the loop calls."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.seen = {"reductions": 0, "initial": 0.0, "unused searched": None, "seeds": [], "ids": []}
        self.wrap, self.seed_dropout, self.training_steps = distributed.wrap, train.seed_dropout, train.training_steps
        patch.setattr(distributed, "wrap", self.watched_wrap)
        patch.setattr(train, "seed_dropout", self.watched_seed)
        patch.setattr(train, "training_steps", self.watched_steps)

    def watched_wrap(self, model, ranks, empty_batch, amp):
        self.seen["initial"] = sum(p.double().sum().item() for p in model.parameters())
        parallel = self.wrap(model, ranks, empty_batch, amp)
        self.seen["unused searched"] = parallel.find_unused_parameters

        def counted(state, bucket):
            self.seen["reductions"] += 1
            return allreduce_hook(state, bucket)

        parallel.register_comm_hook(None, counted)
        return parallel

    def watched_seed(self, *args):
        self.seed_dropout(*args)
        self.seen["seeds"].append(torch.initial_seed())

    def watched_steps(self, *args, **kwargs):
        for micro_batches in self.training_steps(*args, **kwargs):
            self.seen["ids"].append([list(batch.ids) for batch in micro_batches])
            yield micro_batches


def run(cfg: Config, ranks: Ranks, stop: StopRequest | None = None):
    with checkpoint.claim(cfg, ranks) as resumed:
        return train.train(cfg, ranks, StopRequest() if stop is None else stop, resumed)


# The scenarios, each of them called on every rank


def watched_and_interrupted(base: Config, ranks: Ranks, folder: Path):
    cfg = override(base, SETTINGS["interrupted"])
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        run(override(cfg, {"run.folder": str(folder / "watched")}), ranks)
    result = run(override(cfg, {"run.folder": str(folder / "through")}), ranks)
    cfg = override(cfg, {"run.folder": str(folder / "interrupted")})
    # A signal that only the last rank got.
    assert run(cfg, ranks, StopAfter(4) if ranks.rank == ranks.world_size - 1 else None) is None
    assert run(override(cfg, {"run.resume": "yes"}), ranks) == result
    return watch.seen


def trained(name: str, stop: StopRequest | None = None, **changes: object):
    def scenario(base: Config, ranks: Ranks, folder: Path):
        with pytest.MonkeyPatch.context() as patch:
            watch = Watch(patch)
            run(override(base, SETTINGS[name] | {"run.folder": str(folder / name)} | changes), ranks, stop)
        return watch.seen

    return scenario


def commands(base: Config, ranks: Ranks, folder: Path):
    """Run evaluate and predict as commands, on files of 1, 2, 5 and 33 examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "setup", lambda *_: ranks)  # this process is set up already
        for count in COUNTS:
            file, out = folder / f"{count}.jsonl", folder / f"{count}.out.jsonl"
            predict.main([str(folder / "model"), "--input", str(file), "--output", str(out)])
        patch.setitem(TASKS, "text-classification", PRINTS_STATISTICS)
        evaluate.main([str(folder / "model"), "--data.test", str(folder / "33.jsonl")])


def error_of_rank_0(base: Config, ranks: Ranks, folder: Path):
    """Return the messages of errors of rank 0, caught on this rank by their type."""
    found = []
    for kind in (ConfigError, DataError, ModelError, TrainingError):

        def fail(kind=kind):
            raise kind("this went wrong")

        try:
            distributed.on_main(ranks, fail)
        except kind as error:
            found.append(str(error))
    return found


def error_of(cfg: Config, ranks: Ranks, change_model) -> str:
    """Return the TrainingError of a run whose model was changed by `change_model`."""
    original = models.from_pretrained

    def changed(*args, **kwargs):
        model = original(*args, **kwargs)
        change_model(model)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "from_pretrained", changed)
        try:
            run(cfg, ranks)
        except TrainingError as error:
            return str(error)
    return "no error"


def with_an_unused_parameter(base: Config, ranks: Ranks, folder: Path):
    cfg = override(base, {"run.folder": str(folder / "unused")})
    return error_of(cfg, ranks, lambda model: model.head.register_parameter("idle", nn.Parameter(torch.zeros(2))))


def with_a_bad_example(base: Config, ranks: Ranks, folder: Path):
    """Example r17, on whichever rank it falls, makes the classifier's output NaN."""

    def change(model):
        def note(module, args):
            module.bad = torch.tensor([name == "r17" for name in args[0].ids], dtype=torch.bool)

        model.register_forward_pre_hook(note)
        model.head.classifier.register_forward_hook(lambda _, __, out: out.masked_fill(model.bad[:, None], torch.nan))

    everything = {"data.validation": base.data.train}  # so that r17 is a training example
    return error_of(override(base, everything | {"run.folder": str(folder / "nan")}), ranks, change)


SCENARIOS = {
    "interrupted": watched_and_interrupted,
    "single example": trained("single example"),
    "token budget": trained("token budget"),
    "to one rank": trained("to one rank", StopAfter(3)),
    "from one rank": trained("from one rank", **{"run.resume": "yes"}),
    "unfreezing": trained("unfreezing"),
    "commands": commands,
    "error of rank 0": error_of_rank_0,
    "unused": with_an_unused_parameter,
    "bad example": with_a_bad_example,
}


def crash_on_the_last_rank(kind: type[BaseException]) -> None:
    """Patch the loop to raise in the third step, on one rank only."""
    calls = []

    def crashing(penalties):
        calls.append(1)
        if len(calls) == 3 and torch.distributed.get_rank() == 1:
            raise kind("only rank 1 knows this")

    train.Penalties.add_gradients_ = crashing


def main(argv):
    if argv[0] == "crash":
        crash_on_the_last_rank({"bug": ZeroDivisionError, "mistake": DataError}[argv[1]])
        return train.main(argv[2:])
    folder = Path(argv[0])
    base = config.read_recipe(str(folder / "base.toml"))
    ranks = distributed.setup("cpu")
    for name, scenario in SCENARIOS.items():
        result = scenario(base, ranks, folder)
        (folder / f"{name}.{ranks.rank}.json").write_text(json.dumps(result))
    gc.collect()  # a thread of gloo that still holds the Python hook of a wrapper would abort the exit
    return 0


# The tests, in one process


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def launched(request, checkpoint_folder, reviews, tmp_path_factory):
    """Return (world size, folder, {scenario: [result of each rank]}, process) of one launch of all scenarios."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    base = tiny_config(checkpoint_folder, reviews, folder / "unset", {})
    (folder / "base.toml").write_text(config.to_toml(base))
    small = override(base, {"run.folder": str(folder / "model"), "train.max_steps": 2})
    run_training(small)
    for count in COUNTS:
        write_reviews(folder / f"{count}.jsonl", count, seed=3)
    begun = override(base, SETTINGS["from one rank"] | {"run.folder": str(folder / "from one rank")})
    assert run_training(begun, StopAfter(3)) is None
    done = run_module("test_distributed", folder, ranks=request.param, cwd=Path(__file__).parent, is_new=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {
        name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(request.param)]
        for name in SCENARIOS
    }
    return request.param, folder, results, done


@pytest.fixture
def one_rank(launched, tmp_path):
    """Return one_rank(name), which trains that scenario on one rank and returns its folder."""

    def make(name):
        base = config.read_recipe(str(launched[1] / "base.toml"))
        run_training(override(base, SETTINGS[name] | {"run.folder": str(tmp_path / "one")}))
        return tmp_path / "one"

    return make


def training_rows(folder: Path) -> list[dict]:
    return [row for row in logged_rows(folder) if "loss" in row]


def test_p04_interrupted_ranks_end_as_uninterrupted_ones(launched):
    _, folder, _, _ = launched
    assert_same_run(folder / "interrupted", folder / "through")


def test_p21_ranks_share_initial_weights_and_not_dropout(launched):
    world_size, _, results, _ = launched
    seen = results["interrupted"]
    assert len({rank["initial"] for rank in seen}) == 1
    seeds = [seed for rank in seen for seed in rank["seeds"]]
    assert len(seeds) == len(set(seeds)) >= 10 * world_size


def test_gradients_are_reduced_once_a_step(launched):
    for rank in launched[2]["interrupted"]:
        assert any(len(micro_batches) > 1 for micro_batches in rank["ids"])  # else there is nothing to accumulate
        assert rank["reductions"] == 10  # the tiny model is one bucket
        assert rank["unused searched"] is False


@pytest.mark.parametrize("name", ["single example", "token budget", "unfreezing"])
def test_p17_ranks_with_unequal_shares_train_as_one_rank(launched, one_rank, name):
    """With one example a step only one rank has any; under a token limit the ranks have unequal micro-batches."""
    _, folder, results, _ = launched
    counts = [[len(micro_batches) for micro_batches in rank["ids"]] for rank in results[name]]
    assert all(count == counts[0] for count in counts)
    if name == "single example":
        assert [sum(map(len, micro_batches)) for micro_batches in results[name][1]["ids"]] == [0] * 8
    ours, theirs = training_rows(folder / name), training_rows(one_rank(name))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)
    assert [row["grad_norm"] for row in ours] == pytest.approx([row["grad_norm"] for row in theirs], rel=1e-4)


@pytest.mark.parametrize("name", ["to one rank", "from one rank"])
def test_f08_other_number_of_ranks_resumes_the_same_examples(launched, one_rank, name):
    world_size, folder, results, _ = launched
    if name == "to one rank":
        base = config.read_recipe(str(folder / "base.toml"))
        run_training(override(base, SETTINGS[name] | {"run.folder": str(folder / name), "run.resume": "auto"}))
    ours, theirs = training_rows(folder / name), training_rows(one_rank(name))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, 9))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=2e-6)
    of_rank = [[[x for ids in rank["ids"][i] for x in ids] for i in range(3)] for rank in results["to one rank"]]
    per_step = [[x for rank in of_rank for x in rank[i]] for i in range(3)]
    assert [len(set(ids)) for ids in per_step] == [16, 16, 16]
    assert len({x for ids in per_step for x in ids}) == 48  # no example twice in an epoch, none on two ranks
    assert world_size == len(of_rank)


def test_p02_p03_ranks_evaluate_and_predict_as_one_rank(launched, tmp_path, monkeypatch, capsys):
    _, folder, _, done = launched
    for count in COUNTS:
        alone = tmp_path / f"{count}.jsonl"
        predict.main([str(folder / "model"), "--input", str(folder / f"{count}.jsonl"), "--output", str(alone)])
        ours, theirs = (
            [json.loads(line) for line in file.read_text().splitlines()]
            for file in (folder / f"{count}.out.jsonl", alone)
        )
        assert [row["id"] for row in ours] == [f"r{i}" for i in range(count)]
        for a, b in zip(ours, theirs, strict=True):
            assert a["label"] == b["label"]
            assert a["probabilities"] == pytest.approx(b["probabilities"], rel=1e-6)
    monkeypatch.setitem(TASKS, "text-classification", PRINTS_STATISTICS)
    capsys.readouterr()
    evaluate.main([str(folder / "model"), "--data.test", str(folder / "33.jsonl")])
    alone = capsys.readouterr().out.strip().splitlines()
    printed = done.stdout[done.stdout.index("33 examples of") :].splitlines()
    assert done.stdout.count("33 examples of") == 1
    assert printed[1:6] == alone[1:6]
    statistics = next(json.loads(line) for line in printed if line.startswith("["))
    assert statistics == pytest.approx(json.loads(alone[-1]), rel=1e-6)


def test_error_of_rank_0_is_raised_on_all_ranks(launched):
    assert launched[2]["error of rank 0"] == [["this went wrong"] * 4] * launched[0]


def test_p16_unused_parameter_is_named_on_every_rank(launched):
    assert launched[2]["unused"] == ["parameters that no gradient reaches: head.idle"] * launched[0]


def test_p18_nan_is_traced_to_its_rank_and_example(launched):
    """The sum over the ranks spreads the NaN to all gradients; only the rank that made it is named."""
    message = launched[2]["bad example"][0]
    assert launched[2]["bad example"] == [message] * launched[0]
    assert "first not finite: the output of head.classifier, example ids r17. train.nan_policy = raise" in message
    assert message.count("rank ") == 1


@pytest.fixture(scope="module")
def recipe(checkpoint_folder, reviews, tmp_path_factory):
    folder = tmp_path_factory.mktemp("failing")
    path = folder / "recipe.toml"
    path.write_text(config.to_toml(tiny_config(checkpoint_folder, reviews, folder / "run", {"run.resume": "auto"})))
    return path


@pytest.mark.parametrize("kind", ["bug", pytest.param("mistake", marks=pytest.mark.slow)])
def test_f09_error_on_one_rank_ends_all_ranks(recipe, kind):
    done = run_module("test_distributed", "crash", kind, recipe, ranks=2, cwd=Path(__file__).parent)
    assert done.returncode != 0
    if kind == "bug":  # torchrun prints the traceback of the rank that failed first once more, at the end
        summary = done.stderr[done.stderr.index("Root Cause") :]
        assert "ZeroDivisionError: only rank 1 knows this" in summary
        assert "in crashing" in summary
    else:
        assert done.stderr.count("error (rank 1): only rank 1 knows this") == 1
        assert done.stderr.rstrip("=\n").endswith("\n  error: only rank 1 knows this")  # torchrun's own report


def test_error_of_all_ranks_is_printed_once(recipe):
    done = run_module("engine.train", recipe, "--data.train", "nowhere.jsonl", ranks=2)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "nowhere.jsonl" in lines[0]
    assert done.stderr.rstrip("=\n").splitlines()[-1] == f"  {lines[0]}", "torchrun's own report ends with it"


def test_wrap_on_one_rank_returns_the_model_without_gradients(checkpoint_folder):
    model = models.from_pretrained(checkpoint_folder, head="sequence-classification", labels=["a", "b"])
    none = np.empty(0, dtype=np.int64)
    examples = TextExamples(none, none, np.zeros(1, dtype=np.int64), none, [], 0)
    assert distributed.wrap(model, CPU, examples.batch([]), Precision("fp32", CPU.device)) is model
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture
def group_of_one():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("error")
def test_wrap_in_ddp_gives_no_warning(checkpoint_folder, group_of_one):
    """Each rank would print it at the start of every run."""
    model = models.from_pretrained(str(checkpoint_folder), head="sequence-classification", labels=["a", "b"])
    none = np.zeros(0, dtype=np.int64)
    examples = TextExamples(none, none, np.zeros(1, dtype=np.int64), none, [], 0)
    two_ranks = distributed.Ranks(0, 2, torch.device("cpu"))
    wrapped = distributed.wrap(model, two_ranks, examples.batch([]), Precision("fp32", CPU.device))
    assert isinstance(wrapped, DistributedDataParallel)


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated")
def test_replaced_ddp_reduces_nothing_while_it_still_exists(group_of_one):
    """distributed.wrap relies on it: DDP that takes no forward ignores the backward of another wrapper."""
    model, reductions = nn.Linear(2, 2), {"old": 0, "new": 0}
    wrappers = {name: DistributedDataParallel(model, broadcast_buffers=False) for name in reductions}
    for name, wrapper in wrappers.items():

        def counted(state, bucket):
            reductions[state] += 1
            return allreduce_hook(None, bucket)

        wrapper.register_comm_hook(name, counted)
    for name, steps in (("old", 2), ("new", 3)):
        for last in (False, True) * steps:
            distributed.set_gradient_sync(wrappers[name], last)
            wrappers[name](torch.ones(1, 2)).sum().backward()
    assert reductions == {"old": 2, "new": 3}
    torch.testing.assert_close(model.bias.grad, torch.full((2,), 10.0))


def test_collectives_on_one_rank_need_no_group():
    assert distributed.all_sum(1, 2.5, True) == [1, 2.5, True]
    values = torch.tensor([1.0, 2.5])
    total = distributed.reduce_sum(values)
    assert (total.tolist(), total.dtype) == ([1, 2.5], torch.float64)
    assert total.add_(1)[0] != values[0]  # a copy
    assert distributed.all_gather("x") == ["x"] == distributed.gather_on_main("x")
    assert distributed.on_main(CPU, lambda a: a + 1, 1) == 2


if __name__ == "__main__":
    cli.run_command(main)
