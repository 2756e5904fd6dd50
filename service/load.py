"""Measures how busy the server is and asks the library how deep it may still go."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from asr_exit.load_control import LoadController, LoadSignal

if TYPE_CHECKING:
    from asr_exit.stream import StepOutput

_USAGE_EVERY_S = 0.5  # the ceiling is thought about once a second: no use of a time long gone
_OVERLOAD_LASTS_S = 1.0  # unless the next steps are late, too


class LoadMonitor:
    """Turns what the engine thread sees after each step into the load ceiling for the next one."""

    def __init__(
        self,
        controller: LoadController,
        *,
        clock: Callable[[], float] = time.monotonic,
        usage: Callable[[], tuple[float | None, float | None]] | None = None,
    ) -> None:
        """`usage` returns the use of CPU and GPU in [0, 1], None where unknown; asked twice a second."""
        self._controller = controller
        self._clock = clock
        self._ask_usage = usage or machine_usage
        self._usage_at = float("-inf")
        self._usage: tuple[float | None, float | None] = (None, None)
        self._over_until = float("-inf")

    def after_step(self, output: StepOutput, late_ms: float, *, ready_streams: int, free_slots: int) -> int:
        """Returns the deepest exit index allowed from now on.

        `late_ms` is how far the worst result of the step is behind real-time pace. What is left of it without the step
        itself is time spent waiting for the engine.
        """
        if output.results:
            cpu, gpu = self._use()
            if self._controller.ceiling == 0 and late_ms > self._controller.target_latency_ms:
                self._over_until = self._clock() + _OVERLOAD_LASTS_S
            self._controller.update(
                LoadSignal(
                    queue_delay_ms=max(0.0, late_ms - output.step_ms),
                    step_ms=output.step_ms,
                    chunks=len(output.results),
                    chunk_ms=min(result.stream.options.chunk_ms for result in output.results),
                    ready_streams=ready_streams,
                    free_slots=free_slots,
                    cpu_fraction=cpu,
                    gpu_fraction=gpu,
                )
            )
        return self._controller.ceiling

    @property
    def overloaded(self) -> bool:
        """True when results were late in the last second although every chunk left at the first exit."""
        return self._clock() < self._over_until

    def _use(self) -> tuple[float | None, float | None]:
        now = self._clock()
        if now - self._usage_at >= _USAGE_EVERY_S:
            self._usage_at, self._usage = now, self._ask_usage()
        return self._usage


def machine_usage() -> tuple[float | None, float | None]:
    """Use of all cores since the last call, and of the busiest NVIDIA GPU; None where there is none or no NVML."""
    import psutil

    return psutil.cpu_percent(interval=None) / 100.0, _gpu_fraction()


def _gpu_fraction() -> float | None:
    try:
        import pynvml

        pynvml.nvmlInit()  # counted by NVML: cheap when done before
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return max((pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100.0 for handle in handles), default=None)
    except Exception:  # no package, no driver, no device: all the same to the controller
        return None
