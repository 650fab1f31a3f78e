"""Every kind of tokenizer a folder can hold, from each of its files: the ids of transformers, and F14 for the files."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from support.wordpiece import VOCAB, added
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from data import DataError, copy_tokenizer, load_tokenizer
from data.tokenizers.sentencepiece import read_sentencepiece
from data.tokenizers.split_words import add_spaces

WORDS = """the film was good not and a book of naïve cafés École İstanbul straße don't stop-believing 1,000.5 3rd $5 ...
(really)! 电影 很好看 中文字符 漢字 我们 かな アニメ 안녕 하세요 हिन्दी मरहबा مرحبا שלום 🎉 👩‍👩‍👧 🇩🇪 ♥ ﬁne Ｆｕｌｌ"""
WORDS = WORDS.split()
SPECIAL = ["[MASK]", "[mask]", "[CLS]", "[SEP]", "<s>", "</s>", "<mask>", " <mask>", "<pad>", "<unk>", "<|endoftext|>"]
SPECIAL += ["<extra_id_0>", " <extra_id_99> ", "<extra_id_100>", "<ent>", "MyTok", "mytok", "<usr>", "▁", " ▁ ", "##x"]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\x85", "\xa0", "\u2003", "\u2028", "\u3000", "\u200b", "\ufeff"]
ODD = ["e\u0301", "\u0301", "a\u0300\u0316\u0334", "क्षि", "\u202eabc\u202c", "\u200d", "👍🏽", "🏴\U000e0067\U000e007f"]
ODD += ["\x00", "\x07", "\x7f", "\ufffd", "\uffff", "\U0010ffff", "ſ", "Ⅷ", "㍿", "①", "x" * 150, "漢" * 120, "🎉" * 60]
PLANES = [(32, 127), (160, 0x300), (0x300, 0x370), (0x370, 0xD800), (0x3000, 0xA000), (0xE000, 0x10000)]
PLANES += [(0x1F300, 0x1FB00), (0x10000, 0x110000), (0, 32)]


def odd_texts(count: int, seed: int = 0) -> list[str]:
    """Half of words, special tokens, spaces and oddities side by side; half of any characters; and the empty text."""
    rng = random.Random(seed)

    def piece() -> str:
        kind = rng.choices((WORDS, SPECIAL, SPACES, ODD), (6, 2, 3, 2))[0]
        return rng.choice(kind) + rng.choice(("", " ", " "))

    texts = ["".join(piece() for _ in range(rng.randint(1, 12))) for _ in range(count // 2)]
    texts += ["".join(chr(rng.randrange(*rng.choice(PLANES))) for _ in range(rng.randint(1, 16))) for _ in texts]
    return ["", *texts[: count - 1]]


def corpus() -> list[str]:
    rng = random.Random(1)
    return [" ".join(rng.choices(WORDS, k=8)) for _ in range(400)]


def write_json(folder: Path, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def write_byte_level_bpe(folder: Path, special: list[str], **files: object) -> Path:
    """vocab.json and merges.txt, trained here; the other files by the name before their suffix."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    write_json(folder, **files)
    tokenizer.model.save(str(folder))
    return folder


def write_spiece(folder: Path, options: dict[str, object], name: str = "spiece.model", **files: object) -> Path:
    """spiece.model, trained here by the sentencepiece package with T5's normalization."""
    train = pytest.importorskip("sentencepiece").SentencePieceTrainer.train
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2}
    size = {"vocab_size": 160, "character_coverage": 0.98, "hard_vocab_limit": False}
    model = io.BytesIO()
    train(sentence_iterator=iter(corpus()), model_writer=model, **ids | size | options)
    write_json(folder, **files)
    (folder / name).write_bytes(model.getvalue())
    return folder


