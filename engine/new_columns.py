"""Guess which columns of a file a task reads, by their names and by what is in them.

A text is a string, of many lengths; a class has few distinct values, which repeat. Of several columns that would do,
one with a usual name comes first, then the longest text, or the last class of a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from data import Row
from data.errors import DataError
from data.formats.columns import PAIRS, USUAL_NAMES, name_all
from data.formats.image_kinds import SUFFIXES
from data.notes import quote

LOOKED_AT = 5_000  # rows
MOST_CLASSES = 1_000
LONGEST_NAME = 60  # characters of the name of a class
NUMBERS_OF_ROWS = ("id", "idx", "index", "guid", "uid", "row", "unnamed: 0", "", "编号", "序号")
ID = re.compile(r"(?i:(.*[^a-z])?(u|gu|uu)?id)|.*[a-z]I[dD]|.*(编号|序号|单号)")  # a name such as user_id, userId
# {a default name: more usual ones}; the English ones are those that the readers suggest.
MORE_NAMES = {
    "text": ("文本", "内容", "评论", "句子", "正文"),
    "label": ("标签", "类别", "情感", "分类", "意图"),
    "labels": ("tags", "categories", "topics", "genres", "标签"),
    "score": ("评分", "分数", "得分"),
    "summary": ("摘要", "标题"),
    "messages": ("conversations", "conversation", "dialogue", "turns", "chat"),
    "relation": ("label", "关系"),
    "path": ("image", "file", "filename", "file_name", "图片"),
    "question": ("query", "问题"),
    "anchor": ("query", "question", "sentence1", "premise"),
    "positive": ("answer", "passage", "sentence2", "entailment"),
    "source": ("en", "english", "src"),
    "target": ("tgt",),
}


class Column(NamedTuple):
    """A column, and what its values are."""

    name: str
    place: int  # in the file
    kind: str  # number, text, words (a list of them), objects (one or a list of them), or mixed
    distinct: int  # different values
    lengths: int  # different numbers of characters
    mean: float  # of the numbers of characters
    shortest: int
    longest: int
    images: int  # values that end as the name of an image does
    questions: int  # values that end with a question mark
    rows: int

    @property
    def is_text(self) -> bool:
        """Whether it has strings of many lengths."""
        varies = self.lengths >= min(3, self.rows)  # ids often have one length
        return (
            self.kind == "text"
            and varies
            and (self.distinct > self.rows / 2 or (self.lengths > 20 and not self.is_class))
        )

    @property
    def is_class(self) -> bool:
        """Whether it has few distinct values, which repeat."""
        few = 2 <= self.distinct <= min(MOST_CLASSES, max(2, self.rows // 2))
        return self.kind in ("text", "number") and few and self.mean <= LONGEST_NAME

    def describe(self) -> str:
        """Return what is in the column, as part of a comment."""
        if self.kind == "words":
            return "a list in each row"
        if self.kind == "objects":
            return "an object or a list of them in each row"
        if self.is_text or (self.kind == "text" and not self.is_class):
            return f"text of {self.shortest:,} to {self.longest:,} characters, {self.mean:.0f} in the mean"
        return f"{self.distinct:,} distinct values"


class Guess(NamedTuple):
    """A column that was chosen, and why."""

    column: str
    why: str


Fits = Callable[[Column], bool]
Rank = Callable[[Column], float]


class Role(NamedTuple):
    """What a column of a task has to be, and which of several is the best."""

    setting: str  # text, text_pair or label, of data.text_column ...
    fits: Fits
    rank: Rank
    otherwise: Fits = lambda column: False  # what will do where nothing fits


def _longest(column: Column) -> float:
    return column.mean


def _first(column: Column) -> float:
    return -column.place


def _last(column: Column) -> float:
    return column.place


TEXT = Role("text", lambda column: column.is_text, _longest, lambda column: column.kind == "text")
CLASS = Role("label", lambda column: column.is_class, _last)
# The roles in the order in which they choose: what one has taken, no other can have.
ROLES: dict[str, tuple[Role, ...]] = {
    "text-classification": (TEXT, CLASS),
    "multi-label-classification": (
        TEXT,
        Role("label", lambda c: c.kind == "words" or c.is_class, lambda c: 1e6 * (c.kind == "words") + c.place),
    ),
    "text-regression": (TEXT, Role("label", lambda c: c.kind == "number" and c.distinct > 2, _last)),
    "token-classification": (
        Role("label", lambda c: c.kind in ("words", "objects"), lambda c: -c.distinct),
        Role("text", lambda c: c.kind == "words" or c.is_text, lambda c: 1e6 * (c.kind == "words") + c.mean),
    ),
    "multiple-choice": (TEXT, CLASS, Role("text_pair", lambda c: c.is_text, _longest)),
    "sentence-embedding": (
        Role("text", lambda c: c.is_text, _first),
        Role("text_pair", lambda c: c.is_text, _first),
    ),
    "dialogue": (Role("text", lambda c: c.kind == "objects", _longest),),
    "summarization": (TEXT, Role("label", lambda c: c.kind == "text", _longest)),
    "translation": (Role("text", lambda c: c.is_text, _first), Role("label", lambda c: c.is_text, _first)),
    "question-answering": (
        Role("text", lambda c: c.kind == "text", lambda c: c.questions - c.mean / 1e6),
        Role("text_pair", lambda c: c.is_text, _longest),
        Role("label", lambda c: c.kind in ("objects", "text", "words"), lambda c: 1e6 * (c.kind == "objects") - c.mean),
    ),
    "relation-extraction": (TEXT, CLASS),
    "image-classification": (Role("text", lambda c: c.images > c.rows / 2, _first), CLASS),
    "multi-label-image-classification": (
        Role("text", lambda c: c.images > c.rows / 2, _first),
        Role("label", lambda c: c.kind == "words" or c.is_class, _last),
    ),
}


def guess_columns(
    task: str, names: Mapping[str, str], given: Mapping[str, str], id_column: str, rows: Sequence[Row]
) -> dict[str, Guess]:
    """Return {"data.text_column": guess} for the columns of a task that a file has under another name.

    names: {"text": the task's usual name, ...}. given: the columns that the user named, likewise.
    rows: of the file. Raises DataError for a file without names of columns.
    """
    columns = [
        column for column in describe_columns(rows) if _last_part(column.name) not in (*NUMBERS_OF_ROWS, id_column)
    ]
    found = [column.name for column in columns]
    used = {name for role, default in names.items() if (name := given.get(role) or default) in found}
    guesses: dict[str, Guess] = {}
    pair = next((pair for pair in PAIRS if set(pair) <= set(found)), None)
    if pair and task in ("text-classification", "text-regression") and names["text"] not in used and not given:
        for role, name in zip(("text", "text_pair"), pair, strict=True):
            guesses[f"data.{role}_column"] = Guess(name, "guessed: the names of a usual pair of texts")
            used.add(name)
    for setting, fits, rank, otherwise in ROLES.get(task, (TEXT,)):
        default = names.get(setting, "")
        if setting in given or default in used or f"data.{setting}_column" in guesses:
            continue
        left = [column for column in columns if column.name not in used]
        free = [column for column in left if fits(column)] or [column for column in left if otherwise(column)]
        if not free and fits is CLASS.fits:
            raise DataError(_explain_no_classes(default, columns, task))
        if not free:
            continue  # the reader says which column is missing
        usual = {*USUAL_NAMES.get(default, ()), *MORE_NAMES.get(default, ())}
        best = max(free, key=lambda column: (_last_part(column.name) in usual, not is_id(column.name), rank(column)))
        _check_header(best, rows)
        used.add(best.name)
        rest = [column for column in free if column is not best]
        if setting == "text":  # where texts repeat, a column of classes would do too, but nobody means it
            rest = [column for column in rest if column.distinct > best.distinct // 2]
        others = [column.name for column in rest]
        also = f"; others that would do: {name_all(others)}" if others else ""
        if others and setting == "text" and task in ("text-classification", "text-regression"):
            also += ", or data.text_pair_column = one of them, for two texts"
        guesses[f"data.{setting}_column"] = Guess(best.name, f"guessed: {best.describe()}{also}")
    if guesses and id_column == "id" and id_column not in rows[0].values:  # the default, which the file lacks
        ids = [name for name in rows[0].values if is_id(name) and name not in used and _are_ids(name, rows)]
        if ids:
            guesses["data.id_column"] = Guess(ids[0], "guessed: no value repeats; predictions are named by it")
    return guesses


def is_id(name: str) -> bool:
    """Return whether a column is named as ids are: id, user_id, userId, 编号."""
    return ID.fullmatch(name) is not None


def _are_ids(name: str, rows: Sequence[Row]) -> bool:
    """Return whether each row has a value of its own in the column, which is text or a whole number."""
    values = [row.values.get(name) for row in rows]
    are_plain = all(isinstance(value, str | int) and not isinstance(value, bool) and value != "" for value in values)
    return are_plain and len({str(value).strip() for value in values}) == len(values)


def _explain_no_classes(default: str, columns: Sequence[Column], task: str) -> str:
    """Return the sentence on a file in which no column has classes, and the tasks that could read it."""
    names = name_all([column.name for column in columns])
    reason = f"no column {default!r}, and no other has a few values that repeat, as classes do; the columns are {names}"
    others = ["--data.label_column names one"]
    if task == "text-classification":
        others += ["text-regression learns numbers"] * any(column.kind == "number" for column in columns)
        others += ["masked-lm and causal-lm learn from texts without labels"]
    return f"{reason}: {', '.join(others)}"


def _check_header(column: Column, rows: Sequence[Row]) -> None:
    """Raise DataError where the name of a column of classes is one of its values: the first line is a row, then."""
    if column.is_class and any(row.values.get(column.name) == column.name for row in rows[:LOOKED_AT]):
        raise DataError(
            f"the first line of the file seems to be a row, since {quote(column.name)} stands in other rows too: put a "
            "line with the names of the columns before it, such as text,label"
        )


def describe_columns(rows: Sequence[Row]) -> list[Column]:
    """Return what is in each column of the first rows of a file, in the order of the file."""
    looked_at = rows[:LOOKED_AT]
    values: dict[str, list[Any]] = {}
    for row in looked_at:
        for name, value in _with_members(row.values):
            if value is not None and value != "":
                values.setdefault(name, []).append(value)
    return [_describe(name, place, found) for place, (name, found) in enumerate(values.items())]


def _with_members(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of each column, and of the members of objects by their dotted names."""
    for name, value in values.items():
        yield prefix + name, value
        if isinstance(value, dict):
            yield from _with_members(value, f"{prefix}{name}.")


def _last_part(name: str) -> str:
    """Return the end of a dotted name, in lower case."""
    return name.rpartition(".")[2].casefold()


def _describe(name: str, place: int, values: list[Any]) -> Column:
    texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
    kinds = {_kind_of(value) for value in values}
    kind = kinds.pop() if len(kinds) == 1 else "text" if kinds == {"number", "text"} else "mixed"
    lengths = [len(text) for text in texts]
    return Column(
        name,
        place,
        kind,
        distinct=_count_distinct(kind, values, texts),
        lengths=len(set(lengths)),
        mean=sum(lengths) / len(lengths),
        shortest=min(lengths),
        longest=max(lengths),
        images=sum(text.lower().endswith(tuple(SUFFIXES)) for text in texts),
        questions=sum(text.rstrip().endswith(("?", "？")) for text in texts),
        rows=len(values),
    )


def _count_distinct(kind: str, values: list[Any], texts: list[str]) -> int:
    """Return the number of different values; of lists, that of different items, since tags are fewer than words."""
    if kind == "words":
        return len({str(item) for value in values for item in value})
    return len(set(texts))


def _kind_of(value: Any) -> str:
    if isinstance(value, str):
        return "number" if _is_number(value) else "text"
    if isinstance(value, bool | int | float):
        return "number"
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
        return "objects"
    return "words" if isinstance(value, list) else "mixed"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
