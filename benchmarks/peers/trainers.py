"""The trainers of the comparison: ours, and each peer as its users run it. One run is one process.

compare_trainers.py starts these processes. Each function trains on a job (a dict from a JSON file) and never returns.
After its last step it writes the end times of all steps to job["out"]. Then it ends the process, whose peak memory is
that of training. If job["check"] is set, it takes one step without dropout on job["examples"] instead, and writes its
loss and gradient norm. Imports are inside the functions, so that a process imports only what its side needs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers.features import SEQ2SEQ, Job, load_features, pool_tokens
from benchmarks.peers.stopwatch import Stopwatch, on_gpu

AUTO = {
    "text-classification": "AutoModelForSequenceClassification",
    "dialogue": "AutoModelForCausalLM",
    "causal-lm": "AutoModelForCausalLM",
    "summarization": "AutoModelForSeq2SeqLM",
    "translation": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
}


def ours(job: Job) -> None:
    """`python -m engine.train`, observed where its log counts a step."""
    import runpy
    from unittest.mock import patch

    import data
    from engine.log import RunLog

    watch = Stopwatch(job)
    count, to_steps = RunLog.count_step, data.training_steps
    first: list[int] = []

    def training_steps(examples: Any, *rest: Any, **options: Any) -> Iterator[Any]:
        watch.pool = 1.0 if job["task"] == "image-classification" else float(examples.lengths.mean())
        for micro_batches in to_steps(examples, *rest, **options):
            first[:] = first or [int(i) for batch in micro_batches for i in batch.indices]
            yield micro_batches

    def counted(log: RunLog, step: int, samples: float, tokens: float, waited: float) -> None:
        count(log, step, samples, tokens, waited)
        watch.count(int(samples), int(samples if job["task"] == "image-classification" else tokens))
        if not job["check"]:
            watch.step()

    def logged(log: RunLog, step: int, loss: float, lr: float, grad_norm: float, *rest: Any) -> None:
        watch.step(loss, grad_norm, examples=first)

    patch.object(data, "training_steps", training_steps).start()  # never undone: the process ends with the run
    patch.object(RunLog, "count_step", counted).start()
    if job["check"]:
        patch.object(RunLog, "log_step", logged).start()
    sys.argv[1:] = job["arguments"]
    runpy.run_module("engine.train", run_name="__main__")


def load_model(job: Job) -> Any:
    """Load the checkpoint into transformers' class, with its own dropout; for a check without dropout."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(job["model"])
    if job["check"]:
        rates = [name for name, value in vars(config).items() if "drop" in name and isinstance(value, float)]
        config.update(dict.fromkeys(rates, 0.0))
    return getattr(transformers, AUTO[job["task"]]).from_pretrained(job["model"], config=config)


