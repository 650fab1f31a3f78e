"""Tiny random checkpoints of every architecture, written by transformers, and the same inputs as both sides take them.

A new architecture is one row of ZOO; tests/models/test_conformance.py and others are parametrised over it. Gradients
are compared under the names of the *file*: both sides write them into the parameters and save those.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import models
from models import Inputs
from models.inputs import IGNORE_INDEX

LENGTHS = (9, 1, 5, 5, 14, 2, 9)
TARGET_LENGTHS = (4, 12, 3, 3, 1, 1, 13)  # of sequence-to-sequence
PROBLEMS = ("single-label", "multi-label", "regression")


@dataclass(frozen=True)
class Kind:
    """How to make a tiny model of one model_type, and the space from which odd ones are drawn."""

    config_class: str  # of transformers
    fields: Mapping[str, Any]  # a tiny config.json
    space: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # field -> values to draw from
    modality: str = "text"
    attention: str = "eager"  # the oracle's
    same_as: str = ""  # the kind whose code it shares, under other names
    same_layers: str = ""  # the kind whose layers it has; tests of layers and of heads try only that one


BERT_FIELDS = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "initializer_range": 0.3,  # large, so that attention is far from uniform
}
BERT_SPACE = {
    "hidden_size": (12, 24),
    "num_hidden_layers": (1, 2, 3),
    "num_attention_heads": (1, 2, 3, 4),
    "intermediate_size": (7, 40, 96),
    "hidden_act": ("gelu", "gelu_new", "relu", "silu", "gelu_python", "gelu_fast", "quick_gelu"),
    "layer_norm_eps": (1e-12, 1e-5, 1e-2),
    "type_vocab_size": (1, 2),
    "tie_word_embeddings": (True, True, False),
}
ROBERTA = BERT_FIELDS | {"type_vocab_size": 1}, BERT_SPACE | {"pad_token_id": (0, 1, 5)}
VIT_FIELDS = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.3,
}
VIT_SPACE = {
    "hidden_size": (12, 24),
    "num_hidden_layers": (1, 2, 3),
    "num_attention_heads": (1, 2, 3, 4),
    "intermediate_size": (7, 40, 96),
    "hidden_act": ("gelu", "gelu_new", "relu", "silu", "gelu_python", "gelu_fast", "quick_gelu"),
    "layer_norm_eps": (1e-12, 1e-5, 1e-2),
    "qkv_bias": (True, False),
    "num_channels": (1, 3, 4),
    "image_size": (8, 8, 16, [8, 16], [12, 4]),
    "patch_size": (2, 4, 4, [4, 2], [2, 4]),
    "image": (None, (8, 8), (16, 8), (4, 12), (20, 20)),  # of the inputs, where it is not image_size
}
# transformers takes no rectangular image_size of these, and of BEiT no rectangular patch.
SQUARE = VIT_SPACE | {"image_size": (8, 8, 16)}
DINOV2 = (
    {name: value for name, value in VIT_FIELDS.items() if name != "intermediate_size"}
    | {"mlp_ratio": 2, "layerscale_value": 0.5},
    {name: value for name, value in SQUARE.items() if name != "intermediate_size"}
    | {
        "mlp_ratio": (1, 2, 3),
        "layerscale_value": (0.1, 1.0),
        "use_swiglu_ffn": (False, False, True),
        "use_mask_token": (True, False),
    },
)
BEIT_SPACE = {name: values for name, values in SQUARE.items() if name != "qkv_bias"} | {
    "patch_size": (2, 4, 4),
    "layer_scale_init_value": (0.0, 0.1, 1.0),
    "use_absolute_position_embeddings": (True, False),
    "use_relative_position_bias": (True, True, False),
    "use_shared_relative_position_bias": (True, False, False),
    "use_mask_token": (True, False),
    "use_mean_pooling": (True, True, False),
}
T5_FIELDS = {
    "vocab_size": 31,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 11,  # less than the longest of LENGTHS
    "initializer_factor": 1.0,
    "decoder_start_token_id": 0,
}
T5_SPACE = {
    "d_model": (7, 24),
    "d_kv": (1, 5, 8),
    "d_ff": (7, 40, 96),
    "num_layers": (1, 2, 3),
    "num_decoder_layers": (None, 1, 2, 4),
    "num_heads": (1, 2, 3, 4),
    "feed_forward_proj": ("relu", "gelu", "gated-gelu", "gated-silu", "gated-relu"),
    "relative_attention_num_buckets": (4, 7, 8, 16),
    "relative_attention_max_distance": (9, 20, 128),
    "layer_norm_epsilon": (1e-6, 1e-3, 1e-1),
    "tie_word_embeddings": (True, False),
    "decoder_start_token_id": (0, 3),
}
ZOO = {
    "bert": Kind("BertConfig", BERT_FIELDS, BERT_SPACE),
    "roberta": Kind("RobertaConfig", *ROBERTA),
    "distilbert": Kind(
        "DistilBertConfig",
        {
            "vocab_size": 31,
            "dim": 24,
            "n_layers": 2,
            "n_heads": 3,
            "hidden_dim": 40,
            "max_position_embeddings": 20,
            "initializer_range": 0.3,
        },
        {
            "dim": (12, 24),
            "n_layers": (1, 2, 3),
            "n_heads": (1, 2, 3, 4),
            "hidden_dim": (7, 40, 96),
            "activation": ("gelu", "relu"),
            "sinusoidal_pos_embds": (False, True),
        },
    ),
    "xlm-roberta": Kind("XLMRobertaConfig", *ROBERTA, same_as="roberta"),
    "camembert": Kind("CamembertConfig", *ROBERTA, same_as="roberta"),
    "ernie": Kind(
        "ErnieConfig",
        BERT_FIELDS | {"use_task_id": True},
        BERT_SPACE | {"use_task_id": (True, False), "task_type_vocab_size": (1, 3)},
        same_layers="bert",
    ),
    "electra": Kind(
        "ElectraConfig",
        BERT_FIELDS | {"embedding_size": 16},
        BERT_SPACE | {"embedding_size": (5, 12, 24)},
        same_layers="bert",
    ),
    "albert": Kind(
        "AlbertConfig",
        BERT_FIELDS | {"embedding_size": 16},
        BERT_SPACE | {"embedding_size": (5, 12, 24), "num_hidden_layers": (3, 4, 7), "num_hidden_groups": (1, 1, 2, 3)},
    ),
    "deberta-v2": Kind(
        "DebertaV2Config",
        BERT_FIELDS
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 6,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
        },
        BERT_SPACE
        | {
            "type_vocab_size": (0, 2),
            "pos_att_type": (["p2c", "c2p"], ["c2p"], ["p2c"], "c2p|p2c"),
            "position_buckets": (-1, 2, 6, 8),
            "max_relative_positions": (-1, 9, 30),
            "share_att_key": (True, False),
            "norm_rel_ebd": ("layer_norm", "none"),
            "position_biased_input": (True, False),
            "conv_kernel_size": (0, 0, 3, 5),
            "conv_groups": (1, 3),
            "conv_act": ("tanh", "gelu"),
            "pooler_hidden_act": ("gelu", "tanh"),
            "tie_word_embeddings": (True,),
        },
    ),
    "modernbert": Kind(
        "ModernBertConfig",
        {
            "vocab_size": 31,
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "intermediate_size": 20,
            "max_position_embeddings": 20,
            "local_attention": 4,  # less than most of LENGTHS
            "global_attn_every_n_layers": 2,
            "initializer_range": 0.3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        {
            "hidden_size": (12, 24),
            "num_hidden_layers": (1, 2, 3, 4),
            "num_attention_heads": (1, 2, 3, 6),
            "intermediate_size": (7, 40),
            "hidden_activation": ("gelu", "gelu_new", "relu", "silu"),
            "local_attention": (1, 2, 3, 7, 12, 128),
            "global_attn_every_n_layers": (1, 2, 3, 5),
            "norm_eps": (1e-12, 1e-5, 1e-2),
            **dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), (False, False, True)),
            "decoder_bias": (True, True, False),
            "classifier_pooling": ("cls", "mean"),
            "classifier_activation": ("gelu", "tanh"),
            "tie_word_embeddings": (True, True, False),
        },
        attention="sdpa",  # its eager attention has a softmax in fp32
    ),
    "gpt2": Kind(
        "GPT2Config",
        {
            "vocab_size": 31,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 3,
            "n_positions": 20,
            "initializer_range": 0.3,
            "pad_token_id": 0,  # it has none of its own; the oracle's classifier needs one for a batch
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
        {
            "n_embd": (12, 24),
            "n_layer": (1, 2, 3),
            "n_head": (1, 2, 3, 4),
            "n_inner": (None, 7, 40),
            "activation_function": ("gelu_new", "gelu", "relu", "silu", "tanh"),
            "layer_norm_epsilon": (1e-12, 1e-5, 1e-2),
            "scale_attn_weights": (True, False),
            "scale_attn_by_inverse_layer_idx": (True, False),
            "tie_word_embeddings": (True, True, False),
        },
    ),
    # Its eager attention has a softmax in fp32 even for a model in fp64.
    "vit": Kind("ViTConfig", VIT_FIELDS, VIT_SPACE, modality="image", attention="sdpa"),
    "deit": Kind("DeiTConfig", VIT_FIELDS, VIT_SPACE, modality="image", attention="sdpa"),
    "dinov2": Kind("Dinov2Config", *DINOV2, modality="image", attention="sdpa"),
    "dinov2_with_registers": Kind(
        "Dinov2WithRegistersConfig",
        DINOV2[0] | {"num_register_tokens": 3},
        {name: values for name, values in DINOV2[1].items() if name != "use_mask_token"}
        | {"num_register_tokens": (1, 4)},
        modality="image",
        attention="sdpa",
        same_layers="dinov2",
    ),
    "beit": Kind(
        "BeitConfig",
        VIT_FIELDS
        | {"use_relative_position_bias": True, "layer_scale_init_value": 0.5, "drop_path_rate": 0.0, "vocab_size": 31},
        BEIT_SPACE,
        modality="image",
        attention="sdpa",
    ),
    "t5": Kind("T5Config", T5_FIELDS, T5_SPACE | {"scale_decoder_outputs": (True, False)}, modality="seq2seq"),
    "mt5": Kind("MT5Config", T5_FIELDS, T5_SPACE, modality="seq2seq"),
}


CODES = tuple(model_type for model_type, kind in ZOO.items() if not kind.same_as)
KINDS = tuple(model_type for model_type in CODES if not ZOO[model_type].same_layers)


def cases(same_code: bool = False) -> list[tuple[str, str]]:
    """Return every (model_type, head) that transformers has a class for; with `same_code` the kinds of same_as too."""
    classes = {model_type: models.ARCHITECTURES[model_type].heads for model_type in (ZOO if same_code else CODES)}
    return [
        (model_type, head)
        for model_type, heads in classes.items()
        for head, name in heads.items()
        if head and name != heads[None]
    ]


def has_labels(head: str | None) -> bool:
    """Return whether the classes of a head have names."""
    return head is not None and models.HEADS[head].has_labels


def reads_pooled(head: str | None) -> bool:
    """Return whether a head reads one vector of each example."""
    return head is not None and models.HEADS[head].reads_pooled


def poolings(model_type: str) -> tuple[str, ...]:
    """Return the poolings of its classifiers; the last token of an image is one patch like any other."""
    if model_type == "beit":  # the one that its config.json says
        return ("mean",)
    return ("cls", "mean", "cls_mean") if ZOO[model_type].modality == "image" else ("cls", "mean", "last")


def odd_fields(model_type: str, seed: int) -> dict[str, Any]:
    """Return a configuration drawn from the kind's space."""
    rng = random.Random(seed)
    return {name: rng.choice(values) for name, values in ZOO[model_type].space.items()}


