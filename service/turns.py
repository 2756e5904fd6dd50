"""Engines and event loop take turns where they share the cores: a step is not interrupted, its answers go out first.

A message that comes during a step can wait for its end: no engine is free to do anything with it. If the loop handles
it at once, the step loses the core and what it had in the caches, for every message. Once a step is over its answers
should be sent before the next one begins, which otherwise holds them up for a step's time.

The loop does not stay away where it has to look again and again: gRPC hands over one new call at a time, and one
message of each stream. On a busy server a look for each step is too few for the calls that come, and they wait for
seconds without anybody knowing.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable

import grpc

_LONGEST_S = 0.05  # that the loop stays away
_SOON_S = 0.005  # the same where it has to look again
_OFTEN_S = 1.5 * _LONGEST_S  # between two messages of a stream that may have more of them waiting
_ANSWERS_S = 0.02  # that an engine waits for the loop


class Turns:
    """Between one event loop and `engines` threads, each with an engine."""

    def __init__(self, engines: int) -> None:
        self._engines = engines
        self._lock = threading.Lock()
        self._stepping = 0  # engines in a step; guarded by _lock
        self._patience_s = _LONGEST_S  # of the loop in its next wait; the loop's own
        self._step_over, self._handled = threading.Event(), threading.Event()

    def begin(self) -> None:
        """An engine begins a step."""
        with self._lock:
            self._stepping += 1
            if self._stepping == self._engines:
                self._step_over.clear()

    def end(self, posted: bool) -> None:
        """Its step is over. If events for the loop were posted, returns when the loop has handled them, or soon."""
        self._handled.clear()
        with self._lock:
            self._stepping -= 1
            self._step_over.set()
        if posted:
            self._handled.wait(_ANSWERS_S)

    def wait(self, longest_s: float | None) -> bool:
        """Called by the loop when it has handled all that has come.

        Returns at the end of a step if all engines are in one; False = some engine is free.
        """
        patience_s, self._patience_s = self._patience_s, _LONGEST_S
        self._handled.set()
        if self._stepping < self._engines:
            return False
        self._step_over.wait(patience_s if longest_s is None else min(patience_s, longest_s))
        return True

    def look_soon(self) -> None:
        """Called by the loop when more may be there to handle: its next wait is short."""
        self._patience_s = _SOON_S

    def heard(self, since_s: float) -> None:
        """Called by the loop for audio that came `since_s` after the one before of its stream."""
        if since_s < _OFTEN_S:
            self.look_soon()


class PromptCalls(grpc.aio.ServerInterceptor):
    """After a new call the loop looks soon: for the next one, and for what this one says first."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """See grpc.aio.ServerInterceptor."""
        self._turns.look_soon()
        return await continuation(handler_call_details)
