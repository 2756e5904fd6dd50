"""The one thread that owns the engine. The event loop hands it commands and gets events back; neither ever blocks.

Each round carries out every command that has arrived, runs one engine step (at most one chunk per stream, so that a
fast sender does not hold up the others), and posts all events to the event loop in one call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import grpc

from service.errors import StreamError
from service.feed import Audio, Close, Command, Feed, Finish, Flush, Open, SetBudget

if TYPE_CHECKING:
    from asr_exit.engine import Engine
    from asr_exit.stream import Stream
    from service.load import LoadMonitor

log = logging.getLogger(__name__)
Event = Callable[[], None]


class EngineThread:
    """Runs an engine for many streams. Start it, submit commands, stop it, join it."""

    def __init__(
        self,
        engine: Engine,
        post: Callable[[list[Event]], None],
        *,
        load: LoadMonitor | None = None,
        prepare: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nobody else may touch `engine`. `post` and, at its start, `prepare` are called on this thread."""
        self._engine = engine
        self._post = post
        self._load = load
        self._prepare = prepare
        self.clock = clock
        self._wake = threading.Condition()
        self._waiting: list[Feed] = []  # feeds with commands, in order of arrival; guarded by _wake
        self._stopping = False  # guarded by _wake
        self._feeds: dict[Stream, Feed] = {}
        self._events: list[Event] = []
        self._may_catch_up = False  # chunks may wait for idle moments
        self._thread = threading.Thread(target=self._run, name="asr-exit-engine")

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Fails the streams that are still open with UNAVAILABLE and ends the thread; returns when it has ended."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def submit(self, feed: Feed, command: Command) -> None:
        """Queues a command; callable from any thread. After `stop` it does nothing."""
        with self._wake:
            if self._stopping:
                return
            if not feed.commands:
                self._waiting.append(feed)
            feed.commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        if self._prepare:
            self._prepare()
        while True:
            with self._wake:
                while not (self._waiting or self._stopping or self._engine.ready() or self._may_catch_up):
                    self._wake.wait()
                if self._stopping:
                    break
                batch = [(feed, feed.commands) for feed in self._waiting]
                for feed in self._waiting:
                    feed.commands = []
                self._waiting = []
            for feed, commands in batch:
                self._carry_out(feed, commands)
            if self._engine.ready():
                self._step()
                self._may_catch_up = True
            else:
                self._may_catch_up = self._catch_up()
            self._flush()
        error = StreamError(grpc.StatusCode.UNAVAILABLE, "the server is shutting down: connect again later")
        with self._wake:
            unserved = {*self._feeds.values(), *self._waiting}
        for feed in unserved:
            self._fail(feed, error)
        self._flush()

    def _carry_out(self, feed: Feed, commands: list[Command]) -> None:
        for command in commands:
            if feed.closed:
                break
            try:
                self._apply(feed, command)
            except Exception as error:
                self._fail(feed, error)
        self._events.append(partial(feed.listener.on_consumed, len(commands)))

    def _apply(self, feed: Feed, command: Command) -> None:
        if isinstance(command, Close):
            self._release(feed)
            return
        if feed.abandoned:
            return
        if isinstance(command, Open):
            feed.stream = self._engine.open(feed.options)
            self._feeds[feed.stream] = feed
            self._events.append(feed.listener.on_opened)
            return
        stream = feed.stream
        assert stream is not None, "commands other than Open are submitted only after on_opened"
        if isinstance(command, Audio):
            self._engine.push(stream, feed.input.push(command.data))
            feed.pace.arrived(len(command.data) / feed.input.bytes_per_second, command.arrived_at)
        elif isinstance(command, Flush):
            self._engine.flush(stream)
        elif isinstance(command, Finish):
            self._engine.push(stream, feed.input.finish())
            self._engine.finish(stream)
        elif isinstance(command, SetBudget):
            self._engine.set_budget(stream, command.budget)

    def _step(self) -> None:
        try:
            output = self._engine.step()
        except Exception:
            log.exception("engine step failed: ending its %d streams", len(self._feeds))
            error = StreamError(grpc.StatusCode.INTERNAL, "recognition failed; open a new stream")
            for feed in list(self._feeds.values()):
                self._fail(feed, error)
            return
        now = self.clock()
        worst_late_s = 0.0
        for result in output.results:
            feed = self._feeds[result.stream]
            latency_s, late_s = feed.pace.chunk_done(result.end_ms / 1000, now)
            worst_late_s = max(worst_late_s, late_s)
            self._events.append(partial(feed.listener.on_result, result, 1000 * latency_s))
            if result.end_of_stream:
                self._release(feed)
        for stream, failure in output.failures:
            log.error("stream failed inside the engine", exc_info=failure)
            self._fail(self._feeds[stream], failure)
        if self._load:
            ceiling = self._load.after_step(
                output, 1000 * worst_late_s, ready_streams=self._engine.ready(), free_slots=self._engine.free_slots
            )
            self._engine.set_load_ceiling(ceiling)

    def _catch_up(self) -> bool:
        """Uses an idle moment; whether there was something to do."""
        if not self._feeds:
            return False
        try:
            return self._engine.catch_up()
        except Exception:
            log.exception("catching up failed: chunks stay as they are until their streams go deeper")
            return False

    def _fail(self, feed: Feed, error: BaseException) -> None:
        if feed.closed:
            return
        self._release(feed)
        self._events.append(partial(feed.listener.on_failed, error))

    def _release(self, feed: Feed) -> None:
        feed.closed = True
        if feed.stream is not None:
            self._feeds.pop(feed.stream, None)
            try:
                self._engine.close(feed.stream)
            except Exception:
                log.exception("closing a stream failed")

    def _flush(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self._post(events)
