"""English names, derived from capital letters: the film reviews of data/samples/movie_reviews in lower case.

    python -m benchmarks.prepare capitals

No package has English text with names tagged by hand; this data set is only a substitute. Capitalised words are tagged
NAME, and adjacent ones are one entity. The first word of a sentence and "I" are tagged O, since their capital carries
no information. In lower case, only its sentence tells whether "the rock" is a film star.

Output: names.jsonl with a sentence per line, {"id", "tokens", "tags"}. The reviews have the MIT licence (the sample's
LICENSE.txt).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from data import read_rows
from data.tag_schemes import tag_entities

REVIEWS = "package:data/samples/movie_reviews/reviews.tsv"
WORD = re.compile(r"\w+(?:[.'’-]\w+)*|[^\w\s]")
ENDS = (".", "!", "?", ":")  # the word after one of these has a capital anyway


def tag(text: str) -> tuple[list[str], list[str]]:
    """Return (lower-case words, their IOB2 tags)."""
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
