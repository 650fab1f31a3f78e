"""Conversations: files, targets, and what a long one loses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.language import conversation, encoded
from support.task_data import VOCABULARY, write_model
from tokenizers import Tokenizer

from data import DataError, TextExamples, load_tokenizer
from data.batch import IGNORE_INDEX
from data.dialogue import Turn, read_dialogues

END = VOCABULARY["<|endoftext|>"]


@pytest.fixture(scope="module")
def by_words(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_model("dialogue", tmp_path_factory.mktemp("words")))


def shown(tokenizer: Tokenizer, examples: TextExamples, index: int = 0) -> tuple[str, str]:
    """Return an example as (tokens read, target at each token): `/` is the end of text, `-` is no target."""
    span = slice(examples.offsets[index], examples.offsets[index + 1])
    name = {END: "/", IGNORE_INDEX: "-"}
    ids, labels = examples.input_ids[span].tolist(), examples.token_labels[span].tolist()
    return tuple(" ".join(name.get(k) or tokenizer.id_to_token(k) for k in tokens) for tokens in (ids, labels))


# What is learned


def test_only_replies_and_their_ends_are_learned(by_words):
    examples = encoded(by_words, conversation("the cat", "a dog", "red", "very green"))
    read, learned = shown(by_words, examples)
    assert read == "the cat / a dog / red / very green"
    assert learned == "- - a dog / - - very green /"
    assert examples.truncated == 0
    assert examples.record.num_bytes.tolist() == [len("a dog") + len("very green")]


def test_the_assistant_may_begin_and_the_system_before(by_words):
    opened = encoded(by_words, conversation("a dog", "red", "cat", first="assistant"))
    assert shown(by_words, opened) == ("/ a dog / red / cat", "a dog / - - cat /")
    instructed = encoded(by_words, conversation("very red", "a dog", "cat", first="system"))
    assert shown(by_words, instructed) == (
        "very red / a dog / cat",
        "- - - - - cat /",
    )


@pytest.mark.parametrize("as_text", [True, False])
def test_no_turn_ends_itself_where_special_tokens_are_text(by_words, as_text):
    by_words.encode_special_tokens = as_text
    examples = encoded(by_words, conversation("the <|endoftext|> cat", "dog"))
    by_words.encode_special_tokens = False
    assert (examples.token_labels == END).sum() == 1
    assert (examples.input_ids == END).sum() == (1 if as_text else 2)


def test_p13_end_of_a_reply_is_a_target_but_not_of_a_question(by_words):
    examples = encoded(by_words, *[conversation("the cat", "dog", "red", "green")] * 3)
    ends = examples.token_labels[examples.token_labels == END]
    assert len(ends) == 6  # two replies each; the two questions end too
    assert (examples.input_ids == END).sum() == 9


FITS = {  # max_length -> what is read
    24: "very very / anna bob / red / the cat saw / dog dog",
    12: "very very / the cat saw / dog dog",
    9: "very very / the cat saw / dog dog",
    8: "the cat saw / dog dog",
    6: "the cat saw / dog dog",
    5: "cat saw / dog dog",
    3: "/ dog dog",
    2: "/ dog",
}


@pytest.mark.parametrize(("max_length", "read"), FITS.items())
def test_a_long_conversation_loses_what_is_oldest_first(by_words, max_length, read):
    turns = conversation("very very", "anna bob", "red", "the cat saw", "dog dog", first="system")
    examples = encoded(by_words, turns, max_length=max_length)
    assert shown(by_words, examples)[0] == read
    learned = shown(by_words, examples)[1].replace("- ", "")
    assert learned == {24: "red / dog dog /", 2: "dog dog"}.get(max_length, "dog dog /")
    assert examples.truncated == (max_length < 24)
    share = f"{(14 - len(read.split())) / 14:.1%} of all tokens lost"
    notes = [f"warning: 1 of 1 conversations truncated to data.max_length = {max_length}, {share}"]
    notes += ["warning: 1 of 1 conversations lost the end of the last reply"] if max_length < 3 else []
    assert examples.notes == (tuple(notes) if max_length < 24 else ())
    assert examples.record.num_bytes.tolist() == [10 if max_length == 24 else 7]


def test_a_reply_that_opens_is_dropped_alone(by_words):
    turns = conversation("a dog", "red", "cat", first="assistant")
    examples = encoded(by_words, turns, max_length=6)
    assert shown(by_words, examples) == ("red / cat", "- cat /")
    only = encoded(by_words, conversation("a dog saw", first="assistant"), max_length=3)
    assert shown(by_words, only) == ("/ a dog", "a dog saw")
    assert (only.notes[1:], only.truncated) == (("warning: 1 of 1 conversations lost the end of the last reply",), 1)
    long = encoded(by_words, turns, max_new_tokens=1)
    assert long.notes == (
        "warning: 1 of 1 last replies are longer than generate.max_new_tokens = 1: their ends are never written",
    )


def test_what_is_asked_is_read_as_in_training(by_words):
    """A prompt is the context of the reply's first token in training."""
    turns = conversation("the cat", "a dog", "red", "very green")
    prompt = encoded(by_words, turns[:-1], labelled=False)
    labelled = encoded(by_words, turns)
    assert prompt.sequence(0) == labelled.sequence(0)[: len(prompt.sequence(0))]
    assert prompt.sequence(0)[-1] == END
    assert prompt.record.num_dropped.tolist() == [0]
    short = encoded(by_words, turns[:-1], max_length=4, labelled=False)
    assert (by_words.decode(short.sequence(0)), short.record.num_dropped.tolist(), short.truncated) == ("red", [6], 1)
    truncated = encoded(by_words, conversation("a b c the cat saw"), max_length=3, labelled=False)
    assert (by_words.decode(truncated.sequence(0)), truncated.record.num_dropped.tolist()) == ("cat saw", [4])


