"""Conversations in the forms of files -> turns of the user, the assistant and the system."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from typing import Any, NamedTuple

from data.errors import DataError
from data.formats.row_forms import parse_cell
from data.notes import join

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai", "bard", "bing"), ASSISTANT),
    **dict.fromkeys(("system", "developer"), SYSTEM),
}
TOOLS = ("tool", "function", "function_call", "tool_call", "observation", "ipython")
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
WEIGHT_KEYS = ("weight", "train", "loss")  # whether a turn is learned: OpenAI's, axolotl's, ms-swift's
TURN_KEYS = {*ROLE_KEYS, *CONTENT_KEYS, *WEIGHT_KEYS}

# The columns of files whose conversations are not in the column that data.text_column names.
LIST_COLUMNS = ("conversations", "conversation", "dialogue", "dialog", "turns", "chat")
# (question, addition to the question, reply)
PAIR_COLUMNS = (
    ("prompt", "", "completion"),
    ("prompt", "", "response"),
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("question", "", "answer"),
    ("query", "", "response"),
    ("input", "", "output"),
)
COLUMNS = (*LIST_COLUMNS, *(column for names in PAIR_COLUMNS for column in names if column), "system", "history")
HINT = (
    "read are columns of turns, such as 'messages' or 'conversations' (data.text_column names another), and "
    "'prompt' and 'completion', 'instruction', 'input' and 'output', or 'question' and 'answer'"
)


class Turn(NamedTuple):
    role: str
    content: str


class EmptyTextError(DataError):
    """A conversation whose only fault is an empty text."""


class Form(NamedTuple):
    """The columns that hold a conversation: a list of turns, or a question and its reply."""

    turns: str = ""
    question: str = ""
    addition: str = ""  # to the question
    reply: str = ""

    def describe(self) -> str:
        """Return the sentence that says which columns were read."""
        if self.turns:
            return f"the conversations are those of the column {self.turns!r}"
        columns = "columns" if self.reply else "column"
        added = f", with {self.addition!r} as a second line of {self.question!r}" if self.addition else ""
        return f"the conversations are those of the {columns} {self.name}{added}"

    @property
    def name(self) -> str:
        """The names of the columns, for messages."""
        return join([repr(column) for column in (self.turns, self.question, self.reply) if column])


def find_form(columns: Set[str], labelled: bool) -> Form | None:
    """Return the columns with the conversations of a file; None where no known column has them."""
    for column in LIST_COLUMNS:
        if column in columns:
            return Form(turns=column)
    for question, addition, reply in PAIR_COLUMNS:
        if question in columns and (reply in columns or (not labelled and question != "input")):
            return Form("", question, addition if addition in columns else "", reply if labelled else "")
    return None


def gather_turns(values: dict[str, Any], form: Form) -> list[Any]:
    """Return the turns of a row, unchecked, after those of its columns "system" and "history"."""
    system, history = values.get("system"), values.get("history")
    turns: list[Any] = [{"role": SYSTEM, "content": system}] if isinstance(system, str) and system.strip() else []
    if form.turns:
        found = _as_list(values[form.turns], form.name)
        return found if turns and found and _is_system(found[0]) else turns + _with_roles(found)
    turns += _with_roles([text for pair in parse_cell(history) or [] for text in (pair if _is_pair(pair) else [pair])])
    question, addition = values[form.question], values.get(form.addition)
    if isinstance(addition, str) and addition.strip() and isinstance(question, str):
        question = f"{question}\n{addition}" if question.strip() else addition
    turns += parse_cell(question) if _are_turns(question) else [{"role": USER, "content": question}]
    if form.reply:
        reply = values[form.reply]
        turns += parse_cell(reply) if _are_turns(reply) else [{"role": ASSISTANT, "content": reply}]
    return turns


def _are_turns(value: Any) -> bool:
    value = parse_cell(value)
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value)


def _is_system(item: Any) -> bool:
    return isinstance(item, dict) and any(ROLES.get(str(item.get(key)).lower()) == SYSTEM for key in ROLE_KEYS)


def _with_roles(items: list[Any]) -> list[Any]:
    """Return turns with roles: plain texts are the user's and the assistant's in turn."""
    if not all(isinstance(item, str) for item in items):
        return items
    return [{"role": (USER, ASSISTANT)[i % 2], "content": item} for i, item in enumerate(items)]


def _as_list(value: Any, name: str) -> list[Any]:
    """Return the turns of a column as a list; DataError for a value that is none."""
    value = parse_cell(value)
    if isinstance(value, dict) and value and all(isinstance(items, list) for items in value.values()):
        lengths = {len(items) for items in value.values()}
        if len(lengths) == 1:  # a table: {"role": [..], "content": [..]}
            value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise DataError(f"{name} should be a list of turns, not {value!r}")
    if not value:
        raise EmptyTextError(f"{name} should be a list of turns, not {value!r}")
    turns: list[Any] = []
    for item in value:
        is_exchange = (
            isinstance(item, dict) and len(item) == 2 and [ROLES.get(key) for key in item] == [USER, ASSISTANT]
        )
        turns += [{"role": role, "content": item[role]} for role in item] if is_exchange else [item]
    return turns


def read_conversation(value: Any, name: str, labelled: bool, repairs: Counter[str]) -> list[Turn]:
    """Return a checked conversation; DataError with the reason alone.

    value: a list of turns; those that are plain texts are the user's and the assistant's in turn.
    repairs: counts what was changed.
    """
    items = _as_list(value, name)
    if len({isinstance(item, str) for item in items}) > 1:
        wrong = next((item for item in items if not isinstance(item, str | dict)), None)
        if wrong is None:
            raise DataError(f"{name} should have a role for each turn, or for none")
    turns = [_read_turn(item, i, name) for i, item in enumerate(items)]
    if labelled:
        _check_weights(items, turns, name)
    keys = dict.fromkeys(key for item in items if isinstance(item, dict) for key, value in item.items() if value)
    repairs.update(f"{key!r} of their turns is not read" for key in keys if key not in TURN_KEYS)
    if turns[0].role == SYSTEM and not turns[0].content.strip():
        del turns[0]
        repairs["an empty turn of the system was left out"] += 1
    for i, turn in enumerate(turns, 1 + len(items) - len(turns)):
        if not turn.content.strip():
            raise EmptyTextError(f"turn {i} of {name} is empty")
    for i, (before, turn) in enumerate(zip([None, *turns], turns, strict=False), 1):
        if turn.role == SYSTEM and before is not None:
            raise DataError(f"turn {i} is the system's, which can only come first")
        if before is not None and turn.role == before.role:
            raise DataError(f"turns {i - 1} and {i} are both the {turn.role}'s; roles take turns: join the two")
    if labelled and len(turns) > 1 and turns[-1].role == USER and turns[-2].role == ASSISTANT:
        turns.pop()
        repairs["a last turn of the user's, which has no reply, was left out"] += 1
    if labelled and (not turns or turns[-1].role != ASSISTANT):
        last = f"the last turn is the {turns[-1].role}'s" if turns else "there is no turn"
        raise DataError(f"{last}; it should be the {ASSISTANT}'s, to learn from")
    if not labelled and turns and turns[-1].role == ASSISTANT:
        turns.pop()
    if not labelled and (not turns or turns[-1].role != USER):
        raise DataError(f"no turn of the {USER}'s to answer")
    return turns


def _read_turn(item: Any, i: int, name: str) -> Turn:
    """Return turn i, from 0, of a string or an object; DataError with the reason alone."""
    if isinstance(item, str):
        item = {"role": (USER, ASSISTANT)[i % 2], "content": item}
    elif isinstance(item, Turn):  # of rows that a reader made, in memory
        item = item._asdict()
    where = f"turn {i + 1} of {name}"
    keys = item if isinstance(item, dict) else ()
    role_key = next((key for key in ROLE_KEYS if key in keys), None)
    content_key = next((key for key in CONTENT_KEYS if key in keys), None)
    if role_key is None or content_key is None:
        raise DataError(f'{where} should be a text or {{"role": ..., "content": ...}}, not {item!r}')
    speaker, content = item[role_key], item[content_key]
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        tools = "; calls of tools and their results are not read" if speaker in TOOLS else ""
        raise DataError(f"{where} has the role {speaker!r}; the roles are {USER}, {ASSISTANT} and {SYSTEM}{tools}")
    if content is None and any(item.get(key) for key in ("tool_calls", "function_call")):
        raise DataError(f"{where} is a call of a tool, which is not read")
    return Turn(role, _join_parts(content, where))


def _check_weights(items: list[Any], turns: list[Turn], name: str) -> None:
    """Raise DataError for a reply that is marked as one that should not be learned, since every reply is."""
    for i, (item, turn) in enumerate(zip(items, turns, strict=True), 1):
        keys = WEIGHT_KEYS if isinstance(item, dict) and turn.role == ASSISTANT else ()
        if key := next((key for key in keys if item.get(key, 1) in (0, False)), ""):
            raise DataError(f"turn {i} of {name} has {key} = {item[key]}, but every reply is learned: leave it out")


def _join_parts(content: Any, where: str) -> str:
    """Return the text of a turn, which may be a list of parts that are texts."""
    parts = content if isinstance(content, list) and all(isinstance(part, dict) for part in content) else None
    if parts is not None:
        for part in parts:
            if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
                raise DataError(f"{where} has a part of type {part.get('type')!r}; only parts of text are read")
        return "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise DataError(f"{where} should be text, not {content!r}")
    return content
