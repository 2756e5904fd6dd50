"""Riva's API: with our copies of its messages, and with NVIDIA's own client in an interpreter of its own.

The latter needs nvidia-riva-client. Install it anywhere, best in an environment of its own, and name its interpreter:
ASR_EXIT_RIVA_PYTHON=/path/to/python. Without that, this interpreter is tried.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from asr_exit.checkpoint import Model
from service.background import BackgroundServer
from service.bench.other_client import CLIENTS
from service.client import Caption
from service.pb import riva_pb2 as pb
from service.riva import SERVICE_NAME
from tests.conftest import babble
from tests.service.conftest import macs_spent, own_finals, parts, pcm16, python_with, write_wav
from tests.service.test_streaming import text_of

AUDIO = babble(6.3, seed=1)
DATA = pcm16(AUDIO)


@pytest.fixture(scope="module")
def wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wav(tmp_path_factory.mktemp("riva") / "talk.wav", DATA)


@pytest.fixture(scope="module")
def native(server: BackgroundServer) -> list[Caption]:
    return own_finals(server, DATA)


class Riva:
    """The three RPCs, as any Riva client calls them."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stream = channel.stream_stream(
            f"/{SERVICE_NAME}/StreamingRecognize",
            request_serializer=pb.StreamingRecognizeRequest.SerializeToString,
            response_deserializer=pb.StreamingRecognizeResponse.FromString,
        )
        self.recognize = channel.unary_unary(
            f"/{SERVICE_NAME}/Recognize",
            request_serializer=pb.RecognizeRequest.SerializeToString,
            response_deserializer=pb.RecognizeResponse.FromString,
        )
        self.config = channel.unary_unary(
            f"/{SERVICE_NAME}/GetRivaSpeechRecognitionConfig",
            request_serializer=pb.RivaSpeechRecognitionConfigRequest.SerializeToString,
            response_deserializer=pb.RivaSpeechRecognitionConfigResponse.FromString,
        )


@pytest.fixture
def riva(server: BackgroundServer):
    with grpc.insecure_channel(server.address) as channel:
        yield Riva(channel)


def recognition(**changes: Any) -> pb.RecognitionConfig:
    values = {"encoding": pb.LINEAR_PCM, "sample_rate_hertz": 16_000, "language_code": "en-US"}
    return pb.RecognitionConfig(**(values | changes))


def first(config: pb.RecognitionConfig | None = None, **changes: Any) -> pb.StreamingRecognizeRequest:
    streaming = pb.StreamingRecognitionConfig(config=config or recognition(), interim_results=True)
    return pb.StreamingRecognizeRequest(streaming_config=streaming, **changes)


def audio(data: bytes, **runtime_config: str) -> pb.StreamingRecognizeRequest:
    return pb.StreamingRecognizeRequest(audio_content=data, runtime_config=runtime_config)


def test_streaming_gives_our_own_text_and_times(riva: Riva, native: list[Caption]) -> None:
    config = first(recognition(enable_word_time_offsets=True), id=pb.RequestId(value="call 7"))
    responses = list(riva.stream(iter([config, *map(audio, parts(DATA))])))
    results = [response.results[0] for response in responses]
    assert all(len(response.results) == 1 and response.id.value == "call 7" for response in responses)
    finals = [result for result in results if result.is_final]
    assert "".join(final.alternatives[0].transcript for final in finals).strip() == text_of(native)
    interims = [result for result in results if not result.is_final]
    assert interims
    assert all(0 <= result.stability <= 1 and not result.alternatives[0].words for result in interims)
    assert [final.stability for final in finals] == [1] * len(finals)
    words = [(word.word, word.start_time, word.end_time) for final in finals for word in final.alternatives[0].words]
    assert words == [(word.text, word.start_ms, word.end_ms) for caption in native for word in caption.words]
    assert all(0 < final.alternatives[0].confidence <= 1 and final.channel_tag == 1 for final in finals)
    assert finals[-1].audio_processed == pytest.approx(6.3, abs=0.001)


def test_finals_only_unless_asked(riva: Riva) -> None:
    config = pb.StreamingRecognizeRequest(streaming_config=pb.StreamingRecognitionConfig(config=recognition()))
    results = [response.results[0] for response in riva.stream(iter([config, audio(DATA)]))]
    assert all(result.is_final and not result.alternatives[0].words for result in results)


@pytest.mark.parametrize("changes", [{}, {"encoding": 0, "sample_rate_hertz": 0}, {"sample_rate_hertz": 0}])
def test_a_whole_wav_file(riva: Riva, native: list[Caption], wav: Path, changes: dict[str, Any]) -> None:
    request = pb.RecognizeRequest(config=recognition(**changes), audio=wav.read_bytes(), id=pb.RequestId(value="x"))
    response = riva.recognize(request)
    assert "".join(result.alternatives[0].transcript for result in response.results).strip() == text_of(native)
    assert response.id.value == "x"


