"""The load test: how many real-time streams a server on one core holds at a given latency, and how well it hears then.

Every trial runs so many simulated clients against the same server. The search doubles their number until the latency
bar breaks and bisects between the last two, within a bounded number of trials.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from asr_exit.metrics import wer
from asr_exit.tokenizer import normalise
from service.bench.served import ServedProcess
from service.bench.speakers import Heard, Speakers, Speech
from service.client import StreamSettings

QUANTILES = (50, 95, 99)
GENERATOR_BAR = 0.01  # share of messages sent late beyond which a trial is not the server's doing


@dataclass(frozen=True)
class Trial:
    """One number of streams. Quantiles p50, p95, p99 in milliseconds; None where nothing was seen."""

    streams: int
    seconds: float
    chunks: int
    chunk_latency_ms: tuple[float, ...] | None
    mean_latency_ms: float
    first_partial_ms: tuple[float, ...] | None
    end_of_speech_ms: tuple[float, ...] | None
    word_error_rate: float | None  # of the utterances begun and ended while it counted
    words: int
    chunks_by_layer: dict[int, int]
    chunks_by_decision: dict[str, int]
    errors: dict[str, int]
    generator_late: float  # share of messages sent over 100 ms late
    cpu_share: float  # of one core, by the whole server process
    overhead_share: float  # of the server's processor time: outside engine steps (gRPC, scheduling, decoding)
    streams_per_step: float
    rss_mb: float
    server_latency_ms: float  # mean, as the server counts it: what the clients see beyond it waits outside the engine
    encoder_gmacs_per_second: float  # billions of multiply-accumulates per second of processor time inside steps
    policy: str = ""  # empty: the server's

    def holds(self, latency_ms: float) -> bool:
        """Whether p99 stays within `latency_ms` without an error."""
        return self.chunk_latency_ms is not None and self.chunk_latency_ms[-1] <= latency_ms and not self.errors


def quantiles(values: Sequence[float]) -> tuple[float, ...] | None:
    """p50, p95 and p99."""
    return tuple(float(value) for value in np.percentile(values, QUANTILES)) if values else None


def run_trial(
    server: ServedProcess,
    speeches: Sequence[Speech],
    settings: StreamSettings,
    *,
    streams: int,
    warm_up_s: float,
    seconds: float,
    message_ms: int,
) -> tuple[Trial, Heard]:
    """Load the server with `streams` clients for `seconds`."""

    async def trial() -> tuple[Heard, dict[str, float], dict[str, float], float]:
        speakers = Speakers(server.address, speeches, settings, message_ms)
        task = asyncio.create_task(speakers.run(streams, warm_up_s, seconds))
        await asyncio.sleep(warm_up_s)
        before, cpu_before = await asyncio.to_thread(server.figures), server.usage().cpu_s
        await asyncio.sleep(seconds)
        after, used = await asyncio.to_thread(server.figures), server.usage().cpu_s - cpu_before
        return await task, before, after, used

    heard, before, after, cpu_s = asyncio.run(trial())

    def grown(name: str) -> float:
        return after.get(f"asr_exit_{name}", 0.0) - before.get(f"asr_exit_{name}", 0.0)

    errors = wer(list(map(normalise, heard.references)), heard.hypotheses) if heard.references else None
    messages = max(1.0, streams * 1000 * seconds / message_ms)
    latencies = [latency for _, latency in heard.chunk_ms]
    result = Trial(
        streams=streams,
        seconds=seconds,
        chunks=len(heard.chunk_ms),
        chunk_latency_ms=quantiles(latencies),
        mean_latency_ms=float(np.mean(latencies)) if latencies else 0.0,
        first_partial_ms=quantiles(heard.first_partial_ms),
        end_of_speech_ms=quantiles(heard.end_ms),
        word_error_rate=errors.rate if errors else None,
        words=errors.words if errors else 0,
        chunks_by_layer=dict(sorted(heard.layers.items())),
        chunks_by_decision=dict(heard.decisions),
        errors=dict(heard.errors),
        generator_late=heard.late_sends / messages,
        cpu_share=cpu_s / seconds,
        overhead_share=1 - grown("step_cpu_seconds_total") / max(1e-9, grown("process_cpu_seconds")),
        streams_per_step=grown("step_streams_sum") / max(1.0, grown("step_streams_count")),
        rss_mb=server.usage().rss_mb,
        server_latency_ms=1000 * grown("chunk_latency_seconds_sum") / max(1.0, grown("chunk_latency_seconds_count")),
        encoder_gmacs_per_second=grown("encoder_macs_total") / max(1e-9, grown("step_cpu_seconds_total")) / 1e9,
        policy=settings.policy,
    )
    return result, heard


def search(run: Callable[[int], Trial], *, start: int, most: int, latency_ms: float, trials: int) -> list[Trial]:
    """Trials in the order they were run; the best is the largest that holds (see `best`)."""
    done: list[Trial] = []
    low, high, streams = 0, most + 1, min(start, most)
    while len(done) < trials and low < streams < high:
        done.append(run(streams))
        if done[-1].holds(latency_ms):
            low = streams
            streams = min(2 * streams, most) if high > most else (low + high) // 2
        else:
            high = streams
            streams = (low + high) // 2
        if high - low <= max(1, high // 32):  # finer steps would measure chance
            break
    return done


def best(trials: Sequence[Trial], latency_ms: float) -> Trial | None:
    """The largest number of streams that held the bar."""
    return max((trial for trial in trials if trial.holds(latency_ms)), key=lambda trial: trial.streams, default=None)


def plot(trials: Sequence[Trial], latency_ms: float, path: str) -> None:
    """Latency over streams, and the depth of the best trial. Raises ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure

    seen = sorted((trial for trial in trials if trial.chunk_latency_ms), key=lambda trial: trial.streams)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, quantile in enumerate(QUANTILES):
        values = [trial.chunk_latency_ms[index] for trial in seen if trial.chunk_latency_ms]
        left.plot([trial.streams for trial in seen], values, marker="o", label=f"p{quantile}")
    left.axhline(latency_ms, color="grey", linestyle="--")
    left.set(xlabel="real-time streams", ylabel="chunk latency, ms", yscale="log", ylim=(1, None))
    left.legend()
    shown = best(trials, latency_ms) or (seen[0] if seen else None)
    if shown is not None:
        total = max(1, sum(shown.chunks_by_layer.values()))
        layers = [str(layer) for layer in shown.chunks_by_layer]
        right.bar(layers, [100 * count / total for count in shown.chunks_by_layer.values()])
        right.set(xlabel="exit layer", ylabel="chunks, %", title=f"{shown.streams} streams")
    figure.savefig(path)


def as_json(trial: Trial) -> dict[str, object]:
    """For a report."""
    return asdict(trial)
