"""Conversations for a causal language model: the turns end to end, each followed by the end-of-text token.

The format is that of DialoGPT (Zhang et al. 2020, "DialoGPT", 3.1), which learns every turn; here only the assistant's
replies and their ends are targets. Where the assistant begins, an empty turn comes first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

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
from data.examples import TextExamples, note_truncated, warn_of_part
from data.formats.conversations import (
    ASSISTANT,
    COLUMNS,
    HINT,
    SYSTEM,
    USER,
    EmptyTextError,
    Turn,
    find_form,
    gather_turns,
    read_conversation,
)
from data.formats.options import FileOptions
from data.formats.row_forms import require_columns
from data.formats.rows import read_rows
from data.row import Row, Rows

MESSAGES = "messages"  # the column of conversations unless data.text_column names another


def read_dialogues(
    name: str, column: str, labelled: bool, *, group: str = "", options: FileOptions = FileOptions()
) -> Rows:
    """Return rows whose `column` holds a conversation, as a list of Turns.

    In the file a conversation is
    - a list of {"role": ..., "content": ...}, or of {"from": ..., "value": ...} as in ShareGPT, with the roles user and
      assistant in turn, perhaps after one turn of the system; or
    - a list of strings, the user's and the assistant's in turn.

    A file without the column `messages` may have the columns of data/formats/conversations.py instead; a note says so.
    With labels the last turn is the assistant's. Without labels a last turn of the assistant is dropped, since it has
    to be predicted. Raises one DataError with all bad lines, also for a file format without lists.
    """
    errors = ErrorList()
    options = options.also_reading((column, *(COLUMNS if column == MESSAGES else ())))
    rows = read_rows(name, [group] if group else [], options, errors)
    columns = {key for row in rows for key in row.values}
    form = find_form(columns, labelled) if column == MESSAGES and column not in columns else None
    if form is None:
        require_columns(name, rows, [column], HINT, errors, options)
    else:
        needed = [key for key in (form.turns, form.question, form.reply) if key]
        require_columns(name, rows, needed, HINT, errors, options)
        errors.notes.append(form.describe())
    repairs: Counter[str] = Counter()
    place = repr(column) if form is None else form.name
    for row in [] if errors.has_bad_file else rows:
        if row.line in errors.reasons:
            continue
        try:
            turns = row.values[column] if form is None else gather_turns(row.values, form)
            row.values[column] = read_conversation(turns, place, labelled, repairs)
        except DataError as error:
            errors.add(name, row.line, str(error), is_empty=isinstance(error, EmptyTextError))
    errors.notes += [f"{count:,} of {len(rows):,} conversations: {repair}" for repair, count in repairs.items()]
    return errors.settle(rows, options)


def encode_dialogues(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    column: str = MESSAGES,
    max_length: int,
    labelled: bool = True,
    max_new_tokens: int = 0,
) -> TextExamples[LanguageModelRecord] | TextExamples[PromptRecord]:
    """Return one example of at most max_length tokens for each conversation; without labels, prompts.

    A longer conversation loses, until it fits:
    1. its oldest exchanges,
    2. the system's turn,
    3. the beginning of the last question,
    4. the end of the last reply.

    A conversation that lost a token counts as truncated. max_new_tokens: the notes count last replies that are longer;
    0: they do not.
    """
    end = find_end_token(tokenizer)
    conversations = _encode_turns([row.values[column] for row in rows], tokenizer, end)
    ids = [row.id for row in rows]
    if not labelled:
        return _encode_questions(ids, conversations, tokenizer, end, max_length)
    inputs, labels = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.int64)]
    shortened, truncated, num_bytes = [], [], []
    num_too_long = num_tokens = 0
    for turns in conversations:
        fitted = _drop_oldest_turns(turns, 2, max_length + 1)  # the last token is a target only
        tokens, learned, sizes = _flatten(fitted, end)
        reply_length = len(turns[-1].tokens)
        reply, context = min(reply_length, max_length), len(tokens) - reply_length
        kept = slice(max(0, context + reply - max_length - 1), context + reply)
        shortened.append(len(fitted) < len(turns) or kept.start > 0)
        truncated.append(reply < reply_length)
        num_too_long += 0 < max_new_tokens < reply_length
        num_tokens += _count_tokens(turns) - 1
        inputs.append(tokens[kept][:-1].astype(np.int32))
        labels.append(np.where(learned, tokens, IGNORE_INDEX)[kept][1:])
        num_bytes.append(sizes[kept][learned[kept]].sum())
    num_truncated = sum(a or b for a, b in zip(shortened, truncated, strict=True))
    return TextExamples(
        input_ids=np.concatenate(inputs),
        token_type_ids=np.zeros(sum(map(len, inputs)), dtype=np.uint8),
        offsets=np.cumsum([len(ids) for ids in inputs], dtype=np.int64),
        labels=None,
        token_labels=np.concatenate(labels),
        ids=ids,
        truncated=num_truncated,
        notes=(
            *note_truncated(
                num_truncated,
                len(rows),
                "conversations",
                f"data.max_length = {max_length}",
                num_tokens - sum(map(len, inputs)),
                num_tokens,
            ),
            *warn_of_part(sum(truncated), len(rows), "conversations", "lost the end of the last reply"),
            *warn_of_part(
                num_too_long,
                len(rows),
                "last replies",
                f"are longer than generate.max_new_tokens = {max_new_tokens}: their ends are never written",
            ),
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
    before = np.array([_count_tokens(turns) for turns in conversations], dtype=np.int64)
    lost = before - examples.lengths
    return replace(
        examples,
        truncated=int(np.count_nonzero(lost)),
        notes=note_dropped(lost, int(before.sum()), max_length),
        record=replace(examples.record, num_dropped=lost),
    )


def _encode_turns(conversations: Sequence[list[Turn]], tokenizer: Tokenizer, end: int) -> list[list[_EncodedTurn]]:
    """Return all turns as tokens.

    Unless data.split_special_tokens is false, special tokens in the content of a turn are text: no turn can end itself.
    """
    contents = [turn.content for turns in conversations for turn in turns]
    encoded = [
        (encoding.ids, count_token_bytes(content, encoding))
        for content, encoding in encode_in_chunks(contents, tokenizer)
    ]
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
