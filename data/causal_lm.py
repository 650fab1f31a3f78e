"""Texts for a causal language model: every token is predicted from those before it, from the first to the end of text.

A text is read behind an end-of-text token and is itself followed by one (as in GPT-2's training data: Radford et al.
2019), so that its first token and its end are predicted like all others. Nothing is masked by what an id is: a pad that
is also the end of text, as GPT-2 has it, still leaves every end a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding, Tokenizer

from data import text_classification as text
from data.errors import DataError, ErrorList
from data.examples import TextExamples, count_notes
from data.formats import rows as readers
from data.formats.rows import Row

END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "[SEP]")  # of GPT-2; of others; of GPT-2 with BERT's vocabulary


@dataclass(frozen=True)
class LanguageModelRecord:
    """What N labelled examples of a language model are evaluated with."""

    tokenizer: Tokenizer
    end_token_id: int  # the token that ends a text
    num_bytes: np.ndarray  # (N,) int64: UTF-8 bytes that the targets of each example stand for


@dataclass(frozen=True)
class PromptRecord:
    """What N prompts are continued with."""

    tokenizer: Tokenizer
    end_token_id: int  # the token that ends a text
    num_dropped: np.ndarray  # (N,) int64: tokens that each prompt lost at its beginning


def end_token(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a text: the first of END_TOKENS that the vocabulary has; DataError for none."""
    for token in END_TOKENS:
        if (found := tokenizer.token_to_id(token)) is not None:
            return found
    raise DataError(f"the tokenizer has no token that ends a text; one of {', '.join(END_TOKENS)} is needed")


def read_texts(
    name: str,
    column: str,
    *,
    group: str = "",
    id_column: str = "id",
    format: str = "auto",
    may_be_empty: bool = False,
) -> list[Row]:
    """Rows with a text in `column`: from .jsonl, .csv and .tsv, or one a non-empty line of a .txt (format text).

    may_be_empty: the texts are prompts, and an empty one is continued too. DataError with all the bad lines.
    """
    errors = ErrorList()
    if format == "text" or (format == "auto" and readers.locate(name).suffix.lower() == ".txt"):
        if group:
            raise DataError(
                f"{name}: lines of text have no column {group!r}; drop data.group_column, or give a .jsonl file"
            )
        rows = _read_lines(name, column, errors)
    else:
        rows = readers.read_rows(name, [column, *([group] if group else [])], id_column, errors, format)
    checked = [row for row in rows if not (may_be_empty and row.values[column] == "")]
    text.check_rows(name, checked, [column], "", errors)
    errors.raise_if_any()
    return rows


def _read_lines(name: str, column: str, errors: ErrorList) -> list[Row]:
    path = readers.locate(name)
    rows: list[Row] = []
    try:
        for line, content in readers.clean_lines(path, errors):
            if content.strip():
                rows.append(Row(str(len(rows) + 1), line, {column: content}))
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    if not rows and not errors:
        raise DataError(f"{name}: no lines of text")
    return rows


def encode_language(
    rows: Sequence[Row], tokenizer: Tokenizer, *, column: str = "text", max_length: int, concatenate: bool = False
) -> TextExamples[LanguageModelRecord]:
    """Examples of at most max_length tokens in which each token of each text, and its end, is a target exactly once.

    A longer text goes on in further examples, `7#2` and so on, whose first input is the last target of the one before.
    concatenate: all texts make one, end to end, which is split into blocks of max_length tokens.
    """
    end = end_token(tokenizer)
    targets, sizes = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    counts = []
    for content, encoding in encodings([row.values[column] for row in rows], tokenizer):
        targets.append(np.array([*encoding.ids, end], dtype=np.int64))
        sizes.append(bytes_of_tokens(content, encoding))
        counts.append(len(encoding.ids) + 1)
    labels = np.concatenate(targets)
    inputs = np.concatenate([[end], labels])[:-1].astype(np.int32)  # the target before; each text's last one is the end
    begins, ids = [], []
    if concatenate:
        begins = list(range(0, len(labels), max_length))
        ids = [f"block {i + 1}" for i in range(len(begins))]
    else:
        start = 0
        for row, count in zip(rows, counts, strict=True):
            pieces = range(start, start + count, max_length)
            begins += pieces
            ids += [row.id, *(f"{row.id}#{i}" for i in range(2, len(pieces) + 1))]
            start += count
    offsets = np.array([*begins, len(labels)], dtype=np.int64)
    spent = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return TextExamples(
        input_ids=inputs,
        token_type_ids=np.zeros(len(inputs), dtype=np.uint8),
        offsets=offsets,
        labels=None,
        token_labels=labels,
        ids=ids,
        truncated=0,
        record=LanguageModelRecord(tokenizer, end, np.diff(spent[offsets])),
    )


def encode_prompts(
    rows: Sequence[Row], tokenizer: Tokenizer, *, column: str = "text", max_length: int
) -> TextExamples[PromptRecord]:
    """Encode texts to be continued, each behind an end-of-text token; of a longer one the last max_length tokens."""
    end = end_token(tokenizer)
    prompts = [[end, *encoding.ids] for _, encoding in encodings([row.values[column] for row in rows], tokenizer)]
    return pack_prompts([row.id for row in rows], prompts, tokenizer, max_length)


def pack_prompts(
    ids: list[str], prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, max_length: int
) -> TextExamples[PromptRecord]:
    """Return unlabelled examples of the last max_length tokens of each prompt."""
    kept = [prompt[-max_length:] for prompt in prompts]
    dropped = np.array([len(prompt) - len(rest) for prompt, rest in zip(prompts, kept, strict=True)], dtype=np.int64)
    lengths = [len(prompt) for prompt in kept]
    return TextExamples(
        input_ids=np.array([token for prompt in kept for token in prompt], dtype=np.int32),
        token_type_ids=np.zeros(sum(lengths), dtype=np.uint8),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=None,
        ids=ids,
        truncated=int(np.count_nonzero(dropped)),
        notes=note_dropped(dropped),
        record=PromptRecord(tokenizer, end_token(tokenizer), dropped),
    )


def note_dropped(num_dropped: np.ndarray) -> tuple[str, ...]:
    """Return the note about prompts that lost tokens; num_dropped: (N,) of each."""
    return count_notes((int(np.count_nonzero(num_dropped)), "prompt", "truncated to its last data.max_length tokens"))


def encodings(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[tuple[str, Encoding]]:
    """Each text with its tokens, without special ones around it; a chunk of them in memory at a time."""
    for chunk in text.in_chunks(texts):
        yield from zip(chunk, tokenizer.encode_batch(chunk, add_special_tokens=False), strict=True)


def bytes_of_tokens(content: str, encoding: Encoding) -> np.ndarray:
    """(tokens + 1,) int64: the UTF-8 bytes of the text that each token and the end stand for; together all of them.

    What no token stands for belongs to the token before it, or to the first. Of a character in several tokens the last
    one has the bytes.
    """
    codes = np.frombuffer(content.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    before = np.concatenate([[0], np.cumsum(widths)])  # bytes before each character, and in all
    begins = np.array([begin for begin, _ in encoding.offsets], dtype=np.int64)
    if not len(begins):
        return before[-1:]
    begins[0] = 0
    return np.append(np.diff(before[begins], append=before[-1]), 0)
