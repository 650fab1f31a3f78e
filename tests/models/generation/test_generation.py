"""Generation: ids and scores against transformers' generate, the cache, sampling, the settings and what they refuse."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import zoo

import models
import models.checkpoints.convert
from models.errors import ModelError
from models.generation.cache import Cache
from models.generation.generate import (
    READ_EVERY,
    GenerationSettings,
    apply_penalties,
    find_repeating_tokens,
    generate,
    sample_tokens,
    truncate_distribution,
)

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [20, 21, 20, 21, 20], [14, 15, 16]]
ENDS = (10, 27)  # tokens that this model likes, so that some texts end early and some do not


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """(the model, transformers' model, the folder)"""
    folder = tmp_path_factory.mktemp("gpt2")
    oracle = zoo.save_oracle(folder, "gpt2", "causal-lm", n_positions=40)
    return models.from_pretrained(folder, head="causal-lm"), oracle, folder


def expected(oracle, prompt, **settings):
    """[(new ids, score)] of transformers for one prompt; padding behind an end taken off."""
    ends = list(settings.pop("eos_token_id", ())) or None
    oracle.generation_config.eos_token_id = ends  # where this is set, None as an argument would not unset it
    kwargs = settings | {
        "eos_token_id": ends,
        "pad_token_id": 0,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    out = oracle.generate(torch.tensor([prompt]), **kwargs, do_sample=False)
    texts = []
    for ids in out.sequences[:, len(prompt) :].tolist():
        end = next((i for i, token in enumerate(ids) if token in (ends or ())), len(ids))
        texts.append(ids[: end + 1])
    scores = getattr(out, "sequences_scores", None)
    return list(zip(texts, [math.nan] * len(texts) if scores is None else scores.tolist(), strict=True))


def check(gpt2, **settings):
    """All prompts in one batch of ours are each prompt by itself of transformers."""
    model, oracle, _ = gpt2
    ends = tuple(settings.pop("eos_token_id", ENDS))
    found = generate(model, PROMPTS, GenerationSettings(eos_token_id=ends, **settings))
    wanted = [one for p in PROMPTS for one in expected(oracle, p, eos_token_id=ends, **settings)]
    assert [one.ids for one in found] == [ids for ids, _ in wanted]
    for one, (_, score) in zip(found, wanted, strict=True):
        assert math.isnan(score) or one.score == pytest.approx(score, rel=1e-6, abs=1e-5)


VARIANTS = {
    "plain": {"max_new_tokens": 12},
    "default limit": {},
    "no end": {"max_new_tokens": 12, "eos_token_id": ()},
    "whole length": {"max_length": 14},
    "least new": {"max_new_tokens": 12, "min_new_tokens": 6},
    "least whole": {"max_length": 14, "min_length": 8},
    "repetition": {"max_new_tokens": 12, "repetition_penalty": 1.7},
    "encouraged": {"max_new_tokens": 12, "repetition_penalty": 0.6},
    "no bigram twice": {"max_new_tokens": 15, "no_repeat_ngram_size": 2, "min_new_tokens": 15},
    "no token twice": {"max_new_tokens": 12, "no_repeat_ngram_size": 1, "min_new_tokens": 12},
}
WITH_BEAMS = ("no end", "least new", "repetition", "no bigram twice")
BEAMS = {
    "two": {"num_beams": 2},
    "five returned": {"num_beams": 5, "num_return_sequences": 5},
    "longer": {"num_beams": 4, "length_penalty": 2.0, "num_return_sequences": 2},
    "shorter": {"num_beams": 4, "length_penalty": -1.0, "num_return_sequences": 2},
    "length left out": {"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never"},
    "early": {"num_beams": 4, "early_stopping": True, "num_return_sequences": 4},
    "never": {"num_beams": 4, "early_stopping": "never", "num_return_sequences": 4},
    "never and longer": {"num_beams": 2, "early_stopping": "never", "length_penalty": 3.0},
    "many ends": {"num_beams": 2, "eos_token_id": (7, 10, 13, 0, 30)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_ids_are_those_of_transformers(gpt2, variant):
    check(gpt2, **VARIANTS[variant])


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("read_every", [2, 8])
@pytest.mark.parametrize("variant", ["plain", "whole length", "least new", "repetition"])
def test_texts_do_not_depend_on_when_the_host_reads(gpt2, monkeypatch, variant, read_every, sampling):
    """A GPU is read every few tokens; meanwhile texts that have ended are continued for nothing."""
    settings = GenerationSettings(eos_token_id=ENDS, do_sample=sampling, num_return_sequences=1 + sampling)
    settings = replace(settings, **VARIANTS[variant])
    expected_texts = generate(gpt2[0], PROMPTS, settings)
    monkeypatch.setitem(READ_EVERY, "cpu", read_every)
    found = generate(gpt2[0], PROMPTS, settings)
    assert [one.ids for one in found] == [one.ids for one in expected_texts]
    assert [one.score for one in found] == pytest.approx([one.score for one in expected_texts], rel=1e-6)


@pytest.mark.parametrize("beams", BEAMS)
@pytest.mark.parametrize("variant", ["plain", *(pytest.param(v, marks=pytest.mark.oracle) for v in WITH_BEAMS)])
def test_beam_ids_and_scores_are_those_of_transformers(gpt2, variant, beams):
    check(gpt2, **(VARIANTS[variant] | BEAMS[beams]))


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(60))
def test_drawn_settings_too(tmp_path, seed):
    rng = random.Random(seed)
    fields = zoo.odd_fields("gpt2", seed) | {"n_positions": 40}
    oracle = zoo.save_oracle(tmp_path, "gpt2", "causal-lm", seed, **fields)
    beams = rng.choice((1, 2, 3, 6))
    least = rng.choice((0, 0, 3))
    settings = {
        "max_new_tokens": rng.choice((3, 8, 20)),
        "min_new_tokens": least,
        "repetition_penalty": rng.choice((1.0, 1.0, 1.3, 0.8)),
        "no_repeat_ngram_size": rng.choice((0, 0, 2, 3)),
        "num_beams": beams,
        "num_return_sequences": rng.randint(1, beams),
        "length_penalty": rng.choice((1.0, 0.0, 0.5, 3.0, -0.7)),
        "early_stopping": rng.choice((False, True, "never")),
        "eos_token_id": rng.choice(((7,), (25,), (2, 3, 4), ())),
    }
    check((models.from_pretrained(tmp_path, head="causal-lm"), oracle, tmp_path), **settings)


@pytest.mark.parametrize("beams", [1, 3])
def test_unequal_prompts_are_those_of_transformers_left_padded(gpt2, beams):
    model, oracle, _ = gpt2
    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    oracle.generation_config.eos_token_id = None
    theirs = oracle.generate(
        padded, attention_mask=(padded != 0).long(), max_new_tokens=9, num_beams=beams, pad_token_id=0
    )
    ours = generate(model, PROMPTS, GenerationSettings(max_new_tokens=9, num_beams=beams))
    assert [one.ids for one in ours] == theirs[:, longest:].tolist()


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_the_company_of_a_prompt_does_not_matter(gpt2, settings):
    model, _, _ = gpt2
    settings = GenerationSettings(max_new_tokens=10, eos_token_id=ENDS, **settings)
    together = generate(model, PROMPTS, settings)
    apart = [one for i, p in enumerate(PROMPTS) for one in generate(model, [p], settings, examples=[i])]
    assert [one.ids for one in together] == [one.ids for one in apart]
    assert [one.score for one in together] == pytest.approx([one.score for one in apart], abs=1e-5)


def test_p12_ids_are_tokens_and_nothing_follows_an_end(gpt2):
    model, _, _ = gpt2
    for settings in ({}, {"num_beams": 4, "num_return_sequences": 4}, {"do_sample": True, "num_return_sequences": 5}):
        found = generate(model, PROMPTS, GenerationSettings(max_new_tokens=12, eos_token_id=ENDS, **settings))
        assert len(found) == len(PROMPTS) * settings.get("num_return_sequences", 1)
        assert len({len(one.ids) for one in found}) > 1
        for one in found:
            assert all(0 <= token < 31 for token in one.ids)
            assert not set(one.ids[:-1]) & set(ENDS)
            assert one.ids[-1] in ENDS or len(one.ids) == 12


def test_greedy_score_is_the_models_log_probability(gpt2):
    model, _, _ = gpt2
    settings = GenerationSettings(max_new_tokens=7, length_penalty=0.5, repetition_penalty=1.5)
    for prompt, one in zip(PROMPTS, generate(model, PROMPTS, settings), strict=True):
        with torch.no_grad():
            logits = model.eval()(models.pack([prompt + one.ids])).logits.log_softmax(-1)[len(prompt) - 1 : -1]
        total = logits.gather(1, torch.tensor(one.ids)[:, None]).sum()
        assert one.score == pytest.approx(float(total) / 7**0.5, abs=1e-5)


# The cache


@pytest.mark.parametrize("upcast", [False, True])
def test_cached_hidden_states_are_the_recomputed_ones(tmp_path, upcast):
    zoo.save_oracle(tmp_path, "gpt2", "causal-lm", n_positions=200, reorder_and_upcast_attn=upcast)
    model = models.from_pretrained(tmp_path, head="causal-lm").double().eval()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(2, 31, (n,), generator=generator).tolist() for n in (9, 3, 3, 150)]
    cuts = [[5, 1, 2], [2, 1], [1, 1, 1], [60, 1, 80]]  # prompts; a token each; unequal pieces, beyond the first room
    cache = Cache()
    with torch.no_grad():
        whole = model.backbone(models.pack(texts))[0].split(list(map(len, texts)))
        rows, done = [0, 1, 2, 3], [0, 0, 0, 0]
        for step, order in enumerate(([0, 1, 2, 3], [0, 1, 2, 3], [3, 0, 2, 0])):
            if step:
                cache.reorder(order)  # at last one leaves, one is doubled, and places change
            rows, done = [rows[i] for i in order], [done[i] for i in order]
            counts = [cuts[row][step] for row in rows]
            new = [texts[row][start : start + n] for row, start, n in zip(rows, done, counts, strict=True)]
            hidden, packing = model.backbone(models.pack(new), cache)
            assert packing.lengths == tuple(counts)
            wanted = [whole[row][start : start + n] for row, start, n in zip(rows, done, counts, strict=True)]
            torch.testing.assert_close(hidden, torch.cat(wanted), rtol=1e-10, atol=1e-10)
            done = [start + n for start, n in zip(done, counts, strict=True)]
            assert cache.lengths == tuple(done)


def test_cross_attention_cache_is_unchanged_when_beams_move():
    generator = torch.Generator().manual_seed(0)
    source, target = models.ops.packing.Packing.from_lengths([3, 2]), models.ops.packing.Packing.from_lengths([1, 1])
    key, value, query = (torch.randn(n, 2, 4, generator=generator) for n in (5, 5, 2))
    cache = Cache()
    cache.extend(target)
    cache.cross = Cache(causal=False)
    cache.cross.extend(source)
    cache.cross.append(0, key, value)
    wanted = models.ops.attention.packed_attention(query, key, value, target, key_packing=source)
    torch.testing.assert_close(cache.cross.attend(0, query, target), wanted)
    cache.reorder([0, 0, 1, 1])
    assert cache.cross.lengths == (3, 3, 2, 2)
    four = cache.cross.attend(0, query.repeat_interleave(2, 0), models.ops.packing.Packing.from_lengths([1] * 4))
    torch.testing.assert_close(four, wanted.repeat_interleave(2, 0))
    stored = cache.cross._layers[0]
    cache.reorder([1, 0, 3, 2])
    assert cache.cross._layers[0] is stored
    cache.reorder([2])
    one = cache.cross.attend(0, query[1:], models.ops.packing.Packing.from_lengths([1]))
    torch.testing.assert_close(one, wanted[1:])


# Sampling


def test_a_sample_is_a_function_of_the_seed_and_the_example(gpt2):
    model, _, _ = gpt2
    settings = GenerationSettings(max_new_tokens=10, do_sample=True)
    again = [[one.ids for one in generate(model, [[5]] * 4, settings)] for _ in range(2)]
    assert again[0] == again[1]
    assert len(set(map(tuple, again[0]))) == 4  # the same prompt, four examples
    other = generate(model, [[5]] * 4, GenerationSettings(max_new_tokens=10, do_sample=True, seed=1))
    assert again[0] != [one.ids for one in other]
    changed = generate(model, [[5], [7], [5]], settings, examples=[3, 9, 0])
    assert [changed[0].ids, changed[2].ids] == [again[0][3], again[0][0]]


def test_a_token_is_drawn_as_often_as_it_is_probable():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05, 0.0], dtype=torch.float64)
    draws = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000  # every part of [0, 1) once
    tokens = sample_tokens(probabilities.log().expand(10_000, -1), draws)
    assert tokens.bincount(minlength=6).tolist() == [5000, 0, 3000, 1500, 500, 0]
    edges = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)  # where an impossible token is next
    impossible_first = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).log().expand(3, -1)
    assert sample_tokens(impossible_first, edges).tolist() == [1, 3, 3]


