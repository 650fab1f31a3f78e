"""Parts of the notes on data: one line each, with numbers and a few examples."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

WARN_FROM = 0.05  # share from which a note is a warning
SHOWN = 10  # most characters or words in a note
SHOWN_NAMES = 20  # most names in a note or message
SHOWN_IDS = 3
SHOWN_LENGTH = 40  # characters of a text or word in a note
# Characters that break a line, move the cursor, colour what follows, or turn the direction of writing.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def warn(count: int, total: int, note: str, from_share: float = WARN_FROM) -> str:
    """Return the note, as a warning if count / total is large."""
    return f"warning: {note}" if count >= from_share * total else note


def count_of(count: int, noun: str) -> str:
    """Return the count with its noun: 1 text, 2,000 texts, 2 micro-batches."""
    ending = "" if count == 1 else "es" if noun.endswith("ch") else "s"
    return f"{count:,} {noun}{ending}"


def percent(count: int, total: int) -> str:
    """Return the share with two digits: 31%, 3.1%, 0.031%; 100% is all."""
    share = count / max(total, 1)
    digits = 0 if share >= 0.0995 else 1 if share >= 0.00995 else 2 if share >= 0.000995 else 3
    rounded = f"{100 * share:.{digits}f}%"
    return "over 99%" if rounded == "100%" and count < total else rounded


def list_ids(ids: Sequence[str]) -> str:
    """Return "id 7" or "ids 7, 8, 9, ...", the first ids in brackets."""
    more = ", ..." if len(ids) > SHOWN_IDS else ""
    return f"(id{'' if len(ids) == 1 else 's'} {', '.join(ids[:SHOWN_IDS])}{more})"


def list_some(items: Sequence[str], most: int = SHOWN_NAMES, separator: str = ", ") -> str:
    """Return the first items, and how many more there are: "a, b, and 3 more"."""
    more = f"{separator}and {len(items) - most:,} more" if len(items) > most else ""
    return separator.join(items[:most]) + more


def quote(text: str) -> str:
    """Return a text or word in quotes, without its end if it is long."""
    return repr(_shorten(text))


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN_LENGTH else text[: SHOWN_LENGTH - 3] + "..."


def printable(text: str) -> str:
    """Return a text from the data with escapes, such as \\x1b, for the characters that a terminal would obey."""
    return CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def short_label(label: str) -> str:
    """Return a label for a table or a list on the screen: in one line, without its end if it is long."""
    return printable(_shorten(label))


def display_width(text: str) -> int:
    """Return the columns that a text takes on a terminal: two for a Chinese character, none for a separate accent."""
    if text.isascii():
        return len(text)
    marks = sum(unicodedata.category(character) in ("Mn", "Me", "Cf") for character in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(character) in "FW" for character in text)


def align_right(text: str, width: int) -> str:
    """Return a text with spaces before it, up to a width in columns of a terminal."""
    return " " * (width - display_width(text)) + text


def shorten_lines(text: str, longest: int) -> str:
    """Return the text, without the middle of each line that has more than `longest` characters."""
    keep = longest // 2
    lines = text.split("\n")
    return "\n".join(line if len(line) <= longest else f"{line[:keep]} ... {line[-keep:]}" for line in lines)


def join(parts: Sequence[str]) -> str:
    """Return "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
