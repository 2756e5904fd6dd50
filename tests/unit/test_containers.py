"""FLAC and Ogg Opus in pieces: the samples of the whole file at any split, and nothing but AudioError for the rest."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
import soundfile

from asr_exit.audio import SampleDecoder
from asr_exit.containers import ContainerDecoder, FlacFramer, OggOpusFramer
from asr_exit.errors import AudioError
from tests.conftest import babble

KINDS = [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("FLAC", "PCM_S8"), ("OGG", "OPUS")]


def encoded(name: str, subtype: str, rate_hz: int = 16_000, channels: int = 1, seconds: float = 1.0) -> bytes:
    samples = np.stack([babble(seconds * rate_hz / 16_000, seed) for seed in range(channels)], axis=1)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format=name, subtype=subtype)
    return buffer.getvalue()


def decoder_of(name: str) -> ContainerDecoder:
    return ContainerDecoder(FlacFramer() if name == "FLAC" else OggOpusFramer())


def pulled(decoder: ContainerDecoder, max_seconds: float = 0.5) -> list[np.ndarray]:
    found = []
    while (samples := decoder.pull(max_seconds)) is not None:
        assert 0 < len(samples) <= max(1, max_seconds * decoder.rate_hz)
        found.append(samples)
    return found


def decode(name: str, data: bytes, size: int, max_seconds: float = 0.5) -> np.ndarray:
    decoder, found = decoder_of(name), []
    for start in range(0, len(data), size):
        decoder.push(data[start : start + size])
        found += pulled(decoder, max_seconds)
    decoder.finish()
    found += pulled(decoder, max_seconds)
    return np.concatenate(found) if found else np.zeros((0, 1), np.float32)


def whole(data: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0]


@pytest.mark.parametrize(("name", "subtype"), KINDS)
@pytest.mark.parametrize(("rate_hz", "channels"), [(8_000, 1), (16_000, 2), (48_000, 1)])
def test_any_split_gives_the_samples_of_the_file(name: str, subtype: str, rate_hz: int, channels: int) -> None:
    data = encoded(name, subtype, rate_hz, channels)
    expected = whole(data)
    for size in (1 if channels == 1 and rate_hz < 48_000 else 13, 97, 4096, len(data)):
        np.testing.assert_array_equal(decode(name, data, size), expected)


def test_rates_that_opus_does_not_have() -> None:
    data = bytearray(encoded("OGG", "OPUS", 48_000))
    for rate_hz in (11_025, 22_050, 44_100, 96_000, 0):
        head = data.index(b"OpusHead")
        data[head + 12 : head + 16] = rate_hz.to_bytes(4, "little")
        fixed = with_page_checksum(bytes(data))
        np.testing.assert_array_equal(decode("OGG", fixed, 97), whole(fixed))


def with_page_checksum(data: bytes) -> bytes:
    """The first Ogg page with its CRC made right."""
    end = 27 + data[26] + sum(data[27 : 27 + data[26]])
    page, crc = bytearray(data[:end]), 0
    page[22:26] = bytes(4)
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc & 1 << 31 else 0)) & 0xFFFFFFFF
    page[22:26] = crc.to_bytes(4, "little")
    return bytes(page) + data[end:]


def test_flac_with_all_kinds_of_metadata_and_of_unknown_length() -> None:
    plain = encoded("FLAC", "PCM_16", seconds=2.0)
    picture = b"\x06" + (70_000).to_bytes(3, "big") + bytes(70_000)
    first = b"fLaC" + bytes([plain[4] & 0x7F]) + plain[5:42]
    rest = plain[42:] if not plain[4] & 0x80 else b"\x81\0\0\0" + plain[42:]
    data = bytearray(first + picture + rest)
    data[21] &= 0xF0  # length, 36 bits, and checksum unknown, as a live encoder leaves them
    data[22:42] = bytes(20)
    for size in (1000, 71_000, len(data)):
        np.testing.assert_array_equal(decode("FLAC", bytes(data), size), whole(plain))
    np.testing.assert_array_equal(decode("FLAC", bytes(data) + b"TAG" + bytes(125), 1000), whole(plain))


def test_opus_without_its_last_page_and_with_a_second_stream() -> None:
    data = encoded("OGG", "OPUS", seconds=4.0)
    last = data.rindex(b"OggS")
    heard = decode("OGG", data[:last], 97)
    np.testing.assert_array_equal(heard, whole(data)[: len(heard)])
    assert 0 < len(heard) < len(whole(data))
    np.testing.assert_array_equal(decode("OGG", data + data, 97), whole(data))  # as libsndfile: the first stream only


@pytest.mark.parametrize("name", ["FLAC", "OGG"])
def test_damage_is_an_audio_error_or_goes_unnoticed(name: str) -> None:
    """Flipped, lost and doubled bytes: never another exception, never more samples than a few seconds."""
    data = encoded(name, "OPUS" if name == "OGG" else "PCM_16")
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        at, kind = int(rng.integers(len(data))), rng.integers(3)
        broken = bytearray(data)
        if kind == 0:
            broken[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del broken[at : at + int(rng.integers(1, 500))]
        else:
            broken[at:at] = broken[at : at + int(rng.integers(1, 500))]
        try:
            assert len(decode(name, bytes(broken), 997)) < 200_000
        except AudioError:
            refused += 1
    assert refused > 75


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("FLAC", b"fLaC" + bytes(100), None),
        ("FLAC", b"RIFF" + bytes(100), "not FLAC"),
        ("FLAC", encoded("FLAC", "PCM_16")[:30], "within its header"),
        ("OGG", b"OggX" + bytes(100), "no page where one must begin"),
        ("OGG", encoded("OGG", "VORBIS"), "holds Vorbis, not Opus"),
        ("OGG", encoded("OGG", "OPUS")[:60], "within a page"),
        ("OGG", encoded("OGG", "OPUS")[:-1], "within a page"),
    ],
    ids=["flac", "not flac", "flac header", "not ogg", "vorbis", "opus header", "opus cut"],  # encoded bytes differ
)
def test_other_things_are_named(name: str, data: bytes, says: str | None) -> None:
    with pytest.raises(AudioError, match=says):
        decode(name, data, 11)


@pytest.mark.parametrize("name", ["FLAC", "OGG"])
def test_hours_of_silence_in_a_few_bytes_take_no_more_memory(name: str) -> None:
    """Nothing is decoded before it is asked for."""
    buffer = io.BytesIO()
    silence = np.zeros(16_000 * (600 if name == "FLAC" else 60), np.float32)
    soundfile.write(buffer, silence, 16_000, format=name, subtype="OPUS" if name == "OGG" else "PCM_16")
    data, decoder, count = buffer.getvalue(), decoder_of(name), 0
    tracemalloc.start()
    for start in range(0, len(data), 4096):
        decoder.push(data[start : start + 4096])
        while (samples := decoder.pull(1.0)) is not None:
            count += len(samples)
            assert abs(samples).max() < 1e-6
    decoder.finish()
    while (samples := decoder.pull(1.0)) is not None:
        count += len(samples)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(silence)
    assert peak < 500_000


@pytest.mark.parametrize(("encoding", "subtype"), [("mulaw", "ULAW"), ("alaw", "ALAW")])
def test_g711_is_libsndfiles(encoding: str, subtype: str) -> None:
    data = bytes(range(256))
    expected, _ = soundfile.read(
        io.BytesIO(data), dtype="float32", samplerate=8_000, channels=1, format="RAW", subtype=subtype
    )
    np.testing.assert_array_equal(SampleDecoder(encoding).push(data), expected)  # type: ignore[arg-type]
