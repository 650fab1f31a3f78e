"""An index of images in memory-mapped files: the same examples as of the rows, in memory that does not grow."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import textwrap
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pictures import folder_of_colours

from data import DataError, MicroBatching, training_steps
from data import mapped as module
from data.augmentation.image import ImageAugmentation
from data.image_classification import encode_images, read_images
from data.image_preprocessing import Preprocessing
from data.mapped import Facts, Part, Shard
from data.mapped_images import open_images, write_image_shard

PREPROCESSING = Preprocessing((16, 16), 2, None, 1 / 255, (0.5,) * 3, (0.5,) * 3, tokens=5)
LABELS = ("blue", "green", "red")
ROOT = Path(__file__).parents[2]


def facts(counts: np.ndarray | None = None, fingerprint: str = "f") -> Facts:
    return Facts(fingerprint, (), 0, counts, np.zeros(0, np.int64), {}, 0, 0, "")


@pytest.fixture(scope="module", params=["folder", "tar"])
def source(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    folder = folder_of_colours(root / "set", 5)
    if request.param == "folder":
        return folder
    with tarfile.open(root / "set.tar", "w") as archive:
        archive.add(folder, ".")
    return root / "set.tar"


def write_shards(source: Path, folder: Path) -> tuple[list[Part], list]:
    """Write two shards of the source's rows; return them and the rows."""
    rows = read_images(str(source))
    parts = []
    for number, chosen in enumerate((rows[:7], rows[7:])):
        file = folder / f"images-{number}.safetensors"
        written = write_image_shard(file, encode_images(chosen, PREPROCESSING, labels=LABELS))
        assert written["files"] == {file.name: file.stat().st_size}
        parts.append(Part(Shard([file]), written["sizes"]))
    return parts, rows


