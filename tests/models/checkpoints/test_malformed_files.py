"""Files nobody should trust (F14, F15): each of them ends in one sentence, and none in a crash, a hang or a gulp."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny_models as tiny
from support.payloads import PAYLOADS, Call
from support.zoo import KINDS, ZOO, has_labels

import models
from models import ModelError
from models.checkpoints.tensor_files import MAX_JSON, parse_json

LIMIT = 100_000_000  # bytes


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The files of a tiny BERT: (header, data of the tensors, config.json)."""
    folder = tmp_path_factory.mktemp("sound")
    models.save_pretrained(tiny.scratch(folder, "bert", "token-classification"), folder)
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return header, content[8 + length :], json.loads((folder / "config.json").read_text())


@pytest.fixture
def folder(sound, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(sound[2]))
    return tmp_path


@contextmanager
def frugal():
    """No more than LIMIT bytes of Python's memory, and of the process's."""
    before = resident()
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < LIMIT
    assert resident() - before < LIMIT


def resident() -> int:
    """Bytes of memory of this process; 0 where the system does not say."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


def refusal(folder, head="token-classification", **options):
    with pytest.raises(ModelError) as caught, frugal():
        models.from_pretrained(folder, head=head, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1500
    assert str(folder) in message or "config.json" in message
    return message


def outcome(folder, head, **options):
    """The message of the ModelError that loading raises; of another error, with "!" in front; empty where it loads."""
    try:
        models.from_pretrained(folder, head=head, **options)
    except ModelError as error:
        return str(error)
    except Exception as error:
        return f"!{type(error).__name__}: {error}"
    return ""


def packed(header, data=b"", length=None):
    """The bytes of a safetensors file; header: JSON as text or bytes, or what becomes it."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


# safetensors: the file as a whole


def test_the_sound_file_loads(sound, folder):
    header, data, _ = sound
    (folder / "model.safetensors").write_bytes(packed(header, data))
    report = models.from_pretrained(folder, head="token-classification").report
    assert len(report.loaded) == len(header) - ("__metadata__" in header)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 0.1, 0.3, 0.5, 0.9, 0.99, -4, -1])
def test_f14_a_truncated_file(sound, folder, kept):
    content = packed(sound[0], sound[1])
    kept = int(kept * len(content)) if isinstance(kept, float) else kept
    (folder / "model.safetensors").write_bytes(content[:kept])
    assert "model.safetensors is not a complete safetensors file" in refusal(folder)


ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
PLAIN = '{"a":' + ENTRY + "}"


