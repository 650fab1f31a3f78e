"""How the tags of a file are written: B-PER, PER_B, b:per or a bare B; and what marks a word outside of entities.

The tags of a file, of the model and of its predictions stay as they are written; a `Notation` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

OUTSIDE = "O"
# The letter of a tag -> the place of the word in its entity: B first, I inner, E last, S only word.
ROLES = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S", "W": "S"}
# The letters of each scheme, in the order of the roles B, I, E, S; "" where it has none.
LETTERS = {
    "IOB2": ("B", "I", "", ""),
    "IOB1": ("B", "I", "", ""),
    "IOBES": ("B", "I", "E", "S"),
    "BMES": ("B", "M", "E", "S"),
    "BILOU": ("B", "I", "L", "U"),
    "BMEWO": ("B", "M", "E", "W"),
}
SEPARATORS = "-_:"
BARE_TYPE = "entity"  # the type of entities whose tags name none
# Other ways to write O, in lower case.
OUTSIDE_WORDS = {"o", "0", "_", "-", "out", "other", "others", "outside", "none", "null", "nil", "[o]"}
BESIDE = re.compile("(BB|EE|WW|MM)[-_:]")  # O in BMEWO+: before an entity, behind one, between two, far from any


@dataclass(frozen=True)
class Notation:
    """How the tags of a set are written."""

    separator: str = "-"  # between letter and type; "": the letter stands alone
    is_suffix: bool = False  # whether the letter follows the type, as in PER-B
    is_lower: bool = False  # whether the letter is lower case, as in b-per
    outside: str = OUTSIDE  # the tag of words outside of entities
    _known: dict[str, tuple[str, str]] = field(default_factory=dict, compare=False, repr=False)

    def split(self, tag: str) -> tuple[str, str]:
        """Return (letter, type): ("B", "PER") for B-PER, ("O", "") for O, and ("", tag) for a tag of no entity."""
        found = self._known.get(tag)
        if found is None:
            found = self._known[tag] = self._split(tag)
        return found

    def _split(self, tag: str) -> tuple[str, str]:
        if tag == self.outside:
            return OUTSIDE, ""
        letter, kind = tag, BARE_TYPE
        if self.separator:
            first, _, last = tag.rpartition(self.separator) if self.is_suffix else tag.partition(self.separator)
            letter, kind = (last, first) if self.is_suffix else (first, last)
        upper = letter.upper()
        if upper in ROLES and kind and (letter.lower() if self.is_lower else upper) == letter:
            return upper, kind
        return "", tag

    def join(self, letter: str, kind: str) -> str:
        """Return the tag of a letter and a type; letter O: the tag of a word outside."""
        if letter == OUTSIDE:
            return self.outside
        letter = letter.lower() if self.is_lower else letter
        if not self.separator:
            return letter
        return f"{kind}{self.separator}{letter}" if self.is_suffix else f"{letter}{self.separator}{kind}"


STANDARD = Notation()
WRITTEN = [
    Notation(separator, is_suffix, is_lower)
    for is_suffix in (False, True)
    for is_lower in (False, True)
    for separator in SEPARATORS
]
NOTATIONS = (*WRITTEN, Notation(""), Notation("", is_lower=True))


def find_notation(tags: Iterable[str]) -> Notation | None:
    """Return how these tags mark entities; None where they do not, so that each is a class of its own.

    - All tags but the one for words outside have a letter of one scheme. That one is O, or a single other word for it.
    - In the usual notation, with an O among the tags, a single letter is enough; in another one, half of the tags. So a
      misspelled tag is reported as an error, and does not turn all tags into plain classes.
    """
    return _find_notation(frozenset(tags))


@lru_cache(maxsize=64)  # evaluation asks for every batch
def _find_notation(names: frozenset[str]) -> Notation | None:
    counts = {notation: sum(bool(notation.split(tag)[0]) for tag in names - {OUTSIDE}) for notation in NOTATIONS}
    for notation in sorted(NOTATIONS, key=lambda notation: -counts[notation]):  # stable: the usual one first
        if not counts[notation]:
            break
        found = _with_outside(notation, names)
        if _is_certain(found, names):
            return found
    return None


def _with_outside(notation: Notation, names: frozenset[str]) -> Notation:
    """Return the notation with the word for O that these tags use."""
    others = [tag for tag in names - {OUTSIDE} if not notation.split(tag)[0]]
    if OUTSIDE in names or len(others) != 1 or others[0].lower() not in OUTSIDE_WORDS:
        return notation
    return Notation(notation.separator, notation.is_suffix, notation.is_lower, others[0])


def _is_certain(notation: Notation, names: frozenset[str]) -> bool:
    """Return whether tags that can be read in this notation are surely meant so."""
    letters = {notation.split(tag)[0] for tag in names} - {OUTSIDE, ""}
    roles = {ROLES[letter] for letter in letters}
    rest = [tag for tag in names if not notation.split(tag)[0]]
    has_outside = notation.outside in names
    is_usual = notation == STANDARD
    if rest:
        enough = (is_usual and letters & set("BIES")) or 2 * len(rest) <= len(names)
        return bool(has_outside and notation.separator and enough)
    is_scheme = any(letters <= set(scheme) for scheme in LETTERS.values())
    if not notation.separator:  # single letters are often names of something else
        return is_scheme and ("B" in roles or letters == {"I"}) and (has_outside or {"B", "E"} <= roles)
    if is_usual:
        return is_scheme or has_outside or letters <= set("BIES")
    return is_scheme and bool(roles & {"B", "I"}) and (has_outside or len(roles) > 1)


def nearest_tag(tag: str, notation: Notation, letters: Iterable[str], types: Iterable[str]) -> str:
    """Return the tag of `notation` that was surely meant by one that is none; "" where that is not sure.

    - O in other words, as o or 0, or as BMEWO+ writes it beside entities, as BB-PER;
    - a tag in another notation, as b-per or PER_B, whose letter and type the others have;
    - a type alone, which is read as I: a word of an entity.
    """
    known = {kind.casefold(): kind for kind in types}
    if tag.lower() in OUTSIDE_WORDS or BESIDE.match(tag):
        return notation.outside
    for other in WRITTEN:
        letter, kind = other.split(tag)
        if letter in ROLES and kind.casefold() in known:
            same_role = [own for own in letters if own and ROLES[own] == ROLES[letter]]
            return notation.join(same_role[0], known[kind.casefold()]) if same_role else ""
    inner = [own for own in letters if own and ROLES[own] == "I"]
    return notation.join(inner[0], known[tag.casefold()]) if tag.casefold() in known and inner else ""
