"""Text from a language model: greedy, sampled, or by beam search, for decoders (GPT-2) and encoder-decoders (T5).

    settings = GenerationSettings.read(folder, num_beams=4, max_new_tokens=60)
    for ids, score in generate(model, [[464, 3290], [40]], settings): ...

Prompts are packed like everything else, so unequal ones need no padding; a finished text leaves the batch. What becomes
of a prompt does not depend on its company. Greedy and beam search give the ids, and beam search the scores, of
transformers' generate. The cache and what a backbone does with it: models/generation/cache.py. Shapes as in models/ops/layers.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.errors import ModelError
from models.generation.cache import Cache
from models.generation.settings import GenerationSettings
from models.inputs import Inputs, pack
from models.ops.layers import last_pool

HOPELESS = -1e9  # the score of the beams that do not exist yet

__all__ = ["Generated", "GenerationSettings", "generate"]


class Generated(NamedTuple):
    ids: list[int]  # the new tokens, with the end token if it came; no prompt, no padding
    score: float  # sum of their log-probabilities / their number ** length_penalty


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    examples: Sequence[int] | None = None,
) -> list[Generated]:
    """Continue each prompt (causal-lm), or answer it (seq2seq-lm): num_return_sequences results a prompt, best first.

    model: a TaskModel with a language-model head. prompts: lists of token ids, together one batch. examples: a number
    for each prompt, by default its place; a sampled text is a function of the model, the seed and this number only.
    Dropout is off. The score is of the model's own distribution in greedy search and sampling, and in beam search of
    the one that was searched, with penalties. Raises ModelError where prompt and settings do not fit the model.
    """
    if model.origin.head not in ("causal-lm", "seq2seq-lm"):
        raise ModelError(f"a {model.origin.head} model generates no text; load it with head causal-lm or seq2seq-lm")
    numbers = range(len(prompts)) if examples is None else examples
    texts = [_begin(model, prompt, settings, place) for place, prompt in enumerate(prompts)]
    if not texts:
        return []
    training = model.training
    model.eval()
    try:
        reader = _Reader(model, prompts, settings)
        if settings.num_beams > 1:
            return _beam_search(reader, texts, settings)
        return _one_by_one(reader, texts, settings, numbers)
    finally:
        model.train(training)


@dataclass
class _Text:
    """One text in the making, on the host."""

    ids: list[int]  # what repetitions are counted in: the prompt, or an encoder-decoder's start token, and what follows
    begin: int  # where the new tokens begin
    longest: int  # new tokens, at most
    shortest: int  # new tokens before it may end

    @property
    def new(self) -> int:
        return len(self.ids) - self.begin

    def followed_by(self, token: int) -> _Text:
        return _Text([*self.ids, token], self.begin, self.longest, self.shortest)

    def ended(self, settings: GenerationSettings) -> bool:
        return self.ids[-1] in settings.eos_token_id or self.new >= self.longest

    def result(self, log_probability: float, settings: GenerationSettings) -> Generated:
        return Generated(self.ids[self.begin :], log_probability / self.new**settings.length_penalty)


def _begin(model: Any, prompt: Sequence[int], settings: GenerationSettings, place: int) -> _Text:
    """A prompt as a text without new tokens; ModelError where it cannot be continued."""
    if not prompt:
        raise ModelError(
            f"prompt {place} is empty: a model needs at least one token, such as the one that begins a text"
        )
    ids, room = list(prompt), None
    if model.origin.head == "seq2seq-lm":
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
    """The model's logits for what comes next, its cache kept in step with the texts."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], settings: GenerationSettings):
        self.model = model
        self.cache = Cache()
        self.device = next(model.parameters()).device
        self.seq2seq = model.origin.head == "seq2seq-lm"
        start = [[settings.decoder_start_token_id]] * len(prompts) if self.seq2seq else None
        self.logits = self._read(pack(prompts, decoder=start, device=self.device))  # type: ignore[arg-type]

    def go_on(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Read one more token of each text; text i continues what was text rows[i]."""
        self.cache.reorder(rows)
        new = [[token] for token in tokens]
        if self.seq2seq:
            self.logits = self._read(pack([], decoder=new, device=self.device))
        else:
            self.logits = self._read(pack(new, device=self.device))

    def _read(self, batch: Inputs) -> Tensor:
        """(B, V) in fp32."""
        hidden, packing = self.model.backbone(batch, self.cache)
        logits, _ = self.model.head(last_pool(hidden, packing), packing, batch)
        return logits.float()


def _one_by_one(
    reader: _Reader, prompts: list[_Text], settings: GenerationSettings, examples: Sequence[int]
) -> list[Generated]:
    """Greedy search and sampling: every text on its own, one token a step."""
    copies = [(row, copy) for row in range(len(prompts)) for copy in range(settings.num_return_sequences)]
    texts = [prompts[row] for row, _ in copies]
    dice = [np.random.default_rng((settings.seed, examples[row], copy)) for row, copy in copies]
    totals = [0.0] * len(texts)
    active, rows = list(range(len(texts))), [row for row, _ in copies]  # texts that go on; their rows in the logits
    while True:
        logits = reader.logits[torch.tensor(rows, device=reader.device)]
        scores = adjusted(logits, [texts[i] for i in active], settings)
        if settings.do_sample:
            draws = torch.tensor([dice[i].random() for i in active], dtype=torch.float64, device=reader.device)
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
    """(N, V) scores of the next tokens of N texts, after all that discourages or forbids a token.

    Repetition penalty: Keskar et al. 2019, 4.1, on whatever scores it is given, as the hub has it.
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
    """The tokens that would make the last `size` ids a sequence that was there before; none for size 0."""
    if not 0 < size <= len(ids):
        return []
    last = ids[len(ids) - size + 1 :]
    return sorted({ids[i + size - 1] for i in range(len(ids) - size + 1) if ids[i : i + size - 1] == last})


def truncated(scores: Tensor, settings: GenerationSettings) -> Tensor:
    """(N, V) scores over the temperature, then -inf outside of the top k and of the nucleus (Holtzman et al. 2019).

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
    """(N,) a token of each row of softmax(scores), (N, V), by inverting its distribution at draws, (N,) in [0, 1)."""
    cumulative = scores.double().softmax(-1).cumsum(-1)
    tokens = torch.searchsorted(cumulative, (draws * cumulative[:, -1])[:, None], right=True)[:, 0]
    return tokens.clamp(max=scores.shape[-1] - 1)


@dataclass
class _Search:
    """The beams of one prompt, the best first, and the finished texts, the best first."""

    beams: list[_Text]
    scores: list[float]
    finished: list[Generated] = field(default_factory=list)

    def advance(
        self, candidates: Sequence[tuple[float, int, int]], settings: GenerationSettings
    ) -> tuple[list[int], bool]:
        """Go one token on. candidates: (log-probability, beam, token), the best first.

        Returns the beam that each of the new beams continues, and whether the search is over. A candidate that ends
        is kept if it is among the best num_beams; those that do not end are the new beams.
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
        """Are there num_beams finished texts, and (unless that suffices) is no beam expected to beat the worst?"""
        if len(self.finished) < settings.num_beams:
            return False
        if settings.early_stopping is True:
            return True
        text = self.beams[0]
        longest = settings.early_stopping == "never" and settings.length_penalty > 0
        hoped = self.scores[0] / (text.longest if longest else text.new) ** settings.length_penalty
        return hoped <= self.finished[-1].score


def _beam_search(reader: _Reader, prompts: list[_Text], settings: GenerationSettings) -> list[Generated]:
    """Every prompt has num_beams rows; those of a prompt that is decided leave the batch."""
    width = settings.num_beams
    keep = max(2, 1 + len(settings.eos_token_id)) * width  # so that num_beams go on even if each beam ends in every way
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
