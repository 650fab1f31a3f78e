"""The files of sentence-transformers beside a checkpoint, which say how its vectors are pooled: read and written.

- modules.json: a list of modules, a Transformer, then a Pooling, then perhaps a Normalize;
- 1_Pooling/config.json: flags pooling_mode_..., one of which is true;
- sentence_bert_config.json: max_seq_length, in tokens with the special ones;
- config_sentence_transformers.json: prompts, texts to put before others. They and do_lower_case are not applied here.

https://sbert.net/docs/package_reference/sentence_transformer/models.html
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from models.checkpoints.tensor_files import JsonObject, read_json
from models.errors import ModelError

MODULES, TRANSFORMER, POOLING = "modules.json", "sentence_bert_config.json", "1_Pooling"
PROMPTS = "config_sentence_transformers.json"
FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}
UNREAD_FLAGS = (
    "pooling_mode_max_tokens",
    "pooling_mode_mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens",
)
WAY_OUT = "give model.pooling (cls, mean or last) to pool the hidden states without these files"


@dataclass(frozen=True)
class SentenceFiles:
    """What the files say. max_length: tokens of a text, with the special ones; None: not said.

    unapplied: what else they say about reading texts, in a phrase each, that is not done here.
    """

    pooling: str
    normalize: bool  # whether the vectors are divided by their length
    max_length: int | None
    unapplied: tuple[str, ...] = ()


def read_sentence_files(folder: Path) -> SentenceFiles | None:
    """Return what the files of a folder say; None without them. ModelError for a module that is not computed here."""
    path = folder / MODULES
    if not path.is_file():
        return None
    modules = read_json(path)
    entries = modules if isinstance(modules, list) else []
    if not entries or not all(isinstance(entry, dict) and isinstance(entry.get("type"), str) for entry in entries):
        raise ModelError(f"{path} should be a list of modules, each with a type; {WAY_OUT}")
    kinds = [entry["type"].rpartition(".")[2] for entry in entries]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ModelError(
            f"{path} has the modules {', '.join(kinds)}; only Transformer, Pooling and Normalize are computed here; "
            f"{WAY_OUT}"
        )
    inner = [PurePosixPath(str(entry.get("path", ""))) for entry in entries[:2]]
    if any(part.is_absolute() or ".." in part.parts for part in inner):
        raise ModelError(f"{path}: a path of a module should be a folder beside it; {WAY_OUT}")
    transformer = folder / inner[0] / TRANSFORMER
    unapplied = (*_find_unapplied(transformer), *_find_prompts(folder / PROMPTS))
    pooling = _read_pooling(folder / inner[1] / "config.json")
    return SentenceFiles(pooling, "Normalize" in kinds, _read_max_length(transformer), unapplied)


def _read_pooling(path: Path) -> str:
    """Return the pooling that a config.json of the module Pooling says."""
    config = _read_object(path)
    chosen = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    named = config.get("pooling_mode")  # of newer files, instead of the flags
    chosen += [named] if isinstance(named, str) else []
    known = {flag: ours for ours, flag in FLAGS.items()} | {"cls": "cls", "mean": "mean", "lasttoken": "last"}
    poolings = {known.get(name, "") for name in chosen}
    if len(poolings) != 1 or "" in poolings:
        raise ModelError(
            f"{path} pools by {', '.join(chosen) or 'no mode'}; one of {', '.join(FLAGS.values())} is computed here; "
            f"{WAY_OUT}"
        )
    return poolings.pop()


def _read_max_length(path: Path) -> int | None:
    """Return max_seq_length; None where it is not said."""
    length = _read_object(path).get("max_seq_length") if path.is_file() else None
    if length is None:
        return None
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ModelError(f"{path}: max_seq_length = {length!r:.40} should be a number of tokens, from 1")
    return length


def _find_unapplied(path: Path) -> list[str]:
    """Return a phrase for each setting of the module Transformer that changes its vectors, and is not applied here."""
    config = _read_object(path) if path.is_file() else {}
    found = ["do_lower_case = true"] if config.get("do_lower_case") else []
    found += [
        f"{name} = {config[name]!r:.60}" for name in config if name.endswith(("_args", "_kwargs")) and config[name]
    ]
    task = config.get("transformer_task", "feature-extraction")
    return found + ([f"transformer_task = {task!r:.60}"] if task != "feature-extraction" else [])


def _find_prompts(path: Path) -> list[str]:
    """Return a phrase on the texts that should stand before others; none where all are empty."""
    config = _read_object(path) if path.is_file() else {}
    prompts = config.get("prompts")
    texts = {name: text for name, text in prompts.items() if text} if isinstance(prompts, dict) else {}
    if not texts:
        return []
    default = config.get("default_prompt_name")
    which = f", of which {default!r:.40} is the default" if default in texts else ""
    return [f"prompts = {texts!r:.200}{which}"]


def _read_object(path: Path) -> JsonObject:
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file, and {MODULES} names it; {WAY_OUT}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} should be a JSON object")
    return content


def write_sentence_files(folder: Path, files: SentenceFiles, hidden_size: int) -> None:
    """Write the files beside an export, so that SentenceTransformer(folder) computes the same vectors."""
    kinds = [("", "Transformer"), (POOLING, "Pooling"), *([("2_Normalize", "Normalize")] if files.normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    flags = {flag: ours == files.pooling for ours, flag in FLAGS.items()} | dict.fromkeys(UNREAD_FLAGS, False)
    contents = {
        MODULES: modules,
        f"{POOLING}/config.json": {"word_embedding_dimension": hidden_size, **flags, "include_prompt": True},
        TRANSFORMER: {"max_seq_length": files.max_length, "do_lower_case": False},
        PROMPTS: {
            "similarity_fn_name": "cosine" if files.normalize else "dot",
            "prompts": {},
            "default_prompt_name": None,
        },
    }
    (folder / POOLING).mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
