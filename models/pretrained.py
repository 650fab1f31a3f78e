"""Load a TaskModel from a checkpoint, save it as a checkpoint, and freeze its parameters."""

from __future__ import annotations

import difflib
import json
import reprlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from models import (
    albert,
    beit,
    bert,
    deberta,
    dinov2,
    electra,
    ernie,
    gpt2,
    model_options,
    modernbert,
    roberta,
    t5,
    vit,
)
from models.architecture import AnyArchitecture, BackboneConfig
from models.checkpoints import hub, weights
from models.checkpoints.tensor_files import JsonObject, TensorFiles, open_checkpoint, read_json
from models.checkpoints.uninitialised import Uninitialised, size_limits
from models.errors import ModelError
from models.heads import HEADS, Head, HeadShape
from models.lora import merged_tensors
from models.model_options import ModelOptions
from models.task_model import ModelSpec, TaskModel

ARCHITECTURES: dict[str, AnyArchitecture] = {
    "bert": bert.BERT,
    "roberta": roberta.ROBERTA,
    "distilbert": bert.DISTILBERT,
    "xlm-roberta": roberta.XLM_ROBERTA,
    "camembert": roberta.CAMEMBERT,
    "ernie": ernie.ERNIE,
    "electra": electra.ELECTRA,
    "albert": albert.ALBERT,
    "deberta-v2": deberta.DEBERTA_V2,
    "modernbert": modernbert.MODERNBERT,
    "gpt2": gpt2.GPT2,
    "vit": vit.VIT,
    "deit": vit.DEIT,
    "dinov2": dinov2.DINOV2,
    "dinov2_with_registers": dinov2.DINOV2_WITH_REGISTERS,
    "beit": beit.BEIT,
    "t5": t5.T5,
    "mt5": t5.MT5,
}

# Fields of config.json that the export replaces, and those that would be wrong for its weights in fp32.
REPLACED = ("id2label", "label2id", "num_labels", "problem_type", "pooling", "head")
STALE = ("_name_or_path", "torch_dtype", "dtype", "quantization_config")


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
    revision: str = "",
    sha256: str = "",
    before_loading: Callable[[TaskModel], None] | None = None,
) -> TaskModel:
    """Build a model on the CPU in fp32 from a local folder, a package resource or a hub name.

    head: a key of HEADS, or None for the backbone's hidden states.
    labels: names of the classes, each once; None takes those of config.json. If the head is in the file, they must be
        its labels, in any order; `head_init="reset"` starts a new head instead.
    init: "pretrained", or "scratch" for random weights in the same shape, drawn from `seed` (as a new head is).
    pooling: "cls", "mean", "last" (not for images) or "cls_mean" (of images); None takes the checkpoint's, else the
        architecture's.
    problem: "single-label", "multi-label" or "regression"; None takes that of the head in the file (with one label and
        no problem_type: regression), and single-label for a new head.
    dropout: one rate for every site, or {"embedding" | "attention" | "hidden" | "drop_path" | "head": rate}. Other
        sites keep the checkpoint's rates. Language-model heads have no dropout.
    keep_layers: the number of layers to keep, counted from the input (0: all), of an encoder-decoder in each stack.
    reinit_layers: the number of layers to initialise again from `seed`, counted from the output. An encoder-decoder
        starts with the decoder's.
    revision: the commit, tag or branch of a hub name; "": main.
    sha256: the checksum of model.safetensors; "": not checked.
    before_loading: called with the model when a new head has values and before any weight is read, such as to shard it.
        Memory without values is not in use yet, and of a DTensor each rank then reads its own part only.
    Raises ModelError where files and options do not fit, and for an option without effect on this head.
    `model.report` says what happened to each tensor.
    """
    options = ModelOptions(head, labels, pooling, problem, dropout, label_smoothing, seed)
    model_options.check_values(options, init, head_init, reinit_layers)
    folder = hub.resolve(str(name_or_path), revision)
    if sha256 and init == "pretrained":
        hub.verify_sha256(folder, sha256)
    raw = read_config(folder)
    architecture = ARCHITECTURES[str(raw["model_type"])]
    head_class = _head_class(head, architecture, folder)
    raw = model_options.limit_layers(raw, architecture, keep_layers)
    config = architecture.read_config(raw)
    config = replace(config, rates=config.rates._replace(**options.backbone_rates()))
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack, torch.device("cpu"):  # whatever the caller's default device, meta too
        files = open_checkpoint(folder, stack) if init == "pretrained" else None
        head_in_file = (
            head is not None
            and files is not None
            and head_init == "auto"
            and model_options.is_head_in_file(raw, architecture, head, files)
        )
        model = _build(architecture, config, raw, options, head_class, head_in_file, files, folder)
        names = weights.saved_tensors(model).keys()
        for name in names:  # ModelError now, not when the model is saved
            architecture.weights.find_row(name, head)
        if model.head is not None and not head_in_file:  # first, so that a new head does not depend on the backbone
            loaded = [*model.backbone.parameters()] if files is not None else []  # a tied output is the embedding
            model.head.init_weights(config.initializer_range, generator, skip=loaded)
        notes = model.report.notes
        if files is None:
            model.backbone.init_weights(generator)
            _check_initialised(model, folder)
            model.report = weights.LoadReport(f"none, scratch from seed {seed}", notes=notes)
            model.report.initialised = [name for name, _ in model.named_parameters()]
        if before_loading is not None:
            before_loading(model)
        if files is None:
            return model
        model.report = weights.load(
            model,
            names,
            architecture.weights,
            files,
            head=head,
            reset=head is not None and not head_in_file,
            drop_from=keep_layers or None,
            own_head="head" in raw,
        )
        model.report.notes += notes
        if reinit_layers:
            _reinitialise(model, reinit_layers, generator)
        return model


