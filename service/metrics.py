"""Prometheus figures of one server, and the HTTP port they are read from."""

from __future__ import annotations

import time
from collections import Counter as CountOf
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from asr_exit.errors import ConfigError
from asr_exit.policy import Reason
from service.allocator import memory_in_use

if TYPE_CHECKING:
    from asr_exit.stream import StepOutput
    from service.config import MetricsConfig

_LATENCY_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)
_STEP_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)
_MEMORY_OF_STEPS = 0.98  # weight of the past in the real-time factor


class Metrics:
    """Any thread may add to it. Names carry their units; `serve` has nothing else that measures."""

    def __init__(self, exit_layers: Sequence[int], slots: int) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"asr_exit_{name}", text, registry=self.registry, buckets=buckets)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"asr_exit_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"asr_exit_{name}", text, labels, registry=self.registry)

        self._streams = gauge("streams", "Streams open now")
        self._ended = counter("streams_ended", "Streams that ended, by gRPC status", "code")
        self._refused = counter("refused", "Calls refused: slots, client, memory, load, draining or token", "reason")
        self._latency = histogram("chunk_latency_seconds", "From a chunk's last sample to its result", _LATENCY_S)
        self._queue = histogram("queue_delay_seconds", "Longest wait for the engine in a step", _LATENCY_S)
        self._step = histogram("step_seconds", "Duration of an engine step", _STEP_S)
        self._step_cpu = counter("step_cpu_seconds", "Processor time of the engine threads inside steps")
        self._process_cpu = gauge("process_cpu_seconds", "Processor time of the server until its last step ended")
        self._batch = histogram("step_streams", "Streams in an engine step", _BATCH)
        self._exit = histogram("exit_layer", "Layer after which a chunk left the encoder", exit_layers)
        self._decisions = counter("chunks", "Chunks recognised, by why they left where they did", "decision")
        self._shed = counter("shed", "Chunks that left early because of load")
        self._macs = counter("encoder_macs", "Multiply-accumulates spent in the encoder")
        self._audio = counter("audio_seconds", "Audio recognised")
        self._factor = gauge("real_time_factor", "Engine time per second of audio, over the last steps")
        self._exit_layers = tuple(exit_layers)
        self._ceiling = gauge("load_ceiling_layer", "Deepest layer that load allows")
        self._ceiling.set(exit_layers[-1])
        self._ceiling_changes = counter("load_ceiling_changes", "Times that load lowered or raised that layer")
        self._by_reason = {reason: self._decisions.labels(str(reason.value)) for reason in Reason}
        self._usual_factor = 0.0
        if memory_in_use() is not None:
            in_use = gauge("memory_in_use_bytes", "What the C library's allocator has given out and not got back")
            in_use.set_function(lambda: memory_in_use() or 0)
        gauge("slots", "Most streams at the same time").set(slots)

    def opened(self) -> None:
        """A stream was let in."""
        self._streams.inc()

    def ended(self, code: str) -> None:
        """A stream that was let in is over."""
        self._streams.dec()
        self._ended.labels(code).inc()

    def refused(self, reason: str) -> None:
        """A call was not let in."""
        self._refused.labels(reason).inc()

    def step(self, output: StepOutput, latencies_s: Sequence[float], late_s: float, cpu_s: float) -> None:
        """One engine step is over: its results and how long each took from its chunk's last sample on.

        `late_s` is how far the worst result is behind real-time pace.
        """
        for result, latency_s in zip(output.results, latencies_s, strict=True):
            self._latency.observe(latency_s)
            self._exit.observe(result.exit_layer)
        for reason, count in CountOf(result.reason for result in output.results).items():
            self._by_reason[reason].inc(count)
            if reason is Reason.LOAD:
                self._shed.inc(count)
        self._macs.inc(sum(result.encoder_macs for result in output.results))
        seconds = output.step_ms / 1000
        self._step.observe(seconds)
        self._step_cpu.inc(cpu_s)
        self._process_cpu.set(time.process_time())  # now, so that steps never seem to take more than the process did
        self._queue.observe(max(0.0, late_s - seconds))
        self._batch.observe(len(output.results))
        audio_s = sum(result.chunk_ms for result in output.results) / 1000
        if audio_s:
            self._audio.inc(audio_s)
            weight = _MEMORY_OF_STEPS if self._usual_factor else 0.0
            self._usual_factor = weight * self._usual_factor + (1 - weight) * seconds / audio_s
            self._factor.set(self._usual_factor)

    def ceiling(self, exit_index: int, *, changed: bool) -> None:
        """The deepest exit that load allows an engine from now on; `changed`: it allowed another one before."""
        self._ceiling.set(self._exit_layers[exit_index])
        self._ceiling_changes.inc(int(changed))

    def serve(self, config: MetricsConfig) -> Callable[[], None]:
        """Answer at /metrics on a thread of its own; returns what stops that. Raises ConfigError for a taken port."""
        try:
            server, thread = start_http_server(config.port, config.host, self.registry)
        except OSError as error:
            raise ConfigError(f"cannot serve metrics on {config.host}:{config.port}: {error.strerror}") from None

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop
