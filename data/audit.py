"""What an encoding does to texts, as notes: unknown tokens, texts without a token, special tokens in texts.

The tokens are counted in arrays. Texts are encoded once more only where there is something to tell, and then a sample.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from data.examples import TextExamples
from data.label_warnings import MISSING
from data.notes import SHOWN, count_of, join, list_ids, percent, quote, warn
from data.row import Row
from data.tokenizers.special import find_special_tokens, special_token_finder

SAMPLE = 300_000  # characters of texts that are encoded again, to find the words of unknown tokens
MISSING_TEXTS = {name for name in MISSING if name.strip("-?.")}  # a text may be a mark alone
RARE = "\U0010fffc"  # a character for private use, which no vocabulary has
SNOWMAN, SNOWMAN_BYTES = "\N{SNOWMAN}", "âĺĥ"  # and how a byte-level tokenizer writes its three bytes
LINE_BREAK = re.compile("[\n\r\v\f\x85\u2028\u2029]")
WORD = re.compile(r"\w")

TextsOf = Callable[[Row], Sequence[str]]  # the texts of a row that the model reads


def audit_texts(examples: TextExamples[Any], rows: Sequence[Row], texts_of: TextsOf, tokenizer: Tokenizer) -> list[str]:
    """Return notes on the texts of encoded rows: unknown tokens, texts without a token, special tokens in texts.

    The examples of a language model may be pieces of rows; in all other tasks each row is one example.
    """
    tokens = _count_tokens(examples, tokenizer)
    found = _search_texts(rows, texts_of, tokenizer)
    one_each = len(examples) == len(rows) and examples.ids[-1:] == [row.id for row in rows[-1:]]
    notes = []
    if total := int(tokens.unknown.sum()):
        chosen = np.flatnonzero(tokens.unknown) if one_each else np.arange(len(rows))
        words = _find_unknown_words(_sample(rows, chosen, texts_of), tokens.unknown_id, tokenizer)
        num_tokens = int(tokens.content.sum())
        note = f"unknown tokens: {total:,} of {num_tokens:,} ({percent(total, num_tokens)})"
        notes.append(warn(total, num_tokens, note + (f", from {join(words)}" if words else "")))
    if _may_drop_characters(tokenizer):
        notes += _describe_dropped([text for row in rows for text in texts_of(row)], tokenizer)
    if one_each:
        notes += _describe_unreadable(tokens, rows, tokenizer)
    for count, meaning in (
        (found.missing, "the name of a missing value, such as 'nan'"),
        (found.bytes, "bytes as Python prints them, b'...'"),
    ):
        if count:
            verb = "is" if count == 1 else "are"
            notes.append(warn(count, len(rows), f"{count:,} of {count_of(len(rows), 'text')} {verb} {meaning}"))
    if found.empty:
        texts = f"{len(found.empty):,} of {count_of(len(rows), 'text')}"
        notes.append(f"{texts} without a token in one of their parts {list_ids(found.empty)}")
    return notes + _describe_special("text", list(found.special.values()), len(rows), tokenizer)


def audit_targets(targets: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Return notes on texts that a model should write: what its tokens cannot write, special tokens in them."""
    found = list(filter(None, map(special_token_finder(tokenizer), targets)))
    return _describe_unwritable(targets, tokenizer) + _describe_special("target", found, len(targets), tokenizer)


def has_texts(rows: Sequence[Row], texts_of: TextsOf) -> bool:
    """Return whether the rows have texts where they should be. Those of a plugin's task may have other columns."""
    try:
        texts = [text for row in rows[:1] for text in texts_of(row)]
    except KeyError:
        return False
    return bool(texts) and all(isinstance(text, str) for text in texts)


# Tokens


class _Tokens(NamedTuple):
    """The tokens of N examples, without special ones."""

    content: np.ndarray  # (N,) number of tokens
    unknown: np.ndarray  # (N,) number of unknown ones
    unknown_id: int  # -1: no token is unknown


def _count_tokens(examples: TextExamples[Any], tokenizer: Tokenizer) -> _Tokens:
    special, unknown = find_special_tokens(tokenizer), find_unknown_id(tokenizer)
    size = max([*special.values(), int(examples.input_ids.max(initial=0))]) + 1
    is_content = np.ones(size, dtype=bool)
    is_content[[i for i in special.values() if i != unknown]] = False
    ends = examples.offsets if examples.sequences is None else examples.offsets[examples.sequences]

    def by_example(chosen: np.ndarray) -> np.ndarray:
        return np.diff(np.concatenate([[0], np.cumsum(chosen, dtype=np.int32)])[ends])

    return _Tokens(by_example(is_content[examples.input_ids]), by_example(examples.input_ids == unknown), unknown)


def find_unknown_id(tokenizer: Tokenizer) -> int:
    """Return the id of the unknown token; -1 where no token is unknown, or where it has another use too."""
    if _has_all_bytes(tokenizer):
        return -1
    try:
        tokens = tokenizer.model.tokenize(RARE)
    except Exception:  # the library's error for a WordLevel without an unknown token
        return -1
    return int(tokens[0].id) if len(tokens) == 1 and tokens[0].id not in tokenizer.encode("", "").ids else -1


def _has_all_bytes(tokenizer: Tokenizer) -> bool:
    """Return whether the tokens are bytes, and each byte has one, so that no token is unknown."""
    if tokenizer.pre_tokenizer is None or not isinstance(tokenizer.model, models.BPE):
        return False
    parts = tokenizer.pre_tokenizer.pre_tokenize_str(SNOWMAN)
    is_of_bytes = "".join(part for part, _ in parts).endswith(SNOWMAN_BYTES)
    return is_of_bytes and all(tokenizer.token_to_id(c) is not None for c in pre_tokenizers.ByteLevel.alphabet())


def _may_drop_characters(tokenizer: Tokenizer) -> bool:
    """Return whether characters that are not in the vocabulary leave no token at all, as in a BPE without one."""
    model = tokenizer.model
    return (
        isinstance(model, models.BPE)
        and not model.unk_token
        and not model.byte_fallback
        and not _has_all_bytes(tokenizer)
    )


