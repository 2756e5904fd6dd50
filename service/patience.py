"""A limit on how long a task waits, for tasks that wait a thousand times."""

from __future__ import annotations

import asyncio
import math
from types import TracebackType

import grpc

from service.errors import StreamError


class Patience:
    """As `asyncio.timeout`, but one object and one timer serve all the waits of a stream, one after the other.

    A task enters it once and says when each wait begins and ends. That only moves the deadline; the timer looks at it
    when it rings. Close it in the end: the timer would live on.
    """

    def __init__(self, seconds: float, complaint: str) -> None:
        """`complaint` is what the client is told when a wait takes longer than `seconds`."""
        self._seconds, self._complaint, self._loop = seconds, complaint, asyncio.get_running_loop()
        self._now = self._loop.time
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None  # whose waits count now
        self._deadline, self._cancelling, self._expired = math.inf, 0, False

    def __enter__(self) -> Patience:
        self._task = asyncio.current_task(self._loop)
        assert self._task is not None, "only a task can be ended"
        self._cancelling = self._task.cancelling()
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._ring)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises StreamError when a wait took too long."""
        task, self._task, self._deadline = self._task, None, math.inf
        if self._expired and task is not None:
            self._expired = False
            only_we_cancelled = task.uncancel() <= self._cancelling
            if only_we_cancelled and kind is not None and issubclass(kind, asyncio.CancelledError):
                raise StreamError(grpc.StatusCode.DEADLINE_EXCEEDED, self._complaint) from None

    def begin(self) -> None:
        """A wait begins."""
        self._deadline = self._now() + self._seconds

    def end(self) -> None:
        """It has ended well: time between waits does not count."""
        self._deadline = math.inf

    def close(self) -> None:
        """No more waits will come."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        self._timer = None
        if self._task is None:
            return
        now = self._now()
        if now < self._deadline:
            self._timer = self._loop.call_at(min(self._deadline, now + self._seconds), self._ring)
        else:
            self._expired = True
            self._task.cancel()
