"""One stream as its RPC handler sees it, whatever the protocol: audio in with backpressure, updates out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import grpc

from service.errors import StreamError, invalid, to_stream_error
from service.feed import NOBODY, SLACK_S, Audio, Close, Command, Feed, Finish, Flush, Open, SetBudget
from service.outbox import Outbox, Update
from service.unpack import Unpacker

if TYPE_CHECKING:
    import numpy as np

    from asr_exit.budget import Budget
    from asr_exit.stream import ChunkResult, StreamOptions
    from service.audio_input import AudioFormat
    from service.config import LimitsConfig
    from service.engine_thread import EngineThread

_SLICE_S = 1.0  # audio handed to the engine thread at once, so that a large message does not hold up other streams
_PACKED_SLICE_BYTES = 4096  # of a container, unpacked at once
_MAX_QUEUED_COMMANDS = 64


@dataclass(frozen=True)
class StreamRequest:
    """What a client asked for, checked and in the library's terms."""

    options: StreamOptions
    audio: AudioFormat
    interim_results: bool
    word_times: bool
    language_model_weight: float | None = None  # None: the server's; 0: without
    single_utterance: bool = False  # the first final result with words is the last


class Session:
    """Belongs to the event loop. Open it, send audio, finish; receive until None. Always close it."""

    def __init__(
        self,
        request: StreamRequest,
        engine: EngineThread,
        limits: LimitsConfig,
        on_final: Callable[[str], None] | None = None,
        on_slot_free: Callable[[], None] = lambda: None,
    ) -> None:
        """Takes no slot yet.

        `on_final` gets every final text; `on_slot_free` is called when the slot is given back, perhaps more than once.
        """
        self._on_slot_free = on_slot_free
        self._on_final = on_final
        self.request = request
        self._engine = engine
        self._limits = limits
        self._feed = Feed(request.options, request.audio, self)
        self._unpacker = None if request.audio.is_raw else Unpacker(request.audio)
        self._outbox = Outbox(interim_results=request.interim_results, unread_chunks=limits.unread_chunks)
        self._room: asyncio.Future[None] | None = None  # what audio waits for when there is none
        self._submitted_commands = 0
        self._received_bytes = 0  # of samples, on their way to the engine
        self._bytes_per_second = self._feed.input.bytes_per_second
        self._slice_bytes = min(int(_SLICE_S * self._bytes_per_second), limits.message_bytes)
        self._least_s = request.options.chunk_ms / 1000 - SLACK_S  # of audio that may be worth a look
        self._heard_nothing = True
        self._processed_s = 0.0
        self._ended = False
        self._closed = False

    @property
    def processed_s(self) -> float:
        """Audio recognised so far, seconds."""
        return self._processed_s

    def open(self) -> None:
        """Takes a slot; audio may follow at once. `receive` raises when there is none or the model cannot do that."""
        self._submit(Open())

    def pass_on(self, data: bytes) -> bool:
        """As `send_audio` for a message as most are: raw, short, and with room for it; False = it is not.

        A call instead of three coroutines: a busy server does this a thousand times a second.
        """
        if self._unpacker is not None or not 0 < len(data) <= self._slice_bytes or self._ended or self._is_full():
            return False
        self._heard_nothing = False
        self._submit_audio(data, self._engine.clock())
        return True

    async def send_audio(self, data: bytes) -> None:
        """Passes audio on, waiting while too much of it is queued. Raises StreamError for an oversized message."""
        if len(data) > self._limits.message_bytes:
            raise invalid(
                f"a message with {len(data)} bytes of audio: send at most {self._limits.message_bytes} bytes at "
                "a time, best 20 to 200 ms"
            )
        arrived_at = self._engine.clock()
        self._heard_nothing = self._heard_nothing and not data
        if self._unpacker is None:
            await self._send_samples(data, arrived_at)
            return
        for start in range(0, len(data), _PACKED_SLICE_BYTES):
            part = data[start : start + _PACKED_SLICE_BYTES]
            await self._send_unpacked(partial(self._unpacker.push, part), self._unpacker, arrived_at)

    async def end_audio(self) -> None:
        """No more audio will come: sends what a container still holds back, then finishes. Raises StreamError."""
        if self._heard_nothing:
            await self._wait_while(self._has_queued)  # what is wrong with the stream itself is told first
        elif self._unpacker is not None:
            await self._send_unpacked(self._unpacker.finish, self._unpacker, self._engine.clock())
        self.finish()

    async def _send_unpacked(self, first: Callable[[], None], unpacker: Unpacker, arrived_at: float) -> None:
        """Runs `first`, then decodes step by step; on another thread, for compressed audio takes time to decode."""

        def step(before: Callable[[], None] | None) -> np.ndarray | None:
            if before is not None:
                before()
            return unpacker.pull()

        samples = await asyncio.to_thread(step, first)
        while samples is not None:
            await self._send_samples(samples.tobytes(), arrived_at)
            samples = await asyncio.to_thread(step, None)

    async def _send_samples(self, data: bytes, arrived_at: float) -> None:
        for start in range(0, len(data), self._slice_bytes):
            await self._wait_while(self._is_full)
            self._submit_audio(data[start : start + self._slice_bytes], arrived_at)

    def _submit_audio(self, data: bytes, arrived_at: float) -> None:
        self._received_bytes += len(data)
        received_s = self._received_bytes / self._bytes_per_second
        if 0 < self._limits.stream_s < received_s:
            raise StreamError(
                grpc.StatusCode.OUT_OF_RANGE,
                f"more than {self._limits.stream_s:g} s of audio: open a new stream for the rest",
            )
        # whether the engine thread could do more with what has arrived than put it by
        self._submit(Audio(data, arrived_at), wake=received_s - self._processed_s >= self._least_s)

    async def flush(self) -> None:
        """Ends the utterance with what has arrived; a final result follows, even without words."""
        await self._wait_while(self._is_full)
        self._submit(Flush())

    def set_budget(self, budget: Budget) -> None:
        """Replaces the compute budget from the next chunk on."""
        self._submit(SetBudget(budget))

    def finish(self) -> None:
        """No more audio will come. Raises StreamError when none came at all."""
        if self._heard_nothing:
            raise invalid("the stream ended without any audio: send audio_content before closing it")
        self._submit(Finish())

    async def receive(self) -> Update | None:
        """Returns the next update, None after the last; raises StreamError when the stream failed."""
        update = await self._outbox.get()
        self._look_again()  # there is more room now
        if self._on_final is not None and update is not None and update.result.is_final and update.result.committed:
            self._on_final(update.result.committed)
        return update

    def fail(self, error: BaseException) -> None:
        """Ends the stream with an error, after the updates that are still unread. The slot is free at once."""
        self._outbox.close(to_stream_error(error))
        self._leave()

    def close(self) -> None:
        """Gives the slot back; safe at any time and more than once. Nothing is received after that."""
        self._leave()
        # no circle is left: a stream's buffers go with its last reference, not when the garbage collector comes by
        self._feed.listener = NOBODY

    def _leave(self) -> None:
        self._ended = True
        if not self._closed:
            self._closed = True
            self._feed.abandoned = True
            self._submit(Close())
            self._on_slot_free()
            self._look_again()

    def on_room(self) -> None:
        """See Listener."""
        self._look_again()

    def on_result(self, result: ChunkResult, latency_ms: float) -> None:
        """See Listener."""
        self._processed_s = result.end_ms / 1000
        self._outbox.put(result, latency_ms)
        if result.end_of_stream:
            self._ended = True
            self._outbox.close()
            self._on_slot_free()
        self._look_again()

    def on_failed(self, error: BaseException) -> None:
        """See Listener."""
        self.fail(error)

    def _submit(self, command: Command, wake: bool = True) -> None:
        self._submitted_commands += 1
        self._engine.submit(self._feed, command, wake=wake)

    def _look_again(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def _wait_while(self, condition: Callable[[], bool]) -> None:
        """For one task at a time. Raises StreamError when the stream has ended."""
        self._feed.awaited = True  # before the look, so that what is carried out after it is told
        while not self._ended and condition():
            self._room = asyncio.get_running_loop().create_future()
            await self._room
        self._feed.awaited = False
        if self._ended:
            raise StreamError(grpc.StatusCode.CANCELLED, "the stream has ended")

    @property
    def _unprocessed_s(self) -> float:
        return self._received_bytes / self._bytes_per_second - self._processed_s

    def _has_queued(self) -> bool:
        return self._submitted_commands > self._feed.consumed

    def _is_full(self) -> bool:
        return (
            self._unprocessed_s >= self._limits.backlog_s
            or self._submitted_commands - self._feed.consumed >= _MAX_QUEUED_COMMANDS
            or self._outbox.crowded
        )
