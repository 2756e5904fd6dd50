"""Steady load for a long time: does memory grow, do answers come later?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from service.bench.load import Trial, run_trial
from service.bench.served import ServedProcess
from service.bench.speakers import Speech
from service.client import StreamSettings

MEMORY_BAR_MB = 1.0  # in ten minutes
DRIFT_BAR = 0.2
_EVERY_S = 5.0
_MESSAGE_MS = 160


@dataclass(frozen=True)
class SoakReport:
    """Memory and latency over time."""

    trial: Trial
    rss_mb: list[tuple[float, float]]  # (second, resident memory)
    slope_mb: float  # in ten minutes, fitted to the second half of the time that streams ran
    in_use_mb: list[tuple[float, float]]  # (second, memory given out and not got back); empty where nobody tells
    in_use_slope_mb: float | None  # as `slope_mb`: what is resident also holds free memory, which comes and goes
    latency_first_ms: float  # p50 of the first third
    latency_last_ms: float  # p50 of the last third

    @property
    def drift(self) -> float:
        """Relative change of the median latency."""
        return self.latency_last_ms / self.latency_first_ms - 1

    @property
    def holds(self) -> bool:
        """Neither memory nor latency grew beyond its bar, and no stream failed."""
        return self.slope_mb < MEMORY_BAR_MB and self.drift < DRIFT_BAR and not self.trial.errors


def measure_soak(
    server: ServedProcess,
    speeches: Sequence[Speech],
    settings: StreamSettings,
    *,
    streams: int,
    minutes: float,
    on_sample: Callable[[], None] = lambda: None,
) -> SoakReport:
    """Run `streams` clients for `minutes`."""
    stop, begin = threading.Event(), time.monotonic()
    resident: list[tuple[float, float]] = []
    in_use: list[tuple[float, float]] = []
    warm_up_s, seconds = min(30.0, 6 * minutes), 60 * minutes

    def watch() -> None:
        while not stop.wait(min(_EVERY_S, 6 * minutes)):
            resident.append((time.monotonic() - begin, server.usage().rss_mb))
            if (used_mb := server.memory_in_use_mb()) is not None:
                in_use.append((time.monotonic() - begin, used_mb))
            on_sample()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        trial, heard = run_trial(
            server,
            speeches,
            settings,
            streams=streams,
            warm_up_s=warm_up_s,
            seconds=seconds,
            message_ms=_MESSAGE_MS,
        )
    finally:
        stop.set()
        watcher.join()
    third = 20 * minutes
    first = [latency for when, latency in heard.chunk_ms if when < third]
    last = [latency for when, latency in heard.chunk_ms if when > 2 * third]
    return SoakReport(
        trial=trial,
        rss_mb=resident,
        slope_mb=slope_in_ten_minutes(resident, until=warm_up_s + seconds),
        in_use_mb=in_use,
        in_use_slope_mb=slope_in_ten_minutes(in_use, until=warm_up_s + seconds) if in_use else None,
        latency_first_ms=float(np.median(first)),
        latency_last_ms=float(np.median(last)),
    )


def slope_in_ten_minutes(samples: Sequence[tuple[float, float]], until: float) -> float:
    """Least squares through the second half of the (second, value) pairs no later than second `until`.

    What comes before is still warming up; afterwards the streams end, all at once, which is another question.
    """
    loaded = [sample for sample in samples if sample[0] <= until]
    half = loaded[len(loaded) // 2 :]
    if len(half) < 2:
        return 0.0
    seconds, values = np.array(half).T
    return float(np.polyfit(seconds, values, 1)[0] * 600)
