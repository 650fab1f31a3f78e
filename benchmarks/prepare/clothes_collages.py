"""Collages of clothes with several labels each, made from the images of data/samples/fashion_mnist.

    python -m benchmarks.prepare clothes_collages

Output:
- train.tar (3,000 collages) and test.tar (500): 56 x 56 grey pixels, four cells. Each cell has a piece of clothing with
  probability 1/2, from the sample's training images or from its test images, or else dark noise. So 6% of the collages
  have no label. Beside NNNN.png is NNNN.json with {"labels": names of the clothes}, as webdataset has them.
- model/: the shape of a small ViT (4 layers, 128 wide, patches of 8 x 8), without weights.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from data.formats import idx
from data.formats.lines import locate

SAMPLE = "package:data/samples/fashion_mnist"
NAMES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIDE = 28  # pixels of a cell
NOISE = 32  # grey levels of empty cells, which are random, so that no two collages are equal
SPLITS = {"train": ("train", 3_000), "test": ("t10k", 500)}  # the sample's files, and the number of collages
SHAPE = {
    "model_type": "vit",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "image_size": 2 * SIDE,
    "patch_size": 8,
    "num_channels": 1,
}
PREPROCESSING = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": False,
    "do_center_crop": True,
    "crop_size": {"height": 2 * SIDE, "width": 2 * SIDE},
    "image_mean": [0.5],
    "image_std": [0.5],
}


def make_collage(images: np.ndarray, classes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Return (2 * SIDE, 2 * SIDE) uint8 and the sorted labels. images: (N, SIDE, SIDE); classes: (N,)."""
    collage = rng.integers(0, NOISE, (2 * SIDE, 2 * SIDE), dtype=np.uint8)
    labels = set()
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        if rng.random() < 0.5:
            chosen = int(rng.integers(len(images)))
            collage[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE] = images[chosen]
            labels.add(NAMES[int(classes[chosen])])
    return collage, sorted(labels)


def add_file(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member of a fixed date, so that the same command makes the same archive."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def prepare(folder: Path) -> None:
    """Write train.tar, test.tar and model/."""
    for number, (split, (stem, count)) in enumerate(SPLITS.items()):
        images, classes = (
            idx.read(locate(f"{SAMPLE}/{stem}-{kind}-ubyte.gz"), dimensions)
            for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1))
        )
        rng = np.random.default_rng([0, number])
        with tarfile.open(folder / f"{split}.tar", "w") as archive:
            for i in range(count):
                collage, labels = make_collage(images, classes, rng)
                content = io.BytesIO()
                Image.fromarray(collage).save(content, "PNG")
                add_file(archive, f"{i:04d}.png", content.getvalue())
                add_file(archive, f"{i:04d}.json", json.dumps({"labels": labels}).encode())
    (folder / "model").mkdir(exist_ok=True)
    for name, values in (("config", SHAPE), ("preprocessor_config", PREPROCESSING)):
        (folder / "model" / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
