"""Solving thresholds: the record against the engine, the solver by hand, and what ends up in the model."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import soundfile

from asr_exit.calibration.calibrate import calibrate, table, trained
from asr_exit.calibration.compare import COMPARED_COSTS, best_measured, unseen_wer
from asr_exit.calibration.gates import train_gates, train_hazards
from asr_exit.calibration.observe import Observations, observe
from asr_exit.calibration.replay import Joined, Mixed, outcome, replay
from asr_exit.calibration.solve import Row, choose, descend, exits_of, solve, static_thresholds, thinned
from asr_exit.calibration.workers import Recording, Workers
from asr_exit.checkpoint import Model
from asr_exit.errors import ConfigError
from asr_exit.policy import (
    CRITERIA,
    Entropy,
    Evidence,
    Fixed,
    Full,
    JointGate,
    Patience,
    Posterior,
    RandomDepth,
    Scheduled,
    parse_policy,
)
from asr_exit.stream import Fill, StreamOptions
from tests.conftest import babble

OPTIONS = StreamOptions(fill=Fill.PROPAGATE)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[Recording]:
    folder = tmp_path_factory.mktemp("set")
    items = []
    for index, seconds in enumerate((3.1, 4.4, 0.008, 2.0, 11.0)):
        path = folder / f"{index}.wav"
        soundfile.write(path, babble(seconds, seed=index), 16_000)
        items.append(Recording(path, "the quick brown fox"))
    return items


@pytest.fixture(scope="module")
def workers(model: Model) -> Workers:
    return Workers(model)


@pytest.fixture(scope="module")
def observations(workers: Workers, recordings: list[Recording]) -> Observations:
    return observe(workers, recordings, 640)


def test_recordings_without_a_frame_are_left_out(observations: Observations, recordings: list[Recording]) -> None:
    assert observations.recordings == (*recordings[:2], *recordings[3:])
    assert observations.only([1]).recordings == (recordings[1],)
    assert observations.only([0, 2]).macs.shape[1] == 5 + 4


def test_the_record_equals_the_engine_at_full_depth(
    model: Model, observations: Observations, recordings: list[Recording]
) -> None:
    deepest = np.full(observations.macs.shape[1], 5)
    found = outcome(replay(model, recordings, OPTIONS))
    assert observations.wer(deepest) == pytest.approx(found.wer)
    assert observations.macs_fraction(deepest) == found.macs_fraction == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_simulated_cost_with_filling_equals_the_engine(
    model: Model, observations: Observations, recordings: list[Recording], seed: int
) -> None:
    """Depths in runs longer than the left context, so that some chunks are filled late and some never."""
    rng = np.random.default_rng(seed)
    schedules = [
        tuple(int(k) for k in np.repeat(rng.integers(0, 6, 20), rng.integers(1, 12, 20))[: len(item.frames)])
        for item in observations.items
    ]
    options = [dataclasses.replace(OPTIONS, policy=_Scheduled(schedule)) for schedule in schedules]
    found = replay(model, observations.recordings, options)
    assert [tuple(item.exits) for item in found] == schedules
    assert outcome(found).macs_fraction == pytest.approx(observations.macs_fraction(np.concatenate(schedules)))


class _Scheduled(Scheduled):
    """A schedule whose exits are all read, as those of a criterion are."""

    needs_evidence = True  # type: ignore[assignment]


def test_evidence_of_the_record_equals_the_engine(
    model: Model, observations: Observations, recordings: list[Recording]
) -> None:
    seen: dict[int, list[Evidence]] = {}

    class Spy(Full):
        needs_evidence = True  # type: ignore[assignment]

        def stop(self, exit_index: int, evidence: Evidence | None) -> bool:
            assert evidence is not None
            seen.setdefault(exit_index, []).append(evidence)
            return False

    replay(model, [recordings[1]], dataclasses.replace(OPTIONS, policy=Spy()))
    for exit_index, expected in enumerate(observations.items[1].evidence[:-1]):
        for ours, theirs in zip(seen[exit_index], expected, strict=True):
            assert ours.max_posterior == pytest.approx(theirs.max_posterior, abs=1e-4)
            assert ours.entropy_all == pytest.approx(theirs.entropy_all, abs=1e-4)
            assert ours.similarity == pytest.approx(theirs.similarity, abs=1e-4)
            assert ours.agreement == theirs.agreement
            assert (ours.previous is None) == (exit_index == 0)


def test_descend_finds_the_best_thresholds_by_hand() -> None:
    confidence = np.array([[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.9, 0.8], [0.0, 0.0, 0.0, 0.0]])
    loss = np.array([[0.0, 0.0, 5.0, 5.0], [1.0, 1.0, 1.0, 5.0], [2.0, 2.0, 2.0, 2.0]])
    thresholds = descend(confidence, loss, (np.inf, np.inf))
    assert exits_of(confidence, thresholds).tolist() == [0, 0, 1, 2]
    assert 0.7 < thresholds[0] < 0.8 < thresholds[1] < 0.9
    assert descend(confidence, loss + np.array([[9], [9], [0]]), (np.inf, np.inf)) == (np.inf, np.inf)
    assert descend(confidence, loss * 0 + np.array([[0], [1], [2]]), (np.inf, np.inf))[0] == -np.inf


def test_unknown_confidence_never_leaves() -> None:
    confidence = np.array([[-np.inf, 0.5], [0.0, 0.0]])
    thresholds = descend(confidence, np.array([[0.0, 0.0], [1.0, 1.0]]), (np.inf,))
    assert exits_of(np.nan_to_num(confidence, neginf=-np.inf), (max(thresholds[0], -1e9),)).tolist() == [1, 0]


def test_static_exits_are_in_every_table_where_they_are_good(
    model: Model, observations: Observations, recordings: list[Recording]
) -> None:
    for k, layer in enumerate(model.config.exit_layers):
        found = outcome(replay(model, observations.recordings, dataclasses.replace(OPTIONS, policy=Fixed(layer))))
        assert observations.static_wer(k) == pytest.approx(found.wer)
    best = min(observations.static_wer(k) for k in range(5))
    assert min(row.wer for row in table(trained("similarity", observations), observations)) <= best
    assert Row(0.3, 0.5, static_thresholds(1, 6)).is_static
    assert (
        exits_of(observations.confidence(Posterior(0.0)), static_thresholds(3, 6)).tolist()
        == [3] * observations.macs.shape[1]
    )
    assert not Row(0.3, 0.5, (0.5, np.inf)).is_static


def test_dearer_compute_means_shallower_exits(observations: Observations) -> None:
    rows = table(trained("posterior", observations), observations)
    costs = [row.macs_fraction for row in rows]
    assert costs == sorted(costs)
    assert len(rows) >= 2
    assert costs[-1] == 1.0
    assert rows[0].thresholds[0] == -np.inf
    solved = solve(
        observations.confidence(Posterior(0.0)), observations.harm, observations.edits, observations.macs * 1e-9
    )
    assert solved[-1] == (np.inf,) * 5


def test_thinning_keeps_both_ends_and_the_front() -> None:
    values = [(0.2, 0.7), (0.3, 0.6), (0.302, 0.59), (0.5, 0.65), (0.7, 0.4), (0.8, 0.45), (0.995, 0.5), (1.0, 0.5)]
    assert [row.macs_fraction for row in thinned([Row(*pair, ()) for pair in values])] == [0.2, 0.3, 0.7, 0.8, 1.0]


def test_choice_of_a_row() -> None:
    rows = [Row(0.4, 0.30, (0.5,)), Row(0.7, 0.204, (0.8,)), Row(0.9, 0.201, (0.9,)), Row(1.0, 0.2, (np.inf,))]
    assert choose(rows, 0.2, None, 0.02) == rows[1]
    assert choose(rows, 0.2, 0.45, 0.02) == rows[0]
    assert choose(rows, 0.1, None, 0.02) == rows[3]


def test_stored_thresholds_are_those_of_the_policy() -> None:
    row = Row(0.51239, 0.2, (-0.25, np.inf, -np.inf))
    assert row.stored(Entropy) == {"macs_fraction": 0.5124, "wer": 0.2, "thresholds": [0.25, None, 1.0]}
    assert Row(0.5, 0.2, (0.25, -np.inf)).native(Posterior) == [0.25, 0.0]
    assert Row(0.5, 0.2, (1.5, -np.inf)).native(Patience) == [1.5, 0.0]


def _evidence(doubt: float) -> Evidence:
    return Evidence(1 - doubt, 1 - doubt, doubt, doubt, 0.5, 0.0, 0.9, 1 - doubt)


def test_gates_learn_what_predicts_harm() -> None:
    rng = np.random.default_rng(0)
    doubts = rng.uniform(0.01, 0.6, (3, 1500))
    harm = (rng.uniform(size=doubts.shape) < doubts).astype(int)
    harm[-1] = 0
    evidence = [[_evidence(float(d)) for d in row] for row in doubts]
    gates, hazards = train_gates(evidence, harm), train_hazards(evidence, harm)
    assert len(gates.rows) == len(hazards.rows) == 2
    for k in range(2):
        assert gates.probability(k, _evidence(0.05)) < 0.15
        assert gates.probability(k, _evidence(0.5)) == pytest.approx(0.5, abs=0.15)
        assert hazards.probability(k, _evidence(0.05)) > 0.85
    rare = train_gates(evidence, np.zeros_like(harm))  # nothing to learn from: a constant
    assert rare.probability(0, _evidence(0.5)) == rare.probability(0, _evidence(0.01)) < 0.01


def test_a_calibrated_model_follows_a_wanted_cost(workers: Workers, recordings: list[Recording]) -> None:
    stages: list[str] = []
    saved: list[dict[str, Any]] = []
    labels = ["posterior", "entropy", "similarity", "gate", "q-exit"]  # one of each kind; the rest in the next test
    found = calibrate(
        workers,
        recordings[:4],
        name="babble",
        chunks_ms=(640, 320),
        criteria=labels,
        target=0.6,
        on_stage=stages.append,
        on_length=saved.append,
    )
    found = json.loads(json.dumps(found))
    assert found["data"] == "babble, 4 utterances, 0.00 h"
    assert found["default"] in labels
    assert sum("wer_measured" in row for row in found.values() if isinstance(row, dict)) == 3
    assert "wer_measured" in found[found["default"]]
    assert all(0 < found[label]["wer_unseen"] < 2 for label in labels)
    assert list(found["by_chunk_ms"]) == ["320"]
    assert [list(part.get("by_chunk_ms", ())) for part in saved] == [[], ["320"]]
    assert any("observing" in stage for stage in stages)
    layers = workers.model.config.exit_layers
    for chunk_ms, some in ((640, labels), (320, ["entropy", "gate"])):
        for label in some:
            policy = parse_policy(label, exit_layers=layers, calibration=found, chunk_ms=chunk_ms)
            assert policy.adjustable
            settings = [dataclasses.replace(OPTIONS, policy=policy.at(at)) for at in (0.0, 1.0)]
            costs = [outcome(replay(workers.model, recordings[:1], setting)).macs_fraction for setting in settings]
            assert costs[0] < 0.4
            assert costs[1] == 1.0


def test_lengths_not_asked_for_stay(model: Model, recordings: list[Recording]) -> None:
    stored = {"chunk_ms": 640.0, "default": "entropy", "entropy": {"thresholds": [0.1] * 5}}
    workers = Workers(dataclasses.replace(model, calibration={**stored, "by_chunk_ms": {"1280": {"chunk_ms": 1280.0}}}))
    found = calibrate(workers, recordings[3:4], name="babble", chunks_ms=(320,), criteria=["posterior"], target=0.6)
    lengths = found.pop("by_chunk_ms")
    assert found == stored
    assert list(lengths) == ["320", "1280"]
    assert lengths["320"]["default"] == "posterior"
    assert lengths["1280"] == {"chunk_ms": 1280.0}


def test_the_other_criteria_follow_it_too(workers: Workers, recordings: list[Recording]) -> None:
    labels = ["posterior-all", "sentence", "entropy-all", "patience"]
    assert {*labels, "posterior", "entropy", "similarity", "gate", "q-exit"} == {*CRITERIA} - {JointGate.label}
    few = [recordings[0], recordings[3]]
    found = calibrate(workers, few, name="babble", chunks_ms=(640,), criteria=labels, target=0.6)
    assert found["default"] in labels
    assert "by_chunk_ms" not in found
    for label in labels:
        policy = parse_policy(label, exit_layers=workers.model.config.exit_layers, calibration=found, chunk_ms=640)
        settings = [dataclasses.replace(OPTIONS, policy=policy.at(at)) for at in (0.0, 1.0)]
        costs = [outcome(replay(workers.model, few[1:], setting)).macs_fraction for setting in settings]
        assert costs[0] < 0.4
        assert costs[1] == 1.0


def test_criteria_are_compared_on_recordings_that_they_have_not_seen(observations: Observations) -> None:
    taught: list[set[Recording]] = []

    def solved(seen: Observations) -> tuple[Posterior, list[Row]]:
        taught.append(set(seen.recordings))
        policy = Posterior((None,) * (len(seen.macs) - 1))
        exits = len(seen.macs)
        rows = [Row(0.0, 0.0, static_thresholds(0, exits)), Row(1.0, 0.0, static_thresholds(exits - 1, exits))]
        return policy, rows  # what they promise, no errors, must not count

    found = unseen_wer(observations, solved)
    everything = set(observations.recordings)
    assert [len(everything - seen) for seen in taught] == [1] * len(everything)
    assert set.union(*(everything - seen for seen in taught)) == everything
    share = float(np.mean(COMPARED_COSTS))  # of the way from the first exit to the last
    at_first = observations.wer(np.zeros(observations.macs.shape[1], int))
    assert found == pytest.approx((1 - share) * at_first + share * observations.full_wer)


def test_one_recording_alone_is_judged_by_itself(observations: Observations) -> None:
    alone = observations.only([0])
    rows = [Row(0.5, 0.0, static_thresholds(1, len(alone.macs)))]
    wer = unseen_wer(alone, lambda seen: (Posterior((None,) * (len(seen.macs) - 1)), rows))
    assert wer == pytest.approx(alone.wer(np.ones(alone.macs.shape[1], int)))


def test_the_default_is_the_cheapest_that_keeps_the_limit_in_the_engine() -> None:
    def row(cost: float, wer: float) -> dict[str, float]:
        return {"macs_fraction": 0.1, "wer": 0.1, "macs_fraction_measured": cost, "wer_measured": wer}

    measured = {"gate": row(0.6, 0.50), "entropy": row(0.4, 0.51), "posterior": row(0.3, 0.52)}
    result = {"chunk_ms": 640.0, **measured, "patience": {"macs_fraction": 0.1, "wer": 0.1}}  # never measured
    assert best_measured(result, limit=0.515, target=None) == "entropy"
    assert best_measured(result, limit=0.49, target=None) == "gate"  # none keeps it
    assert best_measured(result, limit=0.53, target=0.5) == "gate"  # of equal cost


def test_nonsense_is_refused(workers: Workers, recordings: list[Recording]) -> None:
    with pytest.raises(ConfigError, match="criteria are posterior"):
        calibrate(workers, recordings, name="x", criteria=["posteriour"])
    with pytest.raises(ConfigError, match="target"):
        calibrate(workers, recordings, name="x", target=1.5)
    with pytest.raises(ConfigError, match="shorter than a frame"):
        observe(workers, [recordings[2]], 640)
    with pytest.raises(ConfigError, match="processes"):
        Workers(workers.model, 0)


def test_noise_has_the_level_asked_for(recordings: list[Recording]) -> None:
    speech = Joined((recordings[0],)).samples()
    mixed = Mixed(recordings[0], recordings[1], 10.0, start=500).samples()
    scale = float(speech @ mixed / (speech @ speech))  # as a whole turned down, where it would clip
    noise = mixed / min(1.0, scale) - speech if scale < 0.99 else mixed - speech
    assert 10 * np.log10(np.mean(speech**2) / np.mean(noise**2)) == pytest.approx(10.0, abs=0.7)
    assert np.abs(mixed).max() <= 1.0


def test_several_processes_equal_one(model: Model, recordings: list[Recording]) -> None:
    each = [dataclasses.replace(OPTIONS, policy=RandomDepth(3)) for _ in recordings]
    alone = replay(model, recordings, each)
    with Workers(model, 2) as pool:
        shared = pool.map(replay, recordings, dataclasses.replace(OPTIONS, policy=RandomDepth(3)))
    assert [(item.text, item.macs, item.exits) for item in shared] == [(i.text, i.macs, i.exits) for i in alone]
    fixed = replay(model, recordings, dataclasses.replace(OPTIONS, policy=Fixed(2)))
    assert outcome(fixed).mean_exit == 0
