"""Nothing a client sends crashes the server, leaks a slot or memory, or gets a status that is not documented.

A few cases by default; ASR_EXIT_FUZZ_CASES=10000 asks for the full number, drawn anew each time:
ASR_EXIT_FUZZ_CASES=10000 pytest tests/service/test_fuzz.py --timeout 0
"""

from __future__ import annotations

import gc
import io
import os

import grpc
import numpy as np
import psutil
import pytest
import soundfile
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from asr_exit.audio import SampleDecoder
from asr_exit.checkpoint import Model
from asr_exit.errors import AudioError
from service.audio_input import AudioFormat, AudioInput
from service.background import BackgroundServer
from service.client import SpeechClient
from service.google_speech import SERVICE_NAME as GOOGLE
from service.pb import google_speech_pb2, riva_pb2, speech_pb2
from service.riva import SERVICE_NAME as RIVA
from service.unpack import Unpacker
from tests.conftest import babble
from tests.service.conftest import parts, pcm16, serve_config
from tests.service.test_bad_input import all_slots_free
from tests.service.test_streaming import text_of

CASES = int(os.environ.get("ASR_EXIT_FUZZ_CASES", "0"))
DOCUMENTED = {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
GROWTH_BAR_BYTES = 5 << 20


def cases(few: int):
    """Settings for the wanted number of cases; `few` when none is wanted."""
    return settings(
        max_examples=CASES or few,
        deadline=None,
        database=None,
        derandomize=not CASES,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # a failing case is short enough as it is; shrinking it takes minutes
    )


def encoded(name: str, subtype: str, channels: int = 1) -> bytes:
    buffer = io.BytesIO()
    samples = np.stack([babble(0.7, seed) for seed in range(channels)], axis=1)
    soundfile.write(buffer, samples, 16_000, format=name, subtype=subtype)
    return buffer.getvalue()


SEEDS = [pcm16(babble(0.7)), babble(0.7).tobytes(), b""]
SEEDS += [encoded("WAV", subtype) for subtype in ("PCM_16", "FLOAT", "ULAW", "PCM_24")]
SEEDS += [encoded("FLAC", "PCM_16", 2), encoded("FLAC", "PCM_24"), encoded("OGG", "OPUS"), encoded("OGG", "VORBIS")]


@st.composite
def audio_bytes(draw) -> bytes:
    """A recording in some format with bytes changed, lost, doubled or put in; or anything."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 4))):
        at, length = draw(st.integers(0, max(0, len(data)))), draw(st.sampled_from([1, 2, 4, 37, 1000]))
        change = draw(st.sampled_from(["flip", "set", "delete", "double", "insert", "truncate"]))
        if change == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "set":
            data[at : at + length] = bytes([draw(st.integers(0, 255))]) * length
        elif change == "delete":
            del data[at : at + length]
        elif change == "double":
            data[at:at] = data[at : at + length]
        elif change == "insert":
            data[at:at] = draw(st.binary(max_size=64))
        else:
            del data[at:]
    return bytes(data)


number = st.sampled_from([0, 0, 1, -1, 2, 3, 80, 640, 8_000, 16_000, 16_000, 48_000, 2**31 - 1, -(2**31)])
boost = st.sampled_from([0.0, 2.0, -3.0, 1e30, float("nan")])
text = st.sampled_from(
    ["", "", "full", "exit:4", "posterior:0.5", "auto", "propagate", "hole", "en-US", "0.5", "max_exit=4", "random"]
) | st.text(max_size=8)
phrases = st.lists(st.sampled_from(["zebra", "the fox", "", "1", "é"]) | st.text(max_size=12), max_size=3)
budget = st.builds(
    speech_pb2.ComputeBudget,
    mean_depth=st.none() | st.sampled_from([0.5, 1.0, 0.0, -1.0, float("inf"), float("nan")]),
    max_exit_layer=st.sampled_from([0, 0, 4, -1, 99]),
)
endpointing = st.builds(
    speech_pb2.EndpointingConfig,
    silence_ms=st.none() | number,
    max_utterance_ms=number,
    rules=st.lists(
        st.builds(
            speech_pb2.EndpointRule, min_silence_ms=number, min_utterance_ms=number, without_speech=st.booleans()
        ),
        max_size=2,
    ),
)


def mostly(value, other):
    """Mostly `value`, so that a good part of the cases gets past the configuration."""
    return st.integers(0, 19).flatmap(lambda draw: other if draw == 7 else st.just(value))


native_config = st.builds(
    speech_pb2.StreamingConfig,
    encoding=mostly(1, st.sampled_from([0, 1, 2, 3, 6, 20, 32, 32, 5])) | st.sampled_from([0, 2, 6]),
    sample_rate_hertz=mostly(16_000, number) | st.just(0),
    interim_results=st.booleans(),
    enable_word_time_offsets=st.booleans(),
    chunk_ms=mostly(160, number),
    policy=mostly("", text),
    fill=mostly("", text),
    model=mostly("", text),
    audio_channel_count=mostly(0, number),
    audio_channel=mostly(0, number),
    compute_budget=mostly(None, budget),
    endpointing=mostly(None, endpointing),
    phrase_hints=mostly([], st.lists(st.builds(speech_pb2.PhraseHints, phrases=phrases, boost=boost), max_size=2)),
)
native_control = st.builds(speech_pb2.StreamControl, compute_budget=budget) | st.just(
    speech_pb2.StreamControl(flush=speech_pb2.Flush())
)
Native = speech_pb2.StreamingRecognizeRequest
native_later = (
    st.builds(Native, audio_content=audio_bytes())
    | st.builds(Native, control=native_control)
    | mostly(Native(), st.builds(Native, streaming_config=native_config))
)
custom = st.dictionaries(st.sampled_from(["compute_budget", "policy", "fill", "chunk_ms", "flush"]) | text, text)
riva_config = st.builds(
    riva_pb2.RecognitionConfig,
    encoding=mostly(1, st.sampled_from([0, 2, 3, 4, 20, 9])) | st.just(0),
    sample_rate_hertz=mostly(16_000, number) | st.just(0),
    language_code=mostly("en-US", text),
    model=mostly("", text),
    max_alternatives=number,
    audio_channel_count=mostly(0, number),
    enable_word_time_offsets=st.booleans(),
    speech_contexts=mostly([], st.lists(st.builds(riva_pb2.SpeechContext, phrases=phrases, boost=boost), max_size=2)),
    custom_configuration=mostly({}, custom),
    endpointing_config=mostly(None, st.builds(riva_pb2.EndpointingConfig, stop_history=number)),
)
Riva = riva_pb2.StreamingRecognizeRequest
riva_first = st.builds(
    Riva,
    streaming_config=st.builds(riva_pb2.StreamingRecognitionConfig, config=riva_config, interim_results=st.booleans()),
)
riva_later = st.builds(Riva, audio_content=audio_bytes(), runtime_config=mostly({}, custom)) | st.builds(
    Riva, runtime_config=custom
)

google_config = st.builds(
    google_speech_pb2.RecognitionConfig,
    encoding=mostly(1, st.integers(0, 10)) | st.just(0),
    sample_rate_hertz=mostly(16_000, number) | st.just(0),
    language_code=mostly("en-US", text),
    model=mostly("", text),
    max_alternatives=number,
    audio_channel_count=mostly(0, number),
    enable_word_time_offsets=st.booleans(),
    enable_word_confidence=st.booleans(),
    speech_contexts=mostly(
        [], st.lists(st.builds(google_speech_pb2.SpeechContext, phrases=phrases, boost=boost), max_size=2)
    ),
)
Google = google_speech_pb2.StreamingRecognizeRequest
google_first = st.builds(
    Google,
    streaming_config=st.builds(
        google_speech_pb2.StreamingRecognitionConfig,
        config=google_config,
        interim_results=st.booleans(),
        single_utterance=st.booleans(),
        enable_voice_activity_events=mostly(False, st.just(True)),
    ),
)
google_later = st.builds(Google, audio_content=audio_bytes()) | mostly(Google(), google_first)
google_audio = st.builds(google_speech_pb2.RecognitionAudio, content=audio_bytes()) | st.builds(
    google_speech_pb2.RecognitionAudio, uri=text
)


def serialized(first, later, split: bool = True):
    """A call as bytes: a configuration and what follows, audio in one piece or in many; now and then in disorder."""

    @st.composite
    def call(draw) -> list[bytes]:
        messages = [draw(first), *draw(st.lists(later, max_size=4))]
        if draw(st.integers(0, 9)) == 9:
            messages = draw(st.permutations(messages))
        wire = [message.SerializeToString() for message in messages]
        if draw(st.integers(0, 9)) == 9:
            wire.insert(draw(st.integers(0, len(wire))), draw(st.binary(max_size=40)))
        return wire

    return call()


NATIVE_PATH = "/asr_exit.v1.Speech/StreamingRecognize"
CALLS = (
    st.tuples(st.just(NATIVE_PATH), serialized(st.builds(Native, streaming_config=native_config), native_later))
    | st.tuples(st.just(f"/{RIVA}/StreamingRecognize"), serialized(riva_first, riva_later))
    | st.tuples(
        st.just(f"/{RIVA}/Recognize"),
        st.builds(riva_pb2.RecognizeRequest, config=riva_config, audio=audio_bytes()).map(
            lambda request: [request.SerializeToString()]
        ),
    )
    | st.tuples(st.just(f"/{GOOGLE}/StreamingRecognize"), serialized(google_first, google_later))
    | st.tuples(
        st.just(f"/{GOOGLE}/Recognize"),
        st.builds(google_speech_pb2.RecognizeRequest, config=google_config, audio=google_audio).map(
            lambda request: [request.SerializeToString()]
        ),
    )
)
METADATA = mostly((), st.tuples(st.tuples(st.just("x-compute-budget"), st.sampled_from(["0.5", "x", "max_exit=2"]))))


@pytest.fixture(scope="module")
def fuzzed(model: Model):
    with BackgroundServer(model, serve_config(limits={"streams": 4, "idle_s": 20.0})) as server:
        yield server


def status_of(channel: grpc.Channel, path: str, messages: list[bytes], metadata: tuple) -> str:
    call = channel.stream_stream(path)(iter(messages), metadata=metadata, timeout=60)
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def test_every_call_ends_with_a_documented_status(fuzzed: BackgroundServer) -> None:
    statuses: dict[str, int] = {}
    kept: list[tuple[str, list[bytes], tuple]] = []
    with grpc.insecure_channel(fuzzed.address) as channel, SpeechClient(fuzzed.address) as client:
        healthy = text_of(list(client.stream(parts(SEEDS[0]))))

        @cases(few=60)
        @given(call=CALLS, metadata=METADATA)
        def run(call: tuple[str, list[bytes]], metadata: tuple) -> None:
            status = status_of(channel, *call, metadata)
            assert status in DOCUMENTED, status
            statuses[status] = statuses.get(status, 0) + 1
            if len(kept) < 150:
                kept.append((*call, metadata))

        run()
        assert text_of(list(client.stream(parts(SEEDS[0])))) == healthy
    assert all_slots_free(fuzzed)
    least = 0.05 * sum(statuses.values()) if CASES else 1  # both kinds are reached; shares need many cases
    assert min(statuses["OK"], statuses["INVALID_ARGUMENT"]) >= least, statuses
    if CASES:
        grown = growth_bytes(fuzzed, kept)
        print(f"{statuses}, memory {grown / 2**20:+.1f} MB over {8 * len(kept)} calls")
        assert grown < GROWTH_BAR_BYTES


def growth_bytes(server: BackgroundServer, calls: list[tuple[str, list[bytes], tuple]]) -> int:
    """What repeating the same calls adds to memory; while cases are drawn, hypothesis itself takes more and more."""
    with grpc.insecure_channel(server.address) as channel:
        sizes = []
        for _ in range(9):
            for call in calls:
                status_of(channel, *call)
            sizes.append(rss_bytes())
    return sizes[-1] - sizes[0]


def rss_bytes() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


ENCODINGS = ["any", "flac", "ogg_opus"]


@cases(few=60)
@given(
    data=audio_bytes(),
    encoding=st.sampled_from(ENCODINGS),
    channel=st.integers(0, 2),
    size=st.sampled_from([13, 100, 4096]),
)
def test_files_decode_or_are_refused(data: bytes, encoding, channel: int, size: int) -> None:
    unpacker, count = Unpacker(AudioFormat(encoding, channel=channel)), 0

    def pull() -> None:
        nonlocal count
        while (samples := unpacker.pull()) is not None:
            assert samples.dtype == np.float32
            assert samples.ndim == 1
            count += len(samples)

    try:
        for part in parts(data, size):
            unpacker.push(part)
            pull()
        unpacker.finish()
        pull()
    except AudioError:
        pass
    assert count < 100 * 16_000


@cases(few=60)
@given(
    data=audio_bytes(),
    encoding=st.sampled_from(["linear16", "float32", "mulaw", "alaw"]),
    rate_hz=st.sampled_from([8_000, 16_000, 44_100]),
    channels=st.integers(1, 3),
    size=st.sampled_from([1, 7, 1000, 10**6]),
)
def test_samples_decode_or_are_refused(data: bytes, encoding, rate_hz: int, channels: int, size: int) -> None:
    audio, found = AudioInput(AudioFormat(encoding, rate_hz, channels)), []
    try:
        found = [audio.push(part) for part in parts(data, max(size, len(data) // 200))]
        found.append(audio.finish())
    except AudioError:
        return
    heard = np.concatenate(found)
    assert np.isfinite(heard).all()
    decoder = SampleDecoder(encoding, channels)
    if rate_hz == 16_000 and not data.startswith(b"RIFF"):
        np.testing.assert_array_equal(heard, decoder.push(data))
