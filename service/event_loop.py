"""An event loop for many streams: when events come thick, it takes them by the handful.

Each look for events costs two system calls, two switches between threads and a cold cache, about as much as the event
itself. So looks are rationed; a server with few streams never notices. Where engines need all the cores, the loop
takes turns with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVarTuple

if TYPE_CHECKING:
    from service.turns import Turns

_INTERVAL_S = 0.005  # between looks, once the burst is used up: what an event waits at most
_BURST = 40  # looks in a row that nothing delays; saved up again at a look per interval

_Arguments = TypeVarTuple("_Arguments")


class RationedSelector(selectors.DefaultSelector):
    """Waits before it looks for events when it has looked too often of late; never longer than it was asked to."""

    def __init__(
        self,
        interval_s: float = _INTERVAL_S,
        burst: int = _BURST,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__()
        self._interval_s, self._saved_s = interval_s, burst * interval_s
        self._clock, self._sleep = clock, sleep
        self._next_look = clock() - self._saved_s  # that nothing delays
        self.turns: Turns | None = None  # with engines on the same cores

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """See `selectors.BaseSelector`. A `timeout` of 0 or less means that the loop has other work: no wait."""
        if timeout is not None and timeout <= 0:
            return super().select(timeout)
        now = self._clock()
        early_s = self._next_look - now
        self._next_look = max(self._next_look, now - self._saved_s) + self._interval_s
        waited = self.turns is not None and self.turns.wait(timeout)
        if early_s > 0 and not waited:
            self._sleep(early_s if timeout is None else min(early_s, timeout))
        if timeout is not None and (waited or early_s > 0):
            timeout = max(0.0, timeout - (self._clock() - now))
        return super().select(timeout)


class EventLoop(asyncio.SelectorEventLoop):
    """The server's: with rationed looks, and one call for all the events of gRPC that have come."""

    def __init__(self) -> None:
        self._looks = RationedSelector()
        super().__init__(self._looks)

    def take_turns(self, turns: Turns) -> None:
        """With engines that need all the cores there are."""
        self._looks.turns = turns

    def add_reader(self, fd: Any, callback: Callable[[*_Arguments], Any], *args: *_Arguments) -> None:
        """See `asyncio.loop`.

        gRPC writes a byte to a socket for every event and reads a byte each time it is called, although its first call
        handles all that has come. Its other bytes are read here.
        """
        if isinstance(fd, socket.socket) and "grpc" in type(_owner(callback)).__module__:
            super().add_reader(fd, partial(_once, fd, callback, *args))
        else:
            super().add_reader(fd, callback, *args)


def _owner(callback: Callable[..., Any]) -> object:
    """The object whose method it is, perhaps with arguments bound to it."""
    return getattr(callback.func if isinstance(callback, partial) else callback, "__self__", None)


def _once(wakes: socket.socket, handle: Callable[..., Any], *args: Any) -> None:
    """Calls `handle`, which reads a byte of `wakes`, once for all the bytes there are.

    A byte is written when its event is already queued, so that none is missed.
    """
    with contextlib.suppress(BlockingIOError):
        waiting = len(wakes.recv(4096, socket.MSG_PEEK))
        if waiting > 1:
            wakes.recv(waiting - 1)
    handle(*args)


def run(main: Any) -> None:
    """As `asyncio.run`, on such a loop; on Windows on the usual one."""
    factory = None if sys.platform == "win32" else EventLoop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)
