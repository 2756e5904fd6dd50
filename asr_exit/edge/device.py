"""What a phone or board says about itself, and how deep it may then go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from asr_exit.config import require

LOW_BATTERY, EMPTY_BATTERY = 0.2, 0.05
_HALF = 0.5


class Thermal(StrEnum):
    """Thermal state in the words of iOS. Android: none and light, moderate, severe, critical and beyond."""

    NOMINAL = "nominal"
    FAIR = "fair"
    SERIOUS = "serious"
    CRITICAL = "critical"


_SHARE = {Thermal.NOMINAL: 1.0, Thermal.FAIR: 0.75, Thermal.SERIOUS: _HALF, Thermal.CRITICAL: 0.0}


@dataclass(frozen=True)
class DeviceState:
    """What the caller knows about the device; pass it on whenever it changes.

    Attributes:
        battery: charge in [0, 1]; None = mains, or unknown.

    Raises:
        ConfigError: a battery outside [0, 1].
    """

    thermal: Thermal = Thermal.NOMINAL
    battery: float | None = None
    charging: bool = False

    def __post_init__(self) -> None:
        require(self.battery is None or 0.0 <= self.battery <= 1.0, f"battery {self.battery!r} must be from 0 to 1")

    @property
    def share(self) -> float:
        """Most that a chunk may cost, as a share of full depth; whatever it is, the first exit runs.

        A fair thermal state takes a quarter away; a serious one, or a battery under 20 %, half; a critical one, or a
        battery under 5 %, all but the first exit.
        """
        share = _SHARE[self.thermal]
        if self.battery is not None and not self.charging:
            share = min(share, 0.0 if self.battery < EMPTY_BATTERY else _HALF if self.battery < LOW_BATTERY else 1.0)
        return share

    def ceiling(self, costs: Sequence[float]) -> int:
        """Deepest exit index whose cost is within `share` of the last of `costs` (rising, one per exit)."""
        within = [index for index, cost in enumerate(costs) if cost <= self.share * costs[-1] * (1 + 1e-9)]
        return within[-1] if within else 0
