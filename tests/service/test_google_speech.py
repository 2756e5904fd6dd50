"""Google's Speech API v1: with our copies of its messages, and with Google's own client in an interpreter of its own.

The latter needs google-cloud-speech. Install it anywhere, best in an environment of its own, and name its interpreter:
ASR_EXIT_GOOGLE_PYTHON=/path/to/python. Without that, this interpreter is tried.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from asr_exit.checkpoint import Model
from service.background import BackgroundServer
from service.bench.other_client import CLIENTS
from service.client import Caption
from service.google_speech import SERVICE_NAME
from service.pb import google_speech_pb2 as pb
from tests.conftest import babble
from tests.service.conftest import macs_spent, own_finals, parts, pcm16, python_with, serve_config, write_wav
from tests.service.test_bad_input import all_slots_free
from tests.service.test_streaming import text_of

DATA = pcm16(babble(2.8, seed=1))
MS = timedelta(milliseconds=1)


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[BackgroundServer]:
    """Utterances are cut after a second, so that there are several final results."""
    with BackgroundServer(model, serve_config(stream={"max_utterance_ms": 1000, "chunk_ms": 320})) as running:
        yield running


@pytest.fixture(scope="module")
def wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wav(tmp_path_factory.mktemp("google") / "talk.wav", DATA)


@pytest.fixture(scope="module")
def native(server: BackgroundServer) -> list[Caption]:
    return own_finals(server, DATA)


def method(channel: grpc.Channel, name: str, request: Any, response: Any, kind: str = "unary_unary") -> Callable:
    call = getattr(channel, kind)
    return call(
        f"/{SERVICE_NAME}/{name}",
        request_serializer=request.SerializeToString,
        response_deserializer=response.FromString,
    )


class Google:
    """The RPCs, as any client of Google's API calls them."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stream = method(
            channel, "StreamingRecognize", pb.StreamingRecognizeRequest, pb.StreamingRecognizeResponse, "stream_stream"
        )
        self.recognize = method(channel, "Recognize", pb.RecognizeRequest, pb.RecognizeResponse)
        self.long_running = method(channel, "LongRunningRecognize", pb.RecognizeRequest, pb.RecognizeResponse)


@pytest.fixture
def google(server: BackgroundServer) -> Iterator[Google]:
    with grpc.insecure_channel(server.address) as channel:
        yield Google(channel)


def recognition(**changes: Any) -> pb.RecognitionConfig:
    values = {"encoding": "LINEAR16", "sample_rate_hertz": 16_000, "language_code": "en-US"}
    return pb.RecognitionConfig(**(values | changes))


def first(config: pb.RecognitionConfig | None = None, **changes: Any) -> pb.StreamingRecognizeRequest:
    streaming = pb.StreamingRecognitionConfig(config=config or recognition(), **({"interim_results": True} | changes))
    return pb.StreamingRecognizeRequest(streaming_config=streaming)


def audio(data: bytes) -> pb.StreamingRecognizeRequest:
    return pb.StreamingRecognizeRequest(audio_content=data)


def whole(data: bytes, **changes: Any) -> pb.RecognizeRequest:
    return pb.RecognizeRequest(config=recognition(**changes), audio=pb.RecognitionAudio(content=data))


def transcript(results: Iterable[Any]) -> str:
    return "".join(result.alternatives[0].transcript for result in results)


def timed(results: Iterable[Any]) -> list[tuple[str, float, float]]:
    words = [word for result in results for word in result.alternatives[0].words]
    return [(word.word, word.start_time.ToTimedelta() / MS, word.end_time.ToTimedelta() / MS) for word in words]


def times_of(captions: Iterable[Caption]) -> list[tuple[str, float, float]]:
    return [(word.text, word.start_ms, word.end_ms) for caption in captions for word in caption.words]


def test_streaming_gives_our_own_text_and_times(google: Google, native: list[Caption]) -> None:
    config = first(recognition(enable_word_time_offsets=True, enable_word_confidence=True))
    responses = list(google.stream(iter([config, *map(audio, parts(DATA))])))
    assert all(len(response.results) == 1 and not response.speech_event_type for response in responses)
    results = [response.results[0] for response in responses]
    finals = [result for result in results if result.is_final]
    assert len(finals) > 1
    assert transcript(finals) == text_of(native)
    assert timed(finals) == times_of(native)
    assert all(0 < word.confidence <= 1 for final in finals for word in final.alternatives[0].words)
    assert all(0 < final.alternatives[0].confidence <= 1 and final.stability == 0 for final in finals)
    interims = [result for result in results if not result.is_final]
    assert interims
    assert all(0 <= result.stability <= 1 and not result.alternatives[0].words for result in interims)
    assert finals[-1].result_end_time.ToTimedelta() / MS == pytest.approx(2800, abs=1)
    assert {result.language_code for result in results} == {"en-us"}


def test_finals_only_unless_asked(google: Google) -> None:
    results = [response.results[0] for response in google.stream(iter([first(interim_results=False), audio(DATA)]))]
    assert all(result.is_final and not result.alternatives[0].words for result in results)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"encoding": "ENCODING_UNSPECIFIED", "sample_rate_hertz": 0, "model": "latest_long"},
        {"sample_rate_hertz": 0, "model": "random", "language_code": ""},
    ],
    ids=["said", "unsaid", "no rate"],
)
def test_a_whole_wav_file(google: Google, native: list[Caption], wav: Path, changes: dict[str, Any]) -> None:
    response = google.recognize(whole(wav.read_bytes(), enable_word_time_offsets=True, **changes))
    assert transcript(response.results) == text_of(native)
    assert timed(response.results) == times_of(native)
    assert not any(word.confidence for result in response.results for word in result.alternatives[0].words)


