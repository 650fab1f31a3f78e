"""Tagged words in the files that people have: schemes, notations, columns, spans, exports of annotation tools."""

from __future__ import annotations

import json

import pytest
import torch
from support.cases import dry_run, evaluation, predictions, run, settings_for, write_file

from data import DataError
from data.formats.options import FileOptions
from data.row import Rows
from data.tag_checks import check_tag_names
from data.tag_schemes import are_entity_tags, count_pairs, find_scheme
from data.token_classification import read_tagged
from engine.metrics.token_classification import tagging_metrics, tagging_statistics

O, SPANS = "O", {"text_column": "text", "label_column": "spans"}  # noqa: E741


def read(path, content, **options) -> Rows:
    return read_tagged(str(write_file(path, content)), "tokens", "tags", **options)


def refusal(path, content, **options) -> str:
    with pytest.raises(DataError) as caught:
        read(path, content, **options)
    return str(caught.value).replace(str(path), "FILE")


def tagged(*tags: str) -> list[dict]:
    return [{"tokens": [f"w{i}" for i in range(len(tags))], "tags": list(tags)}]


# Notations and schemes


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        (["O", "B", "I", "O"], "IOB2"),
        (["B", "M", "E", "S"], "BMES"),  # words of a text without spaces
        (["O", "B-P", "M-P", "E-P"], "BMES"),
        (["B-P", "M-P", "E-P", "S-L"], "BMES"),
        (["B-P", "L-P", "O", "U-L"], "BILOU"),
        (["B-P", "M-P", "E-P", "W-L", "O"], "BMEWO"),
        (["P-B", "P-I", "O"], "IOB2"),
        (["P_B", "P_I", "O"], "IOB2"),
        (["B_P", "I_P", "O"], "IOB2"),
        (["B:P", "I:P", "O"], "IOB2"),
        (["b-p", "i-p", "o"], "IOB2"),
        (["B-P", "I-P", "0"], "IOB2"),
        (["B-P", "I-P", "_"], "IOB2"),
        (["B-P", "I-P", "OTHER"], "IOB2"),
        (["I-P", "O"], "IOB1"),
        (["v", "n", "b", "m", "w"], "none"),  # parts of speech, two of which look like letters
        (["N-B", "V-I", "DT"], "none"),
        (["0", "1", "2"], "none"),
        (["PER", "LOC", "O"], "none"),
    ],
)
def test_the_scheme_and_the_notation_are_found(tmp_path, tags, scheme):
    rows = read(tmp_path / "x.jsonl", tagged(*tags), explain=True)
    assert find_scheme(count_pairs([tags])) == scheme
    assert are_entity_tags(tags) == (scheme != "none")
    assert rows[0].values["tags"] == tags  # they stay as they are written
    is_usual = scheme != "none" and "O" in tags and "-" in tags[0] and tags[0][0] in "BI" and scheme.startswith("IOB")
    assert len(rows.notes) == (not is_usual)
    assert ("no entity scheme recognised" in "".join(rows.notes)) == (scheme == "none")


@pytest.mark.parametrize(
    ("true", "predicted"),
    [
        ("O B I O", "O B O O"),
        ("O P-B P-I O", "O P-B O O"),
        ("o b-p i-p o", "o b-p o o"),
        ("0 B_P I_P 0", "0 B_P 0 0"),
        ("B M E S", "B E E S"),
        ("O B-P L-P O", "O U-P O O"),
    ],
)
def test_f1_is_of_entities_in_every_notation(true, predicted):
    labels = sorted({*true.split(), *predicted.split()})
    found = tagging_statistics(torch.tensor(0.0), 4, 0, [(true.split(), predicted.split())], labels, True)
    assert tagging_metrics(found, labels)["f1"] == pytest.approx(0.4 if "M" in true.split() else 0.0)  # S is right


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("O B-P I-P L", "'L' is not a tag of IOB2, whose tags are O, B-TYPE, I-TYPE"),
        ("O B-P P O", "'P' is not a tag of IOB2, whose tags are O, B-TYPE, I-TYPE; 'I-P', perhaps"),
        ("O B-P b-p O", "'b-p' is not a tag of IOB2, whose tags are O, B-TYPE, I-TYPE; 'B-P', perhaps"),
        ("O B-P I-P 0", "'0' is not a tag of IOB2, whose tags are O, B-TYPE, I-TYPE; 'O', perhaps"),
        ("O B-P M-P M-P E-P B-P I-P", "'I-P' is not a tag of BMES, whose tags are O, B-TYPE, M-TYPE, E-TYPE, S-TYPE"),
        ("I-P E-P O", "the file may be IOE1 or IOE2: token_classification.bad_tags = "),
        ("O B-P O", ""),
    ],
)
def test_a_tag_of_no_scheme_is_an_error_with_its_reading(tmp_path, tags, message):
    if message:
        reason = refusal(tmp_path / "x.jsonl", tagged(*tags.split()))
        assert reason.startswith("FILE:1: word ")
        assert message in reason
        assert len(reason.split("\n")) == 1  # and none that follows from it
    else:
        assert not read(tmp_path / "x.jsonl", tagged(*tags.split())).notes