def test_examples_are_those_of_the_rows(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "USES_KEPT", 5)
    num_workers = 2 if source.is_file() else 0
    parts, rows = write_shards(source, tmp_path)
    expected = encode_images(rows, PREPROCESSING, labels=LABELS)
    counts = expected.label_counts(3)
    mapped = open_images(parts, facts(counts), PREPROCESSING, 3)
    assert len(mapped) == len(expected) == 15
    assert [*mapped.ids] == [*expected.ids]
    assert [*mapped.digests] == [*expected.digests]
    assert mapped.label_counts(3) is counts
    assert mapped.fingerprint() == "f"
    assert [str(image) for image in mapped.images] == [str(image) for image in expected.images]
    assert mapped.images[-1] == expected.images[14]
    with pytest.raises(IndexError, match="example 15 of 15"):
        mapped.images[15]
    augmentation = ImageAugmentation(0, horizontal_flip=0.5, mixup=0.4)
    for change in (None, augmentation):
        streams = [
            training_steps(
                replace(examples, augmentation=change), 6, 0, MicroBatching(max_examples=4), num_workers=workers
            )
            for examples, workers in ((expected, 0), (mapped, num_workers))
        ]
        for ours, theirs in zip(islice(streams[0], 5), islice(streams[1], 5), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert (a.ids, a.indices) == (b.ids, b.indices)
                assert torch.equal(a.pixel_values, b.pixel_values)
                assert torch.equal(a.labels, b.labels)


def test_classes_follow_the_model_s_order(source, tmp_path):
    parts, rows = write_shards(source, tmp_path)
    order = ("red", "blue", "green")
    remap = np.array([order.index(label) for label in LABELS])
    mapped = open_images(parts, facts(), PREPROCESSING, 3, remap)
    assert mapped.labels[np.arange(15)].tolist() == [order.index(row.values["label"]) for row in rows]
    assert mapped.show(0, None, order)[0] == "id blue/000.png  blue"


def test_images_that_were_moved_or_changed_are_refused(source, tmp_path):
    parts, _ = write_shards(source, tmp_path)
    first = source if source.is_file() else source / "blue/000.png"
    content = first.read_bytes()
    try:
        first.write_bytes(content + b"x")
        with pytest.raises(DataError, match=rf"{first.name} has .* was made when it had {len(content):,}: prepare"):
            open_images(parts, facts(), PREPROCESSING, 3)
        first.unlink()
        with pytest.raises(DataError, match=rf"{first.name}: No such file or directory; .* has its index: prepare"):
            open_images(parts, facts(), PREPROCESSING, 3)
    finally:
        first.write_bytes(content)


def test_images_that_are_no_files_are_refused(tmp_path):
    examples = encode_images(read_images(str(folder_of_colours(tmp_path / "set", 1))), PREPROCESSING, labels=LABELS)
    object.__setattr__(examples, "images", [b"content"] * 3)
    with pytest.raises(
        DataError, match=r"the image with id 'blue/000\.png' is no file of its own: train from the file"
    ):
        write_image_shard(tmp_path / "x.safetensors", examples)
    (tmp_path / "other.safetensors").write_bytes((16).to_bytes(8, "little") + b"{}" + b" " * 14)
    parts = [Part(Shard([tmp_path / "other.safetensors"]), {"examples": 3})]
    with pytest.raises(DataError, match="has no array 'places': it is no index of images"):
        open_images(parts, facts(), PREPROCESSING, 3)


FIRST_STEPS = """
    import sys
    from itertools import islice
    from pathlib import Path

    import numpy as np
    import torch

    from data import MicroBatching, training_steps
    from data.image_classification import ImageExamples
    from data.image_preprocessing import Preprocessing
    from data.lengths import count_lengths
    from data.mapped import Facts, Part, Shard
    from data.mapped_images import open_images

    def peak():  # KiB; getrusage counts what the parent had before exec
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

    def steps(path, n, start):
        facts = Facts("", (), 0, np.array([n, 0]), np.zeros(0, np.int64), {}, 0, 0, "")
        preprocessing = Preprocessing((16, 16), 2, None, 1 / 255, (0.5,) * 3, (0.5,) * 3, tokens=5)
        examples = open_images([Part(Shard([path]), {"examples": n})], facts, preprocessing, 2)
        assert len(examples) == n == count_lengths(examples.lengths)[5]
        return islice(training_steps(examples, 32, 0, MicroBatching(max_examples=8), start=start), min(n // 32, 200))

    ImageExamples.pixels = lambda self, index: (self.images[index], torch.zeros(3, 16, 16, dtype=torch.uint8))[1]
    grown = []
    for path, n in ((sys.argv[1], 3_200), (sys.argv[2], 10**8)):
        before = peak()
        indices = [i for step in steps(Path(path), n, 3 * n // 32) for batch in step for i in batch.indices]
        assert len(set(indices)) == len(indices) == min(n, 200 * 32)
        grown.append(peak() - before)
    print(grown[1])
"""


def write_sparse(file: Path, archive: Path, n: int) -> Path:
    """Write an index of n images of no bytes, in a file that takes a few pages of a disk."""
    begin, header, path = 0, {}, str(archive).encode()
    shapes = {"places": ("I64", [n, 3], 24), "digests": ("U8", [n, 32], 32), "labels": ("I64", [n], 8)}
    shapes |= {"id_offsets": ("I64", [n], 8), "path_offsets": ("I64", [1], 8), "path_sizes": ("I64", [1], 8)}
    shapes |= {"id_bytes": ("U8", [0], 1), "path_bytes": ("U8", [len(path)], 1)}
    for name, (dtype, shape, width) in shapes.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + shape[0] * width]}
        begin += shape[0] * width
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.seek(8 + len(text) + begin - len(path))
        stream.write(path)
    return file


@pytest.mark.slow
def test_memory_of_a_step_does_not_depend_on_the_images(tmp_path):
    """A sparse index of 100 million images in one archive; an array of their places would have 2,400 MB."""
    archive = tmp_path / "x.tar"
    archive.write_bytes(b"")
    files = [str(write_sparse(tmp_path / f"{n}.safetensors", archive, n)) for n in (3_200, 10**8)]
    command = [sys.executable, "-c", textwrap.dedent(FIRST_STEPS), *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 80_000  # KiB
