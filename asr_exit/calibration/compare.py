"""Which criterion should be the default: compared on recordings that its thresholds and weights have not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from asr_exit.calibration.observe import Observations
from asr_exit.calibration.solve import Row, exits_of
from asr_exit.policy import Criterion

COMPARED_COSTS = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)  # where criteria compete for being the default
FOLDS = 5  # runs of neighbours: sets are sorted by speaker, so a speaker is hardly ever in two

Solve = Callable[[Observations], tuple[Criterion, Sequence[Row]]]


def unseen_wer(observations: Observations, solve: Solve) -> float:
    """Word error rate over `COMPARED_COSTS` where each fifth of the recordings is judged by what the others taught.

    One row's word errors on the recordings that it was solved for say more about chance than about the criterion, and
    flatter those with more to learn.
    """
    count = len(observations.items)
    edges = np.linspace(0, count, min(FOLDS, count) + 1).astype(int)
    errors, words = 0.0, 0
    for low, high in pairwise(edges.tolist()):
        inside = set(range(low, high))
        held_out, rest = observations.only(inside), observations.only(set(range(count)) - inside or inside)
        policy, rows = solve(rest)
        confidence = held_out.confidence(policy)
        wers = [held_out.wer(exits_of(confidence, row.thresholds)) for row in rows]
        costs = [row.macs_fraction for row in rows]
        errors += float(np.interp(COMPARED_COSTS, costs, wers).mean()) * held_out.words
        words += held_out.words
    return errors / max(1, words)


def best_measured(result: Mapping[str, Any], limit: float, target: float | None) -> str:
    """Of the measured criteria the cheapest whose word error rate keeps the limit, or else the one with fewest errors;
    at a given cost the one with fewest errors."""
    rows = {label: row for label, row in result.items() if isinstance(row, Mapping) and "wer_measured" in row}
    good = [label for label, row in rows.items() if row["wer_measured"] <= limit]
    if target is not None or not good:
        return min(rows, key=lambda label: rows[label]["wer_measured"])
    return min(good, key=lambda label: rows[label]["macs_fraction_measured"])
