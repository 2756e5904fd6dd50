"""Measures how busy the server is and asks the library how deep it may still go."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from asr_exit.load_control import LoadController, LoadSignal

if TYPE_CHECKING:
    from asr_exit.stream import StepOutput

_CPU_EVERY_S = 1.0
_OVERLOAD_LASTS_S = 1.0  # unless the next steps are late, too


class LoadMonitor:
    """Turns what the engine thread sees after each step into the load ceiling for the next one."""

    def __init__(self, controller: LoadController, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._controller = controller
        self._clock = clock
        self._cpu_at = float("-inf")
        self._cpu_fraction: float | None = None
        self._over_until = float("-inf")

    def after_step(self, output: StepOutput, late_ms: float, *, ready_streams: int, free_slots: int) -> int:
        """Returns the deepest exit index allowed from now on.

        `late_ms` is how far the worst result of the step is behind real-time pace. What is left of it without the step
        itself is time spent waiting for the engine.
        """
        if output.results:
            if self._controller.ceiling == 0 and late_ms > self._controller.target_latency_ms:
                self._over_until = self._clock() + _OVERLOAD_LASTS_S
            self._controller.update(
                LoadSignal(
                    queue_delay_ms=max(0.0, late_ms - output.step_ms),
                    step_ms=output.step_ms,
                    chunk_ms=min(result.stream.options.chunk_ms for result in output.results),
                    ready_streams=ready_streams,
                    free_slots=free_slots,
                    cpu_fraction=self._cpu(),
                )
            )
        return self._controller.ceiling

    @property
    def overloaded(self) -> bool:
        """True when results were late in the last second although every chunk left at the first exit."""
        return self._clock() < self._over_until

    def _cpu(self) -> float | None:
        now = self._clock()
        if now - self._cpu_at >= _CPU_EVERY_S:
            import psutil

            self._cpu_at = now
            self._cpu_fraction = psutil.cpu_percent(interval=None) / 100.0
        return self._cpu_fraction
