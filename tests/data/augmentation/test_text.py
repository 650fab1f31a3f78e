"""Augmentation of texts: what each change does, that labels stay true, and that only (seed, epoch, id) decide."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.runs import StopAfter, assert_same_run, run_training
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from data.augmentation import tables
from data.augmentation.text import Augmented, TextChanges, change_around, change_tagged, change_text, show_augmented
from data.errors import DataError
from data.loader import MicroBatching, training_steps
from data.row import Row
from data.tag_schemes import find_entities, find_violations, tag_entities
from data.text_classification import encode_texts

WORDS = ["the", "a", "film", "story", "was", "very", "quite", "good", "great", "bad", "dull", "and", "so", "long"]
FILLS = ["cat", "dog"]
EVERYTHING = TextChanges(
    crop=0.3,
    delete=0.2,
    swap=0.3,
    mask=0.2,
    fill=0.3,
    synonym=0.5,
    mask_token="[MASK]",
    words=FILLS,
    synonyms={("film",): ["movie"], ("good",): ["fine", "nice"]},
)


def rows_of(count: int = 30, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(count)]
    return [Row(f"r{i}", i + 1, {"text": text, "label": str(i % 2)}) for i, text in enumerate(texts)]


def word_tokenizer() -> Tokenizer:
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *FILLS, "movie", "fine", "nice"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[MASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def augmented(changes: TextChanges = EVERYTHING, count: int = 30, seed: int = 0, max_length: int = 8) -> Augmented:
    rows, tokenizer = rows_of(count), word_tokenizer()

    def encode(rows):
        return encode_texts(rows, tokenizer, label="label", labels=["0", "1"], max_length=max_length)

    return Augmented(encode(rows), rows, encode, lambda row, rng: change_text(row, rng, changes, ["text"]), seed)


def change(text: str, seed: int = 0, **changes: object) -> str:
    row = Row("a", 1, {"text": text})
    return change_text(row, np.random.default_rng(seed), TextChanges(**changes), ["text"]).values["text"]


# What each change does


TEXT = "The film, (truly)  good: was long."


@pytest.mark.parametrize("seed", range(20))
def test_each_change_does_what_its_name_says(seed):
    words = TEXT.split()
    deleted = change(TEXT, seed, delete=0.5).split()
    assert len(deleted) >= 1
    assert [w for w in words if w in deleted] == deleted
    cropped = change(TEXT, seed, crop=0.6).split()
    assert len(cropped) >= len(words) - int(0.6 * len(words))
    assert " ".join(cropped) in " ".join(words)
    swapped = change(TEXT, seed, swap=0.5).split()
    assert sorted(swapped) == sorted(words)
    assert all(abs(swapped.index(w) - i) <= 1 for i, w in enumerate(words))
    masked = change(TEXT, seed, mask=0.5, mask_token="[MASK]")
    assert len(masked.split()) == len(words)
    assert masked.endswith(".")
    assert "  " in masked
    filled = change(TEXT, seed, fill=0.5, words=FILLS).split()
    assert [w for w in filled if w not in FILLS] == words


def test_rates_are_rates():
    text = " ".join(["word"] * 20_000)
    assert len(change(text, delete=0.3).split()) == pytest.approx(14_000, rel=0.03)
    assert change(text, mask=0.2, mask_token="M").split().count("M") == pytest.approx(4_000, rel=0.05)
    assert len(change(text, fill=0.1, words=["x"]).split()) == pytest.approx(22_000, rel=0.03)
    assert change(text, synonym=0.4, synonyms={("word",): ["x"]}).split().count("x") == pytest.approx(8_000, rel=0.05)
    cuts = [20 - len(change(" ".join(["word"] * 20), seed, crop=0.5).split()) for seed in range(2_000)]
    assert (min(cuts), max(cuts)) == (0, 10)
    assert np.mean(cuts) == pytest.approx(5, rel=0.05)


@pytest.mark.parametrize(
    "setting", [{"delete": 0.99}, {"crop": 0.99}, {"delete": 0.99, "crop": 0.99, "swap": 0.9}, {"delete": 0.5}]
)
@pytest.mark.parametrize("text", ["one", "one two", " x ", "好", "...", "a. b."])
def test_a_text_never_becomes_empty(text, setting):
    for seed in range(50):
        assert change(text, seed, **setting).strip()


def test_rates_of_0_leave_a_text_as_it_is():
    for text in (TEXT, "  a\tb \n c  ", "好的 话。", "", "   "):
        assert change(text) == text


def test_in_chinese_a_word_is_a_character():
    text = "这部电影很好看。"
    assert len(change(text, delete=0.5)) < len(text)
    assert sorted(change(text, swap=0.5)) == sorted(text)
    assert " " not in change(text, swap=0.5, delete=0.3, fill=0.5, words=["猫"])
    assert change(text, synonym=1.0, synonyms={("电", "影"): ["片子"]}) == "这部片子很好看。"
    assert change(text, 1, mask=0.4, mask_token="[MASK]").count("[MASK]") in range(1, 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A film.", "A movie."),
        ("Film: FILM, (film)!", "Movie: MOVIE, (movie)!"),
        ("filming a film-like Motion picture", "filming a film-like Cinema"),
        ("motion, picture", "motion, picture"),
        ("motion  picture of motion", "cinema of moving"),
    ],
)
def test_synonyms_keep_capitals_and_the_longest_entry_wins(text, expected):
    table = {("film",): ["movie"], ("motion", "picture"): ["cinema"], ("motion",): ["moving"]}
    if "," in text and "motion" in text:
        table.pop(("motion",))
    assert change(text, synonym=1.0, synonyms=table) == expected


def test_wordings_are_equally_likely():
    drawn = [change("a", seed, wordings={"a": ["b", "c"], "other": ["d"]}) for seed in range(3_000)]
    assert {text: drawn.count(text) / 1_000 for text in "abc"} == pytest.approx({"a": 1, "b": 1, "c": 1}, rel=0.1)
    assert len(drawn) == sum(map(drawn.count, "abc"))


def test_both_texts_of_a_pair_change_wordings_only_the_first():
    row = Row("a", 1, {"text": "one two three four", "other": "five six seven eight", "label": "x"})
    changes = TextChanges(delete=0.5, wordings={"a": ["one"]})
    new = [change_text(row, np.random.default_rng(s), changes, ["text", "other"]).values for s in range(50)]
    assert {v["label"] for v in new} == {"x"}
    assert len({v["text"] for v in new}) > 5
    assert {word for v in new for word in v["other"].split()} == {"five", "six", "seven", "eight"}
    assert row.values["text"] == "one two three four"


# Labels stay true


@pytest.mark.parametrize("scheme", ["IOB1", "IOB2", "IOBES"])
def test_tagged_words_keep_their_tags_and_entities_stay_whole(scheme):
    rng = random.Random(1)
    deleted = 0
    for i in range(300):
        count = rng.randint(1, 14)
        bounds = sorted(rng.sample(range(count + 1), 2 * rng.randint(0, min(3, (count + 1) // 2))))
        entities = [(a, b, rng.choice("XY")) for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
        words = [rng.choice(["", " "]) + f"w{k}" for k in range(count)]
        tags = tag_entities(entities, count, scheme)
        row = Row(str(i), 1, {"words": words, "tags": tags})
        changes = TextChanges(delete=0.7, mask=0.3, synonym=0.5, mask_token="[MASK]", synonyms={("w1",): ["v1"]})
        new = change_tagged(row, np.random.default_rng(i), changes, "words", "tags", outside="O").values
        assert find_violations(new["tags"], scheme) == []
        found = [(kind, end - start) for start, end, kind in find_entities(new["tags"])]
        assert found == [(kind, end - start) for start, end, kind in find_entities(tags)]
        for word, tag in zip(new["words"], new["tags"], strict=True):
            if word.strip() not in ("[MASK]", "v1"):
                assert tags[words.index(word)] == tag
        deleted += count - len(new["words"])
    assert deleted > 100


def test_deletion_with_plain_tags_keeps_one_word():
    row = Row("a", 1, {"words": list("abcd"), "tags": ["N", "V", "N", "V"]})
    seen, tag_of = set(), {"a": "N", "b": "V", "c": "N", "d": "V"}
    for seed in range(200):
        new = change_tagged(row, np.random.default_rng(seed), TextChanges(delete=0.9), "words", "tags", "").values
        assert new["words"]
        assert new["tags"] == [tag_of[word] for word in new["words"]]
        seen.add("".join(new["words"]))
    assert len(seen) > 4


def test_a_synonym_of_two_words_is_none_for_a_tagged_word():
    row = Row("a", 1, {"words": ["film"], "tags": ["N"]})
    changes = TextChanges(synonym=1.0, synonyms={("film",): ["motion picture"]})
    assert change_tagged(row, np.random.default_rng(0), changes, "words", "tags", "").values["words"] == ["film"]


def test_spans_are_where_their_text_is_and_it_never_changes():
    rng = random.Random(2)
    table = {("film",): ["motion picture", "movie"], ("very", "good"): ["fine"], ("电",): ["光电"]}
    changes = TextChanges(synonym=0.7, mask=0.3, mask_token="[MASK]", synonyms=table)
    different = 0
    for i in range(500):
        text = "".join(rng.choice(["film ", "very good ", "good, ", "(so) ", "电影", "\n", "a "]) for _ in range(12))
        spans = [tuple(sorted(rng.sample(range(len(text) + 1), 2))) for _ in range(2)]
        row = Row(str(i), 1, {"text": text})
        new, new_spans = change_around(row, np.random.default_rng(i), changes, "text", spans)
        assert [new[a:b] for a, b in new_spans] == [text[a:b] for a, b in spans]
        different += new != text
    assert different > 400


# (seed, epoch, id) decide, and nothing else


def tokens_by_id(batches) -> dict[str, list[int]]:
    found = {}
    for batch in batches:
        for name, ids in zip(batch.ids, batch.input_ids.split(batch.lengths), strict=True):
            assert name not in found
            found[name] = ids.tolist()
    return found


def test_without_an_epoch_the_examples_do_not_change():
    ours = augmented()
    assert torch.equal(ours.batch([3, 1]).input_ids, ours.examples.batch([3, 1]).input_ids)
    assert ours.batch([], epoch=1).lengths == ()
    for name in ("ids", "truncated", "notes"):
        assert getattr(ours, name) == getattr(ours.examples, name)
    assert ours.lengths.tolist() == ours.examples.lengths.tolist()
    assert ours.fingerprint() == ours.examples.fingerprint()
    assert replace(ours, files="x").fingerprint() != ours.fingerprint()


def test_changes_keep_id_label_and_place():
    ours = augmented()
    first, again = ours.batch(range(30), epoch=0), ours.batch(range(30), epoch=0)
    assert torch.equal(first.input_ids, again.input_ids)
    assert sorted(first.indices) == list(range(30))
    some = ours.batch([7, 3, 20], epoch=0)
    assert sorted(zip(some.indices, some.ids, strict=True)) == [(3, "r3"), (7, "r7"), (20, "r20")]
    assert first.ids == tuple(ours.ids[i] for i in first.indices)
    assert first.labels.tolist() == [i % 2 for i in first.indices]
    assert list(first.lengths) == sorted(first.lengths)
    assert max(first.lengths) <= 8
    for other in (ours.batch(range(30), epoch=1), replace(ours, seed=1).batch(range(30), epoch=0)):
        a, b = tokens_by_id([first]), tokens_by_id([other])
        assert sum(a[name] != b[name] for name in a) > 15


def test_changes_do_not_depend_on_the_other_examples():
    ours = augmented()
    whole = tokens_by_id([ours.batch(range(30), epoch=2)])
    assert tokens_by_id(ours.batch([i], epoch=2) for i in range(30)) == whole
    backwards = replace(ours, rows=ours.rows[::-1], examples=ours.encode(ours.rows[::-1]))
    assert tokens_by_id([backwards.batch(range(30), epoch=2)]) == whole


@pytest.mark.parametrize("limits", [MicroBatching(), MicroBatching(max_examples=3), MicroBatching(max_tokens=20)])
def test_changes_do_not_depend_on_micro_batches_and_ranks(limits):
    def step(limits: MicroBatching):
        return next(training_steps(augmented(), 12, 0, limits, start=4))

    expected = tokens_by_id(step(MicroBatching()))
    for world in (1, 2, 3):
        got = tokens_by_id(b for rank in range(world) for b in step(replace(limits, rank=rank, world_size=world)))
        assert got == expected


def test_the_same_from_workers():
    def steps(workers: int):
        stream = training_steps(augmented(), 12, 0, MicroBatching(), start=1, num_workers=workers)
        return [tokens_by_id(next(stream)) for _ in range(5)]

    assert steps(2) == steps(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_p04_resume_is_exact_with_augmentation(tiny, tmp_path, workers):
    synonyms = tmp_path / "synonyms.tsv"
    synonyms.write_text("word\tsynonyms\ngood\tgreat,fine\nfilm\tstory\n")
    settings = {"augment.text.delete": 0.2, "augment.text.swap": 0.2, "augment.text.synonym_file": str(synonyms)}
    settings |= {"augment.text.crop": 0.2, "augment.text.fill": 0.1, "train.max_steps": 12, "data.num_workers": workers}
    whole, parted = str(tmp_path / "whole"), str(tmp_path / "parted")
    assert run_training(tiny(**settings, **{"run.folder": whole}))
    assert run_training(tiny(**settings, **{"run.folder": parted}), StopAfter(5)) is None
    settings |= {"data.num_workers": 2 - workers, "run.resume": "yes"}  # workers are the machine's to choose
    assert run_training(tiny(**settings, **{"run.folder": parted}))
    assert_same_run(whole, parted)


def test_a_changed_file_of_synonyms_stops_a_resume(tiny, tmp_path):
    synonyms = tmp_path / "synonyms.tsv"
    synonyms.write_text("word\tsynonyms\ngood\tgreat\n")
    settings = {"augment.text.synonym_file": str(synonyms), "train.max_steps": 6}
    assert run_training(tiny(**settings), StopAfter(3)) is None
    synonyms.write_text("word\tsynonyms\ngood\tfine\n")
    with pytest.raises(Exception, match="data"):
        run_training(tiny(**settings, **{"run.resume": "yes"}))


# The sheet


def test_the_sheet_shows_rows_as_they_are_and_in_two_epochs():
    ours = augmented()
    text = show_augmented(ours, 4)
    assert text.count("  id r") == 4
    for i in range(4):
        versions = [ours.rows[i], ours.changed(i, 0), ours.changed(i, 1)]
        assert all(version.values["text"] in text for version in versions) or f"id r{i}: as it is" in text
    assert "label" not in text
    assert show_augmented(ours.examples, 4) == ""
    assert "as it is" in show_augmented(augmented(TextChanges()), 1)


# Files


def test_synonyms_are_read_from_tsv_and_jsonl_alike(tmp_path):
    tsv, jsonl = tmp_path / "s.tsv", tmp_path / "s.jsonl"
    tsv.write_text("word\tsynonyms\nFilm\tmovie, picture\nvery good\tfine\n电影\t片子\n")
    entries = [("Film", ["movie", "picture"]), ("very good", "fine"), ("电影", ["片子"])]
    jsonl.write_text("".join(json.dumps({"word": w, "synonyms": s}) + "\n" for w, s in entries))
    expected = {("film",): ["movie", "picture"], ("very", "good"): ["fine"], ("电", "影"): ["片子"]}
    assert tables.read_synonyms(str(tsv)) == tables.read_synonyms(str(jsonl)) == expected


def test_f13_bad_files_of_synonyms_and_wordings_say_the_line(tmp_path):
    synonyms, wordings = tmp_path / "s.jsonl", tmp_path / "w.jsonl"
    entries = [{"word": 3, "synonyms": "a"}, {"word": "b", "synonyms": []}, {"word": "c", "synonyms": "x,,y"}]
    entries += [{"word": "d", "synonyms": "x"}, {"word": "D", "synonyms": "y"}, {"synonyms": "y"}]
    synonyms.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with pytest.raises(DataError) as error:
        tables.read_synonyms(str(synonyms))
    lines = str(error.value).splitlines()
    assert [line.split(":")[1] for line in lines] == ["1", "2", "3", "5", "6"]
    assert "line 4 too" in lines[3]
    entries = [{"id": "r1", "texts": ["x"]}, {"id": "r2", "texts": "x"}, {"id": "q", "texts": ["x"]}]
    entries += [{"id": "r3", "texts": [" "]}, {"id": "r1", "texts": ["y"]}, {"texts": ["y"]}]
    wordings.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with pytest.raises(DataError) as error:
        tables.read_wordings(str(wordings), ["r1", "r2", "r3"])
    lines = str(error.value).splitlines()
    assert {line.split(":")[1] for line in lines} == {"2", "3", "4", "5", "6"}
    assert any("no id 'q'" in line for line in lines)