def _check_initialised(model: TaskModel, folder: Path) -> None:
    """Raise ModelError for parameters of a model from scratch that init_weights has left without values."""
    missing = [name for name, p in model.named_parameters() if p.isnan().any()]
    if missing:
        raise ModelError(
            f"{folder}: init_weights leaves {len(missing)} parameters without values: {', '.join(missing[:4])}"
        )


def _head_class(head: str | None, architecture: AnyArchitecture, folder: Path) -> type[Head] | None:
    """Return the class of a head; ModelError unless the architecture supports it.

    It supports the heads that it lists, and those that no architecture lists: the user's own.
    """
    listed = {name for other in ARCHITECTURES.values() for name in other.heads}
    if head in architecture.heads or (head in HEADS and head not in listed):
        return None if head is None else HEADS[head]
    supported = [name for name in (*architecture.heads, *HEADS) if name in architecture.heads or name not in listed]
    known = ", ".join(dict.fromkeys(name for name in supported if name))
    raise ModelError(
        f"{folder}: a {architecture.weights.model_type} model takes no head {head!r}; choose from {known}"
        + (f"; a head of your own is added first: models.HEADS[{head!r}] = its class" if head not in HEADS else "")
    )


def _build(
    architecture: AnyArchitecture,
    config: BackboneConfig,
    raw: JsonObject,
    options: ModelOptions,
    head_class: type[Head] | None,
    head_in_file: bool,
    files: TensorFiles | None,
    folder: Path,
) -> TaskModel:
    """Build the modules; tie a language model's output to the embedding where it should be."""
    name = options.head
    pooling = model_options.choose_pooling(options.pooling, raw, architecture, head_class, folder)
    if name is None or head_class is None:
        model_options.check_used(options, None, None)
        with Uninitialised(folder, *size_limits(files), mark=files is None):
            return TaskModel(architecture.build(config, None), None, ModelSpec(architecture, raw, None, ()))
    if head_in_file and not head_class.is_language_model:
        model_options.check_head(raw, architecture, name, pooling, folder)
    num_outputs = weights.num_outputs(files, architecture.weights, name) if files and head_in_file else None
    labels, note = model_options.choose_labels(options.labels, raw, head_class, head_in_file, num_outputs, folder)
    shape: HeadShape = architecture.head_shape(config, name, head_class, pooling)
    problem = model_options.choose_problem(options.problem, raw, name, head_in_file, labels)
    shape = replace(
        shape,
        pooling=pooling,
        num_labels=len(labels),
        problem=problem,
        dropout=options.rates().get("head", shape.dropout),
        label_smoothing=options.label_smoothing,
        tied=not shape.vocab_size or model_options.is_tied(raw, architecture, name, files),
    )
    model_options.check_used(options, head_class, problem)
    spec = ModelSpec(architecture, raw, name, tuple(labels))
    with Uninitialised(folder, *size_limits(files), mark=files is None):
        backbone = architecture.build(config, head_class)
        head = head_class(shape) if name in architecture.weights.heads else None
    if head is None:  # the user's own, whose __init__ may give its parameters values
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            head = head_class(shape)
    model = TaskModel(backbone, head, spec)
    model.report.notes += [note] if note else []
    if model.head is not None and model.embedding is not None and shape.vocab_size and shape.tied:
        model.head.tie(model.embedding)
    return model


