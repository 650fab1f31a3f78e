"""CONTRIBUTING.md, CHANGELOG.md and CITATION.cff: commands and messages are right, one version.

test_pages.py checks that what they name exists.
"""

from __future__ import annotations

import re
import tomllib

import pytest
from support.pages import ROOT, read_page

from data import DataError, read_rows

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONTRIBUTING, CHANGELOG, CITATION = map(read_page, ("CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"))
COMMANDS = [
    part.strip()
    for block in re.findall(r"^```bash\n(.*?)^```", CONTRIBUTING, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    for part in line.split(" #")[0].split("&&")
]


def test_citation_has_what_the_format_asks_for():
    """The keys that version 1.2.0 requires, and the version and license of the package."""
    pairs = re.findall(r"^([a-z-]+): *(.*)$", CITATION, flags=re.MULTILINE)
    values = dict(pairs)
    assert len(values) == len(pairs)
    assert {"cff-version", "message", "title", "authors"} <= values.keys()
    assert (values["cff-version"], values["type"]) == ("1.2.0", "software")
    assert (values["title"], values["version"]) == (PROJECT["name"], PROJECT["version"])
    assert (values["license"], values["abstract"].rstrip(".")) == (PROJECT["license"], PROJECT["description"])


def test_citation_is_yaml_with_authors():
    tree = pytest.importorskip("yaml").safe_load(CITATION)
    assert tree["version"] == PROJECT["version"]
    assert all(isinstance(value, str) for key, value in tree.items() if key not in ("authors", "keywords"))
    assert [set(author) for author in tree["authors"]] == [{"name"}]


def test_changelog_has_the_version_and_the_usual_headings():
    versions = re.findall(r"^## \[(.+)\] - (Unreleased|\d{4}-\d\d-\d\d)$", CHANGELOG, flags=re.MULTILINE)
    assert versions[0][0] == PROJECT["version"]
    assert len(versions) == len(re.findall(r"^## ", CHANGELOG, flags=re.MULTILINE))
    kinds = re.findall(r"^### (.+)$", CHANGELOG, flags=re.MULTILINE)
    assert kinds
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_tables_that_a_new_row_goes_into_are_where_it_is_said():
    for name, file in re.findall(r"`([A-Z]+)` in `([\w/.]+)`", CONTRIBUTING):
        assert re.search(rf"^{name}\b.* = \{{$", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE), name


def test_commands_of_contributing_are_those_of_ci():
    """They are run by CI, by the tests of benchmarks.before_after, and below."""
    assert COMMANDS
    script = ROOT / ".ci" / "run"
    if not script.is_file():
        pytest.skip("not in a checkout")
    of_ci = script.read_text(encoding="utf-8")
    for command in COMMANDS:
        if not command.startswith(("pytest tests/", "python -m benchmarks.before_after main")):
            assert command in of_ci, command


def test_the_message_that_contributing_shows_is_what_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text("text,label\ngood,a\nbad, very bad,b\nfine,a\n")
    with pytest.raises(DataError) as caught:
        read_rows("mine.csv", ["text", "label"])
    assert re.findall(r"^mine\.csv:3: .*$", CONTRIBUTING, flags=re.MULTILINE) == [str(caught.value)]
