"""What a stream may spend: budgets, the cost model, and the token bucket that turns both into an exit ceiling.

All costs are encoder MACs (multiply-accumulates), including stem and exit heads. No torch here.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from asr_exit.errors import ConfigError

WINDOW_SECONDS = 10.0
SWING_SECONDS = 1.4  # of full depth: how far spending may run ahead of, or behind, a budget that is a target
RETURN_SECONDS = 4.0  # of audio, over which a target's deviation is paid back

_KEYS = {
    "mean_depth": "mean_depth",
    "macs": "encoder_macs_per_second",
    "encoder_macs_per_second": "encoder_macs_per_second",
    "rtf": "real_time_factor",
    "real_time_factor": "real_time_factor",
    "max_exit": "max_exit_layer",
    "max_exit_layer": "max_exit_layer",
    "min_exit": "min_exit_layer",
    "min_exit_layer": "min_exit_layer",
    "peak": "peak_depth",
    "peak_depth": "peak_depth",
}
_LAYERS = ("max_exit_layer", "min_exit_layer")
_RATES = ("mean_depth", "encoder_macs_per_second", "real_time_factor")


@dataclass(frozen=True)
class Budget:
    """Compute a caller grants to one stream; without any field, as much as it needs.

    Attributes:
        mean_depth: average MACs as a fraction of full depth, in (0, 1].
        encoder_macs_per_second: average encoder MACs per second of audio.
        real_time_factor: average compute seconds per second of audio on this device, in (0, 1].
        max_exit_layer: no chunk goes deeper than this layer. Rounded down to an exit.
        min_exit_layer: guaranteed: load never keeps a chunk from this layer. Rounded down to an exit. The policy may
            still leave before it.
        peak_depth: no single chunk costs more than this fraction of its full depth, in (0, 1], whatever was saved.

    Raises:
        ConfigError: a value is out of range, more than one of the first three is set, or the least layer is beyond the
            deepest.
    """

    mean_depth: float | None = None
    encoder_macs_per_second: float | None = None
    real_time_factor: float | None = None
    max_exit_layer: int | None = None
    min_exit_layer: int | None = None
    peak_depth: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in _RATES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"a budget takes one of {', '.join(_RATES)}; got {' and '.join(given)}")
        for name in (*given, *(["peak_depth"] if self.peak_depth is not None else [])):
            value = getattr(self, name)
            top = math.inf if name == "encoder_macs_per_second" else 1.0
            real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not real or not 0 < value <= top:
                span = "a positive number" if math.isinf(top) else "greater than 0 and at most 1"
                raise ConfigError(f"{name} must be {span}, got {value!r}")
        for name in _LAYERS:
            layer = getattr(self, name)
            if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool) or layer < 1):
                raise ConfigError(f"{name} must be a layer number from 1, got {layer!r}")
        if self.min_exit_layer is not None and self.min_exit_layer > (self.max_exit_layer or self.min_exit_layer):
            raise ConfigError(
                f"min_exit_layer={self.min_exit_layer} is deeper than max_exit_layer={self.max_exit_layer}"
            )

    @property
    def has_target(self) -> bool:
        """Whether an average is set, and not only the deepest exit."""
        return any(getattr(self, name) is not None for name in _RATES)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From text: "0.5" or "mean_depth=0.5", "rtf=0.05", "macs=2e8", "max_exit=6", "min_exit=4", "peak=0.8",
        joined by commas.

        Raises:
            ConfigError: unknown key (the message names the nearest), a value that is no number, a key given twice.
        """
        fields: dict[str, float | int] = {}
        for part in text.split(","):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals:
                key, value = "mean_depth", key
            if key not in _KEYS:
                near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)[0]
                raise ConfigError(
                    f"budget {text!r}: unknown key {key!r}; did you mean {near!r}? Known: {', '.join(_KEYS)}"
                )
            field = _KEYS[key]
            if field in fields:
                raise ConfigError(f"budget {text!r}: {field} is given twice")
            try:
                fields[field] = int(value) if field in _LAYERS else float(value)
            except ValueError:
                kind = "a whole number" if field in _LAYERS else "a number"
                raise ConfigError(
                    f"budget {text!r}: {value!r} is not {kind}; examples: 0.5, rtf=0.05, macs=2e8, max_exit=6"
                ) from None
        return cls(**fields)  # type: ignore[arg-type]


