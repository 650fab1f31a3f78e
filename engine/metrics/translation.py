"""BLEU (Papineni et al. 2002) and chrF (Popovic 2015) of a whole corpus, as sacrebleu computes them.

Both are made of counts that add: sacrebleu counts within each sentence, the counts are summed over batches and ranks,
and sacrebleu makes the scores of the sums. So they are exactly its corpus scores, however the corpus was cut.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from engine.config import ConfigError

TOKENIZERS = ("13a", "zh", "char")  # sacrebleu's
BLEU_COUNTS, CHRF_COUNTS = 10, 18  # two lengths, and 4 orders x (correct, total); 6 orders x (ours, theirs, common)
CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa]")


def require_sacrebleu() -> None:
    """ConfigError where it is not installed. Imports nothing, so that it can be asked before anything is read."""
    if importlib.util.find_spec("sacrebleu") is None:
        raise ConfigError("BLEU and chrF need the sacrebleu package: pip install finetune-engine[translation]")


def choose_tokenizer(references: Sequence[str]) -> str:
    """The tokenizer of BLEU, from all the references of a data set: what most of them are written in.

    zh (characters of Chinese, words of the rest) for Chinese; char for Japanese, whose words would take a dictionary;
    13a, sacrebleu's default, for languages with spaces. chrF needs none.
    """
    kana = sum(bool(KANA.search(text)) for text in references)
    chinese = sum(bool(CHINESE.search(text)) for text in references)
    if 2 * kana > len(references):
        return "char"
    return "zh" if 2 * chinese > len(references) else "13a"


def translation_counts(written: Sequence[str], references: Sequence[str], tokenizer: str) -> list[int]:
    """The counts of BLEU, then of chrF, summed over the sentences: BLEU_COUNTS + CHRF_COUNTS numbers."""
    total = [0] * (BLEU_COUNTS + CHRF_COUNTS)
    if written:
        bleu, chrf = (metric._extract_corpus_statistics(written, [references]) for metric in _metrics(tokenizer))
        for ours, theirs in zip(bleu, chrf, strict=True):
            total = [a + b for a, b in zip(total, [*ours, *theirs], strict=True)]
    return total


def translation_scores(counts: Sequence[float]) -> dict[str, float]:
    """bleu and chrf, in [0, 100], and length_ratio: what was written over the references, in the tokens of BLEU."""
    whole = [round(count) for count in counts]
    bleu, chrf = _metrics("13a")  # from counts, it makes no difference what was counted
    return {
        "bleu": bleu._aggregate_and_compute([whole[:BLEU_COUNTS]]).score,
        "chrf": chrf._aggregate_and_compute([whole[BLEU_COUNTS:]]).score,
        "length_ratio": whole[0] / whole[1] if whole[1] else 0.0,
    }


def signatures(tokenizer: str) -> list[str]:
    """How the scores were computed, in sacrebleu's own short words, for a paper."""
    lines = []
    for metric in _metrics(tokenizer):
        metric.num_refs = 1
        lines.append(f"{metric.__class__.__name__}: {metric.get_signature()}")
    return lines


@cache
def _metrics(tokenizer: str) -> tuple[Any, Any]:
    from sacrebleu.metrics import BLEU, CHRF

    return BLEU(tokenize=tokenizer, force=True), CHRF()
