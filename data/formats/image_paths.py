"""The column of images in a list: paths in several spellings, the bytes of a file, or both in one value."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from data.errors import ErrorList
from data.formats.folders import list_names
from data.formats.image_kinds import SUFFIXES
from data.formats.memory import is_in_memory
from data.row import Row

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:(//|[a-z]+/[a-z0-9.+-]+[;,])", re.IGNORECASE)  # a URL, or data:image/png;...


def find_images(name: str, folder: Path, rows: Sequence[Row], column: str, errors: ErrorList) -> dict[int, str]:
    """Replace the value of each row's image by a Path or the bytes of its file; return {line: the path as given}.

    A value is a path relative to `folder`, the content of a file (binary), or {"bytes", "path"} with one of them, as
    Hugging Face's datasets store images. Rows in memory may have images too, which are left as they are. A path is also
    found if it differs from the name of its file in backslashes, in white space at its ends or in its Unicode form, or
    if it lacks the ending of the only image of that name; notes count these. Other values are added to `errors`.
    """
    given: dict[int, str] = {}
    respelled, ended = [], []
    endings = Endings()
    for row in rows:
        value = row.values[column]
        if isinstance(value, dict) and value.keys() & {"bytes", "path"}:
            value = value.get("bytes") or value.get("path") or ""
        row.values[column] = value
        if isinstance(value, Path):
            value = str(value)
        if not isinstance(value, str) and (isinstance(value, bytes) or is_in_memory(name)):
            continue
        if not isinstance(value, str):
            errors.add(name, row.line, f"{column!r} should be the path of an image, not {value!r:.80}")
        elif not value.strip():
            errors.add(name, row.line, f"{column!r} is empty", is_empty=True)
        elif ADDRESS.match(value):
            errors.add(name, row.line, f"{value:.80}: an address, not the path of a file; download the images first")
        else:
            given[row.line] = value
            path = _find_file(folder, value) or endings.find(folder / value)
            row.values[column] = path or folder / value
            if path is None:
                errors.add(name, row.line, f"{value}: no such file{_hint_at_place(folder, value)}")
            elif path.stem == Path(value).name:
                ended.append(value)
            elif path != folder / value:
                respelled.append(value)
    if ended:
        paths = "1 path has" if len(ended) == 1 else f"{len(ended):,} paths have"
        errors.notes.append(f"{paths} no ending; the only image of that name is read: {list_names(ended)}")
    if respelled:
        paths = "1 path differs" if len(respelled) == 1 else f"{len(respelled):,} paths differ"
        errors.notes.append(
            f"{paths} from the file's name in backslashes, white space or Unicode form: {list_names(respelled)}"
        )
    return given


class Endings:
    """The images of folders, by their names without endings; each folder is listed once."""

    def __init__(self) -> None:
        self.folders: dict[Path, dict[str, list[Path]]] = {}

    def find(self, path: Path) -> Path | None:
        """Return the only image whose name is that of `path` with an ending; None where there is none, or several."""
        if path.suffix.lower() in SUFFIXES or not path.parent.is_dir():
            return None
        if path.parent not in self.folders:
            named = self.folders.setdefault(path.parent, {})
            for file in path.parent.iterdir():
                if file.suffix.lower() in SUFFIXES:
                    named.setdefault(file.stem, []).append(file)
        found = self.folders[path.parent].get(path.name, [])
        return found[0] if len(found) == 1 else None


def _find_file(folder: Path, text: str) -> Path | None:
    """Return the path of a file or folder in the first spelling that exists; None if there is none."""
    plain = text.strip()
    slashes = plain.replace("\\", "/")
    forms = [unicodedata.normalize(form, slashes) for form in ("NFC", "NFD")]
    return next(
        (folder / spelling for spelling in (text, plain, slashes, *forms) if (folder / spelling).exists()), None
    )


def _hint_at_place(folder: Path, text: str) -> str:
    """Return what may be wrong with a path that does not exist."""
    if re.match(r"[A-Za-z]:[\\/]", text):
        return "; it is a path of another computer"
    if Path(text).exists():
        return f"; paths are relative to the list's folder, {folder}, and it is relative to the current one"
    return ""
