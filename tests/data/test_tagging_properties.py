"""Random sentences with random entities, in every scheme and notation: files, tags, spans and entities agree."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from data.formats.options import FileOptions
from data.tag_notation import LETTERS, NOTATIONS, Notation
from data.tag_schemes import (
    complete_tags,
    count_pairs,
    find_bad_pairs,
    find_entities,
    find_scheme,
    find_strict_entities,
    tag_entities,
)
from data.token_classification import read_tagged
from data.words import TEXT, locate_words

WORDS = ["Ann", "5km", "中国", "e\u0301", "😀", "x", "#", "O", "B-P", "1"]
TYPES = ["P", "ORG-X", "地点"]
FEW = settings(max_examples=25, derandomize=True, deadline=None, database=None)


@st.composite
def sentences(draw: st.DrawFn, types: list[str]) -> list[tuple[list[str], list[tuple[int, int, str]]]]:
    """(Words, entities of those) of some sentences, of which the first has an entity of each kind."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8))
        ends = sorted(draw(st.sets(st.integers(0, len(words)), max_size=6)))
        pairs = [(a, b, draw(st.sampled_from(types))) for a, b in pairwise(ends)]
        found.append((words, [entity for entity in pairs if draw(st.booleans())]))
    everything = [(0, 1, types[0]), (1, 4, types[0]), (4, 6, types[0])]
    return [(["a"] * 7, everything), *found]


@FEW
@given(st.data(), st.sampled_from(sorted(LETTERS)), st.sampled_from(NOTATIONS), st.sampled_from(["O", "0", "_"]))
def test_entities_survive_every_scheme_notation_and_file(data, scheme, written, outside):
    kinds = TYPES if written.separator else ["entity"]
    rows = data.draw(sentences(kinds))
    notation = Notation(written.separator, written.is_suffix, written.is_lower, outside)
    tags = [tag_entities(entities, len(words), scheme, notation) for words, entities in rows]
    found = find_scheme(count_pairs(tags))
    # Words without inner ones, or adjacent ones without any, fit more than one scheme.
    assert not find_bad_pairs(count_pairs(tags), found)
    for (_, entities), sentence in zip(rows, tags, strict=True):
        assert find_entities(sentence, notation) == find_strict_entities(sentence, scheme, notation) == entities
    assert {tag for sentence in tags for tag in sentence} <= set(complete_tags({t for s in tags for t in s}, found))
    with tempfile.TemporaryDirectory() as folder:
        lines = [
            "\n".join(f"{w}\t{t}" for w, t in zip(row[0], s, strict=True)) for row, s in zip(rows, tags, strict=True)
        ]
        (conll := Path(folder) / "x.conll").write_text("\n\n".join(lines), encoding="utf-8")
        (jsonl := Path(folder) / "x.jsonl").write_text(
            "\n".join(json.dumps({"tokens": w, "tags": t}) for (w, _), t in zip(rows, tags, strict=True))
        )
        for path in (conll, jsonl):
            read = read_tagged(str(path), "tokens", "tags")
            assert [row.id for row in read] == [str(i + 1) for i in range(len(rows))]
            assert [row.values["tokens"] for row in read] == [words for words, _ in rows]
            assert [row.values["tags"] for row in read] == tags


@FEW
@given(st.data(), st.sampled_from(["expand", "skip"]), st.integers(0, 3))
def test_gold_spans_equal_their_texts_and_counts_add_up(data, bad_spans, shift):
    """Spans of words, some of which cut words: each is kept with its text, expanded, left out, or an error."""
    rows = []
    for words, entities in data.draw(sentences(TYPES)):
        text = "  ".join(words)
        starts = [sum(len(word) + 2 for word in words[:i]) for i in range(len(words))]
        spans = [
            {"start": starts[a] + shift * (i % 2), "end": starts[b - 1] + len(words[b - 1]), "label": kind}
            for i, (a, b, kind) in enumerate(entities)
        ]
        spans = [span | {"text": text[span["start"] : span["end"]]} for span in spans if span["start"] < span["end"]]
        rows.append({"tokens": text, "tags": spans})
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
        strict = read_tagged(str(path), "tokens", "tags", options=FileOptions(bad_rows="skip"))
        read = read_tagged(str(path), "tokens", "tags", bad_spans=bad_spans)
    assert len(strict) + len(strict.left_out) == len(read) == len(rows)
    for found in (strict, read):
        for row in found:
            places = locate_words(row.values["tokens"])
            given_spans = [span for span in rows[int(row.id) - 1]["tags"] if span["text"].strip()]
            kept = find_entities(row.values["tags"])
            assert len(kept) <= len(given_spans)
            for first, last, kind in kept:
                start, end = places[first][0], places[last - 1][1]
                near = [s for s in given_spans if start <= s["start"] + 2 and s["end"] <= end and s["label"] == kind]
                assert near
                if found is strict:
                    assert row.values[TEXT][start:end] in {span["text"].strip() for span in near}
