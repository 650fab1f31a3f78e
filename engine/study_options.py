"""The command line of a study: its options, and the study that it describes, checked before any run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine import config, help_pages, plugins
from engine.config import Config, ConfigError
from engine.multi_task import open_task
from engine.state import metric_direction
from engine.study_runs import Study
from engine.study_search import check_optuna
from engine.study_variants import (
    Space,
    Variant,
    change_variants,
    corners,
    describe_ranges,
    grid_variants,
    random_trials,
    ranges,
    read_space,
    sample_variants,
)

USAGE = (
    "python -m engine.study RECIPE [--vary KEY=VALUE,...]... [--change 'NAME: KEY=VALUE ...']... [--seeds N] "
    "[--folds K] [--section.key=value ...]"
)
REPEATED = {
    "vary": "KEY=VALUE,VALUE,...: a setting and its values; given several times, all combinations are run. KEY=A..B or "
    "'KEY=A..B log': a range, in which --trials values are tried",
    "change": "'NAME: KEY=VALUE KEY=VALUE ...': settings that are changed together; the recipe is run unchanged, and "
    "with each change alone",
}
OPTIONS = {
    "seeds": "number of seeds of each variant: run.seed, run.seed + 1, ...",
    "folds": "parts of data.train, each of which is held out by one run",
    "sample": "combinations to run, chosen at random (default: all)",
    "trials": "number of trials in the ranges of --vary",
    "sampler": "random, or tpe: Optuna chooses values by the results so far",
    "prune": "true: end a trial of tpe that is worse than the median of those before, after an evaluation, or after "
    "one of its runs",
    "workers": "runs at a time; each has a GPU, or a share of the CPU",
    "folder": "for the runs and their table (default: studies/NAME of the recipe)",
    "keep_weights": "true: keep best/ and last/ of finished runs",
}
SMALLEST = {"seeds": 1, "folds": 2, "sample": 1, "trials": 1, "workers": 1}
SWITCHES = ("prune", "keep_weights")
SAMPLERS = ("random", "tpe")
Numbers = dict[str, int]


def parse(argv: Sequence[str]) -> tuple[Study, Space | None]:
    """Return the study that a command line describes, with the settings of every variant checked.

    The second value is what Optuna searches in, which then chooses the variants; None: they are known.
    Raises ConfigError, or SystemExit(0) after printing --help.
    """
    help_pages.answer(argv, USAGE, options=REPEATED | OPTIONS)
    repeated, options, rest = _take_own(list(argv))
    positional, given = config.split_arguments(rest)
    if len(positional) != 1:
        hint = " (quote a range with its log: --vary 'KEY=A..B log')" if "log" in positional else ""
        many = f", not {' and '.join(map(repr, positional))}" if positional else ""
        raise ConfigError(f"name one recipe{hint}{many}: {USAGE}")
    recipe = positional[0]
    base = config.override_recipe(config.read_recipe(recipe), given)
    plugins.load_plugins(base.run.plugins)
    numbers = {name: _read_integer(name, options[name]) for name in SMALLEST if name in options}
    sampler = options.get("sampler", "random")
    if sampler not in SAMPLERS:
        raise ConfigError(f"--sampler {sampler}: {config.choose_from(sampler, SAMPLERS)}")
    space = read_space(repeated["vary"], number_kinds())
    _check_options(options, numbers, sampler, space, bool(repeated["change"]))
    is_search = sampler == "tpe"
    variants = _known_variants(repeated["change"], space, numbers, base.run.seed) if not is_search else []
    _check_variants(base, given, variants, [*corners(space)] if ranges(space) or is_search else [])
    for variant in variants if repeated["change"] else ():
        if variant.settings and config.override(base, variant.settings) == base:
            raise ConfigError(
                f"--change {variant.labels['change']!r} changes no setting: the recipe has these values already"
            )
    _, metric = open_task(base)
    study = Study(
        recipe,
        {key: value for key, value in given.items() if key != "run.seed"},
        variants,
        [base.run.seed + i for i in range(numbers.get("seeds", 1))],
        Path(options.get("folder", f"studies/{Path(recipe).stem}")),
        metric,
        metric_direction(base.eval, metric),
        folds=numbers.get("folds", 0),
        workers=numbers.get("workers", 1),
        keep_weights=_is_true(options, "keep_weights"),
        trials=numbers.get("trials", 0),
        prunes=_is_true(options, "prune"),
        plugins=base.run.plugins,
        uses_gpus=base.run.device != "cpu",
        notes=describe_ranges(space),
    )
    if study.folds:
        folded = config.override(base, {"data.fold": f"1/{study.folds}"})
        config.check(folded)
        open_task(folded)
    return study, space if is_search else None


def number_kinds() -> dict[str, str]:
    """Return {"section.key": int or float} of the settings that are numbers."""
    kinds = {key: str(declared.type).partition(" ")[0] for key, declared in config.all_settings(Config()).items()}
    return {key: kind for key, kind in kinds.items() if kind in ("int", "float")}


def _read_integer(name: str, text: str) -> int:
    smallest = SMALLEST[name]
    if not text.isdecimal() or len(text) > 9 or int(text) < smallest:
        raise ConfigError(f"--{name} = {text!r} should be a whole number from {smallest}")
    return int(text)


def _is_true(options: dict[str, str], name: str) -> bool:
    text = options.get(name, "false").lower()
    if text not in ("true", "false"):
        raise ConfigError(f"--{name} = {text!r} should be true or false")
    return text == "true"


def _check_options(options: dict[str, str], numbers: Numbers, sampler: str, space: Space, has_changes: bool) -> None:
    """Raise ConfigError for options that do not go together."""
    if has_changes and (space or {"sample", "trials", "sampler"} & options.keys()):
        raise ConfigError("--change runs each change alone, --vary (and --sample, --trials) others: give one of them")
    if ranges(space) and "trials" not in numbers:
        raise ConfigError(f"--vary {next(iter(ranges(space)))} has a range: --trials N says how many values to try")
    if ranges(space) and "sample" in numbers:
        raise ConfigError("--sample chooses from a grid, and --vary has a range: --trials N says how many to try")
    if "trials" in numbers and not space:
        raise ConfigError("--trials needs what to vary: --vary 'optim.lr=1e-5..1e-4 log'")
    if "trials" in numbers and not ranges(space) and sampler == "random":
        raise ConfigError("--vary has no range: --sample N runs some combinations of a grid, without --trials")
    if sampler == "tpe":
        if "trials" not in numbers:
            raise ConfigError("--sampler tpe needs --trials N, the number of trials")
        check_optuna()
    elif "prune" in options:
        raise ConfigError("--prune is for --sampler tpe")


def _known_variants(changes: Sequence[str], space: Space, numbers: Numbers, seed: int) -> list[Variant]:
    if changes:
        return change_variants(changes)
    if ranges(space):
        return random_trials(space, numbers["trials"], seed)
    return sample_variants(grid_variants(space), numbers.get("sample", 0), seed)


def _check_variants(base: Config, given: dict[str, str], variants: list[Variant], more: list[dict[str, str]]) -> None:
    """Raise ConfigError for a setting that a study sets itself, and for one that a run would refuse.

    more: settings of variants that are not known yet.
    """
    all_settings = more + [variant.settings for variant in variants]
    for key in ("run.folder", "run.seed", "run.resume", "run.dry_run", "run.show_all", "data.fold"):
        if any(key in settings for settings in all_settings) or (key != "run.seed" and key in given):
            raise ConfigError(f"{key} is set by the study itself; use its options --folder, --seeds and --folds")
    for settings in all_settings:  # before any of them is run
        config.check(config.override(base, settings))


def _take_own(argv: list[str]) -> tuple[dict[str, list[str]], dict[str, str], list[str]]:
    """Split off a study's own options; return ({option: values} of REPEATED, {option: value}, the other arguments)."""
    repeated: dict[str, list[str]] = {name: [] for name in REPEATED}
    options: dict[str, str] = {}
    rest: list[str] = []
    while argv:
        argument = argv.pop(0)
        name, equals, text = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not argument.startswith("--") or name not in REPEATED | OPTIONS:
            rest.append(argument)
            continue
        if not equals and name in SWITCHES:
            text = argv.pop(0) if argv and argv[0].lower() in ("true", "false") else "true"
        elif not equals and (name in REPEATED or (argv and not argv[0].startswith("--"))):
            text = argv.pop(0) if argv else ""
        elif not equals:
            raise ConfigError(f"--{name} needs a value: --{name}=VALUE")
        if name in REPEATED:
            repeated[name].append(text)
        else:
            options[name] = text
    return repeated, options, rest
