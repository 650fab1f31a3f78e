"""ROUGE (Lin 2004): the overlap of a written summary with its reference, in words, pairs of words and their order.

The scores of ASCII texts are those of the package rouge-score with its default tokenizer and no stemming: words are
runs of a-z and 0-9 in lower case, everything else is space. It drops all other letters, so that a Russian text has no
words and `école` is `cole`. Here words are runs of letters and digits of any script, with their marks, and a character
is a word in scripts without spaces (Chinese, Japanese kana, Thai, Lao, Khmer, Burmese).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache

from data.scripts import ROUGE_CHARACTERS

ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
ASCII_WORD = re.compile("[a-z0-9]+")


def tokenize(text: str) -> list[str]:
    """Split a text into words in lower case, and into single characters where the script has no spaces."""
    if text.isascii():
        return ASCII_WORD.findall(text.lower())
    return _word_pattern().findall(unicodedata.normalize("NFC", text).lower())


@cache
def _word_pattern() -> re.Pattern[str]:
    """Return the pattern of a word: a letter or digit of a script without spaces, or a run of others, with marks.

    Marks are vowel signs and accents that Unicode has as characters of their own, joiners, and Japan's long-vowel sign.
    """
    categories = ((chr(i), unicodedata.category(chr(i))) for i in range(0x300, 0x1F000))
    marks = "".join(character for character, category in categories if category in ("Mn", "Mc", "Me"))
    marks += "\u200c\u200d\u30fc\uff70"
    alone = f"(?=[{ROUGE_CHARACTERS}])[^\\W_][{marks}]*"
    in_run = f"(?![{ROUGE_CHARACTERS}])[^\\W_][{marks}]*"
    return re.compile(f"{alone}|(?:{in_run})+")


def rouge(written: str, reference: str) -> dict[str, float]:
    """Return F1 of each of ROUGES, in [0, 1]; 0 where either text has no tokens.

    - rouge1, rouge2: n-grams, each counted as often as both texts have it;
    - rougeL: the longest common subsequence;
    - rougeLsum: the same for each sentence, with one sentence a line (union_hits).
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
    """Return the harmonic mean of hits / written and hits / reference; 0 for no hits."""
    return 2 * hits / (written + reference) if hits else 0.0


def ngram_f1(written: Sequence[str], reference: Sequence[str], n: int) -> float:
    """Return F1 of the n-grams that both texts have, each counted as often as it is in both (ROUGE-n)."""
    ours, theirs = (Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for tokens in (written, reference))
    return f1((ours & theirs).total(), ours.total(), theirs.total())


def lcs_table(a: Sequence[str], b: Sequence[str]) -> list[list[int]]:
    """Return the (len(a) + 1) x (len(b) + 1) lengths of the longest common subsequences of a[:i] and b[:j]."""
    table = [[0] * (len(b) + 1)]
    for token in a:
        above, row = table[-1], [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if token == other else max(above[j + 1], row[j]))
        table.append(row)
    return table


def lcs_indices(a: Sequence[str], b: Sequence[str]) -> set[int]:
    """Return the indices in `a` of a longest common subsequence with `b`; of several, the one of rouge-score."""
    table, i, j, indices = lcs_table(a, b), len(a), len(b), set[int]()
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            indices.add(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return indices


def union_hits(written: Sequence[Sequence[str]], reference: Sequence[Sequence[str]]) -> int:
    """Return the number of reference tokens in a common subsequence of their sentence with any written sentence.

    Lin 2004, section 3.2. A token counts at most as often as each text has it, as in ROUGE 1.5.5.
    """
    left, hits = Counter(token for sentence in written for token in sentence), 0
    for sentence in reference:
        for index in sorted(set().union(*(lcs_indices(sentence, other) for other in written))):
            if left[sentence[index]]:
                left[sentence[index]] -= 1
                hits += 1
    return hits


def summary_statistics(written: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return [texts, the sum of each of ROUGES, tokens written, tokens of the references]."""
    scores = [rouge(ours, theirs) for ours, theirs in zip(written, references, strict=True)]
    sums = [sum(score[name] for score in scores) for name in ROUGES]
    lengths = [sum(len(tokenize(text)) for text in texts) for texts in (written, references)]
    return [len(written), *sums, *lengths]


def summary_metrics(statistics: Sequence[float]) -> dict[str, float]:
    """Return the mean of each of ROUGES over the texts, and length_ratio: tokens written / tokens of the references."""
    num_texts, *sums, written, references = statistics
    means = {name: value / num_texts for name, value in zip(ROUGES, sums, strict=True)}
    return {**means, "length_ratio": written / references if references else 0.0}
