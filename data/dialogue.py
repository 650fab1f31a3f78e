"""Conversations for a causal language model: the turns end to end, each followed by the end-of-text token.

So DialoGPT reads them (Zhang et al. 2020, "DialoGPT", 3.1), which learns every turn; here only the assistant's replies
and their ends are targets. A conversation that the assistant begins answers an empty turn.
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
    bytes_of_tokens,
    encodings,
    end_token,
    note_dropped,
    pack_prompts,
)
from data.errors import DataError, ErrorList
from data.examples import TextExamples, count_notes
from data.formats.rows import Row, read_rows

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


class Turn(NamedTuple):
    role: str
    content: str


def read_dialogues(
    name: str, column: str, labelled: bool, *, group: str = "", id_column: str = "id", format: str = "auto"
) -> list[Row]:
    """Rows whose `column` holds a conversation, as a list of Turns.

    In the file it is a list of {"role": ..., "content": ...}, with the roles user and assistant in turn, after one of
    the system if there is any; or a list of strings, the user's and the assistant's in turn. With labels its last turn
    is the assistant's; without, a last turn of the assistant's is not read, since that is what is to be predicted.
    DataError with all the bad lines, and for a file that can hold no lists.
    """
    errors = ErrorList()
    rows = read_rows(name, [column, *([group] if group else [])], id_column, errors, format)
    for row in rows:
        try:
            row.values[column] = _turns(row.values[column], column, labelled)
        except DataError as error:
            errors.add(name, row.line, str(error))
    errors.raise_if_any()
    return rows


def _turns(value: Any, column: str, labelled: bool) -> list[Turn]:
    """A conversation, checked; DataError with the reason."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{column!r} should be a list of turns, this is {value!r}")
    turns = [_turn(item, place, column) for place, item in enumerate(value)]
    if len({isinstance(item, str) for item in value}) > 1:
        raise DataError(f"{column!r} should have a role for each turn, or for none")
    for place, (before, turn) in enumerate(zip([None, *turns], turns, strict=False), 1):
        if turn.role == SYSTEM and before is not None:
            raise DataError(f"turn {place} is the system's, which can only come first")
        if before is not None and turn.role == before.role:
            raise DataError(f"turns {place - 1} and {place} are both the {turn.role}'s; roles take turns")
    if labelled and turns[-1].role != ASSISTANT:
        raise DataError(f"the last turn is the {turns[-1].role}'s; it should be the {ASSISTANT}'s, to learn from")
    if not labelled and turns[-1].role == ASSISTANT:
        turns.pop()
    if not labelled and (not turns or turns[-1].role != USER):
        raise DataError(f"no turn of the {USER}'s to answer")
    return turns


def _turn(item: Any, place: int, column: str) -> Turn:
    """One turn, from a string or an object; place counts from 0."""
    if isinstance(item, str):
        item = {"role": (USER, ASSISTANT)[place % 2], "content": item}
    where = f"turn {place + 1} of {column!r}"
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
    """One example a conversation, of at most max_length tokens.

    A conversation that is longer loses its oldest exchanges, and if that is not enough the system's turn, then the
    beginning of the last question, then the end of the last reply. Each that lost anything counts as truncated.
    """
    end = end_token(tokenizer)
    conversations = _encode_turns([row.values[column] for row in rows], tokenizer, end)
    ids = [row.id for row in rows]
    if not labelled:
        prompts = [_flat(_fit(turns, 1, max_length), end)[0].tolist() for turns in conversations]
        examples = pack_prompts(ids, prompts, tokenizer, max_length)
        lost = np.array([_size(turns) for turns in conversations], dtype=np.int64) - examples.lengths
        return replace(
            examples,
            truncated=int(np.count_nonzero(lost)),
            notes=note_dropped(lost),
            record=replace(examples.record, num_dropped=lost),
        )
    inputs, labels = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.int64)]
    shortened, truncated, num_bytes = [], [], []
    for turns in conversations:
        fitted = _fit(turns, 2, max_length + 1)  # the last token is a target only
        tokens, learned, sizes = _flat(fitted, end)
        whole = len(turns[-1].tokens)
        reply, context = min(whole, max_length), len(tokens) - whole
        kept = slice(max(0, context + reply - max_length - 1), context + reply)
        shortened.append(len(fitted) < len(turns) or kept.start > 0)
        truncated.append(reply < whole)
        inputs.append(tokens[kept][:-1].astype(np.int32))
        labels.append(np.where(learned, tokens, IGNORE_INDEX)[kept][1:])
        num_bytes.append(sizes[kept][learned[kept]].sum())
    return TextExamples(
        input_ids=np.concatenate(inputs),
        token_type_ids=np.zeros(sum(map(len, inputs)), dtype=np.uint8),
        offsets=np.cumsum([len(part) for part in inputs], dtype=np.int64),
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


class _Encoded(NamedTuple):
    """A turn as tokens, the end of text after it, and the bytes of text that each of them stands for."""

    role: str
    tokens: list[int]
    sizes: np.ndarray


def _encode_turns(conversations: Sequence[list[Turn]], tokenizer: Tokenizer, end: int) -> list[list[_Encoded]]:
    """All turns as tokens. What someone writes is text even if it looks like the end of text: no turn ends itself."""
    contents = [turn.content for turns in conversations for turn in turns]
    as_text, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    try:
        encoded = [(part.ids, bytes_of_tokens(content, part)) for content, part in encodings(contents, tokenizer)]
    finally:
        tokenizer.encode_special_tokens = as_text
    in_order = iter(encoded)
    return [
        [_Encoded(turn.role, [*ids, end], sizes) for turn, (ids, sizes) in zip(turns, in_order, strict=False)]
        for turns in conversations
    ]


def _flat(turns: Sequence[_Encoded], end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(the tokens; which are a reply's; their sizes) of a conversation, with an empty turn before an opening reply."""
    if turns[0].role == ASSISTANT:
        turns = [_Encoded(USER, [end], np.zeros(1, dtype=np.int64)), *turns]
    learned = [np.full(len(turn.tokens), turn.role == ASSISTANT) for turn in turns]
    tokens = [token for turn in turns for token in turn.tokens]
    return np.array(tokens, dtype=np.int64), np.concatenate(learned), np.concatenate([turn.sizes for turn in turns])


def _size(turns: Sequence[_Encoded]) -> int:
    """The tokens of _flat."""
    return (turns[0].role == ASSISTANT) + sum(len(turn.tokens) for turn in turns)


def _fit(turns: Sequence[_Encoded], last: int, room: int) -> Sequence[_Encoded]:
    """The conversation without its oldest exchanges, and then without the system's turn, as far as `room` needs it.

    The `last` turns stay, though they be too long; no reply is left without what it answers.
    """
    system, rest = (turns[:1], turns[1:]) if turns[0].role == SYSTEM else (turns[:0], turns)
    while _size([*system, *rest]) > room and len(rest) > last:
        rest = rest[1:] if rest[0].role == ASSISTANT else rest[2:]
    return rest if _size([*system, *rest]) > room else [*system, *rest]
