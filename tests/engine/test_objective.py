"""What is minimised beside the loss of a head: R-Drop, FGM, a teacher. Each against a plain one, and P1 for each.

This file is also what torchrun runs, for the ranks.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import tiny_models as tiny
from support import zoo
from support.runs import StopAfter, assert_same_run, logged_rows, run_module, run_training, write_reviews
from torch import Tensor, nn

import models
from data import Batch
from data.examples import count_targets
from engine import distributed, objective, optim
from engine.config import ConfigError, RegularizeSettings
from engine.objective import training_objective
from engine.precision import Precision
from models.heads import PROBLEMS
from models.inputs import IGNORE_INDEX

HEADS = ("sequence-classification", "token-classification", "question-answering", "relation-classification")
TEXTS = [
    *(("bert", head) for head in (*HEADS, "masked-lm")),
    *(("gpt2", head) for head in ("sequence-classification", "causal-lm")),
    *(("t5", head) for head in ("seq2seq-lm", "question-answering")),
    ("roberta", "token-classification"),
    ("distilbert", "sequence-classification"),
]
IMAGES = [("vit", "image-classification"), ("deit", "distilled-image-classification")]
TAUGHT = [("bert", "sequence-classification"), ("bert", "relation-classification"), *IMAGES]
each_text = pytest.mark.parametrize(("kind", "head"), TEXTS)
each_case = pytest.mark.parametrize(("kind", "head"), TEXTS + IMAGES)
each_taught = pytest.mark.parametrize(("kind", "head"), TAUGHT)


def build(folder: Path, kind: str, head: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float64, **options):
    """(a tiny random model in training, a batch of it); one example has no target."""
    rates = dict.fromkeys(("embedding", "attention", "hidden", "head"), dropout)
    rates = {site: rate for site, rate in rates.items() if site != "head" or not models.HEADS[head].is_language_model}
    model = tiny.scratch(folder, kind, head, dropout=rates, **options).to(dtype).train()
    inputs = tiny.inputs_of(model, problem=options.get("problem", "single-label"))
    no_target = tiny.select(inputs, head, [2]).labels
    no_target[...] = torch.nan if no_target.is_floating_point() else IGNORE_INDEX
    inputs = tiny.replace_labels(inputs, head, 2, no_target)
    return model, as_batch(inputs, range(tiny.count_examples(inputs)))


def as_batch(inputs: Any, indices) -> Batch:
    """What the loader would make of models.Inputs; these examples are at `indices` of their data set."""
    targets = count_targets(inputs.labels.numpy())
    fields = vars(inputs) | {"num_targets": targets}
    return Batch(**fields, indices=tuple(indices), ids=tuple(map(str, indices)))


def part(batch: Batch, head: str, chosen: list[int]) -> Batch:
    return as_batch(tiny.select(batch, head, chosen), [batch.indices[i] for i in chosen])


def teacher_of(model: models.TaskModel, batch: Batch, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(len(batch.indices), len(model.labels), generator=generator)


def gradients(module: nn.Module, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """(loss, {name: gradient}) of one step that is cut into these micro-batches."""
    module.zero_grad()
    loss = 0.0
    for batch in batches:
        out = module(batch)
        out.loss_sum.backward()
        loss += out.loss_sum.item()
    return loss, {name.removeprefix("model."): p.grad.clone() for name, p in module.named_parameters()}


def assert_same(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]], tolerance=1e-12):
    """Equal losses, and gradients to `tolerance` of the largest."""
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance, abs=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    scale = max(gradient.abs().max().item() for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(
            ours[1][name], gradient, rtol=0, atol=5 * tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


class Wobble(nn.Dropout):
    """A dropout without chance: what it drops depends on its input and on whether the pass is even or odd."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.2 * torch.cos(x + Wobble.passes % 2))


