"""Laws of trainer.learning_rate_at: a pure function of the step that warms up, peaks, falls and ends at the minimum."""

import math
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scripts.config import TrainingConfig
from scripts.trainer import learning_rate_at


@st.composite
def configs(draw, schedule: str | None = None) -> TrainingConfig:
    """Schedules with at least two steps after the warm-up, so that there is a way from the peak to the end."""
    num_steps = draw(st.integers(2, 400))
    warmup_steps = draw(st.integers(0, num_steps - 2))
    schedule = schedule or draw(st.sampled_from(["cosine", "linear", "wsd"]))
    decay_steps = draw(st.integers(1, num_steps - warmup_steps)) if schedule == "wsd" else None
    learning_rate = draw(st.floats(1e-8, 10.0))
    min_learning_rate = learning_rate * draw(st.sampled_from([0.0, 0.1, 1.0]) | st.floats(0.0, 1.0))
    return TrainingConfig(
        num_steps=num_steps, warmup_steps=warmup_steps, schedule=schedule, decay_steps=decay_steps, learning_rate=learning_rate,
        min_learning_rate=min_learning_rate,
    )  # fmt: skip


def rates(config: TrainingConfig) -> list[float]:
    return [learning_rate_at(step, config) for step in range(config.num_steps)]


@given(config=configs())
def test_rate_is_above_zero_at_the_first_step_and_never_outside_its_bounds(config):
    series = rates(config)
    assert series[0] > 0
    assert all(0 <= rate <= config.learning_rate * (1 + 1e-12) for rate in series)
    assert all(rate >= config.min_learning_rate * (1 - 1e-12) for rate in series[config.warmup_steps :])


@given(config=configs())
def test_warmup_is_linear_and_ends_at_the_peak(config):
    warmup = rates(config)[: config.warmup_steps]
    for step, rate in enumerate(warmup):
        assert math.isclose(rate, config.learning_rate * (step + 1) / config.warmup_steps, rel_tol=1e-12)
    assert not warmup or math.isclose(warmup[-1], config.learning_rate, rel_tol=1e-12)


@given(config=configs())
@example(config=TrainingConfig(num_steps=2, warmup_steps=0))
def test_peak_is_the_learning_rate_and_the_last_step_has_the_least(config):
    series = rates(config)
    never_stable = config.decay_steps == config.num_steps
    assert never_stable or math.isclose(max(series), config.learning_rate, rel_tol=1e-12)
    assert math.isclose(series[-1], config.min_learning_rate, rel_tol=1e-9, abs_tol=1e-12 * config.learning_rate)


@given(config=configs())
def test_rate_never_rises_after_the_warmup(config):
    after = rates(config)[max(0, config.warmup_steps - 1) :]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in zip(after, after[1:], strict=False))


@given(config=configs("wsd"))
def test_wsd_is_flat_until_the_decay_begins_and_then_falls_by_equal_amounts(config):
    series, decay_starts = rates(config), config.num_steps - (config.decay_steps or 0)
    assert set(series[config.warmup_steps : decay_starts]) <= {config.learning_rate, series[config.warmup_steps]}
    fall = (config.learning_rate - config.min_learning_rate) / (config.decay_steps or 1)
    for number, rate in enumerate(series[decay_starts:], 1):
        assert math.isclose(rate, config.learning_rate - number * fall, rel_tol=1e-9, abs_tol=1e-9 * config.learning_rate)


@given(config=configs("linear"))
@example(config=TrainingConfig(schedule="linear", num_steps=2, warmup_steps=0))
def test_linear_falls_by_equal_amounts_from_the_peak_to_the_least_at_the_last_step(config):
    after = rates(config)[config.warmup_steps :]
    fall = (config.learning_rate - config.min_learning_rate) / (len(after) - 1)
    for number, rate in enumerate(after):
        assert math.isclose(rate, config.learning_rate - number * fall, rel_tol=1e-9, abs_tol=1e-9 * config.learning_rate)


@given(config=configs())
def test_every_schedule_reaches_a_floor_of_exactly_zero(config):
    series = rates(replace(config, min_learning_rate=0.0))
    assert series[-1] == 0.0 and all(rate > 0.0 for rate in series[:-1])


@given(config=configs("cosine"))
def test_cosine_is_symmetric_about_its_middle(config):
    after = rates(config)[config.warmup_steps :]
    middle = (config.learning_rate + config.min_learning_rate) / 2
    for early, late in zip(after, after[::-1], strict=True):
        assert math.isclose((early + late) / 2, middle, rel_tol=1e-9)


def test_cosine_is_a_cosine_and_no_line():
    config = TrainingConfig(num_steps=101, warmup_steps=0, learning_rate=1.0, min_learning_rate=0.0)
    assert learning_rate_at(25, config) == pytest.approx(0.5 + math.sqrt(0.125))