@pytest.mark.parametrize(
    ("tags", "repaired"),
    [
        ("O I-P I-P B-L I-P", "O B-P I-P B-L B-P"),
        ("B-P E-P O I-P O", "B-P E-P O S-P O"),
        ("B-P B-P E-P S-P", "S-P B-P E-P S-P"),
        ("B-P M-P O S-P E-P", "B-P E-P O S-P S-P"),
        ("B-P L-P L-P O U-P", "B-P L-P U-P O U-P"),
        ("B-P I-P 0 O P b-p", "B-P I-P O O B-P B-P"),
        ("P_I P_I O P_B", "P_B P_I O P_B"),
        ("B-P M-P E-P M-L E-P", "B-P M-P E-P S-L S-P"),
        ("I-P E-P E-P O E-P", "B-P E-P S-P O S-P"),  # IOE2
        ("E-P I-P O", "S-P S-P O"),  # IOE1
        ("BB-P W-P WW-P B-P E-P EE-P MM-O O", "O W-P O B-P E-P O O O"),  # BMEWO+
    ],
)
def test_broken_tags_are_repaired_and_counted(tmp_path, tags, repaired):
    tags, repaired = tags.split(), repaired.split()
    scheme = "IOB2" if tags[0] in ("P_I", "O") else "auto"
    assert "bad_tags" in refusal(tmp_path / "x.jsonl", tagged(*tags), scheme=scheme)
    rows = read(tmp_path / "x.jsonl", tagged(*tags), bad_tags="repair", scheme=scheme)
    assert rows[0].values["tags"] == repaired
    (note,) = rows.notes
    changed = [(old, new) for old, new in zip(tags, repaired, strict=True) if old != new]
    assert f"{len(changed)} tag{'s' * (len(changed) > 1)} repaired by " in note
    assert f"{changed[0][0]!r} to {changed[0][1]!r}" in note
    hopeless = tagged("B-P", "what", "O") + tagged("O", "I-P")
    assert "'what' is not a tag" in refusal(tmp_path / "y.jsonl", hopeless, bad_tags="repair")


@pytest.mark.parametrize("kind", ["conll", "jsonl"])
def test_a_bad_row_is_left_out_whole(tmp_path, kind):
    good, bad = ["a B-P", "b O"], ["c O", "d I-P", "e O"]
    if kind == "conll":
        content = "\n".join([*good, "", *bad, "", *good, "", "f O x", "g O", "", "h O", ""]).encode() + b"\xff O\ni O\n"
    else:
        sentences = [good, bad, good, ["f O", "g"], [" O"]]
        content = [
            {"tokens": [line.split(" ")[0] for line in s], "tags": [line.split(" ")[1] for line in s if " " in line]}
            for s in sentences
        ]
    rows = read(tmp_path / f"x.{kind}", content, options=FileOptions(bad_rows="skip"))
    assert [row.id for row in rows] == ["1", "3"]
    assert [row.values["tokens"] for row in rows] == [["a", "b"]] * 2
    assert [row.id for row in rows.left_out] == ["2", "4", "5"]
    assert "3 of 5 rows left out: " in rows.notes[-1]


