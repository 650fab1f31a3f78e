"""Lists of labels that are written as text: by Python, NumPy, JSON, YAML or PostgreSQL, or with separators."""

from __future__ import annotations

import ast
import json
import re
import reprlib
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from data.errors import DataError
from data.label_spelling import canonical_label, label_name

SEPARATORS = re.compile("[,;\uff0c\uff1b\u3001]")  # comma and semicolon, also of full width, and the Chinese 、
ESCAPES = {r"\t": "\t", r"\n": "\n"}  # as a shell gives them
_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_BARE = r"""[^\s,'"\[\](){}](?:[^,'"\[\](){}]*[^\s,'"\[\](){}])?"""  # no quotes, commas or brackets
_QUOTED_ONLY = re.compile(rf"{_QUOTED}(?:(?:\s*,\s*|\s+){_QUOTED})*\s*,?", re.DOTALL)  # NumPy writes no commas
_ITEMS = re.compile(rf"(?:{_QUOTED}|{_BARE})(?:\s*,\s*(?:{_QUOTED}|{_BARE}))*\s*,?", re.DOTALL)
_NUMBERS = re.compile(r"[-+.\d]+(?:\s+[-+.\d]+)+")
_ARRAY = re.compile(r"(?:np\.|numpy\.)?array\((\[.*\])(?:,\s*dtype=[\w.'<>]+)?\)", re.DOTALL)
_ONES_AND_ZEROS = re.compile(r"[01](?:\s+[01])+")


def parse_list_text(text: str) -> list[Any] | dict[Any, Any] | None:
    """Return the list, or the dict, that a text is; None for a text that is neither.

    Read are ['a', 'b'], ["a"], ('a',), {'a', 'b'}, NumPy's ['a' 'b'] and array([1, 0]), [a, b], PostgreSQL's {a,b}, and
    {'a': 1, 'b': 0}. Parentheses around a name without quotes belong to the name.
    """
    text = text.strip()
    if text in ("set()", "frozenset()"):
        return []
    if array := _ARRAY.fullmatch(text):
        text = array[1]
    if len(text) < 2 or text[0] + text[-1] not in ("[]", "()", "{}"):
        return None
    inner = text[1:-1].strip()
    if not inner:
        return []
    if _QUOTED_ONLY.fullmatch(inner):  # before Python reads 'a' 'b' as one text
        return [_unquote(item) for item in re.findall(_QUOTED, inner, re.DOTALL)]
    read: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval)
    for function in read:
        try:
            value = function(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list | tuple | set):
            return list(value)
        if isinstance(value, dict):
            return value
    if text[0] == "(":
        return None
    if _NUMBERS.fullmatch(inner):
        return inner.split()
    if _ITEMS.fullmatch(inner):
        return [_unquote(item) for item in re.findall(f"{_QUOTED}|{_BARE}", inner, re.DOTALL)]
    return None


def _unquote(item: str) -> str:
    if item[0] not in "\"'":
        return item
    try:
        return str(ast.literal_eval(item))
    except (ValueError, SyntaxError):
        return item[1:-1]


def split_labels(value: Any, separator: str = "") -> list[str]:
    """Return the labels of a cell as they are written; one may occur twice, or be empty.

    value: a list; a dict of 0 and 1 by label; a number; or text with separators: with `separator`, or a comma or
    semicolon where that is "". The items of a list are split too, where `separator` is given. Raises DataError, with
    the reason alone, for any other value.
    """
    if isinstance(value, str):
        return _split_text(value, separator)
    if isinstance(value, dict):
        flags = {label: parse_flag(flag) for label, flag in value.items()}
        if not flags or None in flags.values():
            raise DataError(f"labels should be a list, or text with separators between them, not {value!r}")
        value = [label for label, flag in flags.items() if flag]
    elif isinstance(value, int | float | Decimal):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"labels should be a list, or text with separators between them, not {value!r}")
    for item in value:
        if not isinstance(item, str | int | float | Decimal) or item != item:
            raise DataError(f"a label should be text or a number, not {item!r}")
    if separator:
        return [label for item in value for label in _split_item(item, separator)]
    return [label_name(item) for item in value]


def _split_item(item: Any, separator: str) -> list[str]:
    return _split_text(item, separator) if isinstance(item, str) else [label_name(item)]


def _split_text(text: str, separator: str) -> list[str]:
    """Return the parts of a text; [] for an empty one. Zeros and ones with spaces between them are parts too."""
    text = text.strip() if separator.strip() else text.strip(" ")
    if not text.strip():
        return []
    if _ONES_AND_ZEROS.fullmatch(text):
        return text.split()
    if separator and not separator.strip(" "):
        return text.split()
    if not separator and text[0] in "[{":
        raise DataError(f"this begins like a list, and cannot be read as one: {reprlib.repr(text)}")
    parts = text.split(ESCAPES.get(separator, separator)) if separator else SEPARATORS.split(text)
    return [label_name(part) for part in parts]


def parse_flag(value: Any) -> bool | None:
    """Return whether a value is 1 or true; None for a value that is neither these nor 0 or false."""
    if not isinstance(value, str | int | float | Decimal):
        return None
    return {"1": True, "true": True, "0": False, "false": False}.get(canonical_label(value))
