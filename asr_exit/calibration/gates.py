"""Training the learned criteria: logistic regression on recorded evidence, the backbone frozen.

Shapes: E exits, N chunks, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asr_exit.policies.learned import FEATURES, ExitWeights, features
from asr_exit.policy import Evidence

RIDGE = 3.0
STEPS = 25
FEWEST = 50  # samples of the rarer class below which an exit's weights are only a bias


def train_gates(evidence: Sequence[Sequence[Evidence]], harm: np.ndarray) -> ExitWeights:
    """Per exit but the last: the probability that the deepest exit would leave fewer errors.

    Args:
        evidence: per exit, per chunk. harm: (E, N) word errors more than at full depth.
    """
    return ExitWeights(
        tuple(
            _fit(features(evidence[k]), harm[k] > 0, np.maximum(1.0, np.abs(harm[k]))) for k in range(len(evidence) - 1)
        )
    )


def train_hazards(evidence: Sequence[Sequence[Evidence]], harm: np.ndarray) -> ExitWeights:
    """Per exit but the last: the probability that it is good enough, given that no exit before it was."""
    rows, waiting = [], np.ones(harm.shape[1], bool)
    for k in range(len(evidence) - 1):
        good = harm[k] <= 0
        fitting = waiting if min((good & waiting).sum(), (~good & waiting).sum()) >= FEWEST else np.ones_like(waiting)
        rows.append(_fit(features(evidence[k])[fitting], good[fitting], np.ones(int(fitting.sum()))))
        waiting &= ~good
    return ExitWeights(tuple(rows))


def _fit(x: np.ndarray, wanted: np.ndarray, weight: np.ndarray) -> tuple[float, ...]:
    """Ridge logistic regression by Newton's method: (F + 1,) weights on the raw features, bias last.

    A feature that does not vary (the first exit agrees with nobody) gets weight 0.
    """
    if min(wanted.sum(), (~wanted).sum()) < FEWEST:
        share = (wanted.sum() + 1) / (len(wanted) + 2)
        return (*(0.0,) * len(FEATURES), float(np.log(share / (1 - share))))
    mean, spread = x.mean(axis=0), x.std(axis=0)
    scale = np.where(spread > 1e-9, 1.0 / np.maximum(spread, 1e-9), 0.0)
    z = np.column_stack(((x - mean) * scale, np.ones(len(x))))
    penalty = np.append(np.full(x.shape[1], RIDGE), 1e-6)
    w = np.zeros(z.shape[1])
    for _ in range(STEPS):
        p = 1.0 / (1.0 + np.exp(-np.clip(z @ w, -30, 30)))
        slope = z.T @ (weight * (p - wanted)) + penalty * w
        curve = (z * (weight * p * (1 - p))[:, None]).T @ z + np.diag(penalty)
        step = np.linalg.solve(curve, slope)
        w -= step
        if np.abs(step).max() < 1e-6:
            break
    raw = w[:-1] * scale
    return (*(float(value) for value in raw.round(6)), float(round(w[-1] - raw @ mean, 6)))
