"""The shared part of tasks that write texts: their settings, and prompts that leave room for a continuation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from data.causal_lm import LanguageModelRecord, PromptRecord
from engine.config import GenerateSettings
from models import TaskModel
from models.generation.generate import generate as generate_tokens
from models.generation.settings import GenerationSettings


def generation_settings(model: TaskModel, generate: GenerateSettings, **changes: Any) -> GenerationSettings:
    """Return the recipe's [generate] with the start and end tokens of the model's config.json.

    `changes` override both. A checkpoint's generation_config.json is not read: the recipe defines the mathematics.
    Where neither config.json nor `changes` has an end token, a text ends at its limit. Raises ModelError for settings
    that exclude each other.
    """
    config = model.spec.config
    end_tokens = config.get("eos_token_id")
    of_model = {
        "eos_token_id": tuple(end_tokens)
        if isinstance(end_tokens, list)
        else ()
        if end_tokens is None
        else (end_tokens,),
        "decoder_start_token_id": config.get("decoder_start_token_id"),
    }
    return GenerationSettings(**(asdict(generate) | of_model | changes))


def continue_tokens(
    model: TaskModel,
    prompts: list[list[int]],
    indices: tuple[int, ...],
    num_dropped: list[int],
    record: LanguageModelRecord | PromptRecord,
    generate: GenerateSettings,
) -> list[dict[str, Any]]:
    """Return what a causal language model writes after each prompt: one dict each, in their order.

    - "text": the new text, without special tokens;
    - "score": the mean log-probability of its tokens including the end (beam search: see generate.length_penalty);
    - "finished": whether the model ended the text itself;
    - "dropped": tokens that the prompt lost at its beginning, to data.max_length and to the room for new tokens.

    indices: of the examples in their data set. Together with the seed they decide what is sampled, so that neither the
    other prompts nor the number of ranks do. num_dropped: tokens that each prompt has lost already.
    A model that reads too few tokens for generate.max_new_tokens keeps half of them for the prompt.
    """
    room = max(model.max_length - generate.max_new_tokens, model.max_length // 2)
    max_new_tokens = min(generate.max_new_tokens, model.max_length - room)
    end = record.end_token_id
    settings = generation_settings(model, generate, max_new_tokens=max_new_tokens, eos_token_id=(end,))
    written = generate_tokens(model, [prompt[-room:] for prompt in prompts], settings, examples=indices)
    return [
        {
            "text": record.tokenizer.decode(result.ids),
            "score": result.score,
            "finished": result.ids[-1] == end,
            "dropped": lost + max(0, len(prompt) - room),
        }
        for prompt, lost, result in zip(prompts, num_dropped, written, strict=True)
    ]
