"""A checkpoint's tokenizer, from the files beside its weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer

from data.errors import DataError

# Copied from a checkpoint to those made from it, as they are.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


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
    except DataError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise DataError(f"{folder}: the tokenizer cannot be read: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _from_vocab(folder: Path) -> Tokenizer:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    wordpiece = BertWordPieceTokenizer(
        str(folder / "vocab.txt"),
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    return wordpiece._tokenizer


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
