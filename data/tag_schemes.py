"""Tag schemes for entities: detection, checks and conversion. All other tags are plain classes.

- IOB1 (Ramshaw & Marcus 1995): every word of an entity is I-TYPE. The first one is B-TYPE only where the entity before
  it has the same type and ends right there.
- IOB2 (Tjong Kim Sang & Veenstra 1999): the first word is always B-TYPE.
- IOBES: as IOB2, but the last word is E-TYPE, and an entity of one word is S-TYPE.
- BMES, BILOU and BMEWO: as IOBES, with other letters (M for I; L for E, U for S; M for I, W for S).

In all of them a word outside of entities is O. data/tag_notation.py reads B-TYPE, however it is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from data.tag_notation import LETTERS, OUTSIDE, ROLES, STANDARD, Notation, find_notation, nearest_tag

Pairs = Mapping[tuple[str, str], int]  # {(the tag before, a tag): count}; "" before the first and behind the last tag
Entity = tuple[int, int, str]  # (first word, one after the last, type)


def are_entity_tags(tags: Iterable[str]) -> bool:
    """Return whether these tags mark entities."""
    return find_notation(tags) is not None


def count_pairs(sentences: Iterable[Sequence[str]]) -> Counter[tuple[str, str]]:
    """Return how often each tag follows each other one; all that a scheme forbids is forbidden pairs."""
    counts: Counter[tuple[str, str]] = Counter()
    for tags in sentences:
        counts.update(zip(("", *tags), (*tags, ""), strict=True))
    return counts


def find_scheme(pairs: Pairs, setting: str = "auto") -> str:
    """Return the scheme with the fewest violations, the first of equals; none for tags of no entities.

    A tag that a scheme has not counts twice, since it hides what is wrong with the next one.
    setting: returned unless it is auto.
    """
    if setting != "auto":
        return setting
    notation = find_notation(tag for _, tag in pairs if tag)
    if notation is None:
        return "none"
    letters = {notation.split(tag)[0] for _, tag in pairs if tag} - {OUTSIDE, ""}
    if is_ioe(letters):
        return "IOBES"
    violations = dict.fromkeys(LETTERS, 0)
    for scheme in LETTERS:
        for pair, count in pairs.items():
            if fault := _find_fault(*pair, notation, scheme):
                violations[scheme] += 2 * count if fault == "foreign" else count
    return min(violations, key=lambda scheme: violations[scheme])


def is_ioe(letters: Collection[str]) -> bool:
    """Return whether tags with these letters may be IOE1 or IOE2, whose entities can be repaired to those of IOBES."""
    return "E" in letters and {"O", "I", "E", ""}.issuperset(letters)


def find_bad_pairs(pairs: Pairs, scheme: str) -> dict[tuple[str, str], str]:
    """Return {(the tag before, tag): reason} of the pairs that violate `scheme`."""
    names = {tag for _, tag in pairs if tag}
    notation = find_notation(names) or STANDARD
    faults = {pair: fault for pair in pairs if (fault := _find_fault(*pair, notation, scheme))}
    foreign = {tag: _describe_foreign(tag, names, notation, scheme) for (_, tag), f in faults.items() if f == "foreign"}
    return {
        (before, tag): foreign[tag] if fault == "foreign" else _describe_fault(before, tag, fault, notation, scheme)
        for (before, tag), fault in faults.items()
    }


def find_violations(
    tags: Sequence[str], scheme: str, bad_pairs: Mapping[tuple[str, str], str] | None = None
) -> list[tuple[int, str]]:
    """Return (position, reason) of each tag that violates `scheme`. bad_pairs: those of the whole file."""
    bad = find_bad_pairs(count_pairs([tags]), scheme) if bad_pairs is None else bad_pairs
    pairs = zip(("", *tags), (*tags, ""), strict=True)
    return [(min(i, len(tags) - 1), bad[pair]) for i, pair in enumerate(pairs) if pair in bad]


def _find_fault(before: str, tag: str, notation: Notation, scheme: str) -> str:
    """Return the fault of `tag` after the tag `before`: foreign, separates, continues or ends; "" for none."""
    first, inner, last, _ = LETTERS[scheme]
    letter, kind = notation.split(tag) if tag else (OUTSIDE, "")
    letter_before, kind_before = notation.split(before) if before else (OUTSIDE, "")
    known = (OUTSIDE, *LETTERS[scheme])
    if not letter or letter not in known:
        return "foreign"  # a tag that this scheme does not have
    if not letter_before or letter_before not in known:
        return ""  # the tag before is the fault
    is_open = letter_before in (first, inner)
    continues = is_open and kind == kind_before and letter != OUTSIDE
    if scheme == "IOB1":
        return "separates" if letter == first and not continues else ""
    if letter in (inner, last) and not continues:
        return "continues"
    return "ends" if last and is_open and letter not in (inner, last) else ""


def _describe_fault(before: str, tag: str, fault: str, notation: Notation, scheme: str) -> str:
    first, _, last, single = LETTERS[scheme]
    after = f"{tag!r} after {before!r}" if before else f"{tag!r} is the first tag"
    if fault == "separates":
        return f"{after}: in IOB1 it only separates two entities of one type"
    if fault == "continues":
        kind = notation.split(tag)[1]
        also = f" or is {notation.join(single, kind)!r}" if single else ""
        return f"{after}: in {scheme} an entity begins with {notation.join(first, kind)!r}{also}"
    end = notation.join(last, notation.split(before)[1])
    return f"{after if tag else f'{before!r} is the last tag'}: in {scheme} an entity ends with {end!r}"


def _describe_foreign(tag: str, names: set[str], notation: Notation, scheme: str) -> str:
    """Return the error of a tag that no scheme, or another one, has."""
    shown = [notation.join(OUTSIDE, ""), *(notation.join(letter, "TYPE") for letter in LETTERS[scheme] if letter)]
    meant = nearest_known_tag(tag, names, scheme)
    others = [other for other, letters in LETTERS.items() if notation.split(tag)[0] in (set(letters) - {""})]
    hint = f"; {meant!r}, perhaps" if meant not in ("", tag) else ""
    if not hint and others:
        hint = f"; a tag of {' or '.join(others)} (token_classification.tag_scheme)"
    elif not hint:
        hint = '; token_classification.tag_scheme = "none" takes each tag as a class of its own'
    return f"{tag!r} is not a tag of {scheme}, whose tags are {', '.join(shown)}{hint}"


def nearest_known_tag(tag: str, names: Iterable[str], scheme: str) -> str:
    """Return the tag that was surely meant by `tag`, one of `names` that the scheme has not; or "".

    A tag of another scheme stays as it is, since find_entities reads it.
    """
    notation = find_notation(names) or STANDARD
    if notation.split(tag)[0] in ROLES:
        return tag
    types = {kind for prefix, kind in map(notation.split, names) if prefix in ROLES}
    return nearest_tag(tag, notation, LETTERS[scheme], sorted(types))


def complete_tags(tags: Iterable[str], scheme: str) -> list[str]:
    """Return the classes to learn, sorted: the tags, O, and all letters of each type, which other files may have.

    IOB1's B-TYPE is too rare to be expected, so only O is added there.
    """
    names = set(tags)
    notation = find_notation(names)
    if notation is None or scheme == "none":
        return sorted(names)
    letters = set(LETTERS[scheme]) - {""}
    types = {kind for prefix, kind in map(notation.split, names) if prefix in letters}
    names |= {notation.join(letter, kind) for letter in letters for kind in types if scheme != "IOB1"}
    is_segmentation = not notation.separator and notation.outside not in names  # every word belongs to an entity
    return sorted(names if is_segmentation else names | {notation.outside})


def tag_entities(
    entities: Sequence[Entity], count: int, scheme: str = "IOB2", notation: Notation = STANDARD
) -> list[str]:
    """Return the tags of `count` words. entities: (first word, one after the last, type), sorted, without overlap."""
    tags = [notation.outside] * count
    first, inner, last, single = LETTERS[scheme]
    for start, end, kind in entities:
        tags[start:end] = [notation.join(inner, kind)] * (end - start)
        if scheme == "IOB1":
            adjacent = start and notation.split(tags[start - 1])[1] == kind
            tags[start] = notation.join(first if adjacent else inner, kind)
        elif last and end - start == 1:
            tags[start] = notation.join(single, kind)
        else:
            tags[start] = notation.join(first, kind)
            if last:
                tags[end - 1] = notation.join(last, kind)
    return tags


def find_entities(tags: Sequence[str], notation: Notation = STANDARD) -> list[Entity]:
    """Return (first word, one after the last, type) of each entity, by the rules of CoNLL's conlleval for all schemes.

    A word continues the entity of the word before if
    - it is an inner or last word by its letter (I or E in IOBES),
    - the word before is a first or inner one (B or I), and
    - both have the same type.

    Every other word that is not O begins an entity. So tags that violate their scheme, as a model may predict them,
    mark entities too.
    """
    found: list[Entity] = []
    open_type = ""
    for i, tag in enumerate(tags):
        letter, kind = notation.split(tag)
        role = ROLES.get(letter, "")
        if role in ("I", "E") and open_type and kind == open_type:
            found[-1] = (found[-1][0], i + 1, kind)
        elif role:
            found.append((i, i + 1, kind))
        open_type = kind if role in ("B", "I") else ""
    return found


def find_strict_entities(tags: Sequence[str], scheme: str, notation: Notation = STANDARD) -> list[Entity]:
    """Return the entities whose tags follow `scheme` from their first word to their last, as seqeval's strict mode.

    - IOB1 has no wrong sequence of tags but a B that separates nothing, which begins no entity.
    - In IOB2 an entity begins with B. In the others it also ends with E, or is S. All else marks nothing.
    """
    found: list[Entity] = []
    start, open_type, role_before = -1, "", ""  # start: of the entity that may still become one
    for i, tag in enumerate((*tags, notation.outside)):
        letter, kind = notation.split(tag)
        role = ROLES.get(letter, "")
        continues = start >= 0 and role in ("I", "E") and kind == open_type and role_before in ("B", "I")
        separates = scheme == "IOB1" and role == role_before == "B" and kind != open_type  # which seqeval does not read
        if start >= 0 and not continues and _may_end(role_before, scheme) and not separates:
            found.append((start, i, open_type))
        if not continues:
            start = i if _may_begin(role, kind, role_before, open_type, scheme) else -1
        open_type, role_before = kind, role
    return found


def _may_begin(role: str, kind: str, role_before: str, kind_before: str, scheme: str) -> bool:
    if scheme == "IOB1":
        return role == "I" or (role == "B" and role_before in ("B", "I") and kind == kind_before)
    return role == "B" or (role == "S" and scheme != "IOB2")


def _may_end(role_before: str, scheme: str) -> bool:
    return scheme in ("IOB1", "IOB2") or role_before in ("E", "S")
