"""Spans that come with their own text: whether the text has it at that place, and if not, where.

Places count characters (code points) from 0, and the end is one after the last character. Other programs count
otherwise; the reason then says how.
"""

from __future__ import annotations

import unicodedata

MAX_SHOWN = 60  # characters of a text in a message


def check_span_text(text: str, start: int, end: int, own_text: str) -> str:
    """Return why text[start:end] is not `own_text`, with the true place and how it was counted; "" where it is.

    Case, white space and Unicode form do not count: exports write a line end as a space, or names in lower case.
    """
    found = text[start:end]
    if found == own_text or _fold(_unescape(found))[0] == _fold(_unescape(own_text))[0]:
        return ""
    what = f"the text has {_shorten(found)} at {start}-{end}, not {_shorten(own_text)}"
    return f"{what}; {explain_place(text, start, end, own_text)}"


def explain_place(text: str, start: int, end: int, own_text: str) -> str:
    """Return where `own_text` is instead, and how its place was counted if that can be told."""
    for first, last, why in _other_counts(text, start, end):
        if 0 <= first < last and text[first:last] == own_text:
            return f"that is at {first}-{last}: {why}"
    place = find_nearest(text, own_text, start)
    if place >= 0:
        return f"that is at {place}-{place + len(own_text)}, counted in characters from 0"
    first, last = find_alike(text, own_text)
    if last:
        return (
            f"at {first}-{last} it has {_shorten(text[first:last])}, which differs in case, white space or Unicode form"
        )
    return "that is nowhere in it"


def find_nearest(text: str, part: str, start: int) -> int:
    """Return the place of `part` in a text that is nearest to `start`; -1 where it is nowhere."""
    after = text.find(part, max(start, 0))
    before = text.rfind(part, 0, max(start, 0) + len(part))
    places = [place for place in (before, after) if place >= 0]
    return min(places, key=lambda place: abs(place - start), default=-1)


def find_alike(text: str, part: str) -> tuple[int, int]:
    """Return the place of `part` in a text without regard to case, white space, width and Unicode form; (0, 0): none.

    An accent may be a character of its own or one with its letter, and a full-width letter is that letter.
    """
    characters, places = _fold(text)
    wanted, _ = _fold(part)
    found = "".join(characters).find("".join(wanted)) if wanted else -1
    return (places[found], places[found + len(wanted) - 1] + 1) if found >= 0 else (0, 0)


def _fold(text: str) -> tuple[list[str], list[int]]:
    """Return the folded characters of a text, and the place in it of each."""
    folded = [
        (character, place)
        for place, original in enumerate(text)
        for character in unicodedata.normalize("NFKD", original.casefold())
        if not character.isspace()
    ]
    return [character for character, _ in folded], [place for _, place in folded]


def _other_counts(text: str, start: int, end: int) -> list[tuple[int, int, str]]:
    """Return (start, end, the difference) of a place that was counted in another way."""
    exclusive = "ends are exclusive, one after the last character"
    utf16 = "these count UTF-16 units, as JavaScript and Java do, where an emoji is 2; characters are to be counted"
    utf8 = "these count UTF-8 bytes; characters are to be counted"
    lines = "these count a line end as two characters (CR LF), the text has one"
    counted = [(start, end + 1, exclusive)]
    for count, why in ((from_utf16, utf16), (_count_bytes, utf8), (_count_line_ends, lines)):
        places = (count(text, start), count(text, end), count(text, end + 1))
        counted += [(places[0], places[1], why), (places[0], places[2], f"{why}, and {exclusive}")]
    counted += [(start - 1, end - 1, "these count from 1; the first character is 0")]
    counted += [(start - 1, end, "these count from 1 to the last character; it is from 0 to one after the last")]
    more = "one character more before it (a BOM or a space, perhaps) than was counted"
    return [*counted, (start + 1, end + 1, f"the text has {more}")]


def from_utf16(text: str, place: int) -> int:
    """Return the place in characters of a place in UTF-16 units."""
    return len(text.encode("utf-16-le", "surrogatepass")[: 2 * place].decode("utf-16-le", "ignore"))


def _count_bytes(text: str, place: int) -> int:
    return len(text.encode("utf-8", "surrogatepass")[:place].decode("utf-8", "ignore"))


def _count_line_ends(text: str, place: int) -> int:
    return len(text.replace("\n", "\r\n")[:place].replace("\r\n", "\n"))


def _unescape(text: str) -> str:
    return text.replace("\\n", "\n")


def _shorten(text: str) -> str:
    return repr(text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "...")
