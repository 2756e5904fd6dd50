"""Sessions and the engine thread on a scripted engine: backpressure, slow readers, failures, slots."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from asr_exit.budget import Budget
from asr_exit.errors import AudioError, EngineError
from asr_exit.scheduler import Batching
from asr_exit.stream import StreamOptions
from service.audio_input import AudioFormat
from service.config import LimitsConfig
from service.engine_thread import EngineThread
from service.errors import StreamError
from service.outbox import Update
from service.server import poster
from service.session import Session, StreamRequest
from tests.service.fake_engine import FakeEngine

SECOND = bytes(32_000)


@asynccontextmanager
async def running(engine: FakeEngine, batching: Batching | None = None) -> AsyncIterator[EngineThread]:
    thread = EngineThread(engine, poster(asyncio.get_running_loop()), batching=batching)  # type: ignore[arg-type]
    thread.start()
    try:
        yield thread
    finally:
        await asyncio.to_thread(thread.stop)
        await asyncio.sleep(0)


def request(**changes: object) -> StreamRequest:
    values: dict[str, object] = {
        "options": StreamOptions(),
        "audio": AudioFormat("linear16", 16_000),
        "interim_results": True,
        "word_times": False,
    }
    return StreamRequest(**(values | changes))  # type: ignore[arg-type]


async def opened(thread: EngineThread, limits: LimitsConfig | None = None, **changes: object) -> Session:
    session = Session(request(**changes), thread, limits or LimitsConfig())
    session.open()
    return session


async def drain(session: Session) -> list[Update]:
    updates = []
    while (update := await session.receive()) is not None:
        updates.append(update)
    return updates


async def until(condition, timeout_s: float = 2.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


async def receive(session: Session) -> list[int]:
    update = await asyncio.wait_for(session.receive(), 5.0)
    return chunk_indices([] if update is None else [update])


def chunk_indices(updates: list[Update]) -> list[int]:
    return [chunk.index for update in updates for chunk in update.chunks]


@pytest.mark.parametrize("interim_results", [True, False])
async def test_every_chunk_is_reported_once(interim_results: bool) -> None:
    async with running(FakeEngine(final_every=3)) as thread:
        session = await opened(thread, interim_results=interim_results)
        for _ in range(5):
            await session.send_audio(SECOND)
        session.finish()
        updates = await drain(session)
    assert chunk_indices(updates) == list(range(8))
    assert [update.result.committed for update in updates if update.lasting] == ["w0 w1 w2", "w3 w4 w5", "w6 w7"]
    assert interim_results or all(update.lasting for update in updates)


def test_an_engine_that_cannot_be_prepared_does_not_start() -> None:
    def fail() -> None:
        raise MemoryError("no room for the kernels")

    thread = EngineThread(FakeEngine(), lambda events: None, prepare=fail)  # type: ignore[arg-type]
    with pytest.raises(MemoryError, match="no room"):
        thread.start()
    thread.stop()


async def test_a_slow_reader_loses_interims_but_no_final_and_no_chunk() -> None:
    async with running(FakeEngine(final_every=4)) as thread:
        session = await opened(thread)
        for _ in range(8):
            await session.send_audio(SECOND)
        session.finish()
        await until(lambda: session._outbox._closed)
        updates = await drain(session)
    assert [update.result.committed for update in updates] == ["w0 w1 w2 w3", "w4 w5 w6 w7", "w8 w9 w10 w11", "w12"]
    assert chunk_indices(updates) == list(range(13))


async def test_a_chunk_in_many_messages_is_decoded_at_once_and_less_than_one_within_a_second() -> None:
    engine = FakeEngine()
    pushed = engine.pushed
    async with running(engine) as thread:
        session = await opened(thread)
        for _ in range(4):
            await session.send_audio(bytes(5_120))
        await until(lambda: bool(pushed))
        assert pushed == [(0, 10_240)]
        await session.send_audio(bytes(5_120))
        await until(lambda: len(pushed) == 2)
        assert pushed[1] == (0, 2_560)
        session.close()


async def test_a_chunk_in_one_message_is_computed_when_it_comes() -> None:
    """However its end is rounded: 1.92 - 1.28 is less than 0.64."""
    async with running(FakeEngine()) as thread:
        session = await opened(thread)
        for index in range(40):
            await session.send_audio(bytes(20_480))
            update = await asyncio.wait_for(session.receive(), 0.3)
            assert update is not None
            assert chunk_indices([update]) == [index]
        session.close()


async def test_what_was_put_by_does_not_call_for_what_came_after_it() -> None:
    engine = FakeEngine()
    pushed = engine.pushed
    async with running(engine) as thread:
        session = await opened(thread)
        for _ in range(4):
            await session.send_audio(bytes(5_120))
        await until(lambda: pushed == [(0, 10_240)])
        await asyncio.sleep(0.4)
        await session.send_audio(bytes(5_120))
        await asyncio.sleep(0.3)  # what began to wait 0.7 s ago has been decoded since
        assert pushed == [(0, 10_240)]
        await until(lambda: pushed == [(0, 10_240), (0, 2_560)])
        session.close()


async def test_audio_behind_a_chunk_without_an_answer_waits_for_the_answer() -> None:
    engine, steps = FakeEngine(), threading.Semaphore(0)
    pushed, step = engine.pushed, engine.step
    engine.step = lambda streams: (steps.acquire(), step(streams))[1]  # type: ignore
    chunk = bytes(20_480)
    async with running(engine, Batching(max_batch=1, max_wait_ms=0)) as thread:
        first, second, third = [await opened(thread) for _ in range(3)]
        await first.send_audio(chunk)
        await until(lambda: pushed == [(0, 10_240)])
        await second.send_audio(chunk)  # while the first one's step is under way
        await third.send_audio(chunk)
        steps.release()
        await until(lambda: len(pushed) == 3)  # the second one's step is under way, the third waits for its own
        for _ in range(2):
            await third.send_audio(bytes(5_120))
        steps.release(2)
        assert [await receive(session) for session in (first, second, third)] == [[0], [0], [0]]
        assert pushed == [(0, 10_240), (1, 10_240), (2, 10_240)]
        for _ in range(3):
            await third.send_audio(bytes(5_120))
        steps.release()
        assert await receive(third) == [1]
        assert sum(size for number, size in pushed if number == 2) in (20_480, 23_040)
        assert len(pushed) <= 5
        steps.release(9)
        for session in (first, second, third):
            session.close()


async def test_a_chunk_that_came_while_the_one_before_was_computed_follows_at_once() -> None:
    engine, steps = FakeEngine(), threading.Semaphore(0)
    step = engine.step
    engine.step = lambda streams: (steps.acquire(), step(streams))[1]  # type: ignore
    async with running(engine) as thread:
        session = await opened(thread)
        await session.send_audio(bytes(20_480))
        await asyncio.sleep(0.05)  # its step is under way
        for _ in range(5):
            await session.send_audio(bytes(5_120))
        steps.release(2)
        begin = asyncio.get_running_loop().time()
        answered = await receive(session)
        while len(answered) < 2:
            answered += await receive(session)
        assert answered == [0, 1]
        assert asyncio.get_running_loop().time() - begin < 0.3  # not only when it has been put by for long enough
        steps.release(9)
        session.close()


async def test_audio_waits_while_the_engine_is_behind() -> None:
    engine = FakeEngine()
    engine.paused = True
    async with running(engine) as thread:
        session = await opened(thread, LimitsConfig(backlog_s=3.0))
        sending = asyncio.create_task(send_seconds(session, 20))
        await asyncio.sleep(0.1)
        assert not sending.done()
        assert 3.0 <= session._received_bytes / 32_000 <= 3.5
        engine.paused = False
        thread.submit(session._feed, noop())
        await sending
        session.finish()
        assert len(chunk_indices(await drain(session))) == 32


async def test_audio_waits_while_the_client_does_not_read() -> None:
    async with running(FakeEngine()) as thread:
        session = await opened(thread, LimitsConfig(unread_chunks=4))
        sending = asyncio.create_task(send_seconds(session, 60))
        await until(lambda: session._outbox.crowded)
        await asyncio.sleep(0.05)
        assert not sending.done()
        collected = asyncio.create_task(drain(session))
        await sending
        session.finish()
        assert chunk_indices(await collected) == list(range(94))


async def test_tiny_messages_are_bounded_too() -> None:
    engine = FakeEngine()
    async with running(engine) as thread:
        session = await opened(thread)
        engine.gate.clear()
        sending = asyncio.create_task(send_parts(session, [b"\0\0"] * 1000))
        await asyncio.sleep(0.05)
        assert session._received_bytes <= 2 * 65
        engine.gate.set()
        await sending
        session.finish()
        await drain(session)
        assert engine.opened[0].samples == 1000


async def test_a_failure_ends_its_stream_only() -> None:
    engine = FakeEngine()
    engine.fail_at[0, 1] = EngineError("broken")
    async with running(engine) as thread:
        broken, healthy = await opened(thread), await opened(thread)
        for session in (broken, healthy):
            await session.send_audio(SECOND)
            await session.send_audio(SECOND)
            session.finish()
        assert len(chunk_indices(await drain(healthy))) == 4
        assert (await broken.receive()) is not None
        with pytest.raises(StreamError, match="other streams go on") as caught:
            await drain(broken)
        assert caught.value.code is grpc.StatusCode.INTERNAL
        assert "broken" not in caught.value.message
        assert engine.free_slots == 4


async def test_a_failing_step_ends_its_streams_and_the_loop_lives_on() -> None:
    engine = FakeEngine()
    async with running(engine) as thread:
        session = await opened(thread)
        engine.raise_in_step = RuntimeError("out of memory")
        await session.send_audio(SECOND)
        with pytest.raises(StreamError) as caught:
            await drain(session)
        assert caught.value.code is grpc.StatusCode.INTERNAL
        again = await opened(thread)
        await again.send_audio(SECOND)
        again.finish()
        assert chunk_indices(await drain(again)) == [0, 1]
        assert engine.free_slots == 4


async def test_bad_audio_ends_its_stream_only() -> None:
    engine = FakeEngine()
    async with running(engine) as thread:
        session = await opened(thread, audio=AudioFormat("float32", 16_000))
        await session.send_audio(b"\0\0\xc0\x7f" * 100)
        with pytest.raises(StreamError, match="sample 0 is NaN") as caught:
            await drain(session)
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert engine.free_slots == 4


async def test_full_then_free_again() -> None:
    engine = FakeEngine(slots=1)
    async with running(engine) as thread:
        first = await opened(thread)
        with pytest.raises(StreamError, match="try again later") as caught:
            await (await opened(thread)).receive()
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.close()
        first.close()
        await until(lambda: engine.free_slots == 1)
        (await opened(thread)).close()


async def test_closing_drops_queued_audio() -> None:
    engine = FakeEngine()
    engine.paused = True
    async with running(engine) as thread:
        session = await opened(thread)
        await session.send_audio(SECOND * 5)
        session.close()
        await until(lambda: engine.free_slots == 4)
        with pytest.raises(StreamError):
            await session.send_audio(SECOND)


async def test_the_end_of_a_stream_frees_its_slot_before_the_client_reads() -> None:
    engine = FakeEngine()
    async with running(engine) as thread:
        session = await opened(thread)
        await session.send_audio(SECOND)
        session.finish()
        await until(lambda: engine.free_slots == 4)
        assert chunk_indices(await drain(session)) == [0, 1]


async def test_stopping_ends_running_streams() -> None:
    engine = FakeEngine()
    async with running(engine) as thread:
        session = await opened(thread)
    with pytest.raises(StreamError, match="shutting down") as caught:
        await session.receive()
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert engine.free_slots == 4


async def test_budget_reaches_the_engine_in_order() -> None:
    engine = FakeEngine()
    async with running(engine) as thread:
        session = await opened(thread)
        await session.send_audio(SECOND)
        session.set_budget(Budget(mean_depth=0.5))
        session.finish()
        await drain(session)
    assert engine.opened[0].budgets == [Budget(mean_depth=0.5)]


async def test_no_audio_and_oversized_messages() -> None:
    async with running(FakeEngine()) as thread:
        session = await opened(thread, LimitsConfig(message_bytes=2048))
        with pytest.raises(StreamError, match="without any audio"):
            session.finish()
        with pytest.raises(StreamError, match="at most 2048 bytes"):
            await session.send_audio(bytes(2049))
        with pytest.raises(AudioError, match="8000 to 48000"):
            AudioFormat("linear16", 4000)


async def send_seconds(session: Session, seconds: int) -> None:
    await send_parts(session, [SECOND] * seconds)


async def send_parts(session: Session, parts: list[bytes]) -> None:
    for part in parts:
        await session.send_audio(part)


def noop():
    from service.feed import SetBudget

    return SetBudget(Budget())
