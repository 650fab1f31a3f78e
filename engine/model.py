"""The model that a recipe asks for, new or as an earlier part of the run left it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import models
from engine.config import ModelSettings, TrainSettings
from engine.tasks import Task
from models import TaskModel


def build_model(
    settings: ModelSettings,
    task: Task,
    labels: Sequence[str],
    label_smoothing: float,
    seed: int,
    resumed: Path | None,
) -> tuple[TaskModel, Path]:
    """Return (the model on the CPU, the folder that has its tokenizer).

    resumed: a checkpoint of this run, whose weights replace those that the recipe names. With LoRA it holds merged
    weights, so the run starts from the recipe's weights again and takes only the adapter from the checkpoint.
    """
    start = settings
    if resumed is not None and not settings.lora.rank:
        # The checkpoint has been made shallower and partly reset already.
        start = replace(
            settings,
            name=str(resumed),
            sha256="",
            init="pretrained",
            head_init="auto",
            keep_layers=0,
            reinit_layers=0,
        )
    rates = start.dropout.rates()
    if start.dropout.head is None and task.head in models.HEADS and models.HEADS[task.head].is_language_model:
        rates.pop("head", None)  # such a head has no dropout, so `all` does not mean it
    model = models.from_pretrained(
        start.name,
        head=task.head,
        labels=labels or None,
        problem=task.problem,
        init=start.init,
        head_init=start.head_init,
        pooling=start.pooling or None,
        dropout=rates,
        label_smoothing=label_smoothing,
        keep_layers=start.keep_layers,
        reinit_layers=start.reinit_layers,
        seed=seed,
        sha256=start.sha256,
    )
    models.freeze(model, start.freeze)
    if start.lora.rank:
        lora = start.lora
        targets = lora.target_modules or models.lora.DEFAULT_TARGETS
        models.add_lora(model, lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=targets, seed=seed)
        if resumed is not None:
            models.load_adapter(model, resumed)
    return model, models.hub.resolve(start.name)


def apply_machine_settings(model: TaskModel, settings: TrainSettings) -> None:
    """Compile the layers or checkpoint their activations, as the settings say; neither changes what they compute."""
    if settings.compile:
        models.compile_layers(model)
    if settings.activation_checkpointing:
        models.checkpoint_activations(model)