@pytest.mark.parametrize("top_p", [0.05, 0.4, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 4, 50])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_what_is_left_after_truncation(temperature, top_k, top_p):
    scores = 3 * torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    settings = GenerationSettings(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
    found = truncate_distribution(scores, settings)
    for row, left in zip(scores.tolist(), found.isfinite().tolist(), strict=True):
        order = sorted(range(12), key=lambda i, row=row: -row[i])[: top_k or 12]
        weights = [math.exp(row[i] / temperature) for i in order]
        kept, total = set(), 0.0
        for i, weight in zip(order, weights, strict=True):
            if total < top_p * sum(weights):
                kept.add(i)
            total += weight
        assert {i for i, there in enumerate(left) if there} == kept
    kept = found.isfinite()
    torch.testing.assert_close(found[kept], (scores / temperature)[kept])


def test_a_beam_of_one_is_greedy_and_sampling_the_likeliest_too(gpt2):
    model, _, _ = gpt2
    greedy = generate(model, PROMPTS, GenerationSettings(max_new_tokens=8))
    assert generate(model, PROMPTS, GenerationSettings(max_new_tokens=8, do_sample=True, top_k=1, seed=3)) == greedy


# What discourages and forbids


@pytest.mark.parametrize(
    ("ids", "size", "banned"),
    [
        ([1, 2, 3, 1, 2], 3, [3]),
        ([1, 2, 1, 3, 1], 2, [2, 3]),
        ([1, 2, 1], 1, [1, 2]),
        ([1, 1, 1], 2, [1]),
        ([1, 2, 3], 4, []),
        ([1, 2, 3], 2, []),
        ([1, 1], 0, []),
    ],
)
def test_what_would_be_a_repetition(ids, size, banned):
    assert find_repeating_tokens(ids, size) == banned


def test_adjusting_leaves_the_scores_it_was_given(gpt2):
    from models.generation.generate import _Text

    scores = torch.tensor([[1.0, -1.0, 2.0, 4.0]])
    settings = GenerationSettings(repetition_penalty=2.0, eos_token_id=(3,))
    found = apply_penalties(scores, [_Text([0, 1], begin=1, max_new=9, min_new=2)], settings)
    assert found.tolist() == [[0.5, -2.0, 2.0, -math.inf]]
    assert scores.tolist() == [[1.0, -1.0, 2.0, 4.0]]
    assert apply_penalties(scores, [_Text([0, 1, 1], begin=1, max_new=9, min_new=2)], settings)[0, 3] == 4.0


# Settings


def write(folder: Path, config: dict | None = None, generation: dict | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config or {}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_the_caller_comes_before_generation_config_before_config(tmp_path):
    config = {
        "model_type": "t5",
        "d_model": 8,
        "max_length": 50,
        "num_beams": 2,
        "eos_token_id": 1,
        "repetition_penalty": 1.5,
        "decoder_start_token_id": 0,
        "task_specific_params": {"summarization": {"num_beams": 4, "min_length": 30, "prefix": "summarize: "}},
    }
    folder = write(tmp_path, config, {"max_length": 60, "pad_token_id": 0, "eos_token_id": [1, 5], "min_p": None})
    plain = GenerationSettings.read(folder)
    assert (plain.max_length, plain.num_beams, plain.min_length, plain.eos_token_id) == (60, 2, None, (1, 5))
    assert (plain.repetition_penalty, plain.decoder_start_token_id, plain.top_k) == (1.5, 0, 50)
    task = GenerationSettings.read(folder, "summarization", max_new_tokens=7)
    assert (task.num_beams, task.min_length) == (4, 30)
    assert (task.max_length, task.max_new_tokens) == (None, 7)  # the caller's limit, not the file's beside it
    with pytest.raises(ModelError, match="no 'translation'; it has: summarization"):
        GenerationSettings.read(folder, "translation")


def test_a_folder_without_a_word_on_generation_has_the_defaults(tmp_path):
    assert GenerationSettings.read(write(tmp_path, {"model_type": "gpt2"})) == GenerationSettings()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("typical_p", 0.9, "typical_p = 0.9 is not supported"),
        ("forced_bos_token_id", 0, "forced_bos_token_id = 0 is not supported"),
        ("bad_words_ids", [[3]], "bad_words_ids"),
        ("num_beam_groups", 2, "num_beam_groups = 2"),
        ("num_beans", 2, "'num_beans' is unknown; did you mean num_beams"),
        ("num_beams", "4", "num_beams = '4' should be a whole number from 1"),
        ("num_beams", True, "num_beams = True"),
        ("temperature", 0.0, "temperature = 0.0 should be a number above 0"),
        ("top_p", 1.5, "top_p = 1.5"),
        ("early_stopping", "sometimes", "early_stopping = 'sometimes'"),
        ("eos_token_id", [1, -1], "eos_token_id"),
        ("num_return_sequences", 2, "needs do_sample, or as many num_beams"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, field, value, message):
    with pytest.raises(ModelError, match=message):
        GenerationSettings.read(write(tmp_path, generation={field: value}))


@pytest.mark.parametrize(
    "neutral", [{"typical_p": 1.0}, {"bad_words_ids": None}, {"num_beam_groups": 1}, {"use_cache": False}]
)
def test_what_changes_nothing_is_not_refused(tmp_path, neutral):
    assert GenerationSettings.read(write(tmp_path, generation=neutral)) == GenerationSettings()


def test_sampling_in_beams_is_refused():
    with pytest.raises(ModelError, match="do_sample with num_beams = 3"):
        GenerationSettings(do_sample=True, num_beams=3)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[5], []], {}, "prompt 1 is empty"),
        ([[5] * 9], {"max_length": 9}, "prompt 0 has 9 tokens and max_length = 9"),
        ([[5] * 40], {}, "prompt 0 has 40 tokens and the model reads 40"),
        ([[5] * 30], {"max_new_tokens": 11}, "11 are to be written, more than the 40 this model can read"),
        ([[5]], {"num_beams": 16}, "num_beams = 16 needs 32 candidates"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(gpt2, prompts, settings, message):
    with pytest.raises(ModelError, match=message):
        generate(gpt2[0], prompts, GenerationSettings(**settings))


def test_the_window_can_be_filled_to_its_last_token(gpt2):
    assert len(generate(gpt2[0], [[5] * 30], GenerationSettings())[0].ids) == 10
    assert len(generate(gpt2[0], [[5] * 39], GenerationSettings(max_new_tokens=1))[0].ids) == 1
    assert generate(gpt2[0], [], GenerationSettings()) == []


def test_a_model_without_a_language_model_head_is_refused(gpt2):
    with pytest.raises(ModelError, match="generates no text"):
        generate(models.from_pretrained(gpt2[2]), [[5]], GenerationSettings())


def test_non_finite_logits_are_refused_and_the_mode_restored(gpt2):
    model = models.from_pretrained(gpt2[2], head="causal-lm").train()
    first = generate(model, PROMPTS, GenerationSettings())
    assert first == generate(model, PROMPTS, GenerationSettings())  # dropout is off
    assert model.training
    with torch.no_grad():
        model.backbone.norm.bias[0] = math.nan
    for settings in ({}, {"num_beams": 2}, {"do_sample": True}):
        with pytest.raises(ModelError, match="not finite"):
            generate(model, PROMPTS, GenerationSettings(**settings))
    assert model.training


# A real one


@pytest.mark.oracle
def test_the_real_gpt2_writes_what_it_writes_in_transformers(tmp_path):
    """microformer-mgm: a GPT-2 of the bacteria in a sample of the gut, in the order of their abundance."""
    found = importlib.util.find_spec("mgm")
    if found is None:
        pytest.skip("the package microformer-mgm is not installed")
    transformers = pytest.importorskip("transformers")
    source = Path(found.submodule_search_locations[0]) / "resources" / "general_model"
    for name in ("config.json", "generation_config.json", "pytorch_model.bin"):
        shutil.copy(source / name, tmp_path / name)
    models.checkpoints.convert.convert(tmp_path / "pytorch_model.bin")
    model = models.from_pretrained(tmp_path, head="causal-lm")
    oracle = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    prompts = [[2], [2, 100, 250], [2, 31]]
    with torch.no_grad():
        ours = model.eval()(models.pack(prompts)).logits.split(list(map(len, prompts)))
        for prompt, logits in zip(prompts, ours, strict=True):
            torch.testing.assert_close(logits, oracle(torch.tensor([prompt])).logits[0], rtol=1e-4, atol=1e-4)
            assert logits[-1].softmax(-1).topk(20).values.sum() > 0.1  # far from uniform over 9,669: it has learnt
    for settings in ({}, {"num_beams": 3}):
        settings |= {"max_new_tokens": 15}
        texts = generate(model, prompts, GenerationSettings.read(tmp_path, **settings))
        for prompt, one in zip(prompts, texts, strict=True):
            assert one.ids == expected(oracle, prompt, eos_token_id=[3], **settings)[0][0]
