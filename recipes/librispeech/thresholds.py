"""Searching exit thresholds on observations: one threshold for all exits, and equal risk at every exit.

Confidence is always "the larger the surer" (entropy is negated). Shapes: E exits, N chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recipes.librispeech.observe import Observations

RISKS = np.geomspace(0.002, 4.0, 32)  # pieces to change per chunk that leaves
QUANTILES = np.linspace(0.02, 0.98, 25)
DIGITS = 5


@dataclass(frozen=True)
class Row:
    """One setting and its simulated outcome. `thresholds` are (E - 1,) confidences, inf = never leave there."""

    macs_fraction: float
    wer: float
    thresholds: tuple[float, ...]

    @property
    def leaves_early(self) -> bool:
        return bool(np.isfinite(self.thresholds).any())

    def stored(self) -> dict[str, Any]:
        """JSON for the model: thresholds as the policies count them (entropy is positive), None for "not here"."""
        values = [abs(value) if np.isfinite(value) else None for value in self.thresholds]
        return {"macs_fraction": round(self.macs_fraction, 4), "wer": round(self.wer, 4), "thresholds": values}


def exits_of(confidence: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """(E, N) confidences -> (N,) exit index of each chunk: the first that reaches its threshold, else the last."""
    stops = confidence[:-1] >= np.asarray(thresholds)[:, None]
    return np.where(stops.any(axis=0), stops.argmax(axis=0), len(confidence) - 1)


def equal_risk(confidence: np.ndarray, edits: np.ndarray, risk: float) -> tuple[float, ...]:
    """Thresholds so that of the chunks that leave at an exit the mean of `edits` is at most `risk`.

    Exits are solved from shallow to deep, each on the chunks that have not left before it. Returns (E - 1,).
    """
    staying = np.ones(confidence.shape[1], bool)
    thresholds: list[float] = []
    for exit_index in range(len(confidence) - 1):
        values = confidence[exit_index, staying]
        order = np.argsort(-values, kind="stable")
        mean = np.cumsum(edits[exit_index, staying][order]) / np.arange(1, len(order) + 1)
        allowed = np.flatnonzero(mean <= risk)
        threshold = _rounded_up(values[order[allowed[-1]]]) if len(allowed) else np.inf
        thresholds.append(threshold)
        staying &= confidence[exit_index] < threshold
    return tuple(thresholds)


def _rounded_up(value: float) -> float:
    """To `DIGITS` decimals, never beyond what the confidence can reach (1 or, negated, 0)."""
    scale = 10.0**DIGITS
    return float(min(np.ceil(value * scale) / scale, 0.0 if value <= 0 else 1.0))


def search(observations: Observations, criterion: str) -> list[Row]:
    """Rows that no other beats in both cost and word error rate, cheapest first."""
    confidence = observations.confidence[criterion]
    depths = len(confidence) - 1
    candidates = {(np.inf,) * depths}
    candidates |= {equal_risk(confidence, observations.edits, float(risk)) for risk in RISKS}
    candidates |= {(_rounded_up(value),) * depths for value in np.quantile(confidence[:-1], QUANTILES)}
    rows = []
    for thresholds in sorted(candidates):
        cost, rate = observations.outcome(exits_of(confidence, thresholds))
        rows.append(Row(cost, rate, thresholds))
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.macs_fraction, row.wer)):
        if not front or row.wer < front[-1].wer:
            front.append(row)
    return front


def choose(rows: Sequence[Row], full_wer: float, target: float | None, tolerance: float, fallback: float) -> Row:
    """The row nearest to the cost `target`; without one, the cheapest within `tolerance` (relative) of `full_wer`,
    and where none that leaves early is, the row nearest to `fallback`."""
    early = [row for row in rows if row.leaves_early] or list(rows)
    if target is None:
        good = [row for row in early if row.wer <= full_wer * (1.0 + tolerance)]
        if good:
            return min(good, key=lambda row: row.macs_fraction)
    wanted = fallback if target is None else target
    return min(early, key=lambda row: abs(row.macs_fraction - wanted))
