"""Images in .tar archives, read in place: as the unpacked folder, webdataset's files, and hostile archives."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cases import evaluation, predictions, run, settings_for
from support.pictures import folder_of_colours, picture, small_png, write

from data import DataError, MicroBatching, Row, training_steps
from data.errors import BadRowsError
from data.formats.options import FileOptions
from data.formats.tar_index import NOTE_OF_END, TarMember, read_index
from data.image_classification import DIGEST, encode_images, read_images
from data.image_preprocessing import Preprocessing

SKIP = FileOptions(bad_rows="skip")
PREPROCESSING = Preprocessing((16, 16), 2, None, 1 / 255, (0.5,) * 3, (0.5,) * 3, tokens=5)


def png(seed: int = 0, **options) -> bytes:
    stream = io.BytesIO()
    picture(seed=seed, **options).save(stream, "PNG")
    return stream.getvalue()


def member(name: str, content: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def pack(path: Path, *members: tuple[tarfile.TarInfo, bytes] | tuple[str, bytes], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for first, content in members:
            info = first if isinstance(first, tarfile.TarInfo) else member(first, content)[0]
            archive.addfile(info, io.BytesIO(content))
    return path


def pack_folder(path: Path, folder: Path, *names: str) -> Path:
    """Write the files of a folder as tar does: `./` and folders of their own where no names are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in names or [""]:
            archive.add(folder / name, f"./{name}" if not names else name)
    return path


def described(rows: list[Row]) -> list[tuple]:
    return [(row.id, row.line, row.values["label"], row.values[DIGEST]) for row in rows]


# As the unpacked folder


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """Return a folder of three classes with what else folders have, and an empty class."""
    root = folder_of_colours(tmp_path_factory.mktemp("colours") / "set", 6)
    write(root / "green/more/deep", picture(), "PNG")
    (root / "yellow").mkdir()
    for name in ("red/.hidden.png", "red/notes.txt", "__MACOSX/red/._000.png", "red/Thumbs.db"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"?")
    return root


@pytest.fixture(scope="module")
def archives(colours, tmp_path_factory) -> dict[str, Path]:
    """Return the folder as one archive, and as a folder of two, the classes in another order."""
    root = tmp_path_factory.mktemp("archives")
    pack_folder(root / "shards/b.tar", colours, "yellow", "blue", "__MACOSX")
    pack_folder(root / "shards/a.tar", colours, "red", "green")
    (root / "shards/README.md").write_text("two archives")
    return {"one": pack_folder(root / "one.tar", colours), "two": root / "shards"}


@pytest.mark.parametrize("which", ["one", "two"])
def test_rows_are_those_of_the_unpacked_folder(colours, archives, which):
    expected, rows = read_images(str(colours)), read_images(str(archives[which]))
    assert described(rows) == described(expected)
    assert rows.notes == expected.notes
    assert [note.split(":")[0] for note in rows.notes] == [
        "left out 3 entries which programs leave behind",
        "left out 1 entry without the name or content of an image",
        "no image in the folder of a class",
    ]
    assert all(isinstance(row.values["path"], TarMember) for row in rows)
    unlabelled = read_images(str(archives[which]), label="")
    assert [row.id for row in unlabelled] == [row.id for row in expected]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_the_unpacked_folder(colours, archives, num_workers):
    streams = []
    for source, workers in ((colours, 0), (archives["one"], num_workers), (archives["two"], num_workers)):
        rows = read_images(str(source))
        examples = encode_images(rows, PREPROCESSING, labels=("blue", "green", "red"))
        steps = training_steps(examples, 5, 0, MicroBatching(max_examples=2), num_workers=workers)
        streams.append((examples.fingerprint(), list(islice(steps, 6))))
    (fingerprint, expected), *others = streams
    for found, steps in others:
        assert found == fingerprint
        for a, b in zip((x for step in expected for x in step), (x for step in steps for x in step), strict=True):
            assert (a.ids, a.indices) == (b.ids, b.indices)
            assert torch.equal(a.pixel_values, b.pixel_values)
            assert torch.equal(a.labels, b.labels)


