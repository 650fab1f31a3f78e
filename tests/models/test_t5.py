"""Properties of T5 alone: buckets of distances, its two stacks, its tying, its files, fp16, and generation.

Logits, losses and gradients of every head are compared in test_conformance.py, as for every architecture.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models as tiny
from support import zoo

import models
from models import t5
from models.errors import ModelError
from models.generation.cache import Cache
from models.generation.generate import GenerationSettings, generate
from models.ops import relative_bias
from models.ops.layers import mean_pool
from models.ops.packing import Packing

V10 = {"feed_forward_proj": "relu"}
V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SOURCES = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 1], [20, 21, 20, 21, 20, 4, 5, 9, 17, 3, 2, 1], [14, 15, 16, 1]]
ENDS = (5, 8)  # tokens that both models of `pair` like
both_versions = pytest.mark.parametrize("version", [V10, V11], ids=["v1.0", "v1.1"])


def edit_config(folder, **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not ...}))


def edit_tensors(folder, change):
    """Replace the tensors of model.safetensors by change(tensors)."""
    path = folder / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(path)).items()}, path)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with the files of a tiny v1.0 of ours."""
    models.save_pretrained(tiny.scratch(tmp_path / "scratch", "t5", "seq2seq-lm"), tmp_path / "t5")
    return tmp_path / "t5"


# Relative positions


