"""Files with a word a line, its tag in another column, and an empty line after each sentence: CoNLL, CoNLL-U."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import DataError, ErrorList
from data.formats.lines import TextFile
from data.formats.options import FileOptions
from data.notes import count_of
from data.tag_notation import OUTSIDE, ROLES, STANDARD, find_notation

CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
HEADERS = (  # names of the first and of the last column, without case
    re.compile("(word|token|form|text|char)s?"),
    re.compile("([a-z]+[ _-]?)?(tag|label)s?|ner|pos|upos|xpos|chunk|entity|bio|iob2?"),
)
WIDE_SPACES = re.compile("[ \u00a0\u3000]+")
NUMBER = re.compile(r"[0-9]+([-.][0-9]+)?")
COMMENT = re.compile(r"#\s*[\w.:-]+\s+=\s")  # CoNLL-U's form: # sent_id = 1
SKIPPED = {  # kind of line: (noun, what became of it)
    "comment": ("comment", "(#) left out"),
    "range": ("range", "of words (as 1-2) left out, whose words are read one by one"),
    "empty node": ("empty node", "(as 1.1) left out"),
    "header": ("line", "with the names of the columns left out"),
    "wide space": ("line", "with a wide space (U+3000 or U+00A0) between word and tag"),
}
SAMPLED = 1000  # words whose columns are compared
LONG = 400  # words; a longer sentence is probably several
PEEKED = 1000  # most lines before the first word
Head = list[tuple[int, str | None]]  # (number, line; None: it cannot be read)


@dataclass
class Sentence:
    """The words of a sentence, their tags and lines. line: its first one, by which its row is known."""

    line: int = 0
    words: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Columns:
    """Which columns of the lines are read."""

    count: int
    word: int = 0
    tag: int = -1
    is_conllu: bool = False
    has_header: bool = False
    has_tabs: bool = False
    is_chosen: bool = False  # whether a setting says which column has the words
    is_label_chosen: bool = False  # and which one the tags
    note: str = ""


def read_conll(
    path: Path, text: str, label: str, labelled: bool, errors: ErrorList, options: FileOptions
) -> Iterator[Sentence]:
    """Yield sentences; one with a bad line too, whose error is that of the sentence.

    - The first column is the word and the last one its tag, unless `text` and `label`, the settings, are numbers of
      columns (from 1; from the end if negative), or names of columns of CoNLL-U or of the first line.
    - Columns are separated by tabs if the line has one, else by spaces. Every line has as many columns as the first.
    - `#` lines before a sentence are comments if they have another number of columns, or are written as in CoNLL-U.
    - -DOCSTART- lines are skipped; in CoNLL-U also ranges of words (1-2) and empty nodes (1.1).
    """
    lines = TextFile(path, options).lines(errors)
    head = list(itertools.islice(_until_first_word(lines), PEEKED))
    columns = _choose_columns(path, head, text, label)
    report, sentence = Report(), Sentence()
    header_line = head[-1][0] if columns.has_header else 0
    for number, line in itertools.chain(head, lines, [(0, "")]):  # the last sentence needs an end too
        if line is None:  # it cannot be read, and its sentence not either
            sentence.line = sentence.line or number
            errors.assign(number, sentence.line)
        elif number and (kind := "header" if number == header_line else _kind_to_skip(line, columns, sentence)):
            report.skip(kind, number)
        elif not line.strip() or line.startswith("-DOCSTART-"):
            if sentence.line:
                report.end(sentence)
                yield sentence
            sentence = Sentence()
        else:
            sentence.line = sentence.line or number
            fields = split_columns(line)
            if reason := _find_fault(line, fields, columns, labelled):
                errors.add(path, number, reason, row=sentence.line, of_file=columns.count < 2)
                if columns.count < 2:
                    return  # all lines have this fault
                continue
            word = fields[columns.word]
            if len(report.sample) < SAMPLED:
                report.sample.append(fields)
            report.only_numbers = report.only_numbers and NUMBER.fullmatch(word) is not None
            sentence.words.append(word)
            sentence.tags.append(fields[columns.tag].strip())
            sentence.lines.append(number)
            if columns.count > 1 and "\t" not in line and " " not in line.strip(" "):
                report.skip("wide space", number)
    has_bad_lines = errors and options.bad_rows != "skip"  # they come first
    if not has_bad_lines and (reason := _find_wrong_columns(report, columns, head, labelled)):
        errors.add(path, report.longest.line, reason, of_file=True)
    errors.notes += [*([columns.note] if columns.note else []), *report.notes()]


@dataclass
class Report:
    """The lines of a file that are no words, and its longest sentence, for its notes."""

    counts: Counter[str] = field(default_factory=Counter)  # {kind of line: how many}
    first: dict[str, int] = field(default_factory=dict)  # {kind of line: the first}
    longest: Sentence = field(default_factory=Sentence)
    num_words: int = 0
    only_numbers: bool = True  # whether all words are numbers
    sample: list[list[str]] = field(default_factory=list)  # the columns of the first words

    def skip(self, kind: str, number: int) -> None:
        """Count a line of this kind."""
        self.counts[kind] += 1
        self.first.setdefault(kind, number)

    def end(self, sentence: Sentence) -> None:
        """Count the words of a sentence."""
        self.num_words += len(sentence.words)
        if len(sentence.words) > len(self.longest.words):
            self.longest = sentence

    def notes(self) -> list[str]:
        """Return a sentence for each kind of line that is no word, and for a sentence that is very long."""
        notes = [
            f"{count_of(self.counts[kind], noun)} {what}, the first at line {self.first[kind]}"
            for kind, (noun, what) in SKIPPED.items()
            if self.counts[kind]
        ]
        if len(self.longest.words) > LONG:
            many = f"{len(self.longest.words):,} words in one sentence, from line {self.longest.line}"
            notes.append(f"{many}; sentences end at an empty line")
        return notes


def split_columns(line: str) -> list[str]:
    """Return the columns of a line, between tabs if it has one, else between spaces, wide ones if it has no other."""
    if "\t" in line:
        return line.split("\t")
    fields = re.split(" +", line.strip(" "))
    return fields if len(fields) > 1 else WIDE_SPACES.split(line.strip(" \u00a0\u3000"))


def _until_first_word(lines: Iterator[tuple[int, str | None]]) -> Iterator[tuple[int, str | None]]:
    """Yield the lines up to the first that is a word for sure."""
    for number, line in lines:
        yield number, line
        if line and line.strip() and not line.startswith(("#", "-DOCSTART-")):
            return


def _kind_to_skip(line: str, columns: Columns, sentence: Sentence) -> str:
    """Return the kind of a line that is no word and no end of a sentence; "" for others."""
    if line[:1] == "#" and (columns.is_conllu or not sentence.words):
        is_word = len(split_columns(line)) == columns.count and ("\t" in line) >= columns.has_tabs
        is_word = is_word and not columns.is_conllu and not COMMENT.match(line)
        return "" if is_word else "comment"
    if columns.is_conllu and (match := NUMBER.match(line)) and match[1]:
        return "range" if match[1][0] == "-" else "empty node"
    return ""


def _find_fault(line: str, fields: list[str], columns: Columns, labelled: bool) -> str:
    """Return why a line is no word with its tag; "" for a good one."""
    if len(fields) != columns.count:
        hint = "; a comment (#) stands before a sentence" if line[0] == "#" else ""
        hint = "; if the word is a space, the file needs tabs" if line[0] == " " else hint
        return f"{len(fields)} columns, the lines before have {columns.count}{hint}"
    if labelled and columns.count < 2:
        return f"no tag: {line!r} is one column; a word and its tag are needed, between a tab or spaces"
    if not fields[columns.word]:
        return "the word is empty"
    if labelled and not fields[columns.tag].strip():
        hint = (
            "if all lines end with a tab, data.label_column = '-2' reads the tag before; " if line[-1] == "\t" else ""
        )
        return f"the tag is empty; {hint}a word outside of entities has the tag O"
    return ""


def _choose_columns(path: Path, head: Head, text: str, label: str) -> Columns:
    """Return the columns that the settings choose, else those of the kind of file. head: its first lines."""
    first = _first_word(head)
    fields = split_columns(first)
    count, comments = len(fields), [line for _, line in head if line and line.startswith("#")]
    plus = next((line.split("=")[1].lower().split() for line in comments if "global.columns" in line), [])
    is_conllu = bool(plus) or (count == 10 and NUMBER.fullmatch(fields[0]) is not None and "\t" in first)
    has_header = count > 1 and all(
        known.fullmatch(name.strip().lower()) for name, known in zip((fields[0], fields[-1]), HEADERS, strict=True)
    )
    names = plus or list(CONLLU if is_conllu else map(str.strip, fields) if has_header else ())
    word, tag = (
        _find_column(path, setting, value, names, count) for setting, value in (("text", text), ("label", label))
    )
    is_chosen, note, default = word is not None, "", (0, count - 1)
    if is_conllu and "form" in names:
        default = (names.index("form"), names.index("upos") if "upos" in names else count - 1)
        if tag is None:
            others = ", ".join(name for name in names if name not in ("id", "form"))
            note = f"CoNLL-U: the tags are the column upos; data.label_column = NAME reads another of {others}"
    elif word is None and tag is None and _is_germeval(fields, bool(comments)):
        default = (1, 2)
        note = (
            "GermEval: the tags are those of outer entities (column 3); data.label_column = '-1' reads the inner ones"
        )
    return Columns(
        count,
        default[0] if word is None else word,
        default[1] if tag is None else tag,
        is_conllu,
        has_header,
        "\t" in first,
        is_chosen or default[0] > 0,
        tag is not None or is_conllu,
        note,
    )


def _first_word(head: Head) -> str:
    """Return the line of the first word, which is the last line of the head; "" for a file without words."""
    lines = [line for _, line in head if line and line.strip() and not line.startswith("-DOCSTART-")]
    return next((line for line in reversed(lines) if not line.startswith("#")), lines[0] if lines else "")


def _find_column(path: Path, setting: str, value: str, names: list[str], count: int) -> int | None:
    """Return the position of the column that a setting names; None where it names none."""
    if re.fullmatch("-?[1-9][0-9]*", value):
        place = int(value)
        if count and abs(place) > count:
            raise DataError(f"{path}: data.{setting}_column = {value!r}, but the lines have {count} columns")
        return place - 1 if place > 0 else count + place
    if value.lower() in names or value in names:
        return names.index(value.lower() if value.lower() in names else value)
    if value.lower() in CONLLU and count:
        raise DataError(
            f"{path}: data.{setting}_column = {value!r} is a column of CoNLL-U, but the lines have {count} columns; "
            f"{value!r} may be the number of a column, from 1"
        )
    return None


def _is_germeval(fields: list[str], has_comment: bool) -> bool:
    """Return whether a first line is that of GermEval 2014: number, word, tag and inner tag, below a comment."""
    tags = [tag == OUTSIDE or STANDARD.split(tag)[0] in ROLES for tag in fields[2:]]
    return has_comment and len(fields) == 4 and fields[0] == "1" and all(tags)


def _find_wrong_columns(report: Report, columns: Columns, head: Head, labelled: bool) -> str:
    """Return why the columns that were read are probably not the words and the tags; "" where they may be."""
    if columns.count < 2:
        return ""
    if report.only_numbers and report.num_words > 1 and not columns.is_chosen:
        return _describe_numbers(columns, head)
    return _find_other_tags(report.sample, columns) if labelled else ""


def _find_other_tags(sample: list[list[str]], columns: Columns) -> str:
    """Return why the last column is probably not the tags: another one has entity tags, and it has none; else ""."""
    if columns.is_label_chosen or _are_mostly_entities(sample, columns.tag):
        return ""
    others = [i for i in range(columns.count) if i != columns.tag and _are_mostly_entities(sample, i)]
    if not others:
        return ""
    word = next(i for i in (0, columns.tag) if i != others[0])
    found = f"column {others[0] + 1} has entity tags, {sample[0][others[0]]!r} ..., and the last one has none"
    return (
        f"{found}, {sample[0][columns.tag]!r} ...: data.text_column = '{word + 1}' and data.label_column = "
        f"'{others[0] + 1}' read it; data.label_column = '-1' the last one"
    )


def _are_mostly_entities(sample: list[list[str]], column: int) -> bool:
    """Return whether nearly all that a column has are tags of entities, or O."""
    names = {fields[column].strip() for fields in sample}
    notation = find_notation(names)
    known = [name for name in names if notation and notation.split(name)[0]]
    return notation is not None and bool(notation.separator) and 10 * len(known) >= 9 * len(names)


def _describe_numbers(columns: Columns, head: Head) -> str:
    fields = split_columns(_first_word(head))
    what = (
        f"the column of the words, the first of {columns.count}, has only numbers, as CoNLL-U and GermEval count words"
    )
    if columns.count < 3:
        return f"{what}; data.text_column = '1' reads them as words all the same"
    return (
        f"{what}; data.text_column = '2' reads the words {fields[1]!r} ..., and data.label_column = '3' the tags "
        f"{fields[2]!r} ... (any column by its number, negative from the end)"
    )