def test_numbers_are_places_in_the_labels(tmp_path):
    labels = ("O", "B-P", "I-P")
    rows = read(tmp_path / "x.jsonl", [{"tokens": ["a", "b", "c"], "tags": [0, 1, 2]}], labels=labels)
    assert rows[0].values["tags"] == list(labels)
    assert rows.notes == ["the tags are numbers, read as indices of data.labels: 0 is 'O', 1 is 'B-P', 2 is 'I-P'"]
    content = [{"tokens": ["a", "b"], "tags": [1, 3]}]
    for tag in (3, -100):
        reason = refusal(tmp_path / "y.jsonl", [{"tokens": ["a", "b"], "tags": [1, tag]}], labels=labels)
        assert f"the tag {tag} is not an index of data.labels, which has 3 names" in reason
    rows = read(tmp_path / "x.jsonl", content, explain=True)
    assert rows[0].values["tags"] == ["1", "3"]
    assert "data.labels names the numbers" in rows.notes[0]


def test_an_unknown_tag_is_one_error_with_the_nearest_label(tmp_path):
    rows = read(tmp_path / "x.conll", "a b-per\nb o\n\nc b-per\nd 7\n")
    with pytest.raises(DataError) as caught:
        check_tag_names("FILE", rows, "tags", ["B-PER", "O"])
    assert str(caught.value).split("\n") == [
        "FILE:1: unknown label 'b-per' at 2 words; the labels are 'B-PER', 'O'; 'B-PER', perhaps",
        "FILE:2: unknown label 'o'; the labels are 'B-PER', 'O'; 'O', perhaps",
        "FILE:5: unknown label '7'; the labels are 'B-PER', 'O'; data.labels reads numbers as indices of its names",
    ]


def test_the_tags_of_a_file_stay_in_model_and_predictions(tmp_path, capsys):
    sentences = [(["Ann", "Lee", f"w{i}"], ["p_b", "p_i", "0"]) for i in range(12)]
    content = [{"tokens": words, "tags": tags} for words, tags in sentences]
    settings = settings_for("token-classification", tmp_path, content, eval__metric="f1_strict")
    assert "are read as entities in IOB2, outside is '0'" in run(settings, capsys)
    assert json.loads((tmp_path / "run/best/config.json").read_text())["label2id"].keys() == {"0", "p_b", "p_i"}
    found = predictions(settings["run.folder"], tmp_path / "train.jsonl")
    assert {tag for row in found for tag in row["tags"]} <= {"0", "p_b", "p_i"}
    metrics = evaluation(settings["run.folder"], tmp_path / "train.jsonl")
    assert {"f1", "f1_strict", "precision_strict", "recall_strict"} <= metrics.keys()


# Columns of words and tags

CONLLU = """# sent_id = 1
# text = Ann didn't
1\tAnn\tAnn\tPROPN\tNNP\t_\t2\tnsubj\t_\t_
2-3\tdidn't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdid\tdo\tAUX\tVBD\t_\t0\troot\t_\t_
3\tn't\tnot\tPART\tRB\t_\t2\tadvmod\t_\t_
3.1\tgo\tgo\tVERB\tVB\t_\t_\t_\t_\t_

"""
GERMEVAL = "1\tNew\tB-LOC\tO\n2\tYork\tI-LOC\tB-X\n\n"


