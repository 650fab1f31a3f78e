"""BLEU (Papineni et al. 2002) and chrF (Popovic 2015) of a corpus, as sacrebleu computes them.

Both come from counts that add. sacrebleu counts within each sentence, the counts are summed over batches and ranks, and
sacrebleu computes the scores from the sums. The result is exactly its corpus score, however the corpus is batched.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from data import scripts
from engine.config import ConfigError

# sacrebleu's names. Its others, flores101, flores200 and spm, download a model.
TOKENIZERS = ("13a", "zh", "char", "intl", "ja-mecab", "ko-mecab", "none")
NEEDED = {"ja-mecab": ("MeCab", "sacrebleu[ja]"), "ko-mecab": ("mecab_ko", "sacrebleu[ko]")}  # a module, a package
NUM_BLEU_COUNTS = 10  # two lengths, and 4 orders x (correct, total)
NUM_CHRF_COUNTS = 18  # 6 orders x (ours, theirs, common)
CHINESE = re.compile(f"[{scripts.CHINESE}]")
KANA = re.compile(f"[{scripts.KANA_LETTERS}]")
SOUTH_EAST_ASIAN = re.compile(f"[{scripts.THAI_LAO}{scripts.BURMESE}{scripts.KHMER}]")


def require_sacrebleu(tokenizer: str = "auto") -> None:
    """Raise ConfigError if sacrebleu, or what its tokenizer needs, is not installed.

    It imports nothing, so it can run before any file is read.
    """
    if importlib.util.find_spec("sacrebleu") is None:
        raise ConfigError("BLEU and chrF need the sacrebleu package: pip install 'sacrebleu>=2'")
    module, package = NEEDED.get(tokenizer, ("", ""))
    if module and importlib.util.find_spec(module) is None:
        raise ConfigError(f"eval.bleu_tokenizer = {tokenizer!r} needs further packages: pip install '{package}'")


def choose_tokenizer(references: Sequence[str]) -> str:
    """Return BLEU's tokenizer for the script of most references of a data set; chrF needs none.

    - zh for Chinese: its characters, and the words of other scripts;
    - char for Japanese, Thai, Lao, Burmese and Khmer, whose words would need a dictionary;
    - 13a, sacrebleu's default, for languages with spaces.
    """
    kana = sum(bool(KANA.search(text)) for text in references)
    chinese = sum(bool(CHINESE.search(text)) for text in references)
    south_east_asian = sum(bool(SOUTH_EAST_ASIAN.search(text)) for text in references)
    if 2 * max(kana, south_east_asian) > len(references):
        return "char"
    return "zh" if 2 * chinese > len(references) else "13a"


def translation_statistics(written: Sequence[str], references: Sequence[str], tokenizer: str) -> list[int]:
    """Return the counts of BLEU, then of chrF, summed over sentences: NUM_BLEU_COUNTS + NUM_CHRF_COUNTS numbers."""
    total = [0] * (NUM_BLEU_COUNTS + NUM_CHRF_COUNTS)
    if written:
        bleu, chrf = (metric._extract_corpus_statistics(written, [references]) for metric in _metrics(tokenizer))
        for ours, theirs in zip(bleu, chrf, strict=True):
            total = [a + b for a, b in zip(total, [*ours, *theirs], strict=True)]
    return total


def translation_metrics(counts: Sequence[float]) -> dict[str, float]:
    """Return bleu and chrf, in [0, 100], and length_ratio: tokens written over tokens of the references."""
    totals = [round(count) for count in counts]
    bleu, chrf = _metrics("13a")  # given the counts, the scores do not depend on the tokenizer
    return {
        "bleu": bleu._aggregate_and_compute([totals[:NUM_BLEU_COUNTS]]).score,
        "chrf": chrf._aggregate_and_compute([totals[NUM_BLEU_COUNTS:]]).score,
        "length_ratio": totals[0] / totals[1] if totals[1] else 0.0,
    }


def count_tokens(text: str, tokenizer: str) -> int:
    """Return the number of BLEU's tokens of a text."""
    bleu, _ = _metrics(tokenizer)
    return len(bleu.tokenizer(text).split())


def signatures(tokenizer: str) -> list[str]:
    """Return sacrebleu's signatures of the two scores, as a paper should cite them."""
    lines = []
    for metric in _metrics(tokenizer):
        metric.num_refs = 1
        lines.append(f"{metric.__class__.__name__}: {metric.get_signature()}")
    return lines


@cache
def _metrics(tokenizer: str) -> tuple[Any, Any]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return BLEU(tokenize=tokenizer, force=True), CHRF()
