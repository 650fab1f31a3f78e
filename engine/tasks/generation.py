"""Generation shared by the tasks that write texts: its settings, and the continuation of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from data.causal_lm import LanguageModelRecord, PromptRecord
from engine.config import GenerateSettings
from models import TaskModel
from models.generation.generate import generate as generate_tokens
from models.generation.settings import GenerationSettings


def generation_settings(model: TaskModel, generate: GenerateSettings, **changes: Any) -> GenerationSettings:
    """Return the recipe's [generate] with the start and end tokens of the model's config.json.

    `changes` override both. The checkpoint's generation_config.json is not read: the recipe defines the mathematics.
    If neither config.json nor `changes` has an end token, a text ends at max_new_tokens. Raises ModelError for settings
    that exclude each other.
    """
    config = model.spec.config
    end_tokens = config.get("eos_token_id")
    if not isinstance(end_tokens, list):
        end_tokens = [] if end_tokens is None else [end_tokens]
    model_settings = {
        "eos_token_id": tuple(end_tokens),
        "decoder_start_token_id": config.get("decoder_start_token_id"),
    }
    return GenerationSettings(**(asdict(generate) | model_settings | changes))


def continue_tokens(
    model: TaskModel,
    prompts: list[list[int]],
    numbers: Sequence[int],
    num_dropped: list[int],
    record: LanguageModelRecord | PromptRecord,
    generate: GenerateSettings,
) -> list[dict[str, Any]]:
    """Return the continuation of each prompt by a causal language model: one dict each, in their order.

    - "text": the new text, without special tokens;
    - "score": the mean log-probability of its tokens including the end (beam search: see generate.length_penalty);
    - "finished": whether the model ended the text itself;
    - "dropped": the number of tokens that were removed from the beginning of the prompt, because of data.max_length or
      to leave positions for the new tokens.

    numbers: of the examples in their file. With the seed they determine the sampled tokens, independently of the
    other prompts and of the number of ranks. num_dropped: tokens of each prompt that were removed before.
    If the model has too few positions for generate.max_new_tokens, half of them are for the prompt.
    """
    max_prompt_length = max(model.max_length - generate.max_new_tokens, model.max_length // 2)
    max_new_tokens = min(generate.max_new_tokens, model.max_length - max_prompt_length)
    end = record.end_token_id
    settings = generation_settings(model, generate, max_new_tokens=max_new_tokens, eos_token_id=(end,))
    written = generate_tokens(model, [prompt[-max_prompt_length:] for prompt in prompts], settings, examples=numbers)
    return [
        {
            "text": record.tokenizer.decode(result.ids),
            "score": result.score,
            "finished": result.ids[-1] == end,
            "dropped": dropped + max(0, len(prompt) - max_prompt_length),
        }
        for prompt, dropped, result in zip(prompts, num_dropped, written, strict=True)
    ]
