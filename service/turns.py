"""Engines and event loop take turns where they share the cores: a step is not interrupted, its answers go out first.

A message that comes during a step can wait for its end: no engine is free to do anything with it. If the loop handles
it at once, the step loses the core and what it had in the caches, for every message. Once a step is over its answers
should be sent before the next one begins, which otherwise holds them up for a step's time.
"""

from __future__ import annotations

import threading

_LONGEST_S = 0.1  # that the loop stays away
_ANSWERS_S = 0.02  # that an engine waits for the loop


class Turns:
    """Between one event loop and `engines` threads, each with an engine."""

    def __init__(self, engines: int) -> None:
        self._engines = engines
        self._lock = threading.Lock()
        self._stepping = 0  # engines in a step; guarded by _lock
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
        self._handled.set()
        if self._stepping < self._engines:
            return False
        self._step_over.wait(_LONGEST_S if longest_s is None else min(_LONGEST_S, longest_s))
        return True
