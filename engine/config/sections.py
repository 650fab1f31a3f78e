"""Which settings there are: one dataclass per concern, each setting documented where it is declared.

`--help`, the error messages and the resolved recipe in the run folder all come from here. A setting that changes the
mathematics of a run is the recipe's; one marked MACHINE only changes its speed, and may differ when a run is resumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config.schema import setting

MACHINE = True
FORMATS = ("auto", "jsonl", "csv", "tsv", "parquet", "conll", "word/tag", "squad", "text", "parallel", "idx", "folder")
SCHEMES = ("auto", "IOB1", "IOB2", "IOBES", "none")


@dataclass(frozen=True)
class RunSettings:
    task: str = setting("text-classification", "a row of engine/tasks.py")
    folder: str = setting(
        "runs/run", "checkpoints, logs and results go here", machine=MACHINE, needed="name a folder for this run"
    )
    seed: int = setting(0, "of everything random: new weights, order, dropout, the held-out split", within=">= 0")
    device: str = setting("auto", "auto takes a GPU when there is one", ("auto", "cpu", "cuda"), MACHINE)
    resume: str = setting(
        "no",
        "no: the folder must be new; yes (--resume): go on from its last checkpoint; auto: go on if there is one",
        ("no", "yes", "auto"),
        MACHINE,
    )
    allow_changes: bool = setting(False, "resume although recipe or data differ from the checkpoint's", machine=MACHINE)
    dry_run: bool = setting(False, "(--dry-run) show what would be trained on what, then exit", machine=MACHINE)


@dataclass(frozen=True)
class DropoutSettings:
    """Rates by kind of site. `all` stands in for the sites of the original models, so not for `drop_path`."""

    all: float | None = setting(
        None, "at every site not named below, but for drop_path; none: the checkpoint's rates", within="in [0, 1)"
    )
    embedding: float | None = setting(None, "after the embeddings", within="in [0, 1)")
    attention: float | None = setting(None, "of the attention weights", within="in [0, 1)")
    hidden: float | None = setting(
        None, "of each block's output, before it joins the residual stream", within="in [0, 1)"
    )
    head: float | None = setting(None, "before the head's last layer", within="in [0, 1)")
    drop_path: float | None = setting(None, "of whole blocks, by example (stochastic depth)", within="in [0, 1)")
    schedule: str = setting(
        "constant",
        "all rates over the run; linear: from 0 up; early: down to 0, then none; late: none, then as set",
        ("constant", "linear", "early", "late"),
    )
    switch_step: float = setting(
        0.5, "where early is down to 0 and late begins: a share of all steps below 1, else a number", within=">= 0"
    )

    def rates(self) -> dict[str, float]:
        """{site: rate} of the sites that are set, by their own rate or by `all`; the others keep the checkpoint's."""
        own = {name: getattr(self, name) for name in ("embedding", "attention", "hidden", "head", "drop_path")}
        rates = {site: self.all if rate is None and site != "drop_path" else rate for site, rate in own.items()}
        return {site: rate for site, rate in rates.items() if rate is not None}


@dataclass(frozen=True)
class LoraSettings:
    """Train a low-rank change of some projections instead of the weights (models/lora.py)."""

    rank: int = setting(0, "of the change; 0: no LoRA, all weights are trained", within=">= 0")
    alpha: float | None = setting(None, "the change is scaled by alpha / rank; none: 2 * rank", within="> 0")
    dropout: float = setting(0.0, "of what the change reads", within="in [0, 1)")
    target_modules: tuple[str, ...] = setting(
        (), "patterns of layer names, as *.query,*.mlp.*; empty: queries and values"
    )


@dataclass(frozen=True)
class ModelSettings:
    name: str = setting(
        "",
        "a local folder, package:NAME/FOLDER, or a hub name",
        needed="name a local folder, package:NAME/FOLDER or a hub name",
    )
    sha256: str = setting("", "expected checksum of its model.safetensors; empty: not checked")
    init: str = setting("pretrained", "scratch: the same shape with random weights", ("pretrained", "scratch"))
    head_init: str = setting(
        "auto", "auto: the checkpoint's head where it has one; reset: a new one", ("auto", "reset")
    )
    pooling: str = setting(
        "", "how a text becomes one vector; empty: as the checkpoint says", ("", "cls", "mean", "last")
    )
    keep_layers: int = setting(0, "only the first so many layers of the checkpoint; 0: all", within=">= 0")
    reinit_layers: int = setting(0, "the last so many layers start anew, at random", within=">= 0")
    freeze: tuple[str, ...] = setting((), "patterns of parameter names that are not trained, as backbone.layers.0.*")
    gradual_unfreezing: float = setting(
        0.0,
        "gradual unfreezing: the head alone, then one layer more, from the last to the embeddings, every so many steps "
        "(below 1: a share of all steps); 0: all from the start",
        within=">= 0",
    )
    dropout: DropoutSettings = DropoutSettings()
    lora: LoraSettings = LoraSettings()


