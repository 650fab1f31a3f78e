"""Images as people have them: layouts of folders, kinds of files, what decoding changes, and lists of paths."""

from __future__ import annotations

import io
import os
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.cases import dry_run, predictions, run, settings_for, write_file
from support.pictures import picture, write

from data import DataError
from data.errors import BadRowsError
from data.formats.image_files import decode
from data.formats.memory import in_memory
from data.formats.options import FileOptions
from data.image_classification import DIGEST, read_images
from engine.config import ConfigError, parse

SKIP = FileOptions(bad_rows="skip")


def write_folder(root: Path, *names: str) -> Path:
    """Write images of these names, each another one; a name that ends with a slash is an empty folder."""
    for i, name in enumerate(names):
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        else:
            write(root / name, picture(seed=i), "PNG")
    return root


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def image_run(folder: Path, train: Path, capsys, **settings) -> str:
    return dry_run(settings_for("image-classification", folder, train, **settings), capsys)


# Layouts


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("seg_train/a/0", "val2017/a/0"), "data.train = {root}/seg_train, data.validation = {root}/val2017"),
        (("annotations/0", "train/a/0"), "data.train = {root}/train (a class"),
        (
            ("train/a/0", "val/a/0"),
            "the folders train, val are named as a split of a data set, not as a class: data.train",
        ),
        (
            ("train/a/0", "val/a/0"),
            "= {root}/train, data.validation = {root}/val (a class may be called so if data.labels",
        ),
        (("Testing/a/0", "Training/a/0"), "data.train = {root}/Training, data.test = {root}/Testing"),
        (("cat/0", "dog/0", "test/0"), "the folder test is named as a split .*; move it out of {root}"),
        (("cat/0", "dog/0", "train/cat/0"), "data.train = {root}/train (a class"),
        (("cat/train/0", "cat/valid/0", "dog/train/0"), "the folders of classes contain the splits train, valid"),
        (("0", "1"), "images, but no folder for each class; make one for each, or list"),
    ],
)
def test_folders_that_are_no_classes_are_refused(tmp_path, names, reason):
    root = write_folder(tmp_path, *(f"{name}.png" for name in names))
    with pytest.raises(DataError, match=reason.format(root=root).replace("(", r"\(")):
        read_images(str(root))
    assert len(read_images(str(root), label="")) == len(names)  # to predict, folders are no classes


def test_a_split_s_name_may_be_that_of_a_class(tmp_path):
    root = write_folder(tmp_path / "1", "bus/0.png", "train/0.png", "tram/0.png")
    assert [row.values["label"] for row in read_images(str(root))] == ["bus", "train", "tram"]
    root = write_folder(tmp_path / "2", "test/0.png", "train/0.png")
    assert len(read_images(str(root), labels=("test", "train"))) == 2


def test_a_folder_around_the_classes_is_named(tmp_path, capsys):
    root = write_folder(tmp_path / "zip", *(f"set/{name}/{i}.png" for name in ("cat", "dog") for i in range(2)))
    with pytest.raises(
        DataError, match=r"one class, 'set'.*; .*set contains the folders cat, dog: .*data\.train = .*set"
    ):
        image_run(tmp_path, root, capsys)
    with pytest.raises(
        DataError, match=r"zip/set: a folder of an unknown class.*classes, data\.validation = .*zip/set"
    ):
        image_run(tmp_path, root / "set", capsys, data__validation=str(root))
    (root / "annotations").mkdir()
    with pytest.raises(DataError, match="set contains the folders cat, dog"):
        image_run(tmp_path, root, capsys)
    nested = write_folder(tmp_path / "two", "set/train/a/0.png", "set/test/a/0.png")
    with pytest.raises(DataError, match=r"set/train, data\.test = .*set/test"):
        read_images(str(nested))


