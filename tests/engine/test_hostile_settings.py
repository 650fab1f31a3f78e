"""Every setting with hostile values: what is accepted can be kept in a recipe, the rest is a sentence with its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, ConfigError, all_settings, check, get, override, read_recipe, to_toml

ALL = all_settings(Config())
RUNNABLE = override(Config(), {"data.train": "a.tsv", "model.name": "m"})
NUMBERS = [10**400, -(10**400), 2**64, 2**63, 2**63 - 1, -(2**63), 10**18, float("inf"), float("-inf"), float("nan")]
NUMBERS += [-0.0, 1e300, 1e-300, 1e13, 1e-31, 1j, True]
TEXTS = ["1e400", "-1e400", "nan", "inf", "9" * 5_000, "1e18", "0x10", "1_000", "١٢", "", " ", "\0", "a\0b", "\udcff"]
TEXTS += ["x" * 100_000, "-", "--", "[", "]", "[]", '["', '"', "\n", "=", "auto", "none", ",,,", "../" * 999, "\ufeff"]
OTHERS = [[], [""], [[]], [None], [{}], {}, None, b"x", object(), ["\udcff"], [10**400], ["1e400"]]


def attempt(key: str, value: Any) -> Config | str:
    """Return the checked config with a value, or the sentence that refuses it."""
    try:
        config = override(RUNNABLE, {key: value})
        check(config)
    except ConfigError as error:
        return str(error)
    return config


@pytest.mark.parametrize("key", ALL)
def test_a_hostile_value_is_a_setting_or_a_sentence(tmp_path: Path, key: str):
    recipe = tmp_path / "recipe.toml"
    for value in [*NUMBERS, *TEXTS, *OTHERS]:
        outcome = attempt(key, value)
        if isinstance(outcome, str):
            assert key in outcome
            assert len(outcome) < 2_000
            continue
        found = get(outcome, key)
        assert not isinstance(found, float) or found == 0 or 1e-30 <= abs(found) <= 1e12
        assert not isinstance(found, int) or abs(found) < 2**63
        if isinstance(value, str) and len(value) < 100:
            recipe.write_text(to_toml(outcome), encoding="utf-8")
            assert read_recipe(str(recipe)) == outcome


@pytest.mark.parametrize("name", ["a\0b.toml", "x" * 5_000, "x/" * 3_000, "\udcff"])
def test_a_recipe_that_cannot_have_its_name_is_a_sentence(name: str):
    with pytest.raises(ConfigError, match=r"recipe .*(cannot be read|null byte|surrogates)"):
        read_recipe(name)
