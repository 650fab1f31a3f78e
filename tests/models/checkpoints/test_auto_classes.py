"""Which class of transformers opens an export: with the same logits and loss, or a sentence says that none does."""

from __future__ import annotations

import pytest
import torch
from support import tiny_models as tiny
from support import zoo

import models
from models.auto_classes import AUTO_CLASSES

transformers = pytest.importorskip("transformers")
CASES = [
    (kind, head, pooling)
    for kind in zoo.CODES
    for head in models.ARCHITECTURES[kind].heads
    if head
    for pooling in (zoo.poolings(kind) if zoo.reads_pooled(head) else (None,))
]
# One architecture in the default suite; all of them take a minute.
PARAMETERS = [case if case[0] == "bert" else pytest.param(*case, marks=pytest.mark.oracle) for case in CASES]


def save(folder, kind, head, pooling):
    options = {"pooling": pooling} if pooling else {}
    model = tiny.scratch(folder / "config", kind, head, **options).eval()
    if kind == "gpt2":  # as of a run, whose tokenizer decides it
        model.spec.config["pad_token_id"] = 0
    models.save_pretrained(model, folder / "saved")
    return model, folder / "saved"


@pytest.mark.parametrize(("kind", "head", "pooling"), PARAMETERS)
def test_its_class_gives_the_same_logits_and_loss(tmp_path, kind, head, pooling):
    transformers.logging.set_verbosity_error()
    model, folder = save(tmp_path, kind, head, pooling)
    name = models.auto_class(model)
    theirs, found = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    if sentence := models.explain_export(model):
        assert name == "AutoModel"
        assert "engine.predict_rows" in sentence
        assert f"pooling = {pooling}" in sentence or f"no {head} for" in sentence
        return
    assert name == AUTO_CLASSES[head]
    assert {key: names for key, names in found.items() if names} == {}
    inputs = tiny.inputs_of(model)
    loss, logits = zoo.run_oracle(theirs.double().eval(), kind, head, inputs)
    out = model.double()(inputs)
    count = zoo.num_targets(head, inputs.labels)
    torch.testing.assert_close(out.loss_sum.double() / count, loss.double(), rtol=1e-6, atol=1e-6)
    if out.logits.shape == logits.shape:
        torch.testing.assert_close(out.logits, logits, rtol=1e-6, atol=1e-6)


def test_every_head_has_a_class_or_a_sentence():
    known = {head for architecture in models.ARCHITECTURES.values() for head in architecture.heads if head}
    said = {"relation-classification"}  # and sentence-embedding, which sentence-transformers opens
    assert known - said - {"sentence-embedding"} <= AUTO_CLASSES.keys()
