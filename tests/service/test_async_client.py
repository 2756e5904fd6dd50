"""The asyncio client: the same captions as the blocking one, and the server's status whatever was under way."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from service.background import BackgroundServer
from service.client import Access, AsyncSpeechClient, Caption, ServiceError, SpeechClient, StreamSettings
from service.pb import speech_pb2 as pb
from service.pb import speech_pb2_grpc
from tests.conftest import babble
from tests.service.conftest import parts, pcm16

CALLS = 40


async def chunks(data: bytes, size: int) -> AsyncIterator[bytes]:
    for part in parts(data, size):
        yield part
        await asyncio.sleep(0)


def test_same_captions_as_the_blocking_client(server: BackgroundServer) -> None:
    data, settings = pcm16(babble(2.0)), StreamSettings(word_times=True)

    async def listen() -> list[Caption]:
        async with AsyncSpeechClient(server.address) as client:
            return [caption async for caption in client.stream(chunks(data, 3200), settings)]

    with SpeechClient(server.address) as client:
        expected = [caption for caption in client.stream(parts(data), settings) if caption.is_final]
    finals = [caption for caption in asyncio.run(listen()) if caption.is_final]
    assert [(c.text, c.words) for c in finals] == [(c.text, c.words) for c in expected]


class Ending(speech_pb2_grpc.SpeechServicer):
    """Reads one message, answers once, and ends the call while the client goes on sending."""

    def __init__(self, end: Callable[[grpc.aio.ServicerContext], Awaitable[None]]) -> None:
        self._end = end

    async def StreamingRecognize(self, requests: Any, context: Any) -> None:
        await context.read()
        await context.write(pb.StreamingRecognizeResponse(results=[pb.StreamingRecognitionResult(is_final=True)]))
        await self._end(context)


async def outcomes(end: Callable[[grpc.aio.ServicerContext], Awaitable[None]]) -> Counter[tuple[Any, ...]]:
    """How many calls ended how, with how many captions before."""
    server = grpc.aio.server()
    speech_pb2_grpc.add_SpeechServicer_to_server(Ending(end), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    counted: Counter[tuple[Any, ...]] = Counter()

    async def call(client: AsyncSpeechClient) -> None:
        captions = 0
        try:
            async for _ in client.stream(chunks(bytes(4_000_000), 16_384)):
                captions += 1
        except ServiceError as error:
            counted[error.code, error.message, error.retry_after_ms, captions] += 1
        else:
            counted["OK", captions] += 1

    try:
        async with AsyncSpeechClient(f"127.0.0.1:{port}", Access()) as client:
            await asyncio.gather(*(call(client) for _ in range(CALLS)))
    finally:
        await server.stop(None)
    return counted


def test_a_refusal_while_sending_keeps_its_code_and_hint() -> None:
    """grpc.aio alone says INTERNAL for about half of these calls (github.com/grpc/grpc/issues/36066)."""

    async def refuse(context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "all slots taken", (("retry-after-ms", "700"),))

    assert asyncio.run(outcomes(refuse)) == {("RESOURCE_EXHAUSTED", "all slots taken", 700, 1): CALLS}


def test_a_server_that_is_done_early_is_no_error() -> None:
    async def stop(context: grpc.aio.ServicerContext) -> None:
        context.set_code(grpc.StatusCode.OK)

    assert asyncio.run(outcomes(stop)) == {("OK", 1): CALLS}


def test_no_server_is_unavailable() -> None:
    async def call() -> None:
        async with AsyncSpeechClient("127.0.0.1:1") as client:
            async for _ in client.stream(chunks(bytes(3200), 3200)):
                pass

    with pytest.raises(ServiceError) as caught:
        asyncio.run(call())
    assert caught.value.code == "UNAVAILABLE"