@dataclass(frozen=True)
class DataSettings:
    train: str = setting(
        "", "file (or folder of images) to learn from, or package:NAME/FILE", needed="name the file to learn from"
    )
    validation: str = setting("", "file that decides early stopping and best; empty: held out from data.train")
    test: str = setting("", "file evaluated once at the end, with the best weights; empty: none")
    max_train_examples: int = setting(
        0, "at most so many training examples, drawn from run.seed; 0: all", within=">= 0"
    )
    validation_fraction: float = setting(0.1, "share of data.train held out when there is no data.validation")
    format: str = setting("auto", "of the files; auto: as their names end", FORMATS)
    group_column: str = setting(
        "", "column whose equal values stay on one side of the held-out split; empty: the task's"
    )
    id_column: str = setting("id", "column with the ids; without it, ids are row numbers")
    text_column: str = setting("", "column with the text (tokens, question, source); empty: the task's usual one")
    text_pair_column: str = setting("", "column with a second text (context); empty: the task's usual one, or none")
    label_column: str = setting("", "column with the label (tags, answers, target); empty: the task's usual one")
    labels: tuple[str, ...] = setting((), "the label names in order, comma-separated; empty: those found, sorted")
    max_length: int = setting(128, "longer texts are cut to this many tokens", within="> 0")
    teacher_file: str = setting(
        "", "file of a teacher's logits for data.train by id, .jsonl as engine.predict writes it"
    )
    num_workers: int = setting(
        0, "processes that prepare batches; 0: in memory, in this one", within=">= 0", machine=MACHINE
    )


@dataclass(frozen=True)
class TokenClassificationSettings:
    """Settings of token-classification."""

    tag_scheme: str = setting("auto", "of entity tags; none: each tag is a class of its own", SCHEMES)


@dataclass(frozen=True)
class QuestionAnsweringSettings:
    """Settings of question-answering."""

    doc_stride: int = setting(64, "tokens that two windows of a long context share", within=">= 0")
    max_answer_length: int = setting(30, "tokens of an answer, at most", within="> 0")
    no_answer_threshold: float = setting(0.0, "no answer where its score is above the best answer's by more than this")


@dataclass(frozen=True)
class RelationExtractionSettings:
    """Settings of relation-extraction."""

    no_relation_label: str = setting("no_relation", "the label that is no relation; not counted in F1")


@dataclass(frozen=True)
class CausalLMSettings:
    """Settings of causal-lm."""

    concatenate_texts: bool = setting(False, "texts joined and cut into blocks of max_length; false: each on its own")


@dataclass(frozen=True)
class Seq2SeqSettings:
    """Settings of summarization and translation."""

    source_prefix: str = setting("", "put before every source text, as 'summarize: '")
    max_target_length: int = setting(128, "longer texts to be written are cut to this many tokens", within="> 0")


@dataclass(frozen=True)
class ImageClassificationSettings:
    """Settings of image-classification."""

    bad_images: str = setting("raise", "skip: leave out images that cannot be read, and say which", ("raise", "skip"))


@dataclass(frozen=True)
class TextAugmentSettings:
    """Rates by word; in texts without spaces, by character."""

    crop: float = setting(0.0, "largest share of a text that is cut off at its ends", within="in [0, 1)")
    delete: float = setting(0.0, "share of the words left out", within="in [0, 1)")
    swap: float = setting(0.0, "share of the words that change places with their neighbour", within="in [0, 1)")
    mask: float = setting(0.0, "share of the words that become the tokenizer's mask", within="in [0, 1)")
    fill: float = setting(0.0, "words of other texts put in between, as a share of a text's own", within="in [0, 1)")
    synonym_file: str = setting("", "file of synonyms, .tsv or .jsonl; empty: none")
    synonym_rate: float = setting(0.1, "share of the words with synonyms that become one of them", within="in [0, 1]")
    back_translation_file: str = setting("", "file of other wordings by id, .jsonl: a text or one of them is taken")