def read_config(folder: Path) -> JsonObject:
    """Return the config.json of a checkpoint folder, its model_type checked against ARCHITECTURES."""
    path = folder / "config.json"
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise ModelError(f"{folder}: no config.json, so this is not a checkpoint folder") from None
    model_type = raw.get("model_type") if isinstance(raw, dict) else raw
    if isinstance(raw, dict) and model_type is None:
        raise ModelError(
            f"{path} has no model_type, like other old files; add the right one, for a BERT "
            f'"model_type": "bert" (supported: {", ".join(ARCHITECTURES)})'
        )
    if not isinstance(model_type, str) or not isinstance(raw, dict) or model_type not in ARCHITECTURES:
        shown = reprlib.repr(model_type)
        raise ModelError(f"{path}: model_type = {shown} is not supported; choose from {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type].complete(raw)


@torch.no_grad()
def _reinitialise(model: TaskModel, count: int, generator: torch.Generator) -> None:
    """Initialise the last `count` layers again, and correct the report of loaded tensors."""
    layers = list(model.backbone.layers)
    if not 0 < count <= len(layers):
        raise ModelError(f"model.reinit_layers = {count}: the model has {len(layers)} layers")
    last_layers = layers[-count:]
    model.backbone.init_weights(generator, last_layers)
    chosen = {p for layer in last_layers for p in layer.parameters()}
    fresh = {name: p for name, p in model.named_parameters() if p in chosen}
    table, report = model.spec.architecture.weights, model.report
    in_file = {table.find_row(name, model.head_name).theirs for name in fresh}
    replaced = [key for key in report.loaded if table.current_name(key) in in_file]
    report.loaded = [key for key in report.loaded if key not in replaced]
    report.renamed = [line for line in report.renamed if line.partition(" -> ")[0] not in replaced]
    report.ignored += replaced
    report.parameters -= sum(p.numel() for p in fresh.values())
    report.initialised += fresh


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze the parameters whose names match a shell pattern ("backbone.layers.0.*"); return their names.

    The backward skips frozen layers that have no trained parameter below them.
    Raises ModelError for a pattern without a match, and where no parameter is left to train. A pattern must not match a
    tied parameter under its second name only.
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
                    f"model.freeze = {pattern!r}: {name} is tied to {names[name]!r}, which would still be trained; "
                    f"add that name too, or leave {name} out"
                )
    if frozen and not any(p.requires_grad for name, p in parameters.items() if name not in frozen):
        raise ModelError(f"model.freeze = {', '.join(patterns)!r} leaves nothing to train")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def save_pretrained(model: TaskModel, folder: str | Path) -> None:
    """Write model.safetensors and config.json, as transformers reads them, into a new or existing folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights.export(merged_tensors(model), model.spec.architecture.weights, model.head_name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_config(model, folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors writes files of mode 0600


def save_config(model: TaskModel, folder: Path) -> None:
    """Write config.json into a folder."""
    (folder / "config.json").write_text(json.dumps(_exported_config(model), indent=2) + "\n", encoding="utf-8")


def _exported_config(model: TaskModel) -> JsonObject:
    """Return the config.json of a model."""
    spec, head = model.spec, model.head
    config = {k: v for k, v in spec.config.items() if k not in (*REPLACED, *STALE)}
    if head is None or spec.head_name is None:
        return config | {"architectures": [spec.architecture.heads[None]]}
    shape = head.shape
    config["architectures"] = [model_options.hub_class(spec.architecture, spec.head_name, shape.pooling)]
    if spec.head_name not in spec.architecture.weights.heads:
        config["head"] = spec.head_name
    if shape.vocab_size:
        return config | {"tie_word_embeddings": shape.tied}
    if head.reads_pooled or head.has_labels:
        config["pooling"] = shape.pooling
        field = spec.architecture.pooling_field
        if field and head.has_labels and shape.pooling in spec.architecture.hub_poolings:
            config.pop(field, None)
            config[field] = shape.pooling
    if head.has_labels or len(head.problems) > 1:
        config["problem_type"] = model_options.HUB_PROBLEMS[shape.problem]
    if head.has_labels:
        config["id2label"] = {str(i): label for i, label in enumerate(model.labels)}
        config["label2id"] = {label: i for i, label in enumerate(model.labels)}
    return config
