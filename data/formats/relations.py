"""Rows of relations as public data sets write them -> rows with a text, a subject and an object.

- TACRED: "token", with "subj_start", "subj_end" (the last token, inclusive), "subj_type" and so on.
- OpenNRE and FewRel: "h" and "t", each with its "name" and "pos", in characters of "text" or in tokens.
- SemEval-2010 task 8: marks in the text, as <e1>...</e1> and <e2>...</e2>, in rows or in its own .txt.
- KLUE: "subject_entity" and "object_entity", with "word", "start_idx" and "end_idx" (inclusive).
- Two columns of other names, as "head" and "tail".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from data.errors import DataError, ErrorList
from data.formats.lines import clean_lines, locate, read_first_line, suffix_of
from data.formats.memory import is_in_memory
from data.formats.options import FileOptions
from data.row import Row

SENTENCE = "sentence"  # another name of the text column, used in files of triples
SEMEVAL = re.compile(r'(\d+)\t"?(.*?)"?\s*')
TACRED = ("subj_start", "subj_end", "obj_start", "obj_end")
PAIRS = (
    ("h", "t"),
    ("head", "tail"),
    ("subject_entity", "object_entity"),
    ("subj", "obj"),
    ("e1", "e2"),
    ("entity1", "entity2"),
    ("entity_1", "entity_2"),
)
MARKS = (("e1", "e2"), ("subj", "obj"), ("subject", "object"), ("head", "tail"))
COLUMNS = (
    *(SENTENCE, "token", "tokens", "subject", "object", "subject_type", "object_type"),
    *(*TACRED, "subj_type", "obj_type"),
    *(f"{column}{end}" for pair in PAIRS for column in pair for end in ("", "_type")),
)
MANY = {"relations", "triples", "triple_list", "spo_list", "relation_list", "relationMentions", "labels"}
HINT = (
    "read are columns 'subject' and 'object', 'head' and 'tail' or 'h' and 't'; TACRED's 'subj_start' and so on; "
    "and texts with <e1>...</e1> and <e2>...</e2>"
)


def hint_at_pairs(columns: Sequence[str]) -> str:
    """Return the hint for a file without a column of relations, if its rows have several relations."""
    if MANY & {column.partition(".")[0] for column in columns}:
        return f"a row has one pair of entities and their relation, so that a text with several is several rows; {HINT}"
    return ""


def read_other_form(values: dict[str, Any], text: str) -> str:
    """Change a row of another form into one with the columns `text`, subject and object, in place.

    Return what the row was read as; "" for a row that has a subject and an object, or is of no known form.
    Raises DataError, with the reason alone, for a row of a known form that has an error.
    """
    if text not in values and isinstance(values.get(SENTENCE), str):
        values[text] = values[SENTENCE]
    if "subject" in values and "object" in values:
        return ""
    tokens: Any = values.get("token", values.get("tokens"))
    if set(TACRED) <= values.keys() and _are_words(tokens):
        starts = _join_tokens(values, text, tokens)
        for role, key in (("subject", "subj"), ("object", "obj")):
            first, last = values[f"{key}_start"], values[f"{key}_end"]
            values[role] = _token_span(starts, tokens, first, last, f"{key}_start", f"{key}_end")
            values[role]["type"] = values.get(f"{key}_type") or ""
        return "TACRED's rows, whose ends are the last tokens of the entities"
    for pair in PAIRS:
        if set(pair) <= values.keys():
            places = _join_tokens(values, text, tokens) if text not in values and _are_words(tokens) else None
            for role, key in zip(("subject", "object"), pair, strict=True):
                values[role] = _read_entity(values[key], key, places, tokens)
                values.setdefault(f"{role}_type", values.get(f"{key}_type") or "")
            return f"rows with {pair[0]!r} as the subject and {pair[1]!r} as the object"
    return _read_marks(values, text)


def read_semeval(name: str, text: str, label: str, errors: ErrorList, options: FileOptions) -> list[Row]:
    """Return the rows of a file of SemEval-2010 task 8.

    It has blocks of lines: a number and a sentence, the relation, perhaps a comment, and an empty line.
    Rows of a file without relations lack `label`. A line that does not fit is added to `errors`.
    """
    rows: list[Row] = []
    for line, content in clean_lines(locate(name), errors, options):
        found = SEMEVAL.fullmatch(content)
        if found:
            rows.append(Row(found[1], line, {text: found[2]}))
        elif not content.strip() or content.startswith("Comment"):
            continue
        elif rows and label not in rows[-1].values:
            rows[-1].values[label] = content.strip()
        else:
            errors.add(locate(name), line, f"neither a number, a tab and a sentence, nor its relation: {content!r:.80}")
    return rows


def is_semeval(name: str, options: FileOptions) -> bool:
    """Return whether a .txt is one of SemEval-2010 task 8, by its first line."""
    path = locate(name)
    return (
        not is_in_memory(name)
        and options.format == "auto"
        and suffix_of(path) == ".txt"
        and bool(SEMEVAL.fullmatch(read_first_line(path, options)))
    )


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _join_tokens(values: dict[str, Any], text: str, tokens: list[str]) -> list[int]:
    """Put the tokens into the row as its text, with spaces between them; return where each begins."""
    starts = [0]
    for token in tokens:
        starts.append(starts[-1] + len(token) + 1)
    values[text] = " ".join(tokens)
    return starts[:-1]


def _token_span(starts: list[int], tokens: list[str], first: Any, last: Any, *names: str) -> dict[str, Any]:
    """Return the characters from token `first` to token `last`, which belongs to the span."""
    if type(first) is not int or type(last) is not int or not 0 <= first <= last < len(tokens):
        named = " and ".join(names)
        raise DataError(f"{named}, {first!r} and {last!r}, are not a span of the {len(tokens)} tokens")
    return {"start": starts[first], "end": starts[last] + len(tokens[last])}


def _read_entity(value: Any, key: str, starts: list[int] | None, tokens: Any) -> Any:
    """Return an entity as {"start", "end", "text", "type"}; a string as it is.

    starts: where each token begins in the text, for places that count tokens; None: places count characters.
    """
    if isinstance(value, list) and len(value) == 3 and isinstance(value[2], list):  # FewRel: name, id, [[tokens], ..]
        value = {"name": value[0], "pos": value[2]}
    if not isinstance(value, dict):
        return value
    place = value.get("pos")
    if place is None:
        inclusive = "end_idx" in value
        place = [value.get("start", value.get("start_idx")), value.get("end", value.get("end_idx"))]
        if inclusive and type(place[1]) is int:
            place[1] += 1
    elif isinstance(place, list) and place and all(isinstance(item, list) for item in place):
        if len(place) > 1 or not place[0]:
            raise DataError(f"{key!r} is in the text {len(place)} times: keep one of its places in 'pos'")
        place = [place[0][0], place[0][-1] + 1]
    if not isinstance(place, list) or len(place) != 2:
        raise DataError(f"{key!r} should have 'pos', a start and an end, not {value!r}")
    entity = {"start": place[0], "end": place[1], "type": value.get("type") or ""}
    name = next((value[name] for name in ("text", "word", "name") if isinstance(value.get(name), str)), None)
    if starts is not None:
        last = place[1] - 1 if type(place[1]) is int else None
        entity |= _token_span(starts, tokens, place[0], last, f"the start and the last token of {key!r}")
    if name is not None and starts is None:
        entity["text"] = name  # a name beside tokens may be of other case and spaces
    return entity


def _read_marks(values: dict[str, Any], text: str) -> str:
    """Take the marks around two entities out of the text; return what the row was read as, "" without marks."""
    marked = values.get(text)
    if not isinstance(marked, str):
        return ""
    for pair in MARKS:
        for left, right in ("<>", "[]"):
            found = [_find_mark(marked, f"{left}{name}{right}", f"{left}/{name}{right}") for name in pair]
            if None not in found:
                values[text], values["subject"], values["object"] = _strip_marks(marked, [f for f in found if f])
                return f"texts that mark the subject {left}{pair[0]}{right} and the object {left}{pair[1]}{right}"
    return ""


def _find_mark(text: str, opening: str, closing: str) -> re.Match[str] | None:
    """Return the match of the only pair of these marks; None for no pair or several."""
    found = list(re.finditer(f"({re.escape(opening)})(.*?)({re.escape(closing)})", text, re.IGNORECASE | re.DOTALL))
    return found[0] if len(found) == 1 else None


def _strip_marks(text: str, found: list[re.Match[str]]) -> tuple[str, dict[str, int], dict[str, int]]:
    """Return the text without the marks, and the characters of the two entities in it."""
    removed = sorted(match.span(group) for match in found for group in (1, 3))

    def place(position: int) -> int:
        return position - sum(end - start for start, end in removed if end <= position)

    plain, done = "", 0
    for start, end in removed:
        plain += text[done:start]
        done = end
    first, second = ({"start": place(m.start(2)), "end": place(m.end(2))} for m in found)
    return plain + text[done:], first, second
