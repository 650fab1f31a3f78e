"""The configuration of a run: which settings there are, how a recipe and a command line are read, what is checked.

schema.py    what a setting is: its type, range and meaning; reading, overriding and writing a tree of settings
sections.py  the settings, one dataclass for each concern
recipe.py    recipes (TOML files), command lines, and the checks between settings
"""

from engine.config.recipe import (
    DEFAULT_RECIPE,
    RECIPES,
    SCHEMA,
    check,
    differences,
    help_text,
    parse,
    read_recipe,
    recipe_of,
    shipped_recipes,
    split_arguments,
    to_toml,
)
from engine.config.schema import (
    ConfigError,
    all_settings,
    choose_from,
    did_you_mean,
    get,
    override,
    sections,
)
from engine.config.sections import (
    AugmentSettings,
    Config,
    DataSettings,
    DropoutSettings,
    EvalSettings,
    GenerateSettings,
    ImageAugmentSettings,
    LogSettings,
    LoraSettings,
    ModelSettings,
    OptimSettings,
    RegularizeSettings,
    RunSettings,
    TextAugmentSettings,
    TrainSettings,
)

__all__ = [
    "DEFAULT_RECIPE",
    "RECIPES",
    "SCHEMA",
    "AugmentSettings",
    "Config",
    "ConfigError",
    "DataSettings",
    "DropoutSettings",
    "EvalSettings",
    "GenerateSettings",
    "ImageAugmentSettings",
    "LogSettings",
    "LoraSettings",
    "ModelSettings",
    "OptimSettings",
    "RegularizeSettings",
    "RunSettings",
    "TextAugmentSettings",
    "TrainSettings",
    "all_settings",
    "check",
    "choose_from",
    "did_you_mean",
    "differences",
    "get",
    "help_text",
    "override",
    "parse",
    "read_recipe",
    "recipe_of",
    "sections",
    "shipped_recipes",
    "split_arguments",
    "to_toml",
]
