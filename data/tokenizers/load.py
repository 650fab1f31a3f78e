"""The tokenizer of a checkpoint, from the files beside its weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordPiece

from data.errors import DataError, ErrorList
from data.tokenizers import unigram
from data.tokenizers.limits import check_file, check_tokenizer, read_limited, without_panics
from data.tokenizers.sentencepiece import CONTROL, USER_DEFINED, read_sentencepiece
from data.tokenizers.special import make_special_tokens_splittable, require_tokens

VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "spm.model")
# Copied unchanged from a checkpoint to those made from it.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", *VOCABULARIES)
COMPANIONS = ("generation_config.json", "preprocessor_config.json")  # settings of generation and of images

# Settings of tokenizer_config.json that are true or false; those of BERT with their names in the tokenizers library.
BERT_FLAGS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
FLAGS = (
    *BERT_FLAGS,
    *("add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens", "keep_accents", "split_by_punct"),
)
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

Settings = dict[str, Any]  # the content of tokenizer_config.json
Special = dict[str, AddedToken]  # {role: token}


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of tokenizer.json; without that file, of a vocabulary and tokenizer_config.json.

    The file's own padding and truncation are switched off: the recipe decides the length, and nothing is padded.
    Raises DataError where there is no tokenizer, where no file says its class, or where a file is damaged.
    """
    # Set explicitly, so that worker processes forked after the encoding do not warn about it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        with without_panics():
            return _load(folder)
    except (DataError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the library raises plain Exceptions, and panics that are no Exceptions
        raise DataError(f"{folder}: the tokenizer cannot be used: {error}") from None


def _load(folder: Path) -> Tokenizer:
    settings, path = _read_settings(folder), folder / "tokenizer.json"
    if path.is_file():
        check_file(path)
        tokenizer = Tokenizer.from_file(str(path))
        check_tokenizer(tokenizer, path)
    else:
        tokenizer = _from_vocabulary(folder, settings)
    _set_flags(tokenizer, settings)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for first_texts in (("a \N{SNOWMAN}",), ("a text", "its pair")):
        tokenizer.encode(*first_texts)  # some broken files can be read but fail here
    make_special_tokens_splittable(tokenizer)
    return tokenizer


def _read_settings(folder: Path) -> Settings:
    """Return the content of tokenizer_config.json; DataError where a flag is neither true nor false."""
    settings = read_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:  # a folder of an older version
        settings |= read_object(folder / "special_tokens_map.json")
    for name in FLAGS:
        if not isinstance(settings.get(name), bool | None):
            path = folder / "tokenizer_config.json"
            raise DataError(f"{path}: {name} = {settings[name]!r} should be true or false")
    return settings


def _set_flags(tokenizer: Tokenizer, settings: Settings) -> None:
    """Apply the flags of tokenizer_config.json, which overrule a tokenizer.json, as in transformers."""
    if isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        for name, attribute in BERT_FLAGS.items():
            if settings.get(name) is not None:
                setattr(tokenizer.normalizer, attribute, settings[name])
    if settings.get("add_prefix_space") is not None:
        for part in (tokenizer.pre_tokenizer, tokenizer.post_processor):
            if isinstance(part, pre_tokenizers.ByteLevel | processors.RobertaProcessing):
                part.add_prefix_space = settings["add_prefix_space"]
    tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens"))


# From a vocabulary


@dataclass(frozen=True)
class TokenizerClass:
    """A class of tokenizers that is built from a vocabulary and a few settings."""

    files: tuple[str, ...]
    special: dict[str, Any]  # {role: token}, unless the settings name another token
    # (folder, settings, special tokens) -> (the tokenizer, further tokens that are never split)
    build: Callable[[Path, Settings, Special], tuple[Tokenizer, list[AddedToken]]]


def _from_vocabulary(folder: Path, settings: Settings) -> Tokenizer:
    name, tokenizer_class = _find_class(folder, settings)
    if missing := [file for file in tokenizer_class.files if not (folder / file).is_file()]:
        needed = " and ".join(tokenizer_class.files)
        raise DataError(f"{folder}: a {name} needs a tokenizer.json, or {needed}: no {' and no '.join(missing)} here")
    named = {role: settings[f"{role}_token"] for role in ROLES if settings.get(f"{role}_token")}
    special = {role: _special_token(token) for role, token in (tokenizer_class.special | named).items()}
    tokenizer, tokens = tokenizer_class.build(folder, settings, special)
    more = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    if not isinstance(more, list):
        raise DataError(f"{folder}: the special tokens should be a list, not {more!r}; save it with a tokenizer.json")
    more = [_special_token(token) for token in more]
    listed = _listed_tokens(folder, settings, {token.content for token in [*special.values(), *more]})
    # Usual tokens only where the vocabulary has them; named ones are appended where it does not.
    known = tokenizer.get_vocab()
    usual = [token for role, token in special.items() if role in named or token.content in known]
    unsplit: dict[str, AddedToken] = {}
    for token in [*listed.values(), *usual, *more, *tokens]:
        unsplit.setdefault(token.content, token)  # the first one decides whether the spaces around belong to it
    tokenizer.add_tokens(list(unsplit.values()))
    for i, token in listed.items():
        if (found := tokenizer.token_to_id(token.content)) != i:
            raise DataError(f"{folder}: the added token {token.content!r} should have the id {i}, it gets {found}")
    return tokenizer


def _find_class(folder: Path, settings: Settings) -> tuple[str, TokenizerClass]:
    """Return (name of transformers' class, its TokenizerClass), as the files name it or by their model_type.

    A vocab.txt beside files that do not say is BERT's, since the early checkpoints have only that.
    """
    found = [name for name in VOCABULARIES if (folder / name).is_file()]
    if not found:
        raise DataError(
            f"{folder}: no tokenizer.json and no vocab.txt, vocab.json with merges.txt, or a SentencePiece model"
        )
    config = read_object(folder / "config.json")
    model_type = str(config.get("model_type") or "")
    name = settings.get("tokenizer_class") or config.get("tokenizer_class") or MODEL_TYPES.get(model_type)
    if not name and found == ["vocab.txt"] and not model_type:
        name = "BertTokenizer"
    if not name:
        unnamed = f"no file says which tokenizer this {' and '.join(found)} belongs to"
        unknown = f"no tokenizer is known here for model_type {model_type!r}"
        raise DataError(
            f"{folder}: {unknown if model_type else unnamed}; save it with a tokenizer.json, or name a tokenizer_class "
            f"in tokenizer_config.json: one of {', '.join(TOKENIZER_CLASSES)}"
        )
    name = str(name).removesuffix("Fast")
    if name not in TOKENIZER_CLASSES:  # a Japanese one, for example, also needs a word splitter
        raise DataError(f"{folder}: a {name} is more than its {' and '.join(found)}; save it with a tokenizer.json")
    return name, TOKENIZER_CLASSES[name]


def _listed_tokens(folder: Path, settings: Settings, special: set[str]) -> dict[int, AddedToken]:
    """Return {id: token} of the tokens that were added after pretraining, sorted by id."""
    listed = {int(i): AddedToken(**token) for i, token in (settings.get("added_tokens_decoder") or {}).items()}
    if not listed:  # the older form: {token: id}
        older = read_object(folder / "added_tokens.json")
        listed = {i: AddedToken(token, special=token in special) for token, i in older.items()}
    for token in listed.values():
        token.special = token.special or token.content in special
    return dict(sorted(listed.items()))


def _special_token(token: str | dict[str, Any]) -> AddedToken:
    """Return a token that is never split, and that decoding leaves out.

    It is found before the text is normalized, unless the token has normalized = true.
    """
    flags = {"content": token} if isinstance(token, str) else {k: v for k, v in token.items() if k != "__type"}
    return AddedToken(**flags | {"special": True})


def _word_piece(folder: Path, settings: Settings, special: Special) -> tuple[Tokenizer, list[AddedToken]]:
    """Build BERT's: clean, split Chinese, lower-case, strip accents, WordPiece; [CLS] text [SEP] (pair [SEP])."""
    path = folder / "vocab.txt"
    vocab = {token: i for i, token in enumerate(_read_lines(path))}
    unk, sep, cls = require_tokens(path, vocab, special, "unk", "sep", "cls")
    tokenizer = Tokenizer(WordPiece(vocab, unk_token=unk[0]))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(sep, cls)
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, []


def _gpt2(folder: Path, settings: Settings, special: Special) -> tuple[Tokenizer, list[AddedToken]]:
    """Build GPT-2's byte-level BPE: the text alone, with add_bos_token and add_eos_token also these tokens."""
    tokenizer, vocab = _byte_level_bpe(folder)
    ends = [role for role in ("bos", "eos") if settings.get(f"add_{role}_token")]
    tokens = require_tokens(folder / "vocab.json", vocab, special, *ends)
    before = special["bos"].content if "bos" in ends else ""
    after = special["eos"].content if "eos" in ends else ""
    template = [[f"{token}:{i}" for token in (before, f"${text}", after) if token] for i, text in enumerate("AB")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template[0], pair=template[0] + template[1], special_tokens=list(dict.fromkeys(tokens))
    )
    return tokenizer, []


def _roberta(folder: Path, settings: Settings, special: Special) -> tuple[Tokenizer, list[AddedToken]]:
    """Build RoBERTa's byte-level BPE: <s> text </s>, or <s> text </s></s> pair </s>, all of token type 0."""
    tokenizer, vocab = _byte_level_bpe(folder)
    sep, cls = require_tokens(folder / "vocab.json", vocab, special, "sep", "cls")
    tokenizer.post_processor = processors.RobertaProcessing(sep, cls, add_prefix_space=False)
    return tokenizer, []


def _byte_level_bpe(folder: Path) -> tuple[Tokenizer, dict[str, int]]:
    """Return (a byte-level BPE tokenizer, in which a word has the space before it; its vocabulary)."""
    vocab = _read_vocab(folder / "vocab.json")
    tokenizer = Tokenizer(BPE(vocab, _read_merges(folder / "merges.txt", vocab)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, vocab


def _t5(folder: Path, settings: Settings, special: Special) -> tuple[Tokenizer, list[AddedToken]]:
    """Build T5's SentencePiece unigrams: text </s> (pair </s>), all of token type 0.

    <extra_id_99> to <extra_id_0> follow the pieces, in this order. As in transformers, a model with byte_fallback (mT5)
    gives <unk> for unknown characters.
    """
    path = folder / "spiece.model"
    model = read_sentencepiece(path)
    if model.model_type != "unigram":
        raise DataError(f"{path}: a {model.model_type} model, T5's is unigram; save it with a tokenizer.json")
    if model.unusual_spacing:
        raise DataError(f"{path}: {model.unusual_spacing} differs from T5's; save it with a tokenizer.json")
    extra_ids = settings.get("extra_ids", 100)
    if type(extra_ids) is not int or not 0 <= extra_ids <= 10_000:
        raise DataError(f"{folder / 'tokenizer_config.json'}: extra_ids = {extra_ids!r} should be 0 to 10,000")
    extra = [f"<extra_id_{i}>" for i in reversed(range(extra_ids))]
    vocab = {piece: i for i, (piece, _) in enumerate(model.pieces)}
    if collisions := vocab.keys() & set(extra):
        raise DataError(f"{path}: {max(collisions)!r} is a piece; set extra_ids = 0 in tokenizer_config.json")
    (eos,) = require_tokens(path, vocab, special, "eos")

    tokenizer = Tokenizer(Unigram([*model.pieces, *((token, 0.0) for token in extra)], model.unk_id))
    if model.charsmap:
        tokenizer.normalizer = normalizers.Precompiled(model.charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    end = f"{eos[0]}:0"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A:0", end], pair=["$A:0", end, "$B:0", end], special_tokens=[eos]
    )
    typed = zip(model.pieces, model.types, strict=True)
    whole = {piece: kind == CONTROL for (piece, _), kind in typed if kind in (CONTROL, USER_DEFINED)}
    whole |= dict.fromkeys(extra, True)
    return tokenizer, [AddedToken(piece, special=is_special, normalized=False) for piece, is_special in whole.items()]


BERT = {role: f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")}
GPT2 = dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>")
ROBERTA: dict[str, Any] = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>"}
# A mask includes the space before the word, as in the published tokenizer.json, and in transformers before 5.
ROBERTA |= {"mask": {"content": "<mask>", "lstrip": True}}
T5 = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
TOKENIZER_CLASSES = {
    **dict.fromkeys(
        ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer"),
        TokenizerClass(("vocab.txt",), BERT, _word_piece),
    ),
    "GPT2Tokenizer": TokenizerClass(("vocab.json", "merges.txt"), GPT2, _gpt2),
    "RobertaTokenizer": TokenizerClass(("vocab.json", "merges.txt"), ROBERTA, _roberta),
    "T5Tokenizer": TokenizerClass(("spiece.model",), T5, _t5),
    "XLMRobertaTokenizer": TokenizerClass(("sentencepiece.bpe.model",), ROBERTA, unigram.xlm_roberta),
    "CamembertTokenizer": TokenizerClass(("sentencepiece.bpe.model",), ROBERTA, unigram.camembert),
    "AlbertTokenizer": TokenizerClass(("spiece.model",), BERT | {"unk": "<unk>", "pad": "<pad>"}, unigram.albert),
    "DebertaV2Tokenizer": TokenizerClass(("spm.model",), BERT, unigram.deberta),
}
MODEL_TYPES = {
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "electra": "ElectraTokenizer",
    "mobilebert": "MobileBertTokenizer",
    "ernie": "BertTokenizer",
    "gpt2": "GPT2Tokenizer",
    "roberta": "RobertaTokenizer",
    "t5": "T5Tokenizer",
    "mt5": "T5Tokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "albert": "AlbertTokenizer",
    "deberta-v2": "DebertaV2Tokenizer",
}


# Files


def _read_vocab(path: Path) -> dict[str, int]:
    """Return {token: id}; the ids are 0 to N - 1, each once, else DataError."""
    vocab = read_object(path)
    tokens: dict[int, str] = {}
    for token, i in vocab.items():
        if type(i) is not int or i < 0:
            raise DataError(f"{path}: the id of {token!r} should be a number from 0, not {i!r}")
        if (other := tokens.setdefault(i, token)) != token:
            raise DataError(f"{path}: {other!r} and {token!r} both have the id {i}")
    gap = next((i for i in range(len(vocab)) if i not in tokens), None)
    if gap is not None:
        raise DataError(f"{path}: no token has the id {gap}, though there are ids up to {max(tokens)}")
    return vocab


def _read_merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs of tokens to merge, in order of priority. Raises one DataError for all bad lines."""
    merges: list[tuple[str, str]] = []
    errors = ErrorList()
    for number, line in enumerate(_read_lines(path), 1):
        if line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            errors.add(path, number, f"two tokens with a space between are needed, not {line!r}")
        elif unknown := [token for token in (*pair, "".join(pair)) if token not in vocab]:
            errors.add(path, number, f"vocab.json has no token {unknown[0]!r}")
        else:
            merges.append((pair[0], pair[1]))
    errors.raise_if_any()
    return merges


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a file, split at line feeds only; vocabularies contain other line separators."""
    try:
        text = read_limited(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}") from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} where there is no file."""
    try:
        values = json.loads(read_limited(path)) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: a JSON object is needed, not a {type(values).__name__}")
    return values