def save_oracle(
    folder: Path, model_type: str, head: str | None, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """Save a random model of transformers to `folder`, no parameter at its initial zero or one; return it."""
    transformers = pytest.importorskip("transformers")
    kind = ZOO[model_type]
    if kind.modality == "seq2seq" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 15):
        pytest.skip("transformers before 5.15 computes the softmax of T5 in fp32, whatever the model's precision")
    torch.manual_seed(seed)
    config = getattr(transformers, kind.config_class)(**{**kind.fields, **changes}, attn_implementation=kind.attention)
    name = models.ARCHITECTURES[model_type].heads[head]
    oracle = getattr(transformers, name)(config).eval()
    if model_type == "modernbert":
        importlib.import_module(type(oracle).__module__).apply_rotary_pos_emb = _rotate
    if kind.modality == "seq2seq":
        _finish_t5(oracle, untied=changes.get("tie_word_embeddings") is False)
    if dtype == torch.float64 and model_type.startswith("dinov2"):
        _interpolate_in_double(oracle.base_model.embeddings)
    with torch.no_grad():
        for parameter in oracle.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(0.2 * torch.randn_like(parameter))
    oracle.to(dtype).save_pretrained(folder)
    return oracle


def _finish_t5(oracle: Any, untied: bool) -> None:
    """Give an untied T5 its own output matrix, and a model in fp64 norms in fp64; transformers does neither."""
    if untied and hasattr(oracle, "lm_head"):
        oracle.lm_head.weight = nn.Parameter(torch.randn_like(oracle.lm_head.weight))
    for module in oracle.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(_rms_norm, module)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> tuple[Tensor, ...]:
    """Do what transformers does in fp32 for any precision of the model."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return tuple(
        x * cos + torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) * sin for x in (q, k)
    )


def _interpolate_in_double(embeddings: Any) -> None:
    """Let a DINOv2 in fp64 interpolate its positions in fp64; transformers does it in fp32."""

    class InDouble:
        float32 = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    function = type(embeddings).interpolate_pos_encoding
    changed = FunctionType(function.__code__, function.__globals__ | {"torch": InDouble()})
    embeddings.interpolate_pos_encoding = MethodType(changed, embeddings)


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon))


def make_inputs(
    model_type: str,
    head: str | None,
    config: Any,
    seed: int = 0,
    problem: str = "single-label",
    image: tuple[int, int] | None = None,
) -> Inputs:
    """Random inputs with labels for a head; `config` is the one of transformers, `image` a size other than its own."""
    generator = torch.Generator().manual_seed(seed)
    if ZOO[model_type].modality == "image":
        pixels = torch.randn(5, config.num_channels, *image_size(config, image), generator=generator)
        labels = torch.randint(0, config.num_labels, (5,), generator=generator)
        if problem != "single-label":
            labels = torch.rand(5, config.num_labels, generator=generator)
        return models.pack_images(pixels, labels=labels.round() if problem == "multi-label" else labels)
    # Token 0 and the pad token stay out: they are the oracle's padding, whose embedding it never trains.
    taken = {0, getattr(config, "pad_token_id", 0) or 0}
    allowed = torch.tensor([i for i in range(config.vocab_size) if i not in taken])

    def random_ids(n: int) -> list[int]:
        return allowed[torch.randint(0, len(allowed), (n,), generator=generator)].tolist()

    types = getattr(config, "type_vocab_size", 1) or 1
    seq2seq = head == "seq2seq-lm"
    inputs = models.pack(
        [random_ids(n) for n in LENGTHS],
        token_types=[torch.randint(0, types, (n,), generator=generator).sort().values.tolist() for n in LENGTHS],
        decoder=[[config.decoder_start_token_id, *random_ids(n - 1)] for n in TARGET_LENGTHS] if seq2seq else None,
    )
    if head == "multiple-choice":
        inputs = replace(inputs, sequences=(2, 1, 2, 2) if len(inputs.lengths) == 7 else (len(inputs.lengths),))
    labels = _labels(head, config, inputs, generator, problem)
    return replace(inputs, labels=labels)


def image_size(config: Any, wanted: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return the size of the inputs: `wanted`, or the config's where that has pairs (no oracle interpolates those)."""
    size = config.image_size
    if isinstance(size, int):
        return wanted if wanted and isinstance(config.patch_size, int) else (size, size)
    return tuple(size)