def _sample(rows: Sequence[Row], chosen: np.ndarray, texts_of: TextsOf) -> Iterator[str]:
    """Yield the texts of some of the chosen rows, evenly spaced, of about SAMPLE characters in total."""
    characters = 0
    for i in chosen[:: 1 + len(chosen) // 2_000]:
        for text in texts_of(rows[i]):
            if characters < SAMPLE:
                yield text
            characters += len(text)


def _find_unknown_words(texts: Iterable[str], unknown_id: int, tokenizer: Tokenizer) -> list[str]:
    """Return the most frequent words that become unknown tokens; characters, where tokens are not words."""
    is_of_words = isinstance(tokenizer.model, models.WordPiece | models.WordLevel)
    longest = getattr(tokenizer.model, "max_input_chars_per_word", None) or np.inf
    read = list(texts)
    counts: Counter[str] = Counter()
    for text, encoding in zip(read, tokenizer.encode_batch(read, add_special_tokens=False), strict=True):
        for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if i == unknown_id:
                word = text[start:end].strip()
                counts.update([word] if is_of_words else word)
    too_long = sum(len(word) > longest for word in counts)
    shown = [quote(word) for word, _ in counts.most_common() if len(word) <= longest][:SHOWN]
    return shown + ([f"words of more than {longest} characters"] if too_long else [])


def _describe_unreadable(tokens: _Tokens, rows: Sequence[Row], tokenizer: Tokenizer) -> list[str]:
    """Return notes on rows of unknown tokens alone, and on rows without a token."""
    only = np.flatnonzero((tokens.unknown == tokens.content) & (tokens.unknown > 0)).tolist()
    none = np.flatnonzero(tokens.content == 0).tolist()
    notes = []
    if len(only):
        ids = list_ids([rows[i].id for i in only])
        verb = "are" if len(only) > 1 else "is"
        unknown = tokenizer.id_to_token(tokens.unknown_id)
        note = f"{len(only):,} of {count_of(len(rows), 'text')} {verb} nothing but {unknown} {ids}"
        notes.append(warn(len(only), len(rows), note))
    if len(none):
        note = f"{len(none):,} of {count_of(len(rows), 'text')} without a token {list_ids([rows[i].id for i in none])}"
        notes.append(warn(len(none), len(rows), note))
    return notes


# Texts


class _Found(NamedTuple):
    """Special tokens in the texts of rows, and texts without a token."""

    special: dict[int, str]  # {row: the first special token in one of its texts}
    empty: list[str]  # the ids of rows with several texts, one of which has no token
    missing: int  # number of rows with a text that is nan, None or the like
    bytes: int  # number of rows with a text that is Python's form of bytes


def _search_texts(rows: Sequence[Row], texts_of: TextsOf, tokenizer: Tokenizer) -> _Found:
    find_special = special_token_finder(tokenizer)
    found: dict[int, str] = {}
    wordless: list[tuple[str, str]] = []  # (id, text) of texts that might have no token
    missing = of_bytes = 0
    for i, row in enumerate(rows):
        texts = texts_of(row)
        for text in texts:
            if len(text) < 10 and text.strip().lower() in MISSING_TEXTS:
                missing += 1
            elif text[:2] in ("b'", 'b"') and len(text) > 2 and text[-1] == text[1]:
                of_bytes += 1
            if token := find_special(text):
                found.setdefault(i, token)
            if len(texts) > 1 and not WORD.search(text):
                wordless.append((row.id, text))
    encodings = tokenizer.encode_batch([text for _, text in wordless], add_special_tokens=False)
    pairs = zip(wordless, encodings, strict=True)
    empty = list(dict.fromkeys(name for (name, _), encoding in pairs if not encoding.ids))
    return _Found(found, empty, missing, of_bytes)


def _describe_special(noun: str, found: Sequence[str], total: int, tokenizer: Tokenizer) -> list[str]:
    if not found:
        return []
    (token, _), *_ = Counter(found).most_common(1)
    now, other = ("plain text", "tokens") if tokenizer.encode_special_tokens else ("tokens", "plain text")
    setting = f"data.split_special_tokens = {'false' if now == 'plain text' else 'true'}"
    verb = "contains" if len(found) == 1 else "contain"
    texts = f"{len(found):,} of {count_of(total, noun)} {verb} special tokens, such as {token!r}"
    return [f"{texts}: read as {now} ({setting} reads them as {other})"]


# Characters


def _describe_unwritable(targets: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Return a note on the targets that differ after encoding and decoding, apart from spaces, and by what."""
    composed = [_compose(text).strip() for text in targets]
    changed = _find_changed(composed, tokenizer)
    breaks = LINE_BREAK.search(tokenizer.decode(tokenizer.encode("a\nb", add_special_tokens=False).ids)) is None
    classes = [re.escape(c) for c in changed] + ([LINE_BREAK.pattern[1:-1]] if breaks else [])
    counts, num_found = _count_characters(composed, "".join(classes))
    if not num_found:
        return []
    lost = [quote(c) for c, _ in counts.most_common() if changed.get(c) == ""][:SHOWN]
    lost += ["line breaks"] if any(map(LINE_BREAK.match, counts)) else []
    others = [f"{quote(c)} becomes {quote(changed[c])}" for c, _ in counts.most_common() if changed.get(c)][:SHOWN]
    reasons = ([f"{join(lost)} {'is' if len(lost) == 1 and changed else 'are'} lost"] if lost else []) + others
    verb = "cannot be written as it is" if num_found == 1 else "cannot be written as they are"
    note = f"{num_found:,} of {count_of(len(targets), 'target')} {verb}: {', '.join(reasons)}"
    return [warn(num_found, len(targets), note)]


def _describe_dropped(texts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Return a note on the texts with characters that leave no token."""
    composed = list(map(_compose, texts))
    lost = [re.escape(c) for c, after in _find_changed(composed, tokenizer).items() if not after]
    counts, num_found = _count_characters(composed, "".join(lost))
    if not num_found:
        return []
    shown = join([quote(c) for c, _ in counts.most_common(SHOWN)])
    note = f"{num_found:,} of {count_of(len(texts), 'text')} with characters that the vocabulary lacks: {shown}"
    return [warn(num_found, len(texts), note)]


def _compose(text: str) -> str:
    """Return a text in which an accent that is a character of its own is part of its letter."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _count_characters(texts: Iterable[str], characters: str) -> tuple[Counter[str], int]:
    """Return (in how many texts each of the characters is, in how many texts any is). characters: as in a pattern."""
    counts: Counter[str] = Counter()
    num_found = 0
    pattern = re.compile(f"[{characters}]" if characters else "(?!)")
    for text in texts:
        if found := set(pattern.findall(text)):
            counts.update(sorted(found))
            num_found += 1
    return counts, num_found


def _find_changed(texts: Iterable[str], tokenizer: Tokenizer) -> dict[str, str]:
    """Return {character: what it is after encoding and decoding, "" if it is lost} of those that do not stay.

    Each character that occurs is encoded alone.
    """
    occurring: set[str] = set()
    for text in texts:
        occurring.update(text)
    characters = sorted(character for character in occurring if not character.isspace())
    unknown = find_unknown_id(tokenizer)
    encodings = tokenizer.encode_batch(characters, add_special_tokens=False)
    decoded = tokenizer.decode_batch([encoding.ids for encoding in encodings])
    after = ["" if unknown in encoding.ids else text.strip() for encoding, text in zip(encodings, decoded, strict=True)]
    return {before: text for before, text in zip(characters, after, strict=True) if text != before}