@pytest.mark.parametrize(
    ("content", "columns", "words", "tags", "note"),
    [
        (CONLLU, ("tokens", "tags"), "Ann did n't", "PROPN AUX PART", "the column upos"),
        (CONLLU.split("\n", 2)[2], ("tokens", "tags"), "Ann did n't", "PROPN AUX PART", "the column upos"),
        (CONLLU, ("lemma", "xpos"), "Ann do not", "NNP VBD RB", "2 comments (#) left out, the first at line 1"),
        (CONLLU, ("2", "-3"), "Ann did n't", "nsubj root advmod", "1 empty node"),
        ("# global.columns = ID FORM NER\n1\tAnn\tB-P\n2\tis\tO\n", ("tokens", "ner"), "Ann is", "B-P O", "comment"),
        ("# http://a.b [1]\n" + GERMEVAL, ("tokens", "tags"), "New York", "B-LOC I-LOC", "outer entities"),
        ("# http://a.b [1]\n" + GERMEVAL, ("2", "-1"), "New York", "O B-X", "comment"),
        (GERMEVAL, ("2", "3"), "New York", "B-LOC I-LOC", ""),
        ("#\tO\n#\tB-X\nred\tO\n", ("tokens", "tags"), "# # red", "O B-X O", ""),  # hashtags
        ("# of a file\nred O\n", ("tokens", "tags"), "red", "O", "1 comment (#) left out"),
        ("# newdoc\nred\tO\n", ("tokens", "tags"), "red", "O", "1 comment (#) left out"),
        ("New York\tB-X\nis\tO\n", ("tokens", "tags"), "New_York is", "B-X O", ""),
        ("red B-X\nshop\tI-X\r\nis  O\n", ("tokens", "tags"), "red shop is", "B-X I-X O", ""),
        ("红\u3000B-X\n花\u3000I-X\n", ("tokens", "tags"), "红 花", "B-X I-X", "wide space"),
        ("\u3000\tO\n花\tB-X\n", ("tokens", "tags"), "\u3000 花", "O B-X", ""),  # a word that is a wide space
        ("word\ttag\nred\tO\n", ("tokens", "tags"), "red", "O", "names of the columns"),
        ("1 O\n2 B-X\n", ("1", "2"), "1 2", "O B-X", ""),  # a text of numbers, if the recipe says so
    ],
)
def test_columns_are_chosen_or_known(tmp_path, content, columns, words, tags, note):
    (row,) = rows = read(tmp_path / "x.conll", content, columns=columns)
    assert row.values["tokens"] == [word.replace("_", " ") for word in words.split(" ")]
    assert row.values["tags"] == tags.split()
    assert note in "\n".join(rows.notes) if note else not rows.notes


@pytest.mark.parametrize(
    ("name", "content", "columns", "reason"),
    [
        ("x.conll", GERMEVAL, ("tokens", "tags"), "data.text_column = '2' reads the words 'New' ..."),
        ("x.conll", "1 Ann O\n1 is O\n", ("tokens", "tags"), "has only numbers"),
        (
            "x.conll",
            "B-P Ann\nO left\n",
            ("tokens", "tags"),
            "data.text_column = '2' and data.label_column = '1' read it",
        ),
        ("x.conll", "Ann B-P 0.9\nis O 0.8\n", ("tokens", "tags"), "'1' and data.label_column = '2' read it"),
        ("x.conll", "a O\nb O\n", ("5", "2"), "data.text_column = '5', but the lines have 2 columns"),
        ("x.conll", "a O\nb O\n", ("tokens", "upos"), "data.label_column = 'upos' is a column of CoNLL-U"),
        ("x.conll", "a O\n# of a file\n", ("tokens", "tags"), "a comment (#) stands before a sentence"),
        ("x.conll", "a O\n  O\n", ("tokens", "tags"), "if the word is a space, the file needs tabs"),
        ("x.tsv", "a\tO\nb\tO\n", ("tokens", "tags"), "data.format = 'conll' would read it"),
        ("x.conll", "a\tO\t\nb\tO\t\n", ("tokens", "tags"), "data.label_column = '-2' reads the tag before"),
        ("x.txt", "a/O b/O\nc/O\n", ("tokens", "tags"), "data.format = 'word/tag' would read it"),
    ],
)
def test_what_is_not_certain_is_refused_with_a_setting(tmp_path, name, content, columns, reason):
    assert reason in refusal(tmp_path / name, content, columns=columns)


def test_tags_that_look_like_one_are_said(tmp_path):
    rows = read(tmp_path / "x.conll", "a B-Per\nb O\n\nc B-PER\nd O\n", explain=True)
    assert rows.notes == ["warning: the tags 'B-Per' (1) and 'B-PER' (1) differ in case only"]


@pytest.mark.parametrize("header", ["Word\tner_label", "form\tPOS tag"])
def test_a_line_with_the_names_of_the_columns_is_left_out(tmp_path, header):
    (row,) = rows = read(tmp_path / "x.conll", f"{header}\na\tN\nb\tV\n")
    assert row.values["tags"] == ["N", "V"]
    assert rows.notes == ["1 line with the names of the columns left out, the first at line 1"]


def test_a_file_without_sentence_ends_is_said(tmp_path):
    rows = read(tmp_path / "x.conll", "a B-X\nb O\n" * 300)
    assert rows.notes == ["600 words in one sentence, from line 1; sentences end at an empty line"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "json"])
