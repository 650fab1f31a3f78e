"""The spelling of labels: which two are certainly one class, and which only look so."""

from __future__ import annotations

import re
import unicodedata

# BOM, zero-width space, word joiner, soft hyphen and direction marks: never what makes two names different.
INVISIBLE = "\ufeff\u200b\u2060\u00ad\u200e\u200f"
_AT_THE_ENDS = re.compile(rf"^[\s{INVISIBLE}]+|[\s{INVISIBLE}]+$")
_JOINERS = re.compile("[\u200c\u200d\ufe0e\ufe0f]")  # zero-width joiners and variants of emoji
_BETWEEN_LETTERS = re.compile(r"(?<=[^\W\d_])[\s_-]+(?=[^\W\d_])")


def label_name(value: object) -> str:
    """Return the name of a label: JSON's true, 1 and "1" are 'true', '1' and '1'; white space around it is left out."""
    name = as_text(value)
    return name.strip() if name.isascii() else _AT_THE_ENDS.sub("", name)


def canonical_label(value: object) -> str:
    """Return the form in which two spellings of one class are equal, used for comparisons only.

    Equal are: true, "True" and "TRUE"; 1, 1.0 and "1.00"; composed and decomposed characters (Unicode's NFC); names
    that differ in white space, in invisible characters, or in quotes around them.
    """
    name = "".join(character for character in label_name(value) if character not in INVISIBLE)
    name = " ".join(unicodedata.normalize("NFC", name).split())
    if len(name) > 2 and name[0] == name[-1] and name[0] in "\"'":
        name = name[1:-1].strip()
    if name.lower() in ("true", "false"):
        return name.lower()
    if re.fullmatch(r"-?[0-9]+\.0*", name):
        name = name.partition(".")[0]
    return "0" if name == "-0" else name


def is_number(name: str) -> bool:
    """Return whether a label is a number."""
    return re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?", canonical_label(name)) is not None


def similar_key(name: str) -> str:
    """Return the form in which labels that only look like one class are equal.

    Beside what canonical_label ignores, that is case, width (Unicode's NFKC), leading zeros of a number, and spaces,
    hyphens and underscores between letters.
    """
    folded = unicodedata.normalize("NFKC", _JOINERS.sub("", canonical_label(name))).casefold()
    if is_number(folded):
        return repr(float(folded))
    return _BETWEEN_LETTERS.sub("", unicodedata.normalize("NFC", folded))


def describe_difference(name: str, other: str) -> str:
    """Return a phrase on how two labels differ that look like one class."""
    name, other = canonical_label(name), canonical_label(other)
    if name == other:
        return "differ in white space, invisible characters or quotes only"
    if is_number(name) and is_number(other):
        return "are the same number"
    if name.casefold() == other.casefold():
        return "differ in case only"
    if unicodedata.normalize("NFKC", name) == unicodedata.normalize("NFKC", other):
        return "differ in the width or form of their characters only"
    return "differ in case, spaces, hyphens or the form of their characters only"


def as_text(value: object) -> str:
    """Return a value of a column as text; true and false as in JSON."""
    if isinstance(value, str):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value)


def quote_apart(name: str, other: str) -> str:
    """Return a name in quotes, with escapes where it would look like the other one."""
    looks_equal = unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", other)
    return ascii(name) if looks_equal else repr(name)
