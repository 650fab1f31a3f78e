"""The rules of the house, read from the source with `ast` (or, for what is imported, asked of a fresh interpreter)."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

import models as native

ROOT = Path(native.__file__).parent.parent
PACKAGES = ("engine", "models", "data")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# Who may import whom, besides itself.
MAY_IMPORT = {"engine": {"data", "models"}, "data": set(), "models": set()}
COMMANDS = {"engine/train.py", "engine/evaluate.py", "engine/predict.py", "engine/study.py", "engine/api.py"}
COMMANDS |= {"engine/against.py", "engine/export.py", "engine/prepare.py", "engine/study_options.py"}
COMMANDS |= {"engine/new.py", "engine/completion.py"}
# These take the whole configuration for what they are: read, checked, written into each checkpoint, or printed.
READ_CHECK_OR_SHOW_IT = {
    *("engine/config/__init__.py", "engine/config/recipe.py", "engine/config/sections.py", "engine/cli.py"),
    "engine/help_pages.py",
    *("engine/checkpoint.py", "engine/summary.py", "engine/validate.py", "engine/model_card.py"),
    *("engine/multi_task.py", "engine/tasks/multi_task.py"),  # they make that of each task from several recipes
    "engine/embeddings.py",  # it makes that of the task which embeds from another
}
# The one file that opens a pickle, when a user asks for that, and with the loader that runs no code.
CONVERTER = "models/checkpoints/convert.py"
OPTIONAL_OR_ORACLE = (
    *("transformers", "datasets", "accelerate", "huggingface_hub", "tensorboard", "pandas", "sklearn", "scipy"),
    *("matplotlib", "torchvision", "PIL", "pyarrow", "sacrebleu"),
)
# Words that said too little: each has a term of the field (files are found by the pattern of the test below).
BANNED_NAMES = {"cut", "how", "draw", "seen_set", "nothing", "folder_in"}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a module imports, inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = "" if node.level else node.module
            yield from ((node.lineno, f"{package}.{alias.name}") for alias in node.names)


def found(look: Callable[[str, ast.Module], Iterable[tuple[int, str]]]) -> list[str]:
    """`file:line: what` for every line that look(file, tree) yields, over all files."""
    return [f"{file}:{line}: {what}" for file, tree in TREES.items() for line, what in look(file, tree)]


def public(tree: ast.Module) -> list[ast.FunctionDef | ast.ClassDef]:
    nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [node for node in nodes if not node.name.startswith("_") and node.name != "main"]


def test_there_is_something_to_read():
    assert {f"{package}/__init__.py" for package in PACKAGES} | COMMANDS | READ_CHECK_OR_SHOW_IT <= set(TREES)
    assert CONVERTER in TREES


def test_rule_1_nobody_imports_the_loop():
    """Only engine/api.py does, inside a function: like a shell it starts the loop, and nothing below it needs it."""
    importers = found(lambda file, tree: [x for x in imported(tree) if x[1].startswith("engine.train")])
    assert [line.split(":")[0] for line in importers] == ["engine/api.py"]
    assert not [x for node in TREES["engine/api.py"].body for x in imported(ast.Module([node], [])) if "." not in x[1]]


def test_rule_2_data_and_models_import_neither_each_other():
    def wrong(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
        package = file.split("/")[0]
        forbidden = {*PACKAGES, "tests", "benchmarks"} - {package} - MAY_IMPORT[package]
        yield from (x for x in imported(tree) if x[1].split(".")[0] in forbidden | {""})  # "": a relative import

    assert found(wrong) == []


def test_rule_3_only_the_commands_see_the_whole_configuration():
    def wrong(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
        if file not in COMMANDS | READ_CHECK_OR_SHOW_IT:
            yield from (x for x in imported(tree) if x[1] in ("engine.config.Config", "engine.config.sections.Config"))

    assert found(wrong) == []


BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.FunctionDef, ast.Lambda)


def deepest(node: ast.AST, depth: int = 0) -> int:
    """Return how many blocks stand inside each other at most below `node`; an elif is no level of its own."""
    levels = [depth]
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for child in (child for child in children if isinstance(child, ast.AST)):
            is_elif = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If) and len(children) == 1
            levels.append(deepest(child, depth + (isinstance(child, BLOCKS) and not is_elif)))
    return max(levels)


def the_loop() -> ast.FunctionDef:
    return next(node for node in TREES["engine/train.py"].body if getattr(node, "name", "") == "train")


def test_rule_4_the_loop_is_nested_three_levels_at_most():
    assert deepest(the_loop()) <= 3
    assert deepest(ast.parse("while a:\n with b:\n  for c in d:\n   if e: pass").body[0]) == 3  # below the while


def test_rule_4_the_loop_is_not_golfed():
    for node in ast.walk(the_loop()):
        if isinstance(node, ast.Call):
            assert not [x for x in ast.walk(node) if isinstance(x, ast.NamedExpr)], ast.unparse(node)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            assert not isinstance(node.value, ast.Tuple) or len(node.value.elts) <= 2, ast.unparse(node)


def test_rule_4_the_words_of_the_field_are_in_the_loop():
    names = {node.id for node in ast.walk(the_loop()) if isinstance(node, ast.Name)}
    assert {"micro_batches", "batch", "lr", "grad_norm", "model", "optimizer", "loss_sums", "metrics"} <= names


def test_p20_the_loop_is_one_function_that_calls_no_callbacks():
    nodes = list(ast.walk(TREES["engine/train.py"]))
    assert [node.name for node in nodes if isinstance(node, ast.FunctionDef)] == ["train", "main"]
    assert sum(isinstance(node, ast.While) for node in nodes) == 1
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert [name for name in names if "callback" in name.lower() or "hook" in name or name.startswith("on_")] == []


@pytest.mark.parametrize("modules", ["engine", "engine.train, engine.evaluate, engine.predict"])
def test_p19_nothing_is_imported_that_is_not_needed(modules):
    command = [sys.executable, "-c", f"import sys, {modules}; print(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert "engine" in loaded
    assert not set(OPTIONAL_OR_ORACLE) & loaded


def test_p19_importing_engine_alone_does_not_import_torch():
    code = "import sys, engine; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_file_of_ours_can_run_what_a_file_contains():
    """No pickle of our own (torch's collectives use theirs, between ranks), no eval, torch.load in one place only."""
    modules = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    calls = {"eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads"}

    def wrong(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
        yield from (x for x in imported(tree) if x[1].split(".")[0] in modules)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
                yield node.lineno, ast.unparse(node)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                if file != CONVERTER or options.get("weights_only") != "True":
                    yield node.lineno, ast.unparse(node)
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                yield node.value.lineno, "allow_pickle"

    assert found(wrong) == []


def is_record(node: ast.AST) -> bool:
    """A dataclass or NamedTuple: its fields say what it is."""
    decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
    bases = [ast.unparse(base) for base in getattr(node, "bases", [])]
    return any(name.startswith("dataclass") for name in decorators) or "NamedTuple" in bases


def test_modules_functions_and_classes_have_docstrings():
    def wrong(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
        if not ast.get_docstring(tree):
            yield 1, "the module"
        silent = [node for node in public(tree) if not ast.get_docstring(node) and not is_record(node)]
        yield from ((node.lineno, node.name) for node in silent)

    assert found(wrong) == []


def test_no_public_signature_of_models_says_any():
    """Parameters, results and fields of public functions and classes; private ones may meet torch's untyped parts."""

    def annotations(node: ast.AST) -> Iterator[ast.expr]:
        if isinstance(node, ast.FunctionDef):
            arguments = (
                *node.args.posonlyargs,
                *node.args.args,
                *node.args.kwonlyargs,
                node.args.vararg,
                node.args.kwarg,
            )
            yield from (a.annotation for a in arguments if a is not None and a.annotation is not None)
            if node.returns is not None:
                yield node.returns
        elif isinstance(node, ast.ClassDef):
            for child in node.body:
                if not getattr(child, "name", "").startswith("_"):
                    yield from annotations(child)
        elif isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("_"):
            yield node.annotation

    def wrong(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
        if not file.startswith("models/"):
            return
        for node in [*public(tree), *(node for node in tree.body if isinstance(node, ast.AnnAssign))]:
            for annotation in annotations(node):
                if any(isinstance(x, ast.Name) and x.id == "Any" for x in ast.walk(annotation)):
                    yield annotation.lineno, ast.unparse(annotation)

    assert found(wrong) == []


def test_errors_are_raised_by_name_and_never_asserted():
    bare = {"Exception", "BaseException", "AssertionError"}

    def wrong(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                yield node.lineno, "assert"
            elif isinstance(node, ast.Raise) and node.exc is not None:
                raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                if ast.unparse(raised) in bare:
                    yield node.lineno, ast.unparse(node)
            elif isinstance(node, ast.ExceptHandler) and node.type is None:
                yield node.lineno, "a bare except"

    assert found(wrong) == []


def test_files_and_functions_stay_readable():
    """The house aims at 350 and 50 lines; these are the lengths at which a change has to argue for itself."""

    def wrong(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
        if len((ROOT / file).read_text(encoding="utf-8").splitlines()) > 400:
            yield 1, "more than 400 lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (file, node.name) != ("engine/train.py", "train"):
                first = node.body[ast.get_docstring(node) is not None :]
                length = node.end_lineno - first[0].lineno + 1 if first else 0
                if length > 75:
                    yield node.lineno, f"{node.name} has {length} lines"

    assert found(wrong) == []


def test_identifiers_are_words_that_say_something():
    def wrong(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
        for node in ast.walk(tree):
            names = {getattr(node, name, None) for name in ("id", "arg", "name")}
            if isinstance(node, ast.Name | ast.arg | ast.keyword | ast.FunctionDef | ast.ClassDef):
                yield from ((node.lineno, str(name)) for name in names & BANNED_NAMES)

    assert found(wrong) == []


def test_docstrings_begin_with_what_it_is_or_does():
    """A verb phrase or a noun phrase: never "Of ..." and never a question."""

    def wrong(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                first = (ast.get_docstring(node) or "").split("\n")[0]
                if first.startswith(("Of ", "By ", "What is ", "Whose ")) or first.rstrip().endswith("?"):
                    yield getattr(node, "lineno", 1), first

    assert found(wrong) == []


def test_test_names_are_short_enough_to_read():
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    assert files
    long = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name) > 60:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}")
    assert long == []


def test_data_and_models_agree_on_the_label_that_is_ignored():
    """Neither package imports the other, so each defines it; both follow torch's default."""
    from data.batch import IGNORE_INDEX as OF_DATA
    from models.inputs import IGNORE_INDEX as OF_MODELS

    assert OF_DATA == OF_MODELS == torch.nn.CrossEntropyLoss().ignore_index


def test_a_batch_of_data_is_what_models_read():
    """data.Batch satisfies models.ModelInputs by its attributes alone."""
    from data import Batch
    from models import ModelInputs

    wanted = {name for name in vars(ModelInputs) if not name.startswith("_")}
    assert wanted <= {field.name for field in dataclasses.fields(Batch)} | set(vars(Batch))
