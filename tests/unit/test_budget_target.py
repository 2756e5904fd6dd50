"""Budgets as targets: a policy that can be steered lands on what was asked, over sets, windows and changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from asr_exit.budget import Budget, CostModel, DepthBudget
from asr_exit.errors import ConfigError
from asr_exit.policy import CostTable, Evidence, Posterior

LAYERS = (2, 4, 6, 8, 10, 12)
FRACTIONS = (0.2, 0.36, 0.52, 0.68, 0.84, 1.0)
COST = CostModel(tuple(1e9 * share for share in FRACTIONS))
CHUNK_SECONDS = 0.64
CHUNK_COSTS = [0.64e9 * share for share in FRACTIONS]


def draw(rng: np.random.Generator, chunks: int, hardness: float = 0.0) -> list[np.ndarray]:
    """Confidence of every exit for every chunk: depth helps, some chunks are hard, and so are stretches of them."""
    swell = 0.2 * np.sin(np.arange(chunks) / 15 + rng.uniform(0, 6))
    base = rng.beta(3, 2, chunks) + swell - hardness
    return [np.clip(base + 0.08 * k, 0.0, 1.0) for k in range(6)]


def exits_of(confidence: list[np.ndarray], threshold: float) -> np.ndarray:
    stops = np.array(confidence[:-1]) >= threshold
    return np.where(stops.any(axis=0), stops.argmax(axis=0), 5)


@pytest.fixture(scope="module")
def policy() -> Posterior:
    """Calibrated on the same kind of chunks, as `asr-exit calibrate` would."""
    confidence = draw(np.random.default_rng(99), 20_000)
    grid = np.linspace(0.0, 1.0, 25)
    rows = {float(np.take(FRACTIONS, exits_of(confidence, t)).mean()): (float(t),) * 5 for t in grid}
    rows[1.0] = (None,) * 5  # type: ignore[assignment]
    table = CostTable.parse([{"macs_fraction": c, "thresholds": rows[c]} for c in rows])
    return Posterior(table.at(0.6), table)


def stream(
    policy: Posterior, bucket: DepthBudget, confidence: list[np.ndarray], start: int = 0, end: int | None = None
) -> list[float]:
    """As the engine goes about it; share of full depth spent on each chunk."""
    spent = []
    for chunk in range(start, len(confidence[0]) if end is None else end):
        setpoint = bucket.setpoint
        now = policy if setpoint is None else policy.at(setpoint)
        cap, floor = bucket.ceiling(CHUNK_SECONDS, CHUNK_COSTS), bucket.floor(CHUNK_SECONDS, CHUNK_COSTS)
        exit_index = 0
        while exit_index < cap:
            value = float(confidence[exit_index][chunk])
            if exit_index >= floor and now.stop(exit_index, Evidence(value, value, 1 - value, 1 - value, 0.3)):
                break
            exit_index += 1
        bucket.spend(CHUNK_COSTS[exit_index], CHUNK_SECONDS)
        spent.append(FRACTIONS[exit_index])
    return spent


def bucket(asked: float, **more: Any) -> DepthBudget:
    return DepthBudget(Budget(mean_depth=asked, **more), COST, LAYERS, target=True)


@pytest.mark.parametrize("hardness", [-0.15, 0.0, 0.15])
@pytest.mark.parametrize("asked", [0.3, 0.5, 0.7, 0.9])
def test_a_set_of_short_streams_lands_on_the_budget(policy: Posterior, asked: float, hardness: float) -> None:
    """Also on audio that is easier or harder than what the policy was calibrated on."""
    rng = np.random.default_rng(0)
    spent = [stream(policy, bucket(asked), draw(rng, int(rng.integers(5, 25)), hardness)) for _ in range(150)]
    assert np.mean(np.concatenate(spent)) == pytest.approx(asked, abs=0.03 if hardness == 0 else 0.08)


@pytest.mark.parametrize("hardness", [-0.3, 0.0, 0.3])
@pytest.mark.parametrize("asked", [0.3, 0.5, 0.7, 0.9])
def test_every_30_seconds_of_a_long_stream_stay_within_a_tenth(
    policy: Posterior, asked: float, hardness: float
) -> None:
    spent = np.array(stream(policy, bucket(asked), draw(np.random.default_rng(1), 800, hardness)))
    count = round(30 / CHUNK_SECONDS)
    windows = np.convolve(spent, np.ones(count) / count, "valid")
    assert np.abs(windows - asked).max() <= 0.10
    assert spent.mean() == pytest.approx(asked, abs=0.01)


def test_hard_chunks_borrow_before_they_have_saved(policy: Posterior) -> None:
    hard = [np.zeros(4)] * 6
    assert stream(policy, bucket(0.4), hard)[0] == 1.0
    capped = DepthBudget(Budget(mean_depth=0.4), COST, LAYERS)
    assert stream(policy, capped, hard)[0] == 0.36  # a cap lends nothing


def test_a_change_takes_effect_at_the_next_chunk(policy: Posterior) -> None:
    confidence = draw(np.random.default_rng(2), 400)
    own = bucket(0.9)
    before = stream(policy, own, confidence, 0, 200)
    own.update(Budget(mean_depth=0.3))
    assert policy.at(own.setpoint or 0).threshold == policy.at(0.3).threshold
    after = stream(policy, own, confidence, 200)
    assert np.mean(before) == pytest.approx(0.9, abs=0.02)
    assert np.mean(after) == pytest.approx(0.3, abs=0.02)


def test_without_a_target_the_policy_does_as_it_likes() -> None:
    for own in (DepthBudget(Budget(mean_depth=0.5), COST, LAYERS), DepthBudget(Budget(), COST, LAYERS, target=True)):
        assert own.setpoint is None
        assert own.floor(CHUNK_SECONDS, CHUNK_COSTS) == 0


def test_the_peak_is_hard_whatever_was_saved(policy: Posterior) -> None:
    own = bucket(0.9, peak_depth=0.6)
    assert max(stream(policy, own, [np.zeros(100)] * 6)) == 0.52
    alone = DepthBudget(Budget(peak_depth=0.36), COST, LAYERS)
    assert alone.ceiling(CHUNK_SECONDS, CHUNK_COSTS) == 1
    layer = bucket(0.9, max_exit_layer=6)
    assert max(stream(policy, layer, [np.zeros(100)] * 6)) == 0.52
    assert layer.floor(CHUNK_SECONDS, CHUNK_COSTS) <= layer.max_exit == 2


def test_limits_that_cannot_be_met() -> None:
    with pytest.raises(ConfigError, match=r"peak_depth=0.1 .* least possible is 0.2"):
        DepthBudget(Budget(peak_depth=0.1), COST, LAYERS)
    with pytest.raises(ConfigError, match="min_exit_layer=8 is deeper than max_exit_layer=4"):
        Budget(min_exit_layer=8, max_exit_layer=4)
    with pytest.raises(ConfigError, match="peak_depth"):
        Budget(peak_depth=1.5)
    assert Budget.parse("0.5,min_exit=4,peak=0.8") == Budget(0.5, min_exit_layer=4, peak_depth=0.8)


def test_the_guaranteed_minimum_as_an_exit() -> None:
    for layer, exit_index in ((None, 0), (1, 0), (4, 1), (5, 1), (12, 5)):
        assert DepthBudget(Budget(min_exit_layer=layer), COST, LAYERS).min_exit == exit_index


def test_a_table_is_interpolated_and_ends_at_its_ends() -> None:
    table = CostTable((0.2, 0.6, 1.0), ((0.0, 0.5), (0.4, 0.9), (None, None)))
    assert table.at(0.1) == table.at(0.2) == (0.0, 0.5)
    assert table.at(0.4) == pytest.approx((0.2, 0.7))
    assert table.at(0.79) == (0.4, 0.9)
    assert table.at(0.81) == table.at(1.0) == table.at(2.0) == (None, None)
    shuffled = CostTable.parse(
        [{"macs_fraction": 0.6, "thresholds": [0.4]}, {"macs_fraction": 0.2, "thresholds": [0.1]}]
    )
    assert shuffled.macs_fractions == (0.2, 0.6)
    for broken in (
        [],
        [{}],
        [{"macs_fraction": "x", "thresholds": [1]}],
        [{"macs_fraction": 0.1, "thresholds": ["x"]}],
    ):
        with pytest.raises(ConfigError, match="calibrate"):
            CostTable.parse(broken)  # type: ignore[arg-type]


def test_policies_without_a_table_ignore_the_wanted_cost() -> None:
    plain = Posterior(0.7)
    assert plain.at(0.2) is plain
    assert not plain.adjustable
    assert dataclasses.replace(plain, table=CostTable((0.5,), ((0.5,),))).adjustable