def write_vocab(folder: Path, **files: object) -> Path:
    write_json(folder, **files)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return folder


ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
MASK = {"content": "<mask>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
ENT = added("<ent>", special=True, normalized=False, rstrip=True)
LISTED = {"400": added("MyTok"), "401": ENT}
SENTINELS = [f"<extra_id_{i}>" for i in range(100)]


def bert(folder, **files):
    return write_vocab(folder, config={"model_type": "bert"}, **files)


def gpt2(folder, **files):
    return write_byte_level_bpe(folder, ["<|endoftext|>"], config={"model_type": "gpt2"}, **files)


def roberta(folder, **files):
    return write_byte_level_bpe(folder, ROBERTA_SPECIAL, config={"model_type": "roberta"}, **files)


def t5(folder, options=None, **files):
    return write_spiece(folder, options or {}, config={"model_type": "t5"}, **files)


def xlm_roberta(folder, model_type="xlm-roberta"):
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    return write_spiece(folder, ids, "sentencepiece.bpe.model", config={"model_type": model_type})


def albert(folder, **files):
    ids = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "bos_piece": "[CLS]", "eos_piece": "[SEP]"}
    ids |= {"user_defined_symbols": ["[MASK]"]}
    return write_spiece(folder, ids, config={"model_type": "albert"}, **files)


def deberta(folder, **files):
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    names = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    return write_spiece(folder, ids | names, "spm.model", config={"model_type": "deberta-v2"}, **files)


