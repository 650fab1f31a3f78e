"""Models for peers without a model of their own: GPT-2 as nanoGPT computes it, and our weights in timm's ViT."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE_INDEX = -100


class Block(nn.Module):
    """A pre-norm block: queries, keys and values are one product, and attention is PyTorch's causal one."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.mlp_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D)
        shape, p = x.shape, self.dropout if self.training else 0.0
        parts = self.c_attn(self.ln_1(x)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # (B, H, L, D / H)
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=p, is_causal=True)
        x = x + F.dropout(self.c_proj(mixed.transpose(1, 2).reshape(shape)), p)
        hidden = F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        return x + F.dropout(self.mlp_proj(hidden), p)


class NanoGPT(nn.Module):
    """GPT-2 as nanoGPT (github.com/karpathy/nanoGPT) computes it, rewritten: no mask, logits at every position."""

    def __init__(self, config: dict[str, Any], dropout: bool):
        super().__init__()
        width, rate = config["n_embd"], config.get("resid_pdrop", 0.1) if dropout else 0.0
        self.dropout = rate
        self.wte, self.wpe = nn.Embedding(config["vocab_size"], width), nn.Embedding(config["n_positions"], width)
        self.h = nn.ModuleList(Block(width, config["n_head"], rate) for _ in range(config["n_layer"]))
        self.ln_f = nn.LayerNorm(width)

    @classmethod
    def from_pretrained(cls, folder: Path, dropout: bool) -> NanoGPT:
        """Load the hub's files, whose matrices are (in, out)."""
        config = {"n_positions": 1024} | json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = cls(config, dropout)
        state = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            name = name.removeprefix("transformer.")
            if ".attn." in name or ".mlp." in name:
                tensor = tensor.T if tensor.ndim == 2 else tensor
                name = name.replace(".mlp.c_proj", ".mlp_proj").replace(".mlp.", ".").replace(".attn.", ".")
            state[name] = tensor
        state.pop("lm_head.weight", None)  # tied to the embedding
        model.load_state_dict(state)
        return model

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss. ids, targets: (B, L); a target of IGNORE_INDEX has no loss."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        x = F.dropout(x, self.dropout)
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)


def pad_shifted(shift: bool) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Return a collator of ids and targets, (B, L), padded on the right. shift: the labels are not shifted yet."""

    def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [(f["input_ids"][: -1 if shift else None], f["labels"][1 if shift else 0 :]) for f in features]
        ids, targets = ([torch.tensor(row[i]) for row in rows] for i in (0, 1))
        pad = nn.utils.rnn.pad_sequence
        return {
            "ids": pad(ids, batch_first=True),
            "targets": pad(targets, batch_first=True, padding_value=IGNORE_INDEX),
        }

    return collate


TIMM_NAMES = (  # (the hub's, timm's)
    ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("vit.embeddings.cls_token", "cls_token"),
    ("vit.embeddings.position_embeddings", "pos_embed"),
    ("vit.layernorm.", "norm."),
    ("vit.encoder.layer.", "blocks."),
    ("attention.output.dense", "attn.proj"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("classifier", "head"),
)


def timm_vit(folder: Path) -> Any:
    """Return timm's VisionTransformer with the weights of a checkpoint of ours."""
    from timm.models import VisionTransformer

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    width = config["hidden_size"]
    model = VisionTransformer(
        img_size=config["image_size"],
        patch_size=config["patch_size"],
        embed_dim=width,
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_ratio=config["intermediate_size"] / width,
        num_classes=len(config["id2label"]),
        norm_layer=partial(nn.LayerNorm, eps=config.get("layer_norm_eps", 1e-12)),
    )
    state: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for theirs, timms in TIMM_NAMES:
            name = name.replace(theirs, timms)
        state[name] = tensor
    for i in range(config["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{i}.attention.attention.{part}.{kind}") for part in ("query", "key", "value")]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    model.load_state_dict(state)
    return model