@pytest.mark.parametrize(
    ("content", "message"),
    {
        "empty": (b"", "not a complete"),
        "only zeros": (bytes(64), "not readable as JSON"),
        "length 0": (packed(PLAIN, bytes(8), 0), "not readable as JSON"),
        "length of all ones": (packed(PLAIN, bytes(8), 2**64 - 1), "not a complete"),
        "length that is negative when signed": (packed(PLAIN, bytes(8), 2**63), "not a complete"),
        "length one more than the file": (packed(PLAIN, b"", len(PLAIN) + 1), "not a complete"),
        "length that cuts the header": (packed(PLAIN, bytes(8), len(PLAIN) - 1), "not readable as JSON"),
        "bytes after the last tensor": (packed(PLAIN, bytes(9)), "not a complete"),
        "a header of many megabytes": (packed(b" " * (MAX_JSON + 1)), "more than the"),
        "a zip": (b"PK\x03\x04" + bytes(60), "not a complete"),
        "a pickle": (pickle.dumps({"a": list(range(100))}), "not a complete"),
        "no UTF-8": (packed(b'{"\xff\xfe":1}'), "not readable as JSON"),
        "UTF-16": (packed(PLAIN.encode("utf-16")), "not readable as JSON"),
        "a byte order mark": (packed(b"\xef\xbb\xbf" + PLAIN.encode(), bytes(8)), "not readable as JSON"),
        "lists nested deeply": (packed("[" * 100_000), "nested too deeply"),
        "objects nested deeply": (packed('{"a":' * 100_000), "nested too deeply"),
        "many small objects": (packed("[" + "{}," * (MAX_JSON // 3 - 2) + "{}]"), "not a JSON object"),
        "many small lists": (packed('{"a":[' + "[]," * (MAX_JSON // 3 - 5) + "[]]}"), "dtype None"),
        "a list": (packed("[]"), "not a JSON object"),
        "a number": (packed("3"), "not a JSON object"),
        "text": (packed("hello"), "not readable as JSON"),
        "a number of many digits": (packed("9" * 10_000), "not readable as JSON"),
        "a name twice": (packed(f'{{"a":{ENTRY},"a":{ENTRY}}}', bytes(8)), "'a' occurs twice in its header"),
        "many names and one of them twice": (
            packed("{" + "".join(f'"{i}":1,' for i in range(200_000)) + '"7":1}'),
            "'7' occurs twice",
        ),
        "a name twice in an entry": (packed(PLAIN.replace("{", '{"shape":[1],', 2)), "'shape' occurs twice"),
        "NaN": (packed('{"a":NaN}'), "NaN is not a number"),
        "an infinite offset": (packed(PLAIN.replace("8]", "Infinity]")), "Infinity is not a number"),
        "no tensor": (packed("{}"), "none of its 0 tensors"),
        "an empty name": (packed(PLAIN.replace('"a"', '""'), bytes(8)), "cannot be a tensor's name"),
        "a name with a line break": (packed(PLAIN.replace('"a"', r'"a\nb"'), bytes(8)), "cannot be a tensor's name"),
        "a name with an escape": (packed(PLAIN.replace('"a"', r'"a\u001b[2J"'), bytes(8)), "cannot be a tensor's name"),
        "half a surrogate pair": (packed(PLAIN.replace('"a"', r'"\ud800"'), bytes(8)), "cannot be a tensor's name"),
        "a name without end": (packed(PLAIN.replace('"a"', f'"{"a" * 10**6}"'), bytes(8)), "cannot be a tensor's name"),
    }.values(),
)
def test_f14_a_file_that_is_none(folder, content, message):
    (folder / "model.safetensors").write_bytes(content)
    assert message in refusal(folder)


# safetensors: one bad entry in a sound header

MANY = 2**62
ENTRIES = [
    *({"dtype": value} for value in ("F33", "f32", "", "F4", "float32", 32, None, ["F32"], {})),
    *(
        {"shape": value}
        for value in (None, 5, "24", [24.0], [-24], [True], [[24]], ["24"], [10**30], {}, [1] * 9 + [24])
    ),
    *(
        {"shape": value}
        for value in ([1] * 9 + [24], [], [23], [25], [24, 0], [MANY, 4, 24], [MANY, MANY], [2**64 + 24])
    ),
    *(
        {"data_offsets": value}
        for value in (None, [], [0], [0, 1, 2], "01", [0.0, 96.0], [-96, 0], [96, 0], [2**64, 0])
    ),
    *(
        {"data_offsets": value}
        for value in ([2**64, 0], [0, 2**63], [10**40, 10**40 + 96], [True, 97], [None, None], {"0": 1})
    ),
]


@pytest.mark.parametrize("change", [*ENTRIES, None, [], 3, "F32"], ids=lambda change: str(change)[:40])
def test_f14_an_entry_of_another_form_is_named(sound, folder, change):
    header, data, _ = sound
    name = "classifier.weight"
    entry = header[name] | change if isinstance(change, dict) else change
    (folder / "model.safetensors").write_bytes(packed(header | {name: entry}, data))
    assert f"'{name}'" in refusal(folder)


@pytest.mark.parametrize(
    ("first", "second", "data", "message"),
    [
        ([0, 8], [0, 8], 8, "starts at byte"),  # one on the other
        ([0, 8], [4, 12], 12, "starts at byte"),
        ([0, 8], [12, 20], 20, "starts at byte"),  # a gap
        ([4, 12], [12, 20], 20, "but the header ends at"),
        ([0, 8], [8, 16], 12, "not a complete"),
        ([0, 8], [8, 16], 20, "not a complete"),
        ([10**12, 10**12 + 8], [0, 8], 16, "starts at byte"),
    ],
)
def test_f14_tensors_that_do_not_fill_the_file_are_named(folder, first, second, data, message):
    header = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": offsets}
        for name, offsets in (("one", first), ("two", second))
    }
    (folder / "model.safetensors").write_bytes(packed(header, bytes(data)))
    found = refusal(folder)
    assert message in found
    assert "'one'" in found or "'two'" in found


@pytest.mark.parametrize("shape", [[0], [0, 24], [0, MANY], [3, 0, 3]])
def test_f14_a_tensor_without_numbers_has_the_wrong_shape(sound, folder, shape):
    header, data, _ = sound
    data = data[: len(data)]
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    empty = {"dtype": "F32", "shape": shape, "data_offsets": [end, end]}
    names = [name for name in header if name not in ("__metadata__", "classifier.weight")]
    old = header["classifier.weight"]
    header = {name: header[name] for name in names} | {"classifier.weight": empty, "spare": old}
    (folder / "model.safetensors").write_bytes(packed(header, data))
    assert "spare" in refusal(folder)
    header["cls.predictions.bias"] = header.pop("spare")  # one that may be there
    (folder / "model.safetensors").write_bytes(packed(header, data))
    assert f"classifier.weight has shape {shape}" in refusal(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["F32", "F16", "F64"])
def test_f14_numbers_that_are_not_finite_are_refused_by_name(sound, folder, dtype, value):
    header, data, _ = sound
    begin, end = header["classifier.bias"]["data_offsets"]
    count = (end - begin) // 4
    bias = np.zeros(count, {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype])
    bias[-1] = value
    changed = {n: entry for n, entry in header.items() if n not in ("__metadata__", "classifier.bias")}
    parts, offset = [], 0
    for entry in changed.values():
        part = data[slice(*entry["data_offsets"])]
        entry = entry | {}
        parts.append(part)
    new = {}
    for (name, entry), part in zip(changed.items(), parts, strict=True):
        new[name] = entry | {"data_offsets": [offset, offset + len(part)]}
        offset += len(part)
    new["classifier.bias"] = {"dtype": dtype, "shape": [count], "data_offsets": [offset, offset + bias.nbytes]}
    (folder / "model.safetensors").write_bytes(packed(new, b"".join(parts) + bias.tobytes()))
    assert "classifier.bias has NaN or infinity" in refusal(folder)


def test_f14_large_numbers_whose_sum_is_not_finite_are_numbers(sound, folder):
    header, data, _ = sound
    begin, end = header["classifier.bias"]["data_offsets"]
    data = data[:begin] + np.full((end - begin) // 4, 3e38, "<f4").tobytes() + data[end:]
    (folder / "model.safetensors").write_bytes(packed(header, data))
    assert (models.from_pretrained(folder, head="token-classification").head.classifier.bias == 3e38).all()


# 10,000 mutated headers


def mutate(content: bytes, length: int, rng: random.Random) -> bytes:
    """One to four changes in the header or its length: bytes, digits, and pieces removed, doubled or swapped."""
    file = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        i, j = (8 + rng.randrange(length) for _ in range(2))
        kind = rng.randrange(6)
        if kind == 0:
            file[i] = rng.randrange(256)
        elif kind == 1:
            file[rng.randrange(8)] = rng.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            digits = [k for k in range(8, 8 + length) if file[k : k + 1].isdigit()]
            file[rng.choice(digits or [8])] = rng.choice(b"0123456789-.e")
        elif kind == 3:
            del file[min(i, j) : min(i, j) + rng.randint(1, 40)]
        elif kind == 4:
            file[i:i] = file[j : j + rng.randint(1, 80)]
        else:
            file[i], file[j] = file[j], file[i]
        if kind in (3, 4) and rng.random() < 0.7:  # the length follows, so that the JSON is reached
            file[:8] = struct.pack("<Q", max(0, length + len(file) - len(content)))
    return bytes(file)


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_f14_mutated_headers(sound, folder, count):
    content = packed(sound[0], sound[1])
    length = len(content) - 8 - len(sound[1])
    rng = random.Random(14)
    path = folder / "model.safetensors"
    refused = 0
    before = resident()
    for _ in range(count):
        path.write_bytes(mutate(content, length, rng))
        message = outcome(folder, "token-classification")
        refused += bool(message)
        assert message.isprintable()
        assert not message.startswith("!"), message
    assert resident() - before < LIMIT
    assert 0.8 * count < refused


# the index of shards


def entry_of(length, name="a"):
    return packed({name: {"dtype": "F32", "shape": [length // 4], "data_offsets": [0, length]}}, bytes(length))


@pytest.mark.parametrize(
    ("index", "message"),
    {
        "empty": ("", "not readable as JSON"),
        "a list": ("[]", "no weight_map"),
        "text": ('"x"', "no weight_map"),
        "null": ("null", "no weight_map"),
        "without a map": ("{}", "no weight_map"),
        "an empty map": ('{"weight_map":{}}', "no weight_map"),
        "a list as map": ('{"weight_map":["s"]}', "no weight_map"),
        "nested deeply": ('{"weight_map":' * 50_000, "nested too deeply"),
        "too long": (" " * (MAX_JSON + 1), "more than"),
        "NaN": ('{"weight_map":NaN}', "NaN is not a number"),
        "a tensor twice": ('{"weight_map":{"a":"s","a":"t"}}', "'a' occurs twice"),
        "a map twice": ('{"weight_map":{"a":"s"},"weight_map":{"a":"t"}}', "'weight_map' occurs twice"),
        "a tensor that its shard does not have": ('{"weight_map":{"a":"s","b":"s"}}', "tensor 'b' should be in s"),
        "a missing shard": ('{"weight_map":{"a":"s","b":"u"}}', "shard u is missing"),
        "a tensor in two shards": ('{"weight_map":{"a":"s","b":"t"}}', "'a' is in more than one shard"),
        "a shard that is none": ('{"weight_map":{"a":"config.json"}}', "config.json is not a complete safetensors"),
        "tensors of no model": ('{"weight_map":{"a":"s"}}', "none of its 1 tensors"),
        **{
            f"shard {name!r:.30}": (json.dumps({"weight_map": {"a": name}}), "shard")
            for name in (
                "/s",
                "../s",
                "sub/s",
                "./s",
                "..",
                ".",
                "",
                "s/",
                "s\0",
                "s\n",
                "~",
                "s" * 300,
                3,
                None,
                ["s"],
                {},
            )
        },
    }.values(),
)
def test_f14_an_index_that_is_none(folder, index, message):
    for name in ("s", "t"):
        (folder / name).write_bytes(entry_of(8))
    (folder.parent / "s").write_bytes(entry_of(8))
    (folder / "model.safetensors.index.json").write_text(index)
    assert message in refusal(folder)


def test_f14_tensor_not_in_the_index_is_checked_like_any_other(sound, folder):
    header, data, _ = sound
    (folder / "one").write_bytes(packed(header, data))
    (folder / "two").write_bytes(entry_of(8, "odd"))
    names = [name for name in header if name != "__metadata__"]
    shard_of = dict.fromkeys(names, "one")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    assert models.from_pretrained(folder, head="token-classification").report.ignored == []
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of | {"odd": "two"}}))
    assert "unknown to bert: odd" in refusal(folder)


# config.json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable as JSON"),
        (b"{", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[" * 10**6, "nested too deeply"),
        (b'{"a":' * 10**5, "nested too deeply"),
        (b" " * (MAX_JSON + 1), "more than"),
        (b"[" + b"[]," * (MAX_JSON // 3 - 2) + b"[]]", "is not supported"),
        (b'{"model_type":"bert","layer_norm_eps":NaN}', "NaN is not a number"),
        (b'{"model_type":"bert","layer_norm_eps":-Infinity}', "-Infinity is not a number"),
        (b'{"model_type":"bert","model_type":"gpt2"}', "'model_type' occurs twice"),
        (b'{"model_type":["bert"]}', "is not supported"),
        (b'{"model_type":{"bert":{}}}', "is not supported"),
        (b'{"model_type":"' + b"b" * 10**6 + b'"}', "is not supported"),
        (b'{"model_type":1' + b"0" * 5000 + b"}", "not readable as JSON"),
    ],
    ids=range(14),
)
def test_f14_a_config_that_is_none(folder, content, message):
    (folder / "config.json").write_bytes(content)
    assert message in refusal(folder)


GARBAGE = [
    *("text", "", "x" * 10**5, [], ["a", [1, {}]], {}, {"a": {"b": [None]}}, True, False, None, [[[[[[[[[]]]]]]]]]),
    *(0, -1, 1, 7, 10**7, 10**12, 2**63, -(2**63), 10**400, 0.5, -0.5, 1e-300, 1e300, 10.0**12, [10**12, 10**12]),
]
MORE = ("id2label", "label2id", "num_labels", "problem_type", "pooling", "architectures", "tie_word_embeddings")
MORE += ("pad_token_id", "type_vocab_size", "qkv_bias", "head_dim", "is_decoder", "scale_attn_weights", "torch_dtype")
MORE += (
    "hidden_act",
    "activation",
    "activation_function",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "initializer_factor",
)
MORE += ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "dropout", "dropout_rate")
MORE += (
    "layer_norm_epsilon",
    "embd_pdrop",
    "n_inner",
    "sinusoidal_pos_embds",
    "feed_forward_proj",
    "dense_act_fn",
    "is_gated_act",
)
MORE += ("num_channels", "position_embedding_type", "is_encoder_decoder", "intermediate_size", "scale_decoder_outputs")


@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("init", ["scratch", "pretrained"])
@pytest.mark.parametrize("kind", KINDS)
def test_f14_every_field_of_config_json_with_bad_values(tmp_path, kind, init, every):
    """It loads, or it ends in one sentence that names config.json or its folder; either way in little memory."""
    head = next(head for head in models.ARCHITECTURES[kind].heads if has_labels(head))
    model = tiny.scratch(tmp_path, kind, head)
    models.save_pretrained(model, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    refused = 0
    names = sorted({*raw, *ZOO[kind].fields, *MORE} - {"model_type"})
    for i, name in enumerate(names):
        for value in GARBAGE[i % every :: every]:
            if init == "scratch" and isinstance(value, int) and 1 < value < 10**8:
                continue  # a model that may be meant
            (tmp_path / "config.json").write_text(json.dumps(raw | {name: value}))
            before = resident()
            message = outcome(tmp_path, head, init=init)
            refused += bool(message)
            what = (name, str(value)[:60], message[:200])
            assert not message.startswith("!"), what
            assert message.isprintable(), what
            assert len(message) < 1500, what
            assert not message or "config.json" in message or str(tmp_path) in message or name in message, what
            assert resident() - before < LIMIT, what
    assert refused > 200 / every


@pytest.mark.parametrize("kind", KINDS)
def test_f14_model_larger_than_its_files_is_refused_unbuilt(tmp_path, kind):
    models.save_pretrained(tiny.scratch(tmp_path, kind, None), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    size = "num_channels" if ZOO[kind].modality == "image" else "vocab_size"
    for name in (size, models.ARCHITECTURES[kind].depth[0]):
        (tmp_path / "config.json").write_text(json.dumps(raw | {name: 10**7}))
        assert "config.json describes a model" in refusal(tmp_path, head=None)
        (tmp_path / "config.json").write_text(json.dumps(raw | {name: 10**12}))
        assert f"{name} = 1000000000000 should be at most" in refusal(tmp_path, head=None)


# F15: pickles; what models.checkpoints.convert makes of them is in test_convert.py


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda p: p[0].__name__)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pt", "weights.npy", "config.json"])
def test_f15_nothing_that_lies_in_the_folder_is_executed(sound, folder, monkeypatch, payload, name):
    monkeypatch.chdir(folder)
    if name == "weights.npy":
        np.save(name, np.array([Call(*payload)], dtype=object), allow_pickle=True)
    elif name == "model.pt":
        torch.save({"a": Call(*payload)}, name)
    else:
        Path(name).write_bytes(pickle.dumps(Call(*payload)))
    message = refusal(folder)
    assert ("models.checkpoints.convert" in message) == name.endswith(".bin")
    assert ("not a complete safetensors file" in message) == name.endswith(".safetensors")
    assert not Path("MARK").exists()
    assert sorted(os.listdir(".")) == sorted({"config.json", name})


def test_f15_the_payloads_do_execute_where_they_are_trusted(tmp_path, monkeypatch):
    """Without this, the tests above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    for payload in PAYLOADS:
        pickle.loads(pickle.dumps(Call(*payload)))
        if payload[0] is os.popen:
            continue  # by a process that nobody waits for
        assert Path("MARK").exists(), payload
        Path("MARK").rmdir() if Path("MARK").is_dir() else Path("MARK").unlink()


# memory: no second copy of the weights


MEASURE = """
import models, sys, torch
def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
models.from_pretrained(sys.argv[2])  # what is allocated once
before = status("VmRSS")
model = models.from_pretrained(sys.argv[1])
print(before, status("VmHWM"), status("RssAnon"))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
@pytest.mark.parametrize("kind", ["gpt2", pytest.param("bert", marks=pytest.mark.slow)])  # transposed; as in the file
def test_loading_needs_the_memory_of_the_weights_once(tmp_path, kind, checkpoint_folder):
    sizes = {
        "bert": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 8},
        "gpt2": {"n_embd": 512, "n_head": 8, "n_layer": 8},
    }[kind]
    sizes |= {"initializer_range": 0.02, "vocab_size": 4000}
    model = models.from_pretrained(tiny.config_folder(tmp_path, kind, **sizes), init="scratch")
    models.save_pretrained(model, tmp_path)
    file = (tmp_path / "model.safetensors").stat().st_size
    assert file > 90_000_000
    root = str(Path(models.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path, checkpoint_folder],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    before, peak, _ = map(int, done.stdout.split())
    assert peak - before < 1.4 * file


def test_f14_files_are_closed_after_a_refusal(folder):
    (folder / "model.safetensors").write_bytes(packed(PLAIN, bytes(8)))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(20):
        refusal(folder)
    assert not before or len(os.listdir("/proc/self/fd")) <= before


def test_json_of_the_standard_is_read_as_it_is():
    text = '{"a": [1, 2.5, -1e3, "\\u00e9\\ud83d\\ude00", null, true], "b": {"a": 1}}'
    assert parse_json(text.encode(), Path("x")) == json.loads(text)