def test_a_run_on_an_archive_is_that_on_the_folder(colours, archives, tmp_path, capsys):
    """The losses and metrics are equal; a held-out split, augmentation and duplicates are as for a folder."""
    more = {
        "augment__image__horizontal_flip": 0.5,
        "eval__every_steps": 2,
        "log__every_steps": 1,
        "train__max_steps": 4,
    }
    printed, logs = [], []
    for name, source in {"folder": colours, **archives}.items():
        settings = settings_for("image-classification", tmp_path, source, **more)
        printed.append(run(settings | {"run.folder": str(tmp_path / name)}, capsys).replace(str(source), "DATA"))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        timed = ("seconds", "per_second", "waited", "memory")
        logs.append([{k: v for k, v in json.loads(x).items() if not any(t in k for t in timed)} for x in lines])
    assert logs[0] == logs[1] == logs[2]
    assert any("loss" in row for row in logs[0])
    assert "DATA: left out 3 entries which programs leave behind" in printed[1]
    scores = [predictions(tmp_path / "folder", source) for source in (colours, archives["one"], archives["two"])]
    assert scores[0] == scores[1] == scores[2]
    metrics = [evaluation(tmp_path / "folder", source) for source in (colours, archives["one"])]
    assert metrics[0] | {"data": ""} == metrics[1] | {"data": ""}


def test_bad_images_are_named_with_archive_and_member(tmp_path):
    names = {"a/0.png": png(0), "a/1.png": b"no picture", "b/0.png": png(1), "b/1.png": b"", "0.png": png(2)}
    path = pack(tmp_path / "x.tar", *names.items(), ("b/2.heic", b"x"), ("b/3.png", small_png(50_000, 50_000)))
    with pytest.raises(BadRowsError) as error:
        read_images(str(path))
    reasons = [line.split(": ", 2) for line in str(error.value).splitlines()]
    assert [(archive, name) for archive, name, _ in reasons] == [
        (str(path), name) for name in ("0.png", "a/1.png", "b/1.png", "b/2.heic", "b/3.png")
    ]
    for (_, _, reason), piece in zip(
        reasons, ("in no folder", "not an image", "empty", "HEIC|heic", "pixels"), strict=True
    ):
        assert any(word in reason for word in piece.split("|")), reason
    rows = read_images(str(path), options=SKIP)
    assert [row.id for row in rows] == ["a/0.png", "b/0.png"]
    assert rows.notes[-1].startswith(f"5 of 7 rows left out: {path}: 0.png: in no folder of a class")
    with pytest.raises(DataError, match=r"data\.group_column = 'patient' is a column, and there are none"):
        read_images(str(path), group="patient")


def test_a_member_that_changed_is_named(tmp_path):
    path = pack(tmp_path / "x.tar", ("a/0.png", png(0)), ("b/0.png", png(1)))
    examples = encode_images(read_images(str(path)), PREPROCESSING, labels=("a", "b"))
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"x\.tar:b/0\.png: .*; it was an image when the run began"):
        examples.batch([1])


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (
            ("train/a/0", "train/b/0", "val/a/0"),
            "named as splits of a data set, not as classes: train, val; pack each by",
        ),
        (
            ("set/a/0", "set/b/0"),
            r"the one folder set is not a class: it contains the folders a, b; pack what is in it",
        ),
        (("0", "1"), r"images, but no folder for each class, and no \.cls or \.json file beside each image"),
    ],
)
def test_archives_whose_folders_are_no_classes_are_refused(tmp_path, names, reason):
    path = pack(tmp_path / "x.tar", *((f"{name}.png", png(i)) for i, name in enumerate(names)))
    with pytest.raises(DataError, match=reason):
        read_images(str(path))
    assert len(read_images(str(path), label="")) == len(names)
    tops = {name.split("/")[0] for name in names}
    if len(tops) > 1 and "/" in names[0]:
        assert {row.values["label"] for row in read_images(str(path), labels=tuple(tops))} == tops