@dataclass(frozen=True)
class CostModel:
    """What depth costs.

    Attributes:
        macs_per_second_to_exit: per exit, encoder MACs for one second of audio when every chunk leaves there (stem, all
            layers up to it, heads on the way and the fill of skipped layers included); rising. The last is full depth.
        seconds_per_mac: measured on this device; None until calibrated.

    Raises:
        ConfigError: costs that are not positive and rising.
    """

    macs_per_second_to_exit: tuple[float, ...]
    seconds_per_mac: float | None = None

    def __post_init__(self) -> None:
        costs = self.macs_per_second_to_exit
        rising = all(low < high for low, high in itertools.pairwise(costs))
        if not costs or not all(map(math.isfinite, costs)) or costs[0] <= 0 or not rising:
            raise ConfigError(f"costs to the exits must be positive and rising, got {costs}")
        seconds = self.seconds_per_mac
        if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
            raise ConfigError(f"seconds_per_mac must be a positive number, got {seconds!r}")

    @classmethod
    def from_chunk(
        cls, macs_per_chunk_to_exit: Sequence[float], chunk_seconds: float, seconds_per_mac: float | None = None
    ) -> CostModel:
        """From the MACs of one chunk of `chunk_seconds` of audio, per exit."""
        return cls(tuple(macs / chunk_seconds for macs in macs_per_chunk_to_exit), seconds_per_mac)

    @property
    def full_macs_per_second(self) -> float:
        return self.macs_per_second_to_exit[-1]

    def allowance(self, budget: Budget) -> float | None:
        """MACs per second of audio that `budget` grants; None if it sets no average.

        Raises:
            ConfigError: not even the first exit fits (the message states the least possible value), or a real-time
                factor was asked of a cost model without `seconds_per_mac`.
        """
        least = self.macs_per_second_to_exit[0]
        if budget.mean_depth is not None:
            name, value, unit = "mean_depth", budget.mean_depth, self.full_macs_per_second
        elif budget.encoder_macs_per_second is not None:
            name, value, unit = "encoder_macs_per_second", budget.encoder_macs_per_second, 1.0
        elif budget.real_time_factor is not None:
            if self.seconds_per_mac is None:
                raise ConfigError(
                    "real_time_factor needs a cost model measured on this device; "
                    "use mean_depth or encoder_macs_per_second"
                )
            name, value, unit = "real_time_factor", budget.real_time_factor, 1.0 / self.seconds_per_mac
        else:
            return None
        if value * unit < least * (1 - 1e-9):
            raise ConfigError(
                f"{name}={value:g} is less than the first exit costs; the least possible is {_round_up(least / unit)}"
            )
        return value * unit


def _round_up(value: float) -> str:
    """`value` to four digits, never below it."""
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / step * (1 - 1e-12)) * step:.4g}"


