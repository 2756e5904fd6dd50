"""Which streams go into the next step, and when it begins: oldest audio first, bounded batches, bounded waiting.

A stream is offered when a whole chunk of it is there, with the time from which that chunk's answer is due. No tensors,
no threads, no engine in here; the clock is passed in.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from asr_exit.config import require

S = TypeVar("S", bound=Hashable)
_BATCH_GRID = 8


@dataclass(frozen=True)
class Batching:
    """How steps are put together. Raises ConfigError for a value out of range.

    A larger batch uses the processor better and makes every stream in it wait for a longer step. Waiting for company
    saves processor time where streams are few; under load batches fill while the step before runs, and nobody waits.

    Larger batches come in multiples of 8, and what is left over goes first in the next one: these sizes a CPU computes
    without padding (see `asr_exit.buckets`).
    """

    max_batch: int = 64  # streams in one step
    max_wait_ms: float = 10.0  # how long a ready chunk may wait for others to join its step

    def __post_init__(self) -> None:
        require(self.max_batch >= 1, f"max_batch={self.max_batch} must be at least 1")
        finite = math.isfinite(self.max_wait_ms) and self.max_wait_ms >= 0
        require(finite, f"max_wait_ms={self.max_wait_ms} must be 0 or more")

    def size(self, ready: int) -> int:
        """How many of the streams that are ready go into one step."""
        if ready >= self.max_batch:
            return self.max_batch
        return ready if ready <= _BATCH_GRID else ready - ready % _BATCH_GRID


class Scheduler(Generic[S]):
    """The ready streams of one engine. Not thread-safe; seconds throughout."""

    def __init__(self, batching: Batching | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._batching, self._clock = batching or Batching(), clock
        self._heap: list[tuple[float, int, S]] = []  # (due, order of arrival, stream); may hold withdrawn entries
        self._ready: dict[S, tuple[int, float]] = {}  # stream -> (its entry's order, when it was offered)
        self._order = itertools.count()

    def __len__(self) -> int:
        """Streams that are ready."""
        return len(self._ready)

    def offer(self, stream: S, due: float) -> None:
        """`stream` has a chunk whose answer is due from time `due` on; offering it again changes nothing."""
        if stream not in self._ready:
            order = next(self._order)
            self._ready[stream] = order, self._clock()
            heapq.heappush(self._heap, (due, order, stream))

    def withdraw(self, stream: S) -> None:
        """`stream` is gone. Its place in the queue is cleared away later."""
        self._ready.pop(stream, None)
        if len(self._heap) > 2 * len(self._ready) + 16:
            self._heap = [entry for entry in self._heap if self._holds(entry)]
            heapq.heapify(self._heap)

    def wait_s(self, open_streams: int) -> float | None:
        """How long the next step should wait for company: 0 = begin now, None = nothing is ready.

        Nobody is waited for when the batch is full, when all `open_streams` are ready, or once the chunk that was
        offered first has waited long enough.
        """
        if not self._ready:
            return None
        if len(self._ready) >= min(open_streams, self._batching.max_batch):
            return 0.0
        offered = next(iter(self._ready.values()))[1]  # dicts keep order: the one that waits longest
        return max(0.0, offered + self._batching.max_wait_ms / 1000 - self._clock())

    def take(self) -> list[S]:
        """The streams of the next step, the longest due first. They are not ready any more."""
        batch: list[S] = []
        size = self._batching.size(len(self._ready))
        while self._heap and len(batch) < size:
            entry = heapq.heappop(self._heap)
            if self._holds(entry):
                del self._ready[entry[2]]
                batch.append(entry[2])
        return batch

    def _holds(self, entry: tuple[float, int, S]) -> bool:
        known = self._ready.get(entry[2])
        return known is not None and known[0] == entry[1]
