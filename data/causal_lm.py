"""Texts for a causal language model: every token is predicted from those before it, up to the end-of-text token.

A text is read behind an end-of-text token and is itself followed by one (as in GPT-2's training data: Radford et al.
2019), so that its first token and its end are predicted like all others. No target is ignored because of its id: a
padding token that is also the end of text, as in GPT-2, leaves every end a target.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Encoding, Tokenizer

from data.errors import DataError, ErrorList
from data.examples import TextExamples, note_truncated
from data.formats.conversations import find_form
from data.formats.lines import NOT_READ, locate, suffix_of
from data.formats.memory import is_in_memory
from data.formats.options import FileOptions
from data.formats.rows import READERS, read_rows
from data.formats.text import read_lines
from data.notes import count_of
from data.row import Row, Rows
from data.text_classification import check_texts, split_into_chunks

END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "[SEP]")  # GPT-2; others; GPT-2 with BERT's vocabulary


@dataclass(frozen=True)
class LanguageModelRecord:
    """The data with which N labelled examples of a language model are evaluated."""

    tokenizer: Tokenizer
    end_token_id: int  # the token that ends a text
    num_bytes: np.ndarray  # (N,) int64: UTF-8 bytes that the targets of each example stand for


@dataclass(frozen=True)
class PromptRecord:
    """The data with which N prompts are continued."""

    tokenizer: Tokenizer
    end_token_id: int  # the token that ends a text
    num_dropped: np.ndarray  # (N,) int64: tokens that each prompt lost at its beginning


def find_end_token(tokenizer: Tokenizer) -> int:
    """Return the id of the token that ends a text: the first of END_TOKENS in the vocabulary; DataError for none."""
    for token in END_TOKENS:
        if (found := tokenizer.token_to_id(token)) is not None:
            return found
    raise DataError(f"the tokenizer has no token that ends a text; one of {', '.join(END_TOKENS)} is needed")


def read_texts(
    name: str,
    column: str,
    *,
    group: str = "",
    options: FileOptions = FileOptions(),
    may_be_empty: bool = False,
) -> Rows:
    """Return rows with a text in `column`: of a file of rows, or of the non-empty lines of a .txt (format text).

    may_be_empty: the texts are prompts, and an empty one is continued too. Raises one DataError with all bad lines.
    """
    errors = ErrorList()
    is_text = options.format == "text" or (options.format == "auto" and suffix_of(locate(name)) == ".txt")
    if is_text and not is_in_memory(name):
        if group:
            raise DataError(
                f"{name}: lines of text have no column {group!r}; leave data.group_column out, or give a .jsonl file"
            )
        rows = read_lines(name, column, errors, options)
    else:
        path = locate(name)
        if options.format == "auto" and path.is_file() and suffix_of(path) not in (*READERS, *NOT_READ):
            raise DataError(f"{name}: unknown kind of file; data.format = 'text' reads a text a line, as of a .txt")
        options = replace(options, hint=_hint_at_dialogue)
        rows = read_rows(name, [column, *([group] if group else [])], options, errors)
    checked = [row for row in rows if not (may_be_empty and row.values[column] == "")]
    check_texts(name, checked, [column], "", errors)
    return errors.settle(rows, options)


def _hint_at_dialogue(columns: Sequence[str]) -> str:
    """Return what is said of a file without a column of texts: whether it has conversations."""
    form = find_form({*columns, *(column.partition(".")[0] for column in columns)}, labelled=True)
    has_conversations = form is not None or "messages" in columns
    return 'these are conversations, which run.task = "dialogue" reads' if has_conversations else ""


def encode_texts_for_lm(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    column: str = "text",
    max_length: int,
    concatenate: bool = False,
    document_mask: bool = False,
) -> TextExamples[LanguageModelRecord]:
    """Return examples of at most max_length tokens. Each token of each text, and its end, is a target exactly once.

    A longer text continues in further examples, with ids `7#2` and so on (`7##2` where an id has a #), whose first
    input is the last target of the example before.
    concatenate: all texts make one, end to end, which is split into blocks of max_length tokens. A token attends to the
    texts before its own in the block.
    document_mask: in a block, the part of each text is a sequence of its own, so that attention and positions restart
    with each text (as in Llama 3: Grattafiori et al. 2024, section 3.2). Inputs and targets are the same.
    """
    end = find_end_token(tokenizer)
    targets, sizes = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    counts = []
    for content, encoding in encode_in_chunks([row.values[column] for row in rows], tokenizer):
        targets.append(np.array([*encoding.ids, end], dtype=np.int64))
        sizes.append(count_token_bytes(content, encoding))
        counts.append(len(encoding.ids) + 1)
    labels = np.concatenate(targets)
    inputs = np.concatenate([[end], labels])[:-1].astype(np.int32)  # the target before; a text ends with the end token
    lengths = np.array(counts, dtype=np.int64)
    if concatenate:
        borders = split_into_blocks(lengths, max_length)
        ids = [f"block {i}" for i in range(1, len(borders))]
    else:
        borders, ids = _split_each_text([row.id for row in rows], counts, max_length)
    offsets, sequences = split_at_texts(borders, lengths) if concatenate and document_mask else (borders, None)
    bytes_before = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return TextExamples(
        input_ids=inputs,
        token_type_ids=np.zeros(len(inputs), dtype=np.uint8),
        offsets=offsets,
        labels=None,
        token_labels=labels,
        ids=ids,
        truncated=0,
        sequences=sequences,
        notes=note_blocks(borders, lengths, max_length) if concatenate and counts else (),
        record=LanguageModelRecord(tokenizer, end, np.diff(bytes_before[borders])),
    )


def _split_each_text(names: Sequence[str], counts: Sequence[int], max_length: int) -> tuple[np.ndarray, list[str]]:
    """Return (borders of the examples, ids of the examples) where each text has examples of its own."""
    begins, ids = list[int](), list[str]()
    start, mark = 0, find_piece_mark(names)
    for name, count in zip(names, counts, strict=True):
        pieces = range(start, start + count, max_length)
        begins += pieces
        ids += [name, *(f"{name}{mark}{i}" for i in range(2, len(pieces) + 1))]
        start += count
    return np.array([*begins, start], dtype=np.int64), ids


def find_piece_mark(names: Collection[str]) -> str:
    """Return what stands before the number of a piece in its id: so many # that no piece has the id of another text."""
    mark = "#"
    while any(mark in name for name in names):
        mark += "#"
    return mark


def split_into_blocks(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """Return (N + 1,) int64: the borders of blocks of max_length tokens in texts end to end; the last may be shorter.

    lengths: (texts,) tokens of each text, its end included.
    """
    total = int(lengths.sum())
    return np.append(np.arange(0, total, max_length, dtype=np.int64), total)


def split_at_texts(blocks: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the borders (S + 1,) of the parts of texts in blocks, and (N + 1,) the first part of each block.

    blocks: (N + 1,) borders of the blocks. lengths: (texts,) tokens of each text, more than 0.
    """
    offsets = np.union1d(blocks, np.cumsum(lengths))
    return offsets, np.searchsorted(offsets, blocks)


def note_blocks(blocks: np.ndarray, lengths: np.ndarray, max_length: int, size: str = "") -> tuple[str, ...]:
    """Return the note on texts in blocks: how many there are of both, and how many texts continue after a block's end.

    blocks, lengths: as in split_at_texts. size: of a block in words; "": max_length tokens.
    """
    ends = np.cumsum(lengths)
    continued = len(np.unique(np.searchsorted(ends, np.setdiff1d(blocks, np.append(ends, 0)))))
    size = size or f"data.max_length = {max_length} tokens"
    note = f"{count_of(len(lengths), 'text')} in {count_of(len(blocks) - 1, 'block')} of {size}"
    return (f"{note}; {continued:,} of them continue{'s' if continued == 1 else ''} in the next block",)


def encode_prompts(
    rows: Sequence[Row], tokenizer: Tokenizer, *, column: str = "text", max_length: int
) -> TextExamples[PromptRecord]:
    """Encode prompts, each behind an end-of-text token; a longer prompt keeps its last max_length tokens."""
    end = find_end_token(tokenizer)
    prompts = [
        [end, *encoding.ids] for _, encoding in encode_in_chunks([row.values[column] for row in rows], tokenizer)
    ]
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
        notes=note_dropped(dropped, sum(map(len, prompts)), max_length),
        record=PromptRecord(tokenizer, find_end_token(tokenizer), dropped),
    )


def note_dropped(num_dropped: np.ndarray, num_tokens: int, max_length: int) -> tuple[str, ...]:
    """Return the note about prompts that lost tokens; num_dropped: (N,) tokens that each lost of all `num_tokens`."""
    truncated, lost = int(np.count_nonzero(num_dropped)), int(num_dropped.sum())
    limit = f"their last data.max_length = {max_length} tokens"
    return note_truncated(truncated, len(num_dropped), "prompts", limit, lost, num_tokens)


def encode_in_chunks(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[tuple[str, Encoding]]:
    """Yield each text with its tokens, without special ones around it; only a chunk of them is in memory at a time."""
    for chunk in split_into_chunks(texts):
        yield from zip(chunk, tokenizer.encode_batch(chunk, add_special_tokens=False), strict=True)


def count_token_bytes(content: str, encoding: Encoding) -> np.ndarray:
    """Return (tokens + 1,) int64: the UTF-8 bytes of the text that each token, and the end, stands for.

    The sum is the number of bytes of the text. Characters without a token belong to the token before, or to the first
    one. If several tokens share a character, its bytes belong to the last of them.
    """
    codes = np.frombuffer(content.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    before = np.concatenate([[0], np.cumsum(widths)])  # bytes before each character, and in total
    begins = np.array([begin for begin, _ in encoding.offsets], dtype=np.int64)
    if not len(begins):
        return before[-1:]
    begins[0] = 0
    return np.append(np.diff(before[begins], append=before[-1]), 0)
