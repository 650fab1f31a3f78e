"""BLEU and chrF from counts that add, against sacrebleu's scores of the whole corpus."""

from __future__ import annotations

import importlib.util
import random
import runpy
import sys

import pytest
from support.task_settings import task_settings

from engine.config import ConfigError
from engine.metrics import summarization as rouge
from engine.metrics import translation
from engine.tasks import TASKS

sacrebleu = pytest.importorskip("sacrebleu")

ENGLISH = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "don't",
    "U.S.",
    "1,000",
    "(so)",
    "e-mail",
    "Über",
    "%s",
    "&quot;",
    "",
]
CHINESE = [*"今天气很好模型的。，", "GPU", "3.5", " ", "（", "%(name)s"]


def corpus(words: list[str], joint: str, seed: int, count: int = 40) -> tuple[list[str], list[str]]:
    """Return written texts and references that share most words; some are empty, some end in spaces."""
    rng = random.Random(seed)
    references = [joint.join(rng.choices(words, k=rng.randint(0, 14))) for _ in range(count)]
    written = [
        joint.join(
            rng.choice(words) if rng.random() < 0.25 else part for part in (text.split(joint) if joint else text)
        )
        for text in references
    ]
    return [text + rng.choice(["", " ", "\n"]) for text in written], references


CORPORA = {"13a": (ENGLISH, " "), "zh": (CHINESE, ""), "char": (CHINESE, "")}


@pytest.mark.parametrize("tokenizer", CORPORA)
@pytest.mark.parametrize("seed", range(5))
def test_sums_over_any_batches_equal_sacrebleus_corpus_scores(tokenizer, seed):
    written, references = corpus(*CORPORA[tokenizer], seed)
    rng = random.Random(seed)
    order = rng.sample(range(len(written)), len(written))
    total = [0] * (translation.NUM_BLEU_COUNTS + translation.NUM_CHRF_COUNTS)
    while order:
        size = rng.randint(0, 7)  # some batches are empty
        part, order = order[:size], order[size:]
        counts = translation.translation_statistics(
            [written[i] for i in part], [references[i] for i in part], tokenizer
        )
        total = [a + b for a, b in zip(total, counts, strict=True)]
    found = translation.translation_metrics([float(count) for count in total])
    assert found["bleu"] == sacrebleu.corpus_bleu(written, [references], tokenize=tokenizer).score
    assert found["chrf"] == sacrebleu.corpus_chrf(written, [references]).score
    assert 0 < found["bleu"] < 100


@pytest.mark.parametrize(
    ("written", "references"),
    [
        (["", ""], ["a b c d", "e"]),
        (["a b c d e"], ["a b c d e"]),
        (["x"], ["y"]),
        (["a b"], ["a b"]),  # shorter than BLEU's longest n-gram
        (["a b c d e f g h"], ["a"]),
        ([" "], [" "]),
    ],
)
def test_adversarial_corpora_score_as_in_sacrebleu(written, references):
    found = translation.translation_metrics(translation.translation_statistics(written, references, "13a"))
    assert found["bleu"] == sacrebleu.corpus_bleu(written, [references], force=True).score
    assert found["chrf"] == sacrebleu.corpus_chrf(written, [references]).score


def test_nothing_at_all_scores_zero():
    counts = translation.translation_statistics([], [], "13a")
    assert translation.translation_metrics(counts) == {"bleu": 0.0, "chrf": 0.0, "length_ratio": 0.0}


@pytest.mark.parametrize(
    ("references", "tokenizer"),
    [
        (["A sentence.", "Ein Satz."], "13a"),
        (["一个句子。", "另一个"], "zh"),
        (["用 CSS 写的", "HTML 和 JavaScript", "一个模型"], "zh"),  # most of them, not all
        (["the 道 of programming", "a sentence", "another"], "13a"),
        (["これは文です。", "カタカナ", "漢字"], "char"),
        (["Предложение.", "جملة"], "13a"),
        (["ประโยคหนึ่ง", "ပြောသည်", "ពាក្យ", "a word"], "char"),
        (["한 문장이다.", "또 다른"], "13a"),  # Korean has spaces
        ([], "13a"),
    ],
)
def test_bleu_tokenizer_follows_the_script_of_most_references(references, tokenizer):
    assert translation.choose_tokenizer(references) == tokenizer


def test_it_matters_for_chinese():
    """13a reads a Chinese sentence as one word, which is right or wrong as a whole."""
    written, references = ["今天天气很好。", "模型运行得很快"], ["今天天气不好。", "模型运行得快"]
    by = {
        tokenizer: translation.translation_metrics(translation.translation_statistics(written, references, tokenizer))
        for tokenizer in ("13a", "zh")
    }
    assert by["13a"]["bleu"] == 0.0
    assert by["zh"]["bleu"] > 40
    assert by["13a"]["chrf"] == by["zh"]["chrf"] > 40


def test_the_signature_says_how_the_scores_were_computed():
    bleu, chrf = translation.signatures("zh")
    assert f"tok:zh|smooth:exp|version:{sacrebleu.__version__}" in bleu
    assert "nc:6|nw:0" in chrf


def test_without_sacrebleu_a_run_ends_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    task = TASKS["translation"]
    with pytest.raises(ConfigError, match=r"sacrebleu package: pip install 'sacrebleu>=2'"):
        task.read("no such file", task_settings("translation"), True)


def test_predicting_needs_no_sacrebleu(monkeypatch, tmp_path):
    (tmp_path / "new.jsonl").write_text('{"source": "a text"}\n')
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    task = TASKS["translation"]
    assert len(task.read(str(tmp_path / "new.jsonl"), task_settings("translation"), False)) == 1


@pytest.mark.parametrize("module", [rouge, translation])
def test_p19_the_metrics_are_imported_without_the_packages(module, monkeypatch):
    for name in ("sacrebleu", "rouge_score", "nltk"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    runpy.run_path(module.__file__)
