"""The section [data] of a recipe: the files, their columns, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config.schema import MACHINE, setting

FORMATS = (
    "auto",
    "jsonl",
    "csv",
    "tsv",
    "parquet",
    "conll",
    "word/tag",
    "squad",
    "text",
    "parallel",
    "idx",
    "folder",
    "tar",
)


@dataclass(frozen=True)
class DataSettings:
    """The files, their columns, and how they are read."""

    train: str = setting(
        "",
        "training data: a file, a folder or .tar of images, or package:NAME/FILE",
        needed="name the file to learn from",
    )
    validation: str = setting(
        "", "file whose metric chooses the best checkpoint and stops early; empty: some rows of data.train are held out"
    )
    test: str = setting("", "file that is evaluated once, at the end, with the best weights; empty: none")
    validation_fraction: float = setting(
        0.1, "share of data.train that is held out when data.validation is empty (between 0 and 1)"
    )
    fold: str = setting(
        "",
        "K/N: hold out the K-th of N equal parts of data.train instead, chosen by run.seed and the ids, with equal "
        "shares of the labels; engine.study --folds N runs all; empty: data.validation_fraction",
    )
    text_column: str = setting(
        "",
        "column with the text (or tokens, question, source), or for CoNLL files its number (from 1, or from the end if "
        "negative); empty: the task's usual name",
    )
    text_pair_column: str = setting(
        "", "column with a second text (or the context); empty: the task's usual name, if it has one"
    )
    label_column: str = setting(
        "",
        "column with the label (or tags, answers, target), or for CoNLL files its number, like text_column; empty: the "
        "task's usual name",
    )
    id_column: str = setting("id", "column with the ids; a file without it has row numbers as ids")
    group_column: str = setting(
        "", "column whose equal values are never split between training and held-out data; empty: the task's, if any"
    )
    labels: tuple[str, ...] = setting(
        (),
        'label names in their order, separated by commas, or as a list of TOML, \'["a, b", "c"]\'; '
        "empty: those found in data.train, sorted",
    )
    max_length: int = setting(128, "longest input, in tokens; longer texts are truncated", within="> 0")
    max_train_examples: int = setting(
        0, "largest number of training examples, chosen at random from run.seed; 0: all", within=">= 0"
    )
    format: str = setting("auto", "format of the files; auto: by the ends of their names", FORMATS)
    encoding: str = setting("", "text encoding of the files, such as utf-16 or gb18030; empty: utf-8")
    delimiter: str = setting("", "character between the fields of csv and tsv; empty: comma and tab")
    quotes: str = setting(
        "auto",
        "whether quotes enclose fields; auto: yes in csv, no in tsv; backslash: yes, and a quote inside a field is "
        "escaped by a backslash",
        ("auto", "yes", "no", "backslash"),
    )
    label_separator: str = setting(
        "", "several labels: what separates the labels in a text, such as | or \\t; empty: comma and semicolon"
    )
    bad_rows: str = setting(
        "raise",
        "rows that cannot be used; raise: stop and name them; skip: leave them out and count them",
        ("raise", "skip"),
    )
    long_texts: str = setting(
        "truncate",
        "texts longer than max_length; truncate: keep the first tokens; head+tail: keep first tokens (a quarter) and "
        "last tokens (three quarters); windows: read all tokens in windows, of whose logits a class takes the mean",
        ("truncate", "head+tail", "windows"),
    )
    window_overlap: int = setting(32, "tokens that two neighbouring windows of a long text share", within=">= 0")
    split_special_tokens: bool = setting(
        True,
        "read a special token in a text, such as [SEP] or </s>, as plain text; false: as the token, which may end the "
        "text",
    )
    teacher_file: str = setting(
        "", "file with a teacher's logits for data.train by id, .jsonl as engine.predict writes it; empty: none"
    )
    cache: str = setting(
        "",
        "folder in which training keeps encoded texts, so that later runs on the same data start sooner; empty: none",
        machine=MACHINE,
    )
    num_workers: int = setting(
        0, "number of processes that prepare batches; 0: this process does", within="in [0, 1000]", machine=MACHINE
    )
