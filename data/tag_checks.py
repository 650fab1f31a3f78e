"""Checks of the tags of a file: by their scheme, repaired where the recipe says so; numbers as indices of labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from data.errors import DataError, ErrorList
from data.formats.word_lines import LINES
from data.label_spelling import similar_key
from data.label_warnings import warn_of_similar
from data.notes import count_of
from data.row import Row
from data.tag_notation import LETTERS, OUTSIDE, STANDARD, Notation, find_notation
from data.tag_schemes import (
    complete_tags,
    count_pairs,
    find_bad_pairs,
    find_entities,
    find_scheme,
    find_violations,
    is_ioe,
    nearest_known_tag,
    tag_entities,
)

SETTING = "token_classification.bad_tags"
REPAIR = f'; {SETTING} = "repair" changes such tags as conlleval reads them'
REPAIR_IOE = f'; the file may be IOE1 or IOE2: {SETTING} = "repair" changes their tags to IOBES'
NUMBER = re.compile("-?[0-9]+")
NO_SCHEME = "no entity scheme recognised, so each tag is a class of its own and F1 is by tag, not by entity"


def check_tags(
    name: str, rows: Sequence[Row], label: str, scheme: str, bad_tags: str, explain: bool, errors: ErrorList
) -> None:
    """Add to `errors` all tags that violate their scheme, or repair them; explain: say which scheme was found."""
    pairs = count_pairs(row.values[label] for row in rows)
    found = find_scheme(pairs, scheme)
    names = {tag for _, tag in pairs if tag}
    notation = find_notation(names)
    if explain:
        counts: Counter[str] = Counter()
        for (_, tag), count in pairs.items():
            counts.update({tag: count} if tag else {})
        errors.notes += warn_of_similar(counts, "tags")
    if explain and scheme == "auto":
        errors.notes += describe_scheme(names, found, notation)
    if found == "none":
        if explain and bad_tags == "repair":
            errors.notes.append(f"{SETTING} = repair has no effect: the tags have no scheme")
        return
    bad = find_bad_pairs(pairs, found)
    if not bad:
        return
    broken = [row for row in rows if any(pair in bad for pair in _pairs_of(row.values[label]))]
    if bad_tags == "repair":
        broken = _repair(broken, label, names, found, errors)
    is_offered = bad_tags == "repair"
    letters = {notation.split(tag)[0] for tag in names} if notation else set()
    offer = REPAIR_IOE if is_ioe(letters) else REPAIR
    for row in broken:
        for i, reason in find_violations(row.values[label], found, bad):
            hint = "" if is_offered or reason.endswith("of its own") else offer  # once is enough
            is_offered = is_offered or bool(hint)
            errors.add(name, find_line(row, i), word_prefix(row, i) + reason + hint, row=row.line)


def _pairs_of(tags: Sequence[str]) -> zip[tuple[str, str]]:
    return zip(("", *tags), (*tags, ""), strict=True)


def _repair(rows: Sequence[Row], label: str, names: set[str], scheme: str, errors: ErrorList) -> list[Row]:
    """Repair the tags of rows with bad ones, and note what was changed; return the rows with a tag of no meaning."""
    notation = find_notation(names) or STANDARD
    letters = {OUTSIDE, *LETTERS[scheme]} - {""}
    foreign = [tag for tag in names if notation.split(tag)[0] not in letters]
    readings = {tag: nearest_known_tag(tag, names, scheme) for tag in foreign}
    changes: Counter[tuple[str, str]] = Counter()
    first, hopeless = "", []
    for row in rows:
        tags = row.values[label]
        read = [readings.get(tag, tag) for tag in tags]
        if "" in read:
            hopeless.append(row)
            continue
        repaired = tag_entities(find_entities(read, notation), len(tags), scheme, notation)
        changed = [(old, new) for old, new in zip(tags, repaired, strict=True) if old != new]
        changes.update(changed)
        if changed and not first:
            i = next(i for i, (old, new) in enumerate(zip(tags, repaired, strict=True)) if old != new)
            first = f"line {find_line(row, i)}, {word_prefix(row, i)}{tags[i]!r} to {repaired[i]!r}"
        row.values = row.values | {label: repaired}
    if changes:
        kinds = ", ".join(f"{old!r} to {new!r} ({count:,})" for (old, new), count in changes.most_common(5))
        more = f" and {len(changes) - 5:,} more kinds" if len(changes) > 5 else ""
        what = f"{count_of(sum(changes.values()), 'tag')} repaired by {scheme} ({SETTING} = repair)"
        errors.notes.append(f"{what}, the first at {first}: {kinds}{more}")
    return hopeless


def describe_scheme(names: set[str], scheme: str, notation: Notation | None) -> list[str]:
    """Return a sentence on how the tags of the training file are read, unless it is the usual way."""
    if notation is None:
        numbers = all(map(NUMBER.fullmatch, names))
        hint = "; data.labels names the numbers in their order from 0" if numbers else ""
        return [f"{NO_SCHEME}{hint}; token_classification.tag_scheme = none says so"]
    if notation == STANDARD and scheme in ("IOB1", "IOB2", "IOBES"):
        return []
    shown = sorted(names)[:4]
    others = f", outside is {notation.outside!r}" if notation.outside != "O" and notation.outside in names else ""
    return [
        f"tags such as {', '.join(map(repr, shown))} are read as entities in {scheme}{others}; "
        "token_classification.tag_scheme = none takes each as a class of its own"
    ]


def name_numbers(name: str, rows: Sequence[Row], label: str, labels: Sequence[str], errors: ErrorList) -> None:
    """Replace tags that are numbers by data.labels, if no name among those is one of the tags."""
    names = {tag for row in rows for tag in row.values[label]}
    if not labels or not names or names & set(labels) or not all(map(NUMBER.fullmatch, names)):
        return
    outside = {tag for tag in names if not 0 <= int(tag) < len(labels)}
    for row in rows:
        bad = next((i for i, tag in enumerate(row.values[label]) if tag in outside), None)
        if bad is None:
            row.values = row.values | {label: [labels[int(tag)] for tag in row.values[label]]}
        else:
            tag = row.values[label][bad]
            reason = f"the tag {tag} is not an index of data.labels, which has {len(labels)} names"
            reason += "; it marks the further pieces of a word: give whole words" if tag == "-100" else ""
            errors.add(name, find_line(row, bad), word_prefix(row, bad) + reason, row=row.line)
    shown = ", ".join(f"{tag} is {labels[int(tag)]!r}" for tag in sorted(names - outside, key=int)[:3])
    errors.notes.append(f"the tags are numbers, read as indices of data.labels: {shown}")


def find_line(row: Row, index: int) -> int:
    """Return the line of a word; the line of its row where the words have none."""
    line: int = row.values[LINES][index] if LINES in row.values else row.line
    return line


def word_prefix(row: Row, index: int) -> str:
    """Return the number of a word for a message, where it has no line of its own."""
    return "" if LINES in row.values else f"word {index}: "


def find_tag_names(name: str, rows: Sequence[Row], label: str, declared: Sequence[str], scheme: str) -> list[str]:
    """Return the classes: those declared, else those found, completed by their scheme. DataError for fewer than two."""
    if declared:
        return list(declared)
    pairs = count_pairs(row.values[label] for row in rows)
    names = complete_tags({tag for _, tag in pairs if tag}, find_scheme(pairs, scheme))
    if len(names) < 2:
        raise DataError(f"{name}: all words have the tag {names[0]!r}; training needs two tags")
    return names


def check_tag_names(name: str, rows: Sequence[Row], label: str, labels: Sequence[str]) -> None:
    """Raise one DataError for all tags that are not among `labels`, each at its first place."""
    errors, known = ErrorList(), set(labels)
    first: dict[str, tuple[Row, int]] = {}
    counts: Counter[str] = Counter()
    for row in rows:
        if not known.issuperset(row.values[label]):
            for i, tag in enumerate(row.values[label]):
                if tag not in known:
                    first.setdefault(tag, (row, i))
                    counts[tag] += 1
    shown = ", ".join(map(repr, labels))
    for tag, (row, i) in first.items():
        near = next((other for other in labels if similar_key(other) == similar_key(tag)), "")
        hint = f"; {near!r}, perhaps" if near else ""
        hint = hint or ("; data.labels reads numbers as indices of its names" if NUMBER.fullmatch(tag) else "")
        many = f" at {counts[tag]:,} words" if counts[tag] > 1 else ""
        reason = f"{word_prefix(row, i)}unknown label {tag!r}{many}; the labels are {shown}{hint}"
        errors.add(name, find_line(row, i), reason)
    errors.raise_if_any()
