"""The variants of a study: a grid of settings, one change at a time, or trials within ranges."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.random_streams import STUDY_SAMPLE, STUDY_TRIAL
from engine.config import ConfigError

UNCHANGED = {"change": "as it is"}
GRID_EXAMPLE = "regularize.l2=0,1e-4"  # in messages
RANGE_EXAMPLE = "'optim.lr=1e-5..1e-4 log'"
CHANGE_EXAMPLE = "'stop early: eval.patience=2 eval.metric=loss'"
RANGE = re.compile(r"\s*(\S+?)\.\.(\S+?)(\s+log)?\s*")
DIGITS = 6  # significant ones of a value that is drawn at random


@dataclass(frozen=True)
class Variant:
    """A change of the recipe, and its row in the table."""

    labels: dict[str, str]  # {column: cell}
    settings: dict[str, str]
    folder_name: str


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included. is_log: equal factors are equally likely."""

    low: float
    high: float
    is_log: bool
    is_integer: bool

    def sample(self, rng: np.random.Generator) -> str:
        """Return a random value as text."""
        if self.is_integer and not self.is_log:
            return str(int(rng.integers(int(self.low), int(self.high), endpoint=True)))
        margin = 0.5 if self.is_integer else 0.0  # each whole number has an interval around it
        low, high = self.low - margin, self.high + margin
        value = math.exp(rng.uniform(math.log(low), math.log(high))) if self.is_log else rng.uniform(low, high)
        value = min(max(value, self.low), self.high)
        return str(round(value)) if self.is_integer else f"{value:.{DIGITS}g}"


Space = dict[str, Range | list[str]]  # {"section.key": its range, or the values to choose from}


def read_space(texts: Iterable[str], kinds: Mapping[str, str]) -> Space:
    """Return what each "KEY=VALUE,VALUE,...", "KEY=A..B" or "KEY=A..B log" says; ConfigError for another form.

    kinds: the type of each setting that is a number, int or float. Of other settings, A..B is a value.
    """
    space: Space = {}
    for text in texts:
        key, _, values = text.partition("=")
        if key in space:
            raise ConfigError(f"--vary {key} is given twice: name all its values in one")
        space[key] = _read_range(key, values, kinds.get(key, "")) or [value.strip() for value in values.split(",")]
        found = space[key]
        if isinstance(found, list) and key in kinds and ".." in values:
            raise ConfigError(
                f"--vary {text!r}: a range stands alone, as A..B or 'A..B log', as in --vary {RANGE_EXAMPLE}"
            )
        if isinstance(found, list) and (len(set(found)) < len(found) or found == [""]):
            raise ConfigError(f"--vary {text!r} should name each value once, as in --vary {GRID_EXAMPLE}")
    return space


def _read_range(key: str, text: str, kind: str) -> Range | None:
    """Return the range that a text names for a setting that is a number; None for any other text."""
    found = RANGE.fullmatch(text)
    if not kind or found is None:
        return None
    ends = found.groups()[:2]
    is_integer = kind == "int"
    try:
        # 2..5 epochs are whole ones, though fractions are allowed; a dropout of 0..1 is none.
        is_integer = is_integer or (all(end.isdecimal() for end in ends) and int(ends[1]) > 1)
        low, high = (int(end) if is_integer else float(end) for end in ends)
        if low < high and math.isfinite(low) and math.isfinite(high) and not (found[3] and low <= 0):
            return Range(low, high, bool(found[3]), is_integer)
    except ValueError:
        pass
    kind = "whole numbers" if is_integer else "numbers"
    raise ConfigError(
        f"--vary {key}={text}: a range has two {kind}, the lower one first, and above 0 with log, as in --vary "
        f"{RANGE_EXAMPLE}"
    )


def ranges(space: Space) -> dict[str, Range]:
    """Return the settings of a space that have a range."""
    return {key: values for key, values in space.items() if isinstance(values, Range)}


def corners(space: Space) -> Iterable[dict[str, str]]:
    """Yield settings with both ends of each range and each value of a list: if all are valid, all between are."""
    first = {key: str(x.low) if isinstance(x, Range) else x[0] for key, x in space.items()}
    yield first
    for key, values in space.items():
        for value in [str(values.high)] if isinstance(values, Range) else values[1:]:
            yield first | {key: value}


def describe_ranges(space: Space) -> list[str]:
    """Return a line for each range, on how it was read."""
    return [
        f"{key}: {'whole numbers' if x.is_integer else 'numbers'} from {x.low:g} to {x.high:g}"
        f"{', equal factors equally likely' if x.is_log else ''}"
        for key, x in ranges(space).items()
    ]


def grid_variants(space: Mapping[str, Range | list[str]]) -> list[Variant]:
    """Return all combinations of the values of a space without ranges; of an empty one, the recipe unchanged."""
    variants = []
    for chosen in itertools.product(*space.values()):  # type: ignore[arg-type]
        settings = dict(zip(space, chosen, strict=True))
        name = ",".join(f"{key}={value}" for key, value in settings.items())
        variants.append(Variant(settings, settings, _as_folder_name(name or UNCHANGED["change"])))
    return variants


def sample_variants(variants: list[Variant], count: int, seed: int) -> list[Variant]:
    """Return `count` variants of a grid chosen by `seed`, in its order; all for 0, or where there are fewer."""
    if not 0 < count < len(variants):
        return variants
    chosen = np.random.default_rng([seed, STUDY_SAMPLE]).choice(len(variants), count, replace=False)
    return [variants[i] for i in sorted(chosen.tolist())]


def trial_variant(number: int, settings: Mapping[str, str]) -> Variant:
    """Return the variant of a trial."""
    return Variant({"trial": str(number)} | dict(settings), dict(settings), f"trial{number}")


def random_trials(space: Space, count: int, seed: int) -> list[Variant]:
    """Return trials with random values. Those of a trial depend on the seed and its number only."""
    trials = []
    for number in range(count):
        rng = np.random.default_rng([seed, STUDY_TRIAL, number])
        settings = {
            key: values.sample(rng) if isinstance(values, Range) else values[int(rng.integers(len(values)))]
            for key, values in space.items()
        }
        trials.append(trial_variant(number, settings))
    return trials


def change_variants(texts: Sequence[str]) -> list[Variant]:
    """Return the recipe unchanged, and then each "NAME: KEY=VALUE KEY=VALUE ..." alone."""
    variants = [Variant(UNCHANGED, {}, _as_folder_name(UNCHANGED["change"]))]
    for text in texts:
        name, _, rest = map(str.strip, text.partition(":"))
        try:
            pairs = [word.partition("=") for word in shlex.split(rest)]
        except ValueError:  # an unclosed quotation mark
            pairs = []
        settings = {key: value for key, equals, value in pairs if equals}
        if not any(map(str.isalnum, name)) or not pairs or len(settings) < len(pairs):
            raise ConfigError(
                f"--change {text!r} should be a name and settings, each once, as in --change {CHANGE_EXAMPLE}"
            )
        variant = Variant({"change": name}, settings, _as_folder_name(name))
        if variant.folder_name in (other.folder_name for other in variants):
            raise ConfigError(f"--change {text!r}: another change has this name, or one with the same folder name")
        variants.append(variant)
    return variants


def _as_folder_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in ".,=+-_" else "_" for c in name)
