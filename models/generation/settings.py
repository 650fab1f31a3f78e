"""The settings of generation, from the files of a checkpoint and from the caller."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from models.checkpoints.tensor_files import read_json
from models.errors import ModelError

DEFAULT_NEW_TOKENS = 20  # the hub's

# The hub's fields that would change the text and are not implemented here -> the value that changes nothing. (None,
# false and an empty list change nothing either.) Any other value is refused by name.
UNSUPPORTED: dict[str, object] = {
    "assistant_early_exit": None,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "max_time": None,
    "min_p": 0.0,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "prompt_lookup_num_tokens": None,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "token_healing": False,
    "top_h": None,
    "typical_p": 1.0,
    "use_mtp": False,
    "watermarking_config": None,
}
# The hub's fields without influence on the text: padding (we have none), ways to compute it, further return values.
IRRELEVANT = (
    *("_from_model_config", "_commit_hash", "transformers_version", "bos_token_id", "pad_token_id"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache", "low_memory"),
    *("prefill_chunk_size", "compile_config", "disable_compile", "continuous_batching_config"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
    "speculation_type",
)


@dataclass(frozen=True)
class GenerationSettings:
    """The settings of generate, with the hub's names and the hub's defaults, which its files leave out.

    - Lengths: max_new_tokens and min_new_tokens count the new tokens; max_length and min_length also count the prompt,
      or in an encoder-decoder the start token. Without any limit, 20 tokens are written. A text shorter than its limit
      ends with one of eos_token_id.
    - top_k, top_p and temperature influence sampling only, length_penalty the scores.
    - early_stopping ends a beam search at num_beams finished texts (True), or when the best beam, scored as if it ended
      now (False) or at its maximum length ("never"), is not better than the worst of them.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    do_sample: bool = False
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 50  # 0: all
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    no_repeat_ngram_size: int = 0  # 0: anything may be repeated
    repetition_penalty: float = 1.0
    eos_token_id: tuple[int, ...] = ()
    decoder_start_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, (good, wanted) in _RULES.items():
            value = getattr(self, name)
            if not good(value):
                raise ModelError(f"generation: {name} = {value!r} should be {wanted}")
        if self.do_sample and self.num_beams > 1:
            raise ModelError(f"generation: do_sample with num_beams = {self.num_beams} is not supported; choose one")
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise ModelError(
                f"generation: num_return_sequences = {self.num_return_sequences} needs do_sample, or as many num_beams"
            )

    @classmethod
    def read(cls, folder: Path, task: str = "", **changes: object) -> GenerationSettings:
        """Return the settings for a checkpoint folder: `changes` before generation_config.json before config.json.

        task: a key of config.json's task_specific_params (old T5 checkpoints have them), which take precedence over the
        rest of config.json. Their `prefix` is left to the caller, to put before the input. Raises ModelError for a
        field that would change the text and is not supported, and for an unknown one.
        """
        config = _json(folder / "config.json")
        layers = [{name: value for name, value in config.items() if name in KNOWN or name in UNSUPPORTED}]
        if task:
            tasks = config.get("task_specific_params") or {}
            if task not in tasks:
                known = ", ".join(tasks) or "there are none"
                raise ModelError(f"{folder / 'config.json'}: task_specific_params has no {task!r}; it has: {known}")
            layers.append({name: value for name, value in tasks[task].items() if name != "prefix"})
        layers += [_json(folder / "generation_config.json"), changes]
        settings: dict[str, Any] = {}
        for layer in layers:
            given = {name: value for name, value in layer.items() if value is not None}
            for one, other in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
                if one in given or other in given:  # a limit of the caller replaces both kinds of the file
                    settings = {name: value for name, value in settings.items() if name not in (one, other)}
            settings |= given
        return cls(**_supported(settings, folder))

    def new_tokens(self, prompt: int, room: int | None) -> tuple[int, int]:
        """Return (maximum, minimum) of new tokens after `prompt` tokens; `room` is the maximum where no setting is."""
        if self.max_new_tokens is not None:
            most = self.max_new_tokens
        elif self.max_length is not None:
            most = self.max_length - prompt
        else:
            most = DEFAULT_NEW_TOKENS if room is None else min(DEFAULT_NEW_TOKENS, room)
        return most, (self.min_length or 0) - prompt if self.min_new_tokens is None else self.min_new_tokens


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= least


def _number(good: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, int | float) and not isinstance(x, bool) and good(x)


def _optional(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: x is None or good(x)


_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (_optional(_whole(1)), "a whole number from 1"),
    "max_length": (_optional(_whole(1)), "a whole number from 1"),
    "min_new_tokens": (_optional(_whole(0)), "a whole number from 0"),
    "min_length": (_optional(_whole(0)), "a whole number from 0"),
    "do_sample": (lambda x: isinstance(x, bool), "true or false"),
    "seed": (_whole(0), "a whole number from 0"),
    "temperature": (_number(lambda x: 0 < x < float("inf")), "a number above 0; without do_sample it has no part"),
    "top_k": (_whole(0), "a whole number from 0 (0: all tokens)"),
    "top_p": (_number(lambda x: 0 < x <= 1), "a number above 0 and at most 1"),
    "num_beams": (_whole(1), "a whole number from 1"),
    "length_penalty": (_number(lambda x: abs(x) < float("inf")), "a finite number"),
    "early_stopping": (lambda x: x in (True, False, "never") and not isinstance(x, float), "true, false or 'never'"),
    "num_return_sequences": (_whole(1), "a whole number from 1"),
    "no_repeat_ngram_size": (_whole(0), "a whole number from 0 (0: anything may be repeated)"),
    "repetition_penalty": (_number(lambda x: 0 < x < float("inf")), "a number above 0"),
    "eos_token_id": (lambda x: isinstance(x, tuple) and all(map(_whole(0), x)), "one token id, or a list of them"),
    "decoder_start_token_id": (_optional(_whole(0)), "a token id"),
}
KNOWN = tuple(f.name for f in fields(GenerationSettings))


def _supported(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the fields of GenerationSettings; ModelError for unknown ones and for unsupported ones."""
    for name, value in settings.items():
        if name in KNOWN or name in IRRELEVANT:
            continue
        if name not in UNSUPPORTED:
            close = difflib.get_close_matches(name, KNOWN, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ModelError(f"{folder}: generation setting {name!r} is unknown{hint}")
        neutral = UNSUPPORTED[name]
        if not (value is None or value is False or value in ([], {}) or (neutral is not None and value == neutral)):
            raise ModelError(f"{folder}: generation setting {name} = {value!r} is not supported")
    ours = {name: value for name, value in settings.items() if name in KNOWN}
    ends = ours.get("eos_token_id", ())
    return ours | {"eos_token_id": tuple(ends) if isinstance(ends, list | tuple) else (ends,)}


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where there is no file."""
    try:
        raw = read_json(path)
    except FileNotFoundError:
        return {}
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: should be an object, is a {type(raw).__name__}")
    return raw