def test_tables_hold_words_and_tags_as_lists(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    words, tags = ["Ann", "left"], ["B-P", "O"]
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"tokens": [words], "tags": [tags]}), path)
        (row,) = read_tagged(str(path), "tokens", "tags")
    elif suffix == "json":
        (row,) = read(path, json.dumps([{"tokens": words, "tags": tags}]))
    else:
        comma = {"csv": ",", "tsv": "\t"}[suffix]
        cells = [f'"{cell}"' if suffix == "csv" else str(cell) for cell in (words, tags)]
        (row,) = rows = read(path, f"tokens{comma}tags\n{cells[0]}{comma}{cells[1]}\n")
        assert rows.notes == ["1 row with lists as text, such as ['a', 'b'], read as lists"]
    assert (row.values["tokens"], row.values["tags"]) == (words, tags)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_an_object_with_lists_is_one_row(tmp_path, name):
    (row,) = read(tmp_path / name, [{"tokens": ["New York", "left"], "tags": ["B-P", "O"]}])
    assert row.values["tokens"] == ["New York", "left"]
    columns = {"tokens": [["Ann", "left"], ["no"]], "tags": [["B-P", "O"], ["O"]]}
    assert [row.values["tokens"] for row in read(tmp_path / name, [columns])] == columns["tokens"]


def test_tags_between_spaces_are_those_of_the_words(tmp_path):
    rows = read(tmp_path / "x.csv", "tokens,tags\nAnn left.,B-P O\nfine,O\n")
    assert [row.values["tokens"] for row in rows] == [["Ann", "left."], ["fine"]]
    assert rows.notes == ["2 rows with tags separated by spaces, read as one tag per word"]
    reason = refusal(tmp_path / "x.csv", "tokens,tags\nAnn left.,B-P O\nfine,O O\n")
    assert reason.startswith("FILE:3: 1 word between spaces in 'tokens', and 2 tags in 'tags'")
    assert "words in lines of their own are read from .conll" in refusal(tmp_path / "x.csv", "tokens,tags\nAnn,B-P\n")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "Ann", "label": []}, 'data.text_column = "text" and data.label_column = "label" would read it'),
        (
            {"tokens": ["Ann"], "pos_tags": [1], "ner_tags": [1]},
            "'ner_tags'; data.label_column = \"ner_tags\" would read",
        ),
        ({"tokens": "Ann", "tags": [], "spans": [], "answer": "reject"}, "answer = 'reject': in Prodigy, these spans"),
    ],
)
def test_rows_of_other_tools_are_refused_with_a_setting(tmp_path, row, message):
    options = FileOptions(settings={"tokens": "data.text_column", "tags": "data.label_column"})
    assert message in refusal(tmp_path / "x.jsonl", [row] * 2, options=options)


def test_repairs_of_what_a_file_has_not_are_said(tmp_path):
    options = FileOptions(delimiter=";")
    content = "a N\nb V\n"
    rows = read(tmp_path / "x.conll", content, bad_tags="repair", bad_spans="skip", explain=True, options=options)
    assert rows.notes.pop(0) == "data.delimiter: no effect on a file of this format"
    assert rows.notes[0] == "token_classification.bad_spans = skip has no effect: there are no spans"
    assert rows.notes[-1] == "token_classification.bad_tags = repair has no effect: the tags have no scheme"


# Spans

FORMS = [  # of one entity, in the text "Ann Lee left"
    [{"start": 0, "end": 7, "label": "P"}],
    [{"start_offset": 0, "end_offset": 7, "label": "P", "id": 4}],
    [{"begin": 0, "end": 7, "type": "P", "text": "Ann Lee"}],
    [{"entity_group": "P", "start": 0, "end": 7, "word": "Ann Lee", "score": 0.9}],
    [{"entity": "Ann Lee", "type": "P", "start": 0, "end": 7}],
    [{"offset": 0, "length": 7, "category": "P"}],
    [{"start": 0, "end": 7, "text": "Ann Lee", "labels": ["P"]}],
    [[0, 7, "P"]],
    [[0, 7, "P"], [0, 7, "P"]],
    {"entities": [[0, 7, "P"]]},
    {"P": [[0, 7]]},
    {"P": {"Ann Lee": [[0, 7]]}},
]


