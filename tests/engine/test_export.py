"""python -m engine.export: graphs whose logits are the model's, int8, what is refused, the model card and the hub."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support import runs, task_data, zoo
from support import tiny_models as tiny

import models
from data import DataError
from engine import export, graphs, hub_upload
from engine.config import Config, ConfigError, override
from engine.errors import TrainingError
from engine.export import Request, check_folder, check_request
from engine.manifest import verify
from engine.model_card import CARD, license_of, without_folders
from engine.tasks import TASKS
from models.padded import GraphModel, graphs_of

CASES = [(kind, next(head for head in models.ARCHITECTURES[kind].heads if head)) for kind in zoo.CODES]
CASES += [("gpt2", "causal-lm"), ("bert", "question-answering"), ("bert", "relation-classification")]
CASES += [("bert", "masked-lm"), ("deit", "distilled-image-classification")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a mean-pooled tiny BERT, without the batches of its training data."""
    folder = tmp_path_factory.mktemp("export")
    reviews = runs.write_reviews(folder / "reviews.jsonl", 60)
    tiny_bert = runs.write_tiny_bert(folder / "tiny")
    changes = {"model.pooling": "mean", "train.max_steps": 4, "eval.every_steps": 2, "data.test": str(reviews)}
    runs.run_training(runs.tiny_config(tiny_bert, reviews, folder / "mine", changes))
    return folder / "mine"


def export_run(run, *options):
    return export.main([str(run), *options])


def skip_exporters(monkeypatch, error=0.0):
    """Run the modules of graphs in place of exported files, which takes no seconds; `error` is added to the logits."""

    def run(graph, inputs):
        with torch.no_grad():
            return [graph.module(*(inputs[name] for name in graph.inputs)) + error]

    monkeypatch.setattr(graphs, "write_graph", lambda graph, to, folder: folder / "config.json")
    monkeypatch.setattr(graphs, "open_graph", lambda path, graph: partial(run, graph))


