"""Simulated clients: real-time pacing, jittered starts, varied audio, and what each of them experienced."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import soxr

from service.client import AsyncSpeechClient, ServiceError, StreamSettings

RATE_HZ = 16_000
STREAMS_PER_CONNECTION = 32
_SPEEDS = (0.9, 0.94, 0.97, 1.0, 1.03, 1.06, 1.1)


@dataclass(frozen=True)
class Speech:
    """Something to say: 16-bit samples at 16 kHz and their transcript."""

    pcm: bytes
    text: str


def speech_of(samples: np.ndarray, text: str) -> Speech:
    """From (N,) float32 samples in [-1, 1]."""
    return Speech((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes(), text)


def varied(samples: np.ndarray, text: str) -> list[Speech]:
    """One recording at several speeds, for those who have no corpus at hand."""
    return [speech_of(soxr.resample(samples, speed * RATE_HZ, RATE_HZ).astype(np.float32), text) for speed in _SPEEDS]


@dataclass
class Heard:
    """What the clients of one trial saw. Milliseconds; a chunk counts from when its last sample was sent."""

    chunk_ms: list[tuple[float, float]] = field(default_factory=list)  # (second of the trial, latency)
    first_partial_ms: list[float] = field(default_factory=list)  # from the first sample sent to the first text
    end_ms: list[float] = field(default_factory=list)  # from the last sample sent to the last final
    depths: list[tuple[float, int, str]] = field(default_factory=list)  # (second of the trial, exit layer, decision)
    layers: Counter[int] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    references: list[str] = field(default_factory=list)
    hypotheses: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)  # by status
    late_sends: int = 0  # messages sent over 100 ms late: the generator is too slow, the trial says nothing


class Speakers:
    """`count` clients that speak one after another without a pause, until told to stop."""

    def __init__(
        self, address: str, speeches: Sequence[Speech], settings: StreamSettings, message_ms: int, seed: int = 0
    ) -> None:
        self._address, self._speeches, self._settings = address, speeches, settings
        self._message_bytes, self._rng = 2 * RATE_HZ * message_ms // 1000, random.Random(seed)
        self._seconds_per_byte = 1 / (2 * RATE_HZ)
        self.heard = Heard()
        self._begin = time.perf_counter()
        self._measuring = False
        self._stop = asyncio.Event()

    async def run(self, count: int, warm_up_s: float, seconds: float) -> Heard:
        """Speak for `warm_up_s`, then for `seconds` that count; what had begun by then is spoken to its end."""
        async with self.speaking(count) as tasks:
            await asyncio.sleep(warm_up_s)
            self.count_from_now()
            await asyncio.sleep(seconds)
            self._measuring = False
            self._stop.set()
            await asyncio.gather(*tasks)
        return self.heard

    @asynccontextmanager
    async def speaking(self, count: int) -> AsyncIterator[list[asyncio.Task[None]]]:
        """`count` clients speak until the block ends; each one's task may be cancelled before."""
        connections = [AsyncSpeechClient(self._address) for _ in range(-(-count // STREAMS_PER_CONNECTION))]
        tasks = [
            asyncio.create_task(self._speaker(connections[number % len(connections)], number))
            for number in range(count)
        ]
        try:
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for connection in connections:
                await connection.close()

    def count_from_now(self) -> None:
        """What is heard from here on is kept in `heard`, by the time since."""
        self._begin, self._measuring = time.perf_counter(), True

    async def _speaker(self, client: AsyncSpeechClient, number: int) -> None:
        rng = random.Random(self._rng.random() + number)
        await asyncio.sleep(rng.uniform(0, 2.0))  # nobody begins with anybody else
        while not self._stop.is_set():
            await self._speak(client, rng.choice(self._speeches))
            await asyncio.sleep(rng.uniform(0, 0.2))

    async def _speak(self, client: AsyncSpeechClient, speech: Speech) -> None:
        sent: list[tuple[float, float]] = []  # (position in ms, when), a message each
        begin = time.perf_counter()
        finals: list[str] = []
        first_text = False
        counted = self._measuring
        try:
            async for caption in client.stream(self._paced(speech.pcm, begin, sent), self._settings):
                now = time.perf_counter()
                if self._measuring:
                    self._count(caption.chunks[-1].end_ms if caption.chunks else caption.end_ms, now, sent)
                    for chunk in caption.chunks:
                        self.heard.depths.append((now - self._begin, chunk.exit_layer, chunk.decision))
                        self.heard.layers[chunk.exit_layer] += 1
                        self.heard.decisions[chunk.decision] += 1
                if caption.text and not first_text:
                    first_text = True
                    if counted:
                        self.heard.first_partial_ms.append(1000 * (now - begin))
                if caption.is_final and caption.text:
                    finals.append(caption.text)
        except ServiceError as error:
            self.heard.errors[error.code] += 1
            await asyncio.sleep((error.retry_after_ms or 500) / 1000)
            return
        if counted:
            self.heard.end_ms.append(1000 * (time.perf_counter() - sent[-1][1]))
            self.heard.references.append(speech.text)
            self.heard.hypotheses.append(" ".join(finals))

    def _count(self, end_ms: float, now: float, sent: list[tuple[float, float]]) -> None:
        slack_ms = 0.1
        sent_at = next((when for position, when in sent if position + slack_ms >= end_ms), sent[-1][1])
        self.heard.chunk_ms.append((now - self._begin, 1000 * (now - sent_at)))

    async def _paced(self, pcm: bytes, begin: float, sent: list[tuple[float, float]]) -> AsyncIterator[bytes]:
        """A message is sent when its last sample has been spoken, as a microphone would."""
        for start in range(0, len(pcm), self._message_bytes):
            part = pcm[start : start + self._message_bytes]
            position_s = (start + len(part)) * self._seconds_per_byte
            wait_s = begin + position_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            elif self._measuring and wait_s < -0.1:
                self.heard.late_sends += 1
            sent.append((1000 * position_s, time.perf_counter()))
            yield part
