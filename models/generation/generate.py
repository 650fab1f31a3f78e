"""Text from a language model: greedy, sampled, or by beam search, for decoders (GPT-2) and encoder-decoders (T5).

    settings = GenerationSettings.read(folder, num_beams=4, max_new_tokens=60)
    for ids, score in generate(model, [[464, 3290], [40]], settings): ...

Prompts are packed like all text, so those of different lengths need no padding. A finished text leaves the batch. The
result for a prompt does not depend on the other prompts. Greedy and beam search give the ids of transformers' generate,
and beam search also its scores. How a backbone uses the cache: models/generation/cache.py. Shapes:
models/ops/packing.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
from models.ops.packing import to_device
from models.task_model import TaskModel

UNUSED_BEAM_SCORE = -1e9  # of beams that do not exist yet
# By the type of the device: the number of tokens to write before the host reads which texts have ended. Meanwhile the
# ended ones are continued for nothing, but a GPU computes on, which waits at every read.
READ_EVERY = {"cpu": 1, "cuda": 8}


class Generated(NamedTuple):
    """One generated text."""

    ids: list[int]  # the new tokens, including the end token if there is one; no prompt, no padding
    score: float  # sum of log-probabilities of the new tokens / number of new tokens ** length_penalty


@torch.inference_mode()
def generate(
    model: TaskModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    examples: Sequence[int] | None = None,
) -> list[Generated]:
    """Continue each prompt (causal-lm), or answer it (seq2seq-lm); return num_return_sequences texts each, best first.

    model: its head generates text. prompts: lists of token ids, together one batch.
    examples: a number for each prompt, by default its index. A sampled text depends on the model, the settings and this
    number only.
    Dropout is off. The scores of greedy search and sampling are those of the model's distribution; the scores of beam
    search include the penalties.
    Raises ModelError where prompts and settings do not fit the model.
    """
    if model.head is None or not model.head.generates_text:
        raise ModelError(f"a {model.head_name} model generates no text; load it with head causal-lm or seq2seq-lm")
    numbers = range(len(prompts)) if examples is None else examples
    texts = [_start_text(model, model.head, prompt, settings, i) for i, prompt in enumerate(prompts)]
    if not texts:
        return []
    training = model.training
    model.eval()
    try:
        reader = _Reader(model, model.head, prompts, settings)
        if settings.num_beams > 1:
            return _beam_search(reader, texts, settings)
        return _generate_one_by_one(reader, texts, settings, numbers)
    finally:
        model.train(training)


@dataclass
class _Text:
    """One unfinished text, on the host."""

    ids: list[
        int
    ]  # the prompt, or an encoder-decoder's start token, and the new tokens; penalties apply to all of them
    begin: int  # the index of the first new token
    max_new: int  # maximum number of new tokens
    min_new: int  # minimum number of new tokens

    @property
    def num_new(self) -> int:
        """The number of new tokens."""
        return len(self.ids) - self.begin

    def with_token(self, token: int) -> _Text:
        """Return the text with one more token."""
        return _Text([*self.ids, token], self.begin, self.max_new, self.min_new)

    def has_ended(self, settings: GenerationSettings) -> bool:
        """Return whether an end token or the length limit has been reached."""
        return self.ids[-1] in settings.eos_token_id or self.num_new >= self.max_new

    def result(self, log_probability: float, settings: GenerationSettings) -> Generated:
        """Return the new tokens and their score."""
        return Generated(self.ids[self.begin :], log_probability / self.num_new**settings.length_penalty)


def _start_text(model: TaskModel, head: Head, prompt: Sequence[int], settings: GenerationSettings, index: int) -> _Text:
    """Return the text of a prompt, without new tokens; ModelError where it cannot be continued."""
    if not prompt:
        raise ModelError(
            f"prompt {index} is empty: a model needs at least one token, such as the one that begins a text"
        )
    ids, available = list(prompt), None
    if head.needs_decoder:
        if settings.decoder_start_token_id is None:
            raise ModelError("decoder_start_token_id is set neither by the caller nor in the checkpoint's files")
        ids = [settings.decoder_start_token_id]
    else:
        available = model.max_length - len(ids)
    max_new, min_new = settings.new_tokens(len(ids), available)
    if max_new < 1:
        limit = f"max_length = {settings.max_length}" if settings.max_length else f"the model reads {model.max_length}"
        raise ModelError(f"prompt {index} has {len(prompt)} tokens and {limit}, which leaves none to write")
    if available is not None and max_new > available:
        raise ModelError(
            f"prompt {index} has {len(prompt)} tokens and {max_new} are to be written, "
            f"more than the {model.max_length} this model can read"
        )
    return _Text(ids, len(ids), max_new, min(min_new, max_new))


class _Reader:
    """The model with its cache, and its logits for the next token of each text."""

    def __init__(self, model: TaskModel, head: Head, prompts: Sequence[Sequence[int]], settings: GenerationSettings):
        self.backbone, self.head = model.backbone, head
        self.cache = Cache()
        self.device = next(model.parameters()).device
        self.seq2seq, start_id = head.needs_decoder, settings.decoder_start_token_id
        start = [[start_id]] * len(prompts) if self.seq2seq and start_id is not None else None
        self.logits = self._read(pack(prompts, decoder=start, device=self.device))

    def read_tokens(self, rows: Sequence[int], tokens: Tensor) -> None:
        """Read one more token of each text, (N,) on the device; text i continues the old text rows[i]."""
        self.cache.reorder(rows)
        lengths, ends = (1,) * len(tokens), torch.arange(len(tokens) + 1, dtype=torch.int32, device=self.device)
        new = Inputs(tokens, lengths, ends, token_type_ids=torch.zeros_like(tokens))
        if self.seq2seq:
            nothing_new = tokens[:0]
            new = Inputs(nothing_new, (), ends[:1], token_type_ids=nothing_new)
            new = replace(new, decoder_input_ids=tokens, decoder_lengths=lengths, decoder_cu_seqlens=ends)
        self.logits = self._read(new)

    def logits_of(self, rows: Sequence[int]) -> Tensor:
        """Return the logits of some texts, (N, V)."""
        if list(rows) == list(range(len(self.logits))):
            return self.logits
        return self.logits.index_select(0, self.upload(rows))

    def upload(self, values: Sequence[int]) -> Tensor:
        """Return integers as a tensor on the device, without waiting for it."""
        return to_device(torch.tensor(values, dtype=torch.int64), self.device)

    def _read(self, inputs: Inputs) -> Tensor:
        """Return the logits of the next tokens, (B, V) in fp32."""
        hidden, packing = self.backbone(inputs, self.cache)
        logits: Tensor = self.head(last_pool(hidden, packing), packing, inputs)[0]
        return logits.float()


def _generate_one_by_one(
    reader: _Reader, prompts: list[_Text], settings: GenerationSettings, examples: Sequence[int]
) -> list[Generated]:
    """Generate by greedy search or sampling: each text independently, one token per step."""
    copies = [(row, copy) for row in range(len(prompts)) for copy in range(settings.num_return_sequences)]
    texts = [prompts[row] for row, _ in copies]
    generators = [np.random.default_rng((settings.seed, examples[row], copy)) for row, copy in copies]
    totals = [0.0] * len(texts)
    active, rows = list(range(len(texts))), [row for row, _ in copies]  # unfinished texts; their rows in the logits
    while True:
        written: list[Tensor] = []  # (2, N) each: tokens and their log-probabilities, which the host has not read
        for _ in range(_count_unread([texts[i] for i in active], settings, reader.device)):
            if written:
                reader.read_tokens(rows, written[-1][0].long())
                rows = list(range(len(active)))
            logits = reader.logits_of(rows)
            scores = apply_penalties(logits, [texts[i] for i in active], settings)
            if settings.do_sample:
                uniform = torch.tensor([generators[i].random() for i in active], dtype=torch.float64)
                chosen = sample_tokens(truncate_distribution(scores, settings), to_device(uniform, reader.device))
            else:
                chosen = scores.argmax(-1)
            gained = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
            written.append(torch.stack([chosen.double(), gained.double()]))
        going = list(range(len(active)))
        for tokens, gains in torch.stack(written).tolist():
            for row, gain in zip(going, _check_finite([gains[row] for row in going]), strict=True):
                texts[active[row]] = texts[active[row]].with_token(int(tokens[row]))
                totals[active[row]] += gain
            going = [row for row in going if not texts[active[row]].has_ended(settings)]
        if not going:
            return [text.result(total, settings) for text, total in zip(texts, totals, strict=True)]
        reader.read_tokens([rows[row] for row in going], reader.upload([texts[active[row]].ids[-1] for row in going]))
        active, rows = [active[row] for row in going], list(range(len(going)))


def _count_unread(texts: Sequence[_Text], settings: GenerationSettings, device: torch.device) -> int:
    """Return how many tokens to write before the host reads them, so that no text exceeds its maximum.

    It is one where the next token depends on those before by more than the model: the host applies these penalties.
    """
    too_short = any(text.num_new < text.min_new for text in texts)
    if too_short or settings.repetition_penalty != 1.0 or settings.no_repeat_ngram_size:
        return 1
    return min(READ_EVERY.get(device.type, 1), *(text.max_new - text.num_new for text in texts))


def apply_penalties(scores: Tensor, texts: Sequence[_Text], settings: GenerationSettings) -> Tensor:
    """Return scores, (N, V), with repetition penalty, forbidden n-grams and minimum length applied to N texts.

    Repetition penalty: Keskar et al. 2019, 4.1, on logits or log-probabilities, as in transformers.
    """
    scores = scores.clone()
    for row, text in zip(scores, texts, strict=True):
        if settings.repetition_penalty != 1.0:
            seen = to_device(torch.tensor(sorted(set(text.ids))), scores.device)
            old = row[seen]
            row[seen] = torch.where(old < 0, old * settings.repetition_penalty, old / settings.repetition_penalty)
        if banned := find_repeating_tokens(text.ids, settings.no_repeat_ngram_size):
            row.index_fill_(0, to_device(torch.tensor(banned), scores.device), -math.inf)
        if text.num_new < text.min_new and settings.eos_token_id:
            row.index_fill_(0, to_device(torch.tensor(settings.eos_token_id), scores.device), -math.inf)
    return scores


def find_repeating_tokens(ids: list[int], size: int) -> list[int]:
    """Return the tokens that would repeat an n-gram of `size` ids of the text; none for size 0."""
    if not 0 < size <= len(ids):
        return []
    last = ids[len(ids) - size + 1 :]
    return sorted({ids[i + size - 1] for i in range(len(ids) - size + 1) if ids[i : i + size - 1] == last})


def truncate_distribution(scores: Tensor, settings: GenerationSettings) -> Tensor:
    """Return scores / temperature, (N, V), with -inf outside of the top k and of the nucleus (Holtzman et al. 2019).

    The nucleus is the smallest set of the most probable tokens whose total probability is at least top_p.
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