def test_confidences_without_times(google: Google) -> None:
    response = google.recognize(whole(DATA, enable_word_confidence=True))
    words = [word for result in response.results for word in result.alternatives[0].words]
    assert words
    assert all(word.confidence > 0 and not word.HasField("start_time") for word in words)


def test_a_single_utterance_ends_the_call(server: BackgroundServer, google: Google, native: list[Caption]) -> None:
    def endless() -> Iterator[pb.StreamingRecognizeRequest]:
        yield first(single_utterance=True, interim_results=False)
        while True:
            yield from map(audio, parts(DATA))

    event, final = google.stream(endless(), timeout=20)
    assert event.speech_event_type == pb.StreamingRecognizeResponse.END_OF_SINGLE_UTTERANCE
    assert not event.results
    assert transcript(final.results) == native[0].text
    assert event.speech_event_time == final.results[0].result_end_time
    assert all_slots_free(server)


def test_a_single_utterance_that_the_client_ends(google: Google) -> None:
    (only,) = google.stream(iter([first(single_utterance=True, interim_results=False), audio(DATA[:16_000])]))
    assert only.results[0].is_final
    assert not only.speech_event_type


MISTAKES: dict[str, tuple[list[pb.StreamingRecognizeRequest], str]] = {
    "nothing": ([], "ended before its configuration"),
    "audio first": ([audio(DATA)], "first message carries audio_content"),
    "config twice": ([first(), first()], "sent twice"),
    "empty message": ([first(), pb.StreamingRecognizeRequest()], "an empty message: send audio_content"),
    "no audio": ([first()], "ended without any audio"),
    "language": ([first(recognition(language_code="de-DE"))], "'de-DE' is not served here: use en-US"),
    "model": ([first(recognition(model="medical_dictation"))], "model 'medical_dictation' is not served here"),
    "encoding": (
        [first(recognition(encoding="MP3"))],
        "encoding MP3 is unknown here: use ENCODING_UNSPECIFIED, LINEAR",
    ),
    "unknown encoding": ([first(recognition(encoding=77))], "encoding 77 is unknown here"),
    "rate": ([first(recognition(sample_rate_hertz=4000))], "use 8000 to 48000"),
    "raw without rate": ([first(recognition(sample_rate_hertz=0)), audio(DATA)], "no WAV, FLAC or Ogg Opus file"),
    "adaptation": ([first(recognition(adaptation={}))], "use speech_contexts"),
    "activity": ([first(enable_voice_activity_events=True)], "voice activity events are not served"),
    "hint without letters": ([first(recognition(speech_contexts=[{"phrases": ["123"]}]))], "holds no letter"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(google: Google, name: str) -> None:
    requests, message = MISTAKES[name]
    with pytest.raises(grpc.RpcError) as caught:
        list(google.stream(iter(requests), timeout=10))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in caught.value.details()


@pytest.mark.parametrize("source", [{"uri": "gs://bucket/talk.wav"}, {}], ids=["uri", "none"])
def test_audio_must_come_with_the_request(google: Google, source: dict[str, str]) -> None:
    with pytest.raises(grpc.RpcError, match=r"only audio\.content is served") as caught:
        google.recognize(pb.RecognizeRequest(config=recognition(), audio=pb.RecognitionAudio(**source)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_long_running_requests_are_not_served(google: Google) -> None:
    with pytest.raises(grpc.RpcError, match="use StreamingRecognize") as caught:
        google.long_running(whole(DATA))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_budget_in_the_metadata_reaches_the_engine(model: Model) -> None:
    def spent(*metadata: tuple[str, str]) -> int:
        requests = [first(), audio(DATA)]
        return macs_spent(model, lambda channel: list(Google(channel).stream(iter(requests), metadata=metadata)))

    assert spent(("x-compute-budget", "max_exit=2")) < 0.6 * spent()


def test_googles_own_client(server: BackgroundServer, native: list[Caption], wav: Path) -> None:
    python = python_with("google.cloud.speech", "google-cloud-speech", "ASR_EXIT_GOOGLE_PYTHON")
    command = [python, str(CLIENTS["google"].script), server.address, str(wav)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert finished.returncode == 0, finished.stderr
    about, got = map(json.loads, finished.stdout.splitlines())
    assert got["offline"] == {"text": text_of(native), "words": list(map(list, times_of(native)))}
    streaming = got["streaming"]
    assert {key: streaming[key] for key in ("text", "words")} == got["offline"]
    assert streaming["interims"] > 0
    assert streaming["finals"] == len(native)
    assert not streaming["events"]
    single = about["single_utterance"]
    assert (single["text"], single["finals"]) == (native[0].text, 1)
    assert single["events"] == ["END_OF_SINGLE_UTTERANCE"]
    assert about["boosted"]
    assert set(about["errors"].values()) == {"INVALID_ARGUMENT"}
    assert about["long_running"] == "UNIMPLEMENTED"
    for name, message in pb.DESCRIPTOR.message_types_by_name.items():
        if not message.fields:
            continue
        ours = {field.name: [field.number, field.type] for field in message.fields}
        assert ours.items() <= about["facts"][name].items(), name
        for enum in message.enum_types:
            values = {value.name: value.number for value in enum.values}
            assert values.items() <= about["facts"][f"{name}.{enum.name}"].items(), enum.name
