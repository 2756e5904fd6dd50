"""Budgets: validation, parsing, and the token bucket in simulation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from asr_exit.budget import Budget, CostModel, DepthBudget
from asr_exit.errors import ConfigError

LAYERS = (2, 4, 6, 8, 10, 12)
COST = CostModel((2e8, 3.6e8, 5.2e8, 6.8e8, 8.4e8, 1e9), seconds_per_mac=1e-10)  # full depth: real-time factor 0.1
CHUNK_SECONDS = 0.64


def costs(seconds: float = CHUNK_SECONDS) -> list[float]:
    return [cost * seconds for cost in COST.macs_per_second_to_exit]


def simulate(
    bucket: DepthBudget, chunks: int, wish: Callable[[int], int] = lambda _: 5, seconds: float = CHUNK_SECONDS
) -> list[float]:
    """Run chunks whose policy wants exit `wish(chunk)`; fraction of full depth spent on each."""
    spent = []
    for chunk in range(chunks):
        macs = costs(seconds)[min(wish(chunk), bucket.ceiling(seconds, costs(seconds)))]
        bucket.spend(macs, seconds)
        spent.append(macs / costs(seconds)[-1])
    return spent


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["mean_depth", "encoder_macs_per_second", "real_time_factor"])
@pytest.mark.parametrize("value", [0, -1, -0.0, math.nan, math.inf, True, "0.5"])
def test_rates_must_be_positive_numbers(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        Budget(**{field: value})


@pytest.mark.parametrize("field", ["mean_depth", "real_time_factor"])
def test_fractions_end_at_one(field: str) -> None:
    assert getattr(Budget(**{field: 1.0}), field) == 1.0  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"at most 1, got 1\.01"):
        Budget(**{field: 1.01})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -2, 2.0, True, "4"])
def test_max_exit_layer_must_be_a_layer(value: Any) -> None:
    with pytest.raises(ConfigError, match="max_exit_layer"):
        Budget(max_exit_layer=value)


def test_only_one_rate() -> None:
    with pytest.raises(ConfigError, match="mean_depth and real_time_factor"):
        Budget(mean_depth=0.5, real_time_factor=0.1)
    assert Budget(mean_depth=0.5, max_exit_layer=4).max_exit_layer == 4


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.5", Budget(mean_depth=0.5)),
        ("mean_depth=0.5", Budget(mean_depth=0.5)),
        ("rtf=0.05", Budget(real_time_factor=0.05)),
        ("real_time_factor=0.05", Budget(real_time_factor=0.05)),
        ("macs=2e8", Budget(encoder_macs_per_second=2e8)),
        ("max_exit=6", Budget(max_exit_layer=6)),
        (" 0.5 , max_exit_layer = 6 ", Budget(mean_depth=0.5, max_exit_layer=6)),
    ],
)
def test_parse(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean_dept=0.5", "did you mean 'mean_depth'"),
        ("rft=0.1", "did you mean 'rtf'"),
        ("half", "'half' is not a number"),
        ("", "'' is not a number"),
        ("0.5,", "given twice"),
        ("rtf=0.1,real_time_factor=0.1", "given twice"),
        ("max_exit=6.5", "not a whole number"),
        ("0.5,rtf=0.1", "takes one of"),
        ("1.5", "at most 1"),
        ("nan", "mean_depth must be"),
    ],
)
def test_parse_errors_say_what_to_change(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Budget.parse(text)


@pytest.mark.parametrize("macs", [(), (0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_costs_must_rise(macs: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="rising"):
        CostModel(macs)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan])
def test_seconds_per_mac_must_be_positive(seconds: float) -> None:
    with pytest.raises(ConfigError, match="seconds_per_mac"):
        CostModel((1.0, 2.0), seconds)


def test_cost_model_from_one_chunk() -> None:
    assert CostModel.from_chunk([64.0, 128.0], 0.64, 1e-9) == CostModel((100.0, 200.0), 1e-9)


# -- bucket -----------------------------------------------------------------------------------------------------------


def test_without_a_budget_everything_is_allowed() -> None:
    bucket = DepthBudget(Budget(), COST, LAYERS)
    assert simulate(bucket, 50) == [1.0] * 50
    assert bucket.spent_fraction == pytest.approx(1.0)
    assert bucket.saved_seconds == 0
    assert not bucket.budget.has_target


@pytest.mark.parametrize("seconds", [0.16, 0.32, 0.64, 1.28])
@pytest.mark.parametrize("asked", [0.2, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_spending_converges_to_the_budget_and_never_exceeds_it(asked: float, seconds: float) -> None:
    bucket = DepthBudget(Budget(mean_depth=asked), COST, LAYERS)
    running = np.cumsum(simulate(bucket, int(120 / seconds), seconds=seconds))
    mean = running / np.arange(1, len(running) + 1)
    assert mean.max() <= asked + 1e-6
    assert mean[-1] == pytest.approx(asked, abs=0.005)
    assert bucket.spent_fraction == pytest.approx(mean[-1])


@pytest.mark.parametrize("asked", [0.3, 0.5, 0.7, 0.9])
def test_utterances_of_a_set_land_on_the_budget(asked: float) -> None:
    """Short streams, each with its own bucket."""
    rng = np.random.default_rng(0)
    spent = [simulate(DepthBudget(Budget(mean_depth=asked), COST, LAYERS), int(rng.integers(5, 25))) for _ in range(40)]
    assert np.mean(np.concatenate(spent)) == pytest.approx(asked, abs=0.03)


@pytest.mark.parametrize(
    "budget", [Budget(mean_depth=0.5), Budget(encoder_macs_per_second=5e8), Budget(real_time_factor=0.05)]
)
def test_the_three_units_mean_the_same(budget: Budget) -> None:
    assert simulate(DepthBudget(budget, COST, LAYERS), 60) == simulate(
        DepthBudget(Budget(mean_depth=0.5), COST, LAYERS), 60
    )


@pytest.mark.parametrize("asked", [0.3, 0.5, 0.7])
def test_hard_chunks_use_what_easy_ones_left_over_within_the_window(asked: float) -> None:
    bucket = DepthBudget(Budget(mean_depth=asked), COST, LAYERS)
    easy = simulate(bucket, 60, lambda _: 0)
    assert set(easy) == {0.2}
    assert bucket.saved_seconds <= 10.0 + 1e-9
    hard = simulate(bucket, 200)
    steady = int(np.argmax(np.array(hard) < 1.0))  # chunks in a row at full depth
    assert steady * CHUNK_SECONDS > 2.0
    window = int(30 / CHUNK_SECONDS)
    worst = max(np.mean((easy + hard)[at : at + window]) for at in range(len(easy + hard) - window))
    assert worst <= asked + 0.10 + 1 / window
    assert np.mean(hard[-100:]) == pytest.approx(asked, abs=0.01)


def test_savings_are_capped_however_long_the_easy_stretch() -> None:
    short, long = (DepthBudget(Budget(mean_depth=0.5), COST, LAYERS) for _ in range(2))
    simulate(short, 100, lambda _: 0)
    simulate(long, 5000, lambda _: 0)
    assert short.saved_seconds == pytest.approx(long.saved_seconds)


def test_mixed_speech_stays_on_budget() -> None:
    rng = np.random.default_rng(1)
    wishes = rng.choice(6, size=600, p=[0.5, 0.05, 0.05, 0.05, 0.05, 0.3])
    natural = np.mean([COST.macs_per_second_to_exit[w] / 1e9 for w in wishes])
    for asked in (0.3, 0.4):
        bucket = DepthBudget(Budget(mean_depth=asked), COST, LAYERS)
        spent = np.mean(simulate(bucket, 600, lambda chunk: int(wishes[chunk])))
        assert asked - 0.06 < spent <= asked + 1e-6 < natural
    loose = DepthBudget(Budget(mean_depth=0.9), COST, LAYERS)
    assert np.mean(simulate(loose, 600, lambda chunk: int(wishes[chunk]))) == pytest.approx(natural)


def test_spending_that_no_ceiling_allowed_is_paid_back() -> None:
    bucket = DepthBudget(Budget(mean_depth=0.5), COST, LAYERS)
    simulate(bucket, 20)
    bucket.spend(4 * costs()[-1], 0.0)  # draining: four chunks' worth without new audio
    assert bucket.saved_seconds < 0
    after = simulate(bucket, 200)
    assert after[:10] == [0.2] * 10
    assert bucket.spent_fraction == pytest.approx(0.5, abs=0.01)


def test_a_backlog_makes_depth_dearer() -> None:
    bucket = DepthBudget(Budget(mean_depth=0.5), COST, LAYERS)
    plain = bucket.ceiling(CHUNK_SECONDS, costs())
    backlog = [costs()[0], *(3 * cost for cost in costs()[1:])]
    assert (plain, bucket.ceiling(CHUNK_SECONDS, backlog)) == (1, 0)


def test_asking_changes_nothing() -> None:
    bucket = DepthBudget(Budget(mean_depth=0.5), COST, LAYERS)
    simulate(bucket, 7)
    assert len({bucket.ceiling(CHUNK_SECONDS, costs()) for _ in range(20)}) == 1


# -- changes ----------------------------------------------------------------------------------------------------------


def test_a_lower_budget_takes_effect_at_the_next_chunk_savings_or_not() -> None:
    bucket = DepthBudget(Budget(mean_depth=0.9), COST, LAYERS)
    simulate(bucket, 40, lambda _: 0)
    assert bucket.ceiling(CHUNK_SECONDS, costs()) == 5
    bucket.update(Budget(mean_depth=0.3))
    after = simulate(bucket, 100)
    assert after[0] <= 0.3
    assert np.mean(after) == pytest.approx(0.3, abs=0.01)


def test_a_higher_budget_takes_effect_at_the_next_chunk_debt_or_not() -> None:
    bucket = DepthBudget(Budget(mean_depth=0.3), COST, LAYERS)
    simulate(bucket, 10)
    bucket.spend(20 * costs()[-1], 0.0)
    assert bucket.ceiling(CHUNK_SECONDS, costs()) == 0
    bucket.update(Budget(mean_depth=0.9))
    assert simulate(bucket, 1)[0] > 0.8
    bucket.update(Budget())
    assert bucket.ceiling(CHUNK_SECONDS, costs()) == 5
    bucket.update(Budget(max_exit_layer=4))
    assert bucket.ceiling(CHUNK_SECONDS, costs()) == 1


def test_changing_only_the_layer_keeps_the_savings() -> None:
    bucket = DepthBudget(Budget(mean_depth=0.5), COST, LAYERS)
    simulate(bucket, 30, lambda _: 0)
    saved = bucket.saved_seconds
    bucket.update(Budget(mean_depth=0.5, max_exit_layer=8))
    assert bucket.saved_seconds == saved > 0
    assert bucket.ceiling(CHUNK_SECONDS, costs()) == 3


def test_an_impossible_change_leaves_the_old_budget_in_force() -> None:
    bucket = DepthBudget(Budget(mean_depth=0.5), COST, LAYERS)
    simulate(bucket, 5)
    for impossible in (Budget(mean_depth=0.1), Budget(mean_depth=0.9, max_exit_layer=1)):
        with pytest.raises(ConfigError, match="least possible"):
            bucket.update(impossible)
    assert bucket.budget == Budget(mean_depth=0.5)
    simulate(bucket, 200)
    assert bucket.spent_fraction == pytest.approx(0.5, abs=0.01)


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "exit_index"), [(2, 0), (3, 0), (4, 1), (5, 1), (11, 4), (12, 5), (40, 5)])
def test_max_exit_layer_rounds_down_to_an_exit_and_is_hard(layer: int, exit_index: int) -> None:
    bucket = DepthBudget(Budget(max_exit_layer=layer), COST, LAYERS)
    assert bucket.max_exit == bucket.ceiling(CHUNK_SECONDS, costs()) == exit_index
    saver = DepthBudget(Budget(mean_depth=1.0, max_exit_layer=layer), COST, LAYERS)
    simulate(saver, 50, lambda _: 0)
    assert saver.ceiling(CHUNK_SECONDS, costs()) == exit_index


def test_max_exit_layer_before_the_first_exit() -> None:
    with pytest.raises(ConfigError, match="least possible is 2"):
        DepthBudget(Budget(max_exit_layer=1), COST, LAYERS)


@pytest.mark.parametrize("field", ["mean_depth", "encoder_macs_per_second", "real_time_factor"])
@pytest.mark.parametrize("first", [1 / 3, 0.123456, 0.2, 0.98765])
def test_impossible_budgets_state_the_least_possible_value_which_is_then_accepted(field: str, first: float) -> None:
    cost = CostModel((first * 1e9, 1e9), seconds_per_mac=0.7e-9)
    with pytest.raises(ConfigError, match="less than the first exit costs") as caught:
        DepthBudget(Budget(**{field: 1e-6}), cost, (2, 4))  # type: ignore[arg-type]
    least = float(str(caught.value).rsplit(" ", 1)[1])
    accepted = DepthBudget(Budget(**{field: least}), cost, (2, 4))  # type: ignore[arg-type]
    assert accepted.ceiling(0.64, [first * 0.64e9, 0.64e9]) == 0
    with pytest.raises(ConfigError):
        DepthBudget(Budget(**{field: least * 0.99}), cost, (2, 4))  # type: ignore[arg-type]


def test_rounding_errors_do_not_cost_an_exit() -> None:
    cost = CostModel(((0.1 + 0.2) * 1e9, 1e9))  # a hair more than 0.3
    bucket = DepthBudget(Budget(mean_depth=0.3), cost, (2, 4))
    assert bucket.ceiling(0.64, [0.1, (0.1 + 0.2) * 0.64e9]) == 1


def test_real_time_factor_needs_a_measured_device() -> None:
    with pytest.raises(ConfigError, match="use mean_depth"):
        DepthBudget(Budget(real_time_factor=0.5), CostModel((1.0, 2.0)), (2, 4))


def test_counts_must_match() -> None:
    with pytest.raises(ConfigError, match="6 costs for 2 exits"):
        DepthBudget(Budget(), COST, (2, 4))
    with pytest.raises(ConfigError, match="2 costs for 6 exits"):
        DepthBudget(Budget(), COST, LAYERS).ceiling(0.64, [1.0, 2.0])
    with pytest.raises(ConfigError, match="window_seconds"):
        DepthBudget(Budget(), COST, LAYERS, window_seconds=0)
