"""The [model] section at work: LoRA, freezing and shallower models through a whole run, stopped and resumed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import StopAfter, assert_same_run, logged_rows, run_training, tiny_config
from support.tiny_models import config_folder
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors

import models
from data import load_tokenizer
from data.errors import DataError
from engine import config as configs
from engine import predict_rows
from engine.config import ConfigError
from engine.manifest import seal
from models import ModelError

NF4_LEVELS = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4_LEVELS += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4_LEVELS += [
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]

CHANGES = {
    "lora": {"model.lora.rank": 2, "model.lora.dropout": 0.1},
    "lora-shallow": {"model.lora.rank": 2, "model.keep_layers": 1, "model.lora.target_modules": ("*.mlp.*",)},
    "dora": {"model.lora.rank": 2, "model.lora.dora": True, "model.lora.dropout": 0.1},
    "frozen": {"model.freeze": ("backbone.*embeddings.*", "backbone.layers.0.*")},
    "shallow": {"model.keep_layers": 1},
    "restarted": {"model.reinit_layers": 1},
    "held": {"regularize.l2_sp": 0.1, "regularize.l1": 1e-5, "regularize.penalized_parameters": ("*.weight",)},
    "dropout early": {"model.dropout.all": 0.3, "model.dropout.schedule": "early", "model.dropout.switch_step": 10},
    "averaged": {"regularize.ema_decay": 0.9},
    "weighted": {"regularize.class_weights": ("balanced",)},
    "balanced": {"train.sampler": "balanced"},
    "unfrozen gradually": {"model.gradual_unfreezing": 5},
    "two passes": {"regularize.r_drop_weight": 1.0, "model.dropout.all": 0.2},
    "adversarial": {"regularize.fgm_epsilon": 0.1},
    "layer-wise": {"optim.layer_decay": 0.5, "optim.head_lr": 1e-2},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_p04_such_a_run_resumes_bit_for_bit(tiny, tmp_path, changes):
    whole = tiny(**changes | {"run.folder": str(tmp_path / "whole")})
    run_training(whole)
    cut = {"run.folder": str(tmp_path / "cut")}
    assert run_training(tiny(**changes | cut), StopAfter(7)) is None
    run_training(tiny(**changes | cut | {"run.resume": "yes"}))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_only_what_is_trained_moves(tiny, checkpoint_folder, changes):
    config = tiny(**changes)
    run_training(config)
    before = models.from_pretrained(checkpoint_folder, keep_layers=config.model.keep_layers).backbone.state_dict()
    trained = models.from_pretrained(Path(config.run.folder) / "last", head="sequence-classification")
    moved = {n for n, p in trained.backbone.named_parameters() if not torch.equal(p, before[n])}
    everything = {n for n, _ in trained.backbone.named_parameters()}
    if config.model.lora.rank:
        targets = (
            ("mlp.up.weight", "mlp.down.weight")
            if config.model.lora.target_modules
            else ("query.weight", "value.weight")
        )
        assert moved == {n for n in everything if n.endswith(targets)}
    elif config.model.freeze:
        assert moved == {n for n in everything if "embeddings" not in n and not n.startswith("layers.0.")}
    else:
        assert moved == everything
    assert len(trained.backbone.layers) == (config.model.keep_layers or 2)


def test_lora_checkpoint_has_adapter_and_merged_weights(tiny):
    config = tiny(**{"model.lora.rank": 4, "train.max_steps": 60, "optim.lr": 1e-2, "model.dropout.all": 0.0})
    run_training(config)
    losses = [row["loss"] for row in logged_rows(config.run.folder) if "lr" in row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    best = Path(config.run.folder) / "best"
    adapter = best / "adapter"
    assert (adapter / "adapter_model.safetensors").stat().st_size < (best / "model.safetensors").stat().st_size / 2
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
    optimizer = load_file(Path(config.run.folder) / "last" / "optimizer.safetensors")
    assert {key.partition("/")[2].rpartition(".")[2] for key in optimizer} == {"lora_a", "lora_b", "weight", "bias"}
    assert all("lora" in key or "/head." in key for key in optimizer)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("storage", ["bf16", "int8", "nf4"])
def test_stored_weights_train_as_a_file_of_rounded_ones(
    tiny, tmp_path, checkpoint_folder, reviews, storage, dora, capsys
):
    """The same losses and weights, bit for bit, where the rounded weights are in the file and the run is in fp32."""
    if storage == "nf4":
        pytest.importorskip("bitsandbytes")
    lora = {"model.lora.rank": 4, "model.lora.dora": dora, "model.lora.dropout": 0.1, "optim.lr": 1e-2}
    config = tiny(**lora, **{"model.lora.frozen_weights": storage})
    run_training(config)
    assert "12 frozen linear layers are kept in " + storage in " ".join(capsys.readouterr().out.split())
    rounded = models.from_pretrained(checkpoint_folder)
    for layer in rounded.backbone.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = rounded_by_hand(layer.weight.data, storage)
    copy = shutil.copytree(checkpoint_folder, tmp_path / "rounded")
    models.save_pretrained(rounded, copy)
    by_hand = tiny_config(copy, reviews, tmp_path / "by_hand", lora)
    run_training(by_hand)
    for folder in ("best", "last"):
        found = load_file(Path(config.run.folder) / folder / "model.safetensors")
        expected = load_file(Path(by_hand.run.folder) / folder / "model.safetensors")
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    losses = [[row["loss"] for row in logged_rows(c.run.folder) if "loss" in row] for c in (config, by_hand)]
    assert losses[0] == losses[1]
    resumed = tiny(**lora, **{"model.lora.frozen_weights": storage, "run.folder": str(tmp_path / "cut")})
    run_training(resumed, StopAfter(7))
    run_training(replace(resumed, run=replace(resumed.run, resume="yes")))
    assert_same_run(tmp_path / "cut", config.run.folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.lora.dora": True}, "model.lora.dora has no effect without LoRA"),
        ({"model.lora.frozen_weights": "int8"}, "model.lora.frozen_weights has no effect without LoRA"),
        (
            {"model.lora.rank": 2, "model.lora.frozen_weights": "int8", "distributed.strategy": "fsdp"},
            "frozen_weights = 'int8' works with distributed.strategy = 'ddp'",
        ),
    ],
)
def test_settings_of_lora_without_effect_are_refused(tiny, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_other_frozen_weights_are_refused_in_a_resume(tiny):
    config = tiny(**{"model.lora.rank": 4, "model.lora.frozen_weights": "int8"})
    run_training(config, StopAfter(7))
    changed = configs.override(config, {"model.lora.frozen_weights": "bf16", "run.resume": "yes"})
    with pytest.raises(ConfigError, match=r"model\.lora\.frozen_weights: 'int8' -> 'bf16'"):
        run_training(changed)


def rounded_by_hand(weight, storage):
    """The definitions of models/frozen_linear.py, written again; nf4 with the levels of the paper."""
    if storage == "bf16":
        return weight.bfloat16().float()
    if storage == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return torch.round(weight / scale) * scale
    levels = torch.tensor(NF4_LEVELS)
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)
    return (levels[nearest] * scale).reshape(weight.shape)


def test_an_adapter_beside_the_weights_resumes(tiny, tmp_path):
    """As checkpoints were written before the adapter had a folder of its own."""
    changes = {"model.lora.rank": 2, "train.max_steps": 10, "model.dropout.all": 0.0}
    whole = tiny(**changes, **{"run.folder": str(tmp_path / "whole")})
    run_training(whole)
    config = tiny(**changes, **{"run.folder": str(tmp_path / "old")})
    run_training(config, StopAfter(6))
    last = Path(config.run.folder) / "last"
    for path in [*(last / "adapter").iterdir()]:
        path.rename(last / path.name)
    (last / "adapter").rmdir()
    (last / "manifest.json").unlink()
    seal(last)
    run_training(replace(config, run=replace(config.run, resume="yes")))
    assert_same_run(config.run.folder, whole.run.folder)


@pytest.mark.oracle
def test_transformers_reads_a_merged_checkpoint_once(tiny):
    """Where peft is installed, transformers adds an adapter that it finds beside the weights."""
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = tiny(**{"model.lora.rank": 4, "train.max_steps": 30, "optim.lr": 1e-2, "model.pooling": "cls"})
    run_training(config)
    best = Path(config.run.folder) / "best"
    ours = models.from_pretrained(best, head="sequence-classification").eval()
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(best).eval()
    ids = [2, 7, 9, 11, 3]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
        torch.testing.assert_close(ours(models.pack([ids])).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.freeze": ("backbone.layer.0.*",)}, r"model\.freeze = 'backbone\.layer\.0\.\*' matches no parameter"),
        ({"model.keep_layers": 3}, r"model\.keep_layers = 3: the checkpoint has 2 layers"),
        ({"model.reinit_layers": 3}, r"model\.reinit_layers = 3: the model has 2 layers"),
        (
            {"model.lora.rank": 2, "model.lora.target_modules": ("*.q_proj",)},
            r"model\.lora\.target_modules = '\*\.q_proj' matches no",
        ),
    ],
)
def test_what_fits_no_layer_is_named(tiny, changes, message):
    with pytest.raises(ModelError, match=message):
        run_training(tiny(**changes))


def test_a_checkpoint_keeps_the_files_that_say_how_to_generate(tiny, checkpoint_folder, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_folder, folder)
    (folder / "generation_config.json").write_text('{"num_beams": 4}')
    run_training(tiny(**{"model.name": str(folder), "train.max_steps": 2, "eval.every_steps": 2}))
    for name in ("best", "last"):
        assert (Path(tiny().run.folder) / name / "generation_config.json").read_text() == '{"num_beams": 4}'


def test_an_adapter_is_saved_with_the_dropout_that_was_asked_for(tiny):
    """Whatever a schedule has made of it by then."""
    config = tiny(**{"model.lora.rank": 2, "model.lora.dropout": 0.25, "model.dropout.schedule": "early"})
    run_training(config)
    adapter = json.loads((Path(config.run.folder) / "last" / "adapter" / "adapter_config.json").read_text())
    assert adapter["lora_dropout"] == 0.25


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
END, PAD = len(BYTES), len(BYTES) + 1


@pytest.mark.parametrize(
    ("pad", "add_eos", "kept"),
    [
        (END, True, False),  # every text ends with it
        (END, False, True),  # no text ends with it
        (PAD, True, True),  # a token of its own
        (BYTES.index("g"), False, False),  # an ordinary token
        (PAD + 1, False, True),  # no token at all
    ],
)
def test_transformers_reads_the_same_last_token_of_a_gpt2(tiny, tmp_path, reviews, pad, add_eos, kept):
    """Where a text can end with pad_token_id, transformers would read an earlier token: it is not exported."""
    folder = tmp_path / "gpt2"
    ids = {"eos_token_id": END, "bos_token_id": END, "pad_token_id": pad}
    config_folder(folder, "gpt2", vocab_size=PAD + 2, n_positions=64, **ids)
    models.save_pretrained(models.from_pretrained(folder, init="scratch"), folder)
    vocab = {token: i for i, token in enumerate([*BYTES, "<|endoftext|>", "<|pad|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_eos_token": add_eos, "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = tiny(**{"model.name": str(folder), "model.pooling": "", "train.max_steps": 2, "data.max_length": 20})
    run_training(config)

    export = Path(config.run.folder) / "last"
    theirs = pytest.importorskip("transformers").GPT2ForSequenceClassification.from_pretrained(export).eval()
    assert theirs.config.pad_token_id == (pad if kept else None)
    texts = [*(json.loads(line)["text"][:18] for line in reviews.read_text().splitlines()[:20]), "bag", "gg", "g"]
    tokenizer = load_tokenizer(export)
    encoded = [tokenizer.encode(text).ids for text in texts]
    width = max(map(len, encoded))
    with torch.no_grad():
        alone = torch.cat([theirs(torch.tensor([ids])).logits for ids in encoded]).softmax(-1)
        if kept and pad <= PAD:
            padded = torch.tensor([ids + [pad] * (width - len(ids)) for ids in encoded])
            torch.testing.assert_close(theirs(padded).logits.softmax(-1), alone)
    found = [row["probabilities"] for row in predict_rows(export, texts)]
    probabilities = torch.tensor([[row[label] for label in sorted(row)] for row in found])
    torch.testing.assert_close(probabilities, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("single", "ids", "deleted", "error", "message"),
    [
        (
            "[CLS] $A [SEP]",
            (2, 999),
            "",
            ConfigError,
            "the token id 999, the embedding has 25 rows: tokenizer and weights",
        ),
        (
            "[CLS] $A [SEP]:7",
            (2, 3),
            "",
            ConfigError,
            "the token type 7, the embedding has 2 rows: tokenizer and weights",
        ),
        ("$A", (2, 3), "~", DataError, "leaves no tokens of the text with id 'r3' and 1 more: remove such texts"),
    ],
)
def test_encoded_texts_that_the_model_cannot_read_are_refused(
    tiny, checkpoint_folder, reviews, tmp_path, single, ids, deleted, error, message
):
    """The post-processor and the normalizer do what the vocabulary does not show."""
    folder = shutil.copytree(checkpoint_folder, tmp_path / "checkpoint")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = list(zip(("[CLS]", "[SEP]"), ids, strict=True))
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer.normalizer = normalizers.Replace(deleted, "") if deleted else tokenizer.normalizer
    tokenizer.save(str(folder / "tokenizer.json"))
    rows = [json.loads(line) for line in reviews.read_text().splitlines()]
    for number in (3, 5):
        rows[number]["text"] = "~~"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(error, match=message):
        run_training(tiny(**{"model.name": str(folder), "data.train": str(tmp_path / "rows.jsonl")}))
