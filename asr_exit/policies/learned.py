"""Criteria with a few learned weights per exit, trained on recorded evidence while the backbone is frozen, or with it.

All read the same features of an exit's evidence and of the exit before, see `features`; the weights are part of the
model's calibration. N chunks, F features.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from asr_exit.errors import ConfigError
from asr_exit.policies.base import Evidence, ExitPolicy, is_number
from asr_exit.policies.criteria import Criterion

FLOOR = 1e-5  # of what is taken the logarithm of
FEATURES = (
    "doubt",
    "doubt_all",
    "worst_doubt",
    "entropy",
    "entropy_all",
    "blank_mass",
    "agreement",
    "dissimilarity",
    "doubt_before",
    "doubt_all_before",
    "worst_doubt_before",
    "agreement_before",
)

# Where the features stand in `Evidence.numbers` of this exit, followed by those of the exit before.
SOURCE = (0, 1, 7, 2, 3, 4, 5, 6, 8 + 0, 8 + 1, 8 + 7, 8 + 5)
DOUBTED = np.array(["doubt" in name or name == "dissimilarity" for name in FEATURES])  # one minus the evidence
LOGARITHMIC = DOUBTED | np.array(["entropy" in name for name in FEATURES])
OFFSET, SIGN = np.where(DOUBTED, 1.0, 0.0), np.where(DOUBTED, -1.0, 1.0)


def features(evidence: Sequence[Evidence]) -> np.ndarray:
    """(N, F) what the learned criteria see of N chunks, in the order of `FEATURES`: probabilities as logarithms, shares
    as they are."""
    return _features([evidence, [item.previous or item for item in evidence]])[0]


def _features(levels: Sequence[Sequence[Evidence]]) -> np.ndarray:
    """(L - 1, N, F) `features` of N chunks at L - 1 exits in a row, the deepest first; the last level is only "before".

    A chunk's values do not depend on the others'.
    """
    seen = np.concatenate([item.numbers for level in levels for item in level]).reshape(len(levels), len(levels[0]), -1)
    values = OFFSET + SIGN * np.concatenate((seen[:-1], seen[1:]), axis=2).take(SOURCE, axis=2)
    return np.where(LOGARITHMIC, np.log(np.maximum(values, FLOOR)), values)


@dataclass(frozen=True)
class ExitWeights:
    """Logistic regression per exit over `FEATURES`: the last number of each row is the bias.

    Raises:
        ConfigError: a row has not one weight per feature and a bias.
    """

    rows: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if any(len(row) != len(FEATURES) + 1 or not all(map(is_number, row)) for row in self.rows):
            raise ConfigError(
                f"learned exit weights need {len(FEATURES)} numbers and a bias per exit; calibrate the model again"
            )

    @classmethod
    def parse(cls, calibration: Mapping[str, Any], label: str) -> ExitWeights:
        """From the calibration of criterion `label`. Raises ConfigError where it has none or other features."""
        rows = calibration.get("weights")
        if not isinstance(rows, Sequence) or list(calibration.get("features", ())) != list(FEATURES):
            raise ConfigError(
                f"this model has no learned weights for {label!r}; run 'asr-exit calibrate' or use another policy"
            )
        return _shared(cls(tuple(tuple(row) for row in rows)))

    @cached_property
    def _negated(self) -> np.ndarray:
        """(exits, F + 1) minus `rows`."""
        return -np.reshape(self.rows, (-1, len(FEATURES) + 1))

    def probability(self, exit_index: int, evidence: Evidence) -> float:
        """The regression's answer at one exit, in (0, 1); not a number where evidence is missing."""
        return float(self.probabilities(exit_index, [[evidence]])[0, 0])

    def probabilities(self, exit_index: int, levels: Sequence[Sequence[Evidence]]) -> np.ndarray:
        """(L, N) the same for N chunks at L exits in a row: `exit_index`, and those before it."""
        if exit_index >= len(self.rows):
            return np.full((len(levels), len(levels[0])), math.nan)
        rows = self._negated[exit_index::-1, None][: len(levels)]
        seen = _features([*levels, [item.previous or item for item in levels[-1]]])
        scores = rows[..., -1] + np.add.reduce(rows[..., :-1] * seen, axis=2)  # no BLAS: the same in any batch
        return 1.0 / (1.0 + np.exp(np.minimum(scores, 60.0)))


@lru_cache(maxsize=64)
def _shared(weights: ExitWeights) -> ExitWeights:
    """One object for equal weights, so that streams of one model are seen to have the same."""
    return weights


