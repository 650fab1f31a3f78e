"""engine.completion: the scripts for bash and zsh complete settings, values, recipes, tasks and files."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from engine import commands, completion
from engine.config import Config, ConfigError, all_settings, shipped_recipes
from engine.tasks import TASKS

COMPLETED = {
    "finetune-train movie_": {"movie_reviews"},
    "finetune-train --optim.lr_sc": {"--optim.lr_schedule=", "--optim.lr_scales="},
    "torchrun -m engine.train --optim.lr_sc": {"--optim.lr_schedule=", "--optim.lr_scales="},
    "/some/where/finetune-new text-c": {"text-classification"},
    "finetune-train --run.device=c": {"cpu", "cuda"},
    "finetune-predict --inp": {"--input="},
    "torchrun --nproc": set(),
    "finetune-train --show": {"--show-all"},
    "finetune-train --run.device c": {"cpu", "cuda"},
    "finetune-train --run.task text-c": {"text-classification"},
    "finetune-new text-classification --data t": set(),
    "finetune-train --run.device=cpu movie_": {"movie_reviews"},
    "finetune-train --dry-run movie_": {"movie_reviews"},
    "finetune-train --help ta": {"tasks"},
    "finetune-predict runs/x --help optim.lr_sc": {"optim.lr_schedule", "optim.lr_scales"},
}


def test_bash_completes_settings_values_and_recipes():
    """bash takes a line apart at blanks and at "="."""
    lines = [completion.script("bash")]
    for line in COMPLETED:
        words = " ".join(json.dumps(word) for word in line.replace("=", " = ").split(" "))
        lines.append(f"COMP_LINE={json.dumps(line)}; COMP_POINT={len(line)}; COMP_WORDS=({words}); COMPREPLY=()")
        lines.append('COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _finetune 2>/dev/null; echo "${COMPREPLY[@]}"')
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    found = [set(line.split()) for line in done.stdout.split("\n")]
    assert found[: len(COMPLETED)] == list(COMPLETED.values())


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_script_has_all_settings_recipes_and_tasks(shell):
    script = completion.script(shell)
    for name in (*(f"--{key}" for key in all_settings(Config())), *shipped_recipes(), *TASKS, *commands.MODULES):
        assert name in script


@pytest.mark.parametrize("argv", [[], ["fish"], ["bash", "zsh"]])
def test_another_shell_is_a_mistake(argv):
    with pytest.raises(ConfigError, match=r"name a shell: python -m engine.completion bash\|zsh"):
        completion.main(argv)


# In zsh: the line that is typed, and what it becomes with Tab and Enter.
TYPED = {
    "finetune-train movie_": "movie_reviews",
    "finetune-train --optim.lr_sched": "--optim.lr_schedule=",
    "torchrun --nproc-per-node 2 -m engine.train --run.devi": "--nproc-per-node 2 -m engine.train --run.device=",
    "finetune-train --run.device=cp": "--run.device=cpu",
    "finetune-new text-c": "text-classification",
    "finetune-predict runs/x --inp": "runs/x --input=",
    "finetune-study movie_reviews --see": "movie_reviews --seeds",
    "finetune-predict runs/x --input=my_ro": "runs/x --input=my_rows.jsonl",
    "finetune-new text-classification --data my_ro": "text-classification --data my_rows.jsonl",
    "finetune-completion z": "zsh",
    "finetune-train --run.device cp": "--run.device cpu",
    "finetune-train --dry-run movie_": "--dry-run movie_reviews",
    "finetune-train --help recip": "--help recipes",
}
SECONDS = 120


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh")
def test_zsh_completes_what_is_typed_in_a_terminal(tmp_path):
    (tmp_path / "my_rows.jsonl").touch()
    (tmp_path / "completion").write_text(completion.script("zsh"))
    commands_shown = "".join(f'{name}() {{ print -r -- "GOT<$*>"; }}\n' for name in {line.split()[0] for line in TYPED})
    (tmp_path / ".zshrc").write_text(f"PS1='READY> '\n{commands_shown}source completion\n")
    process, terminal = pty.fork()
    if not process:
        os.chdir(tmp_path)
        environment = {"HOME": str(tmp_path), "ZDOTDIR": str(tmp_path), "TERM": "dumb", "PATH": os.environ["PATH"]}
        os.execvpe("zsh", ["zsh", "-i"], environment)
    try:
        for line, expected in TYPED.items():
            read_until(terminal, "READY> ")
            os.write(terminal, f"{line}\t\n".encode())
            assert read_until(terminal, ">").endswith(f"GOT<{expected}>"), line
    finally:
        os.close(terminal)  # which ends the shell
        os.waitpid(process, 0)


def read_until(terminal: int, end: str) -> str:
    """Return what a terminal shows until it shows `end`."""
    shown, limit = "", time.monotonic() + SECONDS
    while not shown.endswith(end):
        assert time.monotonic() < limit, shown
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 1).decode(errors="replace")
    return shown


def test_scripts_are_written_for_the_shells_that_are_named(capsys):
    for shell in completion.SHELLS:
        assert completion.main([shell]) == 0
        assert capsys.readouterr().out == completion.script(shell) + "\n"
    assert Path(completion.__file__).read_text(encoding="utf-8").count("bashcompinit") == 0


def test_help_is_as_wide_as_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        completion.main(["--help"])
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 80
    assert "    python -m engine.completion bash > ~/.finetune-completion     (or zsh)" in shown
