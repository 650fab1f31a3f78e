"""Print a script by which bash or zsh completes the commands: settings, recipes, tasks and files.

    python -m engine.completion bash > ~/.finetune-completion     (or zsh)
    echo "source ~/.finetune-completion" >> ~/.bashrc             (or ~/.zshrc)

It completes `finetune-train` and the other console scripts, and `torchrun -m engine.train`. Names of settings, their
values where only a few are allowed, and the names of recipes are written into the script, so that Tab starts no
Python. Print it again after an update.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine import cli, evaluate, export, help_pages, new, predict, study_options
from engine.commands import MODULES
from engine.config import Config, ConfigError, all_settings, choose_from, sections, shipped_recipes
from engine.config.recipe import FLAGS
from engine.report import __main__ as report
from engine.tasks import MULTI_TASK, TASKS

USAGE = "python -m engine.completion bash|zsh"
# {a module: {its own options, as it declares them: their meaning}}
OPTIONS: dict[str, Iterable[str]] = {
    "train": [flag.removeprefix("--") for flag in FLAGS],
    "evaluate": evaluate.OPTIONS,
    "predict": predict.OPTIONS,
    "study": [*study_options.REPEATED, *study_options.OPTIONS],
    "export": [*export.OPTIONS, *export.SWITCHES],
    "report": report.OPTIONS,
    "new": [*new.OPTIONS, *new.SWITCHES],
}
# _finetune_words COMMAND WORD BEFORE: print what may stand where WORD is begun after the word BEFORE, between blanks.
WORDS = """\
_finetune_words() {{
    local found="" word
    [ -n "$ZSH_VERSION" ] && setopt local_options sh_word_split
    case "$3" in
        --help) echo "{topics}"; return ;;
        *=*) ;;
        --*)  # its value may be this word
            for word in $(_finetune_words "$1" "$3=" ""); do
                case "$word" in "$3="*) found="$found ${{word#"$3="}}"; [ "$word" = "$3=" ] && return ;; esac
            done
            [ -n "$found" ] && echo "$found" && return ;;
    esac
    case "$2" in
{values}
        -*) case "$1" in
{options}
        esac ;;
        *) case "$1" in
            train|study) found="{recipes}" ;;
            new) found="{tasks}" ;;
            completion) found="bash zsh" ;;
        esac ;;
    esac
    echo "$found"
}}
"""
BASH = """\
_finetune() {{
    local line="${{COMP_LINE:0:COMP_POINT}}" word previous before name
    word="${{line##* }}"
    case "$line" in
        *engine.*) name="${{line#*engine.}}"; name="${{name%% *}}" ;;
        *) name="${{COMP_WORDS[0]##*/finetune-}}"; name="${{name#finetune-}}" ;;
    esac
    previous="${{line%"$word"}}"; previous="${{previous%"${{previous##*[! ]}}"}}"; previous="${{previous##* }}"
    before="${{word%"${{COMP_WORDS[COMP_CWORD]}}"}}"  # bash takes a word apart at = and :
    [ "${{COMP_WORDS[COMP_CWORD]}}" = "=" ] && before="$word"
    COMPREPLY=($(compgen -W "$(_finetune_words "$name" "$word" "$previous")" -- "$word"))
    COMPREPLY=("${{COMPREPLY[@]#"$before"}}")
    case "${{COMPREPLY[0]}}" in *=) compopt -o nospace 2>/dev/null ;; esac
}}
complete -o default -F _finetune {scripts} torchrun
"""
ZSH = """\
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit; }}
_finetune() {{
    local name="${{${{words[1]:t}}#finetune-}}" module="${{words[(r)engine.*]}}"
    [[ -n "$module" ]] && name="${{module#engine.}}"
    local -a found=(${{(s: :)"$(_finetune_words "$name" "$PREFIX" "${{words[CURRENT-1]}}")"}})
    compadd -S "" -- ${{(M)found:#*=}}
    compadd -- ${{found:#*=}}
    (( compstate[nmatches] )) && return
    compset -P "*="  # a file as the value of a setting
    _files
}}
compdef _finetune {scripts} torchrun
"""
SHELLS = {"bash": BASH, "zsh": ZSH}


def script(shell: str) -> str:
    """Return the script for a shell, a key of SHELLS."""
    settings = all_settings(Config())
    switches = {key for key, declared in settings.items() if declared.type == "bool"}
    names = " ".join(f"--{key}" if key in switches else f"--{key}=" for key in settings)
    choices = {key: declared.metadata["choices"] for key, declared in settings.items() if declared.metadata["choices"]}
    choices["run.task"] = (*TASKS, MULTI_TASK)
    values = [
        f'        --{key}=*) found="{" ".join(f"--{key}={choice}" for choice in known if choice)}" ;;'
        for key, known in choices.items()
    ]
    options = []
    for module, declared_options in OPTIONS.items():
        own = " ".join(
            f"--{name}{'=' if value else ''}" for name, _, value in (x.partition(" ") for x in declared_options)
        )
        options.append(f'            {module}) found="{own} {names} --help" ;;')
    return (WORDS + SHELLS[shell]).format(
        values="\n".join(values),
        options="\n".join(options),
        topics=" ".join(["tasks", "recipes", "all", *sections(Config()), *settings]),
        recipes=" ".join(shipped_recipes()),
        tasks=" ".join(TASKS),
        scripts=" ".join(f"finetune-{name}" for name in MODULES),
    )


def describe_itself(width: int) -> list[str]:
    """Return the page of --help; its commands are not wrapped."""
    lines = help_pages.wrap_usage(USAGE, width)
    for paragraph in (__doc__ or "").strip().split("\n\n"):
        is_command = paragraph.startswith(" ")
        lines += ["", *(paragraph.split("\n") if is_command else help_pages.wrap(paragraph, width))]
    return lines


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv):
        help_pages.show(describe_itself(help_pages.terminal_width()))
    if len(argv) != 1 or argv[0] not in SHELLS:
        raise ConfigError(f"name a shell: {USAGE}; {choose_from(argv[0] if argv else '', SHELLS)}")
    print(script(argv[0]))
    return 0


if __name__ == "__main__":
    cli.run_command(main)
