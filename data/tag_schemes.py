"""Tag schemes for entities (IOB1, IOB2, IOBES): detection, checks and conversion. All other tags are plain classes.

- IOB1 (Ramshaw & Marcus 1995): every word of an entity is I-TYPE. The first one is B-TYPE only where the entity before
  it has the same type and ends right there.
- IOB2 (Tjong Kim Sang & Veenstra 1999): the first word is always B-TYPE.
- IOBES: as IOB2, but the last word is E-TYPE, and an entity of one word is S-TYPE.

In all three a word outside of entities is O.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

OUTSIDE = "O"
PREFIXES = {"IOB1": "BI", "IOB2": "BI", "IOBES": "BIES"}
ENTITY_TAG = re.compile(r"([BIES])-(.+)", re.DOTALL)


def split_tag(tag: str) -> tuple[str, str]:
    """Return (prefix, type): ("B", "PER") for B-PER, ("O", "") for O, and ("", tag) for a tag of no entity."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    match = ENTITY_TAG.fullmatch(tag)
    return (match[1], match[2]) if match else ("", tag)


def are_entity_tags(tags: Iterable[str]) -> bool:
    """Return whether these tags mark entities.

    They do if all tags but O have a prefix. With an O among them, a single prefix is enough. So a misspelled tag is
    reported as an error, and does not turn all tags into plain classes.
    """
    names = set(tags)
    prefixes = {split_tag(tag)[0] for tag in names}
    return bool(prefixes & set("BIES")) and ("" not in prefixes or OUTSIDE in names)


def find_scheme(sentences: Sequence[Sequence[str]], setting: str = "auto") -> str:
    """Return IOB1, IOB2, IOBES or none; `setting` unless that is auto.

    IOB1 and IOB2 have the same tags. The scheme with fewer violations is chosen, and IOB2 if both have as many.
    """
    if setting != "auto":
        return setting
    names = {tag for tags in sentences for tag in tags}
    if not are_entity_tags(names):
        return "none"
    if any(split_tag(tag)[0] in ("E", "S") for tag in names):
        return "IOBES"
    violations = {scheme: sum(len(find_violations(tags, scheme)) for tags in sentences) for scheme in ("IOB2", "IOB1")}
    return min(violations, key=lambda scheme: violations[scheme])  # the first of equals


def find_violations(tags: Sequence[str], scheme: str) -> list[tuple[int, str]]:
    """Return (position, reason) of each tag that violates `scheme`."""
    found = []
    before, open_type = OUTSIDE, ""  # open_type: type of the entity of the tag before, if it may continue
    for i, tag in enumerate(tags):
        prefix, kind = split_tag(tag)
        if prefix not in (OUTSIDE, *PREFIXES[scheme]):
            allowed = ", ".join(f"{letter}-TYPE" for letter in PREFIXES[scheme])
            reason = f"{tag!r} is not a tag of {scheme}, whose tags are O, {allowed}"
            found.append((i, f"{reason}; token_classification.tag_scheme names another"))
            before, open_type = OUTSIDE, ""
            continue
        continues = bool(open_type) and kind == open_type
        if scheme == "IOB2" and prefix == "I" and not continues:
            found.append((i, f"{tag!r} after {before!r}: in IOB2 an entity begins with 'B-{kind}'"))
        elif scheme == "IOB1" and prefix == "B" and not continues:
            found.append((i, f"{tag!r} after {before!r}: in IOB1 it only separates two entities of one type"))
        elif scheme == "IOBES" and prefix in ("I", "E") and not continues:
            found.append((i, f"{tag!r} after {before!r}: in IOBES an entity begins with 'B-{kind}' or is 'S-{kind}'"))
        elif scheme == "IOBES" and open_type and prefix not in ("I", "E"):
            found.append((i, f"{tag!r} after {before!r}: in IOBES an entity ends with 'E-{open_type}'"))
        before, open_type = tag, kind if prefix in ("B", "I") else ""
    if scheme == "IOBES" and open_type:
        found.append((len(tags) - 1, f"{before!r} is the last tag: in IOBES an entity ends with 'E-{open_type}'"))
    return found


def complete_tags(tags: Iterable[str], scheme: str) -> list[str]:
    """Return the classes to learn, sorted: the tags, O, and all prefixes of each type, which other files may have.

    IOB1's B-TYPE is too rare to be expected, so only O is added there.
    """
    names = set(tags)
    if scheme != "none":
        names.add(OUTSIDE)
    if scheme in ("IOB2", "IOBES"):
        types = {kind for prefix, kind in map(split_tag, names) if prefix in PREFIXES[scheme]}
        names |= {f"{prefix}-{kind}" for prefix in PREFIXES[scheme] for kind in types}
    return sorted(names)


def tag_entities(entities: Sequence[tuple[int, int, str]], count: int, scheme: str = "IOB2") -> list[str]:
    """Return the tags of `count` words. entities: (first word, one after the last, type), sorted, without overlap."""
    tags = [OUTSIDE] * count
    for start, end, kind in entities:
        tags[start:end] = [f"I-{kind}"] * (end - start)
        if scheme == "IOB1":
            adjacent = start and split_tag(tags[start - 1])[1] == kind
            tags[start] = f"B-{kind}" if adjacent else f"I-{kind}"
        elif scheme == "IOBES" and end - start == 1:
            tags[start] = f"S-{kind}"
        else:
            tags[start] = f"B-{kind}"
            if scheme == "IOBES":
                tags[end - 1] = f"E-{kind}"
    return tags


def find_entities(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """Return (first word, one after the last, type) of each entity, by the rules of CoNLL's conlleval for all schemes.

    A word continues the entity of the word before if
    - its prefix is I or E,
    - the prefix of the word before is B or I, and
    - both have the same type.

    Every other word that is not O begins an entity. So tags that violate their scheme, as a model may predict them,
    mark entities too.
    """
    found: list[tuple[int, int, str]] = []
    open_type = ""
    for i, tag in enumerate(tags):
        prefix, kind = split_tag(tag)
        if prefix in ("I", "E") and open_type and kind == open_type:
            found[-1] = (found[-1][0], i + 1, kind)
        elif prefix and prefix != OUTSIDE:
            found.append((i, i + 1, kind))
        open_type = kind if prefix in ("B", "I") else ""
    return found
