"""The settings of a run: one frozen dataclass for each section of a recipe, with a description of each setting.

`--help`, the error messages and the resolved recipe in the run folder are made from these declarations. A setting
changes the mathematics of a run unless it is marked MACHINE. A machine setting changes only the speed, the memory or
the output, and it may differ when a run is resumed. [data] and [model] are in data_settings.py and model_settings.py,
the sections that only some tasks read in task_sections.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config.data_settings import DataSettings
from engine.config.model_settings import ModelSettings
from engine.config.schema import MACHINE, setting
from engine.config.task_sections import (
    AugmentSettings,
    CausalLMSettings,
    GenerateSettings,
    ImageClassificationSettings,
    MaskedLMSettings,
    MultipleChoiceSettings,
    MultiTaskSettings,
    QuestionAnsweringSettings,
    RelationExtractionSettings,
    SentenceEmbeddingSettings,
    Seq2SeqSettings,
    SpanCorruptionSettings,
    TokenClassificationSettings,
)


@dataclass(frozen=True)
class RunSettings:
    """The task, the run folder, the seed and the device."""

    task: str = setting("text-classification", "name of the task; engine/tasks has one file for each")
    folder: str = setting(
        "runs/run",
        "folder for the checkpoints, logs and results of the run",
        machine=MACHINE,
        needed="name a folder for this run",
    )
    seed: int = setting(
        0, "seed of everything random: new weights, held-out split, order, dropout, augmentation", within=">= 0"
    )
    device: str = setting(
        "auto",
        "device to train on; auto: the NVIDIA or AMD GPU, if there is one; mps: Apple's GPU",
        ("auto", "cpu", "cuda", "mps"),
        machine=MACHINE,
    )
    deterministic: bool = setting(
        False,
        "use only deterministic kernels of a GPU, so that equal runs are bit-equal, as on a CPU; slower",
        machine=MACHINE,
    )
    plugins: tuple[str, ...] = setting(
        (),
        "Python files whose tables are added: ARCHITECTURES, HEADS, TASKS, METRICS, LOSSES, OPTIMIZERS, SCHEDULES; "
        "empty: none; on resume they are compared by their content",
        machine=MACHINE,
    )
    resume: str = setting(
        "no",
        "no: the folder must be new; yes (or --resume): continue from the last checkpoint; auto: continue if there is "
        "a checkpoint, else begin",
        ("no", "yes", "auto"),
        machine=MACHINE,
    )
    allow_changes: bool = setting(
        False, "resume although the recipe or the data differ from the checkpoint's", machine=MACHINE
    )
    dry_run: bool = setting(
        False, "(or --dry-run) print what would be trained on which data, then exit", machine=MACHINE
    )
    show_all: bool = setting(
        False, "(or --show-all) in a dry run, print the defaults of the recipe too", machine=MACHINE
    )


@dataclass(frozen=True)
class TrainSettings:
    """The training steps: their size, number and arithmetic."""

    global_batch_size: int = setting(
        32, "examples of one optimizer step, over all micro-batches and ranks", within="> 0"
    )
    micro_batch_size: int | Literal["auto"] = setting(
        0,
        "largest number of examples at a time on one rank; auto: as many as fit in memory, found at the start; "
        "0: no limit",
        within=">= 0",
        machine=MACHINE,
    )
    micro_batch_tokens: int = setting(
        0, "largest number of tokens at a time on one rank; 0: no limit", within=">= 0", machine=MACHINE
    )
    epochs: float = setting(3.0, "passes over the training data, if train.max_steps is 0", within=">= 0")
    max_steps: int = setting(0, "number of optimizer steps; 0: as many as train.epochs takes", within=">= 0")
    sampler: str = setting(
        "shuffle",
        "examples of an epoch; shuffle: each once, in random order; balanced: the same number, all classes equally "
        "often, so that examples of rare classes repeat",
        ("shuffle", "balanced"),
    )
    loss: str = setting("", "name of a loss from a plugin (run.plugins); empty: the head's own loss")
    max_grad_norm: float = setting(
        1.0, "gradients with a larger norm are scaled down to this norm; 0: no clipping", within=">= 0"
    )
    precision: str = setting(
        "fp32",
        "number format of the matrix products; the weights are always fp32; with fp16, most products of a T5 stay "
        "fp32, since they exceed its range",
        ("fp32", "bf16", "fp16"),
    )
    tf32: bool = setting(
        False,
        "compute fp32 products in TF32, with 10 bits of mantissa instead of 23; faster; no effect on a CPU",
    )
    nan_policy: str = setting(
        "raise", "on a NaN or infinite gradient; raise: stop the run; skip: leave out this step", ("raise", "skip")
    )
    max_skipped: int = setting(10, "number of steps skipped in a row after which the run stops", within="> 0")
    compile: bool = setting(False, "use torch.compile on the layers, except their attention", machine=MACHINE)
    activation_checkpointing: bool = setting(
        False, "compute each layer's activations again in the backward pass; saves memory, costs time", machine=MACHINE
    )


@dataclass(frozen=True)
class OptimSettings:
    """The optimizer and the learning rate."""

    name: str = setting("adamw", "the optimizer: adamw, adamw8bit, sgd, adafactor, lion, muon, or a plugin's")
    lr: float = setting(5e-5, "learning rate at its peak, after the warm-up", within=">= 0")
    weight_decay: float = setting(
        0.01,
        "decoupled weight decay, as in AdamW, and for sgd added to the gradient; never applied to biases, norms, and "
        "the class token and positions of a ViT; 0: none",
        within=">= 0",
    )
    lr_schedule: str = setting(
        "linear",
        "course of the learning rate after the warm-up: constant, linear, cosine, wsd, inverse_sqrt, or a plugin's",
    )
    warmup_steps: float = setting(
        0.1,
        "steps in which the learning rate rises from 0 to optim.lr (below 1: a share of all steps); 0: no warm-up",
        within=">= 0",
    )
    decay_steps: float = setting(
        0.2, "wsd only: last steps, in which the rate falls linearly (below 1: a share of all steps)", within=">= 0"
    )
    min_lr_ratio: float = setting(
        0.0, "learning rate at the end of the schedule, as a fraction of optim.lr", within="in [0, 1]"
    )
    head_lr: float | None = setting(None, "learning rate of the head at its peak; none: optim.lr", within=">= 0")
    layer_decay: float = setting(
        1.0,
        "factor from each layer's learning rate to that of the layer below it; 1: all layers have the same rate",
        within="in (0, 1]",
    )
    lr_scales: tuple[str, ...] = setting(
        (), "PATTERN=FACTOR: parameters whose names match have optim.lr times this factor; empty: none"
    )
    beta1: float = setting(
        0.9, "decay rate of AdamW's first moment; of lion: weight of the momentum in an update", within="in [0, 1)"
    )
    beta2: float | None = setting(
        None,
        "decay rate of AdamW's second moment, of lion's momentum; none: 0.999, of lion 0.99",
        within="in [0, 1)",
    )
    eps: float = setting(1e-8, "AdamW's epsilon, added to the denominator", within="> 0")
    momentum: float | None = setting(
        None, "Nesterov momentum of sgd and muon; none: 0.9, of muon 0.95; 0: none", within="in [0, 1)"
    )
    offload: bool = setting(
        False,
        "keep AdamW's states, 8 bytes a weight, in the memory of the host; slower; with distributed.strategy = fsdp or "
        "hsdp the weights and gradients too; no effect on a CPU",
        machine=MACHINE,
    )


@dataclass(frozen=True)
class RegularizeSettings:
    """Penalties and changes of the loss against overfitting."""

    label_smoothing: float = setting(
        0.0, "share of the target that is spread over all classes; 0: none", within="in [0, 1)"
    )
    class_weights: tuple[str, ...] = setting(
        (),
        "weights of the classes in the training loss: a number for each, or balanced (inverse to the class's "
        "frequency); empty: all 1",
    )
    pos_weight: tuple[str, ...] = setting(
        (),
        "weights of the labels in the training loss, for examples that have the label: a number for each, or balanced "
        "(examples without the label / examples with it); only for multi-label tasks; empty: all 1",
    )
    l1: float = setting(
        0.0,
        "adds l1 * sum |w| to the loss of a step, w being the weights that optim.weight_decay decays; 0: none",
        within=">= 0",
    )
    l2: float = setting(
        0.0,
        "adds l2 / 2 * sum w^2 to the loss of a step, w being the weights that optim.weight_decay decays; 0: none",
        within=">= 0",
    )
    l2_sp: float = setting(
        0.0,
        "adds l2_sp / 2 * sum (w - w0)^2 to the loss of a step, w being as for l2 and w0 its pretrained value; never "
        "applied to a new head; 0: none",
        within=">= 0",
    )
    penalized_parameters: tuple[str, ...] = setting(
        (), "patterns of the parameter names to which l1, l2 and l2_sp apply; empty: all"
    )
    ema_decay: float = setting(
        0.0,
        "decay of an exponential moving average of the weights, which is evaluated and saved as best; 0: no average",
        within="in [0, 1)",
    )
    r_drop_weight: float = setting(
        0.0, "weight of the divergence between two passes with different dropout (R-Drop); 0: one pass", within=">= 0"
    )
    fgm_epsilon: float = setting(
        0.0,
        "norm of the perturbation of each text's embeddings in a second, adversarial pass (FGM); 0: no such pass",
        within=">= 0",
    )
    distillation_weight: float = setting(
        0.0, "share of the loss that compares with data.teacher_file instead of the labels; 0: none", within="in [0, 1]"
    )
    distillation_temperature: float = setting(
        1.0, "divisor of the logits of both model and teacher in distillation", within="> 0"
    )


@dataclass(frozen=True)
class EvalSettings:
    """Evaluation during training, and early stopping."""

    every_steps: int = setting(0, "steps between evaluations; 0: one evaluation an epoch", within=">= 0")
    at_start: bool = setting(False, "evaluate before the first step too, as step 0, which is never the best")
    metric: str = setting(
        "", "metric that chooses the best checkpoint, of the task or of a plugin; empty: the task's main metric"
    )
    confidence: float = setting(
        0.0,
        "level of the bootstrap intervals of all metrics, such as 0.95; 0: none",
        within="in [0, 1)",
    )
    fit_temperature: bool = setting(
        False,
        "fit the temperature of a classifier's probabilities on the validation data at each new best, and keep it in "
        "best/config.json",
    )
    tune_thresholds: str = setting(
        "none",
        "metric for which the thresholds of two classes, or of each of several labels, are tuned on the validation "
        "data at each new best, and kept in best/config.json; none: one half",
        ("none", "f1", "f1_positive", "accuracy", "mcc"),
    )
    bleu_tokenizer: str = setting(
        "auto",
        "sacrebleu's tokenizer for BLEU; auto: zh, char or 13a, by the script of the targets",
        ("auto", "13a", "intl", "zh", "char", "ja-mecab", "ko-mecab", "none"),
    )
    mode: str = setting(
        "auto",
        "whether a higher (max) or a lower (min) metric is better; auto: as the engine's metrics are",
        ("auto", "max", "min"),
    )
    patience: int = setting(
        0, "evaluations without a new best after which the run stops; 0: never stop early", within=">= 0"
    )
    min_delta: float = setting(0.0, "a new best must be better than the old one by more than this", within=">= 0")
    stop_if_worse_than: float | None = setting(
        None, "stop the run if the metric is worse than this, or not a number; none: never"
    )
    train_subset_size: int = setting(
        0, "number of training examples that are evaluated too, to show overfitting; 0: none", within=">= 0"
    )
    num_shown_generations: int = setting(
        3, "number of generated texts printed with each evaluation; 0: none", within=">= 0", machine=MACHINE
    )
    batch_tokens: int | Literal["auto"] = setting(
        "auto",
        "largest number of tokens of an evaluation batch on one rank, halved where it does not fit into memory; auto: "
        "4,096 on a CPU, 32,768 on a GPU",
        within="> 0",
        machine=MACHINE,
    )


@dataclass(frozen=True)
class CheckpointSettings:
    """The checkpoints: which are kept, and when last/ is saved. A stop signal and the end of a run save it too."""

    every_steps: int = setting(
        0, "steps between saves of last/, however long they take; 0: none", within=">= 0", machine=MACHINE
    )
    every_minutes: float = setting(
        10.0,
        "minutes between saves of last/, more where they would take over 2% of the time; an evaluation saves it too, "
        "unless that would take over 10%; 0: each evaluation saves it, and there are no saves by time",
        within=">= 0",
        machine=MACHINE,
    )
    keep: tuple[str, ...] = setting(
        ("last", "previous", "best"),
        "folders to keep; best: the result; last: what a run resumes from; previous: used where last is damaged",
        machine=MACHINE,
    )


@dataclass(frozen=True)
class LogSettings:
    """The log of a run."""

    level: str = setting(
        "info", "what is printed; quiet: only warnings, errors and the result", ("info", "quiet"), machine=MACHINE
    )
    json: bool = setting(
        False, "print one JSON object a line: the rows of metrics.jsonl, warnings and notes", machine=MACHINE
    )
    every_steps: int = setting(10, "steps between lines of metrics.jsonl", within="> 0", machine=MACHINE)
    spike_deviations: float = setting(
        6.0,
        "report a logged loss this many robust standard deviations above the 50 logged before, with the ids of its "
        "examples; 0: none",
        within=">= 0",
        machine=MACHINE,
    )
    report_to: tuple[str, ...] = setting(
        (),
        "loggers that get the numbers of metrics.jsonl too: tensorboard, wandb, mlflow, swanlab (each needs its "
        "package); empty: none",
        machine=MACHINE,
    )
    profile_steps: str = setting(
        "",
        "steps to trace with torch.profiler into the run folder, such as 10..12, on rank 0; empty: none",
        machine=MACHINE,
    )


@dataclass(frozen=True)
class DistributedSettings:
    """The processes of a run: the ranks, and the workers that read data."""

    strategy: str = setting(
        "ddp",
        "what a rank keeps; ddp: the whole model; fsdp: a part of every weight, gradient and optimizer state, the "
        "ranks together have one whole; hsdp: as fsdp, and the ranks of each machine have a whole",
        ("ddp", "fsdp", "hsdp"),
        machine=MACHINE,
    )
    timeout_seconds: float = setting(
        300.0,
        "seconds to wait for another rank, or for data from a worker, before the run ends and names it",
        within="> 0",
        machine=MACHINE,
    )


@dataclass(frozen=True)
class Config:
    """All settings of a run: the sections of a recipe, first those of all tasks, then those of one task each."""

    run: RunSettings = field(default=RunSettings())
    model: ModelSettings = field(default=ModelSettings())
    data: DataSettings = field(default=DataSettings())
    train: TrainSettings = field(default=TrainSettings())
    optim: OptimSettings = field(default=OptimSettings())
    regularize: RegularizeSettings = field(default=RegularizeSettings())
    augment: AugmentSettings = field(default=AugmentSettings())
    eval: EvalSettings = field(default=EvalSettings())
    generate: GenerateSettings = field(default=GenerateSettings())
    checkpoint: CheckpointSettings = field(default=CheckpointSettings())
    log: LogSettings = field(default=LogSettings())
    distributed: DistributedSettings = field(default=DistributedSettings())
    token_classification: TokenClassificationSettings = field(default=TokenClassificationSettings())
    question_answering: QuestionAnsweringSettings = field(default=QuestionAnsweringSettings())
    relation_extraction: RelationExtractionSettings = field(default=RelationExtractionSettings())
    masked_lm: MaskedLMSettings = field(default=MaskedLMSettings())
    span_corruption: SpanCorruptionSettings = field(default=SpanCorruptionSettings())
    multiple_choice: MultipleChoiceSettings = field(default=MultipleChoiceSettings())
    sentence_embedding: SentenceEmbeddingSettings = field(default=SentenceEmbeddingSettings())
    causal_lm: CausalLMSettings = field(default=CausalLMSettings())
    seq2seq: Seq2SeqSettings = field(default=Seq2SeqSettings())
    image_classification: ImageClassificationSettings = field(default=ImageClassificationSettings())
    multi_task: MultiTaskSettings = field(default=MultiTaskSettings())
