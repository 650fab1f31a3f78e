"""One rank of HF Trainer on the same examples, in the same steps, cut into the same micro-batches.

    torchrun --nproc-per-node 2 -m benchmarks.strategies.trainer FOLDER

The examples are encoded by our encoder and taken from our loader, so that both sides differ in nothing but how they
average. Rank 0 writes FOLDER/losses.hf.W.json, as ranks.py does. Everything else is Trainer's default.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.strategies.models_and_data import GLOBAL_BATCH_SIZE, SUBJECTS
from benchmarks.strategies.ranks import ACCUMULATIONS
from data import IGNORE_INDEX, Batch, Examples, MicroBatching, training_steps
from engine import config as configs
from engine.config import Config
from engine.model import build_model
from engine.tasks import find_task, read_training_data
from engine.validate import task_settings

Feature = dict[str, Any]


def read_examples(config: Config) -> Examples:
    """Return the training examples of a recipe, encoded."""
    task, _ = find_task(config.run.task)
    settings = task_settings(config, task)
    rows, _, _, labels, _ = read_training_data(task, settings, config.run.seed)
    model, folder = build_model(config.model, task, labels, 0.0, config.run.seed, None)
    return task.encoder(task.load_processor(folder), settings, model.labels)(rows)


def feature_of(batch: Batch, task: str) -> Feature:
    """Return a batch of one example as transformers' models read it."""
    if batch.labels is None:
        raise ValueError("an example without labels")
    if batch.pixel_values is not None:
        return {"pixel_values": batch.pixel_values[0], "labels": int(batch.labels[0])}
    if batch.input_ids is None:
        raise ValueError("an example without tokens")
    ids, labels = batch.input_ids.tolist(), batch.labels.tolist()
    if task == "dialogue":  # ours are shifted: the last one is a target only
        ids, labels = [*ids, labels[-1]], [IGNORE_INDEX, *labels]
    return {"input_ids": ids, "labels": labels}


def features_in_order(examples: Examples, config: Config, ranks: int, accumulation: int) -> list[Feature]:
    """Return a feature for each place of the run: step by step, in it by micro-batch, in that by rank."""
    size = GLOBAL_BATCH_SIZE // (ranks * accumulation)
    by_rank = [
        training_steps(examples, GLOBAL_BATCH_SIZE, config.run.seed, MicroBatching(size, 0, rank, ranks))
        for rank in range(ranks)
    ]
    features = []
    for _ in range(config.train.max_steps):
        step = [next(steps) for steps in by_rank]
        cuts = [batch.indices for micro_batches in zip(*step, strict=True) for batch in micro_batches]
        singles = [examples.batch(torch.tensor([index]).numpy()) for cut in cuts for index in cut]
        features += [feature_of(single, config.run.task) for single in singles]
    return features


def collate(features: list[Feature], pad: int) -> dict[str, torch.Tensor]:
    """Pad a micro-batch on the right."""
    if "pixel_values" in features[0]:
        labels = torch.tensor([feature["labels"] for feature in features])
        return {"pixel_values": torch.stack([feature["pixel_values"] for feature in features]), "labels": labels}
    padded = {
        name: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(feature[name]) for feature in features], batch_first=True, padding_value=fill
        )
        for name, fill in (("input_ids", pad), ("labels", IGNORE_INDEX))
    }
    lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
    mask = torch.arange(padded["input_ids"].shape[1]) < lengths[:, None]
    return padded | {"attention_mask": mask.long()}


def losses_of(name: str, config: Config, features: list[Feature], ranks: int, accumulation: int) -> list[float]:
    """Return the losses that HF Trainer logs, one a step."""
    import transformers
    from transformers import Trainer, TrainerCallback, TrainingArguments

    losses: list[float] = []

    class Watch(TrainerCallback):
        def on_log(self, *_: Any, **told: Any) -> None:
            losses.extend([told["logs"]["loss"]] if "loss" in told["logs"] else [])

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(features)

    model = getattr(transformers, SUBJECTS[name].hub_class).from_pretrained(config.model.name)
    arguments = TrainingArguments(
        output_dir=str(Path(config.run.folder).with_name(f"trainer.{ranks}.{accumulation}")),
        per_device_train_batch_size=GLOBAL_BATCH_SIZE // (ranks * accumulation),
        gradient_accumulation_steps=accumulation,
        max_steps=config.train.max_steps,
        learning_rate=config.optim.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=config.train.max_grad_norm,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo" if ranks > 1 else None,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=features,
        data_collator=partial(collate, pad=getattr(model.config, "pad_token_id", None) or 0),
        callbacks=[Watch()],
    )
    trainer.train()
    return losses


def main(argv: list[str]) -> None:
    """Train every subject in every accumulation."""
    sys.modules["datasets"] = None  # type: ignore[assignment]  # else transformers takes a folder for the package
    folder, ranks, rank = Path(argv[0]), int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    found: dict[str, dict[int, list[float]]] = {}
    for name in SUBJECTS:
        config = configs.read_recipe(str(folder / name / "recipe.toml"))
        examples = read_examples(config)
        for accumulation in ACCUMULATIONS:
            features = features_in_order(examples, config, ranks, accumulation)
            found.setdefault(name, {})[accumulation] = losses_of(name, config, features, ranks, accumulation)
    if rank == 0:
        (folder / f"losses.hf.{ranks}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
