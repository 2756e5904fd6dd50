"""Bytes on the wire to samples: headers are read or refused, never decoded as sound."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from asr_exit.audio import Encoding
from asr_exit.errors import AudioError
from service.audio_input import AudioFormat, AudioInput
from tests.conftest import babble
from tests.service.conftest import parts, pcm16


def decode(data: bytes, size: int, encoding: Encoding = "linear16", rate_hz: int = 16_000) -> np.ndarray:
    audio = AudioInput(AudioFormat(encoding, rate_hz))
    return np.concatenate([*(audio.push(part) for part in parts(data, size)), audio.finish()])


def wav(samples: np.ndarray, rate_hz: int = 16_000, subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format="WAV", subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [1, 5, 43, 44, 45, 10_000])
def test_matching_header_is_used(size: int) -> None:
    samples = babble(0.1)
    data = wav(samples) + b"LIST\x04\0\0\0spam"
    np.testing.assert_array_equal(decode(data, size), decode(wav(samples)[44:], 10_000))
    assert decode(data, size).size == samples.size


def test_matching_float_header_is_used() -> None:
    samples = babble(0.1)
    np.testing.assert_array_equal(decode(wav(samples, subtype="FLOAT"), 1000, "float32"), samples)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (wav(babble(0.1), 8_000), "16-bit integer PCM, 8000 Hz, 1 channel"),
        (wav(babble(0.1), subtype="PCM_24"), "24-bit integer PCM"),
        (wav(babble(0.1), subtype="FLOAT"), "32-bit float"),
        (wav(babble(0.1), subtype="ULAW"), "8-bit mu-law"),
        (wav(np.stack([babble(0.1)] * 2, axis=1)), "2 channels"),
    ],
)
@pytest.mark.parametrize("size", [1, 10_000])
def test_header_that_disagrees_is_refused(data: bytes, says: str, size: int) -> None:
    with pytest.raises(AudioError, match=rf"{says}.*announced as mono linear16 at 16000 Hz.*make the two agree"):
        decode(data, size)


def test_header_without_samples() -> None:
    assert decode(wav(np.zeros(0, dtype=np.float32)), 7).size == 0
    with pytest.raises(AudioError, match="within its WAV header"):
        decode(wav(babble(0.1))[:40], 7)


@pytest.mark.parametrize("name", ["FLAC", "OGG"])
def test_compressed_files_are_named(name: str) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, babble(0.1), 16_000, format=name)
    with pytest.raises(AudioError, match=r"this is a (FLAC|Ogg) file.*decode it before"):
        decode(buffer.getvalue(), 100)


@pytest.mark.parametrize("length", [0, 2, 10, 12, 14])
def test_streams_shorter_than_a_header(length: int) -> None:
    data = pcm16(babble(0.1))[:length]
    assert decode(data, 1).size == length // 2
    assert decode(b"RIFF"[:length], 1).size == min(4, length) // 2


@pytest.mark.parametrize("rate_hz", [8_000, 44_100, 48_000])
def test_resampling_does_not_depend_on_the_messages(rate_hz: int) -> None:
    data = pcm16(babble(0.5))
    whole = decode(data, len(data), rate_hz=rate_hz)
    np.testing.assert_array_equal(decode(data, 777, rate_hz=rate_hz), whole)
    assert whole.size == pytest.approx(8_000 * 16_000 / rate_hz, abs=1)


def test_odd_number_of_bytes() -> None:
    with pytest.raises(AudioError, match="middle of a sample"):
        decode(pcm16(babble(0.1)) + b"\0", 100)