def _labels(head: str | None, config: Any, inputs: Inputs, generator: torch.Generator, problem: str) -> Tensor | None:
    count, tokens = len(inputs.lengths), len(inputs.input_ids)
    if head == "sequence-classification" and problem != "single-label":
        values = torch.rand(count, config.num_labels, generator=generator)
        return values.round() if problem == "multi-label" else values
    if head == "sequence-classification":
        return torch.randint(0, config.num_labels, (count,), generator=generator)
    if head == "multiple-choice":
        return torch.tensor([int(torch.randint(0, n, (), generator=generator)) for n in inputs.sequences])
    if head == "token-classification":
        labels = torch.randint(0, config.num_labels, (tokens,), generator=generator)
    elif head == "question-answering":
        ends = torch.tensor(inputs.lengths)
        return torch.stack([(torch.rand(count, generator=generator) * ends).long() for _ in range(2)], 1)
    elif head == "masked-lm":
        labels = torch.randint(0, config.vocab_size, (tokens,), generator=generator)
    elif head == "seq2seq-lm":
        tokens = sum(inputs.decoder_lengths)
        labels = torch.randint(0, config.vocab_size, (tokens,), generator=generator)
    elif head == "causal-lm":
        labels = torch.cat([inputs.input_ids[1:], inputs.input_ids[:1]])
        labels[inputs.cu_seqlens[1:].long() - 1] = IGNORE_INDEX  # nothing follows a text's last token
    else:
        return None
    labels[torch.rand(tokens, generator=generator) < 0.3] = IGNORE_INDEX
    return labels


