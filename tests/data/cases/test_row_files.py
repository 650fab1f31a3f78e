"""Files of rows as people have them: JSON by content, encodings, delimiters, quotes, archives, Arrow with classes."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from support.cases import Content, dry_run, predictions, run, settings_for, write_file

from data import DataError, Rows, read_rows
from data.formats.memory import in_memory
from data.formats.options import FileOptions
from data.teacher import read_teacher
from engine.config import Config, ConfigError, override
from engine.tasks import TASKS
from engine.validate import task_settings

SETTINGS = {"text": "data.text_column", "label": "data.label_column"}
ROWS = [{"text": "fine soup", "label": "yes"}, {"text": "cold soup", "label": "no"}]
TABLE = "text,label\nfine soup,yes\ncold soup,no\n"


def read(path: Path, content: Content, required=("text", "label"), **options: Any) -> Rows:
    return read_rows(str(write_file(path, content)), required, FileOptions(settings=SETTINGS, **options))


def values_of(rows: Rows) -> list[dict[str, Any]]:
    return [row.values for row in rows]


def error_of(path: Path, content: Content, **options: Any) -> str:
    """The message without the folder of the file."""
    with pytest.raises(DataError) as caught:
        read(path, content, **options)
    return str(caught.value).replace(f"{path.parent}/", "")


# JSON

PRETTY = json.dumps(ROWS, indent=2)
BY_COLUMN = {key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ROWS[0]}
JSON = {
    "an array": (json.dumps(ROWS), []),
    "an array of a record a line": ("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n", []),
    "pretty": (PRETTY, []),
    "lines": ("\n".join(map(json.dumps, ROWS)), []),
    "objects on several lines": ("\n".join(json.dumps(row, indent=1) for row in ROWS), []),
    "a list in an object": (
        json.dumps({"version": 2, "data": ROWS}),
        ["the rows are the 2 objects in 'data'; beside it 'version'"],
    ),
    "one of several lists": (
        json.dumps({"features": [{"name": "text"}], "anything": ROWS}),
        ["the rows are the 2 objects in 'anything'; beside it 'features'"],
    ),
    "pandas by column": (
        json.dumps(BY_COLUMN),
        ["an object with a column in each member, as pandas writes it: read as rows"],
    ),
    "lists by column": (
        json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}),
        ["an object with a column in each member, as pandas writes it: read as rows"],
    ),
    "pandas split": (
        json.dumps({"columns": ["text", "label"], "index": [0, 1], "data": [list(row.values()) for row in ROWS]}),
        [],
    ),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "ndjson"])
@pytest.mark.parametrize(("content", "notes"), JSON.values(), ids=JSON)
def test_json_is_read_by_its_content(tmp_path, content, notes, suffix):
    found = read(tmp_path / f"rows.{suffix}", content)
    assert (values_of(found), found.notes) == (ROWS, notes)
    assert [row.id for row in found] == ["1", "2"]


def test_json_by_row_has_the_names_as_ids(tmp_path):
    found = read(tmp_path / "rows.json", json.dumps({"x7": ROWS[0], "x9": ROWS[1]}))
    assert [row.id for row in found] == ["x7", "x9"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            '[{"text": "a", "label": "x"}, {"label": "y"}]',
            "rows.json: record 2: no column 'text'; this row has 'label'",
        ),
        (
            '[{"text": "a", "label": "x"},\n{"label": "y", "text": null}]',
            "rows.json:2: column 'text' is null",  # a record on a line of its own has that line
        ),
        ('[{"text": "a", "label": "x"}, {"text": "b", "label": NaN}]', "rows.json: record 2: column 'label' is null"),
        ('[{"text": "a", "label": "x"}, {"text": "b", "text": 1}]', "rows.json: record 2: key 'text' twice"),
        ('[{"text": "a", "label": "x"}, 5]', "rows.json: record 2: a JSON object is needed, not a int"),
        ('[\n{"text": "a"}\n{"text": "b"}\n]', "rows.json:3: not JSON: Expecting ',' delimiter"),
        ('[\n{"text": "a"},\n]', "rows.json:3: not JSON: a comma before the end"),
        ('[{"text": "a", "label": "x"}', "rows.json:1: not JSON: Expecting ',' delimiter"),
        (
            '{"train": [{"text": "a", "label": "x"}], "test": [{"text": "b", "label": "x"}]}',
            "rows.json: lists of objects in 'train', 'test': which has the rows?",
        ),
        (
            '{"data": [{"sentence": "a", "label": "x"}, {"sentence": "b", "label": "y"}]}',
            "rows.json: no column 'text' (data.text_column); the columns are 'sentence', 'label'; "
            'did you mean data.text_column = "sentence"?',
        ),
        ("[]", "rows.json: no rows"),
    ],
)
def test_json_that_is_no_rows_is_refused_at_its_place(tmp_path, content, reason):
    assert error_of(tmp_path / "rows.json", content).startswith(reason)


def test_a_single_conversation_is_a_row_and_not_a_list_of_rows(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    name = write_file(tmp_path / "rows.jsonl", [{"messages": turns}])
    assert values_of(read_rows(str(name), [])) == [{"messages": turns}]


# Columns


def test_a_dotted_name_is_a_member_of_an_object(tmp_path):
    rows = [{"pair": {"en": "a", "de": "b"}, "answers": [{"text": "c"}, {"text": "d"}], "pair.de": "literal"}] * 2
    wanted = ["pair.en", "pair.de", "answers.text", "answers.1.text"]
    found = read(tmp_path / "rows.jsonl", rows, wanted)
    assert [found[0].values[name] for name in wanted] == ["a", "literal", ["c", "d"], "d"]
    assert found.notes == []
    with in_memory(rows=rows) as names:
        assert read_rows(names["rows"], ["pair.en"])[1].values["pair.en"] == "a"
    message = error_of(tmp_path / "rows.jsonl", rows, required=("pair.fr",))
    assert (
        message
        == "rows.jsonl: no column 'pair.fr'; the columns are 'pair.en', 'pair.de', 'answers', 'pair.de'; "
        + ("did you mean 'pair.en'?")
    )


FORMATS = {
    "jsonl": lambda row: json.dumps(row) + "\n",
    "csv": lambda row: ",".join(map(str, row.values())) + "\n",
    "tsv": lambda row: "\t".join(map(str, row.values())) + "\n",
}


@pytest.mark.parametrize("kind", FORMATS)
def test_one_missing_column_is_one_error_with_its_setting(tmp_path, kind):
    rows = [{"sentence": f"s{i}", "label": "x"} for i in range(30)]
    header = "" if kind == "jsonl" else FORMATS[kind]({key: key for key in rows[0]})
    line = "" if kind == "jsonl" else ":1"
    assert error_of(tmp_path / f"rows.{kind}", header + "".join(map(FORMATS[kind], rows))) == (
        f"rows.{kind}{line}: no column 'text' (data.text_column); the columns are 'sentence', 'label'; "
        'did you mean data.text_column = "sentence"?'
    )


@pytest.mark.parametrize(
    ("columns", "guess"),
    [
        ("id,comment_text,threat", "comment_text"),  # threat is more like text, letter by letter
        ("id,Text,label", "Text"),
        ("id,txet,label", "txet"),
        ("id,threat,insult", ""),
        ("id,label", ""),  # the only one left is an id
    ],
)
def test_the_column_that_is_offered_may_be_the_text(tmp_path, columns, guess):
    message = error_of(tmp_path / "rows.csv", f"{columns}\n" + "1," * columns.count(",") + "2\n")
    offered = f'; did you mean data.text_column = "{guess}"?' if guess else ""
    assert message.split("\n")[0].endswith(f"the columns are {str(columns.split(','))[1:-1]}{offered}")


def test_two_columns_of_texts_are_offered_together(tmp_path):
    message = error_of(tmp_path / "rows.csv", "premise,hypothesis,label\na,b,c\n" * 2)
    assert message.endswith(
        'data.text_column = "premise" and data.text_pair_column = "hypothesis" would read the pairs'
    )


def test_a_txt_in_utf_16_is_recognised_by_its_first_line(tmp_path):
    message = error_of(tmp_path / "rows.txt", TABLE.replace(",", "\t").encode("utf-16"))
    assert message.endswith('its first line looks like tsv: data.format = "tsv" reads it')


def test_null_in_a_nested_column_is_called_null(tmp_path):
    rows = [{"pair": {"en": "a", "de": "b"}}, {"pair": {"en": "a", "de": None}}, {"pair": None}, {"pair": {"en": "a"}}]
    message = error_of(tmp_path / "rows.jsonl", rows, required=("pair.en", "pair.de"))
    assert message.split("\n")[:3] == [
        "rows.jsonl:2: column 'pair.de' is null",
        "rows.jsonl:3: column 'pair' is null",
        "rows.jsonl:4: no column 'pair.de'; this row has 'pair.en'",
    ]


def test_a_column_that_is_null_everywhere_is_one_error(tmp_path):
    rows = [{"text": f"s{i}", "label": None} for i in range(30)]
    assert error_of(tmp_path / "rows.jsonl", rows) == "rows.jsonl: column 'label' is null in every row"
    assert error_of(tmp_path / "rows.jsonl", [*rows[:2], {"text": "a", "label": 1}]).count("\n") == 1


def test_columns_that_are_not_read_are_named_once(tmp_path):
    rows = [row | {"date": "now", "title": str(i)} for i, row in enumerate(ROWS)]
    assert read(tmp_path / "rows.jsonl", rows).notes == ["columns that are not read: 'date', 'title'"]


# Encodings


@pytest.mark.parametrize(
    ("encoding", "first", "second"),
    [
        ("gb18030", "今天的汤很好喝", "汤不好"),
        ("big5", "今天的湯很好喝，謝謝", "湯不好"),
        ("shift_jis", "今日のスープはおいしい", "とても悪い"),
        ("euc_jp", "今日のスープはおいしい", "とても悪い"),
        ("euc_kr", "오늘 국물이 정말 좋다", "나쁜 국물"),
        ("cp1251", "Суп сегодня хороший", "Плохой суп"),
        ("cp1253", "Η σούπα είναι πολύ καλή", "κακή σούπα"),
        ("cp1256", "الحساء لذيذ جدا اليوم", "حساء سيئ"),
        ("tis-620", "วันนี้ซุปอร่อยมาก", "ซุปไม่ดี"),
        ("cp1250", "Zupa jest świetna, żółć i gęś", "zła zupa"),
        ("cp1252", "Die Suppe schmeckt süß, «très bien»", "a café"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_encoding_is_guessed_in_one_error_and_read_when_set(tmp_path, kind, encoding, first, second):
    rows = [{"text": first, "label": "a"}, {"text": second, "label": "b"}] * 12
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if kind == "csv":
        content = "text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows)
    (message,) = error_of(tmp_path / f"rows.{kind}", content.encode(encoding)).split("\n")
    assert message.startswith(f"rows.{kind}:{2 if kind == 'csv' else 1}: not UTF-8 at byte ")
    assert f"as {encoding} it reads " in message
    assert f'data.encoding = "{encoding}"' in message
    assert values_of(read(tmp_path / f"rows.{kind}", content.encode(encoding), encoding=encoding)) == rows


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("content", [TABLE, json.dumps(ROWS)])
def test_wide_encodings_are_called_by_their_names(tmp_path, encoding, content):
    path = tmp_path / ("rows.json" if content[0] == "[" else "rows.csv")
    message = error_of(path, content.encode(encoding))
    assert (
        message == f'{path.name}: this is {encoding[:6].upper()}, and UTF-8 is expected: data.encoding = "{encoding}"'
    )
    assert values_of(read(path, content.replace("\n", "\r\n").encode(encoding), encoding=encoding)) == ROWS


def test_a_few_bad_lines_do_not_make_another_encoding(tmp_path):
    content = "text,label\ncafé,a\nthé,b\n".encode() + "crème,a\n".encode("latin-1")
    assert error_of(tmp_path / "rows.csv", content) == "rows.csv:4: not UTF-8 at byte 2 of the line (0xe8)"
    found = read(tmp_path / "rows.csv", content, bad_rows="skip")
    assert ([row.id for row in found], found.left_out[0].id) == (["1", "2"], "3")


def test_latin_1_that_is_cp1252_is_a_warning(tmp_path):
    content = "text,label\nSuppe,a\n„süße“ Suppe – 5 €,b\nsüß,a\nBrühe…,b\n".encode("cp1252")
    (note,) = read(tmp_path / "rows.csv", content, encoding="latin-1").notes
    assert note.startswith("warning: line 3: this and 1 more line have a control character (0x84), which no text has")
    assert note.endswith("as cp1252 it reads '„süße“ Suppe – 5 €,b': data.encoding = \"cp1252\", if that is right")
    assert read(tmp_path / "rows.csv", content, encoding="cp1252").notes == []
    assert read(tmp_path / "rows.csv", "text,label\nsüß,a\n".encode("latin-1"), encoding="latin-1").notes == []


def test_encodings_that_do_not_exist_or_are_not_needed(tmp_path):
    assert error_of(tmp_path / "rows.csv", TABLE, encoding="utf-99").startswith(
        "data.encoding = 'utf-99' is not an encoding"
    )
    assert error_of(tmp_path / "rows.csv", TABLE, encoding="hex").startswith("data.encoding = 'hex' is not an encoding")
    found = read(tmp_path / "rows.csv", TABLE.replace("soup", "süp"), encoding="cp1252")
    assert found.notes == ["warning: every line of it is UTF-8, yet it is read by data.encoding = 'cp1252'"]
    marked = ("\ufeff" + TABLE.replace("soup", "süp")).encode()
    assert read(tmp_path / "rows.csv", marked, encoding="cp1252")[0].values["text"] == "fine süp"


# Tables


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_another_delimiter_is_guessed_in_the_message_and_read(tmp_path, delimiter):
    content = TABLE.replace(",", delimiter)
    shown = "\\t" if delimiter == "\t" else delimiter
    message = error_of(tmp_path / "rows.csv", content)
    assert message.endswith(f"; data.delimiter = \"{shown}\" reads 'text', 'label'")
    for given in {delimiter, shown}:
        assert values_of(read(tmp_path / "rows.csv", content, delimiter=given)) == ROWS
    assert error_of(tmp_path / "rows.csv", content, delimiter="::").startswith("data.delimiter = '::' should be one")


HABITS = {
    "sep": (f"sep=;\n{TABLE.replace(',', ';')}", ["the line 'sep=;' sets the delimiter, and is not a row"]),
    "spaces": ('text, label\n"fine soup", "yes"\n"cold soup", no\n', []),
    "index": (
        ",text,label\n0,fine soup,yes\n1,cold soup,no\n",
        ["columns without a name, as pandas writes them for row numbers, are not read"],
    ),
    "trailing in all": (
        TABLE.replace("\n", ",\n"),
        ["columns without a name, as pandas writes them for row numbers, are not"],
    ),
    "trailing in rows": (TABLE.replace("\n", ",\n").replace("label,", "label"), ["every row ends with a delimiter"]),
    "old Mac": (TABLE.replace("\n", "\r"), ["its lines end in carriage returns alone, as on old Macs"]),
    "joined": (
        TABLE[:25] + "\ufeff" + TABLE + TABLE[:11] + TABLE[25:],
        ["line 3: this line begins with a byte order mark", "line 3: this and another row repeat the names"],
    ),
    "joined in capitals": (TABLE[:25] + "TEXT,Label\n" + TABLE[25:], ["line 3: this row repeats the names of the col"]),
    "quoted": ('"text","label"\n"fine soup","yes"\n"cold soup","no"\n', []),
}


@pytest.mark.parametrize(("content", "notes"), HABITS.values(), ids=HABITS)
def test_what_programs_leave_in_csv(tmp_path, content, notes):
    found = read(tmp_path / "rows.csv", content)
    assert [row for i, row in enumerate(values_of(found)) if row not in values_of(found)[:i]] == ROWS
    assert len(found.notes) == len(notes)
    assert all(note.startswith(start) for note, start in zip(found.notes, notes, strict=True))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("text,label\n1,a,x\n2,b,y\n", "rows.csv:2: all 2 rows have 3 fields, the header has 2"),
        ("text,label\na,x,\nb,y\n", "rows.csv:2: 3 fields, the header has 2"),
        ('text,label\n"a,x\nb",y\nc,"z\n', "rows.csv:4: not csv: unexpected end of data"),
    ],
)
def test_rows_that_do_not_fit_their_header(tmp_path, content, reason):
    assert error_of(tmp_path / "rows.csv", content).startswith(reason)


def test_an_open_quote_over_lines_is_never_skipped(tmp_path):
    content = 'text,label\n"a,x\nb,y\nc,z\n'
    assert error_of(tmp_path / "rows.csv", content, bad_rows="skip").startswith("rows.csv:2: not csv: unexpected end")
    assert len(read(tmp_path / "rows.csv", content, quotes="no")) == 3


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_quotes_behind_backslashes_are_read_when_set(tmp_path, suffix):
    mark = "," if suffix == ".csv" else "\t"
    content = f'text{mark}label\n"a \\"fine{mark} hot\\" soup"{mark}yes\n"cold soup"{mark}no\n'
    assert values_of(read(tmp_path / f"rows{suffix}", content, quotes="backslash")) == [
        {"text": f'a "fine{mark} hot" soup', "label": "yes"},
        {"text": "cold soup", "label": "no"},
    ]
    quotes = "yes" if suffix == ".tsv" else "auto"
    assert 'data.quotes = "backslash" reads \\" as a quote' in error_of(
        tmp_path / f"rows{suffix}", content, quotes=quotes
    )


def test_quotes_of_a_tsv_are_counted_and_read_when_set(tmp_path):
    content = 'text\tlabel\n"a ""very"" good soup"\tyes\nplain\tno\n"one"\tyes\n'
    found = read(tmp_path / "rows.tsv", content)
    assert found[0].values["text"] == '"a ""very"" good soup"'
    assert found.notes == [
        '2 of 6 fields (the first in line 2) begin and end with a quote; data.quotes = "yes" reads them as csv does, '
        '"no" as they are'
    ]
    assert read(tmp_path / "rows.tsv", content, quotes="no").notes == []
    assert read(tmp_path / "rows.tsv", content, quotes="yes")[0].values["text"] == 'a "very" good soup'
    broken = 'text\tlabel\n"a\nb"\tx\nc\ty\n'
    for bad_rows in ("raise", "skip"):
        message = error_of(tmp_path / "rows.tsv", broken, bad_rows=bad_rows)
        assert message.startswith('rows.tsv:2: 1 fields, the last with a quote that is not closed: data.quotes = "yes"')
    assert read(tmp_path / "rows.tsv", broken, quotes="yes")[0].values["text"] == "a\nb"
    quoted = '"text"\t"label"\n"a"\t"x"\n'
    assert error_of(tmp_path / "rows.tsv", quoted).endswith('; data.quotes = "yes" reads the quotes as csv does')


# Ids


@pytest.mark.parametrize(
    ("name", "content", "ids"),
    [
        ("a.csv", "text\na\n\n\nb\n\n\n", ["1", "2", "3", "4"]),  # an empty line of one column is an empty text
        ("a.tsv", "text\na\n\nb\n", ["1", "2", "3"]),
        ("a.csv", "text,label\na,x\n\nb,y\n\n", ["1", "3"]),
        ("a.tsv", "text\tlabel\na\tx\n\nb\ty\n", ["1", "3"]),
        ("a.csv", 'text,label\n"a\n\nb",x\nb,y\n', ["1", "2"]),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n\n', ["1", "3"]),
    ],
)
def test_empty_lines_shift_no_id(tmp_path, name, content, ids):
    found = read(tmp_path / name, content, required=("text",))
    assert [row.id for row in found] == ids
    has_gap = len(ids) == 2 and ids[1] == "3"
    assert (found.notes == []) is not has_gap


@pytest.mark.parametrize("kind", FORMATS)
def test_bad_rows_shift_no_id(tmp_path, kind):
    bad = {"jsonl": "no json\n", "csv": "1,2,3\n", "tsv": "1\t2\t3\n"}[kind]
    header = "" if kind == "jsonl" else FORMATS[kind]({key: key for key in ROWS[0]})
    content = header + FORMATS[kind](ROWS[0]) + bad + FORMATS[kind](ROWS[1])
    found = read(tmp_path / f"rows.{kind}", content, bad_rows="skip")
    assert [row.id for row in found] == ["1", "3"]
    assert [row.id for row in found.left_out] == ["2"]


# Compressed files and archives


@pytest.mark.parametrize("name", ["rows.csv.gz", "rows.tsv.gz", "rows.jsonl.gz", "rows.json.bz2", "rows.csv.xz"])
def test_compressed_files_are_read(tmp_path, name):
    text = {"csv": TABLE, "tsv": TABLE.replace(",", "\t")}.get(name.split(".")[1], json.dumps(ROWS))
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[name.rpartition(".")[2]]
    packed = pack(text.encode())
    assert values_of(read(tmp_path / name, packed)) == ROWS
    for broken in (packed[: len(packed) // 2], packed[:12] + b"?" + packed[13:]):
        assert "the compressed file is damaged" in error_of(tmp_path / name, broken)


def test_archives_and_sheets_are_refused_with_the_way_on(tmp_path):
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("rows.csv", TABLE)
    content = (tmp_path / "rows.zip").read_bytes()
    assert error_of(tmp_path / "rows.zip", content) == "rows.zip: this is an archive; unpack it, and name a file in it"
    for name in ("rows.csv", "rows.jsonl"):
        assert "this is a zip archive, or a table of Excel" in error_of(tmp_path / name, content)
    assert "save its sheet as csv in UTF-8" in error_of(tmp_path / "rows.xlsx", content)
    assert error_of(tmp_path / "rows.txt", TABLE).endswith('looks like csv: data.format = "csv" reads it')
    assert error_of(tmp_path / "rows.txt", ROWS).endswith('looks like jsonl: data.format = "jsonl" reads it')


# Arrow


def table(**columns: Any) -> Any:
    return pytest.importorskip("pyarrow").table(columns)


def described(arrow_table: Any, **features: Any) -> Any:
    """The table with its columns described as the library `datasets` does."""
    return arrow_table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


CLASSES = {"_type": "ClassLabel", "names": ["no", "yes"]}


def write_parquet(path: Path, arrow_table: Any) -> str:
    pytest.importorskip("pyarrow.parquet").write_table(arrow_table, path)
    return str(path)


def test_numbers_of_classes_become_the_names_in_the_file(tmp_path):
    content = table(text=["a", "b", "c"], label=[1, 0, 1], tags=[[0, 1], [], [1]], more=[{"x": 0}, {"x": 1}, None])
    lists = {"_type": "Sequence", "feature": CLASSES}
    name = write_parquet(tmp_path / "rows.parquet", described(content, label=CLASSES, tags=lists, more={"x": CLASSES}))
    found = read_rows(name, ["text", "label", "tags"])
    assert [row.values["label"] for row in found] == ["yes", "no", "yes"]
    assert [row.values["tags"] for row in found] == [["no", "yes"], [], ["yes"]]
    assert [row.values["more"] for row in found] == [{"x": "no"}, {"x": "yes"}, None]
    note = "the numbers in {!r} are read as the names that the file has for them: 0 = 'no', 1 = 'yes'"
    assert found.notes[:2] == [note.format("label"), note.format("tags")]
    bad = write_parquet(tmp_path / "bad.parquet", described(table(text=["a", "b"], label=[1, 7]), label=CLASSES))
    with pytest.raises(DataError, match=r"bad\.parquet:2: 'label' has 7, and the file names the classes 0 to 1"):
        read_rows(bad, ["text", "label"])
    hidden = write_parquet(tmp_path / "test.parquet", described(table(text=["a", "b"], label=[-1, -1]), label=CLASSES))
    with pytest.raises(DataError, match="column 'label' is null in every row"):
        read_rows(hidden, ["text", "label"])


def test_values_of_arrow_and_of_memory_become_those_of_json(tmp_path):
    columns = {
        "text": [b"a", "ü".encode()],
        "number": [Decimal("1.50"), Decimal("2")],
        "day": [datetime.date(2024, 2, 29), datetime.date(2025, 1, 1)],
        "time": [datetime.datetime(2024, 2, 29, 12), None],
        "nothing": [None, None],
        "inner": [{"raw": b"x", "list": [Decimal(3)]}, {"raw": None, "list": []}],
        "image": [{"bytes": b"\x89PNG\xff", "path": None}, {"bytes": b"\xff\xd8\xff", "path": "a"}],
    }
    expected = [
        {"text": "a", "number": 1.5, "day": "2024-02-29", "time": "2024-02-29T12:00:00", "nothing": None}
        | {"inner": {"raw": "x", "list": [3]}, "image": columns["image"][0]},
        {"text": "ü", "number": 2, "day": "2025-01-01", "time": None, "nothing": None}
        | {"inner": {"raw": None, "list": []}, "image": columns["image"][1]},
    ]
    assert values_of(read_rows(write_parquet(tmp_path / "rows.parquet", table(**columns)), ["text"])) == expected
    with in_memory(rows=[{key: values[i] for key, values in columns.items()} for i in range(2)]) as names:
        assert values_of(read_rows(names["rows"], ["text"])) == expected


def test_bytes_that_are_no_text_are_no_label(tmp_path):
    name = write_parquet(
        tmp_path / "rows.parquet", table(text=["a", "b"], label=[b"x", b"\xfe\xff"], more=[b"\xff"] * 2)
    )
    with pytest.raises(DataError, match=r"rows.parquet:2: 'label' has bytes that are neither UTF-8 \(b'\\xfe\\xff'\)"):
        read_rows(name, ["text", "label"])
    assert len(read_rows(name, ["text"])) == 2  # a column that is not read may have any


def save_to_disk(folder: Path, *tables: Any) -> None:
    """Write a folder as datasets.Dataset.save_to_disk does."""
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(tables):05}.arrow" for i in range(len(tables))]
    for name, content in zip(names, tables, strict=True):
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, content.schema) as writer:
            writer.write_table(content)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"label": CLASSES}}))


def test_data_sets_that_were_saved_to_disk_are_read(tmp_path):
    parts = [table(text=["a", "b"], label=[1, 0]), table(text=["c"], label=[1])]
    save_to_disk(tmp_path / "all" / "train", *parts)
    found = read_rows(str(tmp_path / "all" / "train"), ["text", "label"])
    assert [(row.id, row.values["text"], row.values["label"]) for row in found] == [
        ("1", "a", "yes"),
        ("2", "b", "no"),
        ("3", "c", "yes"),
    ]
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match=r"all: a folder of several data sets; name one of them: .*all/train"):
        read_rows(str(tmp_path / "all"), ["text"])
    single = tmp_path / "all" / "train" / "data-00000-of-00002.arrow"
    assert len(read_rows(str(single), ["text"])) == 2


def test_shards_of_a_table_are_one_file(tmp_path):
    for i in range(3):
        write_parquet(tmp_path / f"train-0000{i}-of-00003.parquet", table(text=[f"{i}a", f"{i}b"]))
    found = read_rows(str(tmp_path), ["text"])
    assert [(row.id, row.values["text"]) for row in found] == list(
        zip("123456", ["0a", "0b", "1a", "1b", "2a", "2b"], strict=True)
    )
    write_parquet(tmp_path / "test-00000-of-00001.parquet", table(text=["z"]))
    with pytest.raises(DataError, match="a folder of several tables"):
        read_rows(str(tmp_path), ["text"])
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    (tmp_path / "train-00002-of-00003.parquet").unlink()
    with pytest.raises(DataError, match="has 2 of the 3 files of 'train'"):
        read_rows(str(tmp_path), ["text"])


# Beside the rows


def test_an_id_column_that_is_not_there_is_said(tmp_path):
    found = read(tmp_path / "rows.csv", TABLE, id_column="key")
    assert found.notes == ["no column 'key' (data.id_column): the ids are numbers from 1"]


def test_settings_of_other_formats_are_said(tmp_path):
    found = read(tmp_path / "rows.jsonl", ROWS, delimiter=";", quotes="no")
    assert found.notes == ["data.delimiter and data.quotes: no effect on a file of this format"]
    found = read(tmp_path / "rows.csv", TABLE, encoding="utf-16")
    assert found.notes == ["read as UTF-8, which it is, not by data.encoding = 'utf-16'"]
    for key, value, format in (("encoding", "gbk", "parquet"), ("delimiter", ";", "jsonl"), ("quotes", "no", "conll")):
        config = override(Config(), {"run.task": "text-classification", f"data.{key}": value, "data.format": format})
        with pytest.raises(ConfigError, match=rf"data\.{key} = '{value}' has no effect with data.format = '{format}'"):
            task_settings(config, TASKS["text-classification"])


def test_rows_that_a_teacher_left_out_have_no_logits(tmp_path):
    lines = [{"id": "1", "logits": [1, 2]}, {"id": "2", "label": None, "reason": "'text' is empty"}]
    name = str(write_file(tmp_path / "teacher.jsonl", lines))
    assert read_teacher(name, ["1"], ["a", "b"]).tolist() == [[1, 2]]
    with pytest.raises(DataError, match="no logits for 1 of the 2 training examples"):
        read_teacher(name, ["1", "2"], ["a", "b"])


# As a user runs it


def test_every_line_of_a_file_gets_its_prediction(tmp_path, capsys):
    rows = [{"text": f"{taste} soup {i}", "label": taste} for i in range(8) for taste in ("fine", "cold")]
    settings = settings_for("text-classification", tmp_path, json.dumps(rows), "rows.json")
    run(settings, capsys)
    found = predictions(settings["run.folder"], write_file(tmp_path / "new.csv", "text\nfine soup\n\ncold soup\n"))
    assert [(row["id"], row["label"] is None) for row in found] == [("1", False), ("2", True), ("3", False)]


def test_the_summary_says_what_was_read(tmp_path, capsys):
    content = "text\tlabel\tdate\n" + "".join(f'"soup {i}"\tx{i % 2}\tnow\n' for i in range(8))
    printed = dry_run(settings_for("text-classification", tmp_path, content, "rows.tsv"), capsys)
    assert 'rows.tsv: 8 of 24 fields (the first in line 2) begin and end with a quote; data.quotes = "yes"' in printed
    assert "rows.tsv: columns that are not read: 'date'" in printed