def test_what_programs_leave_behind_is_no_class_and_counted(tmp_path):
    left = ["@eaDir/0.png", "__MACOSX/cat/0.png", ".ipynb_checkpoints/0.png", ".thumbs/0.png", "thumbnails/0.png"]
    left += ["lost+found/0.png", "$RECYCLE.BIN/0.png", "cat/._0.png", "cat/.1.png", "cat/2.png~", "cat/@eaDir/0.png"]
    root = write_folder(tmp_path, "cat/0.png", "dog/1.png", "dog/thumbs_up/2.png", *left)
    for name in ("cat/Thumbs.db", "desktop.ini", ".DS_Store", "cat/notes.txt", "README", "dog/labels.json"):
        (root / name).write_text("no image")
    rows = read_images(str(root))
    assert [row.id for row in rows] == ["cat/0.png", "dog/1.png", "dog/thumbs_up/2.png"]
    behind, others = rows.notes
    assert behind.startswith(f"left out {len(left) + 3} entries which programs leave behind: $RECYCLE.BIN, .DS_")
    assert (
        others == "left out 3 entries without the name or content of an image: README, cat/notes.txt, dog/labels.json"
    )
    declared = read_images(str(root), labels=("cat", "dog", "thumbnails"))
    assert {row.values["label"] for row in declared} == {"cat", "dog", "thumbnails"}


def test_names_that_are_not_utf8_are_bad_rows(tmp_path):
    root = write_folder(tmp_path, "a/0.png", "b/0.png")
    for name in (b"\xff/0.png", b"a/\xff.png", b"a/.\xff", b"b/\xff.txt"):
        path = Path(os.fsdecode(os.fsencode(root) + b"/" + name))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(picture()))
    rows = read_images(str(root), options=SKIP)
    assert [row.id for row in rows.left_out] == [r"a/\xff.png", r"b/\xff.txt", r"\xff/0.png"]
    said = "\n".join(rows.notes)
    assert r"no image in the folder of a class: \xff" in said
    said.encode()


def test_an_empty_class_folder_is_said(tmp_path, capsys):
    train = write_folder(tmp_path / "train", *(f"{c}/{i}.png" for c in "ab" for i in range(4)), "c/")
    same = write_folder(tmp_path / "same", "a/0.png", "b/x.png")
    said = image_run(tmp_path, train, capsys, data__validation=str(same))
    assert f"{train}: no image in the folder of a class: c\n" in said
    assert "warning: 2 of 2 validation images are also in the training data, 1 of them with another label" in said
    more = write_folder(tmp_path / "more", "a/9.png", "c/9.png")
    with pytest.raises(DataError, match=r"more/c: a folder of an unknown class.*train/c exists, but has no image"):
        image_run(tmp_path, train, capsys, data__validation=str(more))


def test_spellings_and_numbers_of_folders_are_classes(tmp_path, capsys):
    names = [unicodedata.normalize(form, "crème") for form in ("NFD", "NFC")]
    train = write_folder(tmp_path / "train", *(f"{c}/{i}.png" for c in (names[0], "tea") for i in range(2)))
    validation = write_folder(tmp_path / "val", f"{names[1]}/8.png", "tea/9.png")
    said = image_run(tmp_path, train, capsys, data__validation=str(validation))
    assert "is read as the label" in said
    assert said.count(" 1, tea 1") == 1
    other_case = write_folder(tmp_path / "case", "Tea/8.png")
    with pytest.raises(DataError, match=r"case/Tea: a folder of an unknown class.*'Tea' and 'tea' differ in case"):
        image_run(tmp_path, train, capsys, data__validation=str(other_case))
    numbers = write_folder(tmp_path / "numbers", *(f"{c}/{i}{c}.png" for c in "01" for i in range(2)))
    said = image_run(tmp_path, numbers, capsys, data__labels=("shoe", "bag"), data__validation=str(numbers))
    assert "labels: shoe 2, bag 2" in said
    assert "indices of the label names" in said


def test_one_image_in_two_classes_is_said(tmp_path, capsys):
    root = write_folder(tmp_path / "data", *(f"{c}/{i}{c}.png" for c in "ab" for i in range(6)))
    for c in "ab":
        write(root / f"{c}/same.png", picture(seed=99))
    said = image_run(tmp_path, root, capsys, data__validation=str(write_folder(tmp_path / "val", "a/x.png", "b/y.png")))
    note = "1 training image has several labels in 2 of 14 rows, such as 'a' (id a/same.png) and 'b' (id b/same.png)"
    assert note in said


