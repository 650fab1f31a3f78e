"""Files -> rows: ids, line numbers, odd text, and F13: every bad row is reported as file:line: reason, all at once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from data import DataError, Row, read_rows, sample_rows, split_rows
from data.errors import ErrorList
from data.formats.lines import MAX_LINE
from data.formats.options import FileOptions

KINDS = ["jsonl", "csv", "tsv"]
# Characters that str.splitlines, a shell or a spreadsheet would take for more than a character of a text.
ODD = ["中文，句子", "🎉👩‍👩‍👧", "next\x85line", "line\u2028para\u2029", "\x0b\x0c\x1c\x1d\x1e"]
ODD += ["no\u00a0break", "\ufeffinside", "éß"]


def encode(kind: str, rows: list[dict[str, str]]) -> list[str]:
    """The lines of a file with these rows, none of whose values need quotes."""
    if kind == "jsonl":
        return [json.dumps(row, ensure_ascii=False) for row in rows]
    separator = {"csv": ",", "tsv": "\t"}[kind]
    return [separator.join(rows[0]), *(separator.join(row.values()) for row in rows)]


def read(folder: Path, kind: str, content: str | bytes, required=("text", "label"), **options) -> list[Row]:
    path = folder / f"file.{kind}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_rows(str(path), required, **options)


def errors_of(folder: Path, kind: str, content: str | bytes, **options) -> list[str]:
    """The lines of the error, without the name of the file."""
    with pytest.raises(DataError) as caught:
        read(folder, kind, content, **options)
    return str(caught.value).replace(str(folder / f"file.{kind}"), "FILE").split("\n")


# What is read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_odd_text_is_read_as_it_stands(tmp_path, kind, bom, end, last):
    rows = [{"id": f"r{i}", "text": text, "label": "a"} for i, text in enumerate(ODD)]
    content = bom + end.join(encode(kind, rows)) + (end if last else "")
    found = read(tmp_path, kind, content)
    assert [row.values for row in found] == rows
    assert [row.id for row in found] == [row["id"] for row in rows]
    header = 0 if kind == "jsonl" else 1
    assert [row.line for row in found] == [i + 1 + header for i in range(len(rows))]


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_id_column_ids_are_row_numbers(tmp_path, kind):
    content = "\n".join(encode(kind, [{"text": t, "label": "a"} for t in "xyz"]))
    assert [row.id for row in read(tmp_path, kind, content)] == ["1", "2", "3"]
    content = "\n".join(encode(kind, [{"key": t, "text": t, "label": "a"} for t in "xyz"]))
    assert [row.id for row in read(tmp_path, kind, content, options=FileOptions(id_column="key"))] == ["x", "y", "z"]


@pytest.mark.parametrize("kind", KINDS)
def test_empty_lines_are_no_rows_but_count_as_lines(tmp_path, kind):
    lines = encode(kind, [{"id": t, "text": t, "label": "a"} for t in "xy"])
    found = read(tmp_path, kind, "\n\n".join(["", *lines, ""]))
    assert [(row.id, row.line) for row in found] == [("x", 3), ("y", 5)] if kind == "jsonl" else [("x", 5), ("y", 7)]


def test_csv_quotes_and_the_first_line_of_a_record(tmp_path):
    content = 'id,text,label\n1,"a\nb\n\nc",x\n2,"say ""hi"", you",y\r\n3,plain,"z"\n'
    found = read(tmp_path, "csv", content)
    assert [row.values["text"] for row in found] == ["a\nb\n\nc", 'say "hi", you', "plain"]
    assert [row.line for row in found] == [2, 6, 7]


def test_a_byte_order_mark_where_a_line_begins_is_no_text(tmp_path):
    found = read(tmp_path, "tsv", "\ufefftext\tlabel\n\ufefffirst\ta\nb\t\ufeffinside\n")
    assert [row.values for row in found] == [{"text": "first", "label": "a"}, {"text": "b", "label": "\ufeffinside"}]
    assert found.notes == ["line 2: this line begins with a byte order mark, as in joined files: left out"]


def test_tsv_has_no_quotes(tmp_path):
    texts = ['"', '"half', "'' both ''", '"whole"', "a, b", "back\\slash", "carriage\rreturn"]
    content = "\n".join(encode("tsv", [{"text": text, "label": "a"} for text in texts]))
    assert [row.values["text"] for row in read(tmp_path, "tsv", content)] == texts


def test_jsonl_keeps_json_types_and_other_columns(tmp_path):
    values = {"id": 7, "text": "t", "label": True, "score": 0.5, "tags": ["a"], "nothing": None}
    (row,) = read(tmp_path, "jsonl", json.dumps(values))
    assert (row.id, row.values) == ("7", values)


def test_a_line_may_be_long_but_not_endless(tmp_path):
    longest = "x" * (MAX_LINE - 2)
    assert read(tmp_path, "tsv", f"text\tlabel\n{longest}\ta\n")[0].values["text"] == longest
    (error,) = errors_of(tmp_path, "tsv", f"text\tlabel\n{'x' * 10_000_000}\ta\nb\ta\n")
    assert error == "FILE:2: 10,000,002 characters in one line; at most 1,000,000 are read"


def test_the_suffix_is_read_in_any_case_and_packages_hold_files(tmp_path):
    (tmp_path / "A.TSV").write_text("text\nx\n")
    assert read_rows(str(tmp_path / "A.TSV"), ["text"])[0].values == {"text": "x"}
    assert len(read_rows("package:data/samples/movie_reviews/reviews.tsv", ["text", "label"])) == 10_568


# What is refused


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.csv", "no such file"),
        ("file.txt", "unknown kind of file '.txt'; use one of .jsonl, .csv, .tsv"),
        ("file", "no such file"),
        (".", "this is a folder"),
        ("folder.csv", "this is a folder"),
        (f"{'x' * 300}.csv", "cannot be read: File name too long"),
        ("package:no_such_package/x.csv", "the package 'no_such_package' is not installed"),
        ("package:", "the package '' is not installed"),
        ("package:a.b/x.csv", "the package 'a.b' is not installed"),
        ("package:data/none.csv", "no such file"),
        ("package:data", "this is a folder"),
    ],
)
def test_a_name_that_cannot_be_read(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        read_rows(name, ["text"])
    assert str(caught.value).startswith(f"{name}: {reason}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_rows(tmp_path, kind):
    header = "" if kind == "jsonl" else encode(kind, [{"text": "", "label": ""}])[0]
    for content in ("", "\n\n", "\ufeff", "\r\n", header, f"{header}\n\n"):
        with pytest.raises(DataError, match=r"file\.\w+: no rows$"):
            read(tmp_path, kind, content)


ANY_KIND = [
    (b"\xff", "not UTF-8 at byte 0 of the line (0xff)"),
    (b"ab\xc3(", "not UTF-8 at byte 2 of the line (0xc3)"),
    (b"\xed\xa0\x80", "not UTF-8 at byte 0 of the line (0xed)"),
    ("Grüße".encode("latin-1"), "not UTF-8 at byte 2 of the line (0xfc)"),
    (b"a\0b", "a NUL character"),
]
DELIMITED = [(b"only", "1 fields, the header has 3"), (b"a,b,c,d", "4 fields, the header has 3"), (b",", "2 fields")]
BAD_ROWS = {
    "jsonl": [
        *ANY_KIND,
        (b"not json", "not JSON: Expecting value"),
        (b'{"text": "a", "label": "b"', "not JSON: Expecting ',' delimiter"),
        (b"{'text': 'a'}", "not JSON: Expecting property name"),
        (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
        (b'{"text": "tab\tinside", "label": "b"}', "not JSON: Invalid control character"),
        (b'{"id": 5, "text": "a", "label": NaN}', "column 'label' is null"),
        (b'{"id": 5, "text": "a", "label": -Infinity}', "not JSON: -Infinity is not a JSON value"),
        (b"[" * 100_000, "not JSON: maximum recursion depth exceeded"),
        (b'{"id": ' + b"9" * 5_000 + b"}", "not JSON: Exceeds the limit"),
        (b'{"id": 5, "text": "\\ud83d", "label": "a"}', "\\ud83d is half of a surrogate pair"),
        (b'{"id": 5, "text": "a", "label": "b", "text": "c"}', "key 'text' twice"),
        (b'{"id": 5, "text": "a", "label": "b", "more": {"x": 1, "x": 1}}', "key 'x' twice"),
        (b'["text", "label"]', "a JSON object is needed, not a list"),
        (b'"text"', "a JSON object is needed, not a str"),
        (b"null", "a JSON object is needed, not a NoneType"),
        (b"{}", "no column 'text'; this row has no columns"),
        (b'{"id": 5, "label": "b"}', "no column 'text'; this row has 'id', 'label'"),
        (b'{"id": 5, "Text": "a", "label": "b"}', "no column 'text'; this row has 'id', 'Text', 'label'"),
        (b'{"id": 5, "text": "a", "label": null}', "column 'label' is null"),
        (b'{"text": "a", "label": "b"}', "an id in 'id' should be text or a number, this row has none"),
        (b'{"id": null, "text": "a", "label": "b"}', "an id in 'id' should be text or a number, not None"),
        (b'{"id": "", "text": "a", "label": "b"}', "an id in 'id' should be text or a number, not ''"),
        (b'{"id": [1], "text": "a", "label": "b"}', "an id in 'id' should be text or a number, not [1]"),
        (b'{"id": true, "text": "a", "label": "b"}', "an id in 'id' should be text or a number, not True"),
    ],
    "csv": [
        *ANY_KIND,
        *DELIMITED,
        (b'5,"a"b,c', "not csv: ',' expected after '\"'"),
        (b"5,a\rb,c", "not csv: new-line character seen in unquoted field; a field with"),
        (b",a,b", "an id in 'id' should be text or a number, not ''"),
    ],
    "tsv": [*ANY_KIND, *((row.replace(b",", b"\t"), reason) for row, reason in DELIMITED)],
}  # fmt: skip


def with_bad_rows(kind: str, place: int, bad: list[bytes], bom: bytes, end: bytes) -> bytes:
    """A file of four good rows, the bad ones put in before row `place`."""
    # The good rows show that the file is UTF-8; otherwise bad bytes would mean another encoding of the whole file.
    good = [line.encode() for line in encode(kind, [{"id": f"r{i}", "text": "ü", "label": "a"} for i in range(4)])]
    header = [] if kind == "jsonl" else [good.pop(0)]
    return bom + end.join([*header, *good[:place], *bad, *good[place:]])


@pytest.mark.parametrize(("kind", "bad", "reason"), [(kind, *row) for kind in KINDS for row in BAD_ROWS[kind]])
def test_f13_a_bad_row_is_named_by_line_and_reason(tmp_path, kind, bad, reason):
    for place in (0, 2, 4):
        for bom, end in ((b"", b"\n"), (b"\xef\xbb\xbf", b"\r\n")):
            line = place + (1 if kind == "jsonl" else 2)
            (error,) = errors_of(tmp_path, kind, with_bad_rows(kind, place, [bad], bom, end))
            assert error.startswith(f"FILE:{line}: {reason}")


@pytest.mark.parametrize("kind", KINDS)
def test_f13_all_bad_rows_are_reported_together_in_order(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(ErrorList, "SHOWN_OF_KIND", 20)
    few = [row for row in BAD_ROWS[kind] if not row[1].startswith("not UTF-8")]
    bad, reasons = zip(*(few * 9), strict=True)
    errors = errors_of(tmp_path, kind, with_bad_rows(kind, 2, list(bad), b"", b"\n"))
    first = 3 if kind == "jsonl" else 4
    assert len(errors) == ErrorList.SHOWN + 1
    for i in range(ErrorList.SHOWN):
        assert errors[i].startswith(f"FILE:{first + i}: {reasons[i]}")
    assert errors[-1] == f"... and {len(bad) - ErrorList.SHOWN} more"


def test_many_errors_of_one_kind_do_not_hide_another(tmp_path):
    rows = [{"id": i, "text": "x", "label": None} for i in range(30)] + [{"id": 7, "text": "x", "label": "y"}]
    errors = errors_of(tmp_path, "jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert errors[:5] == [f"FILE:{line}: column 'label' is null" for line in range(1, 6)]
    assert errors[5:] == ["... and 25 more"]
    rows += [{"text": "x", "label": "y"}]
    errors = errors_of(tmp_path, "jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert errors[5].startswith("FILE:32: an id in 'id' should be text or a number, this row has none")
    assert errors[6:] == ["... and 25 more"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_file_of_one_row_gets_the_same_hint(tmp_path, count):
    found = errors_of(tmp_path, "jsonl", '{"comment": "a", "label": "b"}\n' * count)
    assert found[0].endswith("no column 'text'; the columns are 'comment', 'label'; did you mean 'comment'?")


@pytest.mark.parametrize(
    ("kind", "content", "error"),
    [
        ("csv", "id,text,Label\n1,a,b\n", "FILE:1: no column 'label'; the columns are 'id', 'text', 'Label'; did you"),
        ("tsv", "1\ta\n2\tc\n", "FILE:1: no column 'text'; the columns are '1', 'a'; the first line should have"),
        (
            "tsv",
            "__label__b fine soup\n" * 2,
            "FILE:1: no column 'text'; the columns are '__label__b fine soup'; the lines",
        ),
        (
            "csv",
            "Fine soup.,b\nx,a\n",
            "FILE:1: no column 'text'; the columns are 'Fine soup.', 'b'; the first line should",
        ),
        ("csv", "# as of May\ntext,label\n", "FILE:1: no column 'text'; the columns are '# as of May'; the first line"),
        ("tsv", "text,label\na,b\n", "FILE:1: no column 'text'; the columns are 'text,label'; data.delimiter = \",\""),
        ("csv", "\n\ntext,label,text\na,b,c\n", "FILE:3: the header names 'text' twice"),
        ("csv", b"text,label,\xff\na,b,c\nd,e,f\n", "FILE:1: not UTF-8 at byte 11 of the line (0xff)"),
        ("csv", '"text,label\na,b\n', "FILE:1: not csv: unexpected end of data"),
    ],
)
def test_a_broken_header_is_the_one_error(tmp_path, kind, content, error):
    found = errors_of(tmp_path, kind, content)
    assert found[0].startswith(error)
    assert len(found) == 1


def test_an_open_quote_is_reported_where_it_opens(tmp_path):
    (error,) = errors_of(tmp_path, "csv", 'text,label\na,b\n"c,d\ne,f\n')
    assert error.startswith("FILE:3: not csv: unexpected end of data; a field with a comma, quote or line end")


def test_rows_after_a_broken_line_keep_their_own_line_number(tmp_path):
    errors = errors_of(tmp_path, "csv", "text,label\n\0\na\nb,ü\n".encode() + b"\xff\nd,e,f\n")
    assert [error.split(":")[1] for error in errors] == ["2", "3", "5", "6"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_occur_twice_are_errors_that_name_both_lines(tmp_path, kind):
    rows = [{"id": key, "text": "t", "label": "a"} for key in ("7", "8", "7", "7")]
    first, second = errors_of(tmp_path, kind, "\n".join(encode(kind, rows)))
    base = 1 if kind == "jsonl" else 2
    for error, line in ((first, base + 2), (second, base + 3)):
        assert error.startswith(
            f"FILE:{line}: the id '7' is that of line {base} too; data.id_column names another column"
        )
    # Another column for the ids, or none: then these are values like any others.
    assert [
        row.id for row in read(tmp_path, kind, "\n".join(encode(kind, rows)), options=FileOptions(id_column=""))
    ] == list("1234")


def test_ids_that_print_alike_are_the_same(tmp_path):
    lines = [json.dumps({"id": key, "text": "t", "label": "a"}) for key in (7, "7")]
    (error,) = errors_of(tmp_path, "jsonl", "\n".join(lines))
    assert error.startswith("FILE:2: the id '7' is that of line 1 too")


# The held-out split


def numbered(count: int, **columns) -> list[Row]:
    return [Row(str(i), i, {name: value(i) for name, value in columns.items()}) for i in range(count)]


@pytest.mark.parametrize(("count", "fraction", "held"), [(100, 0.1, 10), (7, 0.5, 4), (2, 0.01, 1), (1000, 0.333, 333)])
def test_the_split_is_a_pure_function_of_the_seed(count, fraction, held):
    rows = numbered(count, label=lambda i: i % 3 if count > 2 else 0)
    for label in ("", "label"):
        train, held_out = split_rows(rows, fraction, 3, label=label)
        assert (len(train), len(held_out)) == (count - held, held)
        assert sorted(train + held_out, key=lambda row: row.line) == rows
        assert train == sorted(train, key=lambda row: row.line)  # the order of the file
        assert (train, held_out) == split_rows(rows, fraction, 3, label=label)
        others = [split_rows(rows, fraction, seed, label=label)[1] for seed in range(20)]
        assert any(other != held_out for other in others)


def test_every_row_is_as_likely_to_be_held_out():
    rows = numbered(20, label=lambda i: "rare" if i < 3 else "often")
    for label, fraction in (("", 0.35), ("label", 0.35), ("label", 0.05)):
        counts = Counter(row.id for seed in range(2000) for row in split_rows(rows, fraction, seed, label=label)[1])
        deviation = (2000 * fraction * (1 - fraction)) ** 0.5
        assert all(abs(counts[row.id] - 2000 * fraction) < 5 * deviation for row in rows)


@pytest.mark.parametrize("fraction", [0.03, 0.1, 0.25, 0.5])
def test_the_split_keeps_the_proportions_of_the_labels(fraction):
    rows = numbered(400, label=lambda i: "abc"[(i % 10 > 5) + (i % 10 > 8)])
    for seed in range(20):
        _, held_out = split_rows(rows, fraction, seed, label="label")
        total, held = (Counter(row.values["label"] for row in part) for part in (rows, held_out))
        assert all(abs(held[name] - total[name] * fraction) < 1 for name in total)


def test_the_only_row_of_a_label_is_never_held_out():
    rows = numbered(20, label=lambda i: "only" if i == 7 else "abc"[i % 2])
    for seed in range(40):
        train, held_out = split_rows(rows, 0.25, seed, label="label")
        assert len(held_out) == 5
        assert {row.values["label"] for row in train} == {"only", "a", "b"}
    with pytest.raises(DataError, match=r"held out: no two rows have the same 'label'; use a data\."):
        split_rows(numbered(5, label=str), 0.2, 0, label="label")


def test_a_group_stays_on_one_side():
    rows = numbered(200, label=lambda i: i % 2, patient=lambda i: i * i % 41)
    groups = {row.values["patient"] for row in rows}
    sides = set()
    for seed in range(10):
        train, held_out = (
            {row.values["patient"] for row in part} for part in split_rows(rows, 0.2, seed, "patient", "label")
        )
        assert train | held_out == groups
        assert not train & held_out
        assert len(held_out) == round(len(groups) * 0.2)
        sides.add(frozenset(held_out))
    assert len(sides) > 1


@pytest.mark.parametrize(("count", "fraction", "what"), [(1, 0.1, "1 row"), (3, 0.9, "3 rows"), (10, 0.99, "10 rows")])
def test_a_split_that_leaves_nothing_to_train_on(count, fraction, what):
    with pytest.raises(
        DataError, match=f"data.validation_fraction = {fraction} leaves nothing to train on: only {what}"
    ):
        split_rows(numbered(count, label=str), fraction, 0)
    with pytest.raises(DataError, match="only 1 value of 'patient'"):
        split_rows(numbered(10, patient=lambda i: 5), 0.1, 0, "patient")
    with pytest.raises(DataError, match="only 1 value of the context, whose rows stay in one split"):
        split_rows(numbered(10, same_context=lambda i: "Choose."), 0.1, 0, "same_context")


def test_a_sample_of_rows_depends_on_the_seed_and_nests():
    rows = [Row(str(i), i) for i in range(50)]
    drawn = {n: [row.id for row in sample_rows(rows, n, 3)] for n in (5, 20, 49)}
    assert [len(ids) for ids in drawn.values()] == [5, 20, 49]
    assert all(ids == sorted(ids, key=int) for ids in drawn.values())
    assert set(drawn[5]) < set(drawn[20]) < set(drawn[49])
    assert drawn[5] != [row.id for row in sample_rows(rows, 5, 4)]
    assert drawn[5] != [str(i) for i in range(5)]
    assert sample_rows(rows, 0, 3) == sample_rows(rows, 50, 3) == sample_rows(rows, 99, 3) == rows
