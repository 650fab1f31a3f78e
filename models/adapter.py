"""The files of a LoRA adapter as peft has them: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import json
import reprlib
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.checkpoints.tensor_files import JsonObject, TensorFiles, read_json
from models.checkpoints.weights import saved_tensors
from models.errors import ModelError
from models.lora import LoraLinear, lora_layers
from models.task_model import TaskModel

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
# In a folder of its own within a checkpoint: transformers, where peft is installed, would add an adapter beside
# model.safetensors to its weights, which have it already.
FOLDER = "adapter"

# An adapter_config.json may describe more than LoraLinear computes. IGNORED_FIELDS do not affect the result, or repeat
# what the tensors say. Any other field must have one of the NEUTRAL_VALUES.
IGNORED_FIELDS = (
    *("peft_type", "r", "lora_alpha", "init_lora_weights", "use_dora"),  # checked by _check_config
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "modules_to_save", "lora_dropout", "fan_in_fan_out"),
    *("megatron_core", "qalora_group_size", "eva_config"),  # options of other features and of initialisation
)
# Values of init_lora_weights that leave the base weights unchanged.
SUPPORTED_INITS: tuple[object, ...] = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
NEUTRAL_VALUES: tuple[object, ...] = (None, False, "none", "", [], {})


def find_adapter(checkpoint: Path) -> Path:
    """Return the folder of the adapter of a checkpoint: FOLDER in it, or in older ones the checkpoint itself."""
    return checkpoint / FOLDER if (checkpoint / FOLDER).is_dir() else checkpoint


def save_adapter(model: TaskModel, folder: str | Path) -> None:
    """Write an adapter, a trained head and a config into a new or existing folder, as peft reads them."""
    folder = Path(folder)
    save_adapter_config(model, folder)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter_tensors(model).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)  # safetensors writes files of mode 0600


def save_adapter_config(model: TaskModel, folder: Path) -> None:
    """Write the adapter's config into a new or existing folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _adapter_config(model, lora_layers(model))
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: TaskModel, folder: str | Path) -> None:
    """Copy an adapter, ours or peft's, into a model to which add_lora was applied with the same options.

    peft leaves out BERT's pooler. So a head parameter that the adapter lacks stays as it is if the base checkpoint has
    it. Raises ModelError where adapter and model differ, in config or in tensors.
    """
    path = Path(folder) / WEIGHTS_FILE
    ours = adapter_tensors(model)
    trained = _check_config(Path(folder) / CONFIG_FILE, lora_layers(model))
    new = {parameter for name, parameter in model.named_parameters() if name in set(model.report.initialised)}
    with ExitStack() as stack:
        files = TensorFiles(path.parent, [path], stack)
        mismatched = files.entries.keys() - ours.keys()
        for key in ours.keys() - files.entries.keys():
            if ".lora_" in key or ours[key] in new or any(f".{module}." in key for module in trained):
                mismatched.add(key)
        if mismatched:
            raise ModelError(
                f"{path}: its tensors are not those of this model's adapter (differing: "
                f"{', '.join(sorted(mismatched)[:4])}); the targets and the head must be those it was trained with"
            )
        with torch.no_grad():
            for key in files.entries:
                shape, parameter = files.entries[key].shape, ours[key]
                if shape != parameter.shape:
                    raise ModelError(f"{path}: {key} has shape {list(shape)}, not {list(parameter.shape)}")
                files.read_into(key, parameter)


def _check_config(path: Path, layers: dict[str, LoraLinear]) -> list[str]:
    """Return the names in modules_to_save; ModelError unless rank, alpha and all other fields fit `layers`.

    Which layers the adapter changes is not checked here: the names of its tensors say it.
    """
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; without it the alpha of the adapter is unknown") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: not the config of a LoRA adapter (peft_type = LORA)")
    if not layers:
        raise ModelError("this model has no LoRA layers to load an adapter into; models.add_lora makes them")
    first = next(iter(layers.values()))
    for name, setting, value in (("r", "rank", first.rank), ("lora_alpha", "alpha", first.alpha)):
        if config.get(name) != value:
            theirs = reprlib.repr(config.get(name))
            raise ModelError(f"{path}: {name} = {theirs}, but this model has model.lora.{setting} = {value:g}")
    has_lengths = first.lora_magnitude is not None
    if bool(config.get("use_dora")) != has_lengths:
        raise ModelError(
            f"{path}: use_dora = {reprlib.repr(config.get('use_dora'))}, but this model has model.lora.dora = "
            f"{str(has_lengths).lower()}"
        )
    start = config.get("init_lora_weights")
    if start not in SUPPORTED_INITS:
        raise ModelError(f"{path}: init_lora_weights = {reprlib.repr(start)} is not supported: it changes the base too")
    for name, value in config.items():
        if name not in IGNORED_FIELDS and value not in NEUTRAL_VALUES:
            raise ModelError(f"{path}: {reprlib.repr(name)} = {reprlib.repr(value)} is not supported in an adapter")
    trained = config.get("modules_to_save") or []
    if not isinstance(trained, list):
        raise ModelError(f"{path}: modules_to_save = {reprlib.repr(trained)} is not a list of names")
    return [str(module) for module in trained]


def _peft_name(model: TaskModel, ours: str) -> str:
    """Return the name of a parameter in peft's files."""
    return "base_model.model." + model.spec.architecture.weights.exported_name(ours, model.head_name)


def adapter_tensors(model: TaskModel) -> dict[str, Tensor]:
    """Return {name in the file: parameter} of A, B and the trained parts of the head."""
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        key = _peft_name(model, f"{name}.weight").removesuffix(".weight")
        tensors |= {f"{key}.lora_A.weight": layer.lora_a, f"{key}.lora_B.weight": layer.lora_b}
        if layer.lora_magnitude is not None:
            tensors[f"{key}.lora_magnitude_vector"] = layer.lora_magnitude
    if model.head is not None:
        for name, tensor in saved_tensors(model.head).items():
            if tensor.requires_grad or not isinstance(tensor, nn.Parameter):  # a buffer changes without a gradient
                tensors[_peft_name(model, f"head.{name}")] = tensor
    return tensors


def _adapter_config(model: TaskModel, layers: dict[str, LoraLinear]) -> JsonObject:
    """Return the adapter_config.json of a model."""
    if not layers:
        raise ModelError("this model has no LoRA layers to save; models.save_pretrained writes the whole model")
    first = next(iter(layers.values()))
    table, head = model.spec.architecture.weights, model.head_name
    names = [table.exported_name(f"{name}.weight", head).removesuffix(".weight") for name in layers]
    parameters = model.head.named_parameters() if model.head is not None else ()
    trained = [f"head.{name}" for name, p in parameters if p.requires_grad]
    modules = sorted({table.exported_name(name, head).rpartition(".")[0] for name in trained})
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": model.report.source,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.rate,  # as configured: a schedule may have changed the rate of this step
        "target_modules": names,
        "modules_to_save": modules or None,
        "fan_in_fan_out": any(table.find_row(f"{name}.weight", head).transpose for name in layers),
        "bias": "none",
        "use_dora": first.lora_magnitude is not None,
        "inference_mode": True,
    }