# Kinds of files


@pytest.mark.parametrize(
    ("name", "kind"),
    [("0.jfif", "JPEG"), ("0.jpe", "JPEG"), ("0.jpg_", "JPEG"), ("0.JPEG2", "JPEG"), ("0", "PNG"), ("0.heic", "JPEG")],
)
def test_images_are_known_by_their_content(tmp_path, name, kind):
    write(tmp_path / "a" / name, picture(), kind)
    (row,) = read_images(str(tmp_path))
    assert row.id == f"a/{name}"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("0.heic", b"\0\0\0\x18ftypheic", "an image of HEIC, which is not read; save it as PNG or JPEG"),
        ("0.jpg", b"\0\0\0\x18ftypmif1", "an image of HEIC, which"),
        ("0", b"\0\0\0\x1cftypavif", "an image of AVIF, which"),
        ("0.svg", b'<?xml version="1.0"?>\n<svg xmlns="x">', "an image of SVG, which"),
        ("0.jxl", b"\xff\x0a\x01", "an image of JPEG XL, which"),
        ("0.nef", encoded(picture(), "TIFF"), "an image of the kind .nef, which"),
        ("0.png", b"<!DOCTYPE html><html>", "not an image of a kind that is read: .*; it is a web page"),
        ("0.jpg", b"", "an empty file"),
        ("0.jpg", encoded(picture(), "JPEG")[:-100], "cannot be decoded: .*truncated"),
    ],
)
def test_an_image_that_is_not_read_is_a_bad_row(tmp_path, name, content, reason):
    root = write_folder(tmp_path, "a/good.png", "b/good.png")
    (root / "a" / name).write_bytes(content)
    with pytest.raises(BadRowsError, match=f"{root}: a/{name}: {reason}"):
        read_images(str(root))
    rows = read_images(str(root), options=SKIP)
    assert ([row.id for row in rows], [row.id for row in rows.left_out]) == (
        ["a/good.png", "b/good.png"],
        [f"a/{name}"],
    )
    assert rows.notes[-1].startswith("1 of 3 rows left out: ")


def test_max_pixels_is_the_only_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow refuses twice as many
    root = write_folder(tmp_path / "data", *(f"{c}/{i}.png" for c in "ab" for i in range(2)))
    with pytest.raises(BadRowsError, match=r"20 x 16 pixels; image_classification\.max_pixels allows at most 319"):
        read_images(str(root), max_pixels=319)
    settings = settings_for("image-classification", tmp_path, root, image_classification__max_pixels=320)
    assert "best" in run(settings | {"data.validation": str(root)}, capsys)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("old", ["data.bad_images", "image_classification.bad_images"])
def test_bad_images_is_now_bad_rows(old):
    with pytest.raises(ConfigError, match=r"is now --data\.bad_rows"):
        parse([f"--{old}=skip"], "")


# What decoding changes


def orientation_and(*entries: bytes) -> bytes:
    """Return an EXIF block that says "held upside down" and has further entries."""
    all_entries = (struct.pack("<HHII", 0x0112, 3, 1, 3), *entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(all_entries)) + b"".join(all_entries) + bytes(4)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0no header of TIFF",
        b"Exif\0\0Exif\0\0Exif\0\0MM\0*\0\0\0\x08\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\5\1\x12",
        b"Exif\0\0" + b"\xff" * 40,
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_broken_exif_block_does_not_lose_the_picture(tmp_path, exif, kind):
    plain, broken = (write(tmp_path / f"a/{i}.jpg", picture(), kind, **x) for i, x in enumerate(({}, {"exif": exif})))
    assert np.array_equal(np.asarray(decode(broken)), np.asarray(decode(plain)))
    rows = read_images(str(tmp_path))
    note = "1 image has an EXIF block that cannot be read: not rotated (first: a/1.jpg)"
    assert rows.notes == [note]


