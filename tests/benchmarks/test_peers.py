"""The comparison with other trainers: all sides take the same step, and the table follows from the timed runs."""

from __future__ import annotations

import importlib.util
import json
from argparse import Namespace
from pathlib import Path

import pytest
from support.runs import run_module

from benchmarks.peers import compare_trainers as peers
from benchmarks.peers.features import ENCODERS, IGNORE_INDEX, load_tokenizer, num_tokens, read_label_ids
from benchmarks.peers.generation import NUM_BEAMS
from benchmarks.peers.generation import WORKLOADS as GENERATORS
from benchmarks.peers.stopwatch import Stopwatch
from benchmarks.peers.trainers import SIDES, spread_over_epoch
from benchmarks.workloads import prepare
from engine.config import read_recipe
from engine.tasks import TASKS
from engine.validate import task_settings

# One workload per task, and its peers.
PEERS_OF = {
    "minilm-short": ["hf", "hf-grouped", "accelerate", "lightning", "plain"],
    "gpt2-dialogue": ["hf", "hf-grouped", "accelerate", "lightning", "plain", "nanogpt"],
    "gpt2-blocks": ["hf", "accelerate", "lightning", "plain", "nanogpt"],
    "t5-small": ["hf", "hf-grouped", "accelerate", "lightning", "plain"],
    "vit-tiny": ["hf", "accelerate", "lightning", "plain", "timm"],
}
FIGURES = {"samples_per_second": 2.0, "peak_memory_mb": 300.0, "first_step_seconds": 4.0}


@pytest.fixture(autouse=True)
def prepare_in_this_process(monkeypatch):
    """Prepare workloads without a new process; no memory is measured here."""
    monkeypatch.setattr(peers, "prepare_in_new_process", prepare)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("workloads")


def bench(workload, files, tmp_path) -> peers.Bench:
    return peers.Bench(workload, files, tmp_path, 0, shrink=True)


@pytest.mark.parametrize("workload", PEERS_OF)
def test_peers_of_a_workload(workload):
    assert [peer for peer in peers.PACKAGES if peers.suits(peer, workload)] == PEERS_OF[workload]
    assert set(peers.PACKAGES) == set(SIDES) - {peers.OURS}


@pytest.mark.parametrize(
    ("values", "resolved"),
    [
        ([1.1, 1.2, 1.3], True),
        ([0.7, 0.9, 0.8], True),
        ([0.9, 1.2, 1.3], False),
        ([1.0, 1.2], False),
        ([2.0], False),  # one round has no spread
    ],
)
def test_ratios_on_both_sides_of_one_are_not_resolved(values, resolved):
    assert ("not resolved" not in peers.verdict(values)) == resolved


