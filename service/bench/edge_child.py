"""A process that does nothing but transcribe one stream on the device path, and says what that took.

    python -m service.bench.edge_child DIR AUDIO.npy POLICY BUDGET FILL CHUNK_MS

AUDIO.npy holds float32 samples at the model's rate; they go in as a microphone would hand them over, 20 ms at a time.
BUDGET "least" is the least real-time factor that the first exit allows. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime  # noqa: F401  (belongs to what memory is compared with)

CALLBACK_SECONDS = 0.02


def memory_mb(field: str) -> float:
    """`VmHWM` (peak) or `VmRSS` (now) of this process in MB; 0 where the system has no /proc."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0.0
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def main(arguments: list[str]) -> None:
    """See the module."""
    bare_mb = memory_mb("VmRSS:")
    from asr_exit.budget import Budget
    from asr_exit.edge import EdgeRecognizer
    from asr_exit.policy import parse_policy
    from asr_exit.stream import Fill, StreamOptions

    folder, audio, policy, budget, fill, chunk_ms = arguments
    samples = np.load(audio, mmap_mode="r")
    recognizer = EdgeRecognizer(folder, target_latency_ms=60_000)  # what a chunk costs is measured, not shed
    model = recognizer.model
    options = StreamOptions(
        chunk_ms=float(chunk_ms),
        policy=parse_policy(policy, exit_layers=model.config.exit_layers, calibration=model.calibration),
        fill=Fill.parse(fill),
    )
    least = recognizer.least_real_time_factor(options)
    granted = Budget(real_time_factor=least) if budget == "least" else Budget.parse(budget) if budget else Budget()
    recognizer.begin(StreamOptions(options.chunk_ms, options.policy, granted, options.fill))
    size = round(CALLBACK_SECONDS * model.config.features.sample_rate_hertz)
    results, latencies, begin, before = [], [], time.perf_counter(), os.times()
    for start in range(0, len(samples), size):
        at = time.perf_counter()
        found = recognizer.push(np.array(samples[start : start + size]))
        if found:
            latencies.append(1000 * (time.perf_counter() - at))
        results += found
    results += recognizer.finish()
    seconds, after = time.perf_counter() - begin, os.times()
    audio_seconds = len(samples) / model.config.features.sample_rate_hertz
    layers = [result.exit_layer for result in results if result.chunk_ms > 0]
    tenth = max(1, len(latencies) // 10)
    values = {
        "audio_seconds": audio_seconds,
        "real_time_factor": seconds / audio_seconds,
        "cpu_seconds": after.user + after.system - before.user - before.system,
        "real_time_budget": granted.real_time_factor,
        "least_real_time_factor": least,
        "latency_ms_p50": float(np.median(latencies)) if latencies else 0.0,
        "latency_ms_p95": float(np.quantile(latencies, 0.95)) if latencies else 0.0,
        "latency_ms_first_tenth": float(np.median(latencies[:tenth])) if latencies else 0.0,
        "latency_ms_last_tenth": float(np.median(latencies[-tenth:])) if latencies else 0.0,
        "peak_rss_mb": memory_mb("VmHWM:"),
        "bare_rss_mb": bare_mb,
        "bytes_read": model.sessions.bytes_read,
        "graphs_loaded": len(model.sessions.loaded),
        "encoder_macs_per_second": sum(result.encoder_macs for result in results) / audio_seconds,
        "mean_exit_layer": sum(layers) / max(1, len(layers)),
        "words": sum(len(result.words) for result in results if result.is_final),
    }
    print(json.dumps(values))


if __name__ == "__main__":
    main(sys.argv[1:])
