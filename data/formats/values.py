"""Conversion of other values to those of JSON: dates, decimals, bytes, NumPy's."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np

from data.formats.image_kinds import HEAD, is_image_start, unread_kind

MAX_TEXT = 1_000_000  # characters of a value, as many as of a line in text files


def to_json_value(value: Any) -> Any:
    """Return a value as it would be in JSON; one without such a form, such as an image or unreadable bytes, as it is.

    NumPy's numbers and small arrays, and tuples, become Python's numbers and lists; NaN becomes None. Decimals are
    numbers, dates and times are ISO 8601, and bytes that are UTF-8 are text.
    """
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim < 2):
        value = value.tolist()
        kind = type(value)
    if kind is tuple or kind is list:  # a NamedTuple is a value that a reader made
        return [to_json_value(item) for item in value]
    if isinstance(value, Mapping):
        is_image = value.keys() == {"bytes", "path"}  # as Hugging Face's datasets hold one
        return dict(value) if is_image else {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, Decimal):
        return None if value.is_nan() else int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat() if value == value else None  # pandas' missing time is not equal to itself
    if isinstance(value, datetime.timedelta | UUID):
        return str(value)
    if isinstance(value, bytes) and not is_image_content(value):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value


def unreadable_reason(values: dict[str, Any], required: tuple[str, ...] = ()) -> str:
    """Return why a text file cannot have this row; "" where it can. Bytes are checked in the `required` columns."""
    for column, value in values.items():
        if isinstance(value, str):
            if "\0" in value:
                return f"a NUL character in {column!r}"
            if len(value) > MAX_TEXT:
                return f"{len(value):,} characters in {column!r}; at most {MAX_TEXT:,} are read"
        elif isinstance(value, bytes) and column in required and not is_image_content(value):
            return f"{column!r} has bytes that are neither UTF-8 ({value[:20]!r}) nor an image"
    return ""


def is_image_content(content: bytes) -> bool:
    """Return whether bytes are an image by how they start, of a kind that is read or of another one."""
    head = content[:HEAD]
    return is_image_start(head) or bool(unread_kind(head))