def num_targets(head: str, labels: Tensor) -> int:
    """Return the number of targets, which the loss of a step is divided by."""
    return len(labels) if head == "question-answering" else int((labels != IGNORE_INDEX).sum())


def pad(values: Tensor, lengths: tuple[int, ...], fill: float = 0) -> Tensor:
    """(T, ...) -> (B, L, ...)"""
    return pad_sequence(list(values.split(lengths)), batch_first=True, padding_value=fill)


def unpad(values: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(B, L, ...) -> (T, ...)"""
    return torch.cat([row[:n] for row, n in zip(values, lengths, strict=True)])


def oracle_inputs(model_type: str, head: str | None, inputs: Inputs, pad_id: int = 0) -> dict[str, Tensor]:
    """Return the same inputs, padded, as transformers takes them."""
    lengths = inputs.lengths
    theirs = {
        "input_ids": pad(inputs.input_ids, lengths, pad_id),
        "attention_mask": pad(torch.ones_like(inputs.input_ids), lengths),
    }
    if "type_vocab_size" in ZOO[model_type].fields:
        theirs["token_type_ids"] = pad(inputs.token_type_ids, lengths)
    if head == "seq2seq-lm":
        theirs["decoder_input_ids"] = pad(inputs.decoder_input_ids, inputs.decoder_lengths, pad_id)
        theirs["decoder_attention_mask"] = pad(torch.ones_like(inputs.decoder_input_ids), inputs.decoder_lengths)
    labels = inputs.labels
    if head is None or labels is None:
        return theirs
    if head == "seq2seq-lm":
        return theirs | {"labels": pad(labels, inputs.decoder_lengths, IGNORE_INDEX)}
    if head == "question-answering":
        return theirs | {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    if head == "causal-lm":  # transformers shifts by itself
        labels = pad(labels, lengths, IGNORE_INDEX)
        return theirs | {"labels": torch.cat([labels.new_full((len(labels), 1), IGNORE_INDEX), labels[:, :-1]], 1)}
    if head in ("token-classification", "masked-lm"):
        labels = pad(labels, lengths, IGNORE_INDEX)
    return theirs | {"labels": labels}


def run_oracle(oracle: Any, model_type: str, head: str | None, inputs: Inputs) -> tuple[Tensor | None, Tensor]:
    """(mean loss, logits in our layout) of transformers' model.

    Question answering goes one sequence at a time: in a padded batch, transformers' softmax over the tokens runs over
    the padding too, so its loss depends on the company a text is in. Multiple choice goes one example at a time, since
    all examples of a batch there have the same number of choices.
    """
    if ZOO[model_type].modality == "image":
        return run_image_oracle(oracle, head, inputs)
    if head == "multiple-choice":
        return run_choice_oracle(oracle, model_type, inputs)
    theirs = oracle_inputs(model_type, head, inputs)
    of_classes = head == "sequence-classification" and inputs.labels is not None and inputs.labels.ndim == 1
    in_fp32 = head == "causal-lm" or (model_type, head) == ("modernbert", "masked-lm")
    if inputs.labels is not None and (in_fp32 or (model_type == "deberta-v2" and of_classes)):
        logits = oracle_logits(head, oracle(**theirs), inputs)  # its own loss is in fp32 even for a model in fp64
        return F.cross_entropy(logits, inputs.labels, ignore_index=IGNORE_INDEX), logits
    if head != "question-answering":
        out = oracle(**theirs)
        return getattr(out, "loss", None), oracle_logits(head, out, inputs)
    losses, logits = [], []
    for i, n in enumerate(inputs.lengths):
        one = {
            name: value[i : i + 1] if name.endswith("positions") else value[i : i + 1, :n]
            for name, value in theirs.items()
        }
        out = oracle(**one)
        losses.append(out.loss)
        logits.append(torch.stack([out.start_logits[0], out.end_logits[0]], -1))
    return torch.stack(losses).mean(), torch.cat(logits)


def run_choice_oracle(oracle: Any, model_type: str, inputs: Inputs) -> tuple[Tensor | None, Tensor]:
    """run_oracle for multiple choice; the loss is taken from the logits, since some losses of transformers are fp32."""
    theirs = oracle_inputs(model_type, None, inputs)
    examples = [torch.split(value, inputs.sequences) for value in theirs.values()]
    logits = [
        oracle(**dict(zip(theirs, (value[None] for value in example), strict=True))).logits[0]
        for example in zip(*examples, strict=True)
    ]
    if inputs.labels is None:
        return None, torch.cat(logits)
    losses = [F.cross_entropy(scores, label) for scores, label in zip(logits, inputs.labels, strict=True)]
    return torch.stack(losses).mean(), torch.cat(logits)


def run_image_oracle(oracle: Any, head: str | None, inputs: Inputs) -> tuple[Tensor | None, Tensor]:
    """run_oracle for images; a distilled DeiT of transformers has no loss, so it is taken from its logits."""
    pixels, labels = inputs.pixel_values.to(oracle.dtype), inputs.labels
    options = {"labels": labels} if head == "image-classification" else {}
    if not oracle.config.model_type.startswith("dinov2"):  # that one needs not be told
        options["interpolate_pos_encoding"] = tuple(pixels.shape[2:]) != image_size(oracle.config)
    out = oracle(pixel_values=pixels, **options)
    if head is None:
        return None, out.last_hidden_state.flatten(0, 1)
    if head == "image-classification" or labels is None:
        return getattr(out, "loss", None), out.logits
    return F.cross_entropy(out.logits, labels), out.logits


def oracle_logits(head: str | None, out: Any, inputs: Inputs) -> Tensor:
    """Return the logits of the oracle in our layout."""
    if head is None:
        return unpad(out.last_hidden_state, inputs.lengths)
    if head in ("token-classification", "masked-lm", "causal-lm"):
        return unpad(out.logits, inputs.lengths)
    if head == "seq2seq-lm":
        return unpad(out.logits, inputs.decoder_lengths)
    return out.logits


def oracle_gradients(oracle: Any, folder: Path) -> dict[str, Tensor]:
    """{name in the file: gradient}: the oracle saves its gradients as if they were its weights.

    NaN for a parameter that it has and does not use (a second bias of RoBERTa's language model). Without mask tokens,
    which are buffers of ours.
    """
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.copy_(torch.full_like(parameter, torch.nan) if parameter.grad is None else parameter.grad)
    oracle.save_pretrained(folder)
    gradients = load_file(folder / "model.safetensors")
    return {name: gradient for name, gradient in gradients.items() if not name.endswith("mask_token")}


def our_gradients(model: models.TaskModel) -> dict[str, Tensor]:
    """Return the same of a model of ours."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    return models.checkpoints.weights.export(model.named_parameters(), model.spec.architecture.weights, model.head_name)
