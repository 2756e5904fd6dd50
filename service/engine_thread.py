"""The one thread that owns the engine. The event loop hands it commands and gets events back; neither ever blocks.

Each round carries out every command that has arrived, runs one engine step over the streams that the scheduler picks
(at most one chunk per stream, so that a fast sender does not hold up the others), and posts all events to the event
loop in one call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, cast

import grpc

from asr_exit.scheduler import Batching, Scheduler
from service.errors import StreamError
from service.feed import SLACK_S, Audio, Close, Command, Feed, Finish, Flush, Open, SetBudget

if TYPE_CHECKING:
    from asr_exit.engine import Engine
    from asr_exit.stream import Stream
    from service.load import LoadMonitor
    from service.metrics import Metrics
    from service.turns import Turns

log = logging.getLogger(__name__)
Event = Callable[[], None]
_TIDY_AFTER_S = 0.2  # with no stream left
_TIDY_EVERY_S = 60.0  # with streams: what one hour's largest step needed is not kept for the next hour
_PUT_BY_S = 0.5  # audio that completes no chunk lies around undecoded for so long, at most twice that
_MOST_PUT_BY = 16  # messages of a stream


class EngineThread:
    """Runs an engine for many streams. Start it, submit commands, stop it, join it."""

    def __init__(
        self,
        engine: Engine,
        post: Callable[[list[Event]], None],
        *,
        load: LoadMonitor | None = None,
        batching: Batching | None = None,
        metrics: Metrics | None = None,
        prepare: Callable[[], None] | None = None,
        tidy: Callable[[bool], object] | None = None,
        turns: Turns | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nobody else may touch `engine`.

        Called on this thread: `post`; `prepare` at its start; `tidy` between steps, with True once the last of the
        streams is gone and no other came for a while, with False now and then before; `turns` around steps.
        """
        self._engine = engine
        self._post = post
        self._load = load
        self._metrics = metrics
        self._scheduler: Scheduler[Stream] = Scheduler(batching, clock)
        self._prepare, self._tidy, self._turns = prepare, tidy, turns
        self._tidy_at: float | None = None  # when to tidy if no stream comes
        self._tidied_at = clock()
        self.clock = clock
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._waiting: list[Feed] = []  # feeds with commands to carry out, in order of arrival; guarded by _lock
        self._put_by: deque[tuple[float, Feed]] = deque()  # feeds whose commands may wait until then; guarded by _lock
        self._prepared = threading.Event()
        self._failure: Exception | None = None  # of preparing
        self._stopping = False  # guarded by _lock
        self._feeds: dict[Stream, Feed] = {}
        self._events: list[Event] = []
        self._ceiling: int | None = None  # that load set last
        self._may_catch_up = False  # chunks may wait for idle moments
        self._thread = threading.Thread(target=self._run, name="asr-exit-engine")

    def start(self) -> None:
        """Starts the thread; returns when it is prepared. Raises what preparing raised."""
        self._thread.start()
        self._prepared.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Fails the streams that are still open with UNAVAILABLE and ends the thread; returns when it has ended."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def submit(self, feed: Feed, command: Command, *, wake: bool = True) -> None:
        """Queues a command; callable from any thread. After `stop` it does nothing.

        Without `wake` it may wait for a second, until there is more to do: for audio that completes no chunk. So may
        all audio of a stream whose chunk before has not been answered. What makes up a chunk is so decoded in one go.
        """
        if self._turns is not None and isinstance(command, Audio):
            self._turns.heard(command.arrived_at - feed.heard_at)
            feed.heard_at = command.arrived_at
        with self._lock:
            if self._stopping:
                return
            waiting = feed.commands
            waiting.append(command)
            wake = wake and not (feed.served and isinstance(command, Audio))
            if wake or len(waiting) >= _MOST_PUT_BY:
                self._call(feed)
                self._wake.notify()
            elif len(waiting) == 1:
                feed.put_by_until = self.clock() + _PUT_BY_S
                self._put_by.append((feed.put_by_until, feed))

    def _call(self, feed: Feed) -> None:
        """The commands of `feed` are to be carried out now. Needs the lock."""
        if feed.commands and not feed.called:
            feed.called = True
            self._waiting.append(feed)

    def _call_put_by(self) -> None:
        """As `_call` for all that have been put by for long enough. Needs the lock."""
        now = self.clock()
        while self._put_by and self._put_by[0][0] <= now:
            until, feed = self._put_by.popleft()
            if until == feed.put_by_until:  # or what was put by then is done with, and what came later has time
                self._call(feed)

    def _run(self) -> None:
        try:
            if self._prepare:
                self._prepare()
        except Exception as failure:
            self._failure = failure
            return
        finally:
            self._prepared.set()
        while self._round():
            pass
        error = StreamError(grpc.StatusCode.UNAVAILABLE, "the server is shutting down: connect again later")
        with self._wake:
            unserved = {*self._feeds.values(), *self._waiting}
        for feed in unserved:
            self._fail(feed, error)
        self._flush()

    def _round(self) -> bool:
        """Waits for something to do and does it. Returns False when the thread is to stop.

        A method of its own so that its variables keep no stream that has ended.
        """
        with self._wake:
            while True:
                self._call_put_by()
                wait_s = self._scheduler.wait_s(len(self._feeds))
                if self._waiting or self._stopping or self._may_catch_up or wait_s == 0.0:
                    break
                if self._feeds or self._put_by:
                    wait_s = _PUT_BY_S if wait_s is None else min(wait_s, _PUT_BY_S)
                elif self._tidy_at is not None:
                    wait_s = self._tidy_at - self.clock()
                    if wait_s <= 0.0:
                        break
                self._wake.wait(wait_s)
            if self._stopping:
                return False
            batch = [(feed, feed.commands) for feed in self._waiting]
            for feed in self._waiting:
                feed.commands, feed.called = [], False
            self._waiting = []
        for feed, commands in batch:
            self._carry_out(feed, commands)
        if self._scheduler.wait_s(len(self._feeds)) == 0.0:
            self._take_turn(self._scheduler.take())
            self._may_catch_up = True
        elif self._may_catch_up:
            self._may_catch_up = self._catch_up()
        self._flush()
        self._tidy_if_due()
        return True

    def _tidy_if_due(self) -> None:
        if self._tidy is None:
            return
        now = self.clock()
        idle = not self._feeds and self._tidy_at is not None and now >= self._tidy_at
        if idle or (self._feeds and now >= self._tidied_at + _TIDY_EVERY_S):
            self._tidied_at, self._tidy_at = now, None
            self._tidy(idle)

    def _carry_out(self, feed: Feed, commands: list[Command]) -> None:
        for kind, group in groupby(commands, type):
            if feed.closed:
                break
            try:
                if kind is Audio:
                    self._push(feed, cast("list[Audio]", list(group)))
                else:
                    for command in group:
                        self._apply(feed, command)
            except Exception as error:
                self._fail(feed, error)
        if self._offer(feed):
            feed.served = True
        feed.consumed += len(commands)
        if feed.awaited:
            self._events.append(feed.listener.on_room)

    def _offer(self, feed: Feed) -> bool:
        """Hand the stream to the scheduler if it has a whole chunk; returns whether it had one."""
        stream = feed.stream
        if stream is None or feed.closed or not self._engine.is_ready(stream):
            return False
        self._scheduler.offer(stream, feed.pace.next_due(feed.options.chunk_ms / 1000))
        return True

    def _look_at_put_by(self, feeds: Iterable[Feed]) -> None:
        """Their chunks have been answered, and the next ones are not complete: are they, with what was put by?"""
        with self._lock:
            for feed in feeds:
                feed.served = False
                if feed.commands:
                    queued_bytes = sum(len(command.data) for command in feed.commands if isinstance(command, Audio))
                    queued_s = queued_bytes / feed.input.bytes_per_second
                    if feed.pace.pending_s + queued_s >= feed.options.chunk_ms / 1000 - SLACK_S:
                        self._call(feed)

    def _apply(self, feed: Feed, command: Command) -> None:
        if isinstance(command, Close):
            self._release(feed)
            return
        if feed.abandoned:
            return
        if isinstance(command, Open):
            feed.stream = self._engine.open(feed.options)
            self._feeds[feed.stream] = feed
            return
        stream = feed.stream
        assert stream is not None, "Open is submitted first"
        if isinstance(command, Flush):
            self._engine.flush(stream)
        elif isinstance(command, Finish):
            self._engine.push(stream, feed.input.finish())
            self._engine.finish(stream)
        elif isinstance(command, SetBudget):
            self._engine.set_budget(stream, command.budget)

    def _push(self, feed: Feed, parts: list[Audio]) -> None:
        """Decode what has arrived in one go."""
        if feed.abandoned:
            return
        assert feed.stream is not None, "Open is submitted first"
        data = parts[0].data if len(parts) == 1 else b"".join(part.data for part in parts)
        self._engine.push(feed.stream, feed.input.push(data))
        for part in parts:
            feed.pace.arrived(len(part.data) / feed.input.bytes_per_second, part.arrived_at)

    def _take_turn(self, streams: list[Stream]) -> None:
        if self._turns is None:
            self._step(streams)
            return
        posted = False
        self._turns.begin()
        try:
            self._step(streams)
            posted = self._flush()
        finally:
            self._turns.end(posted)

    def _step(self, streams: list[Stream]) -> None:
        cpu_s = time.thread_time()
        try:
            output = self._engine.step(streams)
        except Exception:
            log.exception("engine step failed: ending its %d streams", len(streams))
            error = StreamError(grpc.StatusCode.INTERNAL, "recognition failed; open a new stream")
            for stream in streams:
                self._fail(self._feeds[stream], error)
            return
        now, cpu_s = self.clock(), time.thread_time() - cpu_s
        worst_late_s, latencies_s = 0.0, []
        for result in output.results:
            feed = self._feeds[result.stream]
            latency_s, late_s = feed.pace.chunk_done(result.end_ms / 1000, now)
            worst_late_s = max(worst_late_s, late_s)
            latencies_s.append(latency_s)
            self._events.append(partial(feed.listener.on_result, result, 1000 * latency_s))
            if result.end_of_stream:
                self._release(feed)
        for stream, failure in output.failures:
            feed = self._feeds[stream]
            log.error("stream failed inside the engine", exc_info=failure, extra={"stream": feed.stream_id})
            self._fail(feed, failure)
        going_on = [self._feeds[stream] for stream in streams if stream in self._feeds]
        self._look_at_put_by([feed for feed in going_on if not self._offer(feed)])
        if self._metrics:
            self._metrics.step(output, latencies_s, worst_late_s, cpu_s)
        if self._load:
            ceiling = self._load.after_step(
                output, 1000 * worst_late_s, ready_streams=len(self._scheduler), free_slots=self._engine.free_slots
            )
            self._engine.set_load_ceiling(ceiling)
            if self._metrics and ceiling != self._ceiling:
                self._metrics.ceiling(ceiling, changed=self._ceiling is not None)
            self._ceiling = ceiling

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
            self._tidy_at = self.clock() + _TIDY_AFTER_S if self._tidy else None
            self._scheduler.withdraw(feed.stream)
            try:
                self._engine.close(feed.stream)
            except Exception:
                log.exception("closing a stream failed")

    def _flush(self) -> bool:
        """Posts the events there are; returns whether there were any."""
        events, self._events = self._events, []
        if events:
            self._post(events)
        return bool(events)
