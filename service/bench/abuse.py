"""Bad clients among good ones: streams cancelled, half-closed, left idle and killed by the thousand.

The good ones must get the very texts they get alone, every slot must come back, and so must the memory.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import grpc

from service.bench.served import BenchError, ServedProcess
from service.bench.speakers import STREAMS_PER_CONNECTION, Speech
from service.client import AsyncSpeechClient, StreamSettings

KINDS = ("cancelled", "half-closed", "idle", "killed")
MEMORY_BAR_MB = 10.0
SERVER_TOML = "[limits]\nidle_s = 2.0\nstreams = {slots}\n[load]\nshed_depth = false\n[log]\nlevel = 'error'\n"
_AT_A_TIME = 100  # bad streams of each kind
_SECONDS = 0.7  # of audio that a bad stream sends before it misbehaves
_SETTLE_S = 30.0
_TIDIED_S = 2.0  # after the last stream the server gives back what it kept, when nobody came for a while
_KILLED_CLIENT = """
import asyncio, sys
from service.client import AsyncSpeechClient, StreamSettings
async def audio():
    yield bytes(int(sys.argv[3]))
    await asyncio.sleep(600)
async def speak(client):
    async for _ in client.stream(audio(), StreamSettings()):
        pass
async def main():
    client = AsyncSpeechClient(sys.argv[1])
    tasks = [asyncio.create_task(speak(client)) for _ in range(int(sys.argv[2]))]
    await asyncio.sleep(0.5)
    print("speaking", flush=True)
    await asyncio.gather(*tasks, return_exceptions=True)