def without_chance(model: nn.Module) -> None:
    """Two passes still differ, but a cut can be compared with another."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, Wobble(0.1))
        for rate in ("dropout", "path"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)

    def count(*_: Any) -> None:
        Wobble.passes += 1

    Wobble.passes = 0
    model.register_forward_pre_hook(count)


def test_without_any_of_them_the_loop_has_the_model_itself(tmp_path):
    model, _ = build(tmp_path, "bert", "sequence-classification")
    assert training_objective(model, RegularizeSettings(), None) is model


# R-Drop


def divergence(head: str, problem: str, first: Tensor, second: Tensor, batch: Batch) -> Tensor:
    """The term of the published code, (KL(p || q) + KL(q || p)) / 2, target by target."""

    def both_ways(a: Tensor, b: Tensor) -> Tensor:
        there = F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none").sum()
        back = F.kl_div(b.log_softmax(-1), a.softmax(-1), reduction="none").sum()
        return (there + back) / 2

    labels, total = batch.labels, torch.zeros((), dtype=torch.float64)
    if head == "question-answering":
        pairs = zip(first.split(batch.lengths), second.split(batch.lengths), labels, strict=True)
        for a, b, target in pairs:
            total = total + sum(both_ways(a[:, k], b[:, k]) / 2 for k in (0, 1) if target[k] != IGNORE_INDEX)
        return total
    if problem == "multi-label":
        for a, b, target in zip(first.flatten(), second.flatten(), labels.flatten(), strict=True):
            if not target.isnan():
                total = total + both_ways(torch.stack([a, a * 0]), torch.stack([b, b * 0]))
        return total
    kept = torch.ones(len(first)) if head.endswith("-lm") else labels != IGNORE_INDEX
    for i in range(len(first)):
        if kept[i]:
            total = total + both_ways(first[i], second[i])
    return total


@each_case
def test_r_drop_is_the_published_loss_of_two_passes(tmp_path, kind, head):
    check_r_drop(*build(tmp_path, kind, head, dropout=0.3))


def test_r_drop_of_several_labels_is_of_each_of_them(tmp_path):
    check_r_drop(*build(tmp_path, "bert", "sequence-classification", problem="multi-label", dropout=0.3))


def check_r_drop(model, batch):
    """Against two passes of the model with the same draws."""
    head, problem = model.head_name, model.head.shape.problem
    torch.manual_seed(3)
    ours = gradients(training_objective(model, RegularizeSettings(r_drop_weight=1.7), None), [batch])
    model.zero_grad()
    torch.manual_seed(3)
    first, second = model(batch), model(batch)
    apart = divergence(head, problem, first.logits, second.logits, batch)
    assert apart > 1e-3
    loss = (first.loss_sum + second.loss_sum) / 2 + 1.7 * apart
    loss.backward()
    assert_same(ours, (loss.item(), {name: p.grad for name, p in model.named_parameters()}))


def test_r_drop_of_mixed_labels_skips_unlabelled_examples(tmp_path):
    """Shares of classes, as mixup makes them."""
    model, batch = build(tmp_path, "vit", "image-classification", dropout=0.3)
    shares = teacher_of(model, batch).double().softmax(-1)
    shares[2] = torch.nan
    torch.manual_seed(3)
    loss = training_objective(model, RegularizeSettings(r_drop_weight=1.0), None)(
        replace(batch, labels=shares)
    ).loss_sum
    torch.manual_seed(3)
    first, second = model(replace(batch, labels=shares)), model(replace(batch, labels=shares))
    apart = divergence("image-classification", "single-label", first.logits, second.logits, batch)
    torch.testing.assert_close(loss, (first.loss_sum + second.loss_sum) / 2 + apart)


def test_r_drop_needs_the_logits_of_a_language_model(tmp_path):
    model, batch = build(tmp_path, "gpt2", "causal-lm")
    logits = model(batch).logits
    assert model.head.log_probabilities(logits, batch).shape == (batch.num_targets, len(logits[0]))
    with pytest.raises(TypeError, match="need the logits of all targets"):
        model.head.log_probabilities(logits[:0], batch)


# FGM


def by_hand(model: models.TaskModel, one: Batch, size: float) -> tuple[float, float]:
    """FGM of one text as most write it: two backward passes, the second with moved embeddings, onto .grad.

    Returns the two losses.
    """
    seen: list[Tensor] = []
    embedding = model.backbone.word_embeddings
    hook = embedding.register_forward_hook(lambda module, inputs, output: seen.append(output))
    clean = model(one).loss_sum
    hook.remove()
    source = seen[0]  # of an encoder-decoder, what the encoder reads: it runs first
    source.retain_grad()
    clean.backward()
    moved = source.detach() * 0 if not source.grad.any() else size * source.grad / source.grad.norm()
    calls: list[int] = []

    def move(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(0)
        return output + moved if len(calls) == 1 else output

    hook = embedding.register_forward_hook(move)
    worse = model(one).loss_sum
    hook.remove()
    worse.backward()
    return clean.item(), worse.item()


@each_text
def test_fgm_is_a_second_backward_with_each_text_moved_alone(tmp_path, kind, head):
    model, batch = build(tmp_path, kind, head)
    ours = gradients(training_objective(model, RegularizeSettings(fgm_epsilon=0.1), None), [batch])
    model.zero_grad()
    losses = [by_hand(model, part(batch, head, [i]), 0.1) for i in range(len(batch.lengths))]
    clean, worse = (sum(of_all) for of_all in zip(*losses, strict=True))
    assert worse > clean * 1.001
    assert_same(ours, (clean + worse, {name: p.grad for name, p in model.named_parameters()}))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_fgm_takes_every_problem_and_labels_without_a_target(tmp_path, problem):
    model, batch = build(tmp_path, "bert", "sequence-classification", problem=problem)
    found = training_objective(model, RegularizeSettings(fgm_epsilon=0.1), None)(batch).loss_sum
    assert found > 2 * model(batch).loss_sum > 0
    batch.labels[...] = torch.nan if batch.labels.is_floating_point() else IGNORE_INDEX
    loss, none = gradients(training_objective(model, RegularizeSettings(fgm_epsilon=0.1), None), [batch])
    assert loss == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in none.values())


def directions(monkeypatch: pytest.MonkeyPatch, module: nn.Module, batch: Batch, dtype=None) -> Tensor:
    """(T, D) the way in which FGM moves the embeddings, under autocast in `dtype`; its backward is not under it."""
    seen: list[Tensor] = []
    unit_norm_per_sequence, grad = objective.unit_norm_per_sequence, torch.autograd.grad

    def watched(*args: Any, **kwargs: Any) -> Any:
        assert not torch.is_autocast_enabled("cpu")
        return grad(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", watched)
        patch.setattr(
            objective, "unit_norm_per_sequence", lambda *args: seen.append(unit_norm_per_sequence(*args)) or seen[-1]
        )
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            out = module(batch)
        out.loss_sum.backward()
    assert out.loss_sum.isfinite()
    assert out.loss_sum.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in module.parameters())
    return seen[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "head", "small"),
    [
        ("bert", "sequence-classification", False),
        ("bert", "sequence-classification", True),
        ("t5", "seq2seq-lm", False),
    ],
)
def test_fgm_moves_the_same_way_in_16_bits(tmp_path, monkeypatch, kind, head, small, dtype):
    """small: also where the gradient is below what fp16 can hold."""
    model, batch = build(tmp_path, kind, head, dtype=torch.float32)
    if small:
        batch.labels[batch.labels != IGNORE_INDEX] = 1
        with torch.no_grad():
            model.head.classifier.weight.mul_(1e-3)
            model.head.classifier.bias.copy_(torch.tensor([0.0, 11.0, 0.0]))
    module = training_objective(model, RegularizeSettings(fgm_epsilon=1.0), None)
    exact = directions(monkeypatch, module, batch)
    rounded = directions(monkeypatch, module, batch, dtype)
    pairs = [*zip(exact.split(batch.lengths), rounded.split(batch.lengths), strict=True)]
    assert not any(move.any() for move in pairs[2])  # which has no target
    moved = [(a, b) for a, b in pairs if a.any()]
    assert len(moved) >= len(pairs) - 2
    for a, b in moved:
        assert b.norm() == pytest.approx(1.0, abs=1e-5)
        assert (a * b).sum() > 0.99


def test_unit_norm_is_per_sequence_and_zero_for_non_finite():
    packing = models.ops.packing.Packing.from_lengths([2, 1, 3, 1])
    gradient = torch.tensor([[3.0, 0], [0, 4], [1e-30, 0], [0, 0], [0, 0], [0, 0], [torch.inf, 1]])
    moved = objective.unit_norm_per_sequence(gradient, packing)
    assert moved.dtype == torch.float32
    expected = torch.tensor([[0.6, 0], [0, 0.8], [1, 0], [0, 0], [0, 0], [0, 0], [0, 0]])
    torch.testing.assert_close(moved, expected)
    assert not objective.unit_norm_per_sequence(torch.full_like(gradient, torch.nan), packing).any()
    assert objective.unit_norm_per_sequence(gradient[:0], models.ops.packing.Packing.from_lengths([])).shape == (0, 2)


def test_a_frozen_embedding_is_moved_as_well(tmp_path):
    model, batch = build(tmp_path, "bert", "sequence-classification")
    loss, free = gradients(training_objective(model, RegularizeSettings(fgm_epsilon=0.5), None), [batch])
    frozen = set(models.freeze(model, ["backbone.*embedding*"]))
    module = training_objective(model, RegularizeSettings(fgm_epsilon=0.5), None)
    module.zero_grad()
    out = module(batch)
    out.loss_sum.backward()
    assert out.loss_sum.item() == loss
    found = {name: p.grad for name, p in model.named_parameters()}
    assert {name for name, gradient in found.items() if gradient is None} == frozen
    for name in free.keys() - frozen:
        torch.testing.assert_close(found[name], free[name], rtol=1e-12, atol=1e-12)


def test_fgm_and_lora_train_the_adapters_alone(tmp_path):
    model, batch = build(tmp_path, "bert", "token-classification")
    models.add_lora(model, 2)
    training_objective(model, RegularizeSettings(fgm_epsilon=0.5), None)(batch).loss_sum.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_hook_is_gone_after_a_pass_and_after_an_error(tmp_path):
    model, batch = build(tmp_path, "bert", "sequence-classification")
    module = training_objective(model, RegularizeSettings(fgm_epsilon=1.0), None)
    before = model(batch).loss_sum
    module(batch)
    with pytest.raises(models.ModelError, match="longer than the model"):
        module(replace(batch, lengths=(99,)))
    assert not model.backbone.word_embeddings._forward_hooks
    assert torch.equal(model(batch).loss_sum, before)


# A teacher


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@each_taught
def test_distillation_has_the_gradient_of_the_paper(tmp_path, kind, head, temperature):
    """(1 - d)(softmax(z) - y) + d t (softmax(z / t) - softmax(v / t)) at the logits z, where there is a target."""
    model, batch = build(tmp_path, kind, head)
    teacher = teacher_of(model, batch)
    settings = RegularizeSettings(distillation_weight=0.7, distillation_temperature=temperature)
    out = training_objective(model, settings, teacher)(batch)
    z, v, target = out.logits.detach(), teacher.double(), batch.labels != IGNORE_INDEX
    y = F.one_hot(batch.labels.clamp(min=0), 3)
    expected = 0.3 * (z.softmax(-1) - y) + 0.7 * temperature * (
        (z / temperature).softmax(-1) - (v / temperature).softmax(-1)
    )
    expected[~target] = 0
    torch.testing.assert_close(torch.autograd.grad(out.loss_sum, out.logits)[0], expected, rtol=1e-12, atol=1e-12)


def test_distillation_of_several_labels_is_of_each_of_them(tmp_path):
    model, batch = build(tmp_path, "bert", "sequence-classification", problem="multi-label")
    batch.labels[1, 0] = torch.nan
    teacher, t = teacher_of(model, batch), 2.0
    out = training_objective(model, RegularizeSettings(distillation_weight=0.4, distillation_temperature=t), teacher)(
        batch
    )
    z, v = out.logits.detach(), teacher.double()
    expected = 0.6 * (z.sigmoid() - batch.labels) + 0.4 * t * ((z / t).sigmoid() - (v / t).sigmoid())
    expected[batch.labels.isnan()] = 0
    torch.testing.assert_close(torch.autograd.grad(out.loss_sum, out.logits)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("problem", ["single-label", "multi-label"])
def test_distillation_from_an_equal_teacher_has_zero_loss(tmp_path, problem):
    model, batch = build(tmp_path, "bert", "sequence-classification", problem=problem)
    with torch.no_grad():
        same = model(batch).logits
    settings = RegularizeSettings(distillation_weight=1.0, distillation_temperature=2.0)
    loss, found = gradients(training_objective(model, settings, same), [batch])
    assert abs(loss) < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in found.values())
    # Logits that say the same: for classes all of them may be higher; and numbers that leave fp32's exp.
    far = same + 100 if problem == "single-label" else same
    assert abs(training_objective(model, settings, far)(batch).loss_sum.item()) < 1e-9
    assert training_objective(model, settings, far.sign() * 1e30)(batch).loss_sum.isfinite()


def test_smoothing_and_class_weights_apply_to_labels_only(tmp_path):
    model, batch = build(tmp_path, "bert", "sequence-classification", label_smoothing=0.1)
    model.head.shape = replace(model.head.shape, class_weights=(0.5, 2.0, 3.0))
    teacher = teacher_of(model, batch)
    out = training_objective(model, RegularizeSettings(distillation_weight=0.25), teacher)(batch)
    target = batch.labels != IGNORE_INDEX
    z, v = out.logits[target], teacher[target].double()
    ours = F.cross_entropy(z, batch.labels[target], torch.tensor([0.5, 2, 3.0]).double(), None, reduction="none")
    assert ours.sum().item() != pytest.approx(model(batch).loss_sum.item())  # which is smoothed too
    agreement = (v.softmax(-1) * (v.log_softmax(-1) - z.log_softmax(-1))).sum()
    torch.testing.assert_close(out.loss_sum, 0.75 * model(batch).loss_sum + 0.25 * agreement)


def test_teacher_rows_follow_the_indices_of_the_training_set(tmp_path):
    model, batch = build(tmp_path, "bert", "sequence-classification")
    teacher, places = torch.zeros(100, 3), torch.arange(98, 0, -11)[: len(batch.indices)]
    teacher[places] = rows = teacher_of(model, batch)
    settings = RegularizeSettings(distillation_weight=1.0)
    expected = training_objective(model, settings, rows)(batch).loss_sum
    found = training_objective(model, settings, teacher)(replace(batch, indices=tuple(places.tolist()))).loss_sum
    assert torch.equal(found, expected)


# All of them together, and P1


ALL = {
    "r-drop": {"r_drop_weight": 1.5},
    "fgm_epsilon": {"fgm_epsilon": 0.6},
    "r-drop and fgm": {"r_drop_weight": 1.5, "fgm_epsilon": 0.6},
    "teacher": {"distillation_weight": 0.6, "distillation_temperature": 2.0},
    "all": {"r_drop_weight": 1.5, "fgm_epsilon": 0.6, "distillation_weight": 0.6, "distillation_temperature": 2.0},
}


def cuts(count: int) -> list[list[list[int]]]:
    return [[[i] for i in range(count)], [[2], [], [0, 1], [*range(3, count)]], [[3, 0], [1, 2], [*range(4, count)]]]


P01 = [
    *((kind, head, "r-drop and fgm") for kind, head in TEXTS),
    *((kind, head, "r-drop") for kind, head in [TEXTS[0], *IMAGES]),
    *((kind, head, "fgm_epsilon") for kind, head in [TEXTS[0], ("t5", "seq2seq-lm")]),
    *((kind, head, "teacher") for kind, head in TAUGHT),
    ("bert", "sequence-classification", "all"),
]


def objective_of(folder: Path, kind: str, head: str, name: str, **options: Any) -> tuple[nn.Module, Batch]:
    """Its two passes differ where there are two, without chance."""
    settings = RegularizeSettings(**ALL[name])
    model, batch = build(folder, kind, head, dropout=0.1 if settings.r_drop_weight else 0.0, **options)
    if settings.r_drop_weight:
        without_chance(model)
    return training_objective(
        model, settings, teacher_of(model, batch) if settings.distillation_weight else None
    ), batch


@pytest.mark.parametrize(("kind", "head", "name"), P01)
def test_p01_the_cut_changes_neither_loss_nor_gradient(tmp_path, kind, head, name):
    module, batch = objective_of(tmp_path, kind, head, name)
    whole = gradients(module, [batch])
    plain = gradients(module.model, [batch])
    assert abs(whole[0] - plain[0]) > 1e-4 * plain[0]
    for cut in cuts(len(batch.indices)):
        assert_same(gradients(module, [part(batch, head, chosen) for chosen in cut]), whole)


@pytest.mark.parametrize("name", ALL)
def test_p01_of_several_labels(tmp_path, name):
    module, batch = objective_of(tmp_path, "bert", "sequence-classification", name, problem="multi-label")
    whole = gradients(module, [batch])
    for cut in cuts(len(batch.indices)):
        chosen = [part(batch, "sequence-classification", some) for some in cut]
        assert_same(gradients(module, chosen), whole)


@pytest.mark.parametrize(("kind", "head", "name"), P01)
def test_p01_an_empty_batch_has_zero_gradient_everywhere(tmp_path, kind, head, name):
    module, batch = objective_of(tmp_path, kind, head, name)
    loss, found = gradients(module, [part(batch, head, [])])
    assert loss == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found.values())


RANKED = [
    ("bert", "sequence-classification", "all"),
    ("bert", "question-answering", "r-drop and fgm"),
    ("t5", "seq2seq-lm", "r-drop and fgm"),
]


def on_one_of_two_ranks(folder: Path) -> None:
    """The step of each case, by what torchrun starts: rank 1 has three of the examples and an empty micro-batch."""
    ranks = distributed.setup("cpu")
    for i, (kind, head, name) in enumerate(RANKED):
        module, batch = objective_of(folder / f"{ranks.rank}-{i}", kind, head, name)
        every = len(batch.indices)
        mine = [[0, 3], [*range(5, every)]] if ranks.rank == 0 else [[1, 2, 4], []]
        parallel = distributed.wrap(module, ranks, part(batch, head, []), Precision("fp32", ranks.device)).train()
        for step, chosen in enumerate(mine):
            distributed.set_gradient_sync(parallel, last=step == 1)
            (parallel(part(batch, head, chosen)).loss_sum * ranks.world_size).backward()
        found = {name.removeprefix("model."): p.grad for name, p in module.named_parameters()}
        torch.save(found, folder / f"gradients-{ranks.rank}-{i}.pt")


def test_p01_two_ranks_have_the_gradients_of_one(tmp_path):
    done = run_module("test_objective", tmp_path, ranks=2, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    for i, (kind, head, name) in enumerate(RANKED):
        module, batch = objective_of(tmp_path / str(i), kind, head, name)
        whole = gradients(module, [batch])
        for rank in range(2):
            found = torch.load(tmp_path / f"gradients-{rank}-{i}.pt")
            assert_same((whole[0], found), whole)


# Against transformers, padded


def padded_oracle(tmp_path: Path):
    """(transformers' BERT classifier in fp64, ours of its file, the batch, its padded inputs); only the head drops."""
    oracle = zoo.save_oracle(
        tmp_path / "hub",
        "bert",
        "sequence-classification",
        num_labels=3,
        dtype=torch.float64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.4,
    ).train()
    ours = models.from_pretrained(tmp_path / "hub", head="sequence-classification", dropout={"head": 0.4})
    ours = ours.to(torch.float64).train()
    inputs = tiny.inputs_of(ours)
    padded = zoo.oracle_inputs("bert", "sequence-classification", inputs)
    return oracle, ours, as_batch(inputs, range(len(inputs.lengths))), padded


def compare_with_oracle(oracle, loss: Tensor, ours, module: nn.Module, batch: Batch, folder: Path, seed: int) -> None:
    loss.backward()
    torch.manual_seed(seed)
    out = module(batch)
    (out.loss_sum / len(batch.indices)).backward()
    assert out.loss_sum.item() / len(batch.indices) == pytest.approx(loss.item(), rel=1e-10)
    theirs, found = zoo.oracle_gradients(oracle, folder / "theirs"), zoo.our_gradients(ours)
    scale = max(gradient.abs().max().item() for gradient in found.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=1e-10 * scale, msg=name)


def test_r_drop_is_that_of_a_padded_loop_around_transformers(tmp_path):
    oracle, ours, batch, padded = padded_oracle(tmp_path)
    labels = padded.pop("labels")
    torch.manual_seed(5)
    first, second = oracle(**padded).logits, oracle(**padded).logits
    there = F.kl_div(first.log_softmax(-1), second.softmax(-1), reduction="batchmean")
    back = F.kl_div(second.log_softmax(-1), first.softmax(-1), reduction="batchmean")
    loss = 0.5 * (F.cross_entropy(first, labels) + F.cross_entropy(second, labels)) + 3.0 * (there + back) / 2
    module = training_objective(ours, RegularizeSettings(r_drop_weight=3.0), None)
    compare_with_oracle(oracle, loss, ours, module, batch, tmp_path, seed=5)


def test_fgm_is_that_of_a_padded_loop_around_transformers(tmp_path):
    oracle, ours, batch, padded = padded_oracle(tmp_path)
    labels = padded.pop("labels")
    torch.manual_seed(5)
    x = oracle.get_input_embeddings()(padded.pop("input_ids"))
    clean = F.cross_entropy(oracle(inputs_embeds=x, **padded).logits, labels)
    (gradient,) = torch.autograd.grad(clean, x, retain_graph=True)
    moved = 0.9 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None]
    worse = F.cross_entropy(oracle(inputs_embeds=x + moved, **padded).logits, labels)
    module = training_objective(ours, RegularizeSettings(fgm_epsilon=0.9), None)
    compare_with_oracle(oracle, clean + worse, ours, module, batch, tmp_path, seed=5)