def test_the_published_buckets_have_these_borders():
    """Of 32 buckets and 128 positions: in the encoder half of them on each side, in the decoder all of them."""
    starts = {16: [*range(9), 12, 16, 23, 32, 46, 64, 91], 32: [*range(17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59]}
    for buckets, expected in starts.items():
        table = relative_bias.bucket_of_distance(buckets, 128, torch.device("cpu"))
        assert [int((table == bucket).nonzero()[0]) for bucket in range(buckets)][: len(expected)] == expected
        assert table[-1] == buckets - 1


@pytest.mark.parametrize(
    ("buckets", "farthest"), [(32, 128), (4, 9), (7, 20), (8, 11), (17, 1000), (9, 128), (18, 128)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_buckets_are_those_of_transformers(buckets, farthest, causal):
    """With 9 buckets on a side and 128 positions, the borders of fp32 are not those of fp64."""
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    bias = relative_bias.RelativeBias(1, buckets, farthest, causal)
    with torch.no_grad():
        bias.embedding.weight.copy_(torch.arange(buckets)[:, None])
        found = bias(torch.arange(1200), 1200)[0]
    distance = torch.arange(1200) - torch.arange(1200)[:, None]
    expected = modeling.T5Attention._relative_position_bucket(distance, not causal, buckets, farthest).float()
    assert torch.equal(found, expected.masked_fill(distance > 0, -math.inf) if causal else expected)


def test_a_bias_is_computed_once_for_all_layers_and_lengths(tmp_path, monkeypatch):
    model = tiny.scratch(tmp_path, "t5", "seq2seq-lm")
    calls = []
    forward = t5.RelativeBias.forward
    monkeypatch.setattr(
        t5.RelativeBias,
        "forward",
        lambda self, q, keys: calls.append((self.causal, len(q), keys)) or forward(self, q, keys),
    )
    model(tiny.inputs_of(model))
    longest, target = max(zoo.LENGTHS), max(zoo.TARGET_LENGTHS)
    assert sorted(calls) == [(False, longest, longest), (True, target, target)]


# The mathematics beside what test_conformance.py compares


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sequence_classifier_reads_the_mean_of_the_encoder(tmp_path, dtype):
    """transformers has none on the encoder, so its encoder and a linear layer of ours are put together."""
    oracle = zoo.save_oracle(tmp_path, "t5", None, dtype=dtype)
    model = models.from_pretrained(tmp_path, head="sequence-classification", labels=["a", "b", "c"], dropout=0.0)
    model = model.to(dtype)
    inputs = replace(zoo.make_inputs("t5", None, oracle.config), labels=torch.tensor([0, 1, 2, 2, 1, 0, 0]))
    out = model(inputs)
    out.loss_sum.backward()
    _, hidden = zoo.run_oracle(oracle, "t5", None, inputs)
    logits = model.head.classifier(mean_pool(hidden, Packing(inputs.lengths, inputs.cu_seqlens)))
    torch.nn.functional.cross_entropy(logits, inputs.labels, reduction="sum").backward()
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-10)
    close(out.logits, logits)
    expected = zoo.oracle_gradients(oracle, tmp_path / "gradients")
    found = {name: g for name, g in zoo.our_gradients(model).items() if not name.startswith("sequence_classifier")}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        close(found[name], gradient)


@pytest.mark.parametrize(("activation", "jumps"), [("relu", True), ("gelu", False)])
def test_where_fp32_gradients_part_from_the_true_ones(tmp_path, activation, jumps):
    """One ReLU whose input is 0 but for rounding: that is all there is to T5's odd fp32 gradients.

    A comparison of T5-small with transformers in fp32 had shown relative differences of 8.5e-5 in the shared embedding
    and 1.9e-4 in the encoder's bias, where BERT and GPT-2 (GELU) differ by 7e-7. In fp64 both implementations agree to
    2e-15 in every gradient (with transformers' norms, which stay in fp32, in fp64 as well), and in fp32 either may be
    the one that is off. At that size 10 million inputs of a ReLU are computed a step, and one of them may be so near 0
    that fp32 gives it the other sign. Its derivative is then 0 instead of 1, and a whole token's share of a unit is
    missing in the gradients of everything below. With the ReLUs' signs taken from fp64, the fp32 differences fell from
    1.4e-4 and 2.4e-4 to 5e-7 and 1e-6 in the two tensors.

    Shown here in fp64: the input of one unit at one token is perturbed by 2e-7, from one side of 0 to the other.
    """
    tiny.config_folder(tmp_path, "t5", feed_forward_proj=activation)
    model = models.from_pretrained(tmp_path, head="seq2seq-lm", init="scratch", dropout=0.0).double()
    inputs = tiny.inputs_of(model)
    up = model.backbone.encoder.layers[0].mlp.up
    read = []
    hook = up.register_forward_hook(lambda module, args, out: read.append((args[0][3].detach(), out[3, 5].detach())))
    model(inputs)
    hook.remove()
    token, value = read[0]  # of token 3 and unit 5
    gradients = []
    for side in (1e-7, -1e-7):
        perturbed = copy.deepcopy(model)
        with torch.no_grad():
            weight = perturbed.backbone.encoder.layers[0].mlp.up.weight
            weight[5] += (side - value) * token / token.dot(token)
        perturbed(inputs).loss_sum.backward()
        gradients.append([p.grad for p in perturbed.parameters()])
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*gradients, strict=True))
    assert difference > 1e-3 if jumps else difference < 1e-5


@pytest.mark.parametrize("site", ["embedding", "attention", "hidden", "drop_path"])
def test_dropout_acts_at_each_site_in_training_only(tmp_path, site):
    model = tiny.scratch(
        tmp_path, "t5", "seq2seq-lm", dropout={**dict.fromkeys(["embedding", "attention", "hidden"], 0.0), site: 0.5}
    )
    inputs = tiny.inputs_of(model)
    torch.manual_seed(0)
    assert not torch.equal(model(inputs).logits, model(inputs).logits)
    model.eval()
    assert torch.equal(model(inputs).logits, model(inputs).logits)


