"""Recognition on the device: samples in, captions out, in the caller's thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np

from asr_exit.budget import Budget
from asr_exit.edge.backend import EdgeModel
from asr_exit.edge.device import DeviceState
from asr_exit.engine import Engine
from asr_exit.errors import StreamStateError
from asr_exit.load_control import LoadController, LoadSignal
from asr_exit.stream import ChunkResult, Fill, StepOutput, Stream, StreamOptions
from asr_exit.transcript import Transcript, transcribe

_WARM_UP_CHUNKS, _MEASURED_CHUNKS = 3, 40
_PUSHES_PER_CHUNK = 32  # audio callbacks are short
_HEADROOM = 1.15  # real speech writes text, and a minute is rougher than the moment in which this is measured
_WORTH_LOADING = 0.1  # of the chunks: what a budget of time lets go deeper less often is not loaded at all


class EdgeRecognizer:
    """One stream at a time over an exported model. Not thread-safe; everything runs in the calling thread.

        recognizer = EdgeRecognizer("edge-model", StreamOptions(budget=Budget(mean_depth=0.5)))
        for samples in microphone:
            for result in recognizer.push(samples):
                print(result.committed, result.tail, result.exit_layer, result.reason)
        results = recognizer.finish()

    The same streams as on a server: text, exits, reasons, budgets and costs come from the same engine.
    """

    def __init__(
        self,
        model: EdgeModel | Path | str,
        options: StreamOptions | None = None,
        *,
        threads: int = 1,
        target_latency_ms: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing but the manifest is read here.

        Args:
            options: of every stream, unless `begin` is given others; default: the chunk size of the export, full
                depth, and the fill `propagate`.
            threads: of ONNX Runtime, when `model` is a folder.
            target_latency_ms: depth is shed while chunks take longer than this; default: half a chunk.

        Raises:
            CheckpointError: no export there. ConfigError: options that the model cannot meet.
        """
        self.model = model if isinstance(model, EdgeModel) else EdgeModel(model, threads=threads)
        self.options = options or StreamOptions(chunk_ms=self.model.manifest.chunk_ms, fill=Fill.PROPAGATE)
        self.engine = Engine(self.model, slots=1)
        config = self.model.config
        frames = config.chunk_frames(self.options.chunk_ms)
        self._costs = [float(self.model.macs.to_exit(index, frames)) for index in range(config.num_exits)]
        target = target_latency_ms or self.options.chunk_ms / 2
        self._load = LoadController(config.num_exits, target, clock, costs=self._costs)
        self._device = DeviceState()
        self._stream: Stream | None = None
        self._first_exit_seconds: dict[tuple[float, Fill], float] = {}  # by chunk size and fill

    def begin(self, options: StreamOptions | None = None) -> None:
        """Start a stream with its own options. `push` starts one by itself where none is open.

        Raises:
            ConfigError: options that this model or device cannot meet. StreamStateError: one is open already.
        """
        if self._stream is not None:
            raise StreamStateError("a stream is open; call finish() or close() before the next one")
        self._stream = self.engine.open(self._granted(options or self.options))

    def push(self, samples: np.ndarray) -> list[ChunkResult]:
        """Take (N,) float32 samples at the model's rate, any N; returns the results of the chunks that are complete.

        Raises:
            AudioError: samples of the wrong type or not finite. EngineError: computation failed; the stream is closed.
        """
        if self._stream is None:
            self.begin()
        assert self._stream is not None
        self.engine.push(self._stream, samples)
        return self._run(self._stream)

    def finish(self) -> list[ChunkResult]:
        """The audio ends here; returns the last results. The next `push` starts another stream."""
        if self._stream is None:
            return []
        self.engine.finish(self._stream)
        results = self._run(self._stream)
        self.close()
        return results

    def close(self) -> None:
        """Drop the open stream, if any, without its last results."""
        if self._stream is not None:
            self.engine.close(self._stream)
            self._stream = None

    def transcribe(self, samples: np.ndarray, options: StreamOptions | None = None) -> Transcript:
        """A whole recording, (N,) float32 at the model's rate. Errors as in `begin` and `push`."""
        if self._stream is not None:
            raise StreamStateError("a stream is open; call finish() or close() before the next one")
        return transcribe(self.engine, samples, self._granted(options or self.options))

    def set_budget(self, budget: Budget) -> None:
        """Change the budget of the open stream from its next chunk on, and of those after it.

        Raises:
            ConfigError: it cannot be met; the message says what the least possible is.
        """
        options = replace(self.options, budget=budget)
        granted = self._granted(options)
        if self._stream is not None:
            self.engine.set_budget(self._stream, granted.budget)
        else:
            self.engine.close(self.engine.open(granted))  # refuses now what the next stream could not meet
        self.options = options

    def least_real_time_factor(self, options: StreamOptions | None = None) -> float:
        """Compute seconds per second of audio when every chunk leaves at the first exit: the least budget of time that
        streams with `options` can have here. Measured on first use, in a fraction of a second."""
        options = options or self.options
        seconds = self._measure(options)
        return 1000 * seconds / options.chunk_ms

    def set_device_state(self, state: DeviceState) -> None:
        """Tell how warm the device is and how full its battery; depth follows from the next chunk on."""
        self._device = state
        self._apply_load()

    def _run(self, stream: Stream) -> list[ChunkResult]:
        """Step until nothing is ready. What waits behind the first chunk came in one push: it is not late."""
        results: list[ChunkResult] = []
        while self.engine.ready():
            output = self.engine.step()
            for _, failure in output.failures:
                self._stream = None
                raise failure
            results += output.results
            self._observe(stream, output)
        return results

    def _observe(self, stream: Stream, output: StepOutput) -> None:
        self._load.update(LoadSignal(0.0, output.step_ms, stream.options.chunk_ms))
        self._apply_load()

    def _apply_load(self) -> None:
        self.engine.set_load_ceiling(min(self._load.ceiling, self._device.ceiling(self._costs)))

    def _granted(self, options: StreamOptions) -> StreamOptions:
        """What a stream with `options` runs with. Under a budget of time, graphs are loaded here, not between two
        chunks, and exits that the budget allows too seldom to be worth loading stay closed."""
        budget, config = options.budget, self.model.config
        if budget.real_time_factor is None:
            return options
        first = self._measure(options)
        share = budget.real_time_factor * options.chunk_ms / 1000 / first
        frames = config.chunk_frames(options.chunk_ms)
        costs = [self.model.macs.to_exit(index, frames) for index in range(config.num_exits)]
        deepest = max(
            i for i, cost in enumerate(costs) if i == 0 or share >= 1 + _WORTH_LOADING * (cost / costs[0] - 1)
        )
        layer = max(config.exit_layers[deepest], budget.min_exit_layer or 0)
        layer = min(layer, budget.max_exit_layer or layer)
        self.model.load(sum(exit_layer <= layer for exit_layer in config.exit_layers), options.fill)
        return replace(options, budget=replace(budget, max_exit_layer=layer))

    def _measure(self, options: StreamOptions) -> float:
        """Seconds for a chunk that leaves at the first exit, with everything around it; the cost model follows.

        Deeper exits may cost less per operation: a budget of time books what chunks really took.
        """
        key, config = (options.chunk_ms, options.fill), self.model.config
        frames = config.chunk_frames(options.chunk_ms)
        if key not in self._first_exit_seconds:
            shallow = replace(options, budget=Budget(max_exit_layer=config.exit_layers[0]))
            engine, seconds = Engine(self.model, slots=1), []
            stream = engine.open(shallow)
            sweep = 0.1 * np.sin(1e-4 * np.arange(frames * config.samples_per_frame) ** 2)  # numpy.random is 4 MB
            for _ in range(_WARM_UP_CHUNKS + _MEASURED_CHUNKS):
                begin = time.perf_counter()
                for part in np.array_split(sweep.astype(np.float32), _PUSHES_PER_CHUNK):
                    engine.push(stream, part)
                output = engine.step()
                seconds.append(time.perf_counter() - begin)
                for _, failure in output.failures:
                    raise failure
            self._first_exit_seconds[key] = _HEADROOM * fmean(seconds[_WARM_UP_CHUNKS:])
        macs = self.model.macs.to_exit(0, frames)
        self.engine.seconds_per_mac = self._first_exit_seconds[key] / macs
        return self._first_exit_seconds[key]
