"""Sentence embedding: the loss of a whole step and its gradient, however the step is split; and its metrics."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.runs import CPU, limit_memory, logged_rows, run_training
from support.task_data import write
from support.task_settings import settings_of

import models
from data import DataError, MicroBatching, training_steps
from engine import config as configs
from engine.config import Config, ConfigError, RegularizeSettings
from engine.contrastive import find_known_fits, in_batch_negatives_loss
from engine.coupling import couple_micro_batches
from engine.objective import training_objective
from engine.precision import Precision
from engine.regularize import seed_dropout
from engine.step_loss import CoupledObjective, Outputs, outputs_of
from engine.tasks import TASKS
from engine.validate import task_settings

TASK = TASKS["sentence-embedding"]
FP32 = Precision("fp32", CPU.device)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return (config, training examples) of tiny pairs, a third of them with a negative, one repeated."""
    folder = tmp_path_factory.mktemp("pairs")
    settings = write("sentence-embedding", folder)
    file = folder / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1] |= {"anchor": rows[0]["anchor"]}
    rows[2] |= {"positive": rows[0]["positive"]}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configs.override(Config(), settings)
    own = settings_of(config)
    processor = TASK.load_processor(folder / "model")
    return config, TASK.encode(TASK.read(config.data.train, own, True), processor, own, (), True)


def objective_of(config, dropout, dtype=torch.float64):
    model = models.from_pretrained(config.model.name, head=TASK.head, init="scratch", dropout=dropout).to(dtype)
    return CoupledObjective(model, partial(in_batch_negatives_loss, similarity="cosine", scale=20.0)).train()


def gradients(objective, batches):
    """Return (loss, gradients) of a step, as the loop computes them."""
    objective.zero_grad()
    losses = []
    for i, batch in enumerate(couple_micro_batches(objective, objective, list(batches), FP32, 3, 5, CPU)):
        seed_dropout(3, 5, i, 0, CPU.device)
        out = objective(batch)
        losses.append(out.loss_sum.item())
        out.loss_sum.backward()
    return sum(losses), [p.grad.clone() for p in objective.parameters()]


def undivided(objective, batches):
    """Return (loss, gradients) of autograd through all micro-batches of a step at once, with the same dropout."""
    objective.zero_grad()
    parts = []
    for i, batch in enumerate(batches):
        seed_dropout(3, 5, i, 0, CPU.device)
        parts.append(outputs_of(objective.model(batch).logits, batch))
    vectors, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("vectors", "labels"))
    loss = objective.step_loss(Outputs(vectors, labels, tuple(n for part in parts for n in part.sequences))).sum()
    loss.backward()
    return loss.item(), [p.grad.clone() for p in objective.parameters()]


def draw_more(model, args):
    """Draw a number more where gradients are kept, as compiled layers draw other dropout than uncompiled ones."""
    if torch.is_grad_enabled():
        torch.rand(1)


@pytest.mark.parametrize("dropout", [0.0, 0.3, "of compiled layers"])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_split_step_has_the_gradient_of_the_undivided(written, dropout, size):
    config, examples = written
    is_compiled = isinstance(dropout, str)
    objective = objective_of(config, 0.3 if is_compiled else dropout)
    if is_compiled:
        objective.model.register_forward_pre_hook(draw_more)
    batches = next(training_steps(examples, 8, 0, MicroBatching(max_examples=size)))
    loss, found = gradients(objective, batches)
    expected_loss, expected = undivided(objective, batches)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    scale = max(g.abs().max().item() for g in expected)
    assert scale > 1e-3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * scale)


def test_gradient_equals_finite_differences(written):
    config, examples = written
    objective = objective_of(config, 0.0)
    batches = next(training_steps(examples, 8, 0, MicroBatching(max_examples=3)))
    _, found = gradients(objective, batches)
    weight, gradient = next(
        (p, g) for (name, p), g in zip(objective.named_parameters(), found, strict=True) if "layers.1" in name
    )
    direction = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(0))
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight.add_(step * direction)
            values.append(undivided_loss(objective, batches))
            weight.sub_(step * direction)
    assert (values[0] - values[1]) / 2e-5 == pytest.approx((gradient * direction).sum().item(), rel=1e-6)


def undivided_loss(objective, batches):
    parts = [outputs_of(objective.model(batch).logits, batch) for batch in batches]
    vectors, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("vectors", "labels"))
    outputs = Outputs(vectors, labels, tuple(n for part in parts for n in part.sequences))
    return objective.step_loss(outputs).sum().item()


