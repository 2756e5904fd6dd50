"""Calibrated thresholds for every mean cost: what a budget is looked up in."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asr_exit.errors import ConfigError
from asr_exit.policies.base import is_number

ExitThresholds = tuple[float | None, ...]


@dataclass(frozen=True)
class CostTable:
    """Rows of thresholds per exit by rising mean cost (share of full-depth MACs), solved on held-out audio.

    "Thresholds for a mean cost" as in DeeR (arXiv 2411.02359); every exit has its own, None = never leave there.
    """

    macs_fractions: tuple[float, ...]
    thresholds: tuple[ExitThresholds, ...]

    def __post_init__(self) -> None:
        costs = self.macs_fractions
        widths = {len(row) for row in self.thresholds}
        if not costs or len(costs) != len(self.thresholds) or list(costs) != sorted(costs) or len(widths) != 1:
            raise ConfigError("a cost table needs rows of equally many thresholds, by rising cost; calibrate again")

    @classmethod
    def parse(cls, rows: Sequence[Mapping[str, Any]]) -> CostTable:
        """From the checkpoint's rows {"macs_fraction", "thresholds", ...}. Raises ConfigError for anything else."""
        try:
            costs = [row["macs_fraction"] for row in rows]
            values = [tuple(row["thresholds"]) for row in rows]
        except (KeyError, TypeError):
            raise ConfigError("the model's cost table is damaged; calibrate it again") from None
        if not all(map(is_number, costs)) or not all(v is None or is_number(v) for row in values for v in row):
            raise ConfigError("the model's cost table holds something other than numbers; calibrate it again")
        order = sorted(range(len(costs)), key=costs.__getitem__)
        return cls(tuple(float(costs[i]) for i in order), tuple(values[i] for i in order))

    def at(self, macs_fraction: float) -> ExitThresholds:
        """Thresholds per exit for a mean cost, linear between rows, the outermost row beyond them.

        Between a number and "never leave there", the nearer row decides.
        """
        above = bisect_right(self.macs_fractions, macs_fraction)
        if above == 0 or above == len(self.macs_fractions):
            return self.thresholds[max(0, above - 1)]
        low, high = self.macs_fractions[above - 1], self.macs_fractions[above]
        share = (macs_fraction - low) / (high - low)
        return tuple(
            (a if share < 0.5 else b) if a is None or b is None else a + share * (b - a)
            for a, b in zip(self.thresholds[above - 1], self.thresholds[above], strict=True)
        )
