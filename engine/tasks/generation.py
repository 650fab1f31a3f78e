"""What tasks that write text share: the settings from the recipe, and prompts that leave room for what follows them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from data import Batch
from data.causal_lm import LanguageModelRecord, PromptRecord
from engine.config import GenerateSettings
from models import TaskModel
from models.generation.generate import GenerationSettings
from models.generation.generate import generate as write


def generation_settings(model: TaskModel, generate: GenerateSettings, **changes: Any) -> GenerationSettings:
    """The recipe's [generate] with the end and start tokens of the model's config.json; `changes` come before both.

    A checkpoint's generation_config.json has no say: the recipe defines the mathematics. Without an end token in
    config.json, nor in `changes`, a text ends at its limit. Raises ModelError for settings that exclude each other.
    """
    config = model.origin.config
    ends = config.get("eos_token_id")
    of_model = {
        "eos_token_id": tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
        "decoder_start_token_id": config.get("decoder_start_token_id"),
    }
    return GenerationSettings(**(asdict(generate) | of_model | changes))


def continue_prompts(model: TaskModel, batch: Batch, examples: Any, generate: GenerateSettings) -> list[dict[str, Any]]:
    """What a causal language model writes after each example of a batch: one dict each, in its order.

    "text": without special tokens; "score": the mean log-probability of its tokens, the end's too (beam search: as
    generate.length_penalty has it); "finished": whether it ended by itself; "dropped": tokens that the prompt lost at
    its beginning, to data.max_length and to make room for the new tokens.
    """
    prompts = [examples.sequence(i) for i in batch.indices]
    dropped = [int(examples.record.num_dropped[i]) for i in batch.indices]
    return continue_tokens(model, prompts, batch.indices, dropped, examples.record, generate)


def continue_tokens(
    model: TaskModel,
    prompts: list[list[int]],
    numbers: tuple[int, ...],
    dropped: list[int],
    record: PromptRecord | LanguageModelRecord,
    generate: GenerateSettings,
) -> list[dict[str, Any]]:
    """continue_prompts for token ids. numbers: of the examples; with the seed they decide what is sampled, so that
    neither company nor ranks do.

    generate.max_new_tokens is the most there can be: where the model reads too few, half of them are the prompt's.
    """
    room = max(model.max_length - generate.max_new_tokens, model.max_length // 2)
    longest = min(generate.max_new_tokens, model.max_length - room)
    settings = generation_settings(model, generate, max_new_tokens=longest, eos_token_id=(record.end_token_id,))
    written = write(model, [prompt[-room:] for prompt in prompts], settings, examples=numbers)
    return [
        {
            "text": record.tokenizer.decode(result.ids),
            "score": result.score,
            "finished": result.ids[-1] == record.end_token_id,
            "dropped": lost + max(0, len(prompt) - room),
        }
        for prompt, lost, result in zip(prompts, dropped, written, strict=True)
    ]
