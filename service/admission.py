"""Who gets in: slots, streams per client, memory, and a machine that is over its limit even at the shallowest exit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import grpc

from service.errors import StreamError

if TYPE_CHECKING:
    from service.config import LimitsConfig

W = TypeVar("W")
_MEMORY_EVERY_S = 1.0
_FIRST_GUESS_S = 30.0  # how long a stream lasts, as long as none has ended
_MEMORY_OF_DURATIONS = 0.9  # weight of the past when another stream ends
_RETRY_MS = (100, 30_000)


@dataclass(eq=False)
class Ticket(Generic[W]):
    """One admitted stream: the worker that serves it. Give it back with `Admission.release`."""

    worker: W
    client: str
    since: float  # seconds
    released: bool = False


class Admission(Generic[W]):
    """Belongs to the event loop. Streams go to the worker with the fewest."""

    def __init__(
        self,
        workers: Sequence[W],
        limits: LimitsConfig,
        *,
        overloaded: Callable[[], bool] = lambda: False,
        resident_mb: Callable[[], float] | None = None,
        on_refused: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`overloaded`: nothing is left to shed; `on_refused` gets slots, client, memory or load."""
        self._limits, self._overloaded, self._clock = limits, overloaded, clock
        self._resident_mb, self._on_refused = resident_mb or _resident_mb, on_refused
        self._streams: dict[W, int] = dict.fromkeys(workers, 0)
        self._clients: Counter[str] = Counter()
        self._memory_at, self._memory_mb = float("-inf"), 0.0
        self._usual_s = _FIRST_GUESS_S

    @property
    def streams(self) -> int:
        """Admitted and not released."""
        return sum(self._streams.values())

    def admit(self, client: str) -> Ticket[W]:
        """A place for one stream of `client`. Raises StreamError RESOURCE_EXHAUSTED, which says when to try again."""
        limits = self._limits
        if self.streams >= limits.streams:
            raise self._refuse("slots", f"all {limits.streams} stream slots are in use: try again later")
        if limits.streams_per_client and self._clients[client] >= limits.streams_per_client:
            allowed = f"{limits.streams_per_client} streams, the most allowed"
            raise self._refuse("client", f"this client has {allowed}: end one of them first")
        if self._overloaded():
            raise self._refuse("load", "the server is busy beyond what shallower exits can save: try again later")
        if limits.memory_mb and self._memory() > limits.memory_mb:
            raise self._refuse("memory", "the server is short of memory: try again later")
        worker = min(self._streams, key=self._streams.__getitem__)
        self._streams[worker] += 1
        self._clients[client] += 1
        return Ticket(worker, client, self._clock())

    def release(self, ticket: Ticket[W]) -> None:
        """Give a place back; doing so twice is fine."""
        if ticket.released:
            return
        ticket.released = True
        self._streams[ticket.worker] -= 1
        self._clients[ticket.client] -= 1
        if not self._clients[ticket.client]:
            del self._clients[ticket.client]
        lasted = self._clock() - ticket.since
        self._usual_s = _MEMORY_OF_DURATIONS * self._usual_s + (1 - _MEMORY_OF_DURATIONS) * lasted

    def _refuse(self, reason: str, message: str) -> StreamError:
        """The hint is when, going by how long streams last, the next one of so many should end."""
        self._on_refused(reason)
        expected_ms = 1000 * self._usual_s / max(1, self.streams)
        retry_ms = round(min(max(expected_ms, _RETRY_MS[0]), _RETRY_MS[1]))
        return StreamError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, retry_ms)

    def _memory(self) -> float:
        now = self._clock()
        if now - self._memory_at >= _MEMORY_EVERY_S:
            self._memory_at, self._memory_mb = now, self._resident_mb()
        return self._memory_mb


def _resident_mb() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss) / 1e6
