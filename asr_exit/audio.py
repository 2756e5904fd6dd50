"""Audio from files and raw bytes: decoding, WAV headers, streaming resampling to the model's rate.

Everything ends as float32 mono samples in -1..1. All failures are :class:`asr_exit.errors.AudioError`, whose messages
say what to change.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from asr_exit.errors import AudioError

MODEL_RATE_HZ = 16_000
MIN_RATE_HZ = 8_000
MAX_RATE_HZ = 48_000
LOUDEST_FLOAT = 16.0  # far above any honest clipping; 16-bit integers in float clothes are far above this

MAX_CHANNELS = 8

Encoding = Literal["linear16", "float32", "mulaw", "alaw"]
_DTYPES: dict[str, np.dtype] = {
    "linear16": np.dtype("<i2"),
    "float32": np.dtype("<f4"),
    "mulaw": np.dtype("u1"),
    "alaw": np.dtype("u1"),
}
_WAV_EXTENSIBLE = 0xFFFE
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # written by programs that stream and cannot go back to fill in the length
_CONTAINERS = {b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3\x03": "MP3", b"ID3\x04": "MP3", b"FORM": "AIFF"}
_MAX_HEADER_BYTES = 1 << 16


def bytes_per_second(encoding: Encoding, rate_hz: int, channels: int = 1) -> int:
    """Returns how many bytes one second of audio takes."""
    return _DTYPES[encoding].itemsize * rate_hz * channels


def check_rate(rate_hz: int) -> int:
    """Returns `rate_hz`; raises AudioError when it is outside 8000..48000."""
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise AudioError(f"sample rate {rate_hz} Hz is not supported: use {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz")
    return rate_hz


def read_audio(path: str | Path) -> tuple[np.ndarray, int]:
    """Reads a whole audio file (wav, flac, ogg, opus, mp3).

    Returns mono float32 samples of shape (N,), channels averaged, and the sample rate in Hz. Raises AudioError when the
    file is missing, empty, not audio, or its rate is outside 8000..48000 Hz.
    """
    import soundfile

    path = Path(path)
    if not path.exists():
        raise AudioError(f"{path}: no such file")
    if path.is_dir():
        raise AudioError(f"{path} is a directory: give an audio file")
    try:
        samples, rate_hz = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, TypeError, OSError) as error:
        raise AudioError(f"{path} is not a readable audio file (wav, flac, ogg, opus and mp3 are): {error}") from None
    if samples.shape[0] == 0:
        raise AudioError(f"{path} holds no samples")
    mono = one_channel(samples)
    try:
        check_rate(rate_hz)
        check_samples(mono)
    except AudioError as error:
        raise AudioError(f"{path}: {error}") from None
    return np.ascontiguousarray(mono, dtype=np.float32), rate_hz


def load_audio(path: str | Path) -> np.ndarray:
    """Reads a whole file like :func:`read_audio` and returns it at 16 kHz: float32 (N,)."""
    samples, rate_hz = read_audio(path)
    resampler = Resampler(rate_hz)
    return np.concatenate([resampler.push(samples), resampler.finish()])


def check_samples(samples: np.ndarray, first_index: int = 0) -> None:
    """Raises AudioError when float samples are NaN, infinite, or so loud that they are not in -1..1 at all.

    `first_index` is the position of `samples[0]` in the stream, for the message.
    """
    if samples.size == 0:
        return
    loudest = float(np.max(np.abs(samples)))
    if not np.isfinite(loudest):
        index = first_index + int(np.flatnonzero(~np.isfinite(samples))[0])
        raise AudioError(f"sample {index} is NaN or infinite: send finite samples in -1..1")
    if loudest > LOUDEST_FLOAT:
        raise AudioError(
            f"float samples must be in -1..1, found {loudest:g}: divide 16-bit values by 32768, or send them as 16-bit"
        )


class Resampler:
    """Streaming conversion of one mono signal to 16 kHz; the output does not depend on how the input is split."""

    def __init__(self, rate_hz: int) -> None:
        """`rate_hz` is the rate of the samples to be pushed; AudioError outside 8000..48000."""
        self._stream = None
        if check_rate(rate_hz) != MODEL_RATE_HZ:
            import soxr

            self._stream = soxr.ResampleStream(rate_hz, MODEL_RATE_HZ, num_channels=1, dtype="float32")

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Takes float32 (N,) at the input rate; returns the float32 samples at 16 kHz that are complete by now."""
        if self._stream is None or samples.size == 0:
            return samples
        return self._stream.resample_chunk(samples)

    def finish(self) -> np.ndarray:
        """Returns what the filter still holds, float32 (M,). Nothing may be pushed afterwards."""
        empty = np.zeros(0, dtype=np.float32)
        return empty if self._stream is None else self._stream.resample_chunk(empty, last=True)


def check_channels(channels: int, channel: int) -> None:
    """Raises AudioError unless `channel` is 0 (the mean of all) or counts, from 1, one of `channels`, 1 to 8."""
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{channels} channels are not supported: use 1 to {MAX_CHANNELS}")
    if not 0 <= channel <= channels:
        raise AudioError(f"channel {channel} was asked for, but there are {channels}: use 1 to {channels}, 0 for all")


def one_channel(samples: np.ndarray, channel: int = 0) -> np.ndarray:
    """(N, channels) float32 -> (N,): the channel counted from 1, or with 0 the mean of all."""
    if samples.shape[1] == 1 or channel:
        return samples[:, max(0, channel - 1)]
    return np.asarray(samples.mean(axis=1))