@pytest.mark.filterwarnings("ignore:Truncated")
def test_the_orientation_is_read_beside_a_broken_tag(tmp_path):
    exif = orientation_and(struct.pack("<HHII", 0x8769, 4, 1, 10**6), struct.pack("<HHII", 0x011A, 5, 1, 10**6))
    image = decode(write(tmp_path / "a.png", picture(), exif=exif))
    assert np.array_equal(np.asarray(image), np.asarray(picture())[::-1, ::-1])


def on_white(image: Image.Image) -> np.ndarray:
    rgba = image.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))


def transparent(mode: str) -> tuple[Image.Image, dict]:
    """Return an image of a mode with transparent pixels, and the options to save it with."""
    image = picture()
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(np.arange(320, dtype=np.uint16).reshape(16, 20).astype(np.uint8)))
        return image.convert(mode), {}
    image = image.convert(mode)
    keys = {"P": bytes(range(200)), "RGB": image.getpixel((3, 3)), "L": image.getpixel((3, 3)), "1": 255}
    return image, {"transparency": keys[mode]}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L", "1"])
def test_transparency_is_composed_on_white(tmp_path, mode):
    image, options = transparent(mode)
    path = write(tmp_path / "a/x.png", image.convert("RGBA") if mode == "PA" else image, **options)
    with Image.open(path) as opened:
        expected = on_white(opened)
    assert np.array_equal(np.asarray(decode(path).convert("RGB")), expected)
    note = "1 image has transparency: put on white (first: {})"
    assert read_images(str(tmp_path)).notes == [note.format("a/x.png")]
    image.info |= options
    array = np.asarray(image.convert("RGBA"))
    with in_memory(rows=[{"path": image, "label": "x"}, {"path": array, "label": "x"}]) as names:
        rows = read_images(names["rows"])
    assert [np.array_equal(np.asarray(row.values["path"].convert("RGB")), expected) for row in rows] == [True] * 2
    assert rows.notes == ["2 images have transparency: put on white (first: 1)"]


def test_a_white_picture_on_transparency_is_said_to_vanish(tmp_path):
    alpha = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for i, (level, alphas) in enumerate([(255, alpha), (7, alpha * 0), (7, alpha)]):
        write(tmp_path / f"a/{i}.png", Image.fromarray(np.stack([np.full_like(alpha, level), alphas], 2), "LA"))
    everything, blank = read_images(str(tmp_path)).notes
    assert everything.startswith("3 images have transparency")
    assert blank.startswith("2 images have nothing but transparent or white pixels")


def test_black_ink_on_a_transparent_page_is_not_blank(tmp_path):
    alpha = np.array([[255, 0], [0, 0]], dtype=np.uint8)
    ink = Image.fromarray(np.stack([np.zeros_like(alpha), alpha], 2), "LA")
    blank = Image.fromarray(np.zeros((2, 2, 2), np.uint8), "LA")
    levels = [np.asarray(decode(encoded(image))).mean() for image in (ink, blank)]
    assert levels == [191.25, 255]


def tiff(levels: np.ndarray, bits: int, photometric: int) -> bytes:
    """Return a grey TIFF with these tags, which Pillow itself does not write."""
    height, width = levels.shape
    data = levels.astype("<u2").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height, 279: len(data)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + data


def test_16_bits_in_other_files(tmp_path):
    levels = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    image = Image.fromarray(levels)
    expected = levels >> 8
    assert np.array_equal(np.asarray(decode(encoded(image, "PPM"))), expected)
    assert np.array_equal(np.asarray(decode(tiff(levels, 16, 1))), expected)
    assert np.array_equal(np.asarray(decode(tiff(levels, 16, 0))), 255 - expected)  # white is 0
    key = decode(encoded(image, transparency=257)).convert("RGB")
    assert np.array_equal(np.asarray(key)[..., 1], np.where(levels == 257, 255, expected))