def test_the_published_rate_is_at_all_of_t5s_sites(tmp_path):
    tiny.config_folder(tmp_path, "t5", dropout_rate=0.3, classifier_dropout=0.2)
    model = models.from_pretrained(tmp_path, head="token-classification", init="scratch")
    assert model.backbone.config.rates == t5.DropoutRates(0.3, 0.3, 0.3, 0.0)
    rates = [m.p for m in model.backbone.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates == [0.3] * (2 + 2 * 2)  # on the way in and out; of each layer, in its mlp and on its branches
    assert model.head.dropout.p == 0.2


@both_versions
def test_p14_fp16_stays_finite_where_published_models_overflow(tmp_path, version):
    """Sums of `wo`, and products with the gate, beyond 65,504: in fp16 they would be infinite."""
    tiny.config_folder(tmp_path, "t5", **version)
    model = models.from_pretrained(tmp_path, head="seq2seq-lm", init="scratch", dropout=0.0)
    with torch.no_grad():
        for layer in model.backbone.layers:
            for name, weight in layer.mlp.named_parameters():
                weight *= 200 if name == "down.weight" else 300
    inputs = tiny.inputs_of(model)
    largest = []
    for layer in model.backbone.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: largest.append(out.abs().max().item()))
    exact = model(inputs)
    assert max(largest) > 2 * torch.finfo(torch.float16).max
    with torch.autocast("cpu", torch.float16):
        out = model(inputs)
    out.loss_sum.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(out.loss_sum, exact.loss_sum, rtol=0.02, atol=0)