@dataclass(frozen=True)
class ImageAugmentSettings:
    """In the order in which they are applied; mixup and cutmix then mix two images and their labels."""

    random_crop_min_scale: float = setting(
        0.0, "smallest share of the area that a random crop leaves; 0: no crop", within="in [0, 1)"
    )
    horizontal_flip: float = setting(0.0, "probability of left and right changing sides", within="in [0, 1]")
    rotation_degrees: float = setting(0.0, "largest rotation, in degrees", within="in [0, 180]")
    color_jitter: float = setting(
        0.0,
        "strength of changes of brightness, contrast and saturation, and of the hue by a quarter of it",
        within="in [0, 1]",
    )
    auto_augment: str = setting("none", "of torchvision", ("none", "randaugment", "trivialaugment"))
    random_erasing: float = setting(0.0, "probability of a rectangle being erased", within="in [0, 1]")
    mixup: float = setting(0.0, "alpha of its Beta distribution; 0: none", within=">= 0")
    cutmix: float = setting(0.0, "alpha of its Beta distribution; 0: none", within=">= 0")


@dataclass(frozen=True)
class AugmentSettings:
    """Of the training examples, anew in each epoch: a function of the seed, the epoch and the example's id."""

    text: TextAugmentSettings = TextAugmentSettings()
    image: ImageAugmentSettings = ImageAugmentSettings()


@dataclass(frozen=True)
class GenerateSettings:
    """How texts are written, in evaluation and prediction; a checkpoint's own generation settings have no say."""

    max_new_tokens: int = setting(64, "tokens of a text, at most", within="> 0")
    num_beams: int = setting(1, "of beam search; 1: greedy, or sampled", within="> 0")
    do_sample: bool = setting(False, "draw each token; false: take the likeliest")
    seed: int = setting(0, "sampling: of what is drawn", within=">= 0")
    temperature: float = setting(1.0, "sampling: below 1 keeps to what is likely, above 1 strays", within="> 0")
    top_k: int = setting(50, "sampling: from so many of the likeliest tokens; 0: all", within=">= 0")
    top_p: float = setting(1.0, "sampling: from the likeliest tokens of this probability together", within="in (0, 1]")
    no_repeat_ngram_size: int = setting(0, "no run of so many tokens comes twice; 0: any may", within=">= 0")
    length_penalty: float = setting(1.0, "beam search: a score is divided by length to this power")


@dataclass(frozen=True)
class TrainSettings:
    global_batch_size: int = setting(
        32, "examples of one optimizer step, over all ranks and micro-batches", within="> 0"
    )
    micro_batch_size: int | str = setting(
        0,
        "at most so many examples at a time on one rank; 0: no limit; auto: as many as memory holds, found at the start",
        ("auto",),
        within=">= 0",
        machine=MACHINE,
    )
    micro_batch_tokens: int = setting(
        0, "at most so many tokens at a time on one rank; 0: no limit", within=">= 0", machine=MACHINE
    )
    epochs: float = setting(3.0, "passes over the training data, when train.max_steps is 0", within=">= 0")
    max_steps: int = setting(0, "optimizer steps; 0: as train.epochs says", within=">= 0")
    precision: str = setting("fp32", "of the matrix products (weights stay fp32)", ("fp32", "bf16", "fp16"))
    compile: bool = setting(False, "torch.compile what lies between the attentions of the layers", machine=MACHINE)
    activation_checkpointing: bool = setting(
        False, "compute each layer again in the backward, for less memory", machine=MACHINE
    )
    max_grad_norm: float = setting(1.0, "largest gradient norm; 0: no clipping", within=">= 0")
    nan_policy: str = setting("raise", "on a NaN or infinite gradient: stop, or leave the step out", ("raise", "skip"))
    max_skipped: int = setting(10, "steps in a row that may be left out before the run stops", within="> 0")


@dataclass(frozen=True)
class OptimSettings:
    lr: float = setting(5e-5, "peak learning rate of AdamW", within=">= 0")
    lr_schedule: str = setting("linear", "after the warm-up", ("constant", "linear", "cosine", "wsd", "inverse_sqrt"))
    warmup_steps: float = setting(
        0.1, "rise from 0 to optim.lr: a share of all steps below 1, else a number of steps", within=">= 0"
    )
    decay_steps: float = setting(
        0.2, "wsd only: the last share (below 1) or number of steps, falling linearly", within=">= 0"
    )
    min_lr_ratio: float = setting(0.0, "where the schedule ends, as a fraction of optim.lr", within="in [0, 1]")
    layer_decay: float = setting(
        1.0,
        "each layer learns at this multiple of the rate of the layer above it; the head at optim.lr",
        within="in (0, 1]",
    )
    head_lr: float | None = setting(None, "peak learning rate of the head; none: optim.lr", within=">= 0")
    lr_scales: tuple[str, ...] = setting(
        (), "PATTERN=FACTOR: parameters of these names learn at a multiple of optim.lr"
    )
    beta1: float = setting(0.9, "AdamW's decay of the first moment", within="in [0, 1)")
    beta2: float = setting(0.999, "AdamW's decay of the second moment", within="in [0, 1)")
    weight_decay: float = setting(0.01, "decoupled, as in AdamW; never on biases and norms", within=">= 0")
    eps: float = setting(1e-8, "AdamW's epsilon", within="> 0")


