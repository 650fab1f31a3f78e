"""The benchmarks run, and say what they measured; how fast anything is, no test asserts."""

from __future__ import annotations

import pytest
from conftest import run_module


@pytest.mark.oracle
def test_loading_measures_both_sides():
    pytest.importorskip("transformers")
    done = run_module("benchmarks.loading", "--shapes", "tiny,tiny-lm", "--runs", "1")
    assert done.returncode == 0, done.stderr
    for expected in ("torch alone", "transformers / models, seconds", "transformers / models, peak memory"):
        assert done.stdout.count(expected) == 2


def test_an_unknown_shape_is_named():
    done = run_module("benchmarks.loading", "--shapes", "bert-huge")
    assert done.returncode == 2
    assert "'bert-huge' is not one of bert-base" in done.stderr