def sample_tokens(scores: Tensor, uniform: Tensor) -> Tensor:
    """Return (N,), a token sampled from each row of softmax(scores), (N, V).

    uniform: (N,) random numbers in [0, 1), at which the cumulative distributions are inverted.
    """
    cumulative = scores.double().softmax(-1).cumsum(-1)
    tokens = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
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

        candidates: (log-probability, beam, token), best first. A candidate that ends is finished if it is among the
        best num_beams. Those that do not end are the new beams.
        """
        best, going = [], []
        for rank, (score, beam, token) in enumerate(candidates):
            text = self.beams[beam].with_token(token)
            if not text.has_ended(settings):
                going.append((score, beam, text))
            elif rank < settings.num_beams and (score > UNUSED_BEAM_SCORE / 2 or text.num_new == text.max_new):
                best.append(text.result(score, settings))
        self.finished = sorted(self.finished + best, key=lambda generated: -generated.score)[: settings.num_beams]
        del going[settings.num_beams :]
        self.scores, self.beams = [score for score, _, _ in going], [text for _, _, text in going]
        return [beam for _, beam, _ in going], not going or self._is_decided(settings)

    def _is_decided(self, settings: GenerationSettings) -> bool:
        """Return whether num_beams texts are finished and, unless early_stopping is True, no beam can be better."""
        if len(self.finished) < settings.num_beams:
            return False
        if settings.early_stopping is True:
            return True
        text = self.beams[0]
        at_max_length = settings.early_stopping == "never" and settings.length_penalty > 0
        expected: float = self.scores[0] / (text.max_new if at_max_length else text.num_new) ** settings.length_penalty
        return expected <= self.finished[-1].score


def _beam_search(reader: _Reader, prompts: list[_Text], settings: GenerationSettings) -> list[Generated]:
    """Generate by beam search; every prompt has num_beams rows, which leave the batch when its search is over."""
    width = settings.num_beams
    keep = max(2, 1 + len(settings.eos_token_id)) * width  # enough for num_beams to continue, whatever ends
    vocab = reader.logits.shape[-1]
    if keep > vocab:
        raise ModelError(
            f"num_beams = {width} needs {keep} candidates per step; the vocabulary has only {vocab} tokens"
        )
    searches = [_Search([text] * width, [0.0] + [UNUSED_BEAM_SCORE] * (width - 1)) for text in prompts]
    active, rows = searches, [row for row in range(len(prompts)) for _ in range(width)]
    while True:
        logits = reader.logits_of(rows)
        scores = apply_penalties(logits.log_softmax(-1), [text for search in active for text in search.beams], settings)
        of_beams = torch.tensor([score for search in active for score in search.scores], dtype=scores.dtype)
        scores = scores + to_device(of_beams, reader.device)[:, None]
        top = scores.view(len(active), width * vocab).topk(keep)
        going, continued = [], []
        best = torch.stack([top.values.double(), top.indices.double()], 1).tolist()  # one read of a GPU
        for i, (search, (values, indices)) in enumerate(zip(active, best, strict=True)):
            candidates = [
                (value, *divmod(int(index), vocab)) for value, index in zip(_check_finite(values), indices, strict=True)
            ]
            beams, over = search.advance(candidates, settings)
            if not over:
                going.append(search)
                continued += [rows[i * width + beam] for beam in beams]
        if not going:
            return [generated for search in searches for generated in search.finished[: settings.num_return_sequences]]
        reader.read_tokens(continued, reader.upload([text.ids[-1] for search in going for text in search.beams]))
        active, rows = going, list(range(len(continued)))


def _check_finite(log_probabilities: list[float]) -> list[float]:
    """Return the numbers; ModelError where one is NaN."""
    if any(map(math.isnan, log_probabilities)):
        raise ModelError("the model's logits are not finite (NaN): check its weights, or use a wider precision")
    return log_probabilities
