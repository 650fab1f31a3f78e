"""Conversations for a causal language model: the turns end to end, each followed by the end-of-text token.

The format is that of DialoGPT (Zhang et al. 2020, "DialoGPT", 3.1), which learns every turn; here only the assistant's
replies and their ends are targets. Where the assistant begins, an empty turn comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from data.batch import IGNORE_INDEX
from data.causal_lm import (
    LanguageModelRecord,
    PromptRecord,
    count_token_bytes,
    encode_in_chunks,
    find_end_token,
    note_dropped,
    pack_prompts,
)
from data.errors import DataError, ErrorList
from data.examples import TextExamples, count_notes
from data.formats.options import FileOptions
from data.formats.rows import read_rows
from data.row import Row, Rows

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


class Turn(NamedTuple):
    role: str
    content: str


def read_dialogues(
    name: str, column: str, labelled: bool, *, group: str = "", options: FileOptions = FileOptions()
) -> Rows:
    """Return rows whose `column` holds a conversation, as a list of Turns.

    In the file a conversation is
    - a list of {"role": ..., "content": ...}, with the roles user and assistant in turn, perhaps after one turn of the
      system; or
    - a list of strings, the user's and the assistant's in turn.

    With labels the last turn is the assistant's. Without labels a last turn of the assistant is dropped, since it has
    to be predicted. Raises one DataError with all bad lines, also for a file format without lists.
    """
    errors = ErrorList()
    rows = read_rows(name, [column, *([group] if group else [])], options, errors)
    for row in rows:
        try:
            row.values[column] = _turns(row.values[column], column, labelled)
        except DataError as error:
            errors.add(name, row.line, str(error))
    return errors.settle(name, rows, options)


def _turns(value: Any, column: str, labelled: bool) -> list[Turn]:
    """Return a checked conversation; DataError with the reason alone."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{column!r} should be a list of turns, this is {value!r}")
    turns = [_turn(item, i, column) for i, item in enumerate(value)]
    if len({isinstance(item, str) for item in value}) > 1:
        raise DataError(f"{column!r} should have a role for each turn, or for none")
    for i, (before, turn) in enumerate(zip([None, *turns], turns, strict=False), 1):
        if turn.role == SYSTEM and before is not None:
            raise DataError(f"turn {i} is the system's, which can only come first")
        if before is not None and turn.role == before.role:
            raise DataError(f"turns {i - 1} and {i} are both the {turn.role}'s; roles take turns")
    if labelled and turns[-1].role != ASSISTANT:
        raise DataError(f"the last turn is the {turns[-1].role}'s; it should be the {ASSISTANT}'s, to learn from")
    if not labelled and turns[-1].role == ASSISTANT:
        turns.pop()
    if not labelled and (not turns or turns[-1].role != USER):
        raise DataError(f"no turn of the {USER}'s to answer")
    return turns


def _turn(item: Any, i: int, column: str) -> Turn:
    """Return turn i, from 0, of a string or an object; DataError with the reason alone."""
    if isinstance(item, str):
        item = {"role": (USER, ASSISTANT)[i % 2], "content": item}
    elif isinstance(item, Turn):  # of rows that this reader made, in memory
        item = item._asdict()
    where = f"turn {i + 1} of {column!r}"
    if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
        raise DataError(f'{where} should be a text or {{"role": ..., "content": ...}}, this is {item!r}')
    if item["role"] not in (USER, ASSISTANT, SYSTEM):
        raise DataError(f"{where} has the role {item['role']!r}; the roles are {USER}, {ASSISTANT} and {SYSTEM}")
    if not isinstance(item["content"], str):
        raise DataError(f"{where} should be text, this is {item['content']!r}")
    if not item["content"].strip():
        raise DataError(f"{where} is empty")
    return Turn(item["role"], item["content"])


