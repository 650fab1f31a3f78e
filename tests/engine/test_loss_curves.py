"""The loss of 30 steps for every task of TASKS: engine/train.py against a plain loop around transformers' model.

The plain loop takes one padded batch a step, with AdamW, a linear schedule with warm-up, and clipping. The engine takes
micro-batches of packed texts. Both start with the same weights and see the same examples in each step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.runs import run_training
from support.task_data import kind_of, write
from support.task_settings import settings_of
from support.zoo import oracle_inputs, run_oracle
from torch import Tensor, nn

import models
from data import Examples, copy_tokenizer
from data.order import epoch_order
from engine import config as configs
from engine.config import Config
from engine.tasks import TASKS

STEPS, BATCH, WARMUP, LR, DECAY, CLIP, SEED = 30, 8, 6, 3e-3, 0.1, 0.5, 5

pytestmark = pytest.mark.oracle


class Relations(nn.Module):
    """Relation classification, which transformers has no class for: BERT's last layer at two markers, concatenated."""

    def __init__(self, encoder: Any, head: dict[str, Tensor]):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(*head["relation_classifier.weight"].shape[::-1])
        with torch.no_grad():
            self.classifier.weight.copy_(head["relation_classifier.weight"])
            self.classifier.bias.copy_(head["relation_classifier.bias"])

    def loss(self, batch: Any) -> Tensor:
        hidden = self.encoder(**oracle_inputs("bert", None, batch)).last_hidden_state  # (B, L, D)
        places = batch.markers[..., None].expand(-1, -1, hidden.shape[-1])
        return F.cross_entropy(self.classifier(hidden.gather(1, places).flatten(1)), batch.labels)


def begin(task: str, folder: Path) -> tuple[Config, Examples, Any]:
    """Return (the recipe, its training examples, transformers' model), with weights from one folder."""
    transformers = pytest.importorskip("transformers")
    settings = write(task, folder)
    scratch, start, row = Path(settings["model.name"]), folder / "start", TASKS[task]
    changes = {
        "run.folder": str(folder / "run"),
        "run.seed": SEED,
        "model.name": str(start),
        "model.init": "pretrained",
        "model.dropout.all": 0.0,
        "train.max_steps": STEPS,
        "train.global_batch_size": BATCH,
        "train.micro_batch_size": 3,
        "train.max_grad_norm": CLIP,
        "optim.lr": LR,
        "optim.warmup_steps": WARMUP,
        "optim.weight_decay": DECAY,
        "eval.every_steps": 1_000,
    }
    if models.HEADS[row.head].is_language_model:
        changes.pop("model.dropout.all")
        changes |= {f"model.dropout.{site}": 0.0 for site in ("embedding", "attention", "hidden")}
    config = configs.override(Config(), settings | changes)
    configs.check(config)
    data = settings_of(config)
    rows = row.read(data.data.train, data, True)
    labels = row.find_labels(data.data.train, rows, data)

    model = models.from_pretrained(
        scratch, head=row.head, labels=labels or None, problem=row.problem, init="scratch", seed=SEED
    )
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():  # none starts at zero or one, where mistakes would not show
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    models.save_pretrained(model, start)
    copy_tokenizer(scratch, start)
    class_of = getattr(transformers, models.ARCHITECTURES[kind_of(task).model_type].heads[row.head])
    oracle = class_of.from_pretrained(start).eval()  # without dropout
    if row.head == "relation-classification":
        oracle = Relations(oracle, load_file(start / "model.safetensors"))
    encode = row.encoder(row.load_processor(start), data, model.labels)
    return config, row.augment(encode(rows), rows, encode, config.augment, SEED), oracle


def plain_loop(task: str, examples: Examples, oracle: Any) -> list[float]:
    """Return the loss of each step."""
    spared = ("cls_token", "embeddings.position_embeddings")  # of a ViT, as in timm; those of texts end in ".weight"
    decayed = [p for name, p in oracle.named_parameters() if p.ndim > 1 and not name.endswith(spared)]
    others = [p for name, p in oracle.named_parameters() if p.ndim <= 1 or name.endswith(spared)]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP))
    )
    order: list[tuple[int, np.ndarray]] = []  # the epoch and the examples of each step
    losses = []
    for epoch in range(STEPS):
        chosen = epoch_order(SEED, epoch, len(examples))
        order += [(epoch, chosen[i : i + BATCH]) for i in range(0, len(chosen), BATCH)]
    for epoch, indices in order[:STEPS]:
        batch = examples.batch(np.sort(indices), epoch)
        if isinstance(oracle, Relations):
            loss = oracle.loss(batch)
        else:
            loss, _ = run_oracle(oracle, kind_of(task).model_type, TASKS[task].head, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# transformers has no head of sentence embeddings: tests/engine/tasks/test_sentence_embedding.py has their oracles.
@pytest.mark.parametrize("task", [name for name in TASKS if name != "sentence-embedding"])
def test_loss_of_30_steps_equals_a_plain_loops(task, tmp_path):
    config, examples, oracle = begin(task, tmp_path)
    assert run_training(config) is not None
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = [line["loss"] for line in lines if "loss" in line]
    theirs = plain_loop(task, examples, oracle)
    assert len(ours) == len(theirs) == STEPS
    # AdamW divides by the size of a gradient, so that a difference in rounding grows from step to step.
    differences = [abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)]
    assert max(differences[:10]) < 1e-5
    assert max(differences) < 5e-4
    assert ours[-1] < 0.9 * ours[0]  # something was learned, so the curves could have diverged
