"""ROUGE (Lin 2004): how much of a reference summary a written one has, in words, pairs of words and their order.

The scores are those of the package rouge-score with its default tokeniser and no stemming, which takes runs of a-z and
0-9 in lower case for words and everything else for space. Of Chinese that would leave nothing, so here every Chinese
character is a token of its own, and so is every Japanese kana and Korean syllable; a text without any of them has
exactly rouge-score's tokens. In other scripts (Cyrillic, Arabic) a text has none, here as there, and scores 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# Kana, Chinese characters and their extensions, Korean syllables.
ALONE = (
    "\u3005\u3007\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7a3\U00020000-\U000323af"
)
TOKEN = re.compile(f"[a-z0-9]+|[{ALONE}]")


def tokenize(text: str) -> list[str]:
    """Words in lower case; characters where the script has no spaces."""
    return TOKEN.findall(text.lower())


def rouge(written: str, reference: str) -> dict[str, float]:
    """F1 of each of NAMES, in [0, 1]; 0 where either text has nothing to compare.

    rouge1, rouge2: n-grams, each matched as often as both have it. rougeL: the longest common subsequence. rougeLsum:
    the same by sentences, which stand on lines of their own (union_hits).
    """
    ours, theirs = tokenize(written), tokenize(reference)
    sentences = [[tokenize(line) for line in text.split("\n")] for text in (written, reference)]
    return {
        "rouge1": ngram_f1(ours, theirs, 1),
        "rouge2": ngram_f1(ours, theirs, 2),
        "rougeL": f1(lcs_table(theirs, ours)[-1][-1], len(ours), len(theirs)),
        "rougeLsum": f1(union_hits(*sentences), len(ours), len(theirs)),
    }


def f1(hits: int, written: int, reference: int) -> float:
    """The harmonic mean of hits / written and hits / reference; 0 for no hits."""
    return 2 * hits / (written + reference) if hits else 0.0


def ngram_f1(written: Sequence[str], reference: Sequence[str], n: int) -> float:
    """F1 of the runs of n tokens that both texts have, each as often as it is in both (ROUGE-n)."""
    ours, theirs = (Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for tokens in (written, reference))
    return f1((ours & theirs).total(), ours.total(), theirs.total())


def lcs_table(a: Sequence[str], b: Sequence[str]) -> list[list[int]]:
    """(len(a) + 1) x (len(b) + 1): how long the longest common subsequence of a[:i] and b[:j] is."""
    table = [[0] * (len(b) + 1)]
    for token in a:
        above, row = table[-1], [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if token == other else max(above[j + 1], row[j]))
        table.append(row)
    return table


def lcs_places(a: Sequence[str], b: Sequence[str]) -> set[int]:
    """The places in `a` of a longest common subsequence with `b`: of several the one that rouge-score takes."""
    table, i, j, places = lcs_table(a, b), len(a), len(b), set()
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            places.add(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places


def union_hits(written: Sequence[Sequence[str]], reference: Sequence[Sequence[str]]) -> int:
    """Lin 2004, 3.2: of each sentence of the reference the tokens in its common subsequence with any written sentence.

    A token counts no more often than either text has it, as in ROUGE 1.5.5.
    """
    left, hits = Counter(token for sentence in written for token in sentence), 0
    for sentence in reference:
        for place in sorted(set().union(*(lcs_places(sentence, other) for other in written))):
            if left[sentence[place]]:
                left[sentence[place]] -= 1
                hits += 1
    return hits
