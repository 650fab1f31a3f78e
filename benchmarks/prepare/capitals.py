"""Names in English, as capitals say: the film reviews of data/samples/movie_reviews in lower case.

    python -m benchmarks.prepare capitals

English with names tagged by hand is in no package, so this is a stand-in for it that needs no hands, and no more: words
that the authors wrote with a capital are NAME, and words next to each other one of them. The first word of a sentence
is O, whose capital says nothing, and so is "I". Read from lower case, "the rock" is a film star only in its sentence.
Written is names.jsonl: a sentence a line, {"id", "tokens", "tags"}. The reviews are MIT (the sample's LICENSE.txt).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from data import read_rows
from data.tag_schemes import tag_entities

REVIEWS = "package:data/samples/movie_reviews/reviews.tsv"
WORD = re.compile(r"\w+(?:[.'’-]\w+)*|[^\w\s]")
ENDS = (".", "!", "?", ":")  # after which a capital says nothing either


def tag(text: str) -> tuple[list[str], list[str]]:
    """(words in lower case, their tags in IOB2)."""
    words = WORD.findall(text)
    names: list[tuple[int, int, str]] = []
    for i, word in enumerate(words):
        first = i == 0 or words[i - 1] in ENDS or (i == 1 and not words[0][0].isalnum())
        if word[0].isupper() and not first and word.partition("'")[0] != "I":
            start = names.pop()[0] if names and names[-1][1] == i else i
            names.append((start, i + 1, "NAME"))
    return [word.lower() for word in words], tag_entities(names, len(words))


def prepare(folder: Path) -> None:
    """Write names.jsonl."""
    with (folder / "names.jsonl").open("w", encoding="utf-8") as stream:
        for row in read_rows(REVIEWS, ["text"]):
            tokens, tags = tag(row.values["text"])
            stream.write(json.dumps({"id": row.id, "tokens": tokens, "tags": tags}, ensure_ascii=False) + "\n")
