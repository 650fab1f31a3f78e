"""Former names of settings, most of them of schema 1, and their present names. Settings not listed kept theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config.schema import toml_value

RENAMED = {
    "data.text": "data.text_column",
    "data.text_pair": "data.text_pair_column",
    "data.label": "data.label_column",
    "data.id": "data.id_column",
    "data.group": "data.group_column",
    "data.limit": "data.max_train_examples",
    "data.workers": "data.num_workers",
    "data.teacher": "data.teacher_file",
    "data.scheme": "token_classification.tag_scheme",
    "data.negative": "relation_extraction.no_relation_label",
    "data.join": "causal_lm.concatenate_texts",
    "data.prefix": "seq2seq.source_prefix",
    "data.max_target_length": "seq2seq.max_target_length",
    "data.doc_stride": "question_answering.doc_stride",
    "data.max_answer_length": "question_answering.max_answer_length",
    "data.no_answer_threshold": "question_answering.no_answer_threshold",
    "data.bad_images": "data.bad_rows",
    "image_classification.bad_images": "data.bad_rows",
    "augment.text.synonyms": "augment.text.synonym_file",
    "augment.text.synonym": "augment.text.synonym_rate",
    "augment.text.back_translation": "augment.text.back_translation_file",
    "augment.image.crop": "augment.image.random_crop_min_scale",
    "augment.image.flip": "augment.image.horizontal_flip",
    "augment.image.rotate": "augment.image.rotation_degrees",
    "augment.image.jitter": "augment.image.color_jitter",
    "augment.image.policy": "augment.image.auto_augment",
    "augment.image.erase": "augment.image.random_erasing",
    "train.batch_size": "train.global_batch_size",
    "train.micro_batch": "train.micro_batch_size",
    "train.clip_norm": "train.max_grad_norm",
    "train.checkpoint_activations": "train.activation_checkpointing",
    "optim.min_lr": "optim.min_lr_ratio",
    "optim.warmup": "optim.warmup_steps",
    "optim.decay": "optim.decay_steps",
    "optim.schedule": "optim.lr_schedule",
    "regularize.weight_decay": "optim.weight_decay",
    "regularize.distill": "regularize.distillation_weight",
    "regularize.distill_temperature": "regularize.distillation_temperature",
    "regularize.r_drop": "regularize.r_drop_weight",
    "regularize.fgm": "regularize.fgm_epsilon",
    "regularize.penalize": "regularize.penalized_parameters",
    "model.unfreeze": "model.gradual_unfreezing",
    "model.dropout.path": "model.dropout.drop_path",
    "model.dropout.switch": "model.dropout.switch_step",
    "model.lora.targets": "model.lora.target_modules",
    "eval.every": "eval.every_steps",
    "log.every": "log.every_steps",
    "eval.divergence": "eval.stop_if_worse_than",
    "eval.train_examples": "eval.train_subset_size",
    "eval.samples": "eval.num_shown_generations",
    "log.tensorboard": "log.report_to",
}
RENAMED_VALUES = {  # (old name, old value): what to write now
    ("train.micro_batch", "auto"): 'train.micro_batch_size = "auto"',
    ("train.micro_batch", ""): "leave it out",
}


def renamed_lines(values: Mapping[str, Any]) -> list[str]:
    """Return a line `old -> new` for each renamed setting among the values of a recipe of schema 1."""
    lines = []
    for key, value in values.items():
        if isinstance(value, str) and (key, value) in RENAMED_VALUES:
            lines.append(f"{key} = {toml_value(value)} -> {RENAMED_VALUES[key, value]}")
        elif key in RENAMED:
            lines.append(f"{key} -> {RENAMED[key]}")
    return lines


def with_report_to(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe with the switch log.tensorboard as log.report_to, which has followed it.

    The resolved recipe of every older checkpoint has the switch.
    """
    switch = values.get("log.tensorboard")
    if not isinstance(switch, bool):
        return dict(values)
    added = {"log.report_to": ["tensorboard"]} if switch else {}
    return added | {key: value for key, value in values.items() if key != "log.tensorboard"}
