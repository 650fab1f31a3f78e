"""A checkpoint's tokenizer, from the files beside its weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from data.errors import DataError

# Copied from a checkpoint to those made from it, as they are.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt")

SPECIAL = {role: f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")}
# In tokenizer_config.json, with their defaults; accents are stripped as letters are lower-cased unless it says.
FLAGS: dict[str, Any] = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
# Those that a vocab.txt and a few flags say all about; a Japanese one, say, also needs a splitter of words.
FROM_VOCAB = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer")


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json where there is one, else BERT's vocab.txt with the flags of tokenizer_config.json.

    The file's own padding and truncation are switched off: the length is the recipe's to decide, and nothing is padded.
    """
    # Said once and explicitly, so that worker processes forked after the encoding do not warn about it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.txt").is_file():
            tokenizer = _from_vocab(folder)
        else:
            raise DataError(f"{folder}: no tokenizer.json and no vocab.txt")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        for first_texts in (("a \N{SNOWMAN}",), ("a text", "its pair")):
            tokenizer.encode(*first_texts)  # some broken files can be read, and fail here
    except (DataError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the tokenizers library raises bare Exceptions, and panics that are not even that
        raise DataError(f"{folder}: the tokenizer cannot be used: {error}") from None
    return tokenizer


def _from_vocab(folder: Path) -> Tokenizer:
    """BERT's tokenizer: clean, split Chinese, lower-case, strip accents, WordPiece; [CLS] text [SEP] (pair [SEP]).

    The flags and added tokens are those that transformers writes beside vocab.txt.
    """
    settings = _read_object(folder / "special_tokens_map.json") | _read_object(folder / "tokenizer_config.json")
    kind = settings.get("tokenizer_class") or "BertTokenizer"
    if str(kind).removesuffix("Fast") not in FROM_VOCAB:
        raise DataError(f"{folder}: a {kind} is more than its vocab.txt; save it with a tokenizer.json")
    path = folder / "vocab.txt"
    tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocab = {token.removesuffix("\r"): i for i, token in enumerate(tokens)}
    special = {role: _content(settings.get(f"{role}_token") or name) for role, name in SPECIAL.items()}
    for role in ("unk", "sep", "cls"):
        if special[role] not in vocab:
            raise DataError(f"{path}: no token {special[role]!r}, which every text needs")
    flags = {name: settings.get(name, default) for name, default in FLAGS.items()}
    for name, value in flags.items():
        if value is not FLAGS[name] and not isinstance(value, bool):
            raise DataError(f"{folder / 'tokenizer_config.json'}: {name} = {value!r} should be true or false")

    tokenizer = Tokenizer(WordPiece(vocab, unk_token=special["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=flags["tokenize_chinese_chars"],
        strip_accents=flags["strip_accents"],
        lowercase=flags["do_lower_case"],
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    sep, cls = ((special[role], vocab[special[role]]) for role in ("sep", "cls"))
    tokenizer.post_processor = processors.BertProcessing(sep, cls)
    tokenizer.decoder = decoders.WordPiece()
    # Found whole in a text, before it is lower-cased.
    tokenizer.add_special_tokens([token for token in special.values() if token in vocab])
    _add_tokens(tokenizer, folder, settings)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, folder: Path, settings: dict[str, Any]) -> None:
    """The tokens that were added after pretraining, with the ids that the embedding has for them."""
    tokens = {int(i): AddedToken(**token) for i, token in settings.get("added_tokens_decoder", {}).items()}
    if not tokens:  # the older form: {token: id}
        tokens = {i: AddedToken(token) for token, i in _read_object(folder / "added_tokens.json").items()}
    for i, token in sorted(tokens.items()):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != i:
            have = tokenizer.token_to_id(token.content)
            raise DataError(f"{folder}: the added token {token.content!r} should have the id {i}, it comes to {have}")
    more = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    if not isinstance(more, list):
        raise DataError(
            f"{folder}: the special tokens should be a list, this is {more!r}; save it with a tokenizer.json"
        )
    tokenizer.add_special_tokens([_content(token) for token in more])


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, an empty one where there is no file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: a JSON object is needed, this is a {type(values).__name__}")
    return values


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files that `source` has, as they are, from one checkpoint folder to another."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