@dataclass(frozen=True)
class Learned(Criterion):
    """Common part: computes many chunks in one go."""

    weights: ExitWeights = field(default=ExitWeights(()), compare=False, repr=False)
    needs_similarity = True

    def measure(self, exit_index: int, evidence: Evidence) -> float:
        return self.measures(exit_index, [evidence])[0]


def stops(exit_index: int, policies: Sequence[ExitPolicy], evidence: Sequence[Evidence | None]) -> list[bool]:
    """`ExitPolicy.stop` of many streams, each with its policy and its evidence: the same answers, in less time.

    Learned criteria with the same weights are computed in one go, whatever their thresholds.
    """
    kinds = {(type(policy), id(getattr(policy, "weights", None))) for policy in policies}
    if len(kinds) > 1:
        return _stops_by_kind(exit_index, policies, evidence)
    if not kinds or type(policies[0]) not in _TOGETHER or None in evidence:
        return [policy.stop(exit_index, item) for policy, item in zip(policies, evidence, strict=True)]
    judges: Sequence[Learned] = policies  # type: ignore[assignment]
    values = judges[0].measures(exit_index, evidence)  # type: ignore[arg-type]
    return [judge.is_sure(exit_index, value) for judge, value in zip(judges, values, strict=True)]


def _stops_by_kind(exit_index: int, policies: Sequence[ExitPolicy], evidence: Sequence[Evidence | None]) -> list[bool]:
    rows = defaultdict[tuple[type, int], list[int]](list)
    for row, policy in enumerate(policies):
        rows[type(policy), id(getattr(policy, "weights", None))].append(row)
    answers = [False] * len(policies)
    for members in rows.values():
        found = stops(exit_index, [policies[row] for row in members], [evidence[row] for row in members])
        for row, answer in zip(members, found, strict=True):
            answers[row] = answer
    return answers


@dataclass(frozen=True)
class Gate(Learned):
    """Leave when a small learned gate holds "going deeper would mend the text" for unlikely enough.

    A gate per exit as in JEI-DNN (arXiv 2310.09163), trained with the backbone frozen: its target is that the deepest
    exit's answer for the chunk leaves the utterance with fewer word errors than this exit's.
    """

    label = "gate"
    low_is_sure = True

    def measures(self, exit_index: int, evidence: Sequence[Evidence]) -> list[float]:
        found: list[float] = self.weights.probabilities(exit_index, [evidence])[0].tolist()
        return found


@dataclass(frozen=True)
class JointGate(Gate):
    """Leave when a gate that was trained together with the encoder holds "going deeper would help" for unlikely enough.

    JEI-DNN (arXiv 2310.09163) in full: gates and exits learn from one loss, that of the exit taken plus the price of
    its compute, in expectation; see `asr_exit.joint_gates`. Calibration finds thresholds and leaves the weights alone.
    """

    label = "joint-gate"


@dataclass(frozen=True)
class QExit(Learned):
    """Leave when the cumulative learned exit probability, 1 - prod_j (1 - p_j), reaches the threshold.

    The deterministic Q-exit of PALBERT (arXiv 2204.03276); p_j is the learned probability that exit j is good enough,
    given that no exit before it was.
    """

    label = "q-exit"

    def measures(self, exit_index: int, evidence: Sequence[Evidence]) -> list[float]:
        memos = [_START if item.previous is None else item.previous.memo for item in evidence]
        if all(memo is _START or (memo[0] is self.weights and memo[1] == exit_index - 1) for memo in memos):
            before = np.array([memo[2] for memo in memos])  # what the exit before computed
            going_on = before * (1.0 - self.weights.probabilities(exit_index, [evidence])[0])
        else:
            levels: list[Sequence[Evidence]] = [evidence]
            for _ in range(exit_index):
                known = [item.previous for item in levels[-1] if item.previous is not None]
                if not known:
                    break
                if len(known) < len(evidence):  # chunks with histories of different lengths: each alone
                    return [self.measure(exit_index, item) for item in evidence]
                levels.append(known)
            stays = 1.0 - self.weights.probabilities(exit_index, levels)
            going_on = np.multiply.reduce(stays[::-1], axis=0)  # in the order of the exits
        for item, value in zip(evidence, going_on.tolist(), strict=True):
            item.memo = self.weights, exit_index, value
        found: list[float] = (1.0 - going_on).tolist()
        return found


_START = None, -1, 1.0  # prod_j (1 - p_j) before the first exit
_TOGETHER = (Gate, JointGate, QExit)  # not their subclasses, which may stop otherwise
