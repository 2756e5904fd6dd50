"""Criteria with a few learned weights per exit, trained on recorded evidence while the backbone is frozen.

Both read the same features of an exit's evidence and of the exit before, see `features`; the weights are part of the
model's calibration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asr_exit.errors import ConfigError
from asr_exit.policies.base import Evidence, is_number
from asr_exit.policies.criteria import Criterion

_FLOOR = 1e-5
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


def features(evidence: Evidence) -> list[float]:
    """What the learned criteria see, in the order of `FEATURES`: probabilities as logarithms, shares as they are."""
    before = evidence.previous or evidence
    return [
        _log(1.0 - evidence.max_posterior),
        _log(1.0 - evidence.max_posterior_all),
        _log(1.0 - evidence.lowest_posterior),
        _log(evidence.entropy),
        _log(evidence.entropy_all),
        evidence.blank_mass,
        evidence.agreement,
        _log(1.0 - evidence.similarity),
        _log(1.0 - before.max_posterior),
        _log(1.0 - before.max_posterior_all),
        _log(1.0 - before.lowest_posterior),
        before.agreement,
    ]


def _log(value: float) -> float:
    return math.log(max(value, _FLOOR)) if value == value else math.nan


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
        return cls(tuple(tuple(row) for row in rows))

    def probability(self, exit_index: int, evidence: Evidence) -> float:
        """The regression's answer at one exit, in (0, 1); not a number where evidence is missing."""
        if exit_index >= len(self.rows):
            return math.nan
        row = self.rows[exit_index]
        score = row[-1] + sum(w * x for w, x in zip(row[:-1], features(evidence), strict=True))
        return 1.0 / (1.0 + math.exp(-min(max(score, -60.0), 60.0))) if score == score else math.nan


@dataclass(frozen=True)
class Gate(Criterion):
    """Leave when a small learned gate holds "going deeper would mend the text" for unlikely enough.

    A gate per exit as in JEI-DNN (arXiv 2310.09163), trained with the backbone frozen: its target is that the deepest
    exit's answer for the chunk leaves the utterance with fewer word errors than this exit's.
    """

    weights: ExitWeights = field(default=ExitWeights(()), compare=False, repr=False)
    label = "gate"
    needs_similarity = True
    low_is_sure = True

    def measure(self, exit_index: int, evidence: Evidence) -> float:
        return self.weights.probability(exit_index, evidence)


@dataclass(frozen=True)
class QExit(Criterion):
    """Leave when the cumulative learned exit probability, 1 - prod_j (1 - p_j), reaches the threshold.

    The deterministic Q-exit of PALBERT (arXiv 2204.03276); p_j is the learned probability that exit j is good enough,
    given that no exit before it was.
    """

    weights: ExitWeights = field(default=ExitWeights(()), compare=False, repr=False)
    label = "q-exit"
    needs_similarity = True

    def measure(self, exit_index: int, evidence: Evidence) -> float:
        going_on, at = 1.0, evidence
        for index in range(exit_index, -1, -1):
            going_on *= 1.0 - self.weights.probability(index, at)
            if at.previous is None:
                break
            at = at.previous
        return 1.0 - going_on