def test_models_are_listed(riva: Riva, model: Model) -> None:
    listed = riva.config(pb.RivaSpeechRecognitionConfigRequest()).model_config
    assert [(entry.model_name, entry.parameters["type"]) for entry in listed] == [
        (model.name, "online"),
        (model.name, "offline"),
    ]
    assert listed[0].parameters["language_code"] == "en-US"
    assert len(riva.config(pb.RivaSpeechRecognitionConfigRequest(model_name=model.name)).model_config) == 2
    with pytest.raises(grpc.RpcError) as caught:
        riva.config(pb.RivaSpeechRecognitionConfigRequest(model_name="other"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


MISTAKES: dict[str, tuple[list[pb.StreamingRecognizeRequest], str]] = {
    "nothing": ([], "ended before its configuration"),
    "audio first": ([audio(DATA)], "first message carries audio_content"),
    "config twice": ([first(), first()], "sent twice"),
    "empty message": ([first(), pb.StreamingRecognizeRequest()], "an empty message"),
    "language": ([first(recognition(language_code="de-DE"))], "'de-DE' is not served here: use en-US"),
    "model": ([first(recognition(model="other"))], "model 'other' is not served here"),
    "encoding": ([first(recognition(encoding=9))], "encoding 9 is unknown here"),
    "rate": ([first(recognition(sample_rate_hertz=4000))], "use 8000 to 48000"),
    "raw without encoding": ([first(recognition(encoding=0)), audio(DATA)], "no WAV, FLAC or Ogg Opus file"),
    "raw without rate": ([first(recognition(sample_rate_hertz=0)), audio(DATA)], "no WAV, FLAC or Ogg Opus file"),
    "diarization": (
        [first(recognition(diarization_config={"enable_speaker_diarization": True}))],
        "speaker diarization is not served",
    ),
    "channels apart": (
        [first(recognition(audio_channel_count=2, enable_separate_recognition_per_channel=True))],
        "one stream for each channel",
    ),
    "chunk": ([first(recognition(custom_configuration={"chunk_ms": "abc"}))], "chunk_ms='abc' must be a number"),
    "budget": ([first(recognition(custom_configuration={"compute_budget": "0.001"}))], "the least possible is"),
    "budget later": ([first(), audio(DATA), audio(DATA, compute_budget="-1")], "greater than 0"),
    "hint without letters": ([first(recognition(speech_contexts=[{"phrases": ["123"]}]))], "holds no letter"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(riva: Riva, name: str) -> None:
    requests, message = MISTAKES[name]
    with pytest.raises(grpc.RpcError) as caught:
        list(riva.stream(iter(requests), timeout=10))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in caught.value.details()


def test_budgets_reach_the_engine(model: Model) -> None:
    """The random model never stops early by itself: depth comes from the budget alone."""

    def spent(
        requests: Iterable[pb.StreamingRecognizeRequest],
        metadata: tuple[tuple[str, str], ...] = (),
        on_step: Callable[[], None] = lambda: None,
    ) -> int:
        return macs_spent(model, lambda channel: list(Riva(channel).stream(iter(requests), metadata=metadata)), on_step)

    custom = first(recognition(custom_configuration={"compute_budget": "max_exit=2"}))
    full, cheap = spent([first(), audio(DATA)]), spent([custom, audio(DATA)])
    assert cheap < 0.6 * full
    assert spent([first(runtime_config={"compute_budget": "max_exit=2"}), audio(DATA)]) == cheap
    assert spent([first(), audio(DATA)], (("x-compute-budget", "max_exit=2"),)) == cheap
    begun = threading.Event()

    def later() -> Iterator[pb.StreamingRecognizeRequest]:
        yield first()
        yield audio(DATA[:64_000])
        assert begun.wait(10)
        yield audio(DATA[64_000:], compute_budget="max_exit=2")

    assert cheap < spent(later(), on_step=begun.set) < full


def test_flush_by_runtime_config(riva: Riva) -> None:
    def first_final_s(**runtime_config: str) -> float:
        requests = [first(), audio(DATA[:96_000]), audio(DATA[96_000:], **runtime_config)]
        results = [response.results[0] for response in riva.stream(iter(requests))]
        return next(result.audio_processed for result in results if result.is_final)

    assert first_final_s(flush="true") == pytest.approx(2.96)  # three seconds, in whole frames
    assert first_final_s(flush="false") == pytest.approx(6.3)


def test_nvidias_own_client(server: BackgroundServer, native: list[Caption], wav: Path) -> None:
    python = python_with("riva.client", "nvidia-riva-client", "ASR_EXIT_RIVA_PYTHON")
    command = [python, str(CLIENTS["riva"].script), server.address, str(wav)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert finished.returncode == 0, finished.stderr
    about, got = map(json.loads, finished.stdout.splitlines())
    words = [[word.text, word.start_ms, word.end_ms] for caption in native for word in caption.words]
    assert got["offline"] == {"text": text_of(native), "words": words}
    assert got["streaming"].pop("interims") > 0
    assert got["streaming"] == got["offline"]
    assert about["boosted"]
    assert [parameters["type"] for _, parameters in about["models"]] == ["online", "offline"]
    assert set(about["errors"].values()) == {"INVALID_ARGUMENT"}
    for name, theirs in about["fields"].items():
        ours = {field.name: [field.number, field.type] for field in pb.DESCRIPTOR.message_types_by_name[name].fields}
        assert ours.items() <= theirs.items(), name
