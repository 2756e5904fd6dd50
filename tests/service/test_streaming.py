"""The real engine behind real loopback connections: text, times, depth, budgets, rates, many streams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import grpc
import numpy as np
import pytest
import soxr
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from asr_exit.budget import Budget
from asr_exit.checkpoint import Model
from asr_exit.policy import parse_policy
from asr_exit.recognizer import Recognizer
from asr_exit.stream import Fill, StreamOptions
from service.background import BackgroundServer
from service.client import AsyncSpeechClient, Caption, SpeechClient, StreamSettings
from service.pb import speech_pb2 as pb
from service.pb import speech_pb2_grpc
from tests.conftest import babble, random_model
from tests.service.conftest import parts, pcm16, serve_config

AUDIO = babble(6.3, seed=1)
DATA = pcm16(AUDIO)
HEARD = np.frombuffer(DATA, dtype="<i2").astype(np.float32) / 32768  # what is left of it after 16 bits


def text_of(captions: list[Caption]) -> str:
    return " ".join(caption.text for caption in captions if caption.is_final and caption.text)


def transcript(model: Model, **options: object) -> str:
    return Recognizer(model, StreamOptions(**options)).transcribe(HEARD).text  # type: ignore[arg-type]


def raw(server: BackgroundServer, *requests: pb.StreamingRecognizeRequest) -> list[pb.StreamingRecognizeResponse]:
    with grpc.insecure_channel(server.address) as channel:
        return list(speech_pb2_grpc.SpeechStub(channel).StreamingRecognize(iter(requests)))


def config_message(**changes: object) -> pb.StreamingRecognizeRequest:
    values: dict[str, object] = {"encoding": pb.StreamingConfig.LINEAR16, "sample_rate_hertz": 16_000}
    return pb.StreamingRecognizeRequest(streaming_config=pb.StreamingConfig(**(values | changes)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "chunk_ms", "fill"),
    [
        ("full", 640, "catch_up"),
        ("exit:2", 320, "propagate"),
        ("posterior:0.4", 640, "catch_up"),
        ("posterior:0.4", 320, "propagate"),
        ("random:5", 160, "hole"),
        ("random:5", 640, "catch_up"),
        ("full", 1280, "hole"),
    ],
)
def test_text_is_the_librarys(client: SpeechClient, model: Model, policy: str, chunk_ms: int, fill: str) -> None:
    captions = list(client.stream(parts(DATA, 3200), StreamSettings(chunk_ms=chunk_ms, policy=policy, fill=fill)))
    parsed = parse_policy(policy, exit_layers=model.config.exit_layers, calibration={})
    expected = transcript(model, chunk_ms=chunk_ms, policy=parsed, fill=Fill(fill))
    assert expected
    assert text_of(captions) == expected


@pytest.mark.parametrize("size", [1001, 64_000, len(DATA)])
def test_text_does_not_depend_on_the_messages(client: SpeechClient, model: Model, size: int) -> None:
    assert text_of(list(client.stream(parts(DATA, size)))) == transcript(model)


@pytest.mark.parametrize("fill", list(Fill))
def test_fills(client: SpeechClient, model: Model, fill: Fill) -> None:
    settings = StreamSettings(fill=fill.value, policy="random:3")
    policy = parse_policy("random:3", exit_layers=model.config.exit_layers, calibration={})
    assert text_of(list(client.stream(parts(DATA), settings))) == transcript(model, fill=fill, policy=policy)


@pytest.mark.parametrize("interim_results", [True, False])
def test_every_chunk_is_reported_once(client: SpeechClient, interim_results: bool) -> None:
    settings = StreamSettings(interim_results=interim_results, policy="random:1", fill="propagate")
    captions = list(client.stream(parts(DATA), settings))
    chunks = [chunk for caption in captions for chunk in caption.chunks if chunk.decision != "final"]
    assert [chunk.index for chunk in chunks] == list(range(10))
    assert [chunk.start_ms for chunk in chunks] == [640 * index for index in range(10)]
    assert chunks[-1].end_ms == pytest.approx(6300)
    assert len({chunk.exit_layer for chunk in chunks}) > 2
    assert all(chunk.encoder_macs > 0 and chunk.decision == "full" for chunk in chunks)
    assert captions[-1].is_final
    assert all(caption.is_final for caption in captions) is not interim_results


def test_interims_grow_into_the_final(client: SpeechClient) -> None:
    captions = list(client.stream(parts(DATA)))
    for caption in captions:
        assert caption.text.startswith(caption.committed)
        assert 0 <= caption.stability <= 1
        assert caption.latency_ms >= 0
    assert captions[-1].is_final
    assert captions[-1].stability == 1


def test_word_times(client: SpeechClient) -> None:
    assert not any(caption.words for caption in client.stream(parts(DATA)))
    captions = list(client.stream(parts(DATA), StreamSettings(word_times=True)))
    finals = [caption for caption in captions if caption.is_final and caption.text]
    for caption in finals:
        assert " ".join(word.text for word in caption.words) == caption.text
        assert all(0 < word.confidence <= 1 for word in caption.words)
        assert caption.confidence == pytest.approx(np.mean([word.confidence for word in caption.words]), abs=1e-5)
    times = [time for caption in finals for word in caption.words for time in (word.start_ms, word.end_ms)]
    assert times == sorted(times)
    assert times[-1] <= 6400


def test_concatenated_finals_are_the_transcript() -> None:
    """A model that often hears nothing and a short endpoint, so that there are several finals."""
    model = random_model()
    deepest = Recognizer(model).log_posteriors(HEARD, 160)[-1]
    gap = deepest[:, 1:].max(axis=1) - deepest[:, 0]
    with torch.no_grad():
        model.encoder.segments[-1].head.out.bias[0] += float(np.quantile(gap, 0.7))
    with BackgroundServer(model, serve_config(stream={"endpoint_silence_ms": 80})) as server:
        audio_messages = [pb.StreamingRecognizeRequest(audio_content=part) for part in parts(DATA)]
        responses = raw(server, config_message(chunk_ms=160), *audio_messages)
    assert all(len(response.results) == 1 for response in responses)
    results = [response.results[0] for response in responses]
    transcripts = [result.alternatives[0].transcript for result in results if result.alternatives]
    assert all(result.is_final for result in results)
    assert len(transcripts) > 2
    assert not transcripts[0].startswith(" ")
    assert all(text.startswith(" ") and not text.endswith(" ") for text in transcripts[1:])
    options = StreamOptions(chunk_ms=160, endpoint_silence_ms=80)
    assert "".join(transcripts) == Recognizer(model, options).transcribe(HEARD).text


def test_budget_changes_while_streaming(client: SpeechClient) -> None:
    half = len(DATA) // 2
    messages = [*parts(DATA[:half]), Budget(max_exit_layer=4), *parts(DATA[half:])]
    captions = list(client.stream(messages, StreamSettings(fill="propagate")))
    chunks = [chunk for caption in captions for chunk in caption.chunks]
    layers = [chunk.exit_layer for chunk in chunks]
    assert layers[0] == 12
    assert layers[-1] == 4
    assert sorted(layers, reverse=True) == layers
    assert {chunk.decision for chunk in chunks if chunk.exit_layer == 4} == {"budget"}


def test_mean_depth_is_kept(client: SpeechClient) -> None:
    settings = StreamSettings(budget=Budget(mean_depth=0.6), fill="hole", chunk_ms=160)
    captions = list(client.stream(parts(DATA), settings))
    spent = sum(chunk.encoder_macs for caption in captions for chunk in caption.chunks)
    full = client.model().exits[-1].encoder_macs_per_second * 6.3
    assert 0.5 < spent / full <= 0.62


@pytest.mark.parametrize(("encoding", "rate_hz"), [("linear16", 8_000), ("linear16", 44_100), ("float32", 48_000)])
def test_other_rates(client: SpeechClient, model: Model, encoding, rate_hz: int) -> None:
    other = soxr.resample(AUDIO, 16_000, rate_hz)
    data = pcm16(other) if encoding == "linear16" else other.astype("<f4").tobytes()
    heard = np.frombuffer(data, dtype="<i2").astype(np.float32) / 32768 if encoding == "linear16" else other
    expected = Recognizer(model).transcribe(soxr.resample(heard, rate_hz, 16_000)).text
    settings = StreamSettings(rate_hz=rate_hz, encoding=encoding)
    assert text_of(list(client.stream(parts(data, 9_999), settings))) == expected


async def test_many_streams_each_at_its_own_depth(server: BackgroundServer, client: SpeechClient) -> None:
    policies = ["full", "exit:2", "exit:8", "random:1"] * 4
    alone = {
        policy: text_of(list(client.stream(parts(DATA), StreamSettings(policy=policy)))) for policy in policies[:4]
    }

    async def one(connected: AsyncSpeechClient, index: int) -> str:
        async def audio() -> AsyncIterator[bytes]:
            for part in parts(DATA, 2_000 + 300 * index):
                await asyncio.sleep(0.001 * (index % 5))
                yield part

        settings = StreamSettings(policy=policies[index])
        return text_of([caption async for caption in connected.stream(audio(), settings)])

    async with AsyncSpeechClient(server.address) as connected:
        texts = await asyncio.gather(*(one(connected, index) for index in range(len(policies))))
    assert texts == [alone[policy] for policy in policies]


def test_load_lowers_the_ceiling(model: Model) -> None:
    """A target no machine can hold: every chunk is overload."""
    with (
        BackgroundServer(model, serve_config(load={"target_latency_ms": 0.001})) as server,
        SpeechClient(server.address) as client,
    ):
        captions = list(client.stream(parts(DATA), StreamSettings(fill="propagate", chunk_ms=160)))
    chunks = [chunk for caption in captions for chunk in caption.chunks]
    assert chunks[0].exit_layer == 12
    shed = [chunk for chunk in chunks if chunk.exit_layer < 12]
    assert shed
    assert {chunk.decision for chunk in shed} == {"load"}


def test_a_caption_comes_before_the_audio_ends(client: SpeechClient) -> None:
    came = False

    def audio() -> Iterator[bytes]:
        yield DATA[:32_000]
        for _ in range(500):
            if came:
                return
            time.sleep(0.01)
        raise AssertionError("no caption within five seconds")

    for _ in client.stream(audio()):
        came = True
    assert came


def test_model(client: SpeechClient, model: Model) -> None:
    described = client.model()
    assert described.name == model.name
    assert [item.layer for item in described.exits] == list(model.config.exit_layers)
    macs = [item.encoder_macs_per_second for item in described.exits]
    assert macs == sorted(macs)
    assert macs[0] > 0
    assert list(described.chunk_ms) == [160, 320, 640, 1280]
    assert described.default_chunk_ms == 640
    assert described.parameters == sum(parameter.numel() for parameter in model.encoder.parameters())


def test_health_and_reflection(server: BackgroundServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "asr_exit.v1.Speech"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]))
        names = {service.name for service in next(answers).list_services_response.service}
        assert names >= {"asr_exit.v1.Speech", "grpc.health.v1.Health"}
