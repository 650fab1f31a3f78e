"""Upload a checkpoint to the hub, through huggingface_hub, which comes with the tokenizers package."""

from __future__ import annotations

import re
from pathlib import Path

from engine.config import ConfigError
from engine.errors import TrainingError
from engine.manifest import OBJECTIVE, OPTIMIZER
from engine.model_card import CARD

# Of no use to those who load the model: the state of the training.
LEFT_OUT = (OPTIMIZER, OBJECTIVE)
REPOSITORY = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)  # as the hub allows
TOKEN_HINT = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def files_to_upload(folder: Path) -> list[Path]:
    """Return the files of a checkpoint that are uploaded, the card first."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in LEFT_OUT]
    return sorted(files, key=lambda path: path.name != CARD)


def upload(folder: Path, repo: str, private: bool, dry_run: bool) -> None:
    """Create the repository where there is none, and upload the files; in a dry run only list them.

    Raises ConfigError for a name that the hub does not allow, and TrainingError with one sentence where it refuses.
    """
    if not REPOSITORY.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith((".git", ".ipynb")):
        raise ConfigError(
            f"--repo {repo!r} should be USER/NAME, of letters, digits, '-', '_' and '.', and without '--' and '..'"
        )
    files = files_to_upload(folder)
    total = sum(path.stat().st_size for path in files)
    kind = "private" if private else "public"
    print(f"{folder} -> https://huggingface.co/{repo} ({kind}): {len(files)} files, {total:,} bytes")
    for path in files:
        print(f"  {path.stat().st_size:>14,}  {path.relative_to(folder)}")
    print("recipe.toml and state.json have the settings of the run, such as the names of its files", flush=True)
    card = folder / CARD
    if not card.is_file():
        print(f"there is no {CARD}: the card is written at the end of a training", flush=True)
    if dry_run:
        print(f"\n{card.read_text(encoding='utf-8')}" if card.is_file() else "", end="")
        print("dry run: nothing was sent", flush=True)
        return
    _send(folder, repo, private, [str(path.relative_to(folder)) for path in files])
    print(f"uploaded: https://huggingface.co/{repo}", flush=True)


def _send(folder: Path, repo: str, private: bool, names: list[str]) -> None:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise TrainingError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it, or try --dry-run")
    api = HfApi()
    try:
        api.whoami()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=names)
    except Exception as error:  # huggingface_hub and the libraries below it raise errors of many kinds
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if status in (401, 403) or "Token" in type(error).__name__:
            raise TrainingError(f"the hub does not let this user write {repo}: {TOKEN_HINT} ({reason})") from None
        if status is None:
            raise TrainingError(f"the hub cannot be reached, so nothing was uploaded ({reason})") from None
        raise TrainingError(f"the hub has refused {repo} with status {status}: {reason}") from None
