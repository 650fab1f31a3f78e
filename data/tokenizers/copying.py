"""Copy the tokenizer of a checkpoint to those made from it, so that transformers opens it as the same one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data.tokenizers.load import COMPANIONS, FILES, MODEL_TYPES, ROLES, TOKENIZER_CLASSES, read_object
from data.writing import to_json

SETTINGS = "tokenizer_config.json"
# The class of transformers that uses a tokenizer.json as it is; the class of a model_type may build another one.
AS_IT_IS = "PreTrainedTokenizerFast"
WITH_TOKEN_TYPES = ("bert", "ernie", "electra", "albert", "deberta-v2")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a checkpoint's files beside its weights and config.json, byte for byte, from one folder to another.

    Where no file names the class of a tokenizer.json, tokenizer_config.json is written in the target.
    """
    for name in (*FILES, *COMPANIONS):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / "tokenizer.json").is_file() and not (source / SETTINGS).is_file():
        settings = settings_of(source)
        (target / SETTINGS).write_text(to_json(settings, indent=2) + "\n", encoding="utf-8")


def settings_of(folder: Path) -> dict[str, Any]:
    """Return the tokenizer_config.json of a folder that has none, by its tokenizer.json and its config.json.

    The role of a special token is that in config.json, else the usual one of the model_type. Tokens that a text can
    have are no special ones here, and stay so; the pad token is named anyway, since no batch can do without.
    """
    config = read_object(folder / "config.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model_type = str(config.get("model_type") or "")
    usual = TOKENIZER_CLASSES[MODEL_TYPES[model_type]].special if model_type in MODEL_TYPES else {}
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    roles = {}
    for role in ROLES:
        token = usual.get(role, "")
        token = token["content"] if isinstance(token, dict) else token
        number = config.get(f"{role}_token_id")
        named = tokenizer.id_to_token(number) if type(number) is int and number >= 0 else None
        found = named or token
        if found in special or (role == "pad" and tokenizer.token_to_id(found) is not None):
            roles[f"{role}_token"] = found
    inputs = ["input_ids", *(["token_type_ids"] if model_type in WITH_TOKEN_TYPES else []), "attention_mask"]
    return {"tokenizer_class": AS_IT_IS, **roles, "model_input_names": inputs}