FOLDERS = {
    "bert": bert,
    "distilbert-cased": lambda to: write_vocab(
        to, config={"model_type": "distilbert"}, tokenizer_config={"do_lower_case": False}
    ),
    "gpt2": gpt2,
    "gpt2-prefix-space": lambda to: gpt2(to, tokenizer_config={"add_prefix_space": True}),
    "gpt2-bos-and-padding": lambda to: gpt2(
        to, tokenizer_config={"add_bos_token": True}, special_tokens_map={"pad_token": "[PAD]"}
    ),
    "gpt2-bos-and-eos": lambda to: gpt2(to, tokenizer_config={"add_bos_token": True, "add_eos_token": True}),
    "gpt2-added": lambda to: gpt2(to, tokenizer_config={"added_tokens_decoder": LISTED}),
    "roberta": lambda to: roberta(to, special_tokens_map={"mask_token": MASK}),
    "roberta-prefix-space": lambda to: roberta(
        to, tokenizer_config={"add_prefix_space": True, "mask_token": {"__type": "AddedToken", **MASK}}
    ),
    "roberta-added": lambda to: roberta(
        to,
        tokenizer_config={
            "tokenizer_class": "RobertaTokenizer",
            "added_tokens_decoder": LISTED | {"4": added("<mask>", special=True, normalized=False)},
        },
    ),
    "roberta-older": lambda to: roberta(
        to,
        added_tokens={"<ent>": 401, "MyTok": 400},
        tokenizer_config={"additional_special_tokens": ["<ent>"]},
        special_tokens_map={"mask_token": MASK, "sep_token": "<unk>"},
    ),
    "roberta-unsplit": lambda to: roberta(
        to, tokenizer_config={"split_special_tokens": True, "mask_token": {"__type": "AddedToken", **MASK}}
    ),
    "t5": t5,
    "t5-user-defined-piece": lambda to: t5(to, {"user_defined_symbols": ["<usr>"]}),
    "t5-no-normalization": lambda to: t5(to, {"normalization_rule_name": "identity"}),
    "t5-of-the-hub": lambda to: t5(
        to, tokenizer_config={"extra_ids": 100, "additional_special_tokens": SENTINELS, "eos_token": "</s>"}
    ),
    "xlm-roberta": xlm_roberta,
    "camembert": lambda to: xlm_roberta(to, "camembert"),
    "albert": albert,
    "albert-cased": lambda to: albert(to, tokenizer_config={"do_lower_case": False, "keep_accents": True}),
    "mt5": lambda to: write_spiece(
        to, {"byte_fallback": True, "vocab_size": 460}, config={"model_type": "mt5"}, tokenizer_config={"extra_ids": 0}
    ),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """(kind, file) -> a folder of this kind and its transformers tokenizer, each made once."""
    made: dict[tuple[str, str], tuple[Path, object]] = {}
    auto = pytest.importorskip("transformers").AutoTokenizer

    def folder_of(kind: str, file: str) -> tuple[Path, object]:
        if (kind, file) not in made:
            folder = tmp_path_factory.mktemp("tokenizer") / kind
            if file == "tokenizer.json":
                folder_of(kind, "vocabulary")[1].save_pretrained(folder)
            else:
                FOLDERS[kind](folder)
            made[kind, file] = folder, auto.from_pretrained(folder)
        return made[kind, file]

    return folder_of


def compare(folder: Path, theirs, count: int) -> None:
    ours = load_tokenizer(folder)
    texts = odd_texts(count)
    expected = theirs(texts)["input_ids"]
    for text, encoding, ids in zip(texts, ours.encode_batch(texts), expected, strict=True):
        assert encoding.ids == ids, repr(text)
        decoded = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == decoded, repr(text)
    pairs = list(zip(texts[::2], texts[1::2], strict=False))
    expected = theirs(*map(list, zip(*pairs, strict=True)), return_token_type_ids=True)
    encodings = ours.encode_batch(pairs)
    assert [e.ids for e in encodings] == expected["input_ids"]
    assert [e.type_ids for e in encodings] == expected["token_type_ids"]
    assert ours.get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize("file", ["vocabulary", "tokenizer.json"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_ids_types_and_decoded_texts_are_those_of_transformers(folder_of, kind, file):
    compare(*folder_of(kind, file), count=400 if kind in ("bert", "gpt2", "roberta", "t5") else 100)


@pytest.mark.parametrize(
    "count", [pytest.param(1_500, marks=pytest.mark.oracle), pytest.param(10_000, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("file", ["vocabulary", "tokenizer.json"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_ids_types_and_decoded_texts_of_many_strings(folder_of, kind, file, count):
    compare(*folder_of(kind, file), count=count)


def saved(folder: Path, **settings: object):
    """The folder's tokenizer as transformers loads it, with these arguments."""
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder, **settings)


def test_the_mask_of_roberta_takes_the_space_before_it(tmp_path):
    """As the published tokenizer.json and transformers before 5 have it; transformers 5 needs to be told."""
    folder = roberta(tmp_path)
    compare(folder, saved(folder, mask_token=AddedToken("<mask>", lstrip=True, special=True)), 300)
    assert load_tokenizer(folder).encode("the <mask>").tokens == ["<s>", "the", " <mask>", "</s>"]


def test_pieces_around_a_text_and_a_pair(tmp_path):
    for make, single, pair in (
        (gpt2, "a", "a b"),
        (roberta, "<s> a </s>", "<s> a </s> </s> b </s>"),
        (t5, "▁a </s>", "▁a </s> ▁b </s>"),
    ):
        tokenizer = load_tokenizer(make(tmp_path / make.__name__))
        assert " ".join(tokenizer.encode("a").tokens).replace("▁ a", "▁a") == single
        assert re.sub("▁ (?=[ab])", "▁", " ".join(tokenizer.encode("a", "b").tokens)) == pair
        assert set(tokenizer.encode("a", "b").type_ids) == ({0, 1} if make is gpt2 else {0})


@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
def test_deberta_encodes_as_the_sentencepiece_package(tmp_path, rule):
    """transformers 5 leaves out the normalization of the file, with which the models were trained."""
    package = pytest.importorskip("sentencepiece")
    folder = deberta(tmp_path) if rule == "nmt_nfkc" else tmp_path
    if rule == "identity":
        options = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "normalization_rule_name": rule}
        names = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
        write_spiece(folder, options | names, "spm.model", config={"model_type": "deberta-v2"})
    theirs = package.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    ours = load_tokenizer(folder)
    # The library normalizes marks together with the character before them, and finds special tokens in texts.
    marks = {"Mn", "Me", "Cf", "Sk"}
    plain = [text for text in odd_texts(800) if not marks & set(map(unicodedata.category, text))]
    texts = [text for text in plain if not set("[]\u2581") & set(text)]
    assert len(texts) > 100
    for text in texts:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), repr(text)
    assert ours.token_to_id("[MASK]") == theirs.get_piece_size()
    pair = ours.encode("a", "b")
    assert (pair.tokens[0], pair.tokens[-1], pair.type_ids[0], pair.type_ids[-1]) == ("[CLS]", "[SEP]", 0, 1)
    assert ours.encode("a [MASK] b").tokens.count("[MASK]") == 1


def test_sentinels_of_t5_descend_to_the_last_id(tmp_path):
    tokenizer = load_tokenizer(t5(tmp_path))
    last = tokenizer.get_vocab_size() - 1
    assert [tokenizer.token_to_id(f"<extra_id_{i}>") for i in (0, 1, 99)] == [last, last - 1, last - 99]
    write_json(tmp_path, tokenizer_config={"extra_ids": 2})
    assert load_tokenizer(tmp_path).get_vocab_size() == last + 1 - 98


def test_any_tokenizer_json_is_taken_as_it_is(tmp_path):
    """One that no class of transformers builds: characters merged, digits apart, its own template."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits()])
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>"]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <s>", pair="$A <s> $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_tokens([AddedToken("MyTok", normalized=False), AddedToken("<ent>", special=True, lstrip=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"})
    compare(tmp_path, saved(tmp_path), 300)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (bert, {"do_lower_case": False}),
        (bert, {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False}),
        (gpt2, {"add_prefix_space": True}),
        (roberta, {"add_prefix_space": True}),
    ],
    ids=["bert", "bert-accents", "gpt2", "roberta"],
)
def test_tokenizer_config_overrules_tokenizer_json(tmp_path, make, settings):
    folder = make(tmp_path / "first")
    before = load_tokenizer(folder).encode("École 中文").tokens
    saved(folder).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | settings
    write_json(tmp_path, tokenizer_config=config)
    compare(tmp_path, saved(tmp_path), 300)
    assert load_tokenizer(tmp_path).encode("École 中文").tokens != before


@pytest.mark.parametrize("kind", ["bert", "gpt2-added", "roberta-older", "t5"])
def test_a_copy_of_a_folder_has_the_same_tokenizer(folder_of, tmp_path, kind):
    folder, _ = folder_of(kind, "vocabulary")
    copy_tokenizer(folder, tmp_path)
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")  # as a checkpoint has one of its own
    assert load_tokenizer(tmp_path).to_str() == load_tokenizer(folder).to_str()


# Which kind it is


@pytest.mark.parametrize(
    ("files", "config", "settings", "reason"),
    [
        ("", None, {}, "no tokenizer.json and no vocab.txt, vocab.json with merges.txt, or a SentencePiece model"),
        (
            "bpe",
            None,
            {},
            "no file says which tokenizer this vocab.json and merges.txt belongs to; save it with a token",
        ),
        (
            "spiece",
            None,
            {},
            "no file says which tokenizer this spiece.model belongs to; save it with a tokenizer.json, or",
        ),
        ("bpe vocab", None, {}, "no file says which tokenizer this vocab.txt and vocab.json and merges"),
        ("vocab", {"model_type": "esm"}, {}, "no tokenizer is known here for model_type 'esm'"),
        ("spiece", {"model_type": "xlnet"}, {}, "one of BertTokenizer, DistilBertTokenizer, ElectraTokenizer, Mobile"),
        ("bpe", {"model_type": "gpt2"}, {"tokenizer_class": "CLIPTokenizerFast"}, "a CLIPTokenizer is more than its"),
        ("vocab", {"tokenizer_class": "BertJapaneseTokenizer"}, {}, "a BertJapaneseTokenizer is more than its vocab"),
        ("bpe", {"model_type": "bert"}, {}, "a BertTokenizer needs a tokenizer.json, or vocab.txt: no vocab.txt here"),
        ("vocab", {"model_type": "t5"}, {}, "a T5Tokenizer needs a tokenizer.json, or spiece.model: no spiece.model"),
        ("vocab", {"model_type": "roberta"}, {}, "or vocab.json and merges.txt: no vocab.json and no merges.txt here"),
    ],
)
def test_a_folder_that_does_not_say_which_tokenizer_it_has(tmp_path, files, config, settings, reason):
    if "bpe" in files:
        write_byte_level_bpe(tmp_path, ["<|endoftext|>"])
    if "vocab" in files:
        write_vocab(tmp_path)
    if "spiece" in files:
        (tmp_path / "spiece.model").write_bytes(model_of(PIECES))
    write_json(tmp_path, tokenizer_config=settings, **({"config": config} if config else {}))
    with pytest.raises(DataError, match=re.escape(reason)) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")


@pytest.mark.parametrize("said", ["tokenizer_config", "config", "model_type"])
def test_where_a_folder_says_which_tokenizer_it_has(tmp_path, said):
    """A folder with the vocabularies of all kinds; tokenizer_config.json comes before config.json."""
    write_vocab(tmp_path)
    write_byte_level_bpe(tmp_path, ROBERTA_SPECIAL)
    if said == "tokenizer_config":
        files = {"tokenizer_config": {"tokenizer_class": "RobertaTokenizerFast"}, "config": {"model_type": "bert"}}
    elif said == "config":
        files = {"config": {"tokenizer_class": "RobertaTokenizer", "model_type": "bert"}}
    else:
        files = {"config": {"model_type": "roberta"}}
    write_json(tmp_path, **files)
    compare(tmp_path, saved(tmp_path, mask_token=AddedToken("<mask>", lstrip=True, special=True)), 20)


# F14: broken files


def varint(value: int) -> bytes:
    content = b""
    while value > 127:
        content, value = content + bytes([value & 127 | 128]), value >> 7
    return content + bytes([value])


def message(*fields: tuple[int, object]) -> bytes:
    """Protobuf's wire format of (number, value) pairs."""
    content = b""
    for number, value in fields:
        if isinstance(value, float):
            content += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            content += varint(number << 3) + varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            content += varint(number << 3 | 2) + varint(len(value)) + value
    return content


def charsmap(replacements: bytes = b"a\0", children: int = 256) -> bytes:
    """A table that puts what begins at the replacements' first byte for A: the root, the node of A and its value."""
    units = np.arange(1024, dtype="<u4") & 255  # an unused unit is one that no byte leads to
    units[0] = children << 10
    units[256 ^ ord("A")] = (512 << 10) | 256 | ord("A")
    units[256 ^ ord("A") ^ 512] = 1 << 31
    return struct.pack("<I", units.nbytes) + units.tobytes() + replacements


PIECES = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁", -2.0, 1), ("a", -1.0, 1), ("▁a", -1.5, 1)]


def model_of(pieces, trainer=((3, 1), (40, 2)), normalizer=(), **more: bytes) -> bytes:
    content = b"".join(message((1, message((1, piece), (2, score), (3, kind)))) for piece, score, kind in pieces)
    return content + message((2, message(*trainer)), (3, message(*normalizer)))


def test_spiece_model_is_read_field_by_field(tmp_path):
    path = write_json(tmp_path, config={"model_type": "t5"}) / "spiece.model"
    path.write_bytes(model_of(PIECES, normalizer=[(2, charsmap())]) + message((9, "unknown"), (8, 1), (7, 1.0)))
    model = read_sentencepiece(path)
    assert list(zip(*zip(*model.pieces, strict=True), model.types, strict=True)) == PIECES
    assert (model.model_type, model.unk_id, model.unusual_spacing, model.charsmap) == ("unigram", 2, "", charsmap())
    assert load_tokenizer(tmp_path).encode("A aA").tokens == ["▁a", "▁a", "a", "</s>"]


def test_spiece_model_equals_the_sentencepiece_package(tmp_path):
    path = t5(tmp_path, {"user_defined_symbols": ["<usr>"]}) / "spiece.model"
    theirs = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(path))
    ours = read_sentencepiece(path)
    ids = range(theirs.get_piece_size())
    assert ours.pieces == [(theirs.id_to_piece(i), theirs.get_score(i)) for i in ids]
    assert [kind == 3 for kind in ours.types] == [theirs.is_control(i) for i in ids]
    assert ours.unk_id == theirs.unk_id()


BAD_SPIECE = {
    "empty": (b"", "it has no pieces"),
    "text": (b"version https://example.org/spec/v1\n", "not a SentencePiece model"),
    "truncated": (model_of(PIECES)[:-3], "it ends inside"),
    "no end of a number": (b"\xff" * 11, "a number of more than ten bytes"),
    "group": (b"\x0b", "a field of wire type 3"),
    "piece is a number": (message((1, 5)), "a piece is a number"),
    "piece without text": (model_of([*PIECES, ("", 0.0, 1)]), "piece 6 is empty"),
    "piece twice": (model_of([*PIECES, ("▁", -3.0, 1)]), "pieces 3 and 6 are both '▁'"),
    "piece not UTF-8": (model_of([*PIECES, (b"\xff", -3.0, 1)]), "codec can't decode"),
    "score NaN": (model_of([*PIECES, ("b", float("nan"), 1)]), "a score is not a finite number"),
    "score infinite": (model_of([*PIECES, ("b", float("-inf"), 1)]), "a score is not a finite number"),
    "score a number": (model_of([*PIECES, ("b", 3, 1)]), "field 2 is a int, a bytes is needed"),
    "unk_id": (model_of(PIECES, [(40, 6)]), "unk_id = 6, of 6 pieces"),
    "unk_id negative": (model_of(PIECES, [(40, 2**64 - 1)]), "unk_id = 18446744073709551615"),
    "no end token": (model_of([PIECES[0], *PIECES[2:]], [(40, 1)]), "no token '</s>', which every text needs"),
    "bpe": (model_of(PIECES, [(3, 2), (40, 2)]), "a bpe model, T5's is unigram; save it with a tokenizer.json"),
    "no prefix": (model_of(PIECES, normalizer=[(3, 0)]), "add_dummy_prefix = false differs from T5's"),
    "spaces": (model_of(PIECES, normalizer=[(4, 0), (5, 0)]), "remove_extra_whitespaces = false, escape_whitespaces ="),
    "suffix": (model_of(PIECES, [(3, 1), (24, 1), (40, 2)]), "treat_whitespace_as_suffix = true differs"),
    "sentinel": (model_of([*PIECES, ("<extra_id_7>", 0.0, 4)]), "'<extra_id_7>' is a piece; set extra_ids = 0"),
    "table cut": (model_of(PIECES, normalizer=[(2, charsmap()[:99])]), "a table of normalizations of 4096 bytes"),
    "table empty": (model_of(PIECES, normalizer=[(2, bytes(4))]), "a table of normalizations of 0 bytes"),
    "table outside": (model_of(PIECES, normalizer=[(2, charsmap(children=9_999))]), "that leads out of itself"),
    "replacement not there": (model_of(PIECES, normalizer=[(2, charsmap(b""))]), "a replacement that begins inside"),
    "replacement not UTF-8": (model_of(PIECES, normalizer=[(2, charsmap(b"\xff\0"))]), "codec can't decode"),
}


@pytest.mark.parametrize(("content", "reason"), BAD_SPIECE.values(), ids=BAD_SPIECE)
def test_f14_broken_spiece_model_is_a_sentence(tmp_path, content, reason):
    path = write_json(tmp_path, config={"model_type": "t5"}) / "spiece.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(reason)) as caught:
        load_tokenizer(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_f14_mutated_spiece_models_are_refused_or_encode(tmp_path, capfd):
    """In the pieces, at the table of normalizations and anywhere: a sentence, or a tokenizer that no text ends."""
    path = t5(tmp_path) / "spiece.model"
    whole, rng, texts = path.read_bytes(), random.Random(0), odd_texts(40)
    table = whole.rindex(read_sentencepiece(path).charsmap)
    assert table < 4_000 < len(whole) - table  # so that the ranges below are what they are meant to be
    refused = 0
    for i in range(400):
        content = bytearray(whole)
        end = (table, table + 2_000, len(whole))[i % 3]
        for _ in range(rng.choice((1, 1, 3, 30))):
            content[rng.randrange(max(0, end - 4_000), end)] = rng.randrange(256)
        path.write_bytes(content if i % 7 else content[: rng.randrange(len(content))])
        try:
            tokenizer = load_tokenizer(tmp_path)
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
        else:
            tokenizer.encode_batch(texts)
    assert 200 < refused < 400
    assert "panicked" not in capfd.readouterr().err


BAD_BPE = {
    "vocab a list": ("vocab.json", '["a"]', "vocab.json: a JSON object is needed, not a list"),
    "vocab not JSON": ("vocab.json", '{"a": 0', "vocab.json: not JSON"),
    "vocab empty": ("vocab.json", "", "vocab.json: not JSON"),
    "id a text": ("vocab.json", '{"a": "0"}', "vocab.json: the id of 'a' should be a number from 0, not '0'"),
    "id true": ("vocab.json", '{"a": true}', "vocab.json: the id of 'a' should be a number from 0, not True"),
    "id negative": ("vocab.json", '{"a": -1}', "vocab.json: the id of 'a' should be a number from 0, not -1"),
    "id twice": ("vocab.json", '{"a": 0, "b": 1, "c": 1}', "vocab.json: 'b' and 'c' both have the id 1"),
    "gap": ("vocab.json", '{"a": 0, "b": 2}', "vocab.json: no token has the id 1, though there are ids up to 2"),
    "gap at 0": ("vocab.json", '{"a": 1, "b": 2}', "vocab.json: no token has the id 0, though there are ids up to 2"),
    "id huge": ("vocab.json", '{"a": 99999999999999999999}', "vocab.json: no token has the id 0"),
    "token twice": ("vocab.json", '{"a": 0, "b": 1, "a": 2}', "vocab.json: no token has the id 0"),
    "no special": ("vocab.json", '{"a": 0, "b": 1, "ab": 2}', "vocab.json: no token '</s>', which every text needs"),
    "merge of one": ("merges.txt", "#version: 0.2\na b\na\n", "merges.txt:3: two tokens with a space between are"),
    "merge of three": ("merges.txt", "a b\na b c\n", "merges.txt:2: two tokens with a space between are needed, not"),
    "merge empty": ("merges.txt", "a b\n\n", "merges.txt:2: two tokens with a space between are needed, not ''"),
    "merge unknown": ("merges.txt", "a b\nb a\n", "merges.txt:2: vocab.json has no token 'ba'"),
    "merges not UTF-8": ("merges.txt", b"\xff \xfe\n", "merges.txt: not UTF-8: "),
}


@pytest.mark.parametrize(("file", "content", "reason"), BAD_BPE.values(), ids=BAD_BPE)
def test_f14_broken_vocab_json_and_merges_are_a_sentence(tmp_path, file, content, reason):
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "a", "b", "ab"])}
    write_json(tmp_path, config={"model_type": "roberta"}, vocab=vocab)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    assert load_tokenizer(tmp_path).encode("ab").tokens == ["<s>", "ab", "</s>"]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=re.escape(reason)) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"extra_ids": -1}, "extra_ids = -1 should be 0 to 10,000"),
        ({"extra_ids": True}, "extra_ids = True should be 0 to 10,000"),
        ({"extra_ids": 10**9}, "extra_ids = 1000000000 should be 0 to 10,000"),
        ({"eos_token": "<end>"}, "spiece.model: no token '<end>'"),
        ({"add_prefix_space": "no"}, "tokenizer_config.json: add_prefix_space = 'no' should be true or false"),
    ],
)
def test_f14_broken_settings_of_t5(tmp_path, settings, reason):
    write_json(tmp_path, config={"model_type": "t5"}, tokenizer_config=settings)
    (tmp_path / "spiece.model").write_bytes(model_of(PIECES))
    with pytest.raises(DataError, match=re.escape(reason)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("split_special", [False, True])
@pytest.mark.parametrize("kind", ["RobertaTokenizer", "GPT2Tokenizer"])
def test_words_split_by_others_are_encoded_as_in_transformers(tmp_path, kind, split_special):
    """With add_prefix_space, and a word that is literally a special token, has one in it, or begins with a space."""
    transformers = pytest.importorskip("transformers")
    special = ["<s>", "</s>", "<pad>", "<unk>", "<mask>"] if kind == "RobertaTokenizer" else ["<|endoftext|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate([*special, *letters])}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, add_prefix_space=True)
    ours = load_tokenizer(tmp_path)
    ours.encode_special_tokens = split_special
    first, last = special[0], special[-1]
    # With split_special_tokens, transformers itself still finds these tokens in words: compare those without any.
    marked = [] if split_special else [*special, f"a{first}", f"{first}b", f"x{last}y", first + last, f" {first}"]
    pieces = [*marked, "the", "cat", "é", "中", "...", " lead", "trail ", "a b", "\u00a0"]
    rng = random.Random(0)
    for _ in range(100):
        words = [rng.choice(pieces) for _ in range(rng.randint(1, 6))]
        expected = theirs(words, is_split_into_words=True)
        found = ours.encode(add_spaces(words, ours), is_pretokenized=True)
        assert (found.ids, found.word_ids) == (expected["input_ids"], expected.word_ids()), words
    if split_special:
        ids = ours.encode(add_spaces(["a", *special], ours), is_pretokenized=True, add_special_tokens=False).ids
        assert not {ours.token_to_id(token) for token in special} & set(ids)
