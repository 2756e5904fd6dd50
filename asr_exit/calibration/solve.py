"""Thresholds per exit for a grid of mean costs, solved on observations.

Confidence is always "the larger the surer" (see `Observations.confidence`). Shapes: E exits, N chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asr_exit.policy import Criterion

PRICES = np.geomspace(3.0, 1e-3, 40)  # word errors that the MACs of one full-depth chunk are worth
SWEEPS = 6
EDIT_WEIGHT = 0.1  # of a piece that differs from the deepest exit's, in word errors: see `losses`
KEPT_SHARES = (
    0.8,
    0.6,
    0.4,
    0.2,
)  # of the chunks that leave where compute is cheapest: rows between that and full depth
LEAST_STEP = 0.01  # rows closer in cost than this are thinned out
DIGITS = 7


@dataclass(frozen=True)
class Row:
    """One setting and its outcome. `thresholds` are (E - 1,) confidences; inf = never leave there, -inf = always."""

    macs_fraction: float
    wer: float
    thresholds: tuple[float, ...]

    @property
    def is_static(self) -> bool:
        """Every chunk leaves at the same exit."""
        return set(self.thresholds) <= {np.inf, -np.inf}

    def native(self, criterion: type[Criterion]) -> list[float | None]:
        """Thresholds as the policy counts them; None for "not here"."""
        least, most = (criterion.largest, 0.0) if criterion.low_is_sure else (0.0, criterion.largest)
        sign = -1.0 if criterion.low_is_sure else 1.0
        low, high = min(least, most), max(least, most)
        return [
            None if value == np.inf else least if value == -np.inf else round(min(max(sign * value, low), high), DIGITS)
            for value in self.thresholds
        ]

    def stored(self, criterion: type[Criterion]) -> dict[str, Any]:
        """JSON for the model."""
        return {
            "macs_fraction": round(self.macs_fraction, 4),
            "wer": round(self.wer, 4),
            "thresholds": self.native(criterion),
        }


def static_thresholds(exit_index: int, num_exits: int) -> tuple[float, ...]:
    """Thresholds (E - 1,) at which every chunk leaves at `exit_index`."""
    return tuple(-np.inf if k == exit_index else np.inf for k in range(num_exits - 1))


def exits_of(confidence: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """(E, N) confidences -> (N,) exit index of each chunk: the first that reaches its threshold, else the last."""
    stops = confidence[:-1] >= np.asarray(thresholds)[:, None]
    return np.where(stops.any(axis=0), stops.argmax(axis=0), len(confidence) - 1)


def losses(harm: np.ndarray, edits: np.ndarray) -> np.ndarray:
    """(E, N) what leaving costs in word errors: the errors it adds, and a little for every other piece it changes.

    The errors added are what counts, but they are rare; the pieces are what they are made of, and frequent.
    """
    return harm + EDIT_WEIGHT * edits


def descend(confidence: np.ndarray, loss: np.ndarray, start: Sequence[float]) -> tuple[float, ...]:
    """Thresholds (E - 1,) that make the sum of `loss` (E, N) over the chunks' exits small.

    Coordinate descent: each exit's threshold in turn is set to its exact best, given the others.
    """
    depths, columns = len(confidence) - 1, np.arange(confidence.shape[1])
    thresholds = np.array(start, dtype=np.float64)
    orders = [np.argsort(-row, kind="stable") for row in confidence[:-1]]
    for _ in range(SWEEPS):
        before = thresholds.copy()
        for k in reversed(range(depths)):
            stops = confidence[:-1] >= thresholds[:, None]
            later = np.full(len(columns), depths)
            for j in range(depths - 1, k, -1):
                later[stops[j]] = j
            gain = np.where(stops[:k].any(axis=0), 0.0, loss[later, columns] - loss[k])
            thresholds[k] = _best_cut(confidence[k, orders[k]], gain[orders[k]])
        if np.array_equal(before, thresholds):
            break
    return tuple(thresholds.tolist())


def _best_cut(values: np.ndarray, gain: np.ndarray) -> float:
    """Threshold on falling `values` (N,) for which the sum of `gain` (N,) at or above it is largest."""
    total = np.cumsum(gain)
    following = np.append(values[1:], -np.inf)
    total[(values == following) | (values == -np.inf)] = -np.inf
    best = int(total.argmax())
    if total[best] <= 0:
        return np.inf
    return float((values[best] + following[best]) / 2)  # -inf if even the least sure chunk should leave


def solve(confidence: np.ndarray, harm: np.ndarray, edits: np.ndarray, costs: np.ndarray) -> list[tuple[float, ...]]:
    """Thresholds for falling prices of compute, cheapest first; the first leaves at once, the last never early.

    Args:
        costs: (E, N) of leaving, in MACs of an average full-depth chunk.
    """
    depths = len(confidence) - 1
    loss, found = losses(harm, edits), [(np.inf,) * depths]
    for price in PRICES[::-1]:
        found.append(descend(confidence, loss + price * costs, found[-1]))
    found[1:1] = [_tightened(confidence, found[1], share) for share in KEPT_SHARES[::-1]]
    found.append((-np.inf, *(np.inf,) * (depths - 1)))
    return found[::-1]


def _tightened(confidence: np.ndarray, thresholds: Sequence[float], share: float) -> tuple[float, ...]:
    """Thresholds at which only the surest `share` of the chunks that leave at each exit still do."""
    exits, stricter = exits_of(confidence, thresholds), []
    for k, threshold in enumerate(thresholds):
        leaving = confidence[k, exits == k]
        stricter.append(float(np.quantile(leaving, 1 - share)) if len(leaving) else threshold)
    return tuple(stricter)


def thinned(rows: Sequence[Row]) -> list[Row]:
    """Rows by rising cost, at least `LEAST_STEP` apart, without those that a cheaper one beats.

    The cheapest and the most expensive one always stay, and all beyond the best one: a budget must reach every cost.
    """
    ordered = sorted(rows, key=lambda row: (row.macs_fraction, row.wer))
    best = min(ordered, key=lambda row: row.wer)
    kept = [ordered[0]]
    for row in ordered[1:-1]:
        useful = row.wer < kept[-1].wer or row.macs_fraction > best.macs_fraction
        if row.macs_fraction - kept[-1].macs_fraction >= LEAST_STEP and useful:
            kept.append(row)
    last = ordered[-1]
    while len(kept) > 1 and last.macs_fraction - kept[-1].macs_fraction < LEAST_STEP:
        kept.pop()
    return [*kept, last]


def choose(rows: Sequence[Row], full_wer: float, target: float | None, tolerance: float) -> Row:
    """The row nearest to the cost `target`; without one, the cheapest within `tolerance` (relative) of `full_wer`."""
    if target is not None:
        return min(rows, key=lambda row: abs(row.macs_fraction - target))
    good = [row for row in rows if row.wer <= full_wer * (1.0 + tolerance)]
    return min(good, key=lambda row: row.macs_fraction) if good else rows[-1]