def test_no_rows_make_no_examples(by_words):
    assert len(encoded(by_words)) == len(encoded(by_words, labelled=False)) == 0


# Files


def jsonl(file: Path, *values: object) -> str:
    file.write_text("".join(json.dumps({"messages": value}, ensure_ascii=False) + "\n" for value in values))
    return str(file)


def message(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def test_roles_or_strings_in_turn(tmp_path):
    roles = [message("system", "s"), message("user", "你好"), message("assistant", "b")]
    file = jsonl(tmp_path / "talk.jsonl", ["你好", "b"], roles, [message("assistant", "b")])
    values = [row.values["messages"] for row in read_dialogues(file, "messages", True)]
    assert values == [
        [Turn("user", "你好"), Turn("assistant", "b")],
        [Turn("system", "s"), Turn("user", "你好"), Turn("assistant", "b")],
        [Turn("assistant", "b")],
    ]


def test_without_labels_the_last_reply_is_not_read(tmp_path):
    file = jsonl(tmp_path / "talk.jsonl", ["a", "b"], ["a"], ["a", "b", "c"])
    rows = read_dialogues(file, "messages", False)
    assert [[turn.content for turn in row.values["messages"]] for row in rows] == [["a"], ["a"], ["a", "b", "c"]]


BAD = {
    "text": ("a", True, "'messages' should be a list of turns, not 'a'"),
    "empty list": ([], True, "'messages' should be a list of turns, not []"),
    "user last": (["a"], True, "the last turn is the user's; it should be the assistant's"),
    "system last": ([message("system", "a")], True, "the last turn is the system's"),
    "user twice": ([message("user", "a"), message("user", "b")], True, "turns 1 and 2 are both the user's"),
    "late system": (
        [message("user", "a"), message("system", "b"), message("assistant", "c")],
        True,
        "turn 2 is the system's, which can only come first",
    ),
    "role": ([message("cook", "a")], True, "turn 1 of 'messages' has the role 'cook'; the roles are user, assistant"),
    "no content": (
        [{"role": "user"}],
        True,
        'turn 1 of \'messages\' should be a text or {"role": ..., "content": ...}',
    ),
    "number": (["a", 3], True, "turn 2 of 'messages' should be a text or"),
    "content": ([message("user", ["a"]), message("assistant", "b")], True, "turn 1 of 'messages' should be text"),
    "empty": (["a", " "], True, "turn 2 of 'messages' is empty"),
    "mixed": (["a", message("assistant", "b")], True, "should have a role for each turn, or for none"),
    "nobody asks": ([message("assistant", "a")], False, "no turn of the user's to answer"),
    "only the system": ([message("system", "a")], False, "no turn of the user's to answer"),
}


def test_f13_bad_conversations_are_named_all_at_once(tmp_path):
    for labelled in (True, False):
        cases = [(value, reason) for value, with_labels, reason in BAD.values() if with_labels == labelled]
        file = jsonl(tmp_path / "bad.jsonl", *[value for value, _ in cases])
        with pytest.raises(DataError) as error:
            read_dialogues(file, "messages", labelled)
        lines = str(error.value).splitlines()
        assert len(lines) == len(cases)
        for number, (line, (_, reason)) in enumerate(zip(lines, cases, strict=True), 1):
            assert line.startswith(f"{file}:{number}: ")
            assert reason in line
