"""ROUGE against rouge-score on random and adversarial texts, and ROUGE of Chinese."""

from __future__ import annotations

import random

import pytest

from engine.metrics import summarization as rouge

THEIRS = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(list(rouge.ROUGES), use_stemmer=False)
PIECES = [
    "a ",
    "b ",
    "c ",
    "d",
    "ab ",
    "\n",
    "\n\n",
    " ",
    "A",
    ".",
    "-",
    "2",
    "'s ",
    "_",
    "\t",
]
ADVERSARIAL = [
    ("", ""),
    ("", "something"),
    ("something", ""),
    ("...", "..."),
    ("\n\n", "\n"),
    ("the the the the", "the cat"),
    ("the cat", "the the the the"),
    ("a b a b a b", "b a b a b a"),
    ("The CAT sat", "the cat SAT"),
    ("state-of-the-art", "state of the art"),
    ("it's 3.14 or 1,000", "its 3 14 or 1000"),
    ("snake_case", "snake case"),
    ("one two\nthree four", "three four\none two"),
    ("one two three four", "three four\none two"),
    ("a b c\na b d\na b e", "a b c d e"),
    ("w1 w2 w3 w4 w5", "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5"),
    ("x\n\n\ny\n", "\ny\nx"),
    ("a " * 60, "a b " * 30),
    ("sentence one.\r\nsentence two.", "sentence two.\nsentence one."),
]


def assert_same(written: str, reference: str) -> None:
    theirs = {name: score.fmeasure for name, score in THEIRS.score(target=reference, prediction=written).items()}
    assert rouge.rouge(written, reference) == pytest.approx(theirs, abs=1e-12), (written, reference)


@pytest.mark.parametrize(("written", "reference"), ADVERSARIAL)
def test_adversarial_texts_score_as_in_rouge_score(written, reference):
    assert_same(written, reference)


@pytest.mark.parametrize("seed", range(8))
def test_random_texts_score_as_in_rouge_score(seed):
    rng = random.Random(seed)
    for _ in range(250):
        written, reference = ("".join(rng.choices(PIECES, k=rng.randint(0, 25))) for _ in range(2))
        assert_same(written, reference)


def test_some_random_texts_differ_by_their_sentences():
    """Shows that the test above tests rougeLsum."""
    scores = rouge.rouge("one two\nthree four", "three four\none two")
    assert scores["rougeLsum"] == 1.0
    assert scores["rougeL"] == 0.5


def test_words_are_not_stemmed():
    assert rouge.rouge("running dogs", "run dog") == dict.fromkeys(rouge.ROUGES, 0.0)


def test_chinese_is_counted_by_characters():
    assert rouge.tokenize("模型在 GPU 上运行，很快。") == ["模", "型", "在", "gpu", "上", "运", "行", "很", "快"]
    scores = rouge.rouge("今天天气好", "今天气温很高")  # 5 and 6 characters, common subsequence 今 天 气
    assert scores["rouge1"] == pytest.approx(2 * 3 / 11)
    assert scores["rouge2"] == pytest.approx(2 * 2 / 9)  # 今天, 天气
    assert scores["rougeL"] == pytest.approx(2 * 3 / 11)


def test_spaced_chinese_scores_as_letters_in_rouge_score():
    """With a letter for each character the two tokenizers agree, and so do the scores."""
    rng = random.Random(0)
    letters = dict(zip("甲乙丙丁戊\n", ["a ", "b ", "c ", "d ", "e ", "\n"], strict=True))
    for _ in range(200):
        written, reference = ("".join(rng.choices(list(letters), k=rng.randint(0, 12))) for _ in range(2))
        spelled = ("".join(letters[character] for character in text) for text in (written, reference))
        theirs = {name: score.fmeasure for name, score in THEIRS.score(*reversed([*spelled])).items()}
        assert rouge.rouge(written, reference) == pytest.approx(theirs, abs=1e-12)


WORDS_OF_SCRIPTS = {
    "Russian": "кот сидит на окне",
    "Greek": "η γάτα κάθεται εδώ",
    "Arabic": "القطة تجلس على النافذة",
    "Hindi": "बिल्ली खिड़की पर बैठी",
    "Korean": "고양이가 창가에 앉아 있다",
    "French": "été naïf où garçon",
    "decomposed": "e\u0301te\u0301 nai\u0308f a b",
    "Persian": "می\u200cخواهم کتاب تازه بخوانم",
    "Armenian": "կատուն նստած է այստեղ",
}


@pytest.mark.parametrize("language", WORDS_OF_SCRIPTS)
def test_spaced_scripts_score_as_their_letters_in_rouge_score(language):
    rng = random.Random(0)
    spelled = dict(zip(WORDS_OF_SCRIPTS[language].split(" "), "abcd", strict=True))
    for _ in range(60):
        written, reference = (rng.choices(list(spelled), k=rng.randint(1, 9)) for _ in range(2))
        letters = (" ".join(spelled[word] for word in words) for words in (reference, written))
        theirs = {name: score.fmeasure for name, score in THEIRS.score(*letters).items()}
        ours = rouge.rouge("«" + ", ".join(written) + "»", " ".join(reference))
        assert ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("カナとかな", 5),
        ("ラーメン", 3),  # the sign of a long vowel belongs to the character before
        ("ｶﾅ", 2),
        ("한국어", 1),
        ("𠀀〇々x", 4),
        ("แมวนั่ง", 5),  # a vowel sign or tone mark too
        ("ແມວ", 3),
        ("、。！「」", 0),
        ("ａ１", 1),
        ("école", 1),
    ],
)
def test_characters_are_words_where_the_script_has_no_spaces(text, tokens):
    assert len(rouge.tokenize(text)) == tokens


def test_scores_are_symmetric_and_one_for_the_same_text():
    assert rouge.rouge("a b c d", "a b c d") == dict.fromkeys(rouge.ROUGES, 1.0)
    assert rouge.rouge("a b", "b c d") == rouge.rouge("b c d", "a b")