@pytest.mark.parametrize("spans", FORMS)
def test_spans_are_read_in_every_form(tmp_path, spans):
    (row,) = read(tmp_path / "x.jsonl", [{"tokens": "Ann Lee left", "tags": spans}])
    assert row.values["tags"] == ["B-P", "I-P", "O"]


@pytest.mark.parametrize(
    ("text", "start", "end", "own_text", "reason"),
    [
        ("王小明说好", 0, 2, "王小明", "the text has '王小' at 0-2, not '王小明'; that is at 0-3: ends are exclusive"),
        ("😀 王小明说好", 3, 6, "王小明", "that is at 2-5: these count UTF-16 units"),
        ("😀 王小明说好", 3, 5, "王小明", "that is at 2-5: these count UTF-16 units"),  # and the end is inclusive
        ("née Ann", 5, 8, "Ann", "that is at 4-7: these count UTF-8 bytes"),
        ("a\nb\nAnn", 6, 9, "Ann", "that is at 4-7: these count a line end as two characters"),
        (" Ann left", 0, 3, "Ann", "that is at 1-4: the text has one character more before it"),
        ("so Ann left", 4, 7, "Ann", "that is at 3-6: these count from 1"),
        ("Ann left with Ann Lee", 0, 7, "Ann Lee", "that is at 14-21, counted in characters from 0"),
        ("Ann left", 0, 3, "Bob", "that is nowhere in it"),
        ("Ann left", 6, 9, "left", "ends outside the text, which has 8 characters"),
    ],
)
def test_a_span_with_other_words_than_its_own_is_an_error(tmp_path, text, start, end, own_text, reason):
    span = {"start": start, "end": end, "label": "P", "text": own_text}
    assert reason in refusal(tmp_path / "x.jsonl", [{"tokens": text, "tags": [span]}])


@pytest.mark.parametrize(
    ("text", "spans", "expand", "skip", "reason"),
    [
        ("Susan went", [(0, 3, "P")], "B-P O", "O O", '"expand" reads the whole words at 0-5, "skip" leaves it out'),
        ("run 5km now", [(4, 5, "N"), (5, 7, "U")], "O B-N O", "O O O", "only a part of the word '5km'"),
        ("Ann Lee left", [(0, 7, "P"), (4, 7, "Q")], "B-P I-P O", "B-P I-P O", "spans overlap: 'P' and 'Q' both have"),
        ("Ann  left", [(3, 4, "P")], "O O", "O O", "has only spaces"),
    ],
)
def test_spans_that_cut_a_word(tmp_path, text, spans, expand, skip, reason):
    content = [{"tokens": text, "tags": [list(span) for span in spans]}]
    assert reason in refusal(tmp_path / "x.jsonl", content)
    for bad_spans, tags in (("expand", expand), ("skip", skip)):
        (row,) = rows = read(tmp_path / "x.jsonl", content, bad_spans=bad_spans)
        assert row.values["tags"] == tags.split()
        assert f"bad_spans = {bad_spans}), the first at line 1" in rows.notes[0]


def test_pairs_of_a_text_and_its_entities_are_rows(tmp_path):
    pairs = [["Ann left", {"entities": [[0, 3, "P"]]}], ["no one", {"entities": []}]]
    path = write_file(tmp_path / "x.json", json.dumps(pairs))
    assert [row.values["entities"] for row in read_tagged(str(path), "text", "entities")] == [["B-P", "O"], ["O", "O"]]


def test_ends_that_look_inclusive_are_said(tmp_path):
    content = [{"tokens": f"Anna{i} left", "tags": [[0, 4, "P"]]} for i in range(9)]
    assert "the ends look inclusive" in refusal(tmp_path / "x.jsonl", content)
    notes = read(tmp_path / "x.jsonl", content, bad_spans="expand").notes
    assert "the ends look inclusive" in notes[1]


# Exports of annotation tools


def label_studio(text: str, *annotations: list[dict], **more) -> dict:
    results = [{"result": result, **more} for result in annotations]
    return {"id": 7, "data": {"text": text, "source": "x"}, "annotations": results, "predictions": []}