ALONE = {  # not fp16, whose sums of several micro-batches overflow, and skip a step, less often
    "bf16": {"train.precision": "bf16"},
    "average": {"regularize.ema_decay": 0.9},
    "LoRA": {"model.lora.rank": 4, "model.lora.frozen_weights": "int8"},
    "recomputed": {"train.activation_checkpointing": True},
    "short of memory": {},
}
TOGETHER = {key: value for name in ("average", "LoRA", "recomputed") for key, value in ALONE[name].items()}


@pytest.mark.parametrize("name", ["together", *(pytest.param(name, marks=pytest.mark.slow) for name in ALONE)])
def test_split_steps_are_the_undivided_with_each_setting(tmp_path, monkeypatch, capsys, name):
    """With every setting of training, in micro-batches that are given or halved where memory is short."""
    changes = (ALONE | {"together": TOGETHER})[name]
    settings = write("sentence-embedding", tmp_path) | {
        "train.max_steps": 4,
        "model.dropout.all": 0.0,
        "optim.lr": 1e-2,
    }
    losses, is_short = [], name in ("short of memory", "together")
    for folder, more in (("whole", {}), ("split", {} if is_short else {"train.micro_batch_size": 3})):
        if folder == "split" and is_short:
            limit_memory(monkeypatch, 150)
        config = configs.override(Config(), settings | changes | more | {"run.folder": str(tmp_path / folder)})
        capsys.readouterr()
        run_training(config)
        losses.append([row["loss"] for row in logged_rows(config.run.folder) if "loss" in row])
    assert ("step 1: out of memory; from here on" in capsys.readouterr().out) == is_short
    assert len(losses[0]) >= 4
    assert losses[1] == pytest.approx(losses[0], rel=5e-2 if name == "bf16" else 1e-4)


