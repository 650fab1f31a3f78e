"""Fine-tune a checkpoint on two files of sentences with HF Trainer, as a user would write the script.

    python hf_script.py MODEL TRAIN.jsonl VALIDATION.jsonl OUTPUT --steps N

It does what `engine.train movie_reviews` does: the same model, rows, batch size, length, learning rate, schedule and
dropout; one evaluation and one checkpoint at the end. Each line of a file is {"text": ..., "label": ...}.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)


def read(path: str, tokenizer: Any, labels: list[str], max_length: int) -> list[dict[str, Any]]:
    """Return the tokenized rows of a file; new labels are added to `labels`."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    labels += sorted({row["label"] for row in rows} - set(labels))
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_length)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": labels.index(row["label"])}
        for ids, mask, row in zip(encoded["input_ids"], encoded["attention_mask"], rows, strict=True)
    ]


def accuracy(outcome: Any) -> dict[str, float]:
    """Return the share of examples whose largest logit is that of their label."""
    return {"accuracy": float(np.mean(outcome.predictions.argmax(-1) == outcome.label_ids))}


def main() -> None:
    """Train, evaluate and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "validation", "output"):
        parser.add_argument(name)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-4)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    labels: list[str] = []
    train_set = read(given.train, tokenizer, labels, given.max_length)
    validation_set = read(given.validation, tokenizer, labels, given.max_length)
    model = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=len(labels))
    arguments = TrainingArguments(
        output_dir=given.output,
        max_steps=given.steps,
        per_device_train_batch_size=given.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=given.lr,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        weight_decay=0.01,
        eval_strategy="steps",
        eval_steps=given.steps,
        save_strategy="steps",
        save_steps=given.steps,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=validation_set,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        processing_class=tokenizer,
    )
    trainer.train()


if __name__ == "__main__":
    main()
