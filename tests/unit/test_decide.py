"""Evidence and decisions of a whole batch are those of every stream alone."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from asr_exit.evidence import ExitScores, collapse, score
from asr_exit.policies.learned import FEATURES
from asr_exit.policy import Criterion, Evidence, ExitPolicy, ExitWeights, Full, Gate, Posterior, QExit, stops

EXITS = 5


def log(value: float) -> float:
    return math.log(max(value, 1e-5)) if not math.isnan(value) else math.nan


def probability(row: tuple[float, ...], evidence: Evidence) -> float:
    """One chunk's regression, feature by feature."""
    before = evidence.previous or evidence
    doubts = [evidence.max_posterior, evidence.max_posterior_all, evidence.lowest_posterior]
    doubts_before = [before.max_posterior, before.max_posterior_all, before.lowest_posterior]
    values = [log(1 - p) for p in doubts] + [log(evidence.entropy), log(evidence.entropy_all)]
    values += [evidence.blank_mass, evidence.agreement, log(1 - evidence.similarity)]
    values += [log(1 - p) for p in doubts_before] + [before.agreement]
    total = row[-1] + sum(weight * value for weight, value in zip(row, values, strict=False))
    return 1 / (1 + math.exp(-min(max(total, -60), 60))) if not math.isnan(total) else math.nan


def one_by_one(policy: ExitPolicy, exit_index: int, evidence: Evidence) -> bool:
    """The learned criteria's definitions, for one stream."""
    if isinstance(policy, Gate):
        value = probability(policy.weights.rows[exit_index], evidence)
    elif isinstance(policy, QExit):
        going_on, at, index = 1.0, evidence, exit_index
        while True:
            going_on *= 1 - probability(policy.weights.rows[index], at)
            if at.previous is None or index == 0:
                break
            at, index = at.previous, index - 1
        value = 1 - going_on
    else:
        return policy.stop(exit_index, evidence)
    threshold = policy.threshold_at(exit_index)
    if threshold is None:
        return False
    return value <= threshold if policy.low_is_sure else value >= threshold


class Stubborn(QExit):
    """A subclass with a rule of its own."""

    def stop(self, exit_index: int, evidence: Evidence | None) -> bool:
        return False


def random_weights(rng: np.random.Generator) -> ExitWeights:
    return ExitWeights(tuple(tuple(row) for row in rng.normal(0, 0.3, (EXITS, len(FEATURES) + 1)).tolist()))


def random_chain(rng: np.random.Generator, exits: int) -> Evidence:
    """Evidence of one exit and of up to so many exits before it; some of it unknown, some extreme."""
    evidence = None
    for _ in range(rng.integers(1, exits + 2)):  # at times longer than the exits, which is more than is looked at
        values = rng.choice([0.0, 1.0, 0.5, -1.0], 9, p=[0.05, 0.05, 0.05, 0.85])
        values = np.where(values < 0, rng.random(9), values)
        values[5] = rng.integers(0, 2)
        values[6] = math.nan if rng.random() < 0.02 else values[6]
        evidence = Evidence(*values.tolist(), previous=evidence)
    assert evidence is not None
    return evidence


def test_a_batch_is_decided_as_every_stream_alone() -> None:
    rng = np.random.default_rng(0)
    shared, own = random_weights(rng), random_weights(rng)
    left = stayed = 0
    for _ in range(200):
        exit_index = int(rng.integers(0, EXITS))
        policies: list[ExitPolicy] = []
        for _ in range(int(rng.integers(1, 17))):
            thresholds = tuple(None if rng.random() < 0.1 else float(rng.random()) for _ in range(EXITS))
            weights = shared if rng.random() < 0.8 else own
            choices = [QExit(thresholds, weights=weights), Gate(thresholds, weights=weights), Posterior(thresholds)]
            policies.append(choices[rng.integers(0, 3)])
        evidence = [random_chain(rng, exit_index + 1) for _ in policies]
        expected = [one_by_one(policy, exit_index, item) for policy, item in zip(policies, evidence, strict=True)]
        assert stops(exit_index, policies, evidence) == expected
        assert [p.stop(exit_index, e) for p, e in zip(policies, evidence, strict=True)] == expected
        left, stayed = left + sum(expected), stayed + len(expected) - sum(expected)
    assert min(left, stayed) > 300  # both answers were tried


def test_values_do_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(1)
    evidence = [random_chain(rng, 4) for _ in range(64)]
    for kind in (Gate, QExit):
        policy = kind(0.5, weights=random_weights(rng))
        np.testing.assert_array_equal(policy.measures(3, evidence), [policy.measure(3, item) for item in evidence])