@both_versions
@pytest.mark.parametrize("part", ["up", "gate", "linear", "mlp.down", "attention.output"])
def test_p14_fp16_is_finite_where_any_product_overflows(tmp_path, version, part):
    """Each product alone beyond 65,504, in training and generation: fp16 follows fp32, with finite gradients."""
    tiny.config_folder(tmp_path, "t5", **version)
    model = models.from_pretrained(tmp_path, head="seq2seq-lm", init="scratch", dropout=0.0)
    if not (weights := [p for name, p in model.named_parameters() if name.endswith(f"{part}.weight")]):
        pytest.skip(f"this version has no {part}")
    largest = []

    def keep_largest(module, args, out):
        largest.append(out.abs().max().item())

    for name, module in model.named_modules():
        if name.endswith(part):
            module.register_forward_hook(keep_largest)
    inputs = tiny.inputs_of(model)
    model(inputs)
    with torch.no_grad():
        for weight in weights:
            weight *= 2e5 / min(largest)
    largest.clear()
    exact = model(inputs)
    assert min(largest) > 65_504
    settings = models.GenerationSettings(max_new_tokens=4, decoder_start_token_id=0)
    with torch.autocast("cpu", torch.float16):
        out = model(inputs)
        generated = models.generate(model.eval(), [[5, 9, 4], [7]], settings)
    (2.0**-10 * out.loss_sum).backward()
    torch.testing.assert_close(out.loss_sum, exact.loss_sum, rtol=0.02, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(math.isfinite(one.score) for one in generated)


@both_versions
def test_p14_a_model_cast_to_fp16_is_refused_with_what_works(tmp_path, version):
    tiny.config_folder(tmp_path, "t5", **version)
    model = models.from_pretrained(tmp_path, head="seq2seq-lm", init="scratch")
    inputs = tiny.inputs_of(model)
    assert model.bfloat16()(inputs).loss_sum.isfinite()
    with pytest.raises(ModelError, match="cast it to bf16, or use fp16 autocast with fp32 weights"):
        model.half()(inputs)


def test_initialisation_keeps_the_variance(tmp_path):
    """Standard deviations as in T5's code: of the query, sqrt(K) below the key's."""
    tiny.config_folder(tmp_path, "t5", d_model=64, d_kv=16, d_ff=256, num_heads=8, initializer_factor=0.5, **V11)
    model = models.from_pretrained(tmp_path, head="seq2seq-lm", init="scratch")
    layer = model.backbone.decoder.layers[-1]
    expected = {
        model.backbone.word_embeddings: 1.0,
        layer.cross_attention.query: (64 * 16) ** -0.5,
        layer.cross_attention.key: 64**-0.5,
        layer.attention.output: (8 * 16) ** -0.5,
        layer.mlp.gate: 64**-0.5,
        layer.mlp.down: 256**-0.5,
        model.head.decoder: 64**-0.5,
    }
    for module, std in expected.items():
        torch.testing.assert_close(module.weight.std().item(), 0.5 * std, rtol=0.1, atol=0)
    assert (layer.mlp_norm.weight == 0.5).all()
    bias = model.backbone.encoder.relative_bias.embedding.weight
    assert 0.5 * 64**-0.5 / 2 < bias.std() < 0.5 * 64**-0.5 * 2


def test_depth_is_cut_and_begun_anew_in_both_stacks(checkpoint):
    model = models.from_pretrained(checkpoint, head="seq2seq-lm", keep_layers=1, reinit_layers=1)
    assert [len(model.backbone.encoder.layers), len(model.backbone.decoder.layers)] == [1, 1]
    assert all(name.startswith("backbone.decoder.layers.0.") for name in model.report.initialised)
    assert model.spec.config["num_decoder_layers"] == model.spec.config["num_layers"] == 1


def test_the_decoder_reads_the_target_shifted_right():
    assert models.inputs.shift_right([7, 8, 9, 1], 0) == [0, 7, 8, 9]
    assert models.inputs.shift_right([7, -100, -100], 3, pad_id=2) == [3, 7, 2]
    assert models.inputs.shift_right([7], 0) == [0]


# Files


def test_second_names_and_the_stray_bias_are_tolerated(checkpoint):
    """As in the published t5-small: its file has the embedding three times and a bias that nothing uses."""
    before = models.from_pretrained(checkpoint, head="seq2seq-lm")

    def published(tensors):
        second = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
        stray = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        return tensors | dict.fromkeys(second, tensors["shared.weight"]) | {stray: torch.ones(8, 3)}

    edit_tensors(checkpoint, published)
    after = models.from_pretrained(checkpoint, head="seq2seq-lm")
    assert len(after.report.tied) == 3
    assert [name.split(".")[-2] for name in after.report.ignored] == ["relative_attention_bias"]
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("declared", [True, False, ...])
@pytest.mark.parametrize("in_file", ["absent", "equal", "other"])
def test_tensor_in_the_file_overrules_the_config_on_tying(checkpoint, declared, in_file):
    edit_config(checkpoint, tie_word_embeddings=declared, scale_decoder_outputs=...)
    if in_file != "absent":
        factor = 1.0 if in_file == "equal" else 2.0
        edit_tensors(checkpoint, lambda tensors: tensors | {"lm_head.weight": factor * tensors["shared.weight"]})
    model = models.from_pretrained(checkpoint, head="seq2seq-lm")
    assert not model.report.initialised
    tied = model.head.decoder.weight is model.backbone.word_embeddings.weight
    assert tied == (in_file != "other")
    assert model.head.shape.scale == (1.0 if declared is False else 24**-0.5)  # of old files, config alone says
    models.save_pretrained(model, checkpoint / "again")
    again = models.from_pretrained(checkpoint / "again", head="seq2seq-lm")
    assert again.head.shape == model.head.shape
    inputs = tiny.inputs_of(model)
    assert torch.equal(model.eval()(inputs).logits, again.eval()(inputs).logits)


def test_mt5_is_gated_and_unscaled_by_default(tmp_path):
    model = tiny.scratch(tmp_path, "mt5", "seq2seq-lm")
    assert (model.backbone.config.is_gated_act, model.backbone.config.hidden_act) == (True, "gelu_new")
    assert model.head.shape.scale == 1.0


@both_versions
def test_export_returns_from_transformers_bit_for_bit(tmp_path, version):
    transformers = pytest.importorskip("transformers")
    tiny.config_folder(tmp_path / "t5", "t5", **version)
    model = models.from_pretrained(tmp_path / "t5", head="seq2seq-lm", init="scratch").eval()
    models.save_pretrained(model, tmp_path / "ours")
    oracle, report = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values())
    assert oracle.config.scale_decoder_outputs == (version is V10)
    inputs = replace(tiny.inputs_of(model), labels=None)
    with torch.no_grad():
        _, expected = zoo.run_oracle(oracle.eval(), "t5", "seq2seq-lm", inputs)
        torch.testing.assert_close(model(inputs).logits, expected, rtol=1e-5, atol=1e-5)
    oracle.save_pretrained(tmp_path / "theirs")
    again = models.from_pretrained(tmp_path / "theirs", head="seq2seq-lm")
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("head", [None, "token-classification", "sequence-classification", "question-answering"])
def test_an_encoder_is_taken_from_the_file_of_both(checkpoint, head):
    model = models.from_pretrained(checkpoint, head=head)
    assert model.backbone.decoder is None
    assert all(name.startswith("head.") for name in model.report.initialised)
    assert all(name.startswith("decoder.") for name in model.report.ignored)


