"""[augment.text] for each kind of task: allowed changes, refused ones, and the targets after a change."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.task_settings import task_settings
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from data import DataError, Row
from data.augmentation import text as texts
from data.augmentation.text import Augmented
from data.formats.squad import Answer
from data.relation_extraction import Entity
from engine.config import AugmentSettings, ConfigError, ImageAugmentSettings, TextAugmentSettings
from engine.tasks import TASKS
from engine.tasks.augmentation import RowEncoder


def rows_of(count: int) -> list[Row]:
    """Return rows of three words, each text another one."""
    return [Row(f"r{i}", i + 1, {"text": f"the film {'very ' * i}good", "label": str(i % 2)}) for i in range(count)]


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[MASK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[MASK]"])
    return tokenizer


def augmented(
    task: str, wanted: dict, tokenizer: Tokenizer | None = None, rows=None, image: dict | None = None, **data
):
    """Return what the task's `augment` makes of rows, for [augment.text] as in `wanted`."""
    rows = rows_of(6) if rows is None else rows
    columns = {"text_column": "text", "label_column": "label"}
    encode = RowEncoder(
        encode=lambda rows, *_: SimpleNamespace(rows=rows),
        read=lambda *_: rows,
        processor=tokenizer or word_tokenizer(),
        settings=task_settings(task, **({"train": "t", "validation": "v"} | columns | data)),
        labels=("0", "1"),
    )
    chosen = AugmentSettings(TextAugmentSettings(**wanted), ImageAugmentSettings(**(image or {})))
    return TASKS[task].augment(encode(rows), rows, encode, chosen, 0)


EVERY_CHANGE = ("crop", "delete", "swap", "mask", "fill")
ALLOWED = {
    "text-classification": EVERY_CHANGE,
    "summarization": EVERY_CHANGE,
    "token-classification": ("delete", "mask"),
    "question-answering": ("mask",),
    "relation-extraction": ("mask",),
    "masked-lm": (),
    "causal-lm": (),
}


@pytest.mark.parametrize("task", ALLOWED)
def test_changes_that_break_labels_are_refused_by_name(task):
    assert not isinstance(augmented(task, {}), Augmented)
    for name in EVERY_CHANGE:
        if name in ALLOWED[task]:
            assert isinstance(augmented(task, {name: 0.1}), Augmented)
        else:
            with pytest.raises(ConfigError, match=f"augment.text.{name} = 0.1 would be wrong here"):
                augmented(task, {name: 0.1})
    with pytest.raises(ConfigError, match=r"augment.image.horizontal_flip = 0.5 has no effect on text"):
        augmented(task, {}, image={"horizontal_flip": 0.5})
    with pytest.raises(ConfigError, match=r"augment.text.synonym_rate = 0.3 has no effect: augment.text.synonym_file"):
        augmented(task, {"synonym_rate": 0.3})


def test_all_refused_settings_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        augmented("token-classification", {"crop": 0.1, "swap": 0.2})
    assert str(error.value).count("\n") == 1


def test_sources_change_and_targets_do_not():
    rows = [Row("a", 1, {"text": "one two three four five", "label": "one two three four five"})]
    ours = augmented("summarization", {"delete": 0.5}, rows=rows)
    new = [ours.changed(0, epoch).values for epoch in range(20)]
    assert {v["label"] for v in new} == {"one two three four five"}
    assert len({v["text"] for v in new}) > 3


def test_answers_and_entities_are_found_after_the_changes(tmp_path):
    table = tmp_path / "synonyms.tsv"
    table.write_text("word\tsynonyms\nfilm\tmotion picture\nUlm\tSomewhere\nwas\tis,had been\n")
    wanted = {"synonym_file": str(table), "synonym_rate": 0.7, "mask": 0.2}
    text = "A film, the film was made in Ulm; it was very good."
    row = Row("a", 1, {"question": "Where was the film made?", "context": text, "answers": [Answer("Ulm", 29)]})
    columns = {"text_column": "question", "text_pair_column": "context", "label_column": "answers"}
    ours = augmented("question-answering", wanted, rows=[row], **columns)
    changed = [ours.changed(0, epoch).values for epoch in range(40)]
    assert len({values["context"] for values in changed}) > 10
    assert len({values["question"] for values in changed}) > 5
    for values in changed:
        (answer,) = values["answers"]
        assert values["context"][answer.start : answer.start + 3] == answer.text == "Ulm"

    entities = {"subject": Entity(12, 16, "WORK"), "object": Entity(29, 32, "PLACE")}
    row = Row("a", 1, {"text": text, "label": "made in", **entities})
    ours = augmented("relation-extraction", wanted, rows=[row])
    changed = [ours.changed(0, epoch).values for epoch in range(40)]
    assert len({values["text"] for values in changed}) > 10
    for values in changed:
        assert (values["subject"].text_in(values["text"]), values["object"].text_in(values["text"])) == ("film", "Ulm")
        assert (values["subject"].type, values["object"].type, values["label"]) == ("WORK", "PLACE", "made in")


def test_a_mask_needs_a_tokenizer_with_a_mask_token():
    plain = Tokenizer(models.WordLevel({"a": 0, "[MASK]": 1, "?": 2}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()  # which splits [MASK]
    with pytest.raises(ConfigError, match=r"augment.text.mask = 0.1 needs a tokenizer with a mask token.*delete"):
        augmented("text-classification", {"mask": 0.1}, plain)
    plain.add_special_tokens(["<mask>"])
    assert texts.find_mask_token(plain) == "<mask>"
    plain.normalizer = normalizers.Lowercase()
    plain.add_special_tokens(["[MASK]"])
    assert texts.find_mask_token(plain) == "[MASK]"
    assert isinstance(augmented("text-classification", {"mask": 0.1}, plain), Augmented)


def test_wordings_may_be_of_rows_that_are_held_out(tmp_path):
    file = tmp_path / "w.jsonl"
    file.write_text('{"id": "r1", "texts": ["x"]}\n{"id": "r5", "texts": ["y"]}\n')
    rows = rows_of(6)
    held_out = rows.pop()
    wanted = {"back_translation_file": str(file)}
    ours = augmented("text-classification", wanted, rows=[*rows, held_out], validation="")
    assert {ours.changed(1, epoch).values["text"] for epoch in range(20)} == {rows[1].values["text"], "x"}
    with pytest.raises(DataError, match=r"w.jsonl:2: the training data has no id 'r5'"):
        augmented("text-classification", wanted, rows=rows)