@dataclass(frozen=True)
class RegularizeSettings:
    l1: float = setting(0.0, "adds l1 * sum |w| to the loss of a step; never on biases and norms", within=">= 0")
    l2: float = setting(0.0, "adds l2 / 2 * sum w^2 to the loss of a step; never on biases and norms", within=">= 0")
    l2_sp: float = setting(
        0.0,
        "adds l2_sp / 2 * sum (w - w0)^2, w0 the pretrained weights; never on biases, norms, a new head",
        within=">= 0",
    )
    penalized_parameters: tuple[str, ...] = setting(
        (), "patterns of the parameter names that l1, l2 and l2_sp hold; empty: all"
    )
    ema_decay: float = setting(
        0.0, "of an average of the weights, evaluated and saved as best in their place; 0: none", within="in [0, 1)"
    )
    class_weights: tuple[str, ...] = setting(
        (), "of the training loss: a number for each class in their order, or balanced: rarer ones count for more"
    )
    label_smoothing: float = setting(0.0, "share of the target spread over all classes", within="in [0, 1)")
    r_drop_weight: float = setting(
        0.0, "weight of the divergence between two passes that drop otherwise", within=">= 0"
    )
    fgm_epsilon: float = setting(
        0.0,
        "size of a step that makes the loss worse, by which each text's embeddings are moved in a second pass",
        within=">= 0",
    )
    distillation_weight: float = setting(
        0.0, "share of the loss that is agreement with data.teacher_file, not with the labels", within="in [0, 1]"
    )
    distillation_temperature: float = setting(1.0, "what both sides' logits are divided by in it", within="> 0")


@dataclass(frozen=True)
class EvalSettings:
    every_steps: int = setting(0, "steps between evaluations; 0: once an epoch", within=">= 0")
    batch_tokens: int = setting(4096, "tokens of one evaluation batch on one rank", within="> 0", machine=MACHINE)
    metric: str = setting("", "the metric to watch; empty: the task's main one")
    mode: str = setting("auto", "auto: a loss is better lower, all others higher", ("auto", "max", "min"))
    patience: int = setting(0, "evaluations without a new best before stopping; 0: never stop early", within=">= 0")
    min_delta: float = setting(0.0, "a new best must be better by more than this", within=">= 0")
    stop_if_worse_than: float | None = setting(
        None, "stop where the metric is worse than this, or not a number; none: go on"
    )
    train_subset_size: int = setting(
        0,
        "evaluate so many training examples too, as they are, to show overfitting; 0: none",
        within=">= 0",
    )
    num_shown_generations: int = setting(
        3, "generated texts shown with each evaluation", within=">= 0", machine=MACHINE
    )


@dataclass(frozen=True)
class LogSettings:
    every_steps: int = setting(10, "steps between lines in metrics.jsonl", within="> 0", machine=MACHINE)
    tensorboard: bool = setting(False, "also write TensorBoard files (extra: tensorboard)", machine=MACHINE)


@dataclass(frozen=True)
class Config:
    run: RunSettings = RunSettings()
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    token_classification: TokenClassificationSettings = TokenClassificationSettings()
    question_answering: QuestionAnsweringSettings = QuestionAnsweringSettings()
    relation_extraction: RelationExtractionSettings = RelationExtractionSettings()
    causal_lm: CausalLMSettings = CausalLMSettings()
    seq2seq: Seq2SeqSettings = Seq2SeqSettings()
    image_classification: ImageClassificationSettings = ImageClassificationSettings()
    augment: AugmentSettings = AugmentSettings()
    train: TrainSettings = TrainSettings()
    optim: OptimSettings = OptimSettings()
    regularize: RegularizeSettings = RegularizeSettings()
    eval: EvalSettings = EvalSettings()
    generate: GenerateSettings = GenerateSettings()
    log: LogSettings = LogSettings()
