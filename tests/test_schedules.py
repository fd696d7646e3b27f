"""Every schedule: numbers of the papers to 1e-6, exact ends, one message for a bad option."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from crnet import schedules
from crnet.schedules import Steps

PUBLISHED_ENDS = {"loro-cosine"}
"""They begin above 0, or end above the floor, or come to the peak late."""
each_schedule = pytest.mark.parametrize(
    "name", [name for name in schedules.names() if name not in PUBLISHED_ENDS]
)


def options_of(name: str, **changed: Any) -> Any:
    made = schedules.get(name).Options
    return made(**changed) if made else None


def factors(name: str, steps: Steps, at: list[int], **changed: Any) -> list[float]:
    schedule, options = schedules.get(name), options_of(name, **changed)
    assert schedule.problems(options, steps) == []
    return [schedule.factor(step, options, steps) for step in at]


def last_of(name: str, floor: float) -> float:
    """The last step's factor."""
    return floor if schedules.get(name).falls else 1.0


@each_schedule
@pytest.mark.parametrize("total", [40, 300, 10_000])
def test_warms_up_stays_in_range_and_ends_at_the_floor(name: str, total: int):
    """Exact at the ends; in (0, 1], but for the one step of a restart."""
    steps = Steps(total, 0.1, 0.1)
    found = factors(name, steps, list(range(1, total + 1)))
    assert found[0] == pytest.approx(1 / steps.warmup, rel=1e-12)
    assert found[int(steps.warmup) - 1] == max(found) == 1
    assert found[-1] == pytest.approx(last_of(name, 0.1), rel=1e-12)
    assert sum(factor <= 0 for factor in found) <= 3
    assert min(found) >= 0


FRACTIONS = (0.0, 0.01, 0.05, 0.1, 0.15, 0.25, 1 / 3, 0.5, 0.77, 0.8)


@each_schedule
@pytest.mark.parametrize("total", range(1, 51))
def test_some_step_has_the_peak_rate_and_the_last_the_least(name: str, total: int):
    """Exact, for warm-ups of whole steps and of none; a run of one step has the peak rate."""
    schedule = schedules.get(name)
    for fraction in FRACTIONS:
        for floor in (0.0, 0.1, 1.0):
            steps = Steps(total, fraction, floor)
            if schedule.problems(options_of(name), steps):
                # It says so where a share is no choice of its own: warm-up within a cycle.
                assert fraction > 0.2, (total, fraction)
                continue
            found = [schedule.factor(i, options_of(name), steps) for i in range(1, total + 1)]
            assert all(0 <= factor <= 1 for factor in found), (fraction, floor, found)
            assert found[steps.warmup - 1] == 1, (fraction, floor, found)
            rise = found[: steps.warmup]
            assert rise == sorted(rise), (fraction, floor, found)
            assert abs(steps.warmup - fraction * total) <= 0.5 or steps.warmup == 1
            if total > steps.warmup:
                last = last_of(name, floor)
                assert found[-1] == pytest.approx(last, abs=1e-15), (fraction, floor, found)


def test_a_warmup_is_rounded_to_whole_steps():
    """Of 25 steps a tenth is 2.5: with 2.5 the third step would be past the peak already."""
    assert factors("cosine", Steps(25, 0.1, 0.1), [1, 2, 3]) == pytest.approx([1 / 3, 2 / 3, 1])
    assert factors("cosine", Steps(24, 0.1, 0.1), [1, 2]) == [0.5, 1]


@each_schedule
def test_no_warmup(name: str):
    found = factors(name, Steps(20, 0.0, 0.0), [1, 20])
    assert 0.9 < found[0] <= 1
    assert found[1] == pytest.approx(last_of(name, 0.0), abs=1e-12)


@pytest.mark.parametrize(
    ("step", "factor"),
    [(500, 0.5), (1000, 1), (3250, 0.868198), (5500, 0.55), (7750, 0.231802), (9999, 0.1)],
)
def test_cosine_of_the_common_protocol(step: int, factor: float):
    assert factors("cosine", Steps(10_000, 0.1, 0.1), [step]) == [pytest.approx(factor, abs=1e-6)]


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (250, 0.5),
        (500, 1),
        (4999, 0.886878),
        (5000, 0),
        (5050, 0.440989),
        (5099, 0.873159),
        (5100, 0.881979),
        (10_099, 0.555265),
        (15_050, 0.116543),
        (20_000, 0.1),
    ],
)
def test_jagged_cosine_of_relora(step: int, factor: float):
    steps = Steps(20_000, 500 / 20_000, 0.1)
    options = {"restart_every": 5000, "rewarmup_steps": 100}
    assert factors("jagged-cosine", steps, [step], **options) == [pytest.approx(factor, abs=1e-6)]
    assert factors("jagged-cosine", steps, [step]) == [pytest.approx(factor, abs=1e-6)]


def test_jagged_cosine_is_the_cosine_between_restarts():
    steps = Steps(1000, 0.1, 0.1)
    at = [*range(1, 250), *range(300, 500), 1000]
    assert factors("jagged-cosine", steps, at, rewarmup_steps=50) == factors("cosine", steps, at)