@pytest.mark.parametrize("steps", [1, 7, 25])
def test_grouped_steps_are_spread_evenly_over_an_epoch(steps):
    """Grouping orders an epoch by descending length; the chosen steps have about the mean length."""
    epoch = [length for length in range(200, 0, -1) for _ in range(4)]  # batches of 4 equal lengths
    order = spread_over_epoch(epoch, {"batch_size": 4, "steps": steps, "seed": 3})
    batches = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert len(batches) == steps
    assert all(len(set(batch)) == 1 for batch in batches)  # the batches of the sampler
    stretches = sorted((200 - batch[0]) * steps // 200 for batch in batches)
    assert stretches == list(range(steps))  # one of each stretch of the epoch
    assert steps == 1 or order != sorted(order, reverse=True)


def test_grouped_epoch_shorter_than_the_run_stays_whole():
    assert spread_over_epoch(range(10), {"batch_size": 4, "steps": 9, "seed": 0}) == list(range(10))


def test_stopwatch_ends_the_process_after_the_last_step(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    watch = Stopwatch({"out": str(tmp_path / "out.json"), "steps": 2, "check": False}, pool=3.5)
    for tokens in (30, 40, 50):  # the loader is one step ahead
        watch.count(4, tokens)
    watch.step()
    assert not ended
    watch.step()
    assert ended == [0]
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["ends"] == sorted(figures["ends"])
    assert {**figures, "ends": len(figures["ends"])} == {"ends": 2, "samples": [4, 4], "tokens": [30, 40], "pool": 3.5}


def test_peer_with_another_first_step_is_left_out(files, tmp_path, monkeypatch, capsys):
    found = {"ours": (2.0, 1.0), "hf": (2.00001, 1.0), "plain": (2.1, 1.0), "accelerate": (2.0, 4.0)}
    given = {}

    def run_side(self, side, **changes):
        given[side] = changes
        loss, norm = found[side]
        return {"loss": loss, "grad_norm": norm, "examples": [7, 3]}, 1.0, 1.0

    monkeypatch.setattr(peers.Bench, "run_side", run_side)
    one = bench("minilm-short", files, tmp_path)
    one.check(["hf", "plain", "accelerate"])
    assert list(one.sides) == ["ours", "hf"]
    assert given["hf"] == {"steps": 1, "check": True, "examples": [7, 3]}
    assert capsys.readouterr().out.count("NOT THE SAME STEP") == 2


def test_rate_skips_the_first_steps_and_uses_the_mean_length(files, tmp_path, monkeypatch):
    order = []

    def run_side(self, side, **changes):
        order.append((side, changes["seed"]))
        # 1 s and 40 tokens per step except for the first; an example has 5 tokens on average
        figures = {"ends": [100.0, 101.0, 102.0, 103.0, 104.0], "tokens": [999, 40, 40, 40, 40], "pool": 5.0}
        return figures, 300.0, 4.0 if side == "ours" else 8.0

    monkeypatch.setattr(peers.Bench, "run_side", run_side)
    one = bench("minilm-short", files, tmp_path)
    one.sides = {"ours": peers.Side(1.0, 1.0), "hf": peers.Side(1.0, 1.0)}
    rows = []
    one.run_rounds(2, rows)
    assert order == [("ours", 0), ("hf", 0), ("hf", 1), ("ours", 1)]
    assert [row["variant"] for row in rows] == ["ours", "hf"]
    assert rows[0]["runs"] == [{"samples_per_second": 8.0, "peak_memory_mb": 300.0, "first_step_seconds": 4.0}] * 2
    assert "times as soon as hf              2.00 (2.00 - 2.00)\n" in one.table() + "\n"


def test_interrupt_keeps_the_complete_rounds(files, tmp_path, monkeypatch):
    def run_round(self, number):
        if number == 2:
            raise KeyboardInterrupt
        self.sides["ours"].runs.append(FIGURES)

    monkeypatch.setattr(peers.Bench, "run_round", run_round)
    one, rows = bench("minilm-short", files, tmp_path), []
    one.sides = {"ours": peers.Side(1.0, 1.0)}
    with pytest.raises(KeyboardInterrupt):
        one.run_rounds(5, rows)
    assert len(rows[0]["runs"]) == 2


def test_peer_that_is_not_installed_is_named(monkeypatch, capsys):
    found = Namespace()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lightning" else found)
    assert peers.choose_peers(["hf", "lightning", "timm"], "minilm-short") == ["hf"]
    assert capsys.readouterr().out == "  lightning: not installed (pip install lightning transformers)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["minilm"], "WORKLOAD: 'minilm' is not one of minilm-short, "),
        (["--peers", "hf,keras"], "--peers: 'keras' is not one of hf, "),
        (["--steps", "1"], "--steps at least 2"),
    ],
)
def test_peers_names_a_mistake_in_its_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["peers", *arguments])
    with pytest.raises(SystemExit) as end:
        peers.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err


# Beside transformers


LONG = [  # conversations that are truncated in three different ways
    ["so " * 60, "yes", "why", "well " * 3],
    ["why " * 40, "yes"],
    ["why", "well " * 60],
]


@pytest.mark.oracle
@pytest.mark.parametrize("workload", [workload for workload in PEERS_OF if workload != "vit-tiny"])
def test_features_are_our_examples_token_by_token(workload, files, tmp_path):
    pytest.importorskip("transformers")
    job = bench(workload, files, tmp_path).job(tmp_path / "run")
    rows = [json.loads(line) for line in Path(job["train"]).read_text(encoding="utf-8").splitlines()]
    if workload == "gpt2-dialogue":
        rows += [{"id": f"long {i}", "messages": messages} for i, messages in enumerate(LONG)]
    file, folder = tmp_path / "rows.jsonl", Path(job["model"])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = read_recipe(prepare(workload, files, shrink=True)[0])
    task = TASKS[job["task"]]
    settings = task_settings(recipe, task)
    labels = list(read_label_ids(job)) if workload == "minilm-short" else []
    ours = task.encode(task.read(str(file), settings, True), task.load_processor(folder), settings, labels, True)
    theirs = ENCODERS[job["task"]](rows, load_tokenizer(folder), job)
    assert len(ours) == len(theirs) > 40
    assert [num_tokens(feature, job["task"]) for feature in theirs] == ours.lengths.tolist()
    for i, feature in enumerate(theirs):
        read, learned = feature["input_ids"], feature["labels"]
        span = slice(ours.offsets[i], ours.offsets[i + 1])
        if workload == "gpt2-dialogue":  # where transformers' loss shifts the labels itself
            assert learned[0] == IGNORE_INDEX
            read, learned = read[:-1], learned[1:]
        assert read == ours.sequence(i)
        if workload == "minilm-short":
            assert learned == ours.labels[i]
        else:
            assert learned == (ours.target(i) if workload == "t5-small" else ours.token_labels[span].tolist())


