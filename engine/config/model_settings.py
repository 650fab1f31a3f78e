"""The sections of a recipe on the model: [model], [model.dropout] and [model.lora]."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config.schema import setting


@dataclass(frozen=True)
class DropoutSettings:
    """Dropout rates by site; none keeps the checkpoint's rate."""

    all: float | None = setting(None, "rate of every site below that is none, except drop_path", within="in [0, 1)")
    embedding: float | None = setting(None, "rate after the embeddings", within="in [0, 1)")
    attention: float | None = setting(None, "rate on the attention weights", within="in [0, 1)")
    hidden: float | None = setting(
        None, "rate on each block's output, before it is added to the residual stream", within="in [0, 1)"
    )
    head: float | None = setting(None, "rate before the head's last layer", within="in [0, 1)")
    drop_path: float | None = setting(
        None, "rate at which an example skips a whole block (stochastic depth)", within="in [0, 1)"
    )
    schedule: str = setting(
        "constant",
        "how all rates change over the run; linear: rise from 0; early: fall to 0 at switch_step; late: 0 until "
        "switch_step",
        ("constant", "linear", "early", "late"),
    )
    switch_step: float = setting(
        0.5, "where early reaches 0 and late begins: a number of steps, or below 1 a share of all steps", within=">= 0"
    )

    def rates(self) -> dict[str, float]:
        """Return {site: rate} for the sites whose rate is set, by `all` or their own setting."""
        own = {name: getattr(self, name) for name in ("embedding", "attention", "hidden", "head", "drop_path")}
        rates = {site: self.all if rate is None and site != "drop_path" else rate for site, rate in own.items()}
        return {site: rate for site, rate in rates.items() if rate is not None}


@dataclass(frozen=True)
class LoraSettings:
    """LoRA: train a low-rank update of some projections instead of the weights (models/lora.py)."""

    rank: int = setting(0, "rank of the update; 0: no LoRA, all weights are trained", within="in [0, 10000]")
    alpha: float | None = setting(None, "the update is multiplied by alpha / rank; none: 2 * rank", within="> 0")
    dropout: float = setting(0.0, "dropout rate on the input of the update", within="in [0, 1)")
    target_modules: tuple[str, ...] = setting(
        (), "patterns of layer names that get an adapter, as *.query,*.mlp.*; empty: queries and values"
    )
    dora: bool = setting(False, "DoRA: also train the length of each row of the updated weights")
    frozen_weights: str = setting(
        "fp32",
        "precision to which the frozen linear layers are rounded, to need less memory; nf4 needs bitsandbytes",
        ("fp32", "bf16", "int8", "nf4"),
    )


@dataclass(frozen=True)
class ModelSettings:
    """The pretrained model, and which part of it is trained."""

    name: str = setting(
        "",
        "checkpoint to start from: a local folder, package:NAME/FOLDER, or a name on the Hugging Face hub",
        needed="name a local folder, package:NAME/FOLDER or a hub name",
    )
    revision: str = setting(
        "", "commit, tag or branch of a name on the hub; a commit alone fixes the files; empty: its branch main"
    )
    sha256: str = setting("", "expected SHA-256 of its model.safetensors; empty: not checked")
    init: str = setting("pretrained", "scratch: the checkpoint's shape with random weights", ("pretrained", "scratch"))
    head_init: str = setting(
        "auto", "auto: the checkpoint's head if it has one; reset: always a new head", ("auto", "reset")
    )
    pooling: str = setting(
        "",
        "vector of an example: of the first token (cls), the mean, of the last token, or of images the first one "
        "beside the mean (cls_mean); empty: as the checkpoint says",
        ("", "cls", "mean", "last", "cls_mean"),
    )
    freeze: tuple[str, ...] = setting(
        (), "patterns of parameter names that are not trained, as backbone.layers.0.*; empty: all are trained"
    )
    gradual_unfreezing: float = setting(
        0.0,
        "steps between unfreezing one layer and the next below it, beginning with the head alone (below 1: a share of "
        "all steps); 0: all layers are trained from the start",
        within=">= 0",
    )
    keep_layers: int = setting(
        0, "number of layers to keep, counted from the first; the rest are removed; 0: all", within=">= 0"
    )
    reinit_layers: int = setting(0, "number of last layers that start from random weights; 0: none", within=">= 0")
    dropout: DropoutSettings = DropoutSettings()
    lora: LoraSettings = LoraSettings()