def random_outputs(texts, seed=0):
    """Return outputs with random vectors for rows of texts, as numbers, and the vectors."""
    flat = [text for row in texts for text in row]
    vectors = torch.randn(len(flat), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([[-100, 7, text] for text in flat])
    return Outputs(vectors, labels, tuple(map(len, texts)))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_loss_is_that_of_sentence_transformers(similarity):
    """MultipleNegativesRankingLoss: cross entropy of scale * similarity(anchors, positives and negatives)."""
    texts = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    outputs = random_outputs(texts)
    anchors, positives, negatives = outputs.vectors.view(4, 3, 5).unbind(1)
    candidates = torch.cat([positives, negatives])
    if similarity == "cosine":
        scores = F.cosine_similarity(anchors[:, None], candidates[None], dim=-1)
    else:
        scores = anchors @ candidates.T
    expected = F.cross_entropy(20 * scores, torch.arange(4), reduction="none")
    torch.testing.assert_close(in_batch_negatives_loss(outputs, similarity, 20.0), expected, rtol=1e-12, atol=1e-12)


def test_texts_that_fit_are_no_negatives():
    """Against loops over texts: own text, and positives of all rows with the same anchor."""
    rng = random.Random(0)
    texts = [[rng.randrange(6) for _ in range(rng.randint(2, 4))] for _ in range(12)]
    outputs = random_outputs(texts)
    rows = [list(part) for part in F.normalize(outputs.vectors, dim=1).split([len(row) for row in texts])]
    candidates = [(i, 1, row[1]) for i, row in enumerate(texts)]
    candidates += [(i, k, text) for i, row in enumerate(texts) for k, text in enumerate(row) if k > 1]
    masked = 0
    for i, row in enumerate(texts):
        known = {other[1] for other in texts if other[0] == row[0]} | {row[0]}
        kept = [(j, k) for j, k, text in candidates if text not in known and (j, k) != (i, 1)]
        masked += len(candidates) - 1 - len(kept)
        scores = torch.stack([rows[i][0] @ rows[j][k] for j, k in [(i, 1), *kept]]) * 20
        expected = -scores.log_softmax(0)[0]
        assert in_batch_negatives_loss(outputs, "cosine", 20.0)[i].item() == pytest.approx(expected.item(), abs=1e-9)
    assert masked > 20
    assert find_known_fits(torch.arange(9), 3).sum() == 0


@torch.no_grad()
def test_metrics_equal_a_search_by_hand(written):
    config, examples = written
    model = objective_of(config, 0.0).model.eval()
    batch = examples.batch(range(len(examples)))
    found = TASK.compute_metrics(TASK.evaluate_batch(model, batch, examples, config.generate), ())
    rows = [json.loads(line) for line in Path(config.data.train).read_text().splitlines()]
    vectors = [list(part) for part in F.normalize(model(batch).logits, dim=1).split(list(batch.sequences))]
    candidates = {}
    for row, own in zip(rows, vectors, strict=True):
        texts = [row["positive"], *([row["negative"]] if row["negative"] else [])]
        candidates |= {text.strip(): vector for text, vector in zip(texts, own[1:], strict=True)}
    ranks, losses = [], []
    for row, own in zip(rows, vectors, strict=True):
        right = {other["positive"].strip() for other in rows if other["anchor"].strip() == row["anchor"].strip()}
        scores = {text: float(own[0] @ vector) for text, vector in candidates.items() if text != row["anchor"].strip()}
        best = max(scores[text] for text in right)
        wrong = [score for text, score in scores.items() if text not in right]
        ranks.append(1 + sum(score >= best for score in wrong))
        positive = scores[row["positive"].strip()]
        losses.append(torch.tensor([positive, *wrong]).mul(20).logsumexp(0).item() - 20 * positive)
    count = len(rows)
    assert found["candidates"] == len(candidates)
    assert found["accuracy@1"] == pytest.approx(sum(rank == 1 for rank in ranks) / count)
    assert found["accuracy@10"] == pytest.approx(sum(rank <= 10 for rank in ranks) / count)
    assert found["mrr@10"] == pytest.approx(sum(1 / rank for rank in ranks if rank <= 10) / count)
    assert found["loss"] == pytest.approx(sum(losses) / count, rel=1e-5)
    assert 0 < found["accuracy@1"] < 1


def test_equal_vectors_find_nothing(written):
    """A collapsed model has the worst rank, not the best."""
    config, examples = written
    model = objective_of(config, 0.0).model.eval()
    model.head.forward = lambda hidden, packing, inputs: (torch.ones(len(inputs.lengths), 24), torch.zeros(()))
    with torch.no_grad():
        statistics = TASK.evaluate_batch(model, examples.batch(range(24)), examples, config.generate)
    assert TASK.compute_metrics(statistics, ())["accuracy@10"] == 0


def test_large_data_sets_keep_every_second_example(written, monkeypatch):
    config, examples = written
    model = objective_of(config, 0.0).model.eval()
    monkeypatch.setattr("engine.metrics.sentence_embedding.MAX_VALUES", int(examples.sequences[-1]) * 27 - 1)
    with torch.no_grad():
        whole = TASK.evaluate_batch(model, examples.batch(range(24)), examples, config.generate)
        parts = [
            TASK.evaluate_batch(model, examples.batch(part), examples, config.generate)
            for part in ([], [1], range(2, 9))
        ]
    assert (whole[2:].view(-1, 27)[:, 0] == 1).sum() == 12
    assert torch.equal(parts[0], torch.zeros_like(whole))
    assert sum((part[2:].view(-1, 27)[:, 0] == 1).sum() for part in parts) == 4  # the second, fourth, ... of 2 to 8


def test_steps_of_one_pair_without_negatives_are_refused(written):
    alone = configs.override(written[0], {"train.global_batch_size": 1})
    configs.check(alone)  # it has a column of negatives
    with pytest.raises(ConfigError, match="global_batch_size = 1 leaves each anchor without other texts"):
        configs.check(configs.override(alone, {"sentence_embedding.negative_columns": ""}))


def test_windows_are_refused_with_the_reason(written):
    config = configs.override(written[0], {"data.long_texts": "windows"})
    with pytest.raises(ConfigError, match="no effect on sentence-embedding: a text has one vector"):
        task_settings(config, TASK)


@pytest.mark.parametrize("name", ["r_drop_weight", "fgm_epsilon", "distillation_weight"])
def test_what_reads_single_examples_is_refused(written, name):
    model = objective_of(written[0], 0.1).model
    with pytest.raises(ConfigError, match=rf"regularize\.{name} = 0\.5 needs the loss of each example alone"):
        training_objective(model, replace(RegularizeSettings(), **{name: 0.5}), None, "", lambda outputs: outputs)


def test_shared_texts_are_counted(written):
    assert any("3 of 24 rows share a text with another one" in note for note in written[1].notes)


def test_misspelt_column_of_negatives_is_named(written):
    own = settings_of(configs.override(written[0], {"sentence_embedding.negative_columns": "negativ"}))
    with pytest.raises(DataError, match="no row has the column 'negativ' of negatives"):
        TASK.read(written[0].data.train, own, True)
