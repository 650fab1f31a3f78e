"""Conversations: evaluation of the replies, replies of a model, and what it learns."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from support.evaluation import evaluation_context
from support.language import conversation, encoded
from support.runs import run_training
from support.task_data import VOCABULARY, write, write_model
from support.tiny_models import config_folder
from tokenizers import Tokenizer

import models
from data import load_tokenizer
from data.batch import IGNORE_INDEX
from data.dialogue import Turn
from engine import config as configs
from engine import evaluate, predict
from engine.config import Config, GenerateSettings
from engine.tasks import TASKS

DIALOGUE = TASKS["dialogue"]
END = VOCABULARY["<|endoftext|>"]


@pytest.fixture(scope="module")
def by_words(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_model("dialogue", tmp_path_factory.mktemp("words")))


LONG = conversation("very very", "red", "the cat", "dog", "green house", "blue", first="system")


def jsonl(file: Path, *values: object) -> str:
    file.write_text("".join(json.dumps({"messages": value}, ensure_ascii=False) + "\n" for value in values))
    return str(file)


# Evaluation and replies


def random_model(folder: Path, seed: int = 0) -> models.TaskModel:
    config_folder(folder, "gpt2", vocab_size=len(VOCABULARY), n_positions=64, eos_token_id=END, initializer_range=0.3)
    return models.from_pretrained(folder, head="causal-lm", init="scratch", seed=seed, dropout=0.0).eval()


def test_perplexity_is_of_replies_only_whatever_the_batches(by_words, tmp_path):
    """The oracle knows only which words belong to a reply."""
    model = random_model(tmp_path)
    talks = [conversation("the cat", "a dog", "red", "very green"), conversation("blue", "saw"), LONG]
    examples = encoded(by_words, *talks)
    loss_sum, tokens = 0.0, 0
    for turns in talks:
        ids, learned = [], []
        for turn in turns:
            new = [*by_words.encode(turn.content, add_special_tokens=False).ids, END]
            ids += new
            learned += [turn.role == "assistant"] * len(new)
        with torch.no_grad():
            log_probabilities = model(models.pack([ids])).logits.double().log_softmax(-1)
        for place in range(1, len(ids)):
            if learned[place]:
                loss_sum -= log_probabilities[place - 1, ids[place]].item()
                tokens += 1
    for batch_tokens in (1, 12, 4096):
        statistics = evaluate.sum_statistics(model, examples, evaluation_context("dialogue", batch_tokens))
        metrics = DIALOGUE.compute_metrics(statistics, ())
        assert statistics[2] == tokens
        assert metrics["loss"] == pytest.approx(loss_sum / tokens, rel=1e-6)
        assert metrics["perplexity"] == pytest.approx(torch.tensor(loss_sum / tokens).exp().item(), rel=1e-5)


def test_a_predicted_reply_scores_what_evaluation_says_of_it(by_words, tmp_path):
    """A reply's mean log-probability is minus its loss: predict and evaluate on the same conversations."""
    model = random_model(tmp_path, seed=4)
    asked = [conversation("the cat"), conversation("red", "dog", "very green house")]
    prompts = encoded(by_words, *asked, labelled=False)
    rows = DIALOGUE.predict_batch(model, prompts.batch([0, 1]), prompts, GenerateSettings(max_new_tokens=5))
    for turns, row in zip(asked, rows, strict=True):
        examples = encoded(by_words, [*turns, Turn("assistant", row["text"])])
        loss_sum = 0.0
        count = len(by_words.encode(row["text"], add_special_tokens=False).ids) + row["finished"]
        with torch.no_grad():
            batch = examples.batch([0])
            log_probabilities = model(batch).logits.double().log_softmax(-1)
        targets = batch.labels[batch.labels != IGNORE_INDEX]
        begin = len(targets) - len(by_words.encode(row["text"], add_special_tokens=False).ids) - 1
        for place in range(begin, begin + count):
            loss_sum -= log_probabilities[place, targets[place]].item()
        assert row["score"] == pytest.approx(-loss_sum / count, rel=1e-5)


def test_samples_answer_the_last_question(by_words, tmp_path):
    model = random_model(tmp_path)
    examples = encoded(by_words, conversation("the cat", "a dog", "red", "very green"), conversation("blue", "saw"))
    lines = DIALOGUE.show_generations(model, examples, GenerateSettings(max_new_tokens=2), 5).splitlines()
    assert [line.partition(" -> ")[0] for line in lines] == [
        "  sample 1: 'the cat <|endoftext|> a dog <|endoftext|> red <|endoftext|>'",
        "  sample 2: 'blue <|endoftext|>'",
    ]


def test_replies_are_learned(tmp_path):
    """The assistant reverses three words, also unseen ones; more than 95 of 100 replies are exact."""
    rng = random.Random(0)
    words = [word for word in VOCABULARY if word.isalpha()][:8]
    questions = [rng.choices(words, k=3) for _ in range(1200)]
    talks = [[" ".join(question), " ".join(reversed(question))] for question in questions]
    train, test = jsonl(tmp_path / "train.jsonl", *talks[100:]), jsonl(tmp_path / "test.jsonl", *talks[:100])
    values = write("dialogue", tmp_path / "unused", 2) | {
        "run.folder": str(tmp_path / "run"),
        "model.name": str(write_model("dialogue", tmp_path / "model")),
        "model.dropout.all": 0.0,
        "data.train": train,
        "data.validation": "",
        "train.global_batch_size": 64,
        "train.max_steps": 200,
        "optim.lr": 1e-2,
        "eval.every_steps": 200,
        "log.every_steps": 100,
    }
    run_training(configs.override(Config(), values))
    output = tmp_path / "out.jsonl"
    assert predict.main([str(tmp_path / "run"), f"--input={test}", f"--output={output}"]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    right = [row["text"] == talk[1] and row["finished"] for row, talk in zip(rows, talks, strict=False)]
    assert len(rows) == 100
    assert sum(right) > 95
