"""Comparing settings on equal cost: curves through measured points, and bootstrap intervals over recordings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from asr_exit.calibration.replay import Outcome, Replay, outcome
from asr_exit.metrics import bootstrap_difference

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Point:
    """One setting over the set. `errors`, `macs` and `full_macs` are (R,), one per recording."""

    name: str
    total: Outcome
    errors: np.ndarray
    macs: np.ndarray
    full_macs: np.ndarray
    words: np.ndarray
    replays: Sequence[Replay]

    @classmethod
    def of(cls, name: str, replays: Sequence[Replay]) -> Point:
        """From replays of every recording, in one order for all points."""
        return cls(
            name,
            outcome(replays),
            np.array([item.errors.errors for item in replays], dtype=np.float64),
            np.array([item.macs for item in replays], dtype=np.float64),
            np.array([item.full_macs for item in replays], dtype=np.float64),
            np.array([item.errors.words for item in replays], dtype=np.float64),
            replays,
        )

    @property
    def cost(self) -> float:
        """Share of full-depth MACs."""
        return self.total.macs_fraction

    @property
    def wer(self) -> float:
        return self.total.wer


def hull(points: Sequence[Point]) -> list[Point]:
    """Those of `points` that no mix of others beats: the lower convex hull of errors over cost, cheapest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda item: (item.cost, item.wer)):
        if kept and point.wer >= kept[-1].wer:
            continue
        while len(kept) > 1 and _above(kept[-2], kept[-1], point):
            kept.pop()
        kept.append(point)
    return kept


def _above(a: Point, b: Point, c: Point) -> bool:
    return (b.wer - a.wer) * (c.cost - a.cost) >= (c.wer - a.wer) * (b.cost - a.cost)


def errors_at(points: Sequence[Point], cost: float) -> np.ndarray:
    """(R,) expected errors of a mix of the two points that enclose `cost`; the outermost point beyond them."""
    ordered = sorted(points, key=lambda item: item.cost)
    if cost <= ordered[0].cost:
        return ordered[0].errors
    for low, high in pairwise(ordered):
        if cost <= high.cost:
            share = (cost - low.cost) / max(1e-12, high.cost - low.cost)
            return (1 - share) * low.errors + share * high.errors
    return ordered[-1].errors


@dataclass(frozen=True)
class Difference:
    """Word error rate of one setting minus that of another, with its bootstrap interval."""

    wer_difference: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """The interval does not hold zero."""
        return self.low > 0 or self.high < 0


def difference(ours: np.ndarray, theirs: np.ndarray, words: np.ndarray, seed: int = 0) -> Difference:
    """Paired bootstrap over recordings of (sum of `ours` - sum of `theirs`) / sum of `words`, all (R,)."""
    return Difference(*bootstrap_difference(ours, theirs, words, level=LEVEL, resamples=RESAMPLES, seed=seed))


def worst_window(replays: Sequence[Replay], asked: float, window_seconds: float = 30.0) -> float:
    """Largest deviation of the spent share from `asked` over any window of whole chunks of that length.

    Costs are compared with full depth of the same audio. Streams shorter than the window do not count; 0 if all are.
    """
    worst = 0.0
    for item in replays:
        seconds, macs = np.array(item.chunk_seconds), np.array(item.chunk_macs, dtype=np.float64)
        full_per_second = item.full_macs / max(1e-9, seconds.sum())
        count = round(window_seconds / seconds[0]) if len(seconds) else 0
        if 0 < count <= len(macs):
            totals = np.convolve(macs, np.ones(count), "valid") / np.convolve(seconds, np.ones(count), "valid")
            worst = max(worst, float(np.abs(totals / full_per_second - asked).max()))
    return worst
