"""One stream for hours: does memory grow, do steps get slower?

Audio goes in as fast as it is recognised, a chunk at a time, a repeated recording under noise that never repeats.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import psutil

from asr_exit.engine import Engine
from asr_exit.stream import StreamOptions
from service.bench.streams import looped

GROWTH_BAR_MB = 5.0
NOISE_AMPLITUDE = 1e-3
_MB = 1e6


@dataclass(frozen=True)
class MemoryReport:
    """Resident memory of the process, and time per step."""

    hours: float  # of audio
    steps: int
    words: int
    rss_settled_mb: float  # after the first minute of audio
    rss_end_mb: float
    rss_peak_mb: float  # of the samples taken once a minute of audio
    step_first_ms: float  # median of the first tenth of the steps
    step_last_ms: float  # median of the last tenth
    real_time_factor: float

    @property
    def growth_mb(self) -> float:
        """From the first minute to the end."""
        return self.rss_end_mb - self.rss_settled_mb

    @property
    def drift(self) -> float:
        """Relative change of the step time; 0.1 = steps became a tenth slower."""
        return self.step_last_ms / self.step_first_ms - 1

    @property
    def holds(self) -> bool:
        """Growth within the bar."""
        return self.growth_mb <= GROWTH_BAR_MB


def measure_memory(
    engine: Engine,
    samples: np.ndarray,
    *,
    hours: float,
    options: StreamOptions,
    on_minute: Callable[[], None] = lambda: None,
) -> MemoryReport:
    """Stream `hours` of audio made of (N,) float32 samples at the model's rate. Raises EngineError on failure.

    The figures are taken after the first minute of audio (for less than two minutes: after half of it).
    """
    config = engine.config
    chunk_samples = config.chunk_frames(options.chunk_ms) * config.samples_per_frame
    minute = 60 * config.features.sample_rate_hertz
    total = max(2 * chunk_samples, round(hours * 60 * minute))
    settled_at, rng = min(minute, total // 2), np.random.default_rng(0)
    stream = engine.open(options)
    step_ms = np.zeros(-(-total // chunk_samples) + 1)
    fed, steps, words, settled, peak, begin = 0, 0, 0, 0.0, 0.0, time.perf_counter()
    while not stream.ended:
        if fed < total:
            length = min(chunk_samples, total - fed)
            noise = NOISE_AMPLITUDE * rng.standard_normal(length, np.float32)
            engine.push(stream, looped(samples, fed, length) + noise)
            before, fed = fed, fed + length
            if before < settled_at <= fed:
                settled = peak = _rss_mb()
            elif before // minute != fed // minute:
                peak = max(peak, _rss_mb())
                on_minute()
        else:
            engine.finish(stream)
        if not engine.ready():
            continue
        output = engine.step()
        if output.failures:
            raise output.failures[0][1]
        step_ms[steps] = output.step_ms
        steps += 1
        words += sum(len(result.words) for result in output.results if result.is_final)
    seconds = time.perf_counter() - begin
    end = _rss_mb()
    engine.close(stream)
    tenth = max(1, steps // 10)
    return MemoryReport(
        hours=total / minute / 60,
        steps=steps,
        words=words,
        rss_settled_mb=settled,
        rss_end_mb=end,
        rss_peak_mb=max(peak, end),
        step_first_ms=float(np.median(step_ms[:tenth])),
        step_last_ms=float(np.median(step_ms[steps - tenth : steps])),
        real_time_factor=seconds * config.features.sample_rate_hertz / total,
    )


def _rss_mb() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss) / _MB