@pytest.mark.long
@pytest.mark.parametrize("workload", PEERS_OF)
def test_every_side_takes_the_same_first_step(workload, files, tmp_path):
    """Losses and gradient norms of a first step on the same examples, without dropout."""
    pytest.importorskip("accelerate")
    one = bench(workload, files, tmp_path)
    installed = peers.choose_peers(PEERS_OF[workload], workload)
    one.check(installed)
    assert list(one.sides) == ["ours", *installed]
    ours = one.sides["ours"]
    for side in one.sides.values():
        assert side.loss == pytest.approx(ours.loss, rel=1e-5)
        assert side.grad_norm == pytest.approx(ours.grad_norm, rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(("workload", "peer"), [("gpt2-dialogue", "hf-grouped"), ("vit-tiny", "plain")])
def test_both_sides_read_as_many_examples_in_as_many_steps(workload, peer, files, tmp_path):
    pytest.importorskip("accelerate")
    one = bench(workload, files, tmp_path)
    runs = {side: one.run_side(side, steps=3, seed=1) for side in ("ours", peer)}
    for figures, peak, first in runs.values():
        assert len(figures["ends"]) == 3
        assert figures["samples"] == [4, 4, 4]
        assert peak > 100
        assert first > 0
    assert runs["ours"][0]["pool"] == pytest.approx(runs[peer][0]["pool"])


@pytest.mark.long
def test_comparison_prints_a_table_and_writes_a_record(files, tmp_path):
    pytest.importorskip("accelerate")
    options = ["--peers", "nanogpt", "--runs", "2", "--steps", "3", "--shrink", "--files", files]
    done = run_module("benchmarks.peers", "gpt2-blocks", *options, "--history", tmp_path)
    assert done.returncode == 0, done.stderr
    for what in ("times as fast as nanogpt", "of its memory as nanogpt", "times as soon as nanogpt"):
        assert done.stdout.count(what) == 1
    (written,) = tmp_path.glob("*-peers.json")
    rows = json.loads(written.read_text())["results"]
    assert [row["variant"] for row in rows] == ["ours", "nanogpt"]
    assert all(len(row["runs"]) == 2 for row in rows)


@pytest.mark.long
@pytest.mark.parametrize("workload", GENERATORS)
def test_generation_gives_equal_texts_on_both_sides(workload, tmp_path):
    pytest.importorskip("transformers")
    options = ["--shrink", "--runs", "1", "--new-tokens", "6", "--history", tmp_path]
    done = run_module("benchmarks.peers.generation", workload, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 of 8 texts are equal") == len(NUM_BEAMS)
    (written,) = tmp_path.glob("*-generation.json")
    assert len(json.loads(written.read_text())["results"]) == 2 * len(NUM_BEAMS)


# One table of several records


def write_record(folder, commit, date, rates, theirs):
    """Write a record of one workload: our samples/s and HF's, one per round; the other figures are FIGURES."""
    sides = {"ours": rates, "hf": theirs}
    rows = [
        {"work": "minilm-short", "variant": name, "runs": [FIGURES | {"samples_per_second": x} for x in values]}
        for name, values in sides.items()
    ]
    content = {"schema": 1, "benchmark": "peers", "date": date, "commit": commit, "results": rows}
    (folder / f"{date}-{commit}-peers.json").write_text(json.dumps(content))


def test_table_has_the_rounds_of_all_records_of_one_commit(tmp_path):
    write_record(tmp_path, "aaaaaaaaa", "2026-01-01", [9.0], [1.0])
    write_record(tmp_path, "bbbbbbbbb", "2026-01-02", [3.0, 4.0], [2.0, 2.0])
    write_record(tmp_path, "bbbbbbbbb", "2026-01-03", [5.0], [2.0])
    done = run_module("benchmarks.peers.table", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "commit bbbbbbb, 2 records of 2026-01-02" in done.stdout
    assert (
        "| `minilm-short` | hf | 3 | 4.0, 2.0 | 2.00 (1.50 - 2.50) | 1.00 (1.00 - 1.00), not resolved |" in done.stdout
    )
    done = run_module("benchmarks.peers.table", tmp_path, "--commit", "aa")
    assert "| 1 | 9.0, 1.0 | 9.00 (9.00 - 9.00), not resolved |" in done.stdout
    done = run_module("benchmarks.peers.table", tmp_path, "--commit", "cc")
    assert done.returncode == 1
    assert "no record of benchmarks.peers of commit cc in" in done.stderr