class DepthBudget:
    """Token bucket of one stream: keeps its average spending on, or under, the budget, chunk by chunk.

    Every second of audio earns the budget's allowance, and every chunk is paid from it.

    **Cap** (`target` false, policies whose cost cannot be chosen): a chunk may go as deep as its own allowance plus
    what earlier, easier chunks left over pays for. Savings are capped at `window_seconds` of allowance and at 0.3 *
    `window_seconds` of full-depth cost. Nothing is lent in advance: the average is kept from the first chunk on.

    **Target** (`target` true, policies calibrated for every mean cost): hard chunks may also borrow from later ones.
    Savings and debt are each held within `SWING_SECONDS` of full-depth cost by a ceiling and a floor, and `setpoint`
    asks the policy for a little more or less than the budget, so that a deviation is paid back over about
    `RETURN_SECONDS`.

    Either way no 30 s of audio deviate from the budget by more than a tenth of full depth (one chunk of rounding aside;
    a cap may stay below). The first exit always runs; spending that no ceiling allowed (catching up, draining) is debt
    that later chunks pay back. `max_exit_layer` and `peak_depth` are hard.

    Args:
        budget: what the caller grants.
        cost: the model's costs for this stream's chunk size and fill.
        exit_layers: layer of each exit, e.g. (2, 4, ..., 12).
        window_seconds: audio over which a cap's savings may be carried.
        target: the policy can be steered to spend the budget.

    Raises:
        ConfigError: not even the first exit fits the budget; the message states the least possible value.
    """

    def __init__(
        self,
        budget: Budget,
        cost: CostModel,
        exit_layers: Sequence[int],
        *,
        window_seconds: float = WINDOW_SECONDS,
        target: bool = False,
    ) -> None:
        if len(exit_layers) != len(cost.macs_per_second_to_exit):
            raise ConfigError(f"got {len(cost.macs_per_second_to_exit)} costs for {len(exit_layers)} exits")
        if not (math.isfinite(window_seconds) and window_seconds > 0):
            raise ConfigError(f"window_seconds must be a positive number, got {window_seconds!r}")
        self._cost = cost
        self._exit_layers = tuple(exit_layers)
        self._window_seconds = window_seconds
        self._target = target
        self._audio_seconds = 0.0
        self._spent_macs = 0.0
        self._saved_macs = 0.0
        self._budget, (self._rate, self._deepest) = budget, self._resolve(budget)

    @property
    def budget(self) -> Budget:
        return self._budget

    @property
    def max_exit(self) -> int:
        """Deepest exit index that `max_exit_layer` leaves open: a hard limit, whatever was saved."""
        return self._deepest

    @property
    def min_exit(self) -> int:
        """Exit index that load must leave open: the guaranteed minimum."""
        least = self._budget.min_exit_layer
        return 0 if least is None else max(0, self._exits_up_to(least))

    @property
    def setpoint(self) -> float | None:
        """Mean cost, as a fraction of full depth, that the policy should aim at now; None = as it likes."""
        if self._rate is None or not self._target:
            return None
        full = self._cost.full_macs_per_second
        return min(1.0, max(0.0, (self._rate + self._saved_macs / RETURN_SECONDS) / full))

    @property
    def spent_fraction(self) -> float:
        """MACs spent so far over those of full depth for the same audio; 0 before any audio."""
        full = self._cost.full_macs_per_second * self._audio_seconds
        return self._spent_macs / full if full else 0.0

    @property
    def saved_seconds(self) -> float:
        """Savings (or, negative, debt) in seconds of allowance; 0 without an average."""
        return self._saved_macs / self._rate if self._rate else 0.0

    def update(self, budget: Budget, cost: CostModel | None = None) -> None:
        """Replace the budget, and the cost model if a newer one is given; the next `ceiling` follows them.

        If the allowance changes, savings and debt are dropped: what a generous budget saved must not outlive it.

        Raises:
            ConfigError: as on construction; the old budget then stays in force.
        """
        before, self._cost = self._cost, cost or self._cost
        try:
            rate, deepest = self._resolve(budget)
        except ConfigError:
            self._cost = before
            raise
        if rate != self._rate:
            self._saved_macs = 0.0
        self._budget, self._rate, self._deepest = budget, rate, deepest

    def _resolve(self, budget: Budget) -> tuple[float | None, int]:
        """(MACs per audio second or None, deepest exit index) of `budget`."""
        deepest = len(self._exit_layers) - 1
        if budget.max_exit_layer is not None:
            deepest = self._exits_up_to(budget.max_exit_layer)
            if deepest < 0:
                raise ConfigError(
                    f"max_exit_layer={budget.max_exit_layer} is before the first exit; "
                    f"the least possible is {self._exit_layers[0]}"
                )
        first = self._cost.macs_per_second_to_exit[0] / self._cost.full_macs_per_second
        if budget.peak_depth is not None and budget.peak_depth < first * (1 - 1e-9):
            raise ConfigError(
                f"peak_depth={budget.peak_depth:g} is less than the first exit costs; "
                f"the least possible is {_round_up(first)}"
            )
        return self._cost.allowance(budget), deepest

    def _exits_up_to(self, layer: int) -> int:
        """Index of the deepest exit at or before `layer`; -1 if there is none."""
        return sum(exit_layer <= layer for exit_layer in self._exit_layers) - 1

    def ceiling(self, audio_seconds: float, costs_to_exit: Sequence[float]) -> int:
        """Deepest exit index the next chunk may use; changes nothing.

        Args:
            audio_seconds: length of the chunk.
            costs_to_exit: MACs of leaving at each exit for this chunk, whatever it has to catch up included.

        Raises:
            ConfigError: not one cost per exit.
        """
        if len(costs_to_exit) != len(self._exit_layers):
            raise ConfigError(f"got {len(costs_to_exit)} costs for {len(self._exit_layers)} exits")
        full = self._cost.full_macs_per_second
        available = math.inf if self._budget.peak_depth is None else self._budget.peak_depth * full * audio_seconds
        if self._rate is not None:
            lent = SWING_SECONDS * full if self._target else 0.0
            available = min(available, self._saved_macs + self._rate * audio_seconds + lent)
        exit_index = self._deepest
        while exit_index > 0 and costs_to_exit[exit_index] > available * (1 + 1e-9):
            exit_index -= 1
        return exit_index

    def floor(self, audio_seconds: float, costs_to_exit: Sequence[float]) -> int:
        """Least exit index of the next chunk: deeper than 0 only where a target would otherwise be missed from below.

        Args: as for `ceiling`, which has the last word where both disagree.
        """
        if self._rate is None or not self._target:
            return 0
        surplus = self._saved_macs + self._rate * audio_seconds - SWING_SECONDS * self._cost.full_macs_per_second
        exit_index = 0
        while exit_index < self._deepest and costs_to_exit[exit_index] < surplus:
            exit_index += 1
        return exit_index

    def spend(self, macs: float, audio_seconds: float, seconds: float | None = None) -> None:
        """Book `macs` spent on `audio_seconds` of new audio (0 for draining or catching up without any).

        `seconds`: how long that took. A real-time factor is kept in measured time, whatever the cost model expected.
        """
        self._audio_seconds += audio_seconds
        self._spent_macs += macs
        if self._budget.real_time_factor is not None and self._cost.seconds_per_mac is not None and seconds is not None:
            macs = seconds / self._cost.seconds_per_mac
        if self._rate is not None:
            full = self._cost.full_macs_per_second
            most = SWING_SECONDS * full if self._target else self._window_seconds * min(self._rate, 0.3 * full)
            self._saved_macs = min(most, self._saved_macs + self._rate * audio_seconds - macs)
