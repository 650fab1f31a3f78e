"""The configuration of a run: the settings, the recipes and command lines that set them, and their checks.

schema.py          what a setting is; convert, override and write a tree of settings
sections.py        the settings, one dataclass for each section
data_settings.py   the section [data]
model_settings.py  the sections [model], [model.dropout] and [model.lora]
task_sections.py   the sections that only some tasks read
recipe.py          recipes (TOML files) and command lines become one checked Config
command_line.py    split a command line; describe a setting
renamed.py         the names that settings had before
hf_names.py        Hugging Face's names of arguments, and ours
"""

from engine.config.data_settings import DataSettings
from engine.config.model_settings import DropoutSettings, LoraSettings, ModelSettings
from engine.config.recipe import (
    DEFAULT_RECIPE,
    RECIPES,
    SCHEMA,
    check,
    differences,
    override,
    override_recipe,
    parse,
    read_recipe,
    shipped_recipes,
    split_arguments,
    to_dict,
    to_recipe,
    to_short_toml,
    to_toml,
)
from engine.config.schema import (
    ConfigError,
    all_settings,
    choose_from,
    did_you_mean,
    get,
    sections,
)
from engine.config.sections import (
    CheckpointSettings,
    Config,
    DistributedSettings,
    EvalSettings,
    LogSettings,
    OptimSettings,
    RegularizeSettings,
    RunSettings,
    TrainSettings,
)
from engine.config.task_sections import (
    AugmentSettings,
    CausalLMSettings,
    GenerateSettings,
    ImageAugmentSettings,
    ImageClassificationSettings,
    MaskedLMSettings,
    MultipleChoiceSettings,
    MultiTaskSettings,
    QuestionAnsweringSettings,
    RelationExtractionSettings,
    SentenceEmbeddingSettings,
    Seq2SeqSettings,
    SpanCorruptionSettings,
    TextAugmentSettings,
    TokenClassificationSettings,
)

__all__ = [
    "DEFAULT_RECIPE",
    "RECIPES",
    "SCHEMA",
    "AugmentSettings",
    "CausalLMSettings",
    "CheckpointSettings",
    "Config",
    "ConfigError",
    "DataSettings",
    "DistributedSettings",
    "DropoutSettings",
    "EvalSettings",
    "GenerateSettings",
    "ImageAugmentSettings",
    "ImageClassificationSettings",
    "LogSettings",
    "LoraSettings",
    "MaskedLMSettings",
    "ModelSettings",
    "MultiTaskSettings",
    "MultipleChoiceSettings",
    "OptimSettings",
    "QuestionAnsweringSettings",
    "RegularizeSettings",
    "RelationExtractionSettings",
    "RunSettings",
    "SentenceEmbeddingSettings",
    "Seq2SeqSettings",
    "SpanCorruptionSettings",
    "TextAugmentSettings",
    "TokenClassificationSettings",
    "TrainSettings",
    "all_settings",
    "check",
    "choose_from",
    "did_you_mean",
    "differences",
    "get",
    "override",
    "override_recipe",
    "parse",
    "read_recipe",
    "sections",
    "shipped_recipes",
    "split_arguments",
    "to_dict",
    "to_recipe",
    "to_short_toml",
    "to_toml",
]
