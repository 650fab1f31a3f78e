"""Build the model of a recipe, from the recipe's checkpoint or from one of the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import models
from data import load_tokenizer
from data.multi_task import labels_of
from engine.calibration import KEYS as CALIBRATION_KEYS
from engine.calibration import problem_of, set_calibration
from engine.config import ConfigError, ModelSettings, TrainSettings
from engine.kernels import choose_kernels
from engine.tasks import Task, check_fetched
from engine.tasks.multi_task import MultiTask, Part, of_task
from models import TaskModel
from models.multi_task import join_tasks, load_tasks


def build_model(
    settings: ModelSettings,
    task: Task,
    labels: Sequence[str],
    label_smoothing: float,
    seed: int,
    resumed: Path | None,
    shard: Callable[[TaskModel], None] | None = None,
) -> tuple[TaskModel, Path]:
    """Return (the model, on the CPU unless it is sharded; the folder of its tokenizer).

    resumed: a checkpoint of this run, whose weights replace those of model.name. With LoRA its weights are merged ones.
    Then the weights come from model.name, and only the adapter from the checkpoint.
    shard: replaces the parameters of a model by those of its rank (engine.sharding), before the weights are read.
    """
    check_fetched([settings.name])
    start = settings
    parts = task.parts if isinstance(task, MultiTask) else ()
    if resumed is not None and not settings.lora.rank and not parts:
        # keep_layers, reinit_layers and head_init were applied before the checkpoint was saved.
        start = replace(
            settings,
            name=str(resumed),
            revision="",
            sha256="",
            init="pretrained",
            head_init="auto",
            keep_layers=0,
            reinit_layers=0,
        )

    def prepare(model: TaskModel) -> None:
        models.freeze(model, start.freeze)
        if start.lora.rank:
            lora = start.lora
            targets = lora.target_modules or models.lora.DEFAULT_TARGETS
            models.add_lora(
                model, lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=targets, dora=lora.dora, seed=seed
            )
            if lora.frozen_weights != "fp32":
                model.report.notes.append(models.store_frozen_weights(model, lora.frozen_weights))
        if shard is not None:
            shard(model)

    # Layers that are initialised again after loading, and the lengths of DoRA, need whole parameters.
    streams = shard is not None and not start.reinit_layers and not start.lora.dora
    if parts:
        model = _build_tasks(start, parts, labels, label_smoothing, seed)
    else:
        model = _load(start, task, labels, label_smoothing, seed, prepare if streams else None)
    if not streams or parts:
        prepare(model)
    if resumed is not None and start.lora.rank:
        models.load_adapter(model, models.adapter.find_adapter(resumed))
    elif resumed is not None and parts:
        load_tasks(model, resumed)
    return model, models.hub.resolve(start.name, start.revision)


def load_best(folder: Path, task: Task, shard: Callable[[TaskModel], None] | None) -> TaskModel:
    """Return the model of best/; that of several tasks is made from the folders of each."""
    if not isinstance(task, MultiTask):
        return models.from_pretrained(folder, head=task.head, before_loading=shard)
    heads = {part.name: part.task.head for part in task.parts}
    folders = {name: folder.with_name(f"{folder.name}-{name}") for name in heads}
    return join_tasks({name: models.from_pretrained(folders[name], head=heads[name]) for name in heads})


def _build_tasks(
    start: ModelSettings, parts: Sequence[Part], labels: Sequence[str], label_smoothing: float, seed: int
) -> TaskModel:
    """Return the model of several tasks: each is loaded as for a run of this task alone, and the first lends its body.

    model.pooling and label smoothing are of the heads that have them; ConfigError where none has.
    """
    heads = [models.HEADS[part.task.head] for part in parts]
    pools = [head.reads_pooled for head in heads]
    smooths = [
        head.supports_label_smoothing and part.task.problem in (None, "single-label")
        for head, part in zip(heads, parts, strict=True)
    ]
    for key, value, used in (
        ("model.pooling", start.pooling, pools),
        ("regularize.label_smoothing", label_smoothing, smooths),
    ):
        if value and not any(used):
            raise ConfigError(f"{key} = {value!r} has no effect on any of these tasks: leave it out")
    found = {}
    for part, has_pooling, has_smoothing in zip(parts, pools, smooths, strict=True):
        own = start if has_pooling else replace(start, pooling="")
        smoothing = label_smoothing if has_smoothing else 0.0
        with of_task(part.name):
            found[part.name] = _load(own, part.task, labels_of(part.name, labels), smoothing, seed, None)
    return join_tasks(found)


def _load(
    start: ModelSettings,
    task: Task,
    labels: Sequence[str],
    label_smoothing: float,
    seed: int,
    before_loading: Callable[[TaskModel], None] | None,
) -> TaskModel:
    """Return the pretrained backbone with the head of a task."""
    _check_masked_lm(start, task)
    rates = start.dropout.rates()
    if start.dropout.head is None and task.head in models.HEADS and models.HEADS[task.head].is_language_model:
        rates.pop("head", None)  # this head has no dropout for model.dropout.all to set
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
        revision=start.revision,
        sha256=start.sha256,
        before_loading=before_loading,
    )
    _drop_ambiguous_pad(model, models.hub.resolve(start.name, start.revision))
    _drop_calibration(model, start.name)
    return model


def _drop_calibration(model: TaskModel, name: str) -> None:
    """Leave out the temperature and thresholds of a checkpoint, which do not suit the weights of a training."""
    if problem_of(model) and (found := [key for key in CALIBRATION_KEYS if key in model.spec.config]):
        set_calibration(model, None)
        model.report.notes.append(f"{' and '.join(found)} in config.json of {name}: left out, since training goes on")


def _check_masked_lm(start: ModelSettings, task: Task) -> None:
    """Raise ModelError for a T5 that should predict masked tokens, with the task that trains it on raw texts."""
    model_type = str(models.read_config(models.hub.resolve(start.name, start.revision))["model_type"])
    heads = models.ARCHITECTURES[model_type].heads
    if task.head == "masked-lm" and "masked-lm" not in heads and "seq2seq-lm" in heads:
        raise models.ModelError(
            f"{start.name}: a {model_type} model predicts no masked tokens; on raw texts it is trained by "
            'run.task = "span-corruption"'
        )


def _drop_ambiguous_pad(model: TaskModel, folder: Path) -> None:
    """Leave pad_token_id out of the export if a text can end with it and the head reads the last token (GPT-2).

    transformers reads the last token that is not pad_token_id, which would then be an earlier one. Without this field
    it gives the same answers, and refuses batches of several texts.
    """
    pad, head = model.spec.config.get("pad_token_id"), model.head
    reads_last = head is not None and head.reads_pooled and head.shape.pooling == model.spec.architecture.pooling
    if not reads_last or model.spec.architecture.pooling != "last" or not isinstance(pad, int):
        return
    tokenizer = load_tokenizer(folder)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if pad in special and tokenizer.encode("a").ids[-1] == pad:
        reason = "the tokenizer ends every text with it"
    elif pad not in special and tokenizer.id_to_token(pad) is not None:
        reason = f"a text can end with {tokenizer.id_to_token(pad)!r}"
    else:
        return
    config = {name: value for name, value in model.spec.config.items() if name != "pad_token_id"}
    model.spec = replace(model.spec, config=config)
    model.report.notes.append(
        f"pad_token_id = {pad} is left out of the export, since {reason}: transformers then reads the last token as "
        "here, one text at a time"
    )


def apply_machine_settings(model: TaskModel, settings: TrainSettings, deterministic: bool) -> None:
    """Apply train.compile, train.activation_checkpointing, train.tf32 and run.deterministic, all by rounding only."""
    if settings.compile:
        models.compile_layers(model)
    if settings.activation_checkpointing:
        models.checkpoint_activations(model)
    choose_kernels(next(model.parameters()).device, settings.tf32, deterministic)
    disable_cudnn_attention(model)


def disable_cudnn_attention(model: TaskModel) -> None:
    """Switch cuDNN's attention off in this process, on a GPU, for a model that reads texts.

    cuDNN builds a plan for each new pair of batch size and length, which takes longer than the step it is for.
    """
    if model.embedding is not None and model.embedding.weight.is_cuda:
        torch.backends.cuda.enable_cudnn_sdp(False)
