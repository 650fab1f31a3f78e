"""Images: folders, lists and IDX files, unusual and bad pictures (F12), and encoded examples."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import COLOURS, bad_images, folder_of_colours, picture, small_png, write

from data import DataError
from data import image_classification as image_data
from data.errors import BadRowsError, ErrorList
from data.formats.image_files import decode
from data.formats.options import FileOptions
from data.image_classification import encode_images, read_images
from data.image_preprocessing import Preprocessing

SKIP = FileOptions(bad_rows="skip")
PREPROCESSING = Preprocessing((16, 16), 2, None, 1 / 255, (0.5,) * 3, (0.5,) * 3, tokens=5)


def write_idx(path: Path, array: np.ndarray) -> Path:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# Files


def test_a_folder_for_each_class(tmp_path):
    folder_of_colours(tmp_path, 3)
    write(tmp_path / "green/more/deep.PNG", picture())
    for name in (".DS_Store", "red/Thumbs.db", "red/.hidden.png", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    rows = read_images(str(tmp_path))
    assert [row.id for row in rows] == [
        *("blue/000.png", "blue/001.jpg", "blue/002.bmp"),
        *("green/000.png", "green/001.jpg", "green/002.bmp", "green/more/deep.PNG"),
        *("red/000.png", "red/001.jpg", "red/002.bmp"),
    ]
    assert [row.values["label"] for row in rows] == ["blue"] * 3 + ["green"] * 4 + ["red"] * 3
    assert rows[0].values["path"] == tmp_path / "blue/000.png"


def test_unlabelled_folder_may_be_flat_and_have_cyclic_links(tmp_path):
    write(tmp_path / "b.png", picture())
    write(tmp_path / "more/a.png", picture())
    (tmp_path / "more/around").symlink_to(tmp_path, target_is_directory=True)
    assert [row.id for row in read_images(str(tmp_path), label="")] == ["b.png", "more/a.png"]
    with pytest.raises(DataError, match=r"b\.png: in no folder of a class"):
        read_images(str(tmp_path))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_list_of_paths_is_relative_to_its_file(tmp_path, kind):
    for i in range(3):
        write(tmp_path / f"pictures/{i}.png", picture())
    rows = [{"path": f"pictures/{i}.png", "label": str(i % 2), "id": f"n{i}"} for i in range(3)]
    if kind == "jsonl":
        text = "\n".join(map(json.dumps, rows))
    else:
        text = "\n".join(("," if kind == "csv" else "\t").join(x) for x in (rows[0], *(r.values() for r in rows)))
    (tmp_path / f"list.{kind}").write_text(text + "\n")
    read = read_images(str(tmp_path / f"list.{kind}"))
    assert [(row.id, row.values["label"], row.values["path"]) for row in read] == [
        (f"n{i}", str(i % 2), tmp_path / f"pictures/{i}.png") for i in range(3)
    ]


def test_all_that_is_wrong_in_a_list_is_said_with_its_line(tmp_path):
    write(tmp_path / "good.png", picture())
    (tmp_path / "bad.png").write_bytes(b"no picture")
    lines = ["path,label", "good.png,a", "missing.png,a", "bad.png,b", "good.png,b"]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError) as error:
        read_images(str(tmp_path / "list.csv"))
    first, second = str(error.value).splitlines()
    assert first == f"{tmp_path}/list.csv:3: missing.png: no such file"
    assert second.startswith(f"{tmp_path}/list.csv:4: bad.png: not an image of a kind that is read: JPEG")
    (tmp_path / "list.csv").write_text("path,label\ngood.png,\n,a\n")
    with pytest.raises(
        DataError, match=r"(?s)list\.csv:2: the label in 'label' is empty.*list\.csv:3: 'path' is empty"
    ):
        read_images(str(tmp_path / "list.csv"))


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files(tmp_path, ending):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 4), dtype=np.uint8)
    path = write_idx(tmp_path / f"train-images-idx3-ubyte{ending}", pixels)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{ending}", np.arange(7) % 3)
    rows = read_images(str(path))
    assert [(row.id, row.line, row.values["label"]) for row in rows] == [
        (str(i), i, str((i - 1) % 3)) for i in range(1, 8)
    ]
    assert [row.values["label"] for row in read_images(str(path), labels=("x", "y", "z"))] == list("xyzxyzx")
    examples = encode_images(rows, replace(PREPROCESSING, size=None, crop=(4, 4)), labels=("0", "1", "2"))
    assert np.array_equal(examples.images, pixels)
    batch = examples.batch([3, 1])
    assert batch.pixel_values.shape == (2, 3, 4, 4)
    expected = torch.from_numpy(pixels[3, :4].astype(np.float32)) / 255 * 2 - 1
    torch.testing.assert_close(batch.pixel_values[0], expected.expand(3, 4, 4))
    assert batch.labels.tolist() == [0, 1]
    (tmp_path / f"train-labels-idx1-ubyte{ending}").unlink()
    assert len(read_images(str(path), label="")) == 7  # to predict, no labels are needed


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (None, None, "images-idx3-ubyte: no such file"),
        (b"\0\0\x08", b"", "not an IDX file of bytes in 3 dimensions"),
        (b"\0\0\x0d\3" + struct.pack(">3I", 1, 1, 1) + b"x", b"", "not an IDX file of bytes"),
        (b"\0\0\x08\3" + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 9), b"", "incomplete"),
        (b"\0\0\x08\3" + struct.pack(">3I", 1, 1, 1) + b"xy", b"", "1 bytes should follow the header, there are more"),
        (b"\0\0\x08\3" + struct.pack(">3I", 0, 9, 9), b"", "no images"),
        (b"\0\0\x08\3" + struct.pack(">3I", 1, 1, 1) + b"x", None, "labels-idx1-ubyte: no such file"),
        (
            b"\0\0\x08\3" + struct.pack(">3I", 1, 1, 1) + b"x",
            b"\0\0\x08\1" + struct.pack(">I", 2) + b"\0\1",
            "2 labels for the 1 images",
        ),
        (
            b"\0\0\x08\3" + struct.pack(">3I", 1, 1, 1) + b"x",
            b"\0\0\x08\1" + struct.pack(">I", 1) + b"\3",
            "labels-idx1-ubyte:1: label 3, but data.labels has 2 names",
        ),
    ],
)
def test_broken_idx_files(tmp_path, images, labels, message):
    for name, content in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_images(str(tmp_path / "images-idx3-ubyte"), labels=("a", "b"))


@pytest.mark.parametrize("damage", [lambda x: x[:-9], lambda x: x[:30] + b"?????" + x[35:], lambda x: x[:2]])
def test_damaged_gzip(tmp_path, damage):
    path = write_idx(tmp_path / "images-idx3-ubyte.gz", np.random.default_rng(0).integers(0, 256, (9, 9, 9)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"images-idx3-ubyte\.gz: "):
        read_images(str(path), label="")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "patient"}, "data.group_column = 'patient' is a column, and there are none"),
        ({"options": FileOptions(format="idx")}, "cannot be read: Is a directory"),
        ({"options": FileOptions(format="csv")}, "this is a folder"),
        ({}, ": no images"),
    ],
)
def test_settings_that_do_not_fit_a_folder(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        read_images(str(tmp_path), **options)


def test_a_folder_or_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_images(str(tmp_path / "none"), options=FileOptions(format="folder"))
    with pytest.raises(DataError, match="no such file"):
        read_images(str(tmp_path / "none"))


# Pictures that are unusual, and right


def grey_16(levels) -> Image.Image:
    return Image.fromarray(np.asarray(levels, dtype=np.uint16))


def test_16_bits_keep_their_upper_8(tmp_path):
    levels = np.arange(0, 65536, 257).reshape(16, 16)
    image = decode(write(tmp_path / "a.png", grey_16(levels)))
    assert np.array_equal(np.asarray(image), levels >> 8)
    assert np.array_equal(np.asarray(decode(write(tmp_path / "a.tif", grey_16(levels)))), levels >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_was_held_otherwise(tmp_path, orientation):
    """EXIF tells how to rotate the stored image so that it is upright."""
    upright = picture(size=(8, 6))
    undo = [None, 0, 3, 1, 5, 2, 6, 4][orientation - 1]  # Pillow's numbers of the opposite turn
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(decode(write(tmp_path / "a.png", stored, exif=exif))), np.asarray(upright))


def test_other_modes_become_what_the_model_reads(tmp_path):
    image = picture(size=(16, 16))
    for mode, kind in [("CMYK", "jpg"), ("L", "png"), ("P", "gif"), ("RGBA", "png"), ("LA", "png"), ("1", "png")]:
        write(tmp_path / mode / f"x.{kind}", image.convert(mode))
    write(tmp_path / "T/x.png", image.convert("P"), transparency=bytes(range(100)))
    examples = encode_images(
        read_images(str(tmp_path)), PREPROCESSING, labels=("1", "CMYK", "L", "LA", "P", "RGBA", "T")
    )
    assert examples.batch(range(7)).pixel_values.shape == (7, 3, 16, 16)
    by_label = {row.id[:-6]: i for i, row in enumerate(read_images(str(tmp_path)))}
    plain = examples.batch([by_label["RGBA"]]).pixel_values
    cmyk = examples.batch([by_label["CMYK"]]).pixel_values
    assert (plain - cmyk).abs().mean() < 0.2  # JPEG and the way there and back
    to_grey = replace(PREPROCESSING, mean=(0.5,), std=(0.5,))
    grey = encode_images(read_images(str(tmp_path), label=""), to_grey, label="", labels=())
    assert grey.pixels(0).shape == (1, 16, 16)


def test_a_name_does_not_say_what_is_inside(tmp_path):
    path = write(tmp_path / "a.jpg", picture(), "PNG")
    assert np.array_equal(np.asarray(decode(path)), np.asarray(picture()))


# F12


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    found = bad_images(root)
    for i in range(6):
        write(root / f"{'ab'[i % 2]}/good-{i}.png", picture(seed=i))
    return root, found


def test_f12_every_bad_image_is_named_with_its_reason(bad_folder, monkeypatch):
    root, found = bad_folder
    assert len(found) >= 200
    monkeypatch.setattr(ErrorList, "SHOWN", 1000)
    monkeypatch.setattr(ErrorList, "SHOWN_OF_KIND", 1000)
    with pytest.raises(BadRowsError) as error:
        read_images(str(root))
    lines = str(error.value).splitlines()
    assert len(lines) == len(found)
    for name, reason in found.items():
        (line,) = [line for line in lines if line.startswith(f"{root}: {name}: ")]
        assert reason in line


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it finds odd
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_f12_a_damaged_image_is_an_image_or_an_error_of_ours(tmp_path, kind):
    buffer = io.BytesIO()
    picture(size=(30, 20)).save(buffer, kind)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(60):
        content = np.frombuffer(buffer.getvalue(), np.uint8).copy()
        for place in rng.integers(0, min(len(content), 200), 3):
            content[place] = rng.integers(256)
        (tmp_path / "x").write_bytes(content.tobytes())
        try:
            outcomes.add(type(image_data.to_pixels(decode(tmp_path / "x"), PREPROCESSING)))
        except DataError:
            outcomes.add(DataError)
    assert DataError in outcomes


def test_files_that_no_image_can_be_read_from(tmp_path):
    write(tmp_path / "a/x.png", picture())
    os.mkfifo(tmp_path / "a/pipe.png")
    (tmp_path / "a/away.png").symlink_to(tmp_path / "nothing")
    with open(os.fsencode(tmp_path / "a") + b"/\xff.png", "wb") as stream:
        stream.write(b"?")
    with pytest.raises(DataError) as error:
        read_images(str(tmp_path))
    reasons = ["away.png: cannot be read: No such file", "pipe.png: not a regular file", "its name is not UTF-8"]
    for reason, line in zip(reasons, str(error.value).splitlines(), strict=False):
        assert reason in line


def test_f12_bad_images_are_left_out_when_asked_and_counted(bad_folder):
    root, found = bad_folder
    rows = read_images(str(root), options=SKIP)
    assert [row.id for row in rows] == [f"{c}/good-{i}.png" for c, i in zip("aaabbb", (0, 2, 4, 1, 3, 5), strict=True)]
    assert {row.id for row in rows.left_out} == set(found)
    assert f"{len(found)} of {len(found) + 6} rows left out" in rows.notes[-1]
    again = read_images(str(root), options=SKIP)
    assert [(row.id, row.values) for row in again] == [(row.id, row.values) for row in rows]


def test_f12_when_all_are_bad_nothing_is_left(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"a/x\.png: an empty file"):
        read_images(str(tmp_path), options=SKIP)


def test_f12_a_bomb_takes_no_memory(tmp_path):
    resource = pytest.importorskip("resource")
    (tmp_path / "bomb.png").write_bytes(small_png(9_400, 9_400))  # just within Pillow's own limits
    (tmp_path / "bomb2.png").write_bytes(small_png(13_000, 13_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    for name in ("bomb.png", "bomb2.png"):
        with pytest.raises(DataError):
            decode(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    if sys.platform == "linux":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 350_000  # KiB


def test_an_image_that_changes_during_a_run_is_named(tmp_path):
    path = write(tmp_path / "a/x.png", picture())
    examples = encode_images(read_images(str(tmp_path)), PREPROCESSING, labels=("a",))
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a/x\.png: an empty file; it was an image when the run began"):
        examples.batch([0])
    path.unlink()
    with pytest.raises(DataError, match=r"a/x\.png: .*it was an image when the run began"):
        examples.batch([0])


# Examples


def test_fingerprint_covers_pixels_labels_names_and_processing(tmp_path):
    root = folder_of_colours(tmp_path, 2)

    def fingerprint(preprocessing=PREPROCESSING):
        return encode_images(read_images(str(root)), preprocessing, labels=tuple(COLOURS)).fingerprint()

    prints = [fingerprint(), fingerprint(replace(PREPROCESSING, size=(8, 8)))]
    assert fingerprint() == prints[0]
    write(root / "red/000.png", picture(seed=99))
    prints.append(fingerprint())
    (root / "red/000.png").rename(root / "red/00.png")
    prints.append(fingerprint())
    (root / "red/00.png").rename(root / "blue/00.png")
    prints.append(fingerprint())
    assert len(set(prints)) == 5


def test_what_the_loop_asks_of_examples(tmp_path):
    examples = encode_images(
        read_images(str(folder_of_colours(tmp_path, 4))), PREPROCESSING, labels=("blue", "green", "red")
    )
    assert examples.lengths.tolist() == [5] * 12
    assert examples.label_counts(3).tolist() == [4, 4, 4]
    batch = examples.batch([11, 0])
    assert (batch.num_tokens, batch.num_targets, batch.ids) == (10, 2, ("red/003.png", "blue/000.png"))
    assert batch.labels.tolist() == [2, 0]
    empty = examples.batch([])
    assert (empty.pixel_values.shape, empty.labels.shape, empty.num_tokens) == ((0, 3, 16, 16), (0,), 0)
    assert examples.show(0, PREPROCESSING, ("blue", "green", "red"))[0] == "id blue/000.png  blue"
    unlabelled = encode_images(read_images(str(tmp_path), label=""), PREPROCESSING, label="", labels=())
    assert unlabelled.batch([0]).labels is None
    assert unlabelled.label_counts(3) is None