def encode_dialogues(
    rows: Sequence[Row], tokenizer: Tokenizer, *, column: str = "messages", max_length: int, labelled: bool = True
) -> TextExamples[LanguageModelRecord] | TextExamples[PromptRecord]:
    """Return one example of at most max_length tokens for each conversation; without labels, prompts.

    A longer conversation loses, until it fits:
    1. its oldest exchanges,
    2. the system's turn,
    3. the beginning of the last question,
    4. the end of the last reply.

    A conversation that lost a token counts as truncated.
    """
    end = find_end_token(tokenizer)
    conversations = _encode_turns([row.values[column] for row in rows], tokenizer, end)
    ids = [row.id for row in rows]
    if not labelled:
        return _encode_questions(ids, conversations, tokenizer, end, max_length)
    inputs, labels = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.int64)]
    shortened, truncated, num_bytes = [], [], []
    for turns in conversations:
        fitted = _drop_oldest_turns(turns, 2, max_length + 1)  # the last token is a target only
        tokens, learned, sizes = _flatten(fitted, end)
        reply_length = len(turns[-1].tokens)
        reply, context = min(reply_length, max_length), len(tokens) - reply_length
        kept = slice(max(0, context + reply - max_length - 1), context + reply)
        shortened.append(len(fitted) < len(turns) or kept.start > 0)
        truncated.append(reply < reply_length)
        inputs.append(tokens[kept][:-1].astype(np.int32))
        labels.append(np.where(learned, tokens, IGNORE_INDEX)[kept][1:])
        num_bytes.append(sizes[kept][learned[kept]].sum())
    return TextExamples(
        input_ids=np.concatenate(inputs),
        token_type_ids=np.zeros(sum(map(len, inputs)), dtype=np.uint8),
        offsets=np.cumsum([len(ids) for ids in inputs], dtype=np.int64),
        labels=None,
        token_labels=np.concatenate(labels),
        ids=ids,
        truncated=sum(a or b for a, b in zip(shortened, truncated, strict=True)),
        notes=count_notes(
            (sum(shortened), "conversation", "truncated at the beginning"),
            (sum(truncated), "conversation", "truncated in the last reply"),
        ),
        record=LanguageModelRecord(tokenizer, end, np.array(num_bytes, dtype=np.int64)),
    )


class _EncodedTurn(NamedTuple):
    role: str
    tokens: list[int]  # with the end of text
    sizes: np.ndarray  # (tokens,) UTF-8 bytes of text that each token stands for


def _encode_questions(
    ids: list[str], conversations: Sequence[list[_EncodedTurn]], tokenizer: Tokenizer, end: int, max_length: int
) -> TextExamples[PromptRecord]:
    prompts = [_flatten(_drop_oldest_turns(turns, 1, max_length), end)[0].tolist() for turns in conversations]
    examples = pack_prompts(ids, prompts, tokenizer, max_length)
    lost = np.array([_count_tokens(turns) for turns in conversations], dtype=np.int64) - examples.lengths
    return replace(
        examples,
        truncated=int(np.count_nonzero(lost)),
        notes=note_dropped(lost),
        record=replace(examples.record, num_dropped=lost),
    )


def _encode_turns(conversations: Sequence[list[Turn]], tokenizer: Tokenizer, end: int) -> list[list[_EncodedTurn]]:
    """Return all turns as tokens.

    Special tokens in the content of a turn are encoded as text, so that no turn can end itself.
    """
    contents = [turn.content for turns in conversations for turn in turns]
    as_text, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    try:
        encoded = [
            (encoding.ids, count_token_bytes(content, encoding))
            for content, encoding in encode_in_chunks(contents, tokenizer)
        ]
    finally:
        tokenizer.encode_special_tokens = as_text
    in_order = iter(encoded)
    return [
        [_EncodedTurn(turn.role, [*ids, end], sizes) for turn, (ids, sizes) in zip(turns, in_order, strict=False)]
        for turns in conversations
    ]


def _flatten(turns: Sequence[_EncodedTurn], end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (tokens, whether each belongs to a reply, their sizes). An empty turn is put before an opening reply."""
    if turns[0].role == ASSISTANT:
        turns = [_EncodedTurn(USER, [end], np.zeros(1, dtype=np.int64)), *turns]
    learned = [np.full(len(turn.tokens), turn.role == ASSISTANT) for turn in turns]
    tokens = [token for turn in turns for token in turn.tokens]
    return np.array(tokens, dtype=np.int64), np.concatenate(learned), np.concatenate([turn.sizes for turn in turns])


def _count_tokens(turns: Sequence[_EncodedTurn]) -> int:
    """Return the number of tokens of the flattened turns."""
    return (turns[0].role == ASSISTANT) + sum(len(turn.tokens) for turn in turns)


def _drop_oldest_turns(turns: Sequence[_EncodedTurn], num_kept: int, max_length: int) -> Sequence[_EncodedTurn]:
    """Return the conversation without its oldest exchanges, and then without the system's turn, until it fits.

    The last `num_kept` turns stay, even if they are too long. No reply stays without the turn that it answers.
    """
    system, rest = (turns[:1], turns[1:]) if turns[0].role == SYSTEM else (turns[:0], turns)
    while _count_tokens([*system, *rest]) > max_length and len(rest) > num_kept:
        rest = rest[1:] if rest[0].role == ASSISTANT else rest[2:]
    return rest if _count_tokens([*system, *rest]) > max_length else [*system, *rest]