def test_sequence_to_sequence_needs_the_decoder(checkpoint, tmp_path):
    models.save_pretrained(models.from_pretrained(checkpoint), tmp_path / "encoder")
    with pytest.raises(ModelError, match="an encoder alone"):
        models.from_pretrained(tmp_path / "encoder", head="seq2seq-lm")


def test_decoder_heads_of_transformers_are_refused(checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors | {"qa_outputs.weight": torch.ones(2, 24)})
    with pytest.raises(ModelError, match=r"head in the file \(qa_outputs.weight, .*\) is computed differently"):
        models.from_pretrained(checkpoint, head="question-answering")
    model = models.from_pretrained(checkpoint, head="question-answering", head_init="reset")
    assert "qa_outputs.weight" in model.report.ignored


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("feed_forward_proj", "gated-gated-gelu"),
        ("feed_forward_proj", "double-gelu"),
        ("dense_act_fn", "prelu"),
        ("is_decoder", True),
        ("relative_attention_num_buckets", 3),
        ("relative_attention_max_distance", 4),
        ("is_gated_act", "yes"),
        ("dropout_rate", 1.0),
        ("num_decoder_layers", 0),
        ("d_kv", "64"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(checkpoint, field, value):
    edit_config(checkpoint, **{field: value})
    with pytest.raises(ModelError, match=f"{field} = {value!r}"):
        models.from_pretrained(checkpoint, head="seq2seq-lm")


def test_explicit_activation_overrules_the_implied_one(checkpoint):
    edit_config(checkpoint, feed_forward_proj="relu", dense_act_fn="gelu")
    assert models.from_pretrained(checkpoint).backbone.config.hidden_act == "gelu"


# Generation


@pytest.fixture(scope="module", params=[V10, V11], ids=["v1.0", "v1.1"])
def pair(request, tmp_path_factory):
    """(the model, transformers' model), one for each version."""
    folder = tmp_path_factory.mktemp("t5")
    # transformers cannot generate with a decoder deeper than the encoder: its cache has too few layers.
    depth = {"num_layers": 3, "num_decoder_layers": 2}
    oracle = zoo.save_oracle(folder, "t5", "seq2seq-lm", seed=1, initializer_factor=1.3, **depth, **request.param)
    return models.from_pretrained(folder, head="seq2seq-lm"), oracle


@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 1, 3]], ids=["one by one", "in pieces"])
def test_cached_decoding_is_uncached_decoding(pair, steps):
    """Sources of unequal lengths, the targets read in pieces."""
    model = copy.deepcopy(pair[0]).double().eval()
    targets = [[0, *range(3 + i, 11 + i)] for i in range(len(SOURCES))]
    cache, begin, found = Cache(), 0, [[] for _ in SOURCES]
    with torch.no_grad():
        for step in steps:
            new = [t[begin : begin + step] for t in targets]
            hidden, packing = model.backbone(models.pack(SOURCES if begin == 0 else [], decoder=new), cache)
            for text, part in zip(found, hidden.split(packing.lengths), strict=True):
                text.append(part)
            begin += step
        whole, packing = model.backbone(models.pack(SOURCES, decoder=targets))
    for text, expected in zip(found, whole.split(packing.lengths), strict=True):
        torch.testing.assert_close(torch.cat(text), expected, rtol=1e-10, atol=1e-10)


