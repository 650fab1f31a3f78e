"""Text from a language model: greedy, sampled, or by beam search, for decoders (GPT-2) and encoder-decoders (T5).

    settings = GenerationSettings.read(folder, num_beams=4, max_new_tokens=60)
    for ids, score in generate(model, [[464, 3290], [40]], settings): ...

Prompts are packed like all text, so unequal ones need no padding; a finished text leaves the batch. The result for a
prompt does not depend on the other prompts. Greedy and beam search give the ids, and beam search the scores, of
transformers' generate. The cache, and what a backbone does with it: models/generation/cache.py. Shapes:
models/ops/packing.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.errors import ModelError
from models.generation.cache import Cache
from models.generation.settings import GenerationSettings
from models.heads import Head
from models.inputs import Inputs, pack
from models.ops.layers import last_pool
from models.task_model import TaskModel

HOPELESS = -1e9  # the score of the beams that do not exist yet


class Generated(NamedTuple):
    """One generated text."""

    ids: list[int]  # the new tokens, including the end token if there is one; no prompt, no padding
    score: float  # sum of their log-probabilities / their number ** length_penalty


@torch.inference_mode()
def generate(
    model: TaskModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    examples: Sequence[int] | None = None,
) -> list[Generated]:
    """Continue each prompt (causal-lm), or answer it (seq2seq-lm): num_return_sequences results a prompt, best first.

    model: one whose head generates text. prompts: lists of token ids, together one batch.
    examples: a number for each prompt, by default its index; a sampled text is a function of the model, the seed and
    this number only. Dropout is off. In greedy search and sampling, the score is that of the model's distribution; in
    beam search, that of the searched distribution, with penalties.
    Raises ModelError where prompts and settings do not fit the model.
    """
    if model.head is None or not model.head.generates_text:
        raise ModelError(f"a {model.head_name} model generates no text; load it with head causal-lm or seq2seq-lm")
    numbers = range(len(prompts)) if examples is None else examples
    texts = [_begin(model, model.head, prompt, settings, place) for place, prompt in enumerate(prompts)]
    if not texts:
        return []
    training = model.training
    model.eval()
    try:
        reader = _Reader(model, model.head, prompts, settings)
        if settings.num_beams > 1:
            return _beam_search(reader, texts, settings)
        return _one_by_one(reader, texts, settings, numbers)
    finally:
        model.train(training)


@dataclass
class _Text:
    """One unfinished text, on the host."""

    ids: list[int]  # the prompt, or an encoder-decoder's start token, and the new tokens; repetitions count all of it
    begin: int  # the index of the first new token
    longest: int  # new tokens, at most
    shortest: int  # new tokens before it may end

    @property
    def new(self) -> int:
        """The number of new tokens."""
        return len(self.ids) - self.begin

    def followed_by(self, token: int) -> _Text:
        """Return the text with one more token."""
        return _Text([*self.ids, token], self.begin, self.longest, self.shortest)

    def ended(self, settings: GenerationSettings) -> bool:
        """Return whether an end token or the length limit has been reached."""
        return self.ids[-1] in settings.eos_token_id or self.new >= self.longest

    def result(self, log_probability: float, settings: GenerationSettings) -> Generated:
        """Return the new tokens and their score."""
        return Generated(self.ids[self.begin :], log_probability / self.new**settings.length_penalty)


def _begin(model: TaskModel, head: Head, prompt: Sequence[int], settings: GenerationSettings, place: int) -> _Text:
    """Return a prompt as a text without new tokens; ModelError where it cannot be continued."""
    if not prompt:
        raise ModelError(
            f"prompt {place} is empty: a model needs at least one token, such as the one that begins a text"
        )
    ids, room = list(prompt), None
    if head.needs_decoder:
        if settings.decoder_start_token_id is None:
            raise ModelError("decoder_start_token_id is set neither by the caller nor in the checkpoint's files")
        ids = [settings.decoder_start_token_id]
    else:
        room = model.max_length - len(ids)
    longest, shortest = settings.new_tokens(len(ids), room)
    if longest < 1:
        why = f"max_length = {settings.max_length}" if settings.max_length else f"the model reads {model.max_length}"
        raise ModelError(f"prompt {place} has {len(prompt)} tokens and {why}, which leaves none to write")
    if room is not None and longest > room:
        raise ModelError(
            f"prompt {place} has {len(prompt)} tokens and {longest} are to be written, "
            f"more than the {model.max_length} this model can read"
        )
    return _Text(ids, len(ids), longest, min(shortest, longest))


class _Reader:
    """The model's logits for the next token of each text, and its cache, which follows the texts."""

    def __init__(self, model: TaskModel, head: Head, prompts: Sequence[Sequence[int]], settings: GenerationSettings):
        self.backbone, self.head = model.backbone, head
        self.cache = Cache()
        self.device = next(model.parameters()).device
        self.seq2seq, start_id = head.needs_decoder, settings.decoder_start_token_id
        start = [[start_id]] * len(prompts) if self.seq2seq and start_id is not None else None
        self.logits = self._read(pack(prompts, decoder=start, device=self.device))

    def go_on(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Read one more token of each text; text i continues the old text rows[i]."""
        self.cache.reorder(rows)
        new = [[token] for token in tokens]
        if self.seq2seq:
            self.logits = self._read(pack([], decoder=new, device=self.device))
        else:
            self.logits = self._read(pack(new, device=self.device))

    def _read(self, inputs: Inputs) -> Tensor:
        """Return the logits of the next tokens, (B, V) in fp32."""
        hidden, packing = self.backbone(inputs, self.cache)
        logits: Tensor = self.head(last_pool(hidden, packing), packing, inputs)[0]
        return logits.float()


def _one_by_one(
    reader: _Reader, prompts: list[_Text], settings: GenerationSettings, examples: Sequence[int]
) -> list[Generated]:
    """Generate by greedy search or sampling: every text on its own, one token a step."""
    copies = [(row, copy) for row in range(len(prompts)) for copy in range(settings.num_return_sequences)]
    texts = [prompts[row] for row, _ in copies]
    generators = [np.random.default_rng((settings.seed, examples[row], copy)) for row, copy in copies]
    totals = [0.0] * len(texts)
    active, rows = list(range(len(texts))), [row for row, _ in copies]  # unfinished texts; their rows in the logits
    while True:
        logits = reader.logits[torch.tensor(rows, device=reader.device)]
        scores = adjusted(logits, [texts[i] for i in active], settings)
        if settings.do_sample:
            draws = torch.tensor([generators[i].random() for i in active], dtype=torch.float64, device=reader.device)
            chosen = sampled(truncated(scores, settings), draws)
        else:
            chosen = scores.argmax(-1)
        gained = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        for i, token, gain in zip(active, chosen.tolist(), _finite(gained.tolist()), strict=True):
            texts[i] = texts[i].followed_by(token)
            totals[i] += gain
        going = [place for place, i in enumerate(active) if not texts[i].ended(settings)]
        if not going:
            return [text.result(total, settings) for text, total in zip(texts, totals, strict=True)]
        reader.go_on([rows[place] for place in going], [texts[active[place]].ids[-1] for place in going])
        active, rows = [active[place] for place in going], list(range(len(going)))


def adjusted(scores: Tensor, texts: Sequence[_Text], settings: GenerationSettings) -> Tensor:
    """Return (N, V) scores of the next tokens of N texts after repetition penalty, forbidden n-grams, minimum length.

    Repetition penalty: Keskar et al. 2019, 4.1, on logits or log-probabilities, as in transformers.
    """
    scores = scores.clone()
    for row, text in zip(scores, texts, strict=True):
        if settings.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(text.ids)), device=scores.device)
            old = row[seen]
            row[seen] = torch.where(old < 0, old * settings.repetition_penalty, old / settings.repetition_penalty)
        if banned := repeats(text.ids, settings.no_repeat_ngram_size):
            row[banned] = -math.inf
        if text.new < text.shortest and settings.eos_token_id:
            row[list(settings.eos_token_id)] = -math.inf
    return scores


def repeats(ids: list[int], size: int) -> list[int]:
    """Return the tokens that would repeat an n-gram of `size` ids of the text; none for size 0."""
    if not 0 < size <= len(ids):
        return []
    last = ids[len(ids) - size + 1 :]
    return sorted({ids[i + size - 1] for i in range(len(ids) - size + 1) if ids[i : i + size - 1] == last})


def truncated(scores: Tensor, settings: GenerationSettings) -> Tensor:
    """Return (N, V) scores / temperature, with -inf outside of the top k and of the nucleus (Holtzman et al. 2019).

    The nucleus is the smallest set of the likeliest tokens whose probability is at least top_p.
    """
    scores = scores / settings.temperature
    if 0 < settings.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(settings.top_k).values[:, -1:], -math.inf)
    if settings.top_p < 1.0:
        ordered, order = scores.sort(descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= settings.top_p
        scores = scores.masked_fill(torch.empty_like(outside).scatter_(1, order, outside), -math.inf)
    return scores


def sampled(scores: Tensor, draws: Tensor) -> Tensor:
    """Return (N,): a token of each row of softmax(scores), (N, V), by inverting its distribution at draws in [0, 1)."""
    cumulative = scores.double().softmax(-1).cumsum(-1)
    tokens = torch.searchsorted(cumulative, (draws * cumulative[:, -1])[:, None], right=True)[:, 0]
    return tokens.clamp(max=scores.shape[-1] - 1)


@dataclass
class _Search:
    """The beams of one prompt and its finished texts, both best first."""

    beams: list[_Text]
    scores: list[float]
    finished: list[Generated] = field(default_factory=list)

    def advance(
        self, candidates: Sequence[tuple[float, int, int]], settings: GenerationSettings
    ) -> tuple[list[int], bool]:
        """Extend the beams by one token; return the beam that each new beam continues, and whether the search is over.

        candidates: (log-probability, beam, token), best first. One that ends is kept if it is among the best num_beams;
        those that do not end are the new beams.
        """
        best, going = [], []
        for rank, (score, beam, token) in enumerate(candidates):
            text = self.beams[beam].followed_by(token)
            if not text.ended(settings):
                going.append((score, beam, text))
            elif rank < settings.num_beams and (score > HOPELESS / 2 or text.new == text.longest):
                best.append(text.result(score, settings))
        self.finished = sorted(self.finished + best, key=lambda one: -one.score)[: settings.num_beams]
        del going[settings.num_beams :]
        self.scores, self.beams = [score for score, _, _ in going], [text for _, _, text in going]
        return [beam for _, beam, _ in going], not going or self._decided(settings)

    def _decided(self, settings: GenerationSettings) -> bool:
        """Return whether num_beams texts are finished and, unless early_stopping is True, no beam can be better."""
        if len(self.finished) < settings.num_beams:
            return False
        if settings.early_stopping is True:
            return True
        text = self.beams[0]
        longest = settings.early_stopping == "never" and settings.length_penalty > 0
        expected: float = self.scores[0] / (text.longest if longest else text.new) ** settings.length_penalty
        return expected <= self.finished[-1].score


def _beam_search(reader: _Reader, prompts: list[_Text], settings: GenerationSettings) -> list[Generated]:
    """Generate by beam search; every prompt has num_beams rows, which leave the batch when its search is over."""
    width = settings.num_beams
    keep = max(2, 1 + len(settings.eos_token_id)) * width  # num_beams continue even if each beam has all end tokens
    vocab = reader.logits.shape[-1]
    if keep > vocab:
        raise ModelError(f"num_beams = {width}: {keep} candidates a step are more than the {vocab} tokens there are")
    searches = [_Search([text] * width, [0.0] + [HOPELESS] * (width - 1)) for text in prompts]
    active, rows = searches, [row for row in range(len(prompts)) for _ in range(width)]
    while True:
        logits = reader.logits[torch.tensor(rows, device=reader.device)]
        scores = adjusted(logits.log_softmax(-1), [text for search in active for text in search.beams], settings)
        scores = scores + scores.new_tensor([score for search in active for score in search.scores])[:, None]
        top = scores.view(len(active), width * vocab).topk(keep)
        going, continued = [], []
        for place, search in enumerate(active):
            values, indices = _finite(top.values[place].tolist()), top.indices[place].tolist()
            candidates = [(value, *divmod(index, vocab)) for value, index in zip(values, indices, strict=True)]
            beams, over = search.advance(candidates, settings)
            if not over:
                going.append(search)
                continued += [rows[place * width + beam] for beam in beams]
        if not going:
            return [one for search in searches for one in search.finished[: settings.num_return_sequences]]
        reader.go_on(continued, [text.ids[-1] for search in going for text in search.beams])
        active, rows = going, list(range(len(continued)))


def _finite(log_probabilities: list[float]) -> list[float]:
    if any(map(math.isnan, log_probabilities)):
        raise ModelError("the model's logits are not finite (NaN): its weights, or its precision, are not good")
    return log_probabilities