def test_names_are_cleaned_and_the_last_member_counts(tmp_path):
    """`tar -r` appends a newer file under the same name; hard links share the content of a member before."""
    path = pack(
        tmp_path / "x.tar",
        ("./a/0.png", png(0)),
        ("b//./0.png", png(1)),
        ("a/0.png", png(2)),
        member("b/linked.png", type=tarfile.LNKTYPE, linkname="./a/0.png"),
    )
    rows = read_images(str(path))
    assert [row.id for row in rows] == ["a/0.png", "b/0.png", "b/linked.png"]
    with rows[0].values["path"].open() as stream:
        assert stream.read() == png(2)
    assert rows[2].values[DIGEST] == rows[0].values[DIGEST]
    assert rows.notes == ["left out 1 member that a later one of the same name replaces"]


def test_ids_begin_with_the_archive_where_names_repeat(tmp_path):
    for i, name in enumerate(("b", "a")):
        pack(tmp_path / f"set/{name}.tar", ("x/0.png", png(i)), ("y/0.png", png(2 + i)))
    rows = read_images(str(tmp_path / "set"))
    assert [row.id for row in rows] == ["a.tar/x/0.png", "a.tar/y/0.png", "b.tar/x/0.png", "b.tar/y/0.png"]
    assert [row.values["label"] for row in rows] == ["x", "y", "x", "y"]
    assert rows.notes == ["several archives have members of the same name: ids begin with the name of the archive"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_of_headers(tmp_path, format):
    """Long names, other scripts, and attributes of every member."""
    long = "a" * 50 + "/" + "b" * 60 + "/0.png"
    names = [long, "Käse/日本.png" if format != tarfile.USTAR_FORMAT else "kaese/1.png"]
    members = [member(name, png(i)) for i, name in enumerate(names)]
    for info, _ in members:
        info.pax_headers = {"comment": "x" * 2000}
    rows = read_images(str(pack(tmp_path / "x.tar", *members, format=format)))
    assert [row.id for row in rows] == sorted(names)


# webdataset


def samples(ending: str, labels: list[bytes]) -> list[tuple[str, bytes]]:
    """Return images with a file for the label of each, in webdataset's names, and a caption that is not read."""
    files = []
    for i, content in enumerate(labels):
        files += [(f"{i:04d}.jpg", png(i)), (f"{i:04d}{ending}", content), (f"{i:04d}.txt", b"a caption")]
    return files


def test_class_files_beside_the_images(tmp_path):
    path = pack(tmp_path / "x.tar", *samples(".cls", [b"0", b"2\n", b" cat "]), ("__key__", b"?"))
    rows = read_images(str(path))
    assert [(row.id, row.values["label"]) for row in rows] == [
        ("0000.jpg", "0"),
        ("0001.jpg", "2"),
        ("0002.jpg", "cat"),
    ]
    assert rows.notes == ["left out 1 entry without the name or content of an image: __key__"]
    nested = [(f"train/{name}", content) for name, content in samples(".cls", [b"1", b"0"])]
    rows = read_images(str(pack(tmp_path / "nested.tar", *nested)))  # the folder of a split is no class here
    assert [(row.id, row.values["label"]) for row in rows] == [("train/0000.jpg", "1"), ("train/0001.jpg", "0")]


def test_json_files_beside_the_images(tmp_path):
    contents = [json.dumps({"label": label, "width": 3}).encode() for label in ("cat", 7, "dog")]
    for i, content in enumerate(contents):
        pack(tmp_path / f"set/{i}.tar", *samples(".json", [content]))
    rows = read_images(str(tmp_path / "set"))
    assert [row.values["label"] for row in rows] == ["cat", "7", "dog"]
    assert [row.id for row in rows] == ["0.tar/0000.jpg", "1.tar/0000.jpg", "2.tar/0000.jpg"]
    other = [json.dumps({"meta": 1, "kind": "x"}).encode(), json.dumps({"kind": "y"}).encode()]
    rows = read_images(str(pack(tmp_path / "y.tar", *samples(".json", other))), label="kind")
    assert [row.values["kind"] for row in rows] == ["x", "y"]


@pytest.mark.parametrize(
    ("ending", "content", "reason"),
    [
        (".cls", None, r"no \.cls file beside it"),
        (".cls", b"", r"its label in 0001\.cls is empty"),
        (".cls", b"\xff", r"its label 0001\.cls cannot be read: 'utf-8'"),
        (".cls", b"x" * 5000, r"its label 0001\.cls has 5,000 bytes; at most 4,096 are read"),
        (".json", None, r"no \.json file beside it"),
        (".json", b"{", r"its label 0001\.json cannot be read: Expecting"),
        (".json", b"[" * 100_000, r"its label 0001\.json cannot be read"),
        (".json", b"[1]", "an object is expected, not"),
        (".json", b'{"a": 1, "b": 2}', r"no 'label' \(data\.label_column\) among a, b"),
        (".json", b'{"label": null}', r"its label in 0001\.json is empty"),
        (".json", b'{"label": ["x"]}', r"its label in 0001\.json is \['x'\]"),
        (".json", b" " * (1 << 21), r"has 2,097,152 bytes; at most 1,048,576 are read"),
    ],
)
def test_bad_labels_beside_the_images(tmp_path, ending, content, reason):
    good = b"0" if ending == ".cls" else b'{"label": "0"}'
    files = [f for f in samples(ending, [good, content or b"", good]) if content is not None or f[0] != f"0001{ending}"]
    path = pack(tmp_path / "x.tar", *files)
    with pytest.raises(BadRowsError, match=rf"x\.tar: 0001\.jpg: .*{reason}"):
        read_images(str(path))
    rows = read_images(str(path), options=SKIP)
    assert [(row.id, row.values["label"]) for row in rows] == [("0000.jpg", "0"), ("0002.jpg", "0")]


# Hostile and damaged archives


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("name", ["x.tar.{kind}", "x.tar"])
def test_compressed_archives_are_refused(tmp_path, kind, name):
    path = tmp_path / name.format(kind=kind)
    with tarfile.open(path, f"w:{kind}") as archive:
        archive.addfile(member("a/0.png", png())[0], io.BytesIO(png()))
    message = (
        f"{path}: a compressed archive, in which no image can be read by its place; unpack it with tar -xf, and name"
    )
    with pytest.raises(DataError) as error:
        read_images(str(path))
    assert str(error.value).startswith(message)
    with pytest.raises(DataError, match="a compressed archive"):
        read_images(str(tmp_path))


LEFT_OUT = {
    "absolute names or with ..": [
        member("/a/0.png", png()),
        member("../a/0.png", png()),
        member("a/../../b.png", png()),
        member("..", png()),
    ],
    "symbolic links": [member("a/link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
    "links to files that the archive does not have before": [
        member("a/hard.png", type=tarfile.LNKTYPE, linkname="../../etc/passwd"),
        member("a/later.png", type=tarfile.LNKTYPE, linkname="b/0.png"),
    ],
    "devices, pipes or unknown kinds": [
        member("a/dev.png", type=tarfile.CHRTYPE),
        member("a/block.png", type=tarfile.BLKTYPE),
        member("a/pipe.png", type=tarfile.FIFOTYPE),
        member("a/odd.png", type=b"Z"),
    ],
    "names of more than 4,096 bytes": [member("a/" + "n" * 5000 + ".png", png())],
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_members_that_are_no_files_are_left_out_and_counted(tmp_path, kind):
    bad = LEFT_OUT[kind]
    path = pack(tmp_path / "x.tar", ("a/0.png", png(0)), *bad, ("b/0.png", png(1)), format=tarfile.GNU_FORMAT)
    rows = read_images(str(path))
    assert [row.id for row in rows] == ["a/0.png", "b/0.png"]
    count = f"{len(bad)} member{'' if len(bad) == 1 else 's'}"
    assert rows.notes[0].startswith(f"left out {count} of the archive: {kind}")
    with pytest.raises(DataError, match=f"no images\n.*left out {count}"):
        read_images(str(pack(tmp_path / "none.tar", *bad, format=tarfile.GNU_FORMAT)))


def header(name: bytes, size: bytes | int, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    """Return a header with a right checksum, whatever it claims; size: the 12 bytes of the field, or a number."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" * 3 + field + b"%011o\0" % 0 + b" " * 8 + kind)
    block += bytes(100) + magic + bytes(512 - 257 - len(magic))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax(records: dict[str, str], kind: bytes = b"x") -> bytes:
    text = b""
    for key, value in records.items():
        line = f" {key}={value}\n".encode()
        count = len(line) + 1
        while len(str(count)) + len(line) != count:
            count = len(str(count)) + len(line)
        text += str(count).encode() + line
    return header(b"pax", len(text), kind) + padded(text)


NEGATIVE = b"\xff" + (-512).to_bytes(11, "big", signed=True)
IMAGE = header(b"a/0.png", len(png())) + padded(png())
END = bytes(1024)
SPARSE = tarfile.TarInfo("a/s.png")
DAMAGED = {
    "empty": (b"", "an empty file"),
    "text": (b"class,path\n" * 100, "not a .tar archive, by its first bytes"),
    "only zeros": (bytes(2048), "no images"),
    "short": (IMAGE[:300], "not a .tar archive, by its first bytes: truncated header"),
    "cut in an image": (IMAGE[:700], "incomplete: a/0.png ends at byte"),
    "cut in the padding": (IMAGE + IMAGE[: 512 + len(png())], "damaged after byte"),
    "cut in a header": (IMAGE + IMAGE[:100], f"damaged after byte {len(IMAGE):,}: an incomplete header"),
    "garbage between members": (IMAGE + b"g" * 512 + IMAGE + END, f"damaged after byte {len(IMAGE):,}: no header"),
    "joined by cat": ((IMAGE + END) * 2, f"more follows the end at byte {len(IMAGE):,}, as where archives were joined"),
    "a size of 8 GiB": (
        header(b"a/0.png", 2**33 - 1) + padded(png()),
        "incomplete: a/0.png ends at byte 8,589,935,103",
    ),
    "a size of 2^88": (header(b"a/0.png", b"\x80" + b"\x7f" * 11) + END, "incomplete: a/0.png ends at byte"),
    "a size below 0": (header(b"a/0.png", NEGATIVE) + END, "a size below 0"),
    "a size that is no number": (header(b"a/0.png", b"many bytes\0\0") + END, "not a .tar archive, by its first bytes"),
    "pax: a size below 0": (pax({"size": "-512"}) + IMAGE + END, "a size below 0"),
    "pax: a size beyond the end": (pax({"size": str(2**70)}) + IMAGE + END, "incomplete: a/0.png ends at byte"),
    "pax: a length below 0": (header(b"pax", NEGATIVE, b"x") + IMAGE, "headers of more than 32,768 bytes"),
    "pax: 100 MB": (
        header(b"pax", 10**8, b"x") + bytes(10**8 // 512 * 512 + 1024),
        "headers of more than 32,768 bytes",
    ),
    "a long name of 100 MB": (header(b"n", 10**8, b"L") + bytes(10**8 // 512 * 512 + 1024), "headers of more than"),
    "names of names": (header(b"n", 3, b"L") * 5_000, "headers of more than|not a .tar"),
    "many global attributes": (
        b"".join(pax({f"k{i}.{j}": "v" for j in range(300)}, b"g") + IMAGE for i in range(5)) + END,
        "more than 1,000 attributes of all",
    ),
    "sparse: a map without an end": (
        pax(
            {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a/s.png", "GNU.sparse.realsize": "9"}
        )
        + header(b"a/0.png", 512)
        + b"9" * 12
        + b"\n"
        + b"0\n" * 250
        + END * 100,
        "headers of more than|damaged|not a .tar",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_archives_are_one_sentence_in_little_memory(tmp_path, kind):
    content, reason = DAMAGED[kind]
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError) as error:
        read_images(str(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1
    assert any(piece in str(error.value) for piece in reason.split("|")), str(error.value)
    assert peak < 4_000_000


def test_an_archive_without_its_end_is_read_and_said(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(
        IMAGE + IMAGE.replace(b"a/0.png", b"b/0.png").replace(IMAGE[148:156], header(b"b/0.png", len(png()))[148:156])
    )
    rows = read_images(str(path))
    assert [row.id for row in rows] == ["a/0.png", "b/0.png"]
    assert rows.notes == [NOTE_OF_END]


def test_sparse_members_are_left_out(tmp_path):
    """GNU's old form: the map is in the header, the content is shorter than the file."""
    numbers = b"".join(b"%011o\0" % n for n in (0, 512, 9_000, 0))
    block = bytearray(header(b"a/s.png", 512, b"S", b"ustar  \0"))
    block[386 : 386 + len(numbers)] = numbers
    block[483:495] = b"%011o\0" % 9_000
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(block) + bytes(512) + IMAGE + END)
    rows = read_images(str(path))
    assert [row.id for row in rows] == ["a/0.png"]
    assert rows.notes[0].startswith("left out 1 member of the archive: sparse files")


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_is_a_sentence_or_harmless(tmp_path, seed):
    """Bytes of a whole archive are changed, and it is cut: reading ends, with rows or with DataError."""
    rng = np.random.default_rng(seed)
    members = [member(f"{'ab'[i % 2]}/{'n' * (60 * i)}{i}.png", png(i)) for i in range(4)]
    for info, _ in members:
        info.pax_headers = {"comment": "x"}
    whole = np.frombuffer(pack(tmp_path / "whole.tar", *members, format=tarfile.PAX_FORMAT).read_bytes(), np.uint8)
    with tarfile.open(tmp_path / "whole.tar") as archive:
        places = [info.offset for info in archive]
    outcomes = set()
    for _ in range(60):
        content = whole.copy()
        for place in rng.choice(places, 2):
            content[place + rng.integers(0, 1600)] = rng.integers(0, 256)
        path = tmp_path / "x.tar"
        path.write_bytes(content[: rng.choice([len(content), rng.integers(1, len(content))])].tobytes())
        try:
            outcomes.add(f"{len(read_images(str(path), options=SKIP))} rows")
        except DataError as error:
            outcomes.add("DataError" if str(error).startswith(str(path)) else str(error))
    assert {"DataError", "4 rows"} <= outcomes <= {"DataError", *(f"{n} rows" for n in range(1, 5))}


def test_missing_archives_are_said(tmp_path):
    with pytest.raises(DataError, match=r"x\.tar: no such file"):
        read_images(str(tmp_path / "x.tar"))
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(DataError, match="no images"):
        read_images(str(tmp_path / "x.tar"))


def test_an_index_reads_no_content(tmp_path):
    """An archive of 6 GB, a sparse file with 3,000 headers: only they are read, and little is kept of each."""
    path, size = tmp_path / "x.tar", 2 << 20
    with path.open("wb") as stream:
        for i in range(3_000):
            stream.write(header(b"%d/%d.png" % (i % 10, i), size))
            stream.seek(size, 1)
        stream.truncate(stream.tell() + 1024)
    tracemalloc.start()
    index = read_index(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(index.files), {member.size for member in index.files.values()}) == (3_000, {size})
    assert peak < 2_000_000
