"""Criteria beyond posterior and entropy, random depth with a mean, schedules, and how calibration is read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from asr_exit.errors import ConfigError
from asr_exit.policies.learned import FEATURES
from asr_exit.policy import (
    CRITERIA,
    Entropy,
    EntropyAll,
    Evidence,
    ExitPolicy,
    ExitWeights,
    Full,
    Gate,
    Patience,
    Posterior,
    PosteriorAll,
    QExit,
    RandomDepth,
    Scheduled,
    Sentence,
    Similarity,
    calibration_for,
    default_criterion,
    parse_policy,
)

LAYERS = (2, 4, 6, 8, 10, 12)


def evidence(previous: Evidence | None = None, **values: float) -> Evidence:
    base: dict[str, Any] = dict.fromkeys(("max_posterior", "max_posterior_all", "entropy", "entropy_all"), 0.5)
    base |= {"blank_mass": 0.5, "similarity": 0.5, "lowest_posterior": 0.5}
    return Evidence(**(base | values), previous=previous)


def weights(*rows: dict[str, float]) -> ExitWeights:
    return ExitWeights(tuple(tuple(row.get(name, 0.0) for name in (*FEATURES, "bias")) for row in rows))


@pytest.mark.parametrize(
    ("policy", "field", "sure", "unsure"),
    [
        (PosteriorAll(0.8), "max_posterior_all", 0.8, 0.79),
        (EntropyAll(0.2), "entropy_all", 0.2, 0.21),
        (Similarity(0.9), "similarity", 0.95, 0.85),
        (Sentence(0.7), "beam_share", 0.75, 0.65),
    ],
)
def test_each_criterion_looks_at_its_own_evidence(policy: ExitPolicy, field: str, sure: float, unsure: float) -> None:
    assert policy.stop(0, evidence(**{field: sure}))
    assert not policy.stop(0, evidence(**{field: unsure}))
    assert not policy.stop(0, evidence(**{field: math.nan}))
    assert not policy.stop(0, None)


def test_only_the_sentence_criterion_asks_for_beams_and_few_for_similarity() -> None:
    never = {label: kind(kind.largest) for label, kind in CRITERIA.items()}
    assert [label for label, policy in never.items() if policy.beams] == ["sentence"]
    assert [label for label, policy in never.items() if policy.needs_similarity] == [
        "similarity",
        "gate",
        "joint-gate",
        "q-exit",
    ]
    assert not Full().needs_similarity


def test_patience_counts_agreeing_exits_in_a_row() -> None:
    first = evidence()
    second = evidence(first, agreement=1.0)
    third = evidence(second, agreement=1.0)
    fourth = evidence(third, agreement=0.0)
    fifth = evidence(fourth, agreement=1.0)
    stops = [Patience(2.0).stop(k, e) for k, e in enumerate((first, second, third, fourth, fifth))]
    assert stops == [False, False, True, False, False]
    assert Patience(0.0).stop(0, first)
    assert Patience(1.0).stop(1, evidence(agreement=1.0))  # a runtime that keeps no history


def test_the_gate_weighs_features() -> None:
    gate = Gate(0.3, weights=weights({"doubt": 1.0, "bias": 0.0}, {"blank_mass": -4.0, "bias": 1.0}))
    assert gate.measure(0, evidence(max_posterior=0.9)) == pytest.approx(1 / (1 + 10))  # the odds are the doubt
    assert gate.stop(0, evidence(max_posterior=0.9))
    assert not gate.stop(0, evidence(max_posterior=0.2))
    assert gate.measure(1, evidence(blank_mass=1.0)) == pytest.approx(1 / (1 + math.exp(3)))
    assert math.isnan(gate.measure(2, evidence()))  # the last exit has no weights
    assert not gate.stop(2, evidence())
    assert not gate.stop(0, evidence(lowest_posterior=math.nan))


def test_q_exit_adds_up_exit_probabilities() -> None:
    even = weights(*({"bias": 0.0},) * 5)
    first = evidence()
    second = evidence(first)
    third = evidence(second)
    measured = [QExit(0.5, weights=even).measure(k, e) for k, e in enumerate((first, second, third))]
    assert measured == pytest.approx([0.5, 0.75, 0.875])
    assert [QExit(0.8, weights=even).stop(k, e) for k, e in enumerate((first, second, third))] == [False, False, True]


def test_weights_must_fit() -> None:
    with pytest.raises(ConfigError, match="calibrate the model again"):
        ExitWeights(((1.0, 2.0),))
    stored = {"thresholds": [0.1] * 5, "weights": [[0.0] * (len(FEATURES) + 1)] * 5, "features": list(FEATURES)}
    policy = parse_policy("gate", exit_layers=LAYERS, calibration={"gate": stored})
    assert isinstance(policy, Gate)
    assert policy.stop(0, evidence()) is False  # 0.5 is above 0.1
    with pytest.raises(ConfigError, match="no learned weights for 'gate'"):
        parse_policy("gate:0.3", exit_layers=LAYERS)
    with pytest.raises(ConfigError, match="no learned weights"):
        parse_policy("gate", exit_layers=LAYERS, calibration={"gate": stored | {"features": ["other"]}})


@pytest.mark.parametrize("mean", [0.0, 0.2, 0.5, 0.85, 1.0])
def test_random_depth_with_a_mean(mean: float) -> None:
    policy = RandomDepth(3, mean)
    depths = np.array([policy.max_exit(6, chunk) for chunk in range(4000)])
    assert depths.mean() / 5 == pytest.approx(mean, abs=0.03)
    assert depths.min() >= 0
    assert depths.max() <= 5
    assert parse_policy(policy.name, exit_layers=LAYERS) == policy


@pytest.mark.parametrize("spec", ["random:3/x", "random:/0.5", "random:3/1.5", "random:3/nan"])
def test_bad_random_means(spec: str) -> None:
    with pytest.raises(ConfigError, match="random"):
        parse_policy(spec, exit_layers=LAYERS)


def test_a_schedule_is_followed_and_then_full() -> None:
    policy = Scheduled((0, 3, 9))
    assert [policy.max_exit(6, chunk) for chunk in range(4)] == [0, 3, 5, 5]
    assert not policy.needs_evidence


def test_per_exit_patience_from_text() -> None:
    assert parse_policy("patience:1/1/2/2/-", exit_layers=LAYERS) == Patience((1.0, 1.0, 2.0, 2.0, None))
    with pytest.raises(ConfigError, match="from 0 to 64"):
        parse_policy("patience:65", exit_layers=LAYERS)


CALIBRATION: dict[str, Any] = {
    "chunk_ms": 640.0,
    "default": "entropy",
    "entropy": {
        "thresholds": [0.1] * 5,
        "table": [
            {"macs_fraction": 0.3, "thresholds": [0.9] * 5},
            {"macs_fraction": 1.0, "thresholds": [None] * 5},
        ],
    },
    "by_chunk_ms": {"160": {"chunk_ms": 160.0, "default": "posterior", "posterior": {"thresholds": [0.8] * 5}}},
}


@pytest.mark.parametrize(
    ("chunk_ms", "expected"),
    [
        (None, Entropy((0.1,) * 5)),
        (640, Entropy((0.1,) * 5)),
        (1280, Entropy((0.1,) * 5)),
        (160, Posterior((0.8,) * 5)),
    ],
)
def test_auto_is_what_calibration_found_best_for_the_chunk_length(chunk_ms: float | None, expected: ExitPolicy) -> None:
    assert parse_policy("auto", exit_layers=LAYERS, calibration=CALIBRATION, chunk_ms=chunk_ms) == expected


def test_the_nearest_chunk_length_is_taken() -> None:
    assert calibration_for(CALIBRATION, 300)["chunk_ms"] == 160
    assert calibration_for(CALIBRATION, 400)["chunk_ms"] == 640
    assert default_criterion(CALIBRATION) == "entropy"
    assert default_criterion({"default": "gate"}) is None
    assert default_criterion({}) is None


def test_a_policy_with_a_table_follows_a_wanted_cost() -> None:
    policy = parse_policy("entropy", exit_layers=LAYERS, calibration=CALIBRATION)
    assert policy.adjustable
    assert policy.name == "entropy"
    assert policy.at(0.3) == Entropy((0.9,) * 5)
    assert policy.at(1.0) == Entropy((None,) * 5)
    assert policy.at(0.3).at(1.0) == Entropy((None,) * 5)
    assert not parse_policy("entropy:0.2", exit_layers=LAYERS, calibration=CALIBRATION).adjustable
    short = CALIBRATION["entropy"] | {"table": [{"macs_fraction": 0.3, "thresholds": [0.9] * 2}]}
    with pytest.raises(ConfigError, match="has 2 thresholds"):
        parse_policy("entropy", exit_layers=LAYERS, calibration={"entropy": short})


def test_an_exit_that_lets_every_chunk_go_is_the_deepest_that_chunks_take() -> None:
    assert Posterior((0.9, 0.0, 0.5)).max_exit(4) == 1
    assert Entropy((None, 1.0, None)).max_exit(4) == 1
    assert QExit((0.9, None, 0.0), weights=ExitWeights(())).max_exit(4) == 2
    assert Posterior((0.9, None, None)).max_exit(4) == 3
    assert Entropy((0.0, 0.0, 0.0)).max_exit(4) == 3  # an entropy of 0 is certainty, not "always"
    assert Posterior((0.9, 0.0, 0.5)).deepest(4) == 3  # a budget may move the thresholds