asyncio.run(main())
"""


@dataclass(frozen=True)
class AbuseReport:
    """What came of it."""

    bad_streams: dict[str, int]  # opened, by kind
    good_streams: int
    changed_texts: list[tuple[str, str]]  # (alone, among bad ones)
    failed_streams: int  # good ones that ended with an error
    open_streams: int  # at the end, according to the server
    rss_before_mb: float
    rss_after_mb: float
    in_use_growth_mb: float | None  # of memory given out and not got back; None where nobody tells

    @property
    def growth_mb(self) -> float:
        """Resident memory after minus before."""
        return self.rss_after_mb - self.rss_before_mb

    @property
    def holds(self) -> bool:
        """Every text the same, every slot back, memory within the bar."""
        fine = not self.changed_texts and not self.failed_streams and self.open_streams == 0
        return fine and self.growth_mb <= MEMORY_BAR_MB


async def measure_abuse(
    server: ServedProcess, speeches: Sequence[Speech], *, bad: int, good: int, seed: int = 0
) -> AbuseReport:
    """Run `good` streams alone, then again among `bad` ones. Raises BenchError when they fail even alone."""
    alone = await _good(server.address, speeches, good)
    if any(text is None for text in alone):
        raise BenchError("the streams fail even without bad ones: is the server large enough?")
    await _mixed(server.address, speeches, min(bad, 4 * _AT_A_TIME), good, seed + 1)  # what one wave needs, it may keep
    await _settled(server)
    before, in_use_before = server.usage().rss_mb, server.memory_in_use_mb()
    opened, among = await _mixed(server.address, speeches, bad, good, seed)
    left = await _settled(server)
    in_use = server.memory_in_use_mb()
    pairs = [(alone[index % good], text) for index, text in enumerate(among)]
    return AbuseReport(
        bad_streams=opened,
        good_streams=len(among),
        changed_texts=[(ours or "", theirs) for ours, theirs in pairs if theirs is not None and theirs != ours],
        failed_streams=sum(text is None for text in among),
        open_streams=left,
        rss_before_mb=before,
        rss_after_mb=server.usage().rss_mb,
        in_use_growth_mb=None if in_use is None or in_use_before is None else in_use - in_use_before,
    )


async def _mixed(
    address: str, speeches: Sequence[Speech], bad: int, good: int, seed: int
) -> tuple[dict[str, int], list[str | None]]:
    """Rounds of good streams for as long as the bad ones take; returns what `_bad` and `_good` do."""
    stop = asyncio.Event()
    good_task = asyncio.create_task(_good(address, speeches, good, stop))
    opened = await _bad(address, bad, random.Random(seed))
    stop.set()
    return opened, await good_task


async def _good(
    address: str, speeches: Sequence[Speech], count: int, stop: asyncio.Event | None = None
) -> list[str | None]:
    """Rounds of `count` streams until `stop`, at least one; texts in order, None for a failure."""
    texts: list[str | None] = []
    async with AsyncSpeechClient(address) as client:
        while not texts or not (stop is None or stop.is_set()):
            jobs = [_transcript(client, speeches[index % len(speeches)]) for index in range(count)]
            texts += await asyncio.gather(*jobs)
    return texts


async def _transcript(client: AsyncSpeechClient, speech: Speech) -> str | None:
    async def audio() -> AsyncIterator[bytes]:
        for start in range(0, len(speech.pcm), 6400):
            yield speech.pcm[start : start + 6400]
            await asyncio.sleep(0.02)  # ten times real time

    with suppress(Exception):
        finals = [caption.text async for caption in client.stream(audio(), StreamSettings()) if caption.is_final]
        return " ".join(final for final in finals if final)
    return None


async def _bad(address: str, count: int, rng: random.Random) -> dict[str, int]:
    """Streams of every kind, so many at a time; returns how many of each were opened."""
    shares = {kind: count // len(KINDS) for kind in KINDS}
    shares["cancelled"] += count - sum(shares.values())
    waves = []
    for kind, share in shares.items():
        waves += [(kind, min(_AT_A_TIME, share - first)) for first in range(0, share, _AT_A_TIME)]
    rng.shuffle(waves)
    running: set[asyncio.Task[None]] = set()
    for kind, size in waves:
        if len(running) >= len(KINDS):
            _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        running.add(
            asyncio.create_task(_killed(address, size) if kind == "killed" else _wave(address, kind, size, rng))
        )
    if running:
        await asyncio.wait(running)
    return shares


async def _wave(address: str, kind: str, count: int, rng: random.Random) -> None:
    clients = [AsyncSpeechClient(address) for _ in range(-(-count // STREAMS_PER_CONNECTION))]
    try:
        jobs = [_misbehave(clients[index % len(clients)], kind, rng.uniform(0.0, 0.5)) for index in range(count)]
        await asyncio.gather(*jobs)
    finally:
        for client in clients:
            await client.close()


async def _misbehave(client: AsyncSpeechClient, kind: str, after_s: float) -> None:
    """One bad stream. Whatever the server says is fine: these clients do not count."""

    async def audio() -> AsyncIterator[bytes]:
        if kind == "half-closed":
            return
        yield bytes(2 * int(16_000 * _SECONDS))
        await asyncio.sleep(after_s if kind == "cancelled" else 600)

    async def listen() -> None:
        async for _ in client.stream(audio(), StreamSettings()):
            pass

    with suppress(Exception):
        task = asyncio.create_task(listen())
        if kind == "cancelled":
            await asyncio.sleep(after_s)
            task.cancel()
        with suppress(asyncio.CancelledError, grpc.RpcError):
            await task


async def _killed(address: str, count: int) -> None:
    """A process with `count` open streams that is gone without a word."""
    command = [sys.executable, "-c", _KILLED_CLIENT, address, str(count), str(2 * int(16_000 * _SECONDS))]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.stdout.readline(), 30)
    process.kill()
    await process.wait()


async def _settled(server: ServedProcess) -> int:
    """Waits until the server has no stream, but not for ever; returns how many it has."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        streams = round((await asyncio.to_thread(server.figures))["asr_exit_streams"])
        if streams == 0 or time.monotonic() > deadline:
            await asyncio.sleep(_TIDIED_S)
            return streams
        await asyncio.sleep(0.2)
