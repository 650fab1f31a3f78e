"""Weight files of every architecture and head: transformers -> ours -> transformers -> ours, bit for bit.

And the many forms in which the same weights are published: shards, half precision, prefixes or none, legacy names, tied
tensors saved twice or not at all, pretraining files under any head.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models as tiny
from support import zoo
from support.zoo import has_labels, reads_pooled

import models
from models import ModelError

CASES = zoo.cases()
PAIRS = [(kind, head) for kind in zoo.KINDS for head in models.ARCHITECTURES[kind].heads if head]
UNTIED = [(kind, head) for kind, head in CASES if head.endswith("-lm")]
OWN = [(kind, head, None) for kind, head in PAIRS if (kind, head) not in CASES and not reads_pooled(head)]
OWN += [(kind, head, pooling) for kind, head in PAIRS if reads_pooled(head) for pooling in zoo.poolings(kind)]
BERTS = ("bert", "roberta", "distilbert")


def oracle_of(folder, kind, head, **changes):
    number = {} if head is None or head.endswith("-lm") else {"num_labels": 2 if head == "question-answering" else 3}
    return zoo.save_oracle(folder, kind, head, **number, **changes)


def logits(model):
    return model.eval()(tiny.inputs_of(model)).logits


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def rewrite(folder, change):
    """model.safetensors with what `change` makes of {name: tensor}."""
    tensors = change({name: tensor.clone() for name, tensor in tensors_of(folder).items()})
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def reconfigure(folder, **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in raw.items() if value is not ...}))


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def assert_same_model(found, expected):
    assert_same_tensors(dict(found.named_parameters()), dict(expected.named_parameters()))
    assert found.labels == expected.labels
    assert torch.equal(logits(found), logits(expected))


def there_and_back(folder, kind, head):
    """transformers' files in `folder` -> ours -> transformers -> ours; returns the file's names on the way."""
    transformers = pytest.importorskip("transformers")
    ours = models.from_pretrained(folder, head=head)
    assert (ours.report.initialised, ours.report.ignored) == ([], [])
    models.save_pretrained(ours, folder / "ours")
    reader = getattr(transformers, models.ARCHITECTURES[kind].heads[head])
    theirs, info = reader.from_pretrained(folder / "ours", output_loading_info=True)
    assert {name: found for name, found in info.items() if found} == {}
    theirs.save_pretrained(folder / "theirs")
    assert_same_tensors(tensors_of(folder / "theirs"), tensors_of(folder / "ours"))
    assert_same_model(models.from_pretrained(folder / "theirs", head=head), ours)
    return tensors_of(folder / "ours")


@pytest.mark.parametrize(("kind", "head"), CASES)
def test_transformers_to_ours_to_transformers_to_ours(tmp_path, kind, head):
    oracle_of(tmp_path, kind, head)
    assert_same_tensors(there_and_back(tmp_path, kind, head), tensors_of(tmp_path))


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_a_backbone_there_and_back(tmp_path, kind):
    oracle_of(tmp_path, kind, None)
    model = models.from_pretrained(tmp_path)
    models.save_pretrained(model, tmp_path / "ours")
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path)
    assert ours.keys() <= theirs.keys()
    assert all("pooler" in name for name in theirs.keys() - ours.keys())  # a head's, not the backbone's
    assert_same_tensors(ours, {name: theirs[name] for name in ours})


@pytest.mark.oracle
@pytest.mark.parametrize(("kind", "head"), UNTIED)
def test_a_language_model_with_an_output_matrix_of_its_own(tmp_path, kind, head):
    """transformers has a second bias then, which is the one in use; the first is the same in our export."""
    oracle_of(tmp_path, kind, head, tie_word_embeddings=False)
    before, after = tensors_of(tmp_path), there_and_back(tmp_path, kind, head)
    unused = {name for name in before if name.endswith(".bias") and name.replace(".bias", ".decoder.bias") in before}
    assert_same_tensors(
        {name: after[name] for name in after.keys() - unused}, {name: before[name] for name in before.keys() - unused}
    )
    assert after.keys() == before.keys()
    for name in unused:
        assert torch.equal(after[name], after[name.replace(".bias", ".decoder.bias")])


@pytest.mark.parametrize(("kind", "head", "pooling"), OWN)
def test_heads_that_transformers_does_not_have_come_back_too(tmp_path, kind, head, pooling):
    model = tiny.scratch(tmp_path / "config", kind, head, pooling=pooling)
    models.save_pretrained(model, tmp_path / "saved")
    back = models.from_pretrained(tmp_path / "saved", head=head)
    assert (back.report.initialised, back.report.ignored) == ([], [])
    assert back.head.shape.pooling == (pooling or model.head.shape.pooling)
    assert_same_model(back, model)
    models.save_pretrained(back, tmp_path / "again")
    assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "saved"))
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "saved" / "config.json").read_text()


# the forms a file may have


@pytest.fixture(params=PAIRS, ids="-".join)
def saved(request, tmp_path):
    """(model, its files, head) of every architecture and head."""
    kind, head = request.param
    model = tiny.scratch(tmp_path / "config", kind, head)
    models.save_pretrained(model, tmp_path / "saved")
    return model, tmp_path / "saved", head


def test_shards(saved):
    model, folder, head = saved
    tensors = tensors_of(folder)
    names = [f"model-{i + 1:05}-of-00003.safetensors" for i in range(3)]
    parts = dict.fromkeys(names)
    for i, name in enumerate(names):
        parts[name] = sorted(tensors)[i::3]
        save_file({key: tensors[key] for key in parts[name]}, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_model(models.from_pretrained(folder, head=head), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_fp32(saved, dtype):
    model, folder, head = saved
    rewrite(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    found = models.from_pretrained(folder, head=head)
    for (name, tensor), expected in zip(found.named_parameters(), model.parameters(), strict=True):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected.to(dtype).float()), name


def test_without_the_prefix(saved):
    model, folder, head = saved
    prefix = model.spec.architecture.weights.prefix
    rewrite(folder, lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    assert_same_model(models.from_pretrained(folder, head=head), model)


@pytest.mark.parametrize("kind", BERTS)
def test_legacy_names_of_the_norms(tmp_path, kind):
    model = tiny.scratch(tmp_path / "config", kind, "masked-lm")
    models.save_pretrained(model, tmp_path)
    legacy = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))

    def rename(name):
        for new, old in legacy:
            name = name.replace(new, old)
        return name

    rewrite(tmp_path, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    found = models.from_pretrained(tmp_path, head="masked-lm")
    assert_same_model(found, model)
    assert len(found.report.renamed) == sum("gamma" in name or "beta" in name for name in tensors_of(tmp_path)) > 0


# tied tensors: saved twice, once under the other name, or once


def lm_folder(tmp_path, kind):
    head = "masked-lm" if kind in BERTS else "causal-lm"
    model = tiny.scratch(tmp_path / "config", kind, head)
    models.save_pretrained(model, tmp_path)
    table = model.spec.architecture.weights
    return model, head, table


def second_names(table, tensors):
    """{second name: the file's first}: of the tied tensors of a file."""
    names = {table.current_name(name): name for name in tensors}
    return {second: names[first] for second, first in table.tied.items() if first in names}


@pytest.mark.parametrize("kind", [*BERTS, "gpt2"])
def test_tied_tensors_saved_twice(tmp_path, kind):
    model, head, table = lm_folder(tmp_path, kind)
    extra = second_names(table, tensors_of(tmp_path))
    assert extra
    rewrite(tmp_path, lambda t: t | {second: t[first] for second, first in extra.items()})
    found = models.from_pretrained(tmp_path, head=head)
    assert found.head.shape.tied
    assert len(found.report.tied) == len(extra)
    assert_same_model(found, model)


@pytest.mark.parametrize("kind", [*BERTS, "gpt2"])
def test_tied_tensors_saved_under_their_second_name_alone(tmp_path, kind):
    model, head, table = lm_folder(tmp_path, kind)
    extra = second_names(table, tensors_of(tmp_path))
    rewrite(
        tmp_path,
        lambda t: (
            {n: v for n, v in t.items() if n not in extra.values()} | {second: t[n] for second, n in extra.items()}
        ),
    )
    found = models.from_pretrained(tmp_path, head=head)
    assert found.head.shape.tied
    assert_same_model(found, model)


@pytest.mark.parametrize("kind", [*BERTS, "gpt2"])
def test_file_with_two_matrices_overrules_a_tied_config(tmp_path, kind):
    """As transformers does: what is in the file is used."""
    model, head, table = lm_folder(tmp_path, kind)
    extra = second_names(table, tensors_of(tmp_path))
    rewrite(tmp_path, lambda t: t | {second: t[first] + 1 for second, first in extra.items()})
    found = models.from_pretrained(tmp_path, head=head)
    assert not found.head.shape.tied
    for second, first in extra.items():
        assert torch.equal(tensors_of(tmp_path)[second], tensors_of(tmp_path)[first] + 1)
    torch.testing.assert_close(found.head.decoder.weight, model.head.decoder.weight + 1, rtol=0, atol=0)
    if model.head.decoder.bias is not None and kind != "distilbert":  # which has one bias only
        torch.testing.assert_close(found.head.decoder.bias, model.head.decoder.bias + 1, rtol=0, atol=0)
    models.save_pretrained(found, tmp_path / "again")
    assert_same_model(models.from_pretrained(tmp_path / "again", head=head), found)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_untied_file_may_miss_the_second_bias(tmp_path, kind):
    oracle_of(tmp_path, kind, "masked-lm", tie_word_embeddings=False)
    rewrite(tmp_path, lambda t: {name: tensor for name, tensor in t.items() if not name.endswith("decoder.bias")})
    model = models.from_pretrained(tmp_path, head="masked-lm")
    row = model.spec.architecture.weights.find_row("head.decoder.bias", "masked-lm")
    assert torch.equal(model.head.decoder.bias, tensors_of(tmp_path)[row.theirs])


def test_an_untied_file_must_have_its_output_matrix(tmp_path):
    oracle_of(tmp_path, "bert", "masked-lm", tie_word_embeddings=False)
    rewrite(tmp_path, lambda t: {name: tensor for name, tensor in t.items() if not name.endswith("decoder.weight")})
    with pytest.raises(ModelError, match=r"cls\.predictions\.decoder\.weight.*head_init reset"):
        models.from_pretrained(tmp_path, head="masked-lm")


# other people's heads


@pytest.mark.parametrize("head", [head for kind, head in PAIRS if kind == "bert"])
def test_a_pretraining_file_under_any_head(tmp_path, head):
    """BertForPreTraining: pooler, language model and next-sentence head, under names that a new head does not take."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**zoo.BERT_FIELDS)
    oracle = transformers.BertForPreTraining(config).eval()
    oracle.save_pretrained(tmp_path)
    labels = ["a", "b", "c"] if has_labels(head) else None
    model = models.from_pretrained(tmp_path, head=head, labels=labels)
    new = set(model.report.initialised)
    assert new == {"masked-lm": set(), "question-answering": {"head.span.weight", "head.span.bias"}}.get(
        head, {"head.classifier.weight", "head.classifier.bias"}
    )
    if head == "sequence-classification":
        assert torch.equal(model.head.dense.weight, oracle.bert.pooler.dense.weight)
    if head == "masked-lm":
        inputs = tiny.inputs_of(model)
        theirs = oracle(**zoo.oracle_inputs("bert", None, inputs)).prediction_logits
        ours = model.eval()(replace(inputs, labels=None))
        torch.testing.assert_close(ours.logits, zoo.unpad(theirs, inputs.lengths), rtol=1e-5, atol=1e-5)


def test_a_roberta_file_with_a_pooler(tmp_path):
    oracle_of(tmp_path, "roberta", None)
    assert any("pooler" in name for name in tensors_of(tmp_path))
    for head in {*models.ARCHITECTURES["roberta"].heads} - {"multiple-choice"}:  # which reads the pooler
        model = models.from_pretrained(tmp_path, head=head)
        assert {name for name in model.report.ignored if "pooler" in name} == set(model.report.ignored) != set()


@pytest.mark.parametrize(("kind", "head"), [(kind, head) for kind, head in CASES if has_labels(head)])
def test_a_published_head_comes_with_its_labels(tmp_path, kind, head):
    names = ["LOC", "O", "PER"]
    oracle_of(tmp_path, kind, head, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    model = models.from_pretrained(tmp_path, head=head)
    assert model.labels == tuple(names)
    assert model.report.initialised == []
    assert models.from_pretrained(tmp_path, head=head, labels=["PER", "O", "LOC"]).labels == tuple(names)
    with pytest.raises(ModelError, match="head_init reset"):
        models.from_pretrained(tmp_path, head=head, labels=["PER", "O", "ORG"])


@pytest.mark.parametrize(
    ("of", "asked"), [("sequence-classification", "multiple-choice"), ("multiple-choice", "sequence-classification")]
)
def test_choices_and_classes_are_not_taken_for_each_other(tmp_path, of, asked):
    """Both heads of BERT are called classifier."""
    models.save_pretrained(tiny.scratch(tmp_path / "config", "bert", of), tmp_path)
    with pytest.raises(ModelError, match=f"no {asked} head; --model.head_init reset starts a new head"):
        models.from_pretrained(tmp_path, head=asked)
    assert models.from_pretrained(tmp_path, head=of).report.initialised == []


SAME_NAMES = [
    (kind, saved, asked)
    for kind, saved in PAIRS
    for asked in models.ARCHITECTURES[kind].heads
    if has_labels(saved) and has_labels(asked) and saved != asked
]


@pytest.mark.parametrize(("kind", "of", "asked"), SAME_NAMES)
def test_a_head_of_another_task_is_never_used(tmp_path, kind, of, asked):
    """Refused where its tensors have the same names, else left in the file and a new one started."""
    model = tiny.scratch(tmp_path / "config", kind, of)
    models.save_pretrained(model, tmp_path)
    tables = model.spec.architecture.weights.heads
    names = {row.theirs for row in tables[of] if row.group == "head"}
    if names & {row.theirs for row in tables[asked] if row.group == "head"}:
        with pytest.raises(ModelError, match=f"no {asked} head; --model.head_init reset starts a new head"):
            models.from_pretrained(tmp_path, head=asked)
        found = models.from_pretrained(tmp_path, head=asked, head_init="reset")
    else:
        found = models.from_pretrained(tmp_path, head=asked)
    shared = ("head.dense.", "head.norm.")  # the pooler, and ModernBERT's layers before the output
    assert {name for name in found.report.initialised if not name.startswith(shared)} == {
        name for name, _ in found.named_parameters() if name.startswith("head.") and not name.startswith(shared)
    }
    assert not torch.equal(found.head.classifier.weight.flatten()[:9], model.head.classifier.weight.flatten()[:9])


@pytest.mark.parametrize("kind", BERTS)
def test_a_head_trained_on_another_pooling_is_refused(tmp_path, kind):
    head = "sequence-classification"
    models.save_pretrained(tiny.scratch(tmp_path / "config", kind, head, pooling="mean"), tmp_path)
    assert models.from_pretrained(tmp_path, head=head, pooling="mean").head.shape.pooling == "mean"
    with pytest.raises(ModelError, match=r"trained with model.pooling = 'mean', not 'cls'; --model.head_init reset"):
        models.from_pretrained(tmp_path, head=head, pooling="cls")
    assert models.from_pretrained(tmp_path, head=head, pooling="cls", head_init="reset").head.shape.pooling == "cls"


def test_a_mean_pooled_text_classifier_is_no_token_classifier(tmp_path):
    """Its config.json names the backbone's class, and its tensors are called as a token classifier's."""
    models.save_pretrained(
        tiny.scratch(tmp_path / "config", "bert", "sequence-classification", pooling="mean"), tmp_path
    )
    with pytest.raises(ModelError, match="a BertModel's, no token-classification head"):
        models.from_pretrained(tmp_path, head="token-classification")


@pytest.mark.parametrize("saved_as", [..., [], None, ["SomethingOfTheirOwn"], "BertForTokenClassification", 3])
def test_a_class_that_nobody_knows_is_not_held_against_a_head(tmp_path, saved_as):
    head = "sequence-classification"
    model = tiny.scratch(tmp_path / "config", "bert", head)
    models.save_pretrained(model, tmp_path)
    reconfigure(tmp_path, architectures=saved_as)
    assert_same_model(models.from_pretrained(tmp_path, head=head), model)


def test_half_of_any_head_is_refused(saved):
    model, folder, head = saved
    table = model.spec.architecture.weights
    names = [table.exported_name(name, head) for name, _ in model.named_parameters() if name.startswith("head.")]
    names = [name for name in names if name in tensors_of(folder)]
    path = folder / "model.safetensors"
    for missing in names if len(names) > 1 else []:
        whole = path.read_bytes()  # loaded tensors would be views of the file that is written over
        rewrite(folder, lambda tensors, gone=missing: {n: t for n, t in tensors.items() if n != gone})
        with pytest.raises(ModelError, match=r"a part of the .* is missing .*head_init reset"):
            models.from_pretrained(folder, head=head)
        path.write_bytes(whole)


def test_classifier_without_its_pooler_is_refused(tmp_path):
    head = "sequence-classification"
    models.save_pretrained(tiny.scratch(tmp_path / "config", "bert", head), tmp_path)
    rewrite(tmp_path, lambda tensors: {name: t for name, t in tensors.items() if "pooler" not in name})
    with pytest.raises(ModelError, match="a part of the pooler is missing"):
        models.from_pretrained(tmp_path, head=head)
