"""Every head on every architecture: what its loss is, micro-batches do not change it, and texts do not mix."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import tiny_models as tiny
from support import zoo
from support.zoo import has_labels, reads_pooled

import models
from models.inputs import IGNORE_INDEX

PAIRS = [(kind, head) for kind in zoo.KINDS for head in models.ARCHITECTURES[kind].heads if head]
POOLED = [(kind, head, pooling) for kind, head in PAIRS if reads_pooled(head) for pooling in zoo.poolings(kind)]
CASES = [(kind, head, None) for kind, head in PAIRS if not reads_pooled(head)] + POOLED
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
each_head = pytest.mark.parametrize(("kind", "head"), PAIRS)
each_case = pytest.mark.parametrize(("kind", "head", "pooling"), CASES)


def build(folder, kind, head, pooling=None, dtype=torch.float64, **options):
    model = tiny.scratch(folder, kind, head, pooling=pooling, **options).to(dtype).train()
    return model, tiny.inputs_of(model, problem=options.get("problem", "single-label"))


def gradients(model, batches, targets=1):
    """Return (loss, {name: gradient}) of one optimizer step that consists of these micro-batches."""
    model.zero_grad()
    loss = 0.0
    for batch in batches:
        out = model(batch)
        (out.loss_sum / targets).backward()
        loss += out.loss_sum.item() / targets
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


# P1


@pytest.mark.parametrize("dtype", TOLERANCE)
@each_head
def test_p01_micro_batches_change_neither_loss_nor_gradient(tmp_path, kind, head, dtype):
    smoothing = 0.0 if head == "question-answering" else 0.1
    model, inputs = build(tmp_path, kind, head, dtype=dtype, label_smoothing=smoothing)
    empty = tiny.select(inputs, head, [2]).labels  # the third example has no target
    empty[...] = IGNORE_INDEX
    assert not model(replace(tiny.select(inputs, head, [2]), labels=empty)).loss_sum
    inputs = tiny.replace_labels(inputs, head, 2, empty)
    count = tiny.count_examples(inputs)
    whole_loss, whole = gradients(model, [inputs], 10)
    scale = max(gradient.abs().max().item() for gradient in whole.values())
    assert scale > 1e-2
    splits = [[[i] for i in range(count)], [[2], [0, 1], [*range(3, count)]], [[3, 0], [], [1, 2], [*range(4, count)]]]
    for split in splits:
        loss, found = gradients(model, [tiny.select(inputs, head, chosen) for chosen in split], 10)
        assert abs(loss - whole_loss) <= TOLERANCE[dtype] * abs(whole_loss), split
        for name, gradient in found.items():
            torch.testing.assert_close(
                gradient, whole[name], rtol=0, atol=5 * TOLERANCE[dtype] * scale, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("problem", ["multi-label", "regression"])
@pytest.mark.parametrize(("kind", "head", "pooling"), POOLED)
def test_p01_several_numbers_an_example_too(tmp_path, kind, head, pooling, problem):
    model, inputs = build(tmp_path, kind, head, pooling, problem=problem)
    inputs.labels[1, 0] = inputs.labels[0] = torch.nan
    assert not model(tiny.select(inputs, head, [0])).loss_sum
    whole_loss, whole = gradients(model, [inputs])
    loss, found = gradients(model, [tiny.select(inputs, head, [i]) for i in range(tiny.count_examples(inputs))])
    assert loss == pytest.approx(whole_loss, rel=1e-12)
    scale = max(gradient.abs().max().item() for gradient in whole.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, whole[name], rtol=0, atol=3e-12 * scale)


@pytest.mark.parametrize("head", ["multi-label", "regression"])
def test_p13_among_floats_nan_is_no_target(tmp_path, head):
    """-100 is a temperature like any other; between 0 and 1 it can only mean that there is no target."""
    model, inputs = build(tmp_path, "bert", "sequence-classification", problem=head)
    inputs.labels[1] = torch.nan
    rest = model(inputs)
    assert rest.loss_sum.isfinite()
    assert not torch.autograd.grad(rest.loss_sum, rest.logits)[0][1].any()
    inputs.labels[1] = IGNORE_INDEX
    loss = model(inputs).loss_sum
    error = (rest.logits[1] - IGNORE_INDEX).square().sum() if head == "regression" else 0.0
    torch.testing.assert_close(loss, rest.loss_sum + error)


def test_labels_of_another_shape_or_kind_are_refused(tmp_path):
    model, inputs = build(tmp_path, "bert", "sequence-classification", problem="regression", num_labels=1)
    with pytest.raises(
        models.ModelError, match=r"regression labels of shape \[7\] should have the shape of the logits, \[7, 1\]"
    ):
        model(replace(inputs, labels=inputs.labels[:, 0]))
    with pytest.raises(
        models.ModelError, match="regression labels should be floats, with NaN where there is no target"
    ):
        model(replace(inputs, labels=inputs.labels.long()))


@each_case
def test_p01_a_micro_batch_of_nothing_has_gradients_all_zero(tmp_path, kind, head, pooling):
    """A rank whose share of a step has run out takes part in it all the same."""
    model, inputs = build(tmp_path, kind, head, pooling)
    loss, found = gradients(model, [tiny.select(inputs, head, [])])
    assert loss == 0
    assert [name for name, gradient in found.items() if gradient.any()] == []


# P13 and the definitions


def by_hand(head, logits, labels, lengths):
    """The sum of the losses, one target after another, as the definition says; lengths: in what logits are split."""
    if head == "multiple-choice":
        picked = [F.log_softmax(scores, 0)[k] for scores, k in zip(logits.split(lengths), labels.tolist(), strict=True)]
    elif head == "question-answering":
        sequences = zip(logits.split(lengths), labels, strict=True)
        picked = [F.log_softmax(scores, 0)[place, [0, 1]].sum() / 2 for scores, place in sequences]
    else:
        pairs = zip(logits, labels.tolist(), strict=True)
        picked = [F.log_softmax(scores, 0)[label] for scores, label in pairs if label != IGNORE_INDEX]
    return -torch.stack(picked).sum()


@each_case
def test_p13_targets_are_where_the_labels_are_whatever_the_ids(tmp_path, kind, head, pooling):
    """The pad token inside a text, as its end, and as a label is a token like any other."""
    model, inputs = build(tmp_path, kind, head, pooling)
    pad = getattr(model.backbone.config, "pad_token_id", None) or 0
    if inputs.input_ids is not None:
        inputs.input_ids[inputs.cu_seqlens[1:].long() - 1] = pad
        inputs.input_ids[1] = pad
    if inputs.decoder_input_ids is not None:
        inputs.decoder_input_ids[1] = pad
    if head in tiny.PER_TOKEN:
        inputs.labels[:5] = torch.tensor([0, IGNORE_INDEX, 0, 1, 0])
        if model.head.shape.vocab_size:
            inputs.labels[:5] = torch.tensor([pad, IGNORE_INDEX, pad, 1, pad])
    out = model(inputs)
    logits = model(replace(inputs, labels=None)).logits
    torch.testing.assert_close(out.loss_sum, by_hand(head, logits, inputs.labels, inputs.sequences or inputs.lengths))
    if model.head is not None and model.head.shape.vocab_size:
        supervised = inputs.labels != IGNORE_INDEX
        torch.testing.assert_close(out.logits, logits[supervised])
        pushed = torch.autograd.grad(out.loss_sum, out.logits)[0]
        assert (pushed[inputs.labels[supervised] == pad, pad] < 0).all()  # each of them is learnt


@each_case
def test_a_text_does_not_feel_its_neighbours(tmp_path, kind, head, pooling):
    model, inputs = build(tmp_path, kind, head, pooling)
    inputs = replace(inputs, labels=None)
    with torch.no_grad():
        together = model(inputs).logits
        alone = [model(tiny.select(inputs, head, [i])).logits for i in range(tiny.count_examples(inputs))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


# P16


@each_case
def test_p16_every_parameter_is_used(tmp_path, kind, head, pooling):
    model, inputs = build(tmp_path, kind, head, pooling)
    out = model(inputs)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(out.loss_sum, parameters, allow_unused=True)
    assert [name for name, gradient in zip(names, found, strict=True) if gradient is None] == []
    # A number that is added to the scores of all choices does not change their softmax.
    useless = {"head.classifier.bias"} if head == "multiple-choice" else set()
    assert {name for name, gradient in zip(names, found, strict=True) if not gradient.any()} <= useless


# losses


def test_multi_label_counts_the_classes_that_have_a_label(tmp_path):
    model, inputs = build(tmp_path, "bert", "sequence-classification", problem="multi-label")
    inputs.labels[0, 1] = inputs.labels[3] = IGNORE_INDEX
    inputs = replace(inputs, labels=inputs.labels.double())
    out = model(inputs)
    known = inputs.labels != IGNORE_INDEX
    p = torch.sigmoid(out.logits[known])
    y = inputs.labels[known]
    assert known.sum() == inputs.labels.numel() - 4
    torch.testing.assert_close(out.loss_sum, -(y * p.log() + (1 - y) * (1 - p).log()).sum())
    assert not torch.autograd.grad(out.loss_sum, out.logits)[0][~known].any()


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression_is_the_squared_error_of_each_output(tmp_path, outputs):
    model, inputs = build(tmp_path, "bert", "sequence-classification", problem="regression", num_labels=outputs)
    assert inputs.labels.shape == (len(inputs.lengths), outputs)
    inputs.labels[2] = torch.nan
    out = model(inputs)
    torch.testing.assert_close(out.loss_sum, (out.logits - inputs.labels).square().nansum())


SINGLE = [(kind, head) for kind, head in PAIRS if head not in ("question-answering", "multiple-choice")]


@pytest.mark.parametrize(("kind", "head"), SINGLE)
def test_label_smoothing_is_torchs_and_of_training_only(tmp_path, kind, head):
    model, inputs = build(tmp_path, kind, head, label_smoothing=0.2)
    logits = model(replace(inputs, labels=None)).logits
    for training, smoothing in ((True, 0.2), (False, 0.0)):
        loss = model.train(training)(inputs).loss_sum
        expected = F.cross_entropy(logits, inputs.labels, reduction="sum", label_smoothing=smoothing)
        torch.testing.assert_close(loss, expected)


def test_label_smoothing_of_choices_is_over_those_of_an_example(tmp_path):
    model, inputs = build(tmp_path, "bert", "multiple-choice", label_smoothing=0.2)
    inputs.labels[1] = IGNORE_INDEX
    logits = model(replace(inputs, labels=None)).logits
    for training, smoothing in ((True, 0.2), (False, 0.0)):
        loss = model.train(training)(inputs).loss_sum
        examples = zip(logits.split(inputs.sequences), inputs.labels, strict=True)
        expected = [F.cross_entropy(x, y, reduction="sum", label_smoothing=smoothing) for x, y in examples]
        torch.testing.assert_close(loss, torch.stack(expected).sum())
    with pytest.raises(models.ModelError, match="the number of choices of each example"):
        model(replace(inputs, sequences=None))


def test_loss_needs_labels_and_is_fp32_for_fp16_logits():
    logits = torch.randn(4, 3, dtype=torch.float16)
    shape = models.heads.HeadShape(8)
    assert models.heads.classification_loss(logits, None, shape, True).item() == 0
    loss = models.heads.classification_loss(logits, torch.tensor([0, 1, 2, IGNORE_INDEX]), shape, True)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits[:3].float(), torch.arange(3), reduction="sum"))


@pytest.mark.parametrize("head", ["sequence-classification", "token-classification", "masked-lm"])
def test_problem_is_that_of_the_head_in_the_file(tmp_path, head):
    """A regression checkpoint does not make a regression of the head that takes the place of its own."""
    trained = tiny.scratch(tmp_path / "config", "bert", "sequence-classification", problem="regression", num_labels=2)
    models.save_pretrained(trained, tmp_path)
    if head == "sequence-classification":
        assert models.from_pretrained(tmp_path, head=head).head.shape.problem == "regression"
    labels = ["a", "b"] if has_labels(head) else None
    model = models.from_pretrained(tmp_path, head=head, labels=labels, head_init="reset").double()
    assert model.head.shape.problem == "single-label"
    inputs = tiny.inputs_of(model)
    assert model(inputs).loss_sum > 0
    if head != "sequence-classification":
        with pytest.raises(models.ModelError, match=f"for a {head} head, choose from single-label"):
            models.from_pretrained(tmp_path, head=head, problem="multi-label", head_init="reset")


@pytest.mark.parametrize("head", ["sequence-classification", "token-classification"])
def test_one_label_is_a_regression_and_never_a_choice(tmp_path, head):
    labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    if head == "sequence-classification":
        trained = tiny.scratch(tmp_path / "config", "bert", head, problem="regression", num_labels=1)
        models.save_pretrained(trained, tmp_path)
    else:
        tiny.config_folder(tmp_path, "bert", **labels)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "problem_type"}))
    if head == "sequence-classification":
        assert models.from_pretrained(tmp_path, head=head).head.shape.problem == "regression"
    with pytest.raises(models.ModelError, match="a single-label head chooses between two labels or more"):
        models.from_pretrained(tmp_path, head=head, init="scratch")
    with pytest.raises(models.ModelError, match="a single-label head chooses between two labels or more"):
        models.from_pretrained(tmp_path, head=head, labels=["a"], init="scratch")


# options


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        ("question-answering", {"label_smoothing": 0.1}, "label_smoothing has no effect on a question-answering head"),
        ("sequence-classification", {"label_smoothing": 0.1, "problem": "regression"}, "label_smoothing has no effect"),
        (
            "sequence-classification",
            {"label_smoothing": 0.1, "problem": "multi-label"},
            "label_smoothing has no effect",
        ),
        ("sequence-classification", {"label_smoothing": 1.0}, "label_smoothing = 1.0 should be from 0 to below 1"),
        ("sequence-classification", {"label_smoothing": -0.1}, "label_smoothing = -0.1 should be from 0 to below 1"),
        ("token-classification", {"pooling": "mean"}, "model.pooling has no effect on a token-classification head"),
        ("masked-lm", {"labels": ["a", "b"]}, "labels has no effect on a masked-lm head"),
        ("masked-lm", {"dropout": {"head": 0.1}}, "dropout head has no effect on a masked-lm head"),
        (None, {"labels": ["a", "b"]}, "labels has no effect on a model without a head"),
        (None, {"problem": "regression"}, "problem has no effect on a model without a head"),
        ("sequence-classification", {"dropout": "0.1"}, "dropout embedding = '0.1': sites are"),
        ("sequence-classification", {"dropout": {"hidden": None}}, "dropout hidden = None: sites are"),
        ("sequence-classification", {"dropout": [0.1]}, r"dropout embedding = \[0.1\]: sites are"),
        ("sequence-classification", {"labels": []}, r"labels = \[\]: name the classes"),
        ("sequence-classification", {"labels": ["a", "b", "a"]}, r"labels: \['a'\] more than once"),
        ("sequence-classification", {"reinit_layers": 1}, "model.init = scratch starts every layer anew"),
    ],
)
def test_an_option_without_effect_is_refused(tmp_path, head, options, message):
    with pytest.raises(models.ModelError, match=message):
        tiny.scratch(tmp_path, "bert", head, **options)


@pytest.mark.parametrize(("option", "value"), [("init", "pretraind"), ("head_init", "resett")])
def test_a_misspelt_choice_is_refused_before_anything_is_read(option, value):
    with pytest.raises(models.ModelError, match=f"model.{option} = '{value}': choose from"):
        models.from_pretrained("no/such/folder", **{option: value})


@each_head
def test_an_option_that_is_off_is_fine_with_every_head(tmp_path, kind, head):
    model = tiny.scratch(tmp_path, kind, head, pooling=None, label_smoothing=0.0, dropout=0.1, problem=None)
    assert model.head_name == head


# inputs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1], []],), "sequence 1 is empty"),
        (([[1]], [[0, 0]]), "token_types 0 has 2 entries, its sequence 1 tokens"),
        (([[1], [2]], [[0]]), "token_types 1 has 0 entries, its sequence 1 tokens"),
        (([[1], [2]], None, [[1], []]), "decoder sequence 1 is empty"),
        (([[1], [2]], None, [[1]]), "2 sequences and 1 decoder sequences"),
    ],
)
def test_lists_that_make_no_batch_are_refused(arguments, message):
    sequences, types, decoder = (*arguments, None, None)[:3]
    with pytest.raises(models.ModelError, match=message):
        models.pack(sequences, token_types=types, decoder=decoder)


def test_everything_goes_to_the_device():
    on_meta = [
        models.pack([[1, 2]], labels=torch.tensor([1]), markers=torch.tensor([[0, 1]]), decoder=[[1]], device="meta"),
        models.pack([[1, 2]], labels=torch.tensor([1]), markers=torch.tensor([[0, 1]]), decoder=[[1]]).to("meta"),
    ]
    for inputs in on_meta:
        tensors = [value for value in vars(inputs).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) == 7
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert inputs.lengths == (2,)


def test_a_text_longer_than_the_model_is_refused(tmp_path):
    model = tiny.scratch(tmp_path, "bert", "sequence-classification")
    assert model(models.pack([[3] * 20])).logits.shape == (1, 3)
    with pytest.raises(models.ModelError, match="a sequence of 21 tokens is longer than the model's 20 positions"):
        model(models.pack([[3], [3] * 21]))


# relation


@pytest.mark.parametrize("kind", [kind for kind, head in PAIRS if head == "relation-classification"])
def test_a_relation_is_read_from_the_two_markers(tmp_path, kind):
    model, inputs = build(tmp_path, kind, "relation-classification")
    hidden, _ = model.backbone(inputs)
    out = model(inputs)
    for i, text in enumerate(hidden.split(inputs.lengths)):
        first, second = inputs.markers[i].tolist()
        pair = torch.cat([text[first], text[second]])
        torch.testing.assert_close(out.logits[i], model.head.classifier.weight @ pair + model.head.classifier.bias)
    swapped = model(replace(inputs, markers=inputs.markers.flip(1))).logits
    assert not torch.allclose(swapped, out.logits)  # the relation has a direction


# question answering


def test_a_span_without_an_answer_is_no_target(tmp_path):
    model, inputs = build(tmp_path, "bert", "question-answering")
    everything = model(inputs).loss_sum
    fifth = model(tiny.select(inputs, "question-answering", [4])).loss_sum
    inputs.labels[4] = IGNORE_INDEX
    torch.testing.assert_close(model(inputs).loss_sum, everything - fifth)


@pytest.mark.oracle
def test_spans_are_found_in_their_own_text_only(tmp_path):
    """transformers' softmax over the tokens runs over the padding, so that its loss depends on the longest text of the
    batch. Ours is that of each text alone."""
    head = "question-answering"
    oracle = zoo.save_oracle(tmp_path, "bert", head, dtype=torch.float64, num_labels=2)
    inputs = zoo.make_inputs("bert", head, oracle.config)
    model = models.from_pretrained(tmp_path, head=head).double().eval()
    with torch.no_grad():
        alone = zoo.run_oracle(oracle, "bert", head, inputs)[0]
        in_batch = oracle(**zoo.oracle_inputs("bert", head, inputs)).loss
        ours = model(inputs).loss_sum / len(inputs.lengths)
    torch.testing.assert_close(ours, alone, rtol=1e-12, atol=1e-12)
    assert abs(in_batch - alone) > 1e-2
