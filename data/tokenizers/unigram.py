"""Tokenizers of SentencePiece unigrams beside T5's: those of XLM-RoBERTa, CamemBERT, ALBERT and DeBERTa.

Each is built as transformers converts its file. The published checkpoints of the first three also have a
tokenizer.json, those of DeBERTa-v3 have only the model file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from data.errors import DataError
from data.tokenizers.sentencepiece import CONTROL, USER_DEFINED, SentencePiece, read_sentencepiece
from data.tokenizers.special import require_tokens

Built = tuple[Tokenizer, list[AddedToken]]  # further tokens that are never split
Special = dict[str, AddedToken]  # {role: token}


def xlm_roberta(folder: Path, settings: dict[str, Any], special: Special) -> Built:
    """Build XLM-RoBERTa's: <s> text </s>, or <s> text </s></s> pair </s>, all of token type 0.

    Its ids begin with <s>, <pad>, </s>, <unk>, in place of the first three pieces of the file; <mask> is the last.
    """
    path = folder / "sentencepiece.bpe.model"
    model = read_unigrams(path)
    pieces = [*((token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")), *model.pieces[3:], ("<mask>", 0.0)]
    return _like_roberta(path, model, pieces, special), []


def camembert(folder: Path, settings: dict[str, Any], special: Special) -> Built:
    """Build CamemBERT's: as XLM-RoBERTa's, with five ids before all pieces of the file but the first.

    <s> and </s> are pieces of the file; of the five ids, <pad> and <unk> are in use.
    """
    path = folder / "sentencepiece.bpe.model"
    model = read_unigrams(path)
    first = [*((token, 0.0) for token in ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>")), ("<unk>NOTUSED", -100.0)]
    pieces = [*first, *model.pieces[1:], ("<mask>", 0.0)]
    tokenizer = _like_roberta(path, model, pieces, special)
    return tokenizer, [AddedToken(token, special=True) for token, _ in first if token.endswith("NOTUSED")]


def albert(folder: Path, settings: dict[str, Any], special: Special) -> Built:
    """Build ALBERT's: lower-case and without accents unless the settings differ; [CLS] text [SEP] (pair [SEP]).

    A piece of a number with a comma at its end is never used.
    """
    path = folder / "spiece.model"
    model = read_unigrams(path)
    pieces = [(piece, score - 100 * _ends_in_number_comma(piece)) for piece, score in model.pieces]
    tokenizer = Tokenizer(Unigram(pieces, model.unk_id))
    steps: list[Any] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    if not settings.get("keep_accents"):
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if settings.get("do_lower_case") is not False:
        steps.append(normalizers.Lowercase())
    tokenizer.normalizer = normalizers.Sequence(steps + _charsmap(model))
    _split_at_spaces(tokenizer)
    _add_cls_and_sep(tokenizer, path, special)
    return tokenizer, _unsplit(model)


def deberta(folder: Path, settings: dict[str, Any], special: Special) -> Built:
    """Build that of DeBERTa-v2 and -v3: [CLS] text [SEP] (pair [SEP]); [MASK] follows the pieces of the file."""
    path = folder / "spm.model"
    model = read_unigrams(path)
    tokenizer = Tokenizer(Unigram(model.pieces, model.unk_id))
    steps: list[Any] = [normalizers.Lowercase()] if settings.get("do_lower_case") else []
    # Spaces are dropped as SentencePiece does it: after the normalization, and no other white space
    spaces = [normalizers.Replace(Regex(pattern), to) for pattern, to in ((r"\A +| +\z", ""), (" {2,}", " "))]
    tokenizer.normalizer = normalizers.Sequence([*steps, *_charsmap(model), *spaces])
    words: list[Any] = [pre_tokenizers.Punctuation("isolated")] if settings.get("split_by_punct") else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    _add_cls_and_sep(tokenizer, path, special)
    return tokenizer, [*_unsplit(model), special["mask"]]


def read_unigrams(path: Path) -> SentencePiece:
    """Return the model in a file; DataError unless it has unigrams and the usual spaces."""
    model = read_sentencepiece(path)
    if model.model_type != "unigram":
        raise DataError(f"{path}: a {model.model_type} model, and unigrams are needed; save it with a tokenizer.json")
    if model.unusual_spacing:
        raise DataError(f"{path}: {model.unusual_spacing} differs from the usual; save it with a tokenizer.json")
    return model


def _like_roberta(path: Path, model: SentencePiece, pieces: list[tuple[str, float]], special: Special) -> Tokenizer:
    """Return a tokenizer of these pieces, of which <unk> is the fourth, that adds RoBERTa's tokens."""
    if len(dict(pieces)) < len(pieces):
        raise DataError(f"{path}: its first pieces should be <unk>, <s>, </s>; save it with a tokenizer.json")
    tokenizer = Tokenizer(Unigram(pieces, 3))
    if model.charsmap:
        tokenizer.normalizer = normalizers.Precompiled(model.charsmap)
    _split_at_spaces(tokenizer)
    (cls, cls_id), (sep, sep_id) = require_tokens(path, tokenizer.get_vocab(), special, "cls", "sep")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[f"{cls}:0", "$A:0", f"{sep}:0"],
        pair=[f"{cls}:0", "$A:0", f"{sep}:0", f"{sep}:0", "$B:0", f"{sep}:0"],
        special_tokens=[(cls, cls_id), (sep, sep_id)],
    )
    return tokenizer


def _split_at_spaces(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()


def _add_cls_and_sep(tokenizer: Tokenizer, path: Path, special: Special) -> None:
    """Add BERT's tokens around a text and a pair, the pair of token type 1."""
    (cls, cls_id), (sep, sep_id) = require_tokens(path, tokenizer.get_vocab(), special, "cls", "sep")
    single = [f"{cls}:0", "$A:0", f"{sep}:0"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, "$B:1", f"{sep}:1"], special_tokens=[(cls, cls_id), (sep, sep_id)]
    )


def _charsmap(model: SentencePiece) -> list[Any]:
    return [normalizers.Precompiled(model.charsmap)] if model.charsmap else []


def _unsplit(model: SentencePiece) -> list[AddedToken]:
    """Return the pieces that are no part of a text, and those that are never split."""
    typed = zip(model.pieces, model.types, strict=True)
    whole = {piece: kind == CONTROL for (piece, _), kind in typed if kind in (CONTROL, USER_DEFINED)}
    return [AddedToken(piece, special=is_special, normalized=False) for piece, is_special in whole.items()]


def _ends_in_number_comma(piece: str) -> bool:
    return len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit()
