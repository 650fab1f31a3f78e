"""Cases of training with sharded parameters: torchrun runs this file, which trains many of them in one process group.

A case is a tiny recipe. `train_case` trains it on the ranks of this process, and returns what it logged, said, and has
learned. The tests compare that with the same case on one process, or on as many ranks under DDP.
"""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import models
from engine import checkpoint, config, distributed, memory, precision, train
from engine.cli import run_command
from engine.config import Config
from engine.distributed import Ranks
from engine.errors import USER_ERRORS
from engine.tasks import TASKS
from support import task_data, zoo
from support.runs import QuietStop, logged_rows, tiny_config, write_reviews, write_tiny_bert
from support.tiny_models import config_folder

# Adam divides by |g| + eps. A gradient that is 0 but for rounding (of the bias of the keys) would be a step of its own.
SMOOTH = {"model.dropout.all": 0.0, "optim.eps": 1e-3, "train.max_steps": 6, "eval.every_steps": 3}
# Lion takes its sign.
SIGNS = {"optim.name": "lion", "optim.eps": 1e-8, "model.freeze": ("*.key.bias",)}
NO_MASK = {"model.dropout.all": 1e-7}  # R-Drop needs a rate that is not 0
BAD_EXAMPLE = "r11"  # of the second step


@dataclass(frozen=True)
class Case:
    """A recipe. changes: its settings; data: a task and the model_type that learns it; none: tiny BERT, reviews.

    patch: a key of PATCHES. beside: "one" process, or "ddp" on as many ranks, where W changes dropout or rounding.
    is_last: whether its error ends the ranks.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    data: tuple[str, str] | None = None
    patch: str = ""
    beside: str = "one"
    is_last: bool = False


CASES = {
    "plain": Case(),
    "accumulation": Case({"train.micro_batch_size": 2, "train.global_batch_size": 13}),
    "single example": Case({"train.global_batch_size": 1}),
    "dropout": Case({"model.dropout.all": 0.2, "train.micro_batch_size": 3}, beside="ddp"),
    "drop path": Case({"model.dropout.drop_path": 0.3}, ("image-classification", "vit"), beside="ddp"),
    "bf16": Case({"train.precision": "bf16", "train.micro_batch_size": 3}, beside="ddp"),
    "bf16 T5": Case({"train.precision": "bf16"}, ("summarization", "t5"), beside="ddp"),
    "bf16 GPT-2": Case({"train.precision": "bf16"}, ("dialogue", "gpt2"), beside="ddp"),
    "bf16 ViT": Case({"train.precision": "bf16"}, ("image-classification", "vit"), beside="ddp"),
    "fp16": Case({"train.precision": "fp16"}, beside="ddp"),
    "fp16 overflow": Case({"train.precision": "fp16"}, patch="overflow", beside="ddp"),
    "average": Case({"regularize.ema_decay": 0.9}),
    "penalties": Case({"regularize.l1": 1e-3, "regularize.l2": 1e-2, "regularize.l2_sp": 1e-2}),
    "R-Drop": Case({"regularize.r_drop_weight": 1.0} | NO_MASK),
    "FGM": Case({"regularize.fgm_epsilon": 0.5}),
    "R-Drop and FGM": Case(
        {"regularize.fgm_epsilon": 0.5, "regularize.r_drop_weight": 1.0, "train.micro_batch_size": 3} | NO_MASK
    ),
    "LoRA": Case({"model.lora.rank": 2, "train.micro_batch_size": 3}),
    "DoRA": Case({"model.lora.rank": 2, "model.lora.dora": True, "train.micro_batch_size": 3}),
    "freezing": Case({"model.freeze": ("backbone.layers.0.*", "backbone.*embedding*")}),
    "gradual unfreezing": Case({"model.gradual_unfreezing": 1.0, "train.micro_batch_size": 3}),
    "activation checkpointing": Case({"train.activation_checkpointing": True, "train.micro_batch_size": 3}),
    "activation checkpointing bf16": Case(
        {"train.activation_checkpointing": True, "train.precision": "bf16"}, beside="ddp"
    ),
    "compile": Case({"train.compile": True}, patch="aot_eager"),
    "compile bf16": Case({"train.compile": True, "train.precision": "bf16"}, patch="aot_eager", beside="ddp"),
    "reinitialised layers": Case({"model.reinit_layers": 1}),
    "kept layers": Case({"model.keep_layers": 1}),
    "scratch": Case({"model.init": "scratch"}),
    "automatic micro-batches": Case({"train.micro_batch_size": "auto"}, patch="little memory"),
    "layer decay": Case({"optim.layer_decay": 0.8, "optim.head_lr": 1e-2}),
    "SGD": Case({"optim.name": "sgd", "optim.lr": 1e-2, "optim.eps": 1e-8}),
    "Lion": Case(SIGNS | {"train.micro_batch_size": 3, "regularize.ema_decay": 0.9}),
    "mean pooling": Case({"model.pooling": "mean"}),
    "clipping": Case({"train.max_grad_norm": 0.1}),
    "all at once": Case(
        {
            "train.micro_batch_size": 3,
            "train.activation_checkpointing": True,
            "regularize.ema_decay": 0.9,
            "regularize.l2": 1e-2,
            "regularize.l2_sp": 1e-2,
            "regularize.fgm_epsilon": 0.5,
            "model.freeze": ("backbone.*embedding*",),
            "optim.layer_decay": 0.8,
            "train.max_grad_norm": 0.1,
        }
    ),
    "BERT": Case(data=("relation-extraction", "bert")),
    "BERT, several labels": Case(data=("multi-label-classification", "bert")),
    "BERT, choices": Case({"train.micro_batch_size": 3}, ("multiple-choice", "bert")),
    "RoBERTa": Case(data=("token-classification", "roberta")),
    "RoBERTa, regression": Case(data=("text-regression", "roberta")),
    "DistilBERT": Case(data=("question-answering", "distilbert")),
    "ModernBERT": Case({"train.micro_batch_size": 3}, ("text-classification", "modernbert")),
    "GPT-2": Case({"train.micro_batch_size": 2}, ("dialogue", "gpt2")),
    "GPT-2, texts": Case(data=("causal-lm", "gpt2")),
    "GPT-2, classes": Case({"model.pooling": "last"}, ("text-classification", "gpt2")),
    "T5": Case({"train.micro_batch_size": 2}, ("summarization", "t5")),
    "T5, spans": Case(data=("span-corruption", "t5")),
    "mT5": Case(data=("translation", "mt5")),
    "ViT": Case(data=("image-classification", "vit")),
    "ViT, several labels": Case(data=("multi-label-image-classification", "vit")),
    "DeiT": Case(data=("image-classification", "deit")),
    "DINOv2": Case({"train.micro_batch_size": 3}, ("image-classification", "dinov2")),
    "DINOv2 with registers": Case(data=("image-classification", "dinov2_with_registers")),
    "BEiT": Case({"train.micro_batch_size": 3}, ("image-classification", "beit")),
    "sentence embedding": Case(  # of which one process computes the loss directly; a large scale enlarges rounding
        {"train.global_batch_size": 7, "sentence_embedding.scale": 5.0}, ("sentence-embedding", "bert")
    ),
    "sentence embedding, dropout": Case(
        {"model.dropout.all": 0.2, "train.micro_batch_size": 2}, ("sentence-embedding", "bert"), beside="ddp"
    ),
    "sentence embedding bf16": Case(
        {"train.precision": "bf16", "train.micro_batch_size": 2}, ("sentence-embedding", "bert"), beside="ddp"
    ),
    "NaN raises": Case(patch="bad example", beside="ddp"),
    "NaN is skipped": Case({"train.nan_policy": "skip"}, patch="bad example", beside="ddp"),
    "NaN in a gradient": Case({"train.nan_policy": "skip"}, patch="bad gradient", beside="ddp"),
}
# Other architectures with the same encoder.
CASES |= {
    kind: Case(data=("text-classification", kind))
    for kind in zoo.ZOO
    if kind not in {case.data[1] for case in CASES.values() if case.data}
}
# What ends the ranks, as the last case of a launch; what is refused.
LAST = {"out of memory": Case({"train.micro_batch_size": 3}, patch="out of memory", is_last=True)}
REFUSED = {"own module": Case(patch="own module")}
REFUSED |= {name: Case({"optim.name": name, "optim.eps": 1e-8}) for name in ("adafactor", "muon")}


def settings_of_case(case: Case, folder: Path) -> Config:
    """Write the files of a case below a folder, unless they exist; return its config, without a run folder."""
    home = folder / "-".join(case.data or ("reviews",))
    if case.data is None:
        if not home.is_dir():
            write_tiny_bert(home / "model")
            write_reviews(home / "reviews.jsonl", 120)
        return tiny_config(home / "model", home / "reviews.jsonl", folder / "unset", SMOOTH | case.changes)
    saved = home / "settings.json"
    if not saved.is_file():
        saved.parent.mkdir(parents=True)
        saved.write_text(json.dumps(_write_task(*case.data, home)))
    return config.override(Config(), json.loads(saved.read_text()) | SMOOTH | case.changes)


def _write_task(task: str, model_type: str, folder: Path) -> dict[str, Any]:
    """Write the data of a task and a random checkpoint of a model_type; return the settings."""
    settings = task_data.write(task, folder) | {"model.init": "pretrained"}
    model, kind, head = folder / "model", task_data.kind_of(task), TASKS[task].head
    vocabulary = len(task_data.VOCABULARY)
    changes = dict(kind.changes)
    if zoo.ZOO[model_type].modality != "image" and model_type not in (kind.model_type, "mt5"):
        positions = {"n_positions": 64, "max_position_embeddings": 40}
        changes = {"vocab_size": vocabulary}
        changes |= {name: value for name, value in positions.items() if name in zoo.ZOO[model_type].fields}
    config_folder(model, model_type, **changes)
    is_language_model = models.HEADS[head].is_language_model
    native = models.from_pretrained(model, head=head if is_language_model else None, init="scratch", seed=1)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for p in native.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    models.save_pretrained(native, model)
    return settings


def train_case(case: Case, cfg: Config, ranks: Ranks) -> dict[str, Any]:
    """Train a case; return its log, the messages of skipped steps, its error, and on rank 0 all weights."""
    said: list[str] = []
    built: list[nn.Module] = []
    build, explain = train.build_model, train.diagnose.explain_skipped_step

    def kept(*args: Any, **kwargs: Any) -> Any:
        result = build(*args, **kwargs)
        built.append(result[0])
        return result

    def noted(*args: Any) -> str:
        said.append(explain(*args))
        return said[-1]

    error = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_model", kept)
        patch.setattr(train.diagnose, "explain_skipped_step", noted)
        patch.setattr(checkpoint, "save", lambda *args: 0.1)  # that it saves is tested elsewhere
        patch.setattr(train, "write_card", lambda *args: "")  # there is no best/
        PATCHES[case.patch](patch, ranks)
        try:
            with checkpoint.claim(cfg, ranks) as resumed:
                train.train(cfg, ranks, QuietStop(), resumed)
        except USER_ERRORS as problem:
            if case.is_last:
                raise
            error = str(problem)
    weights = {name: whole(p) for model in built[:1] for name, p in model.named_parameters()}
    rows = logged_rows(cfg.run.folder) if (Path(cfg.run.folder) / "metrics.jsonl").is_file() else []
    return {"rows": rows, "said": said, "error": error, "weights": weights}


def whole(p: torch.Tensor) -> torch.Tensor:
    """Return a parameter in one piece, on all ranks."""
    full = getattr(p, "full_tensor", None)
    return (p if full is None else full()).detach().clone()


# What happens inside a run


def change_models(patch: pytest.MonkeyPatch, change: Callable[[models.TaskModel], object]) -> None:
    """Call `change` with each model that is built."""
    original = models.from_pretrained

    def changed(*args: Any, **kwargs: Any) -> models.TaskModel:
        model = original(*args, **kwargs)
        change(model)
        return model

    patch.setattr(models, "from_pretrained", changed)


def find_bad_example(model: models.TaskModel) -> list[torch.Tensor]:
    """Return a list that has, during a forward, which of its examples is the bad one: (B,) of bool."""
    state: list[torch.Tensor] = []

    def note(module: nn.Module, args: Any) -> None:
        state[:] = [torch.tensor([name == BAD_EXAMPLE for name in args[0].ids], dtype=torch.bool)]

    model.register_forward_pre_hook(note)
    return state


def spoil_example(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    """Make the output of one example NaN, on whichever rank it is."""

    def change(model: models.TaskModel) -> None:
        bad, classifier = find_bad_example(model), model.get_submodule("head.classifier")
        classifier.register_forward_hook(lambda _, __, out: out.masked_fill(bad[0][:, None], torch.nan))

    change_models(patch, change)


def spoil_gradient(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    """Make the gradient of the output of layer 0 NaN where one example is in the micro-batch."""

    def change(model: models.TaskModel) -> None:
        bad = find_bad_example(model)

        def spoil(module: nn.Module, args: Any, out: torch.Tensor) -> None:
            if out.requires_grad and bad[0].any():
                out.register_hook(lambda gradient: gradient * torch.nan)  # type: ignore[no-untyped-call]

        model.get_submodule("backbone.layers.0.attention").register_forward_hook(spoil)

    change_models(patch, change)


def overflow(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    """Start with a loss scale with which the first gradients overflow."""
    patch.setattr(precision.torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**23))


def compile_eagerly(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    compile_layers = models.compile_layers
    patch.setattr(models, "compile_layers", lambda model: compile_layers(model, backend="aot_eager"))


def lack_memory(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    patch.setattr(memory, "free_bytes", lambda device: 1_200_000.0)


def run_out_of_memory(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    """Raise what torch raises, in the second forward of rank 1."""
    forward, calls = precision.Precision.forward, []

    def failing(self: Any, model: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 3 and ranks.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, model, batch)

    patch.setattr(precision.Precision, "forward", failing)


def add_module(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    """Give the objective a trained parameter of its own, beside those of the model."""

    class Scaled(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model, self.scale = model, nn.Parameter(torch.ones(()))

        def forward(self, batch: Any) -> Any:
            out = self.model(batch)
            return models.Output(out.loss_sum * self.scale, out.logits)

    patch.setattr(train, "training_objective", lambda model, *args: Scaled(model))


PATCHES: dict[str, Callable[[pytest.MonkeyPatch, Ranks], object]] = {
    "": lambda patch, ranks: None,
    "bad example": spoil_example,
    "bad gradient": spoil_gradient,
    "overflow": overflow,
    "aot_eager": compile_eagerly,
    "little memory": lack_memory,
    "out of memory": run_out_of_memory,
    "own module": add_module,
}


def main(argv: list[str]) -> int:
    """Train the cases of FOLDER/cases.json, [[name, strategy], ...], and write the results below the folder."""
    folder = Path(argv[0])
    ranks = distributed.setup("cpu", 20)
    for name, strategy in json.loads((folder / "cases.json").read_text()):
        run = folder / f"{name}.{strategy}"
        case = (CASES | REFUSED | LAST)[name]
        cfg = config.override(
            settings_of_case(case, folder), {"run.folder": str(run), "distributed.strategy": strategy}
        )
        random.seed(0)
        result = train_case(case, cfg, ranks)
        weights = result.pop("weights")
        if ranks.is_main:
            save_file({key: value.contiguous() for key, value in weights.items()}, f"{run}.safetensors")
        Path(f"{run}.{ranks.rank}.json").write_text(json.dumps(result))
    gc.collect()  # a thread of gloo that still holds the Python hook of a wrapper would abort the exit
    return 0


if __name__ == "__main__":
    run_command(main)