# graphs


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "torch-export"])
@pytest.mark.parametrize(("kind", "head"), CASES)
def test_exported_graphs_compute_what_the_model_does(tmp_path, kind, head, to):
    """For batches of any number and length, those of one example and of one token too."""
    if to == "onnx":
        pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    model = tiny.scratch(tmp_path / "config", kind, head).eval()
    inputs = tiny.inputs_of(model)
    parts = graphs_of(model, (8, 8))
    runners = [graphs.open_graph(graphs.write_graph(graph, to, tmp_path), graph) for graph in parts]
    exported = GraphModel(model, parts, runners)
    every = range(tiny.count_examples(inputs))
    for chosen in (every, [0], [1]):
        batch = replace(tiny.select(inputs, head, chosen), labels=None)
        with torch.no_grad():
            torch.testing.assert_close(exported(batch).logits, model(batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_graph_of_torch_export_is_compared_and_described(run, capsys):
    export_run(run, "--to", "torch-export")
    folder = run / "best-torch-export"
    names = {"model.pt2", "config.json", "tokenizer.json", "tokenizer_config.json", "export.json", "README.md"}
    assert {path.name for path in folder.iterdir()} == names
    said = json.loads((folder / "export.json").read_text())
    assert (said["examples"], said["largest_difference"] < 1e-5) == (6, True)
    assert "(batch_size, sequence_length)" in (folder / "README.md").read_text()
    assert "largest difference of a logit" in capsys.readouterr().out
    assert verify(run / "best") is None


@pytest.mark.slow
def test_onnx_in_int8_says_what_it_costs_and_gains(run, capsys, monkeypatch, tmp_path):
    """The README's own code runs in the exported folder alone, and gives the logits of the model."""
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    export_run(run, "--to", "onnx", "--int8", "--output", str(tmp_path / "out"))
    said = json.loads((tmp_path / "out" / "export.json").read_text())["int8"]
    before, after = said["metrics"]["loss"]
    assert before != after
    assert abs(before - after) < 0.1
    assert said["bytes"][1] < said["bytes"][0]
    assert "times as fast" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "out")
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(compile(code.replace("A fine film.", "the film"), "README.md", "exec"), names)
    model = models.from_pretrained(run / "best", head="sequence-classification").eval()
    texts = [encoded.ids for encoded in names["tokenizer"].encode_batch(["the film", "Dull."])]
    lengths = [sum(encoded.attention_mask) for encoded in names["encoded"]]
    with torch.no_grad():
        expected = model(models.pack([ids[:n] for ids, n in zip(texts, lengths, strict=True)])).logits
    torch.testing.assert_close(torch.tensor(names["logits"]), expected, rtol=1e-4, atol=1e-4)


def test_a_graph_that_differs_is_not_left_behind(run, monkeypatch, tmp_path):
    skip_exporters(monkeypatch, error=0.01)
    with pytest.raises(TrainingError, match=r"largest difference of a logit is 0\.01"):
        export_run(run, "--to", "torch-export", "--output", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_before_the_work(run, monkeypatch, tmp_path):
    monkeypatch.setattr(export.disk, "free_bytes", lambda path: 12_000)
    with pytest.raises(TrainingError, match=r"the weights take \d+\.\d kB, and 12 kB are free there"):
        export_run(run, "--to", "torch-export", "--output", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (("", {}, ()), "choose from onnx, torch-export, hub"),
        (("tflite", {}, ()), "choose from onnx, torch-export, hub"),
        (("torch-export", {}, ("int8",)), "--int8 has no effect with --to torch-export"),
        (("torch-export", {"repo": "a/b"}, ()), "--repo has no effect with --to torch-export"),
        (("hub", {"rows": "x"}, ()), "--rows has no effect with --to hub"),
        (("hub", {}, ()), "--to hub needs --repo USER/NAME"),
        (("hub", {"repo": "a/b", "private": "true"}, ()), "--private=true: --private takes no value"),
        (("onnx", {"int8": "yes"}, ()), "--int8=yes: --int8 takes no value"),
    ],
)
def test_options_that_do_not_fit_are_refused(request_, message):
    to, options, switches = request_
    with pytest.raises(ConfigError, match=message):
        check_request(Request(to, frozenset(switches), options))


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(graphs, "ONNX_PACKAGES", ("onnx_of_nobody",))
    with pytest.raises(TrainingError, match=r'needs onnx_of_nobody: pip install "finetune-engine\[onnx\]"'):
        check_request(Request("onnx", frozenset(), {}))


def test_folders_that_are_not_ours_are_never_replaced(run, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for folder in (tmp_path, run / "best", run):
        with pytest.raises(
            ConfigError, match=r"^--output '[^']*' exists and is no earlier export; name another folder"
        ):
            check_folder(folder, run / "best")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is a link; name the folder itself"):
        check_folder(tmp_path / "link", run / "best")
    with pytest.raises(ConfigError, match="would be in the checkpoint"):
        check_folder(run / "best" / "onnx", run / "best")
    for name, reason in (("a" * 300, "name too long"), ("a\0b", "null")):
        with pytest.raises(ConfigError, match=f"cannot be written: .*{reason}"):
            check_folder(tmp_path / name, run / "best")


def test_a_value_may_be_the_name_of_a_switch(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(export, "export_graphs", lambda folder, config, request: asked.append(request))
    monkeypatch.setattr(graphs, "check_packages", lambda to: None)
    export_run(run, "--to", "onnx", "--int8", "--output", "int8")
    assert asked == [Request("onnx", frozenset({"int8"}), {"output": "int8"})]


# the card


def test_the_card_is_one_of_the_hub_and_says_what_the_run_did(run):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    card = huggingface_hub.ModelCard.load(run / "best" / CARD)
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.library_name is None  # transformers cannot have this pooling
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = [row for row in rows if row.get("best")][-1]
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        name: round(value, 6) for name, value in best["evaluation"].items() if value is not None
    }
    for part in ("| accuracy |", "validation | test", "pooling = mean", "54 examples", "`negative`, `positive`"):
        assert part in card.text, part
    assert str(run.parent) not in card.content
    assert verify(run / "best") is None


def test_the_card_of_an_equal_run_is_equal(run, tmp_path):
    config = runs.configs.read_recipe(str(run / "best" / "recipe.toml"))
    changed = override(config, {"run.folder": str(tmp_path / "mine")})
    runs.run_training(changed)
    assert (tmp_path / "mine" / "best" / CARD).read_text() == (run / "best" / CARD).read_text()


def test_the_card_names_no_folder_of_this_machine():
    config = override(Config(), {"data.train": "/home/me/secret/rows.csv", "model.name": "/home/me/model"})
    shown = without_folders(config)
    assert (shown.data.train, shown.model.name) == ("rows.csv", "model")
    config = override(Config(), {"run.plugins": ("/home/me/mine.py",), "data.label_separator": "/", "run.folder": "."})
    shown = without_folders(config)
    assert (shown.run.plugins, shown.data.label_separator) == (("mine.py",), "/")  # which is no folder
    assert shown.run.folder == Path.cwd().name


LABELS = ("a|b", "<script>x</script>", "中文`x", "new\n- line", "_", "😀")


def test_no_label_or_name_is_markdown_in_a_card(tmp_path):
    """Each is read as it is, and none ends a list, a table or a code."""
    rows = [{"text": "the film", "label": label} for label in LABELS for _ in range(9)]
    (tmp_path / "评论<b>.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"train.max_steps": 1, "eval.every_steps": 1}
    tiny_bert = runs.write_tiny_bert(tmp_path / "模型")
    runs.run_training(runs.tiny_config(tiny_bert, tmp_path / "评论<b>.jsonl", tmp_path / "😀", changes))
    card = (tmp_path / "😀" / "best" / CARD).read_text(encoding="utf-8")
    assert "`<script>x</script>`, `_`, `a|b`, `new - line`, ``中文`x``, `😀`." in card
    assert "\n  - labels: \\<script>x\\</script> " in card
    assert "of `评论<b>.jsonl`" in card
    assert yaml_of(card)["model-index"][0]["name"] == "😀"


def yaml_of(card):
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_that_is_there_is_kept(run, capsys):
    """Its author may have edited it, and resumes the finished run."""
    path = run / "best" / CARD
    text = path.read_text(encoding="utf-8")
    path.write_text("my own words")
    config = runs.configs.read_recipe(str(run / "best" / "recipe.toml"))
    runs.run_training(override(config, {"run.resume": "yes"}))
    assert path.read_text() == "my own words"
    assert f"{path} is kept as it is" in capsys.readouterr().out
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(name, marks=[] if name in ("multiple-choice", "relation-extraction") else [pytest.mark.slow])
        for name, task in TASKS.items()
        if task.section != "multi_task"
    ],
)
def test_the_card_shows_a_row_that_the_model_reads(task, tmp_path, monkeypatch):
    settings = task_data.write(task, tmp_path) | {"train.max_steps": 1, "run.folder": str(tmp_path / "mine")}
    runs.run_training(override(Config(), settings))
    card = (tmp_path / "mine" / "best" / CARD).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    if "picture.png" in card:
        shutil.copyfile(next(tmp_path.rglob("*.png")), "picture.png")
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / "mine"))
    exec(compile(code.replace("engine.predict_rows", "found = engine.predict_rows"), CARD, "exec"), names := {})
    assert len(names["found"]) == 1