@pytest.mark.parametrize("white", [255, 256, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6"])
def test_levels_of_pgm_and_ppm_are_shares_of_white(tmp_path, kind, white):
    """The header says which level is white; two bytes a level above 255, the higher one first. Text in P2 and P3."""
    shape = (16, 20, 3) if kind in ("P3", "P6") else (16, 20)
    levels = np.random.default_rng(white).integers(0, white + 1, shape)
    levels.flat[:2] = 0, white
    content = levels.astype(">u2" if white > 255 else "u1").tobytes()
    if kind in ("P2", "P3"):
        content = " ".join(map(str, levels.flat)).encode()
    (tmp_path / "a.pnm").write_bytes(f"{kind}\n# a scan\n20 16\n{white}\n".encode() + content)
    found = np.asarray(decode(tmp_path / "a.pnm")).astype(int)
    assert (found.flat[0], found.flat[1]) == (0, 255)
    assert np.abs(found - levels * 255 / white).max() <= 1


def test_16_bits_with_few_levels_are_said(tmp_path):
    scan = np.arange(320, dtype=np.uint16).reshape(16, 20) * 12  # a camera of 12 bits
    for name, levels in (("scan", scan), ("mask", scan % 6), ("offset", 40_000 + scan // 2), ("full", scan * 16)):
        write(tmp_path / f"a/{name}.png", Image.fromarray(levels.astype(np.uint16)))
    write(tmp_path / "a/tenth.png", Image.fromarray(np.asarray(picture()) // 32))  # of 8 bits
    (note,) = read_images(str(tmp_path)).notes
    assert note.startswith("3 images have 16 bits, of which less than 1/16 of the range is used")


def test_lab_is_converted(tmp_path):
    grey = np.asarray(decode(encoded(Image.new("LAB", (4, 4), (128, 128, 128)), "TIFF")))
    assert grey.shape == (4, 4, 3)
    assert np.ptp(grey.astype(int)) <= 1
    assert 115 < grey.mean() < 125  # L* = 50


# Lists


def test_paths_in_other_spellings_are_found(tmp_path):
    name = unicodedata.normalize("NFC", "thé.png")
    write_folder(tmp_path, "cats/0.png", "cats/1.png", f"cats/{name}")
    paths = [
        "cats/0.png",
        str(tmp_path / "cats/1.png"),
        r"cats\0.png",
        " cats/1.png ",
        unicodedata.normalize("NFD", f"cats/{name}"),
    ]
    source = write_file(tmp_path / "list.jsonl", [{"path": path, "label": "x"} for path in paths])
    rows = read_images(str(source))
    assert [row.values["path"].name for row in rows] == ["0.png", "1.png", "0.png", "1.png", name]
    assert rows.notes[0].startswith("3 paths differ from the file's name in backslashes, white space or Unicode form: ")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("https://example.org/0.png", "an address, not the path of a file; download the images first"),
        ("data:image/png;base64,iVBO", "an address, not"),
        (r"C:\pictures\0.png", "no such file; it is a path of another computer"),
        ("cats/none.png", "no such file$"),
        (7, "'path' should be the path of an image, not 7"),
        ({"x": 1}, "'path' should be the path of an image, not {'x': 1}"),
        (" ", "'path' is empty"),
    ],
)
def test_a_path_that_is_none_is_a_bad_row(tmp_path, value, reason):
    write_folder(tmp_path, "0.png")
    source = write_file(tmp_path / "list.jsonl", [{"path": "0.png", "label": "x"}, {"path": value, "label": "x"}])
    with pytest.raises(BadRowsError, match=r"list\.jsonl:2: .*" + reason):
        read_images(str(source))
    assert [row.id for row in read_images(str(source), options=SKIP)] == ["1"]


def test_a_path_from_the_current_folder_is_explained(tmp_path, monkeypatch):
    write_folder(tmp_path, "data/0.png")
    monkeypatch.chdir(tmp_path)
    write_file(tmp_path / "data/list.jsonl", [{"path": "data/0.png", "label": "x"}])
    with pytest.raises(BadRowsError, match="no such file; paths are relative to the list's folder, data, and"):
        read_images("data/list.jsonl")


def test_the_content_of_a_file_is_an_image(tmp_path):
    """Hugging Face's datasets store {"bytes", "path"}; other tables a column of bytes."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    content = encoded(picture())
    write_folder(tmp_path, "0.png")
    column = [{"bytes": content, "path": "away.png"}, {"bytes": None, "path": "0.png"}]
    parquet.write_table(pyarrow.table({"path": column, "label": ["a", "b"]}), tmp_path / "struct.parquet")
    parquet.write_table(
        pyarrow.table({"path": [content, b"\xff\xd8\xff?"], "label": ["a", "b"]}), tmp_path / "bytes.parquet"
    )
    folder = write_folder(tmp_path / "shards", "0.png")  # as the hub's data sets are stored
    parquet.write_table(pyarrow.table({"path": column, "label": ["a", "b"]}), folder / "0000.parquet")
    for name, root in ((tmp_path / "struct.parquet", tmp_path), (folder, folder)):
        rows = read_images(str(name))
        assert [row.values["path"] for row in rows] == [content, root / "0.png"]
    with in_memory(rows=[{"path": content, "label": "a"}, {"path": column[0], "label": "a"}]) as names:
        assert len({row.values[DIGEST] for row in read_images(names["rows"])}) == 1
    with pytest.raises(BadRowsError, match=r"bytes\.parquet:2: not an image of a kind"):
        read_images(str(tmp_path / "bytes.parquet"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded(picture(), "PPM"), ""),
        (b"\0\0\0\x18ftypheic\0\xff", "an image of HEIC, which is not read; save it as PNG or JPEG"),
        (b"\xfe\xff", "'path' has bytes that are neither UTF-8 (b'\\xfe\\xff') nor an image"),
    ],
)
def test_a_column_of_bytes_has_images_of_every_kind(tmp_path, content, reason):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"path": [encoded(picture()), content], "label": ["a", "b"]}), tmp_path / "t.parquet"
    )
    rows = read_images(str(tmp_path / "t.parquet"), options=FileOptions(bad_rows="skip"))
    assert len(rows) == 1 + (not reason)
    assert [left.reason for left in rows.left_out] == [reason] * bool(reason)


def test_names_without_endings_are_found_where_they_are_unique(tmp_path):
    write_folder(tmp_path / "pictures", "7.png", "8.png", "8.bmp", "9.tar.png")
    names = ["pictures/7", "pictures/9.tar", "pictures/8"]
    path = write_file(tmp_path / "list.csv", "path,label\n" + "".join(f"{name},a\n" for name in names))
    rows = read_images(str(path), options=FileOptions(bad_rows="skip"))
    assert [row.values["path"].name for row in rows] == ["7.png", "9.tar.png"]
    assert rows.left_out[0].reason == "pictures/8: no such file"
    assert "2 paths have no ending; the only image of that name is read: pictures/7, pictures/9.tar" in rows.notes


def test_one_image_is_no_file_of_examples(tmp_path):
    with pytest.raises(DataError, match=r"0\.png: one image; name the folder that has it"):
        read_images(str(write_folder(tmp_path, "0.png") / "0.png"), label="")


def test_a_list_of_the_hub_beside_its_images(tmp_path):
    root = write_folder(tmp_path, "0.png", "1.png")
    source = write_file(root / "metadata.csv", "file_name,label\n0.png,a\n1.png,b\n")
    way_on = rf"data\.train = {source} and data\.text_column = file_name"
    with pytest.raises(DataError, match=way_on):
        read_images(str(root))
    assert [row.values["label"] for row in read_images(str(source), image="file_name")] == ["a", "b"]


def test_every_image_gets_one_prediction_with_its_path(tmp_path, capsys):
    train = write_folder(tmp_path / "train", *(f"{c}/{i}{c}.png" for c in "ab" for i in range(6)))
    settings = settings_for("image-classification", tmp_path, train)
    run(settings, capsys)
    new = write_folder(tmp_path / "new", "2.png", "more/1.png")
    (new / "1.png").write_bytes(b"?")
    found = predictions(settings["run.folder"], new, "--data.bad_rows=skip")
    assert [row["id"] for row in found] == ["1.png", "2.png", "more/1.png"]
    assert found[0]["label"] is None
    assert found[0]["reason"].startswith("not an image of a kind that is read")
    assert "1 of 3 rows left out: " in capsys.readouterr().out