# Whole runs


def test_p04_resume_is_exact_with_all_of_them(tiny, reviews, tmp_path):
    teacher = tmp_path / "teacher.jsonl"
    ids = [json.loads(line)["id"] for line in reviews.read_text().splitlines()]
    teacher.write_text("".join(json.dumps({"id": i, "logits": [len(i), int(i[1:]) % 7]}) + "\n" for i in ids))
    changes = {f"regularize.{name}": value for name, value in ALL["all"].items()} | {"data.teacher_file": str(teacher)}
    changes |= {"train.max_steps": 8, "eval.every_steps": 4, "train.micro_batch_size": 5}
    whole, parted = str(tmp_path / "whole"), str(tmp_path / "parted")
    run_training(tiny(**changes, **{"run.folder": whole}))
    assert run_training(tiny(**changes, **{"run.folder": parted}), StopAfter(3)) is None
    resumed = tiny(**changes, **{"run.folder": parted, "run.resume": "yes"})
    taught = teacher.read_text()
    teacher.write_text(taught.replace('"logits": [2,', '"logits": [3,'))
    with pytest.raises(ConfigError, match="data is not the same"):  # another teacher than before
        run_training(resumed)
    teacher.write_text(taught)
    run_training(resumed)
    assert_same_run(whole, parted)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_sixteen_examples_are_learned_with_r_drop_and_fgm(tiny, tmp_path, precision):
    few = str(write_reviews(tmp_path / "few.jsonl", 16))
    changes = {
        "regularize.r_drop_weight": 0.5,
        "regularize.fgm_epsilon": 0.1,
        "train.precision": precision,
        "optim.lr": 3e-3,
    }
    changes |= {"data.train": few, "data.validation": few, "train.max_steps": 30, "eval.every_steps": 30}
    result = run_training(tiny(**changes))
    assert result["best_accuracy"] >= 0.9
    losses = [line["loss"] for line in logged_rows(tiny().run.folder) if "lr" in line]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