def test_what_an_exit_remembers_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    weights, others = random_weights(rng), random_weights(rng)
    previous: list[Evidence | None] = [None] * 8
    for exit_index in range(EXITS):
        rows = rng.random((8, 8))
        evidence = [Evidence.of_row(row, item) for row, item in zip(rows, previous, strict=True)]
        expected = [one_by_one(QExit(0.8, weights=weights), exit_index, item) for item in evidence]
        fresh = [copy.deepcopy(item) for item in evidence]
        for chain in fresh:
            at: Evidence | None = chain
            while at is not None:
                at.memo = None, -1, 0.0
                at = at.previous
        mixed = QExit(0.8, weights=others).measures(exit_index, evidence[:3])
        assert mixed == QExit(0.8, weights=others).measures(exit_index, fresh[:3])
        policy = QExit(0.8, weights=weights)
        assert policy.measures(exit_index, evidence) == policy.measures(exit_index, fresh)
        assert stops(exit_index, [policy] * 8, evidence) == expected
        previous = list(evidence)


def test_missing_evidence_and_policies_with_a_rule_of_their_own() -> None:
    weights = ExitWeights(((0.0,) * len(FEATURES) + (9.0,),) * EXITS)
    sure = Evidence(0.9, 0.9, 0.1, 0.1, 0.5, similarity=0.9, lowest_posterior=0.9)
    policies: list[ExitPolicy] = [QExit(0.5, weights=weights), Stubborn(0.5, weights=weights), Full()]
    assert stops(0, [*policies, policies[0]], [sure, sure, None, None]) == [True, False, False, False]
    assert stops(0, [], []) == []


@pytest.mark.parametrize("frames", [1, 7, 8])
def test_evidence_is_that_of_every_stream_alone(frames: int) -> None:
    torch.manual_seed(frames)
    batch, vocab = 16, 32
    previous: list[ExitScores | None] = [None] * batch
    alone: list[ExitScores | None] = [None] * batch
    cosines: list[float] = []
    for _ in range(3):
        logits = 4 * torch.randn(batch, frames, vocab)
        logits[::3, :, 0] += 20  # some are silent
        before, after = torch.randn(2, batch, frames, 8)
        found = score(logits, before, after, previous, want_log_probs=True)
        rows = [slice(i, i + 1) for i in range(batch)]
        alone = [score(logits[i], before[i], after[i], [alone[i.start]], want_log_probs=True)[0] for i in rows]
        for ours, theirs in zip(found, alone, strict=True):
            assert theirs is not None
            assert ours.text == theirs.text == collapse(ours.frames.ids).tobytes()
            np.testing.assert_allclose(ours.evidence.numbers, theirs.evidence.numbers, atol=1e-6)
            assert ours.frames.log_probs is not None
            posteriors = np.exp(ours.frames.log_probs.astype(np.float64))
            spoken = ours.frames.ids != 0
            spoken = spoken if spoken.any() else ~spoken
            entropy = -(posteriors * np.log(posteriors)).sum(axis=1) / math.log(vocab)
            expected = [posteriors.max(axis=1)[spoken].mean(), posteriors.max(axis=1).mean()]
            expected += [entropy[spoken].mean(), entropy.mean(), (ours.frames.ids == 0).mean()]
            np.testing.assert_allclose(ours.evidence.numbers[:5], expected, atol=1e-5)
            cosine = torch.cosine_similarity(before, after, dim=-1).mean(dim=1)[len(cosines) % batch].item()
            cosines.append(cosine)
            assert ours.evidence.similarity == pytest.approx(cosine, abs=1e-5)
            assert ours.evidence.lowest_posterior == pytest.approx(posteriors.max(axis=1).min(), abs=1e-6)
        previous = list(found)
    agreements = [item.evidence.agreement for item in previous if item is not None]
    assert set(agreements) == {0.0, 1.0}  # silent ones agree


def test_evidence_of_a_model_in_reduced_precision() -> None:
    torch.manual_seed(0)
    logits, (before, after) = 4 * torch.randn(3, 4, 16), torch.randn(2, 3, 4, 8)
    exact = score(logits, before, after, [None] * 3, want_log_probs=False)
    reduced = score(logits.bfloat16(), before.bfloat16(), after.bfloat16(), [None] * 3, want_log_probs=True)
    for ours, theirs in zip(reduced, exact, strict=True):
        assert ours.frames.log_probs is not None
        assert ours.frames.log_probs.dtype == ours.max_log_prob.dtype == np.float32
        assert ours.evidence.similarity == pytest.approx(theirs.evidence.similarity, abs=0.01)
        assert ours.evidence.entropy_all == pytest.approx(theirs.evidence.entropy_all, abs=0.03)


def test_thresholds_alone_decide_who_is_sure() -> None:
    low: Criterion = Gate((0.2, None), weights=ExitWeights(()))
    assert [low.is_sure(0, value) for value in (0.1, 0.2, 0.3, math.nan)] == [True, True, False, False]
    assert not low.is_sure(1, 0.0)
