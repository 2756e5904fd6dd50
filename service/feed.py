"""One stream as the engine thread sees it: commands in, events out, and when its audio arrived."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from service.audio_input import UNPACKED, AudioFormat, AudioInput
from service.logs import stream_id

if TYPE_CHECKING:
    from asr_exit.budget import Budget
    from asr_exit.stream import ChunkResult, Stream, StreamOptions


SLACK_S = 1e-4  # in comparisons of positions: seconds are rounded, and so does the resampler


@dataclass(frozen=True, slots=True)
class Open:
    """Take a slot."""


@dataclass(slots=True)  # not frozen, since there is one for every message: that triples the time to make one
class Audio:
    """Bytes of the stream, in order."""

    data: bytes
    arrived_at: float  # seconds on the engine thread's clock


@dataclass(frozen=True, slots=True)
class SetBudget:
    """Replace the compute budget from the next chunk on."""

    budget: Budget


@dataclass(frozen=True, slots=True)
class Flush:
    """End the utterance with what has arrived so far; the stream goes on."""


@dataclass(frozen=True, slots=True)
class Finish:
    """No more audio: flush."""


@dataclass(frozen=True, slots=True)
class Close:
    """Give the slot back now; what is not recognised yet is dropped."""


Command = Open | Audio | SetBudget | Flush | Finish | Close


class Listener(Protocol):
    """Where a stream's events go; called on the event loop, in order."""

    def on_room(self) -> None:
        """Commands were carried out; only called while `Feed.awaited`."""

    def on_result(self, result: ChunkResult, latency_ms: float) -> None:
        """A chunk was recognised."""

    def on_failed(self, error: BaseException) -> None:
        """The stream is closed; nothing follows."""


class _Nobody:
    def on_room(self) -> None:
        pass

    def on_result(self, result: ChunkResult, latency_ms: float) -> None:
        pass

    def on_failed(self, error: BaseException) -> None:
        pass


NOBODY: Listener = _Nobody()  # listens to the streams whose sessions are closed


class Feed:
    """Belongs to the engine thread, but for what its lock guards: `commands`, `called`, `put_by_until` and `served`.

    `abandoned`, `awaited`, `heard_at` and `listener` are set by the event loop.
    """

    def __init__(self, options: StreamOptions, audio: AudioFormat, listener: Listener) -> None:
        """`audio` says what `Audio` commands carry, if it is raw; containers are unpacked before they come here."""
        self.options = options
        self.stream_id = stream_id.get()  # for log lines
        self.input = AudioInput(audio if audio.is_raw else UNPACKED)
        self.listener: Listener = listener
        self.commands: list[Command] = []
        self.called = False  # they are to be carried out in the next round
        self.put_by_until = 0.0  # what waits in `commands`, if nothing calls it before
        # a chunk of it waits for a step or is in one: audio that follows is put by till that is answered. The engine
        # thread sets it without the lock, for a moment too late costs a look too many; it clears it with the lock.
        self.served = False
        self.abandoned = False  # do not spend time on audio that is still queued
        self.heard_at = float("-inf")  # when the last audio came
        self.consumed = 0  # commands carried out
        self.awaited = False  # the listener waits until more of them are
        self.stream: Stream | None = None
        self.closed = False
        self.pace = Pace()


class Pace:
    """When the audio of one stream arrived, and by when its chunks are due at real-time pace. Seconds throughout."""

    def __init__(self) -> None:
        self._arrivals: deque[tuple[float, float]] = deque()  # (position reached, when)
        self._position = 0.0
        self._last_arrival = 0.0
        self._last_due = float("-inf")
        self._last_chunk_end = 0.0

    def arrived(self, audio_s: float, now: float) -> None:
        """`audio_s` more of audio arrived at `now`."""
        if audio_s <= 0:
            return
        self._position += audio_s
        self._last_arrival = now
        self._arrivals.append((self._position, now))

    @property
    def pending_s(self) -> float:
        """Audio that has arrived since the last chunk ended."""
        return self._position - self._last_chunk_end

    def next_due(self, chunk_s: float) -> float:
        """When the answer to the next chunk is due; `chunk_s` is its length. Oldest audio has the earliest."""
        end_s = min(self._last_chunk_end + chunk_s, self._position)
        return max(self._arrival_of(end_s), self._last_due + end_s - self._last_chunk_end)

    def chunk_done(self, end_s: float, now: float) -> tuple[float, float]:
        """Returns how long ago the last sample of the chunk ending at `end_s` arrived, and how late its result is.

        Late means: behind a listener who follows at real-time pace. A client that sends faster than real time is not
        kept waiting by what it has queued itself, so that does not count.
        """
        arrival = self._arrival_of(end_s)
        due = max(arrival, self._last_due + end_s - self._last_chunk_end)
        self._last_due, self._last_chunk_end = due, end_s
        while len(self._arrivals) > 1 and self._arrivals[0][0] < end_s:
            self._arrivals.popleft()
        return max(0.0, now - arrival), max(0.0, now - due)

    def _arrival_of(self, position_s: float) -> float:
        return next((when for reached, when in self._arrivals if reached + SLACK_S >= position_s), self._last_arrival)