def test_linear_and_constant():
    """Eighths of the fall, exact; and none."""
    steps, at = Steps(1000, 0.2, 0.5), [100, 200, 300, 600, 900, 1000]
    assert factors("linear", steps, at) == [0.5, 1, 0.9375, 0.75, 0.5625, 0.5]
    assert factors("constant", steps, at) == [0.5, 1, 1, 1, 1, 1]


@each_schedule
@pytest.mark.parametrize("total", [2, 7, 40, 300])
def test_up_to_the_last_stable_step_more_steps_change_nothing(name: str, total: int):
    """Bit: a run of three times the steps, with a warm-up of as many. One step later it does."""
    schedule, options = schedules.get(name), options_of(name)
    steps = Steps(total, 0.25, 0.1)
    more = Steps(3 * total, steps.warmup / (3 * total), 0.1)
    stable = schedule.last_stable(options, steps)
    assert (stable is not None) == (name == "wsd")
    if stable is not None:
        assert more.warmup == steps.warmup <= stable < total
        for step in range(1, stable + 1):
            assert schedule.factor(step, options, steps) == schedule.factor(step, options, more)
        assert schedule.factor(stable + 1, options, steps) < 1


@pytest.mark.parametrize(
    ("done", "factor"),
    [
        (0, 0.1),
        (250, 0.317462),
        (499, 0.534053),
        (500, 1e-6),
        (501, 0.106985),
        (505, 0.539272),
        (999, 0.968976),
        (1000, 0.972862),
        (1499, 0.993136),
        (1500, 1e-6),
        (1501, 0.198633),
        (2005, 0.999999),
        (5505, 0.703171),
        (9999, 0.127192),
    ],
)
def test_loro_cosine_of_its_60m_run(done: int, factor: float):
    """``done`` updates: the step after them."""
    steps = Steps(10_000, 0.1, 0.1)
    assert factors("loro-cosine", steps, [done + 1]) == [pytest.approx(factor, abs=1e-6)]


def test_loro_cosine_restarts_at_every_multiple_but_where_it_begins():
    """Behind each exact step the rate is nearly 0, and the lag may be given."""
    steps = Steps(10_000, 0.2, 0.1)
    least = [step for step in range(1, 10_001) if factors("loro-cosine", steps, [step])[0] < 2e-6]
    assert least == [done + 1 for done in range(500, 10_000, 500)]
    assert max(factors("loro-cosine", steps, [*range(1, 10_001)])) == pytest.approx(1, abs=1e-5)
    short = factors("loro-cosine", Steps(40, 0.1, 0.1), [*range(1, 41)])
    assert short[0] == 0.1
    assert max(short) == short[4] == 1
    options = {"restart_every": 200, "lag_steps": 2000}
    least = [
        step
        for step in range(1, 10_001)
        if factors("loro-cosine", steps, [step], **options)[0] < 2e-6
    ]
    assert least == [done + 1 for done in range(200, 10_000, 200) if done != 2000]


@pytest.mark.parametrize(
    ("shape", "middle"), [("linear", 0.1 + 0.9 * 0.5), ("sqrt", 0.1 + 0.9 * (1 - 0.5**0.5))]
)
def test_wsd(shape: str, middle: float):
    steps = Steps(1000, 0.1, 0.1)
    found = factors("wsd", steps, [50, 100, 101, 800, 900, 1000], shape=shape)
    assert found == pytest.approx([0.5, 1, 1, 1, middle, 0.1], abs=1e-12)


@pytest.mark.parametrize(
    ("name", "changed", "warmup_frac", "word"),
    [
        ("wsd", {"decay_frac": 0.0}, 0.1, "decay-frac"),
        ("wsd", {"decay_frac": 1.5}, 0.1, "decay-frac"),
        ("wsd", {"decay_frac": 0.95}, 0.1, "whole run"),
        ("loro-cosine", {"restart_every": 1}, 0.1, "take 2 or more"),
        ("loro-cosine", {"rewarmup_steps": 0}, 0.1, "take 1 or more"),
        ("loro-cosine", {"rewarmup_steps": 500}, 0.1, "fewer than the 500 steps"),
        ("loro-cosine", {"lag_steps": 750}, 0.1, "no multiple of restart-every 500"),
        ("loro-cosine", {"restart_every": 100, "lag_steps": 900}, 0.1, "take fewer"),
        ("jagged-cosine", {"restart_every": 300}, 0.1, "does not divide --train.steps 1000"),
        ("jagged-cosine", {"restart_every": 0}, 0.1, "take 2 or more"),
        ("jagged-cosine", {"restart_every": 1}, 0.1, "take 2 or more"),
        ("jagged-cosine", {"rewarmup_steps": 0}, 0.1, "take 1 or more"),
        ("jagged-cosine", {"restart_every": 100, "rewarmup_steps": 100}, 0.1, "take fewer"),
        ("jagged-cosine", {"restart_every": 100}, 0.2, "warm-up"),
    ],
)
def test_bad_options_are_named(name, changed, warmup_frac, word):
    steps = Steps(1000, warmup_frac, 0.1)
    problems = schedules.get(name).problems(options_of(name, **changed), steps)
    assert len(problems) == 1
    assert word in problems[0]
    assert problems[0].startswith(f"--optimizer.{name}.")


@each_schedule
def test_options_are_flags_with_help(name: str):
    made = schedules.get(name).Options
    if made is not None:
        assert made.__doc__
        assert dataclasses.is_dataclass(made)
        assert made() == made()
