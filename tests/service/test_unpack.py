"""Files on the wire: every container, its channels and rates, and what does not fit what was announced."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from asr_exit.audio import load_audio
from asr_exit.errors import AudioError
from service.audio_input import AudioFormat, AudioInput
from service.background import BackgroundServer
from service.client import Flush, SpeechClient, StreamSettings
from service.pb import speech_pb2 as pb
from service.unpack import Unpacker
from tests.conftest import babble
from tests.service.conftest import parts, pcm16
from tests.service.test_streaming import config_message, raw, text_of

FILES = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("WAV", "ALAW"), ("FLAC", "PCM_16"), ("OGG", "OPUS")]
ANNOUNCED = {"FLAC": "flac", "OGG": "ogg_opus"}


def two_channels(rate_hz: int = 16_000, seconds: float = 1.0) -> np.ndarray:
    return np.stack([babble(seconds * rate_hz / 16_000, seed) for seed in (1, 2)], axis=1)


def encoded(name: str, subtype: str, samples: np.ndarray, rate_hz: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format=name, subtype=subtype)
    return buffer.getvalue()


def unpack(data: bytes, size: int, audio: AudioFormat) -> np.ndarray:
    unpacker, found = Unpacker(audio), []

    def pull() -> None:
        while (samples := unpacker.pull()) is not None:
            found.append(samples)

    for part in parts(data, size):
        unpacker.push(part)
        pull()
    unpacker.finish()
    pull()
    return np.concatenate([np.zeros(0, np.float32), *found])


@pytest.mark.parametrize(("name", "subtype"), FILES)
@pytest.mark.parametrize("rate_hz", [8_000, 48_000])
def test_every_file_is_what_reading_it_gives(name: str, subtype: str, rate_hz: int, tmp_path) -> None:
    data = encoded(name, subtype, two_channels(rate_hz), rate_hz)
    path = tmp_path / "file"
    path.write_bytes(data)
    expected = load_audio(path)
    for size in (97, 4096):
        heard = unpack(data, size, AudioFormat("any", channels=2))
        np.testing.assert_array_equal(heard, unpack(data, len(data), AudioFormat("any", channels=2)))
        np.testing.assert_allclose(heard, expected, atol=1e-6)
    announced = AudioFormat(ANNOUNCED.get(name, "any"), rate_hz, 2)  # type: ignore[arg-type]
    np.testing.assert_array_equal(unpack(data, 4096, announced), heard)


@pytest.mark.parametrize("channel", [1, 2])
def test_one_channel_of_a_file_and_of_raw_samples(channel: int) -> None:
    samples = two_channels()
    expected = samples[:, channel - 1]
    flac = encoded("FLAC", "PCM_24", samples)
    np.testing.assert_allclose(unpack(flac, 500, AudioFormat("any", channel=channel)), expected, atol=1e-6)
    raw = AudioInput(AudioFormat("float32", 16_000, 2, channel))
    heard = [raw.push(part) for part in parts(samples.astype("<f4").tobytes(), 1001)]
    np.testing.assert_array_equal(np.concatenate([*heard, raw.finish()]), expected)


def test_the_mean_of_all_channels() -> None:
    samples = two_channels()
    raw = AudioInput(AudioFormat("float32", 16_000, 2))
    heard = raw.push(samples.astype("<f4").tobytes())
    np.testing.assert_array_equal(heard, samples.mean(axis=1))


FLAC = encoded("FLAC", "PCM_16", babble(0.5))
STEREO = encoded("FLAC", "PCM_16", two_channels())
MISFITS = [
    (pcm16(babble(0.1)), AudioFormat("any"), "no WAV, FLAC or Ogg Opus file: set encoding"),
    (pcm16(babble(0.1)), AudioFormat("flac"), "FLAC audio was announced, but this is not"),
    (encoded("OGG", "OPUS", babble(0.1)), AudioFormat("flac"), "FLAC audio was announced"),
    (FLAC, AudioFormat("ogg_opus"), "Ogg Opus audio was announced"),
    (encoded("OGG", "VORBIS", babble(0.1)), AudioFormat("any"), "holds Vorbis"),
    (encoded("MP3", "MPEG_LAYER_III", babble(0.1)), AudioFormat("any"), "no WAV, FLAC or Ogg|MP3 file"),
    (encoded("WAV", "PCM_24", babble(0.1)), AudioFormat("any"), "24-bit integer PCM"),
    (FLAC, AudioFormat("any", 8_000), "the file says 16000 Hz, the request 8000 Hz"),
    (FLAC, AudioFormat("any", 0, 2), "has 1 channels, the request announced 2"),
    (FLAC, AudioFormat("any", 0, 0, 2), "channel 2 was asked for, but there are 1"),
    (STEREO, AudioFormat("any"), "has 2 channels, the request announced 1"),
    (encoded("FLAC", "PCM_16", babble(0.1), 96_000), AudioFormat("any"), "96000 Hz is not supported"),
    (FLAC[:4], AudioFormat("any"), "within its header"),
    (encoded("WAV", "PCM_16", babble(0.1))[:40], AudioFormat("any"), "within its WAV header"),
    (encoded("WAV", "PCM_16", babble(0.1))[:-1], AudioFormat("any"), "middle of a sample"),
]


@pytest.mark.parametrize("size", [7, 10_000])
@pytest.mark.parametrize(("data", "audio", "says"), MISFITS, ids=range(len(MISFITS)))
def test_misfits(data: bytes, audio: AudioFormat, says: str, size: int) -> None:
    with pytest.raises(AudioError, match=says):
        unpack(data, size, audio)


def test_formats_out_of_range() -> None:
    for values in [("linear16", 16_000, 9), ("linear16", 16_000, 2, 3), ("linear16", 0), ("flac", 4_000)]:
        with pytest.raises(AudioError):
            AudioFormat(*values)  # type: ignore[arg-type]


AUDIO = (babble(3.2, seed=1) * 32_767).round() / 32_768  # what 16 bits can hold


@pytest.mark.parametrize(("name", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16")])
@pytest.mark.parametrize("size", [1000, 200_000])
def test_a_file_streams_like_its_samples(client: SpeechClient, name: str, subtype: str, size: int) -> None:
    samples = (AUDIO * 32_768).astype("<i2")
    expected = list(client.stream(parts(samples.tobytes()), StreamSettings(word_times=True)))
    data = encoded(name, subtype, samples)
    heard = list(client.stream(parts(data, size), StreamSettings(rate_hz=0, encoding="any", word_times=True)))
    assert text_of(heard) == text_of(expected) != ""
    assert [word for c in heard if c.is_final for word in c.words] == [
        word for c in expected if c.is_final for word in c.words
    ]
    assert heard[-1].end_ms == expected[-1].end_ms


@pytest.mark.parametrize("settings", [{"encoding": "mulaw"}, {"encoding": "alaw"}, {"encoding": "ogg_opus"}])
def test_other_encodings_are_heard(client: SpeechClient, settings: dict) -> None:
    subtype = {"mulaw": "ULAW", "alaw": "ALAW"}.get(settings["encoding"])
    data = encoded("RAW", subtype, AUDIO) if subtype else encoded("OGG", "OPUS", AUDIO)
    captions = list(client.stream(parts(data, 333), StreamSettings(rate_hz=16_000, **settings)))
    assert captions[-1].is_final
    assert captions[-1].end_ms == pytest.approx(3_200, abs=1)


def test_a_flush_brings_a_final_result_at_once(client: SpeechClient) -> None:
    data = (AUDIO * 32_768).astype("<i2").tobytes()

    def audio():
        yield data[:32_000]
        yield Flush()
        yield data[32_000:]
        yield Flush()

    captions = list(client.stream(audio()))
    finals = [caption.end_ms for caption in captions if caption.is_final]
    assert finals[0] == 960  # one second, in whole frames
    assert len(finals) in (2, 3)  # the second flush may fall together with the end
    assert captions[-1].end_ms == 3_200


def test_hints_on_the_wire(client: SpeechClient) -> None:
    data = (AUDIO * 32_768).astype("<i2").tobytes()
    plain, hinted = (
        text_of(list(client.stream(parts(data), StreamSettings(phrases=phrases, boost=9.0))))
        for phrases in ((), ("zebra",))
    )
    assert hinted.split().count("zebra") > plain.split().count("zebra")


@pytest.mark.parametrize(
    ("endpointing", "expected"),
    [
        ({"silence_ms": 0}, [3.2]),
        ({"silence_ms": 0, "rules": [{"min_utterance_ms": 500}]}, [0.64, 1.28, 1.92, 2.56, 3.2]),
        ({"silence_ms": 0, "rules": [{"min_utterance_ms": 700}]}, [1.28, 2.56, 3.2]),
    ],
)
def test_endpointing_on_the_wire(server: BackgroundServer, endpointing: dict, expected: list[float]) -> None:
    rules = [rule | {"without_speech": True} for rule in endpointing.pop("rules", [])]
    config = config_message(endpointing=endpointing | {"rules": rules})
    data = (AUDIO * 32_768).astype("<i2").tobytes()
    responses = raw(server, config, pb.StreamingRecognizeRequest(audio_content=data))
    ends = [response.results[0].result_end_offset for response in responses if response.results[0].is_final]
    assert [end.seconds + end.nanos / 1e9 for end in ends] == pytest.approx(expected)


def test_what_is_served_is_listed(client: SpeechClient) -> None:
    names = {pb.StreamingConfig.AudioEncoding.Name(number) for number in client.model().encodings}
    assert names == {"LINEAR16", "FLOAT32", "FLAC", "MULAW", "OGG_OPUS", "ALAW"}