@pytest.mark.parametrize(
    ("text", "license_name"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# x", "apache-2.0"),
        ("---\ntags: [x]\n---\nlicense: mit", ""),
        ("license: mit", ""),
        (None, ""),
    ],
)
def test_the_licence_is_that_of_the_front_matter(tmp_path, text, license_name):
    if text is not None:
        (tmp_path / CARD).write_text(text)
    assert license_of(tmp_path) == license_name


# the hub


def test_a_dry_run_lists_files_and_card_and_sends_nothing(run, capsys, monkeypatch):
    monkeypatch.setattr(hub_upload, "_send", lambda *_: pytest.fail("something was sent"))
    export_run(run, "--to", "hub", "--repo", "me/mine", "--private", "--dry-run")
    out = capsys.readouterr().out
    size = f"{(run / 'best' / 'model.safetensors').stat().st_size:,}"
    for part in ("https://huggingface.co/me/mine (private)", f"{size}  model.safetensors", "# mine: bert", "dry run"):
        assert part in out, part


def test_what_is_uploaded_can_be_loaded_and_has_no_optimizer(run, monkeypatch, tmp_path):
    sent = []
    monkeypatch.setattr(hub_upload, "_send", lambda folder, repo, private, names: sent.extend(names))
    hub_upload.upload(run / "last", "me/mine", private=False, dry_run=False)
    assert "optimizer.safetensors" not in sent
    for name in sent:
        shutil.copyfile(run / "last" / name, tmp_path / name)
    assert models.from_pretrained(tmp_path, head="sequence-classification").labels == ("negative", "positive")


@pytest.mark.parametrize("repo", ["mine", "a/b/c", "a b/c", "me/..", "me/a--b", "/x", "me/", ""])
def test_names_that_the_hub_does_not_allow_are_refused(run, repo):
    with pytest.raises(ConfigError, match="--repo"):
        hub_upload.upload(run / "best", repo, private=False, dry_run=True)


def test_without_a_network_or_a_token_one_sentence_says_so(run, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TrainingError, match="HF_HUB_OFFLINE is set"):
        hub_upload.upload(run / "best", "me/mine", private=False, dry_run=False)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    for error, message in [
        (hub.errors.LocalTokenNotFoundError("no token"), "does not let this user write me/mine: log in with `hf auth"),
        (ConnectionError("no route"), "the hub cannot be reached"),
    ]:
        monkeypatch.setattr(hub.HfApi, "whoami", lambda self, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(TrainingError, match=message):
            hub_upload.upload(run / "best", "me/mine", private=False, dry_run=False)


# rows


def test_named_rows_take_the_place_of_the_validation_rows(run, tmp_path, monkeypatch):
    skip_exporters(monkeypatch)
    rows = runs.write_reviews(tmp_path / "other.jsonl", 150, seed=5)
    for _ in range(2):  # the second replaces what the first has written
        export_run(run, "--to", "torch-export", "--rows", str(rows), "--output", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "export.json").read_text())["examples"] == export.MAX_ROWS


def test_rows_of_the_run_that_are_gone_can_be_replaced(run, tmp_path, monkeypatch):
    rows = runs.write_reviews(tmp_path / "rows.jsonl", 9)
    asked = ("--to", "torch-export", "--output", str(tmp_path / "out"))
    skip_exporters(monkeypatch)
    reviews = run.with_name("reviews.jsonl").rename(tmp_path / "moved.jsonl")
    with pytest.raises(DataError, match=r"reviews\.jsonl: no such file\n--rows FILE names rows to compare the graph"):
        export_run(run, *asked)
    export_run(run, *asked, "--rows", str(rows))
    reviews.rename(run.with_name("reviews.jsonl"))