def collator(job: Job, tokenizer: Any, model: Any) -> Callable[[list[Any]], Any]:
    """Return the collator of transformers' own examples for this task."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, default_data_collator

    if tokenizer is None:
        return default_data_collator
    if job["task"] == "text-classification":
        return DataCollatorWithPadding(tokenizer)
    collate = DataCollatorForSeq2Seq(tokenizer, model=model if job["task"] in SEQ2SEQ else None)
    if job["task"] != "causal-lm":
        return collate

    def shifted(features: list[Any]) -> Any:  # the labels of blocks are shifted already
        batch = collate(features)
        return {**batch, "shift_labels": batch["labels"]}

    return shifted


def hf(job: Job, strategy: str = "random") -> None:
    """HF Trainer with its defaults (the fused AdamW among them), except for the settings of the workload."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    features, tokenizer = load_features(job)
    watch = Stopwatch(job, pool_tokens(features, job["task"]))
    model = load_model(job)

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not job["check"]:
                watch.step()

        def on_log(self, *_: Any, **told: Any) -> None:
            if job["check"]:
                watch.step(told["logs"]["loss"], told["logs"]["grad_norm"])

    class SpreadTrainer(Trainer):
        def _get_train_sampler(self, *rest: Any) -> Any:
            sampler: Any = super()._get_train_sampler(*rest)
            return spread_over_epoch(sampler, job) if strategy == "group_by_length" else sampler

    arguments = TrainingArguments(
        output_dir=str(Path(job["out"]).with_suffix(".trainer")),
        per_device_train_batch_size=job["batch_size"],
        max_steps=job["steps"],
        learning_rate=job["lr"],
        lr_scheduler_type="linear",
        warmup_steps=job["warmup_steps"],
        weight_decay=job["weight_decay"],
        max_grad_norm=job["max_grad_norm"],
        train_sampling_strategy=strategy,
        seed=job["seed"],
        bf16=job["precision"] == "bf16",
        fp16=job["precision"] == "fp16",
        torch_compile=job["compile"],
        use_cpu=not on_gpu(job),
        dataloader_pin_memory=on_gpu(job),
        dataloader_num_workers=job["num_workers"],
        logging_steps=1 if job["check"] else 500,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SpreadTrainer(
        model=model,
        args=arguments,
        train_dataset=features,
        data_collator=watch.counted(collator(job, tokenizer, model)),
        callbacks=[Watch()],
    )
    trainer.train()


def hf_grouped(job: Job) -> None:
    """HF Trainer with examples grouped by length."""
    hf(job, "group_by_length")


def spread_over_epoch(sampler: Iterable[int], job: Job) -> list[int]:
    """Return one batch per step, chosen evenly from the sampler's epoch, in random order.

    Grouping puts the longest of each 50 batches first, so the first steps of an epoch are not typical.
    """
    import random

    order, size = list(sampler), job["batch_size"]
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    if job["steps"] < len(batches):
        rng, stride = random.Random(job["seed"]), len(batches) / job["steps"]
        offset = rng.random()
        batches = [batches[int((i + offset) * stride)] for i in range(job["steps"])]
        rng.shuffle(batches)
    return [index for batch in batches for index in batch]


def decay_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: matrices and embeddings decay, biases and norms do not, as in our engine and in Trainer."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def linear_schedule(optimizer: Any, job: Job) -> Any:
    """Return transformers' linear schedule, which equals ours except for the first step of the warm-up."""
    from transformers import get_scheduler

    warmup = job["warmup_steps"] * job["steps"] if job["warmup_steps"] < 1 else job["warmup_steps"]
    return get_scheduler("linear", optimizer, num_warmup_steps=round(warmup), num_training_steps=job["steps"])


def data_loader(job: Job, features: Any, collate: Callable[[list[Any]], Any]) -> Any:
    """Return a loader of batches in random order."""
    import torch
    from torch.utils.data import DataLoader

    torch.manual_seed(job["seed"])
    return DataLoader(
        features,
        batch_size=job["batch_size"],
        shuffle=True,
        collate_fn=collate,
        num_workers=job["num_workers"],
        pin_memory=on_gpu(job),
    )


def accelerate(job: Job) -> None:
    """The loop of Accelerate's examples, with PyTorch's AdamW."""
    import torch
    from accelerate import Accelerator

    features, tokenizer = load_features(job)
    watch = Stopwatch(job, pool_tokens(features, job["task"]))
    model = load_model(job)
    mixed = "no" if job["precision"] == "fp32" else job["precision"]
    accelerator = Accelerator(cpu=not on_gpu(job), mixed_precision=mixed)
    loader = data_loader(job, features, watch.counted(collator(job, tokenizer, model)))
    optimizer = torch.optim.AdamW(decay_groups(model, job["weight_decay"]), lr=job["lr"])
    schedule = linear_schedule(optimizer, job)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    while True:
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), job["max_grad_norm"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            watch.step(loss, grad_norm)


def lightning(job: Job) -> None:
    """Lightning's Trainer, without checkpoints and loggers."""
    import torch
    from lightning import pytorch as pl

    features, tokenizer = load_features(job)
    watch = Stopwatch(job, pool_tokens(features, job["task"]))

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = load_model(job).train()
            self.norm: Any = None

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(decay_groups(self.model, job["weight_decay"]), lr=job["lr"])
            return [optimizer], [{"scheduler": linear_schedule(optimizer, job), "interval": "step"}]

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if job["check"]:
                self.norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            watch.step(outputs["loss"], self.norm)

    module = Module()
    trainer = pl.Trainer(
        accelerator="gpu" if on_gpu(job) else "cpu",
        precision={"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[job["precision"]],
        devices=1,
        max_steps=job["steps"],
        max_epochs=-1,
        gradient_clip_val=job["max_grad_norm"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data_loader(job, features, watch.counted(collator(job, tokenizer, module.model))))


def plain_loop(
    job: Job, watch: Stopwatch, loader: Iterable[Any], loss_of: Callable[[Any], Any], optimizer: Any
) -> None:
    """Train in a loop as written by hand, in fp32 or bf16. loss_of: returns the mean loss of a batch."""
    import torch

    device, bf16 = job["device"], job["precision"] == "bf16"
    schedule = linear_schedule(optimizer, job)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    while True:
        for batch in loader:
            batch = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                loss = loss_of(batch)
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, job["max_grad_norm"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            watch.step(loss, grad_norm)


def plain(job: Job) -> None:
    """transformers' model in a loop written by hand, with the fused AdamW."""
    import torch

    features, tokenizer = load_features(job)
    watch = Stopwatch(job, pool_tokens(features, job["task"]))
    model = load_model(job).to(job["device"]).train()
    loader = data_loader(job, features, watch.counted(collator(job, tokenizer, model)))
    model = torch.compile(model) if job["compile"] else model
    optimizer = torch.optim.AdamW(decay_groups(model, job["weight_decay"]), lr=job["lr"], fused=True)
    plain_loop(job, watch, loader, lambda batch: model(**batch).loss, optimizer)


def nanogpt(job: Job) -> None:
    """GPT-2 as nanoGPT computes it, in a loop written by hand: padding on the right, logits of every token."""
    import torch

    from benchmarks.peers.peer_models import NanoGPT, pad_shifted

    features, _ = load_features(job)
    watch = Stopwatch(job, pool_tokens(features, job["task"]))
    model = NanoGPT.from_pretrained(Path(job["model"]), dropout=not job["check"]).to(job["device"]).train()
    loader = data_loader(job, features, watch.counted(pad_shifted(shift=job["task"] == "dialogue")))
    groups = decay_groups(model, job["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=job["lr"])  # fused on GPUs only
    plain_loop(job, watch, loader, lambda batch: model(batch["ids"], batch["targets"]), optimizer)


def timm(job: Job) -> None:
    """timm's ViT, transform and AdamW in a loop written by hand."""
    import torch
    from timm.data import create_transform
    from timm.optim import create_optimizer_v2

    from benchmarks.peers.peer_models import timm_vit

    model = timm_vit(Path(job["model"])).to(job["device"]).train()
    side, half = model.patch_embed.img_size, (0.5, 0.5, 0.5)
    transform = create_transform((3, *side), interpolation="bilinear", mean=half, std=half, crop_pct=1.0)
    features, _ = load_features(job, transform)
    watch = Stopwatch(job)
    collate = torch.utils.data.default_collate
    loader = data_loader(job, features, watch.counted(collate))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=job["lr"], weight_decay=job["weight_decay"])
    model = torch.compile(model) if job["compile"] else model
    cross_entropy = torch.nn.functional.cross_entropy
    plain_loop(
        job, watch, loader, lambda batch: cross_entropy(model(batch["pixel_values"]), batch["labels"]), optimizer
    )


def main(side: str, job: str) -> None:
    """Run a side. side: a name in SIDES; job: the JSON file of a job."""
    # Without this, transformers takes a folder ./datasets for the package of that name.
    sys.modules["datasets"] = None  # type: ignore[assignment]
    SIDES[side](json.loads(Path(job).read_text(encoding="utf-8")))


SIDES: dict[str, Callable[[Job], None]] = {
    "ours": ours,
    "hf": hf,
    "hf-grouped": hf_grouped,
    "accelerate": accelerate,
    "lightning": lightning,
    "plain": plain,
    "nanogpt": nanogpt,
    "timm": timm,
}
