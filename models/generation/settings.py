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

# The hub's fields that are not implemented here -> the value without effect. (None, false and an empty list have no
# effect either.) Any other value is an error.
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
# The hub's fields without influence on the text: padding (there is none), ways to compute it, further return values.
IGNORED = (
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
    """The settings of generate, with the hub's names and defaults.

    - max_new_tokens and min_new_tokens count the new tokens. max_length and min_length also count the prompt, or in an
      encoder-decoder the start token. Without a maximum, 20 tokens are written.
    - A text that is shorter than its maximum ends with one of eos_token_id.
    - top_k, top_p and temperature affect sampling only, length_penalty the scores.
    - early_stopping = True ends a beam search at num_beams finished texts. Otherwise it ends when the best beam is not
      better than the worst of them. The beam is scored as if it ended now (False), or at its maximum length ("never").
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
        for name, (is_valid, wanted) in _RULES.items():
            value = getattr(self, name)
            if not is_valid(value):
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

        task: a key of config.json's task_specific_params (of old T5 checkpoints), which take precedence over the rest
        of config.json. The caller has to put their `prefix` before the input.
        Raises ModelError for a field that is not supported or not known.
        """
        config = _read_object(folder / "config.json")
        layers = [{name: value for name, value in config.items() if name in KNOWN or name in UNSUPPORTED}]
        if task:
            tasks = config.get("task_specific_params") or {}
            if task not in tasks:
                known = ", ".join(tasks) or "there are none"
                raise ModelError(f"{folder / 'config.json'}: task_specific_params has no {task!r}; it has: {known}")
            layers.append({name: value for name, value in tasks[task].items() if name != "prefix"})
        layers += [_read_object(folder / "generation_config.json"), changes]
        settings: dict[str, Any] = {}
        for layer in layers:
            given = {name: value for name, value in layer.items() if value is not None}
            for one, other in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
                if one in given or other in given:  # one kind of limit replaces both kinds of the layers below
                    settings = {name: value for name, value in settings.items() if name not in (one, other)}
            settings |= given
        return cls(**_check_names(settings, folder))

    def new_tokens(self, num_prompt_tokens: int, available: int | None) -> tuple[int, int]:
        """Return (maximum, minimum) of new tokens; `available` bounds the default maximum (None: no bound)."""
        if self.max_new_tokens is not None:
            maximum = self.max_new_tokens
        elif self.max_length is not None:
            maximum = self.max_length - num_prompt_tokens
        else:
            maximum = DEFAULT_NEW_TOKENS if available is None else min(DEFAULT_NEW_TOKENS, available)
        minimum = (self.min_length or 0) - num_prompt_tokens if self.min_new_tokens is None else self.min_new_tokens
        return maximum, minimum


def _is_integer_from(minimum: int) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= minimum


def _is_number(is_valid: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, int | float) and not isinstance(x, bool) and is_valid(x)


def _is_none_or(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: x is None or is_valid(x)


_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (_is_none_or(_is_integer_from(1)), "a whole number from 1"),
    "max_length": (_is_none_or(_is_integer_from(1)), "a whole number from 1"),
    "min_new_tokens": (_is_none_or(_is_integer_from(0)), "a whole number from 0"),
    "min_length": (_is_none_or(_is_integer_from(0)), "a whole number from 0"),
    "do_sample": (lambda x: isinstance(x, bool), "true or false"),
    "seed": (_is_integer_from(0), "a whole number from 0"),
    "temperature": (_is_number(lambda x: 0 < x < float("inf")), "a number above 0; without do_sample it has no effect"),
    "top_k": (_is_integer_from(0), "a whole number from 0 (0: all tokens)"),
    "top_p": (_is_number(lambda x: 0 < x <= 1), "a number above 0 and at most 1"),
    "num_beams": (_is_integer_from(1), "a whole number from 1"),
    "length_penalty": (_is_number(lambda x: abs(x) < float("inf")), "a finite number"),
    "early_stopping": (lambda x: x in (True, False, "never") and not isinstance(x, float), "true, false or 'never'"),
    "num_return_sequences": (_is_integer_from(1), "a whole number from 1"),
    "no_repeat_ngram_size": (_is_integer_from(0), "a whole number from 0 (0: anything may be repeated)"),
    "repetition_penalty": (_is_number(lambda x: 0 < x < float("inf")), "a number above 0"),
    "eos_token_id": (
        lambda x: isinstance(x, tuple) and all(map(_is_integer_from(0), x)),
        "one token id, or a list of them",
    ),
    "decoder_start_token_id": (_is_none_or(_is_integer_from(0)), "a token id"),
}
KNOWN = tuple(f.name for f in fields(GenerationSettings))


def _check_names(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the fields of GenerationSettings; ModelError for unknown ones and for unsupported ones."""
    for name, value in settings.items():
        if name in KNOWN or name in IGNORED:
            continue
        if name not in UNSUPPORTED:
            close = difflib.get_close_matches(name, KNOWN, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ModelError(f"{folder}: generation setting {name!r} is unknown{hint}")
        neutral = UNSUPPORTED[name]
        if not (value is None or value is False or value in ([], {}) or (neutral is not None and value == neutral)):
            raise ModelError(f"{folder}: generation setting {name} = {value!r} is not supported")
    ours = {name: value for name, value in settings.items() if name in KNOWN}
    end_ids = ours.get("eos_token_id", ())
    return ours | {"eos_token_id": tuple(end_ids) if isinstance(end_ids, list | tuple) else (end_ids,)}


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where there is no file."""
    try:
        raw = read_json(path)
    except FileNotFoundError:
        return {}
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: should be an object, is a {type(raw).__name__}")
    return raw
