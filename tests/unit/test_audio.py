"""Audio files, raw samples, WAV headers and the streaming resampler."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_exit.audio import (
    Resampler,
    SampleDecoder,
    check_samples,
    foreign_container,
    load_audio,
    looks_like_wav,
    parse_wav_header,
    read_audio,
)
from asr_exit.errors import AudioError


def tone(rate_hz: int, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(rate_hz * seconds)) / rate_hz)).astype(np.float32)


def wav_bytes(samples: np.ndarray, rate_hz: int, subtype: str = "PCM_16", file_format: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format=file_format, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("rate_hz", [8000, 11025, 22050, 44100, 48000])
def test_resampler_is_the_same_at_any_split(rate_hz: int) -> None:
    samples = tone(rate_hz)
    whole = Resampler(rate_hz)
    expected = np.concatenate([whole.push(samples), whole.finish()])
    split = Resampler(rate_hz)
    cuts = np.sort(np.random.default_rng(0).integers(0, samples.size, 200))
    parts = [split.push(part) for part in np.split(samples, cuts)] + [split.finish()]
    np.testing.assert_array_equal(np.concatenate(parts), expected)
    assert abs(expected.size - 8000) <= 1
    inner = slice(800, -800)
    np.testing.assert_allclose(expected[inner], tone(16000)[: expected.size][inner], atol=2e-3)


def test_model_rate_passes_through() -> None:
    resampler = Resampler(16000)
    samples = tone(16000)
    assert resampler.push(samples) is samples
    assert resampler.finish().size == 0


@pytest.mark.parametrize("rate_hz", [0, -1, 7999, 48001, 96000])
def test_rate_out_of_range(rate_hz: int) -> None:
    with pytest.raises(AudioError, match=r"use 8000 to 48000 Hz"):
        Resampler(rate_hz)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_linear16_decodes_at_any_split(size: int) -> None:
    values = np.array([0, 1, -1, 32767, -32768, 256, 12345], dtype="<i2")
    data = values.tobytes()
    decoder = SampleDecoder("linear16")
    decoded = np.concatenate([decoder.push(data[i : i + size]) for i in range(0, len(data), size)])
    decoder.finish()
    np.testing.assert_array_equal(decoded, values.astype(np.float32) / 32768)


@pytest.mark.parametrize("size", [1, 3, 5, 1000])
def test_float32_decodes_at_any_split(size: int) -> None:
    values = tone(16000, 0.01)
    data = values.tobytes()
    decoder = SampleDecoder("float32")
    decoded = np.concatenate([decoder.push(data[i : i + size]) for i in range(0, len(data), size)])
    np.testing.assert_array_equal(decoded, values)


@pytest.mark.parametrize(("encoding", "size"), [("linear16", 3), ("float32", 7)])
def test_end_in_the_middle_of_a_sample(encoding, size: int) -> None:
    decoder = SampleDecoder(encoding)
    decoder.push(bytes(size))
    with pytest.raises(AudioError, match=r"middle of a sample.*multiple of"):
        decoder.finish()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_names_the_sample(value: float) -> None:
    decoder = SampleDecoder("float32")
    decoder.push(tone(16000)[:100].tobytes())
    bad = tone(16000)[:10].copy()
    bad[3] = value
    with pytest.raises(AudioError, match="sample 103 is NaN or infinite"):
        decoder.push(bad.tobytes())


def test_integers_in_float_clothes() -> None:
    with pytest.raises(AudioError, match="divide 16-bit values by 32768"):
        check_samples(np.array([0.0, 8191.0], dtype=np.float32))
    check_samples(np.array([1.2, -1.5], dtype=np.float32))
    check_samples(np.zeros(0, dtype=np.float32))


@pytest.mark.parametrize(("subtype", "encoding"), [("PCM_16", "linear16"), ("FLOAT", "float32"), ("PCM_24", None)])
@pytest.mark.parametrize("file_format", ["WAV", "WAVEX"])
def test_wav_header(subtype: str, encoding: str | None, file_format: str) -> None:
    data = wav_bytes(tone(22050), 22050, subtype, file_format)
    header = parse_wav_header(data)
    assert header is not None
    assert (header.encoding, header.rate_hz, header.channels) == (encoding, 22050, 1)
    assert header.data_bytes == len(tone(22050)) * int({"PCM_16": 2, "FLOAT": 4, "PCM_24": 3}[subtype])
    assert header.data_start + header.data_bytes <= len(data)
    for length in range(header.data_start):
        assert looks_like_wav(data[:length])
        assert parse_wav_header(data[:length]) is None or length == header.data_start


def test_wav_header_of_unknown_length_and_broken_ones() -> None:
    fmt = struct.pack("<HHIIHH", 1, 1, 16000, 32000, 2, 16)
    start = b"RIFF\xff\xff\xff\xffWAVEfmt " + struct.pack("<I", 16) + fmt
    header = parse_wav_header(start + b"data\xff\xff\xff\xff")
    assert header is not None
    assert (header.data_bytes, header.data_start) == (None, 44)
    with pytest.raises(AudioError, match="without a format chunk"):
        parse_wav_header(b"RIFF\0\0\0\0WAVEdata\x08\0\0\0")
    with pytest.raises(AudioError, match="no audio data in the first"):
        parse_wav_header(start + b"junk\xff\xff\xff\x7f")


def test_other_starts() -> None:
    assert foreign_container(b"fLaC\0\0") == "FLAC"
    assert foreign_container(b"OggS") == "Ogg"
    assert foreign_container(bytes(8)) is None
    assert not looks_like_wav(b"RIFF\0\0\0\0AVI ")
    assert not looks_like_wav(b"\0\0")


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_read_audio_mixes_down(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    left = tone(16000)
    soundfile.write(path, np.stack([left, np.zeros_like(left)], axis=1), 16000)
    samples, rate_hz = read_audio(path)
    assert rate_hz == 16000
    assert samples.dtype == np.float32
    assert samples.shape == left.shape
    if suffix != "ogg":
        np.testing.assert_allclose(samples, left / 2, atol=1e-4)


def test_load_audio_resamples(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(8000, 1.0), 8000)
    assert load_audio(path).shape == (16000,)


def test_files_that_are_not_audio(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("this is not sound\n" * 10)
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "silent.wav", np.zeros(0, dtype=np.float32), 16000)
    soundfile.write(tmp_path / "fast.wav", tone(16000), 96000)
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan], dtype=np.float32), 16000, subtype="FLOAT")
    for name, message in [
        ("notes.txt", "not a readable audio file"),
        ("empty.wav", "not a readable audio file"),
        ("missing.wav", "no such file"),
        (".", "is a directory"),
        ("silent.wav", "holds no samples"),
        ("fast.wav", "use 8000 to 48000"),
        ("nan.wav", "sample 1 is NaN"),
    ]:
        with pytest.raises(AudioError, match=message):
            read_audio(tmp_path / name)