def labels_result(start: int, end: int, text: str) -> dict:
    value = {"start": start, "end": end, "text": text, "labels": ["P"]}
    return {"from_name": "ner", "to_name": "text", "type": "labels", "value": value}


def test_label_studio_is_read_as_rows(tmp_path):
    tasks = [
        label_studio("😀 Ann left", [labels_result(3, 6, "Ann")]) | {"id": 1},  # its places are UTF-16 units
        label_studio("so Ann", [labels_result(3, 6, "Ann")], [labels_result(3, 6, "Ann")]) | {"id": 2},
        label_studio("nobody", []) | {"id": 3},
    ]
    path = write_file(tmp_path / "x.json", json.dumps(tasks))
    for text, label in (("text", "ner"), ("data.text", "ner")):
        rows = read_tagged(str(path), text, label)
        assert [row.values[label] for row in rows] == [["O", "B-P", "O"], ["O", "B-P"], ["O"]]
        assert [row.id for row in rows] == ["1", "2", "3"]
    differ = [label_studio("so Ann", [labels_result(3, 6, "Ann")], [])]
    write_file(path, json.dumps(differ))
    with pytest.raises(DataError, match="2 annotations of this task differ"):
        read_tagged(str(path), "text", "ner")
    assert [row.id for row in read_tagged(str(path), "text")] == ["7"]  # to predict
    write_file(path, json.dumps([*tasks, label_studio("Lee")]))
    with pytest.raises(DataError, match="record 4: this task has no annotation, so no 'ner'"):
        read_tagged(str(path), "text", "ner")
    for column, label in (("body", "ner"), ("text", "entities")):  # no name is taken for an empty list of entities
        write_file(path, json.dumps(tasks[:2]))
        with pytest.raises(DataError, match=r"no column '(body|entities)'"):
            read_tagged(str(path), column, label)


@pytest.mark.parametrize("tool", ["doccano", "label studio"])
def test_classes_of_annotation_tools_are_read(tmp_path, capsys, tool):
    def row(i: int, label: str) -> dict:
        if tool == "doccano":
            return {"id": i, "text": f"{label} house {i}", "label": [label]}
        choice = {"from_name": "colour", "type": "choices", "value": {"choices": [label]}}
        return label_studio(f"{label} house {i}", [choice]) | {"id": i}

    rows = [row(i, "red" if i % 2 else "green") for i in range(12)]
    printed = dry_run(settings_for("text-classification", tmp_path, json.dumps(rows), name="train.json"), capsys)
    assert "labels: green" in printed


def test_folders_of_brat_are_read(tmp_path):
    folder = tmp_path / "brat"
    write_file(folder / "a.txt", "Ann left.\nBob met\nLee in Rome.\n\nNo.\r\n")
    entities = "T1\tP 0 3\tAnn\nT2\tP 10 13;18 21\tBob Lee\nR1\tknows Arg1:T1 Arg2:T2\nT3\tL 25 29\tRome\n"
    write_file(folder / "a.ann", entities)
    write_file(folder / "b.txt", "Bob")
    write_file(folder / "b.ann", "")
    with pytest.raises(DataError, match="a:2: the entity T2 has several pieces"):
        read_tagged(str(folder), "tokens", "tags")
    rows = read_tagged(str(folder), "tokens", "tags", bad_spans="expand")
    assert [row.id for row in rows] == ["a:1", "a:2", "a:5", "b:1"]
    assert rows[1].values["tags"] == ["B-P", "I-P", "I-P", "O", "B-L", "O"]
    assert rows.notes[0].startswith("1 span in several pieces read from the first piece to the last")
    rows = read_tagged(str(folder), "tokens", "tags", bad_spans="skip")
    assert [row.id for row in rows] == ["a:1", "a:2", "a:3", "a:5", "b:1"]
    write_file(folder / "b.ann", "T1\tP 0 2\tBob\n")
    with pytest.raises(DataError, match="that is at 0-3: ends are exclusive"):
        read_tagged(str(folder), "tokens", "tags", bad_spans="skip")
    (folder / "a.ann").unlink()
    (folder / "b.ann").unlink()  # texts alone can be predicted
    assert [row.id for row in read_tagged(str(folder), "tokens")] == ["a:1", "a:2", "a:3", "a:5", "b:1"]
