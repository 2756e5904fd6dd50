"""A scripted engine with the real one's interface: what a session or the engine thread does wrong shows at once."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from asr_exit.budget import Budget
from asr_exit.errors import CapacityError, StreamStateError
from asr_exit.policy import Reason
from asr_exit.stream import ChunkResult, StepOutput, StreamOptions


@dataclass(eq=False)
class FakeStream:
    """Counts samples; `script` maps a chunk index to what goes wrong there."""

    options: StreamOptions
    number: int
    samples: int = 0
    done: int = 0
    finished: bool = False
    ended: bool = False
    closed: bool = False
    budgets: list[Budget] = field(default_factory=list)


class FakeEngine:
    """Every chunk says "wN"; every `final_every`-th ends an utterance. Not thread-safe, like the real one."""

    def __init__(self, slots: int = 4, final_every: int = 0) -> None:
        self.slots = slots
        self.backend = None  # nothing computes here
        self.final_every = final_every
        self.streams: list[FakeStream] = []
        self.opened: list[FakeStream] = []
        self.pushed: list[tuple[int, int]] = []  # stream number and samples, of every push
        self.fail_at: dict[tuple[int, int], Exception] = {}  # (stream number, chunk) -> its failure
        self.raise_in_step: Exception | None = None
        self.paused = False
        self.gate = threading.Event()  # cleared: the engine thread hangs in `push`
        self.gate.set()
        self.load_ceiling: int | None = None

    @property
    def free_slots(self) -> int:
        return self.slots - len(self.streams)

    def open(self, options: StreamOptions) -> FakeStream:
        if not self.free_slots:
            raise CapacityError(f"all {self.slots} slots are in use")
        stream = FakeStream(options, len(self.opened))
        self.streams.append(stream)
        self.opened.append(stream)
        return stream

    def push(self, stream: FakeStream, samples: np.ndarray) -> None:
        if stream.finished or stream.closed:
            raise StreamStateError("finished")
        assert samples.dtype == np.float32
        self.gate.wait()
        self.pushed.append((stream.number, samples.size))
        stream.samples += samples.size

    def finish(self, stream: FakeStream) -> None:
        stream.finished = True

    def close(self, stream: FakeStream) -> None:
        if not stream.closed:
            stream.closed = True
            self.streams.remove(stream)

    def set_budget(self, stream: FakeStream, budget: Budget) -> None:
        stream.budgets.append(budget)

    def set_load_ceiling(self, exit_index: int | None) -> None:
        self.load_ceiling = exit_index

    def ready(self) -> int:
        return sum(map(self.is_ready, self.streams))

    def catch_up(self) -> bool:
        return False

    def step(self, streams: list[FakeStream] | None = None) -> StepOutput:
        if self.raise_in_step:
            error, self.raise_in_step = self.raise_in_step, None
            raise error
        results, failures = [], []
        for stream in [stream for stream in streams or list(self.streams) if self.is_ready(stream)]:
            failure = self.fail_at.get((stream.number, stream.done))
            if failure:
                self.close(stream)
                failures.append((stream, failure))
            else:
                results.append(self._result(stream))
        return StepOutput(results, failures, step_ms=1.0)  # type: ignore[arg-type]

    def _chunk_samples(self, stream: FakeStream) -> int:
        return int(16 * stream.options.chunk_ms)

    def is_ready(self, stream: FakeStream) -> bool:
        return not (stream.ended or self.paused) and (
            stream.finished or stream.samples >= (stream.done + 1) * self._chunk_samples(stream)
        )

    def _result(self, stream: FakeStream) -> ChunkResult:
        chunk = self._chunk_samples(stream)
        index, start = stream.done, min(stream.samples, stream.done * chunk)
        end = min(stream.samples, start + chunk)
        stream.done += 1
        stream.ended = stream.finished and end == stream.samples
        final = stream.ended or bool(self.final_every and stream.done % self.final_every == 0)
        first = index - index % self.final_every if self.final_every else 0
        text = " ".join(f"w{number}" for number in range(first, index + 1))
        return ChunkResult(
            stream=stream,  # type: ignore[arg-type]
            chunk_index=index,
            chunk_ms=(end - start) / 16,
            start_ms=start / 16,
            end_ms=end / 16,
            exit_layer=2,
            reason=Reason.CONFIDENT,
            encoder_macs=100,
            committed=text if final else "",
            tail="" if final else text,
            words=(),
            is_final=final,
            end_of_stream=stream.ended,
            stability=1.0 if final else 0.5,
        )
