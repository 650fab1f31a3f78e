"""The batches of evaluations and predictions, and what all of them in a run share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import torch

import models
from data import Batch, Examples, MicroBatching, evaluation_batches
from data.loader import split_into_micro_batches
from engine.config import GenerateSettings
from engine.distributed import Ranks
from engine.errors import TrainingError
from engine.log import progress
from engine.memory import OutOfMemory, catch_out_of_memory, free_bytes
from engine.precision import Precision
from engine.tasks import Task

AUTO_TOKENS = {"cpu": 4096, "mps": 8192, "cuda": 32_768}  # of a batch; more would not be faster
BYTES_PER_LOGIT = 12  # of a language model: in 16 bits, in fp32, and its log-softmax, with a margin
SHARE_OF_LOGITS = 0.5  # of a GPU's free memory

Result = TypeVar("Result")


@dataclass
class EvaluationContext:
    """What all evaluations and predictions of a run share.

    batch_tokens: eval.batch_tokens.
    should_stop: whether an evaluation should end, asked after each batch.
    confidence: eval.confidence; 0: metrics have no intervals.
    has_bar: whether a terminal shows how far an evaluation is.
    max_tokens: the largest number of tokens of a batch on this rank. Where a batch does not fit into memory, it is
        halved for the rest of the run. It changes no result and no other rank.
    was_stopped: whether an evaluation ended so, the same on all ranks; it and those after it have no metrics.
    """

    task: Task
    precision: Precision
    ranks: Ranks
    batch_tokens: int | Literal["auto"]
    generate: GenerateSettings
    should_stop: Callable[[], bool] = lambda: False
    confidence: float = 0.0
    has_bar: bool = True
    max_tokens: int = field(init=False)
    was_stopped: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        tokens = self.batch_tokens
        self.max_tokens = AUTO_TOKENS[self.ranks.device.type] if tokens == "auto" else tokens

    @property
    def limits(self) -> MicroBatching:
        """The limits of a batch, and which of the ranks this one is."""
        world_size = self.ranks.world_size  # 1 also where this rank has examples of its own
        return MicroBatching(max_tokens=self.max_tokens, rank=self.ranks.rank % world_size, world_size=world_size)


def run_in_batches(
    examples: Examples, context: EvaluationContext, compute: Callable[[Batch], Result], doing: str
) -> Iterator[tuple[Batch, Result]]:
    """Yield this rank's batches of the examples and what `compute` returns for each, with a progress bar.

    doing: the label of the bar. A batch that does not fit into memory and those after it are split into smaller ones.
    Raises TrainingError where a single example does not fit.
    """
    ranks = context.ranks
    update = progress(ranks.is_main and context.has_bar, len(examples) // ranks.world_size, doing)
    waiting = evaluation_batches(examples, context.limits)
    while waiting:
        indices = waiting[0]
        with catch_out_of_memory() as out_of_memory:
            batch = examples.batch(indices).upload(ranks.device)
            result = compute(batch)
        if out_of_memory:
            context.max_tokens = _halve(int(examples.lengths[indices].sum()), len(indices), doing, out_of_memory, ranks)
            limits = MicroBatching(max_tokens=context.max_tokens)
            waiting = split_into_micro_batches(np.concatenate(waiting), examples.lengths, limits)
            continue
        del waiting[0]
        update(len(indices))
        yield batch, result


def tokens_that_fit(model: models.TaskModel, device: torch.device) -> int:
    """Return the tokens of a batch: AUTO_TOKENS; fewer where the logits of a language model would fill a GPU.

    The 50,257 logits of GPT-2 need 0.6 MB a token: 20 GB for 32,768 tokens.
    """
    most = AUTO_TOKENS[device.type]
    if device.type != "cuda" or model.head is None or not model.head.is_language_model:
        return most
    fitting = SHARE_OF_LOGITS * free_bytes(device) / (BYTES_PER_LOGIT * model.head.shape.vocab_size)
    return min(most, max(1, int(fitting)))


def _halve(tokens: int, count: int, doing: str, caught: OutOfMemory, ranks: Ranks) -> int:
    """Return half the tokens of a batch of `count` examples that did not fit; TrainingError if it has one example."""
    if count < 2:
        raise TrainingError(
            f"{doing}: one example of {tokens:,} tokens does not fit into memory; a lower data.max_length needs less"
        ) from caught.error
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()  # libraries such as cuBLAS allocate what torch does not hold
    print(f"{doing}: out of memory; from here on {tokens // 2:,} tokens at a time", file=sys.stderr, flush=True)
    return tokens // 2
