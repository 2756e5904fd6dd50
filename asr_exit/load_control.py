"""From the machine's load to an exit ceiling: depth is shed before streams are refused or fall behind.

The service measures, this module decides. No torch and no threads here; the clock is passed in.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from asr_exit.errors import ConfigError

HEADROOM = 0.8
DRAIN_SECONDS = 5.0
BUSY = 0.95
LOW_BATTERY = 0.2
DEVICE_MARGIN = 0.05  # of full depth that must be free again before heat or battery let depth rise
FALLEN = 0.4  # of a window's chunks in its second half: with fewer, the load goes just now
FEWEST_STEPS = 5  # in a window, from which to tell a step's fixed cost from the cost of each chunk in it
LEAST_SPREAD = 0.02  # of chunks per step, variance over mean squared, for the same
LEAST_MARGINAL = 0.3  # of a chunk's mean cost: never believe that it costs less


@dataclass(frozen=True, slots=True)
class LoadSignal:
    """One measurement, taken after an engine step (or while idle, with `step_ms` 0).

    Attributes:
        queue_delay_ms: longest wait of a served chunk after its audio was due. Audio sent faster than real time must
            not count: a file sent at once is no overload.
        step_ms: duration of the step.
        chunk_ms: audio per chunk, the shortest of the streams served; 0 if none was.
        ready_streams: streams with a chunk still waiting.
        free_slots: streams that could still be opened.
        cpu_fraction: use of all cores in [0, 1], None if unknown.
        gpu_fraction: use of the GPU in [0, 1], None if unknown or there is none.
        chunks: chunks served in the step; 0 if unknown.
        thermal_pressure: how much the device must throttle, from 0 (cool) to 1 (as little work as possible); only the
            caller knows. None = unknown.
        battery_fraction: charge left in [0, 1]; None = on mains, or unknown.

    `LoadController` looks at all but chunk length, ready streams and free slots, which describe the situation to other
    controllers and logs.

    Raises:
        ConfigError: a value is negative or not a number.
    """

    queue_delay_ms: float
    step_ms: float
    chunk_ms: float = 0.0
    ready_streams: int = 0
    free_slots: int = 0
    cpu_fraction: float | None = None
    gpu_fraction: float | None = None
    chunks: int = 0
    thermal_pressure: float | None = None
    battery_fraction: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"LoadSignal.{field.name} must be 0 or more, got {value!r}")

    @property
    def device_share(self) -> float:
        """Share of full-depth work that heat and battery leave, in [0, 1]; half at most on a battery that runs low."""
        share = 1.0 if self.thermal_pressure is None else max(0.0, 1.0 - self.thermal_pressure)
        if self.battery_fraction is not None and self.battery_fraction < LOW_BATTERY:
            share = min(share, 0.5 * self.battery_fraction / LOW_BATTERY)
        return share


class _Step(NamedTuple):
    at: float
    chunks: int
    seconds: float
    latency_ms: float


class LoadController:
    """Lowers the exit ceiling under pressure and raises it when load goes.

    Lowering: when two measurements in a row exceed the target latency (wait plus step). One exit; two when twice over
    the target; half of the rest when four times over. While the backlog shrinks fast enough to be gone in
    `DRAIN_SECONDS`, the ceiling is left alone.

    Raising: to the deepest exit whose predicted pressure stays within `HEADROOM`. Pressure is the larger of the worst
    latency over target and the share of time spent computing, both over the last `change_seconds`; the prediction grows
    in proportion to `costs`. The gap between headroom and target is the hysteresis. While others saturate the CPU or
    the GPU, one exit at a time. A server that steps as soon as anything is ready is busy long before it is full: it
    takes few chunks at a time, and each step has a fixed cost. Where steps differ in size, that part of the time does
    not count, because larger steps would save it.

    The worst chunk of a step counts, which is stricter than a p95 over chunks. One ceiling holds for all streams:
    nobody loses depth that others keep, save for what a request was guaranteed (`Budget.min_exit_layer`). Heat and
    battery limit the ceiling beside the load: down at once, up with a margin.

    A window within which the load went says little of what is to come: its second half is looked at again, with what
    comes after.

    The ceiling changes at most once per `change_seconds`. Not thread-safe.

    Args:
        num_exits: exits of the model.
        target_latency_ms: the latency to stay under.
        clock: monotonic seconds.
        costs: relative cost of leaving at each exit, rising; proportional to depth if not given.
        change_seconds: least time between two changes.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        num_exits: int,
        target_latency_ms: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        costs: Sequence[float] | None = None,
        change_seconds: float = 1.0,
    ) -> None:
        if num_exits < 1:
            raise ConfigError(f"num_exits={num_exits} must be 1 or more")
        for name, value in (("target_latency_ms", target_latency_ms), ("change_seconds", change_seconds)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a positive number, got {value!r}")
        self._costs = tuple(range(1, num_exits + 1)) if costs is None else tuple(costs)
        rising = all(low < high for low, high in itertools.pairwise(self._costs))
        if len(self._costs) != num_exits or self._costs[0] <= 0 or not rising:
            raise ConfigError(f"costs must be {num_exits} positive rising numbers, got {self._costs}")
        self._target_ms = target_latency_ms
        self._clock = clock
        self._change_seconds = change_seconds
        self._ceiling = num_exits - 1
        self._device_limit = num_exits - 1
        self._changed_at = -math.inf
        self._over_count = 0
        self._checked_at = -math.inf
        self._checked_latency_ms = 0.0
        self._window_start = clock()
        self._steps: list[_Step] = []  # of this window

    @property
    def ceiling(self) -> int:
        """Deepest exit index that load, heat and battery allow now."""
        return min(self._ceiling, self._device_limit)

    @property
    def target_latency_ms(self) -> float:
        """The latency to stay under."""
        return self._target_ms

    def update(self, signal: LoadSignal) -> None:
        """Take one measurement into account. Call after every step, and now and then while idle."""
        now = self._clock()
        latency_ms = signal.queue_delay_ms + signal.step_ms
        self._steps.append(_Step(now, signal.chunks, signal.step_ms / 1000.0, latency_ms))
        over = latency_ms > self._target_ms
        self._over_count = self._over_count + 1 if over else 0
        self._follow_device(now, signal.device_share)
        if self._over_count >= 2:
            self._lower(now, latency_ms)
        if now - self._window_start >= self._change_seconds:
            if not over:
                self._checked_at = -math.inf
                if not self._raise(now, max(signal.cpu_fraction or 0.0, signal.gpu_fraction or 0.0)):
                    return
            self._start_window(now)

    def _start_window(self, now: float) -> None:
        self._window_start = now
        self._steps = []

    def _may_change(self, now: float) -> bool:
        return now - self._changed_at >= self._change_seconds

    def _lower(self, now: float, latency_ms: float) -> None:
        elapsed = now - self._checked_at
        if elapsed < self._change_seconds or not self._may_change(now):
            return
        drained_ms = self._checked_latency_ms - latency_ms
        draining = drained_ms * DRAIN_SECONDS >= max(0.0, latency_ms - self._target_ms) * elapsed and drained_ms > 0
        first = math.isinf(elapsed)
        self._checked_at, self._checked_latency_ms = now, latency_ms
        if draining and not first:
            return
        over = latency_ms / self._target_ms
        steps = 1 if over < 2 else 2 if over < 4 else max(2, (self._ceiling + 1) // 2)
        self._set(max(0, self._ceiling - steps), now)

    def _follow_device(self, now: float, share: float) -> None:
        limit = max((k for k, cost in enumerate(self._costs) if cost <= share * self._costs[-1]), default=0)
        spare = share >= 1.0 or share - self._costs[limit] / self._costs[-1] >= DEVICE_MARGIN
        if limit != self._device_limit and (limit < self._device_limit or spare) and self._may_change(now):
            before, self._device_limit = self.ceiling, limit
            if self.ceiling != before:
                self._changed_at = now

    def _raise(self, now: float, busy: float) -> bool:
        """False where the load goes just now, and the window's second half allows more than all of it."""
        if not self._may_change(now):
            return True
        best = self._deepest(self._steps, now - self._window_start)
        middle = now - self._change_seconds / 2
        late = [step for step in self._steps if step.at > middle]
        if (
            sum(step.chunks for step in late) < FALLEN * sum(step.chunks for step in self._steps)
            and self._deepest(late, now - middle) > best
        ):
            self._steps, self._window_start = late, middle
            return False
        self._set(min(best, self._ceiling + 1) if busy >= BUSY else best, now)
        return True

    def _deepest(self, steps: Sequence[_Step], seconds: float) -> int:
        """Where the pressure of these steps, taken over so many seconds, would stay within the headroom."""
        worst_ms = max((step.latency_ms for step in steps), default=0.0)
        needed = needed_seconds([(step.chunks, step.seconds) for step in steps])
        pressure = max(worst_ms / self._target_ms, needed / seconds)
        allowed = HEADROOM * self._costs[self._ceiling]
        return max(
            (k for k in range(self._ceiling, len(self._costs)) if pressure * self._costs[k] <= allowed),
            default=self._ceiling,
        )

    def _set(self, ceiling: int, now: float) -> None:
        if ceiling != self._ceiling:
            self._ceiling = ceiling
            self._changed_at = now
            self._start_window(now)


def needed_seconds(steps: Sequence[tuple[int, float]]) -> float:
    """The time that these steps, (chunks, seconds) each, would take in large batches.

    Least squares of seconds over chunks; where the steps are too few or too much alike to tell, all of their time.
    """
    busy = math.fsum(seconds for _, seconds in steps)
    steps = [step for step in steps if step[0]]
    chunks = sum(count for count, _ in steps)
    if len(steps) < FEWEST_STEPS:
        return busy
    mean, mean_seconds = chunks / len(steps), math.fsum(seconds for _, seconds in steps) / len(steps)
    spread = sum((count - mean) ** 2 for count, _ in steps)
    if spread < LEAST_SPREAD * mean**2 * len(steps):
        return busy
    each = math.fsum((count - mean) * (seconds - mean_seconds) for count, seconds in steps) / spread
    return busy * min(1.0, max(LEAST_MARGINAL, each * mean / mean_seconds)) if mean_seconds else busy
