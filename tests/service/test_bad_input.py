"""Every mistake gets its own status and a message that says what to change, and nobody else notices."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Iterable, Iterator

import grpc
import numpy as np
import pytest
import soundfile

from asr_exit.checkpoint import Model
from service.background import BackgroundServer
from service.client import ServiceError, SpeechClient
from service.pb import speech_pb2 as pb
from service.pb import speech_pb2_grpc
from tests.conftest import babble
from tests.service.conftest import parts, pcm16, serve_config
from tests.service.fake_engine import FakeEngine
from tests.service.test_streaming import config_message, text_of

DATA = pcm16(babble(2.0))
Request = pb.StreamingRecognizeRequest


def audio(data: bytes = DATA) -> Request:
    return Request(audio_content=data)


def budget(**values: float) -> pb.ComputeBudget:
    return pb.ComputeBudget(**values)  # type: ignore[arg-type]


def control(**values: float) -> Request:
    return Request(control=pb.StreamControl(compute_budget=budget(**values)))


def wav(rate_hz: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, babble(0.5), rate_hz, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def floats(*values: float) -> Request:
    return audio(np.array([0.0] * 1000 + list(values), dtype="<f4").tobytes())


FLOAT_CONFIG = config_message(encoding=pb.StreamingConfig.FLOAT32)
MISTAKES: dict[str, tuple[list[Request | bytes], str]] = {
    "nothing": ([], "ended before its configuration"),
    "empty message": ([Request()], "the first message carries nothing"),
    "audio before config": ([audio()], "first message carries audio_content"),
    "control before config": ([control(mean_depth=0.5)], "first message carries control"),
    "config twice": ([config_message(), config_message()], "streaming_config was sent twice"),
    "config twice, with audio": ([config_message(), audio(), config_message()], "streaming_config was sent twice"),
    "empty message later": ([config_message(), Request()], "empty request"),
    "empty control": ([config_message(), Request(control=pb.StreamControl())], "empty control"),
    "no audio": ([config_message()], "without any audio"),
    "empty audio": ([config_message(), audio(b"")], "without any audio"),
    "encoding not set": ([config_message(encoding=0), audio()], "encoding is not set.*no WAV, FLAC or Ogg Opus file"),
    "encoding unknown": ([config_message(encoding=5)], "5, which is unknown here: use one of LINEAR16, FLOAT32, FLAC"),
    "rate not set": ([config_message(sample_rate_hertz=0)], "sample_rate_hertz is not set"),
    "rate too low": ([config_message(sample_rate_hertz=7_999)], "use 8000 to 48000 Hz"),
    "rate too high": ([config_message(sample_rate_hertz=96_000)], "use 8000 to 48000 Hz"),
    "rate negative": ([config_message(sample_rate_hertz=-1)], "use 8000 to 48000 Hz"),
    "chunk length": ([config_message(chunk_ms=100)], "chunk_ms=100 is not supported; use one of"),
    "chunk length negative": ([config_message(chunk_ms=-160)], "chunk_ms=-160"),
    "policy unknown": ([config_message(policy="postrior")], "did you mean 'posterior'"),
    "policy value": ([config_message(policy="posterior:7")], "from 0 to 1"),
    "policy not calibrated": ([config_message(policy="entropy")], "no calibrated thresholds"),
    "exit unknown": ([config_message(policy="exit:5")], "exit:2/4/6/8/10/12"),
    "fill unknown": ([config_message(fill="zeros")], "unknown fill 'zeros'"),
    "budget zero": ([config_message(compute_budget=budget(mean_depth=0.0))], "greater than 0 and at most 1"),
    "budget over one": ([config_message(compute_budget=budget(mean_depth=1.5))], "greater than 0 and at most 1"),
    "budget impossible": ([config_message(compute_budget=budget(mean_depth=0.01))], "the least possible is"),
    "budget NaN": ([config_message(compute_budget=budget(encoder_macs_per_second=np.nan))], "positive number"),
    "budget layer": ([config_message(compute_budget=budget(max_exit_layer=-2))], "max_exit_layer"),
    "budget later": ([config_message(), audio(), control(real_time_factor=-1.0)], "real_time_factor must be"),
    "budget later, impossible": ([config_message(), audio(), control(mean_depth=0.01)], "the least possible is"),
    "endpoint silence": ([config_message(endpointing={"silence_ms": 2**31 - 1})], "min_silence_ms=.*from 0 to 3600000"),
    "endpoint silence negative": ([config_message(endpointing={"silence_ms": -1})], "endpoint_silence_ms must be 0"),
    "endpoint rule": ([config_message(endpointing={"rules": [{}]})], "it would always hold"),
    "endpoint rules": ([config_message(endpointing={"rules": [{"min_silence_ms": 9}] * 9})], "at most 8"),
    "utterance length": ([config_message(endpointing={"max_utterance_ms": 10})], "max_utterance_ms must be at least"),
    "hint without letters": ([config_message(phrase_hints=[{"phrases": ["12"]}])], "'12' holds no letter"),
    "hint boost": ([config_message(phrase_hints=[{"phrases": ["a"], "boost": 99}])], "from -9 to 9"),
    "too many hints": ([config_message(phrase_hints=[{"phrases": ["a"] * 501}])], "at most 500 phrases"),
    "channels": ([config_message(audio_channel_count=9)], "9 channels are not supported: use 1 to 8"),
    "channel": ([config_message(audio_channel_count=2, audio_channel=3)], "use 1 to 2"),
    "odd bytes": ([config_message(), audio(DATA[:-1])], "middle of a sample"),
    "10 MB": ([config_message(), audio(bytes(10 << 20))], "10485760 bytes of audio: send at most 1048576"),
    "not a message": ([config_message(), b"\xff\xff"], "could not be decoded"),
    "NaN": ([FLOAT_CONFIG, floats(np.nan)], "sample 1000 is NaN or infinite"),
    "infinite": ([FLOAT_CONFIG, floats(0.1, -np.inf)], "sample 1001 is NaN or infinite"),
    "integers as floats": ([FLOAT_CONFIG, floats(12_345.0)], "divide 16-bit values by 32768"),
    "WAV of another rate": ([config_message(), audio(wav(8_000))], "8000 Hz.*make the two agree"),
    "FLAC": ([config_message(), audio(b"fLaC" + bytes(100))], "this is a FLAC file"),
}


@pytest.fixture(scope="module")
def healthy(server: BackgroundServer) -> str:
    with SpeechClient(server.address) as client:
        return text_of(list(client.stream(parts(DATA))))


def refused(server: BackgroundServer, requests: Iterable[Request | bytes]) -> grpc.RpcError:
    wire = [request if isinstance(request, bytes) else request.SerializeToString() for request in requests]
    with grpc.insecure_channel(server.address) as channel:
        call = channel.stream_stream("/asr_exit.v1.Speech/StreamingRecognize")(iter(wire), timeout=10)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        return caught.value


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(server: BackgroundServer, client: SpeechClient, healthy: str, name: str) -> None:
    requests, message = MISTAKES[name]
    error = refused(server, requests)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
    assert re.search(message, error.details()), error.details()
    assert text_of(list(client.stream(parts(DATA)))) == healthy
    assert all_slots_free(server)


def test_mistakes_hurt_no_neighbour(server: BackgroundServer, client: SpeechClient, healthy: str) -> None:
    def audio_between_mistakes() -> Iterator[bytes]:
        for part, (requests, _) in zip(parts(DATA, 1 + len(DATA) // len(MISTAKES)), MISTAKES.values(), strict=False):
            yield part
            refused(server, requests)

    assert text_of(list(client.stream(audio_between_mistakes()))) == healthy


def test_matching_wav_header_is_used(client: SpeechClient) -> None:
    plain = text_of(list(client.stream([wav(16_000)[44:]])))
    assert text_of(list(client.stream(parts(wav(16_000), 7)))) == plain


def test_unknown_model(server: BackgroundServer) -> None:
    assert refused(server, [config_message(model="other")]).code() is grpc.StatusCode.FAILED_PRECONDITION
    with grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            speech_pb2_grpc.SpeechStub(channel).GetModel(pb.GetModelRequest(name="other"))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "'random'" in caught.value.details()


def test_message_beyond_the_transport_limit(server: BackgroundServer) -> None:
    assert refused(server, [config_message(), audio(bytes(17 << 20))]).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert all_slots_free(server)


def test_no_slot_left(model: Model) -> None:
    release = threading.Event()

    def held() -> Iterator[bytes]:
        yield DATA
        release.wait(10)

    with (
        BackgroundServer(model, serve_config(limits={"streams": 1})) as server,
        SpeechClient(server.address) as client,
    ):
        first = client.stream(held())
        next(first)
        with pytest.raises(ServiceError, match="try again later") as caught:
            list(client.stream([DATA]))
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        release.set()
        list(first)
        assert list(client.stream([DATA]))


def test_idle_client(model: Model) -> None:
    release = threading.Event()

    def silent() -> Iterator[bytes]:
        yield DATA
        release.wait(10)

    with (
        BackgroundServer(model, serve_config(limits={"idle_s": 0.2})) as server,
        SpeechClient(server.address) as client,
    ):
        with pytest.raises(ServiceError, match=r"nothing was sent for 0\.2 s") as caught:
            list(client.stream(silent()))
        release.set()
        assert caught.value.code == "DEADLINE_EXCEEDED"
        assert all_slots_free(server)


@pytest.mark.parametrize("leave", ["cancel", "close", "stop iterating"])
def test_client_gone(server: BackgroundServer, leave: str) -> None:
    release = threading.Event()

    def held() -> Iterator[Request]:
        yield config_message(interim_results=True)
        yield audio()
        release.wait(10)

    channel = grpc.insecure_channel(server.address)
    if leave == "stop iterating":
        client = SpeechClient(server.address)
        captions = client.stream(parts(DATA) + [bytes(32_000)] * 100)
        next(captions)
        captions.close()  # type: ignore[attr-defined]
    else:
        call = speech_pb2_grpc.SpeechStub(channel).StreamingRecognize(held())
        next(call)
        assert server.server.reception.open_streams == 1
        call.cancel() if leave == "cancel" else channel.close()
    assert all_slots_free(server, within_s=1.0)
    release.set()
    channel.close()


def test_client_that_never_reads_leaves(server: BackgroundServer) -> None:
    """The server is stuck in sending to it when it goes."""
    with grpc.insecure_channel(server.address) as channel:
        messages = [config_message(interim_results=True, chunk_ms=160, enable_word_time_offsets=True)]
        call = speech_pb2_grpc.SpeechStub(channel).StreamingRecognize(iter(messages + [audio(DATA)] * 30))
        time.sleep(0.5)
        call.cancel()
        assert all_slots_free(server, within_s=1.0)


def test_client_that_neither_reads_nor_leaves(model: Model) -> None:
    """Its results fill every buffer; the scripted engine makes many of them quickly."""
    release = threading.Event()

    def held() -> Iterator[Request]:
        yield config_message(interim_results=True, chunk_ms=160)
        for _ in range(1_000):
            yield audio(bytes(32_000))
        release.wait(10)

    engine = FakeEngine()
    limits = {"idle_s": 0.5, "unread_chunks": 16}
    with (
        BackgroundServer(model, serve_config(limits=limits), engine) as server,  # type: ignore[arg-type]
        grpc.insecure_channel(server.address) as channel,
    ):
        call = speech_pb2_grpc.SpeechStub(channel).StreamingRecognize(held())
        next(call)
        assert all_slots_free(server, within_s=10.0)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        release.set()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "no result was read for 0.5 s" in caught.value.details()


def all_slots_free(server: BackgroundServer, within_s: float = 1.0) -> bool:
    """Waits until no stream is open and every slot is back."""
    (engine,) = server.server.engines
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if engine.free_slots == engine.slots and server.server.reception.open_streams == 0:
            return True
        time.sleep(0.005)
    return False
