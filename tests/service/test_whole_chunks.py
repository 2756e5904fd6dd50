"""Clients send raw audio a chunk at a time: nothing lost, nothing late, commands in their place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr_exit.budget import Budget
from service.background import BackgroundServer
from service.client import AsyncSpeechClient, Caption, Flush, Part, SpeechClient, StreamSettings
from service.whole_chunks import Collector
from tests.conftest import babble
from tests.service.conftest import parts, pcm16

CHUNK = 64
FLUSH = Flush()


def sent(given_parts: list[Part], chunk_bytes: int = CHUNK) -> list[Part]:
    collector = Collector(chunk_bytes)
    messages = [message for part in given_parts for message in collector.add(part)]
    return [*messages, *collector.rest()]


@given(st.lists(st.one_of(st.binary(max_size=200), st.just(FLUSH), st.just(Budget(mean_depth=0.5)))))
def test_the_same_audio_and_commands_in_the_same_places(given_parts: list[Part]) -> None:
    def places(messages: list[Part]) -> tuple[bytes, list[tuple[int, Part]]]:
        audio, commands = b"", []
        for message in messages:
            if isinstance(message, bytes):
                audio += message
            else:
                commands.append((len(audio), message))
        return audio, commands

    assert places(sent(given_parts)) == places(given_parts)


@given(st.lists(st.binary(min_size=1, max_size=200).filter(lambda data: data[0] != ord("R")), min_size=1))
def test_a_chunk_leaves_with_its_last_sample(given_parts: list[Part]) -> None:
    collector, received, left = Collector(CHUNK), 0, 0
    for part in given_parts:
        assert isinstance(part, bytes)
        received += len(part)
        messages = [message for message in collector.add(part) if isinstance(message, bytes)]
        assert all(len(message) == CHUNK for message in messages)
        left += sum(map(len, messages))
        assert left == received - received % CHUNK


def test_a_flush_sends_what_there_is_and_moves_no_chunk() -> None:
    messages = sent([bytes(40), FLUSH, bytes(100)])
    assert [len(m) if isinstance(m, bytes) else m for m in messages] == [40, FLUSH, 24, 64, 12]


@pytest.mark.parametrize("split", [1, 5, 12, 44, 300])
def test_behind_a_wav_header_audio_is_sent_as_it_comes(split: int) -> None:
    data = b"RIFF\x00\x00\x00\x00WAVEfmt " + bytes(400)
    messages = sent([data[:split], data[split:], bytes(10)])
    assert b"".join(m for m in messages if isinstance(m, bytes)) == data + bytes(10)
    assert messages[-1] == bytes(10)


@pytest.mark.parametrize(
    ("settings", "chunk_bytes"),
    [
        (StreamSettings(chunk_ms=640), 20_480),
        (StreamSettings(chunk_ms=160, encoding="mulaw", channels=2), 5_120),
        (StreamSettings(), None),
        (StreamSettings(chunk_ms=640, whole_chunks=False), None),
        (StreamSettings(chunk_ms=640, rate_hz=8_000), None),
        (StreamSettings(chunk_ms=640, encoding="flac"), None),
        (StreamSettings(chunk_ms=640, encoding="any", rate_hz=0), None),
    ],
)
def test_what_is_collected(settings: StreamSettings, chunk_bytes: int | None) -> None:
    collector = settings.collector()
    sizes = None if collector is None else [len(m) for m in collector.add(bytes(50_000)) if isinstance(m, bytes)]
    assert sizes == (None if chunk_bytes is None else [chunk_bytes] * (50_000 // chunk_bytes))


def test_the_server_answers_each_chunk_as_soon(server: BackgroundServer) -> None:
    """The audio of the next chunk is only given once the chunk before was answered, in both clients."""
    data, settings = pcm16(babble(2.6)), StreamSettings(chunk_ms=640)
    small = parts(data, 640)
    answered: list[float] = []

    def reached(sent_bytes: int) -> bool:
        whole_ms = sent_bytes / 32 // 640 * 640
        return whole_ms == 0 or (bool(answered) and answered[-1] >= whole_ms)

    async def listen() -> list[Caption]:
        async def speak() -> AsyncIterator[bytes]:
            for number, part in enumerate(small):
                while not reached(640 * number):
                    await asyncio.sleep(0.005)
                yield part

        captions = []
        async with AsyncSpeechClient(server.address) as client:
            async for caption in client.stream(speak(), settings):
                answered.append(caption.end_ms)
                captions.append(caption)
        return captions

    ours = asyncio.run(asyncio.wait_for(listen(), 30))
    apart = StreamSettings(chunk_ms=640, whole_chunks=False)
    with SpeechClient(server.address) as client:
        plain, collected = (list(client.stream(iter(small), one)) for one in (apart, settings))
    finals = [[caption.text for caption in captions if caption.is_final] for captions in (ours, plain, collected)]
    assert finals[0] == finals[1] == finals[2]
    assert [chunk.end_ms for caption in ours for chunk in caption.chunks][:4] == [640, 1280, 1920, 2560]


def test_settings_that_make_no_message_raise_what_is_wrong(server: BackgroundServer) -> None:
    wrong = StreamSettings(chunk_ms=2**40)

    async def listen() -> list[Caption]:
        async def speak() -> AsyncIterator[bytes]:
            yield bytes(640)

        async with AsyncSpeechClient(server.address) as client:
            return [caption async for caption in client.stream(speak(), wrong)]

    with SpeechClient(server.address) as client, pytest.raises(ValueError, match="range"):
        list(client.stream([bytes(640)], wrong))
    with pytest.raises(ValueError, match="range"):
        asyncio.run(listen())


def test_what_reading_the_audio_raised_reaches_the_caller(server: BackgroundServer) -> None:
    def broken() -> Iterator[bytes]:
        yield bytes(640)
        raise RuntimeError("the microphone was unplugged")

    with SpeechClient(server.address) as client, pytest.raises(RuntimeError, match="unplugged"):
        list(client.stream(broken(), StreamSettings(chunk_ms=640)))
