"""What a model silently does not see: unknown tokens, special tokens in texts, lost characters, rows in two splits."""

from __future__ import annotations

import pytest
from support.cases import dry_run, evaluation, predictions, run, settings_for, write_file
from support.task_settings import task_settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from data import Row
from data.audit import audit_targets, audit_texts
from data.augmentation.text import MASKED, show_augmented
from data.text_classification import encode_texts
from data.tokenizers.special import make_special_tokens_splittable
from engine.config import AugmentSettings, ImageAugmentSettings, TextAugmentSettings
from engine.tasks import TASKS

THEY_CANNOT, IT_CANNOT = "cannot be written as they are", "cannot be written as it is"
ESCAPE = "read as plain text (data.split_special_tokens = false reads them as tokens)"


def word_pieces() -> Tokenizer:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "a", "b", "##a", "##b", "sep", "."]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(vocabulary[:5])
    return tokenizer


def unigrams() -> Tokenizer:
    """T5's kind: the special tokens are pieces too, of the best score, and spaces of any kind are one."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "a", "b", "▁a", "▁b", "s", "/", ">", ".", "<extra_id_0>", "é"]
    scores = [0.0 if piece.startswith("<") else -3.0 for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), 2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    return tokenizer


def byte_pairs(alphabet: str | None = None) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if alphabet is None else [*alphabet]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|endoftext|>"])
    return tokenizer


def words() -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "[SEP]", "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[UNK]", "[SEP]"])
    return tokenizer


def audited(tokenizer: Tokenizer, *texts: str, pair: str = "") -> list[str]:
    rows = [Row(str(i), i, {"text": text, "other": pair}) for i, text in enumerate(texts, 1)]
    columns = ("text", "other") if pair else ("text",)
    examples = encode_texts(rows, tokenizer, text="text", text_pair="other" if pair else "", max_length=500)
    return audit_texts(examples, rows, lambda row: [row.values[column] for column in columns], tokenizer)


LONG = "a" * 101


@pytest.mark.parametrize(
    ("make", "texts", "notes"),
    [
        (word_pieces, ["a b", "ab", "é́a b"], ["warning: unknown tokens: 1 of 6 (17%), from 'é́a'"]),
        (word_pieces, ["a " * 40 + "zq"], ["unknown tokens: 1 of 41 (2.4%), from 'zq'"]),
        (
            word_pieces,
            [LONG, f"zz {LONG} zz zy", "a b"],
            [
                "warning: unknown tokens: 5 of 7 (71%), from 'zz', 'zy' and words of more than 100 characters",
                "warning: 2 of 3 texts are nothing but [UNK] (ids 1, 2)",
            ],
        ),
        (word_pieces, ["a b", "\u200b\x07"], ["warning: 1 of 2 texts without a token (id 2)"]),
        (words, ["a b a", "a c"], ["warning: unknown tokens: 1 of 5 (20%), from 'c'"]),
        (unigrams, ["a 商店 b", "a商"], ["warning: unknown tokens: 2 of 6 (33%), from '商' and '店'"]),
        (byte_pairs, ["商店 {}", "any \u200b 🙂"], []),
        (
            byte_pairs,
            ["NaN", "none", "b", "-"],
            ["warning: 2 of 4 texts are the name of a missing value, such as 'nan'"],
        ),
        (byte_pairs, ["b'a b'", 'b"a"', "b'"], ["warning: 2 of 3 texts are bytes as Python prints them, b'...'"]),
        (
            lambda: byte_pairs("abĠ"),
            ["a b", "a, b;", "b;"],
            ["warning: 2 of 3 texts with characters that the vocabulary lacks: ';' and ','"],
        ),
    ],
)
def test_what_a_tokenizer_does_not_know(make, texts, notes):
    assert audited(make(), *texts) == notes


def test_a_part_of_a_pair_without_a_token():
    assert audited(word_pieces(), "a b", pair="\u200b") == ["1 of 1 text without a token in one of their parts (id 1)"]


def unsplit_texts() -> Tokenizer:
    """A tokenizer whose model reads texts as they are, without a pre-tokenizer."""
    letters = Tokenizer(models.Unigram([(piece, -3.0) for piece in ["<unk>", "</s>", *"ab </>s"]], 0))
    letters.add_special_tokens(["<unk>", "</s>"])
    return letters


SPECIAL = {word_pieces: "[SEP]", unigrams: "</s>", byte_pairs: "<|endoftext|>", words: "[SEP]", unsplit_texts: "</s>"}


@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("form", ["{}", "a {} b", "a{}b", "a {}{}"])
def test_special_tokens_in_a_text_are_text(make, form):
    """In a tokenizer of each kind, also for words; without the flag they are the tokens, as in transformers."""
    tokenizer, before = make(), make()
    make_special_tokens_splittable(tokenizer)
    text, number = form.replace("{}", SPECIAL[make]), tokenizer.token_to_id(SPECIAL[make])
    for given, is_split in ((text, False), (text.split(), True)):
        as_tokens = before.encode(given, is_pretokenized=is_split, add_special_tokens=False).ids
        tokenizer.encode_special_tokens = False
        assert tokenizer.encode(given, is_pretokenized=is_split, add_special_tokens=False).ids == as_tokens
        assert number in as_tokens
        tokenizer.encode_special_tokens = True
        assert number not in tokenizer.encode(given, is_pretokenized=is_split, add_special_tokens=False).ids
    note = f"1 of 2 texts contains special tokens, such as {SPECIAL[make]!r}: {ESCAPE}"
    assert note in audited(tokenizer, text, "a b")
    if make is byte_pairs:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("targets", "notes"),
    [
        (["a b", "b  a.", "b\u00e9", "be\u0301"], []),
        (
            ["a < b", "{ a }", "a\nb\n", "商店", "a\n"],
            [f"warning: 4 of 5 targets {THEY_CANNOT}: '<', '{{', '}}', '商', '店' and line breaks are lost"],
        ),
        (["a…", *["b"] * 30], [f"1 of 31 targets {IT_CANNOT}: '…' becomes '...'"]),
        (
            ["a <extra_id_0>"],
            [
                f"warning: 1 of 1 target {IT_CANNOT}: '0', '<', '_', 'd', 'e', 'i', 'r', 't' and 'x' are lost",
                f"1 of 1 target contains special tokens, such as '<extra_id_0>': {ESCAPE}",
            ],
        ),
    ],
)
def test_what_a_model_cannot_write(targets, notes):
    tokenizer = unigrams()
    make_special_tokens_splittable(tokenizer)
    tokenizer.encode_special_tokens = True
    assert audit_targets(targets, tokenizer) == notes


ROW = {
    "text-classification": {"text": "a [SEP] cat", "label": "x"},
    "token-classification": {"tokens": ["a", "[SEP]", "cat"], "tags": ["O", "B-X", "O"]},
    "masked-lm": {"text": "a [SEP] cat"},
    "causal-lm": {"text": "a [SEP] cat"},
    "dialogue": {"messages": ["a [SEP]", "cat"]},
    "summarization": {"text": "a [SEP] cat", "summary": "cat [SEP]"},
    "question-answering": {
        "question": "what [SEP]",
        "context": "a [SEP] cat",
        "answers": [{"text": "cat", "answer_start": 8}],
    },
    "relation-extraction": {"text": "a [SEP] cat", "subject": "a", "object": "cat", "relation": "x"},
}


@pytest.mark.parametrize("task", ROW)
def test_every_task_counts_special_and_unknown_tokens(task, tmp_path, capsys):
    row = ROW[task]
    rows = [row | {column: value for column in ("label", "relation") if column in row} for value in "xyx"]
    settings = settings_for(task, tmp_path, rows)
    settings["data.validation"] = str(write_file(tmp_path / "validation.jsonl", rows))
    if task == "question-answering":
        settings["question_answering.doc_stride"] = 4
    printed = dry_run(settings, capsys)
    assert f"3 of 3 texts contain special tokens, such as '[SEP]': {ESCAPE}" in printed
    assert "warning: unknown tokens: " in printed
    assert ", from 'SEP'" in printed or "'[', 'SEP' and ']'" in printed
    printed = dry_run(settings | {"data.split_special_tokens": False}, capsys)
    assert "'[SEP]': read as tokens (data.split_special_tokens = true reads them as plain text)" in printed
    assert "unknown tokens" not in printed.split("test:")[0] or task == "relation-extraction"


@pytest.mark.parametrize("escaped", [True, False])
def test_special_tokens_in_evaluation_and_prediction(escaped, tmp_path, capsys):
    rows = [{"text": f"a {colour} cat", "label": colour} for colour in ("red", "green")] * 4
    settings = settings_for("text-classification", tmp_path, rows, data__split_special_tokens=escaped)
    run(settings | {"augment.text.mask": 0.5}, capsys)
    file = write_file(tmp_path / "new.jsonl", [{"text": "a [SEP] cat", "label": "red"}])
    note = "1 of 1 text contains special tokens, such as '[SEP]': read as " + ("plain text" if escaped else "tokens")
    predictions(settings["run.folder"], file)
    assert note in capsys.readouterr().out
    evaluation(settings["run.folder"], file)
    printed = capsys.readouterr().out
    assert note in printed
    assert ("unknown tokens" in printed) == escaped


@pytest.mark.parametrize(
    ("rows", "validation", "notes"),
    [
        (
            [{"text": f"house {i // 2}", "label": "ab"[i // 2 % 2]} for i in range(16)],
            None,
            ["2 of 2 validation texts are also in the training data"],
        ),
        (
            [{"text": "cat", "label": label} for label in "abababab"],
            [{"text": "dog", "label": "a"}, {"text": " cat", "label": "c"}],
            [
                "warning: 1 training text has several labels in 8 of 8 rows, such as 'cat': 'a' (id 1) and 'b' (id 2)",
                "warning: 1 of 2 validation texts are also in the training data, 1 of them with another label (id 2)",
            ],
        ),
        ([{"text": f"{i} cat", "label": "ab"[i % 2]} for i in range(8)], [{"text": "9 cat", "label": "a"}], []),
        ([{"text": f"{i} cat", "label": "ab"[i % 2]} for i in range(8)], "same", ["is the training file"]),
    ],
)
def test_texts_in_two_splits_or_with_two_labels(rows, validation, notes, tmp_path, capsys):
    settings = settings_for("text-classification", tmp_path, rows, data__labels=("a", "b", "c"))
    if validation == "same":
        settings["data.validation"] = str(tmp_path / "." / "train.jsonl")
    elif validation:
        settings["data.validation"] = str(write_file(tmp_path / "validation.jsonl", validation))
    else:
        settings["data.validation_fraction"] = 0.125
    printed = dry_run(settings, capsys)
    assert [note for note in notes if note not in printed] == []
    assert notes or ("also in the training" not in printed and "several labels" not in printed)


def test_truncated_texts_and_the_share_of_their_tokens(tmp_path, capsys):
    rows = [{"text": "cat " * (40 if i < 2 else 20), "label": "ab"[i % 2], "id": f"r{i}"} for i in range(11)]
    settings = settings_for(
        "text-classification", tmp_path, rows[1:], data__validation=str(write_file(tmp_path / "v.jsonl", rows))
    )
    printed = dry_run(settings, capsys)
    assert "1 of 10 texts truncated to data.max_length = 24, 7.5% of all tokens lost" in printed
    assert "2 of 11 texts truncated to data.max_length = 24, 12.8% of all tokens lost" in printed


def test_masked_words_are_mask_tokens_where_others_are_text():
    """An inserted mask is encoded as the mask token in a text was before; a "[MASK]" of the text itself is text."""
    tokenizer = word_pieces()
    settings = task_settings("text-classification", text_column="text", label_column="label", validation="v")
    encode = TASKS["text-classification"].encoder(tokenizer, settings, ("x",))
    rows = [Row("1", 1, {"text": "a b. a b", "label": "x"}), Row("2", 2, {"text": "[MASK] a b", "label": "x"})]
    plain = encode(rows)
    wanted = AugmentSettings(TextAugmentSettings(mask=0.5), ImageAugmentSettings())
    augmented = TASKS["text-classification"].augment(plain, rows, encode, wanted, 0)
    mask, seen = tokenizer.token_to_id("[MASK]"), set()
    for epoch in range(20):
        for i in range(2):
            text = augmented.changed(i, epoch).values["text"]
            ids = augmented.batch([i], epoch).input_ids.tolist()
            assert ids.count(mask) == text.count(MASKED)
            seen.add((i, ids.count(mask)))
            tokenizer.encode_special_tokens = False
            if i == 0:
                assert ids == tokenizer.encode(text.replace(MASKED, "[MASK]")).ids
    assert (plain.input_ids == mask).sum() == 0
    assert len(seen) > 5
    assert "[MASK]" in show_augmented(augmented)
    assert MASKED not in show_augmented(augmented)
