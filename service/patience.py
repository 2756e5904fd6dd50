"""A limit on how long a task waits, for tasks that wait a thousand times."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Patience:
    """As `asyncio.timeout`, but one object and one timer serve all the waits of a stream, one after the other.

    A wait only moves the deadline; the timer looks at it when it rings. Close it in the end: the timer would live on.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._loop = seconds, asyncio.get_running_loop()
        self._now = self._loop.time
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None  # that waits now
        self._deadline, self._cancelling, self._expired = 0.0, 0, False

    def __enter__(self) -> None:
        self._task = asyncio.current_task(self._loop)
        assert self._task is not None, "only a task can be ended"
        self._cancelling = self._task.cancelling()
        self._deadline = self._now() + self._seconds
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._ring)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises TimeoutError when it took too long."""
        task, self._task = self._task, None
        if self._expired and task is not None:
            self._expired = False
            only_we_cancelled = task.uncancel() <= self._cancelling
            if only_we_cancelled and kind is not None and issubclass(kind, asyncio.CancelledError):
                raise TimeoutError from error

    def close(self) -> None:
        """No more waits will come."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        self._timer = None
        if self._task is None:
            return
        if self._now() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._ring)
        else:
            self._expired = True
            self._task.cancel()