# What is refused


@pytest.mark.parametrize(
    ("kind", "head", "options", "settings", "taught", "reason"),
    [
        (
            "bert",
            "sequence-classification",
            {"problem": "regression"},
            {"r_drop_weight": 1.0},
            False,
            "r_drop_weight = 1 .*has none",
        ),
        ("bert", "sequence-classification", {"dropout": 0.0}, {"r_drop_weight": 1.0}, False, "equal without dropout"),
        ("vit", "image-classification", {}, {"fgm_epsilon": 1.0}, False, "fgm_epsilon = 1 .*reads images"),
        (
            "bert",
            "sequence-classification",
            {},
            {"distillation_weight": 0.5},
            False,
            r"distillation_weight = 0\.5 needs data\.teacher_file",
        ),
        (
            "bert",
            "sequence-classification",
            {},
            {},
            True,
            r"data\.teacher_file has no effect with regularize\.distillation_weight = 0",
        ),
        (
            "bert",
            "sequence-classification",
            {"problem": "regression"},
            {"distillation_weight": 1.0},
            True,
            "a regression does not",
        ),
        (
            "bert",
            "token-classification",
            {},
            {"distillation_weight": 1.0},
            True,
            "the head token-classification does not learn",
        ),
        (
            "bert",
            "question-answering",
            {},
            {"distillation_weight": 1.0},
            True,
            "the head question-answering does not learn",
        ),
        ("gpt2", "causal-lm", {}, {"distillation_weight": 1.0}, True, "the head causal-lm does not learn"),
    ],
)
def test_what_has_no_effect_is_refused_in_one_sentence(tmp_path, kind, head, options, settings, taught, reason):
    model, batch = build(tmp_path, kind, head, **{"dropout": 0.1} | options)
    with pytest.raises(ConfigError, match=reason) as raised:
        training_objective(model, RegularizeSettings(**settings), teacher_of(model, batch) if taught else None)
    assert "\n" not in str(raised.value)


if __name__ == "__main__":
    on_one_of_two_ranks(Path(sys.argv[1]))


@pytest.mark.parametrize(("r_drop", "kept"), [(0.0, False), (1.0, True)])
def test_language_model_keeps_logits_in_training_for_r_drop_only(tmp_path, r_drop, kept):
    model, batch = build(tmp_path, "gpt2", "causal-lm", dropout=0.1)
    out = training_objective(model, RegularizeSettings(r_drop_weight=r_drop), None)(batch)
    assert (len(out.logits) > 0) is kept
    out.loss_sum.backward()
    assert optim.names_without_gradient(model) == []
    assert len(model.eval()(batch).logits) > 0
