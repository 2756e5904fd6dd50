"""Results on their way to a client that may read slowly: bounded, interim ones coalesced, final ones kept."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asr_exit.policy import Reason
    from asr_exit.stream import ChunkResult


@dataclass(slots=True)  # not frozen: that triples the time it takes to make one
class ChunkRecord:
    """Depth and cost of one chunk; kept when the result it came with is not."""

    index: int
    start_ms: float
    end_ms: float
    exit_layer: int
    reason: Reason
    encoder_macs: int
    latency_ms: float


@dataclass(slots=True)
class Update:
    """One result for the client, with the chunks since the one before."""

    result: ChunkResult
    chunks: tuple[ChunkRecord, ...]

    @property
    def lasting(self) -> bool:
        """True for what must reach the client; the rest is replaced by what comes after it."""
        return self.result.is_final or self.result.end_of_stream

    @property
    def text(self) -> str:
        """All the words of the utterance, settled or not."""
        return " ".join(part for part in (self.result.committed, self.result.tail) if part)

    @property
    def confidence(self) -> float:
        """Mean over the words, 0 to 1; 0 without words."""
        words = self.result.words
        return sum(word.confidence for word in words) / len(words) if words else 0.0


class Outbox:
    """Belongs to the event loop. An unread interim result gives way to the next one, which takes over its chunks."""

    def __init__(self, *, interim_results: bool, unread_chunks: int) -> None:
        self._interim_results = interim_results
        self._unread_chunks = unread_chunks
        self._updates: deque[Update] = deque()
        self._unread = 0  # chunks in them
        self._unreported: tuple[ChunkRecord, ...] = ()
        self._closed = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None  # whoever waits in `get`

    @property
    def crowded(self) -> bool:
        """True when the client left so much unread that its audio should not be read on."""
        return self._unread >= self._unread_chunks

    def put(self, result: ChunkResult, latency_ms: float) -> None:
        """Adds a result. Never blocks, never drops a final result or a chunk's record."""
        record = ChunkRecord(
            result.chunk_index,
            result.start_ms,
            result.end_ms,
            result.exit_layer,
            result.reason,
            result.encoder_macs,
            latency_ms,
        )
        self._unreported += (record,)
        if not (self._interim_results or result.is_final or result.end_of_stream):
            return
        if self._updates and not self._updates[-1].lasting:
            replaced = self._updates.pop().chunks
            self._unread -= len(replaced)
            self._unreported = replaced + self._unreported
        self._updates.append(Update(result, self._unreported))
        self._unread += len(self._unreported)
        self._unreported = ()
        self._wake()

    def close(self, error: BaseException | None = None) -> None:
        """Ends the stream of results, after those still unread. Only the first call counts."""
        if not self._closed:
            self._closed, self._error = True, error
            self._wake()

    async def get(self) -> Update | None:
        """Returns the next result, or None at the end; raises the error the stream ended with. For one task."""
        while not self._updates:
            if self._error is not None:
                raise self._error
            if self._closed:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        update = self._updates.popleft()
        self._unread -= len(update.chunks)
        return update

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