def _mulaw_table() -> np.ndarray:
    """(256,) float32 value of every mu-law byte: ITU-T G.711."""
    code = ~np.arange(256) & 0xFF
    magnitude = (((code & 0x0F) << 3) + 0x84 << (code >> 4 & 7)) - 0x84
    return np.asarray(np.where(code & 0x80, -magnitude, magnitude) / 32768, dtype=np.float32)


def _alaw_table() -> np.ndarray:
    """(256,) float32 value of every A-law byte: ITU-T G.711."""
    code = np.arange(256) ^ 0x55
    exponent, mantissa = code >> 4 & 7, (code & 0x0F) << 4
    magnitude = np.where(exponent == 0, mantissa + 8, mantissa + 0x108 << np.maximum(exponent, 1) - 1)
    return np.asarray(np.where(code & 0x80, magnitude, -magnitude) / 32768, dtype=np.float32)


_TABLES = {"mulaw": _mulaw_table(), "alaw": _alaw_table()}


class SampleDecoder:
    """Raw little-endian bytes, cut anywhere, to mono float32 samples."""

    def __init__(self, encoding: Encoding, channels: int = 1, channel: int = 0) -> None:
        """`channels` are interleaved; `channel` picks one, counted from 1; 0 takes the mean of all.

        Raises AudioError for more than 8 channels, or a channel that is not there.
        """
        check_channels(channels, channel)
        self.encoding: Encoding = encoding
        self._dtype = _DTYPES[encoding]
        self._channels, self._channel = channels, channel
        self._rest = b""
        self._num_samples = 0

    def push(self, data: bytes) -> np.ndarray:
        """Returns the whole samples in `data` (float32 (N,)), keeping an unfinished one for the next call.

        Raises AudioError for NaN, infinite or absurdly loud float samples.
        """
        decoded = self.push_all(data)
        return one_channel(decoded, self._channel) if self._channels > 1 else decoded[:, 0]

    def push_all(self, data: bytes) -> np.ndarray:
        """As `push`, but all channels: float32 (N, channels)."""
        data = self._rest + data if self._rest else data
        count = len(data) // self._frame_bytes * self._channels
        self._rest = data[count * self._dtype.itemsize :]
        samples = np.frombuffer(data, dtype=self._dtype, count=count)
        if self.encoding == "linear16":
            decoded = samples * np.float32(1 / 32768)
        elif self.encoding == "float32":
            decoded = samples.astype(np.float32)
            check_samples(decoded, self._num_samples)
        else:
            decoded = _TABLES[self.encoding][samples]
        self._num_samples += decoded.size
        return decoded.reshape(-1, self._channels)

    def finish(self) -> None:
        """Raises AudioError when the bytes ended in the middle of a sample."""
        if self._rest:
            size = self._frame_bytes
            raise AudioError(
                f"the audio ended in the middle of a sample ({len(self._rest)} of {size} bytes): {self.encoding} needs "
                f"a multiple of {size} bytes; check the encoding"
            )

    @property
    def _frame_bytes(self) -> int:
        return self._dtype.itemsize * self._channels


@dataclass(frozen=True, slots=True)
class WavHeader:
    """What a WAV header says: `encoding` is None when it is none of ours."""

    encoding: Encoding | None
    rate_hz: int
    channels: int
    description: str
    data_start: int  # bytes from the start of the file to the first sample
    data_bytes: int | None  # None: until the end of the stream


def looks_like_wav(head: bytes) -> bool:
    """True when `head` is, or by its first bytes may become, the start of a WAV file."""
    return head[:4] == b"RIFF"[: len(head)] and head[8:12] == b"WAVE"[: max(0, len(head) - 8)]


def foreign_container(head: bytes) -> str | None:
    """Returns the name of the compressed or boxed format whose file starts with `head`, or None."""
    return _CONTAINERS.get(head[:4])


def parse_wav_header(head: bytes) -> WavHeader | None:
    """Parses the start of a WAV file. Returns None when more bytes are needed; AudioError when it is broken."""
    position, fmt = 12, b""
    while len(head) >= position + 8:
        name, size = head[position : position + 4], int.from_bytes(head[position + 4 : position + 8], "little")
        start = position + 8
        if name == b"data":
            if len(fmt) < 16:
                raise AudioError("WAV header without a format chunk before the data: send raw samples instead")
            return _wav_header(fmt, start, None if size in _UNKNOWN_SIZES else size)
        if start + size > _MAX_HEADER_BYTES:
            raise AudioError(f"no audio data in the first {_MAX_HEADER_BYTES} bytes of the WAV file: send raw samples")
        if name == b"fmt ":
            fmt = head[start : start + size]
        position = start + size + size % 2
    return None


def _wav_header(fmt: bytes, data_start: int, data_bytes: int | None) -> WavHeader:
    tag, channels = int.from_bytes(fmt[0:2], "little"), int.from_bytes(fmt[2:4], "little")
    rate_hz, bits = int.from_bytes(fmt[4:8], "little"), int.from_bytes(fmt[14:16], "little")
    if tag == _WAV_EXTENSIBLE and len(fmt) >= 26:
        tag = int.from_bytes(fmt[24:26], "little")
    encodings: dict[tuple[int, int], Encoding] = {
        (1, 16): "linear16",
        (3, 32): "float32",
        (6, 8): "alaw",
        (7, 8): "mulaw",
    }
    kind = {1: "integer PCM", 3: "float", 6: "A-law", 7: "mu-law"}.get(tag, f"format tag {tag}")
    description = f"{bits}-bit {kind}, {rate_hz} Hz, {channels} channel{'s' if channels != 1 else ''}"
    return WavHeader(encodings.get((tag, bits)), rate_hz, channels, description, data_start, data_bytes)
