"""The state of a run: its best evaluation, its patience, and its counts of steps."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from data.writing import to_json
from engine.config import ConfigError, EvalSettings
from engine.state import TrainState, metric_direction
from engine.tasks import TASKS


@pytest.mark.parametrize(
    ("mode", "min_delta", "values", "best"),
    [
        ("max", 0.0, [0.5, 0.6, 0.6, 0.55, 0.7], [True, True, False, False, True]),
        ("min", 0.0, [0.5, 0.6, 0.5, 0.4, 0.45], [True, False, False, True, False]),
        ("max", 0.25, [0.5, 0.625, 0.75, 0.875, 1.5], [True, False, False, True, True]),  # a gain of min_delta is none
        ("min", 0.25, [1.5, 1.375, 1.25, 1.125], [True, False, False, True]),
        ("max", 10.0, [-3.0, 5.0, 7.5], [True, False, True]),  # the first is best whatever min_delta
    ],
)
def test_record_knows_the_best_evaluation(mode, min_delta, values, best):
    state, bad = TrainState(), 0
    for step, (value, is_best) in enumerate(zip(values, best, strict=True), 1):
        state.step = step
        before = (state.best, state.best_step)
        assert state.record(value, 1.0, mode, min_delta) is is_best, (step, value)
        bad = 0 if is_best else bad + 1
        assert (state.best, state.best_step) == ((value, step) if is_best else before)
        assert state.bad_evaluations == bad


@pytest.mark.parametrize("mode", ["max", "min"])
def test_p05_nan_is_never_better_than_a_number(mode):
    state = TrainState()
    assert not state.record(math.nan, math.nan, mode, 0.0)
    assert (state.best, state.best_step, state.bad_evaluations) == (None, 0, 1)
    assert state.record(0.5, 2.0, mode, 0.0)  # a NaN before it does not stand in the way
    assert not state.record(math.nan, 1.0, mode, 0.0)
    assert (state.best, state.bad_evaluations) == (0.5, 1)
    assert state.record(0.75 if mode == "max" else 0.25, 3.0, mode, 0.0)


@pytest.mark.parametrize("value", [0.0, 0.5, math.nan])
def test_equal_values_go_to_the_lower_loss(value):
    """And patience does not count them, so that a metric that cannot move ends a run as before."""
    state, best = TrainState(), []
    for step, loss in enumerate([4.0, 3.0, 3.5, math.nan, 2.0], 1):
        state.step = step
        best.append(state.record(value, loss, "max", 0.0))
    assert best == [True, True, False, False, True]
    assert (state.best_step, state.best_loss) == (5, 2.0)
    assert state.bad_evaluations == (5 if math.isnan(value) else 4)


def test_state_of_an_older_checkpoint_keeps_its_best():
    """Its loss is not known, so an equal value is not better."""
    state = TrainState(step=5, best=0.5, best_step=3)
    assert not state.record(0.5, 0.0, "max", 0.0)


@pytest.mark.parametrize(("patience", "bad", "out"), [(0, 50, False), (3, 2, False), (3, 3, True), (3, 4, True)])
def test_out_of_patience(patience, bad, out):
    reason = TrainState(step=7, bad_evaluations=bad).reason_to_stop(8, EvalSettings(patience=patience), "max")
    assert reason == ("out of patience" if out else "")
    assert (
        TrainState(step=8, evaluated_step=8).reason_to_stop(8, EvalSettings(patience=patience), "max")
        == "all steps done"
    )


@pytest.mark.parametrize(
    ("mode", "value", "stops"),
    [("min", 2.5, True), ("min", 1.5, False), ("max", 1.5, True), ("max", 2.5, False), ("max", math.nan, True)],
)
def test_divergence_is_a_value_worse_than_the_limit_or_nan(mode, value, stops):
    state = TrainState(step=3)
    assert state.reason_to_stop(8, EvalSettings(stop_if_worse_than=2.0), mode) == ""  # before any evaluation
    state.record(value, 1.0, mode, 0.0)
    reason = state.reason_to_stop(8, EvalSettings(stop_if_worse_than=2.0), mode)
    assert (reason == f"diverged: {value:.4g} in the last evaluation, eval.stop_if_worse_than = 2") is stops
    assert state.reason_to_stop(8, EvalSettings(), mode) == ""


def test_advance_counts_steps_taken_apart_from_data_seen():
    state = TrainState()
    for stepped in (True, False, False, True, False):
        state.advance(stepped, 8)
    assert (state.step, state.position, state.samples, state.skipped_in_a_row) == (2, 5, 40, 1)


@pytest.mark.parametrize(
    ("mode", "metric", "expected"),
    [("auto", "loss", "min"), ("auto", "f1", "max"), ("auto", "accuracy", "max"), ("max", "loss", "max")],
)
def test_direction_of_a_metric(mode, metric, expected):
    assert metric_direction(EvalSettings(mode=mode), metric) == expected


def test_direction_is_known_of_every_metric_that_has_one():
    """The best length_ratio is 1, and candidates are a number of texts: neither direction is right."""
    names = {name for task in TASKS.values() for name in task.metrics} - {"length_ratio", "candidates"}
    assert {metric_direction(EvalSettings(), name) for name in names} == {"min", "max"}
    with pytest.raises(ConfigError, match=r"auto does not know whether a higher or a lower my_error is better"):
        metric_direction(EvalSettings(), "my_error")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.5])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_state_read_from_json_decides_as_before(value, mode):
    """JSON has null for what is not finite: the run stops, improves and compares as without the interruption."""
    settings = EvalSettings(stop_if_worse_than=0.5 if mode == "max" else 0.6)
    through, resumed = TrainState(), TrainState.from_saved(json.loads(to_json(asdict(TrainState()))))
    for metric, loss in [(value, value), (0.5, value), (value, 2.0), (0.5, 1.0), (value, math.nan)]:
        outcomes = []
        for state in (through, resumed):
            state.step += 1
            is_best = state.record(metric, loss, mode, 0.0)
            outcomes.append((is_best, bool(state.reason_to_stop(100, settings, mode)), state.best, state.best_step))
        assert outcomes[0] == outcomes[1]
        resumed = TrainState.from_saved(json.loads(to_json(asdict(resumed))))
    assert through.best == 0.5
    assert through.bad_evaluations == resumed.bad_evaluations