def test_cached_decoding_of_unequal_targets(pair):
    model = copy.deepcopy(pair[0]).double().eval()
    targets = [[0, *range(3, 3 + n)] for n in (5, 0, 2, 7, 2)]
    cache = Cache()
    with torch.no_grad():
        model.backbone(models.pack(SOURCES, decoder=targets), cache)
        found, _ = model.backbone(models.pack([], decoder=[[9], [8], [7], [6], [5]]), cache)
        longer = [[*target, 9 - i] for i, target in enumerate(targets)]
        whole, packing = model.backbone(models.pack(SOURCES, decoder=longer))
    torch.testing.assert_close(found, whole[packing.cu_seqlens[1:].long() - 1], rtol=1e-10, atol=1e-10)


SEARCHES = [
    {"max_new_tokens": 12},
    {"max_new_tokens": 12, "repetition_penalty": 1.5, "min_new_tokens": 4},
    {"max_length": 9, "no_repeat_ngram_size": 2},
    {"max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 3},
    {"max_new_tokens": 12, "num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram_size": 3},
    {"max_new_tokens": 12, "num_beams": 3, "length_penalty": -1.0, "early_stopping": "never", "min_length": 5},
]


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: "-".join(search))
def test_ids_and_scores_are_those_of_transformers(pair, search):
    """All sources in one batch of ours, each by itself in transformers."""
    model, oracle = pair
    found = generate(model, SOURCES, GenerationSettings(eos_token_id=ENDS, decoder_start_token_id=0, **search))
    expected = [one for source in SOURCES for one in their_texts(oracle, source, **search)]
    assert [one.ids for one in found] == [ids for ids, _ in expected]
    for one, (_, score) in zip(found, expected, strict=True):
        assert score is None or one.score == pytest.approx(score, abs=1e-4)


def their_texts(oracle, source, **search):
    """[(new ids, score or None)] of transformers for one source, without the start token and what follows an end."""
    out = oracle.generate(
        torch.tensor([source]),
        **search,
        do_sample=False,
        eos_token_id=list(ENDS),
        pad_token_id=0,
        decoder_start_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    texts = []
    for ids in out.sequences[:, 1:].tolist():
        length = next((i + 1 for i, token in enumerate(ids) if token in ENDS), len(ids))
        texts.append(ids[:length])
    scores = getattr(out, "sequences_scores", None)
    return list(zip(texts, [None] * len(texts) if scores is None else scores.tolist(), strict=True))


def test_texts_that_end_early_are_among_those_compared(pair):
    """So that the test above has something to say about batches that shrink."""
    settings = GenerationSettings(eos_token_id=ENDS, decoder_start_token_id=0, max_new_tokens=12)
    lengths = {len(one.ids) for one in generate(pair[0], SOURCES, settings)}
    assert len(lengths) > 1


def test_a_model_can_be_trained_after_it_has_generated(pair):
    """Generation runs in inference mode; what it leaves behind must not stand in the way of a backward."""
    relative_bias.bucket_of_distance.cache_clear()
    model = copy.deepcopy(pair[0])
    generate(model, SOURCES[:1], GenerationSettings(decoder_start_token_id=0, max_new_tokens=2))
    model(tiny.inputs_of(model)).loss_sum.backward()
    assert model.backbone.decoder.relative_bias.embedding.weight.grad.any()


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
@pytest.mark.parametrize("head", [None, "seq2seq-lm"])
def test_an_embedding_saved_again_must_be_the_shared_one(tmp_path, name, head):
    model = tiny.scratch(tmp_path, "t5", "seq2seq-lm")
    models.save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {name: tensors["shared.weight"].clone()}, tmp_path / "model.safetensors")
    assert models.from_pretrained(tmp_path, head=head).report.tied == [name]
    save_file(tensors | {name: tensors["shared.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name} and shared\.weight should be the same tensor, but they differ"):
        models.from_pretrained(tmp_path, head=head)
