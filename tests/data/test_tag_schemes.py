"""Schemes of tags: IOB1, IOB2, IOBES, and what breaks them."""

from __future__ import annotations

import random

import pytest

from data.tag_schemes import (
    are_entity_tags,
    complete_tags,
    count_pairs,
    find_entities,
    find_scheme,
    find_violations,
    tag_entities,
)

TYPES = ["PER", "LOC", "ORG-X"]  # a type may have a hyphen


def random_entities(length: int, rng: random.Random) -> list[tuple[int, int, str]]:
    found, start = [], 0
    while start < length:
        end = start + rng.randint(1, 3)
        if rng.random() < 0.6 and end <= length:
            found.append((start, end, rng.choice(TYPES)))
        start = end
    return found


# Schemes


@pytest.mark.parametrize("scheme", ["IOB1", "IOB2", "IOBES"])
def test_entities_survive_being_written_as_tags(scheme):
    rng = random.Random(scheme)
    for _ in range(300):
        length = rng.randint(1, 15)
        entities = random_entities(length, rng)
        tags = tag_entities(entities, length, scheme)
        assert find_entities(tags) == entities
        assert find_violations(tags, scheme) == []


@pytest.mark.parametrize("scheme", ["IOB1", "IOB2", "IOBES"])
def test_the_scheme_is_found(scheme):
    rng = random.Random(scheme)
    sentences = [tag_entities(random_entities(12, rng), 12, scheme) for _ in range(50)]
    assert find_scheme(count_pairs(sentences)) == scheme


@pytest.mark.parametrize(
    ("sentences", "scheme"),
    [
        ([["NN", "VB", "O"]], "none"),
        ([["O", "O"]], "none"),
        ([["B-PER", "NN"]], "none"),  # no O: tags of something else
        ([["O", "B-PER", "PER"]], "IOB2"),  # with an O a slip among entities, which is an error
        ([["I-PER", "O"]], "IOB1"),
        ([["B-PER", "O"]], "IOB2"),
        ([["B-PER", "O"], ["I-PER", "O"], ["B-LOC", "O"]], "IOB2"),  # that one tag breaks, and IOB1 two
        ([["S-PER", "O"]], "IOBES"),
        ([], "none"),
    ],
)
def test_the_scheme_of_few_tags(sentences, scheme):
    assert find_scheme(count_pairs(sentences)) == scheme
    assert find_scheme(count_pairs(sentences), "IOBES") == "IOBES"


@pytest.mark.parametrize(
    ("scheme", "tags", "places"),
    [
        ("IOB2", "O I-A", [1]),
        ("IOB2", "B-A I-B", [1]),
        ("IOB2", "B-A I-A I-A B-A", []),
        ("IOB2", "S-A A I-A", [0, 1]),
        ("IOB1", "O B-A", [1]),
        ("IOB1", "I-A B-A B-A I-A", []),
        ("IOB1", "I-A B-B", [1]),
        ("IOBES", "B-A O", [1]),
        ("IOBES", "B-A", [0]),
        ("IOBES", "B-A E-A S-A B-A I-A E-A", []),
        ("IOBES", "E-A O I-A", [0, 2, 2]),
        ("IOBES", "B-A E-B", [1]),
        ("IOBES", "S-A E-A", [1]),
    ],
)
def test_find_violations_are_found_where_they_are(scheme, tags, places):
    assert [place for place, _ in find_violations(tags.split(), scheme)] == places


@pytest.mark.parametrize(
    ("scheme", "found"),
    [
        ("none", ["A", "B-X"]),
        ("IOB1", ["B-X", "O"]),
        ("IOB2", ["B-X", "I-X", "O"]),
        ("IOBES", ["B-X", "E-X", "I-X", "O", "S-X"]),
    ],
)
def test_the_classes_are_completed(scheme, found):
    assert complete_tags(["A", "B-X"] if scheme == "none" else ["B-X"], scheme) == found


def test_what_marks_entities():
    assert are_entity_tags(["B-A", "I-A"])
    assert not are_entity_tags(["NN", "O"])
    assert not are_entity_tags([])


O, B, I = "O", "B-PER", "I-PER"  # noqa: E741
