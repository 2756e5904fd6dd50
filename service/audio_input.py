"""The audio side of one stream: bytes as they arrive on the wire to 16 kHz float samples for the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from asr_exit.audio import (
    MODEL_RATE_HZ,
    Encoding,
    Resampler,
    SampleDecoder,
    WavHeader,
    bytes_per_second,
    check_channels,
    check_rate,
    foreign_container,
    looks_like_wav,
    parse_wav_header,
)
from asr_exit.errors import AudioError

HEAD_BYTES = 12  # enough to tell a WAV file from samples
Container = Literal["flac", "ogg_opus", "any"]


@dataclass(frozen=True, slots=True)
class AudioFormat:
    """What the bytes of a stream are said to be. Raises AudioError for a rate or channels out of range."""

    encoding: Encoding | Container = "linear16"  # "any": a file that says itself what it is
    rate_hz: int = 0  # 0: what the file says
    channels: int = 0  # 0: what the file says; mono for raw samples
    channel: int = 0  # which to recognise, counted from 1; 0: the mean of all

    def __post_init__(self) -> None:
        if self.rate_hz or self.is_raw:
            check_rate(self.rate_hz)
        if self.channels or self.is_raw:
            check_channels(self.channels or 1, self.channel)

    @property
    def is_raw(self) -> bool:
        """Samples without a container, but for a WAV header that repeats what is said here."""
        return self.encoding not in ("flac", "ogg_opus", "any")


UNPACKED = AudioFormat("float32", MODEL_RATE_HZ)  # what is inside a container, on its way to the engine


class AudioInput:
    """Decodes and resamples one stream; a WAV header at its start is read and checked, never decoded as sound."""

    def __init__(self, audio: AudioFormat) -> None:
        """`audio` says what the samples on the wire are; they are raw."""
        self.encoding: Encoding = audio.encoding  # type: ignore[assignment]  # raw: see AudioFormat.is_raw
        self.rate_hz, self.channels = audio.rate_hz, audio.channels or 1
        self.bytes_per_second = bytes_per_second(self.encoding, self.rate_hz, self.channels)
        self._decoder = SampleDecoder(self.encoding, self.channels, audio.channel)
        self._resampler = Resampler(audio.rate_hz)
        # None once it is known where the samples start
        self._head: bytes | None = None if audio is UNPACKED else b""
        self._data_bytes_left: int | None = None  # from the WAV header: what follows the samples is not sound

    def push(self, data: bytes) -> np.ndarray:
        """Returns float32 (N,) samples at 16 kHz, N >= 0. Raises AudioError for anything that is not such audio."""
        if self._head is not None:
            data = self._after_head(self._head + data)
        if self._data_bytes_left is not None:
            data = data[: self._data_bytes_left]
            self._data_bytes_left -= len(data)
        return self._resampler.push(self._decoder.push(data))

    def finish(self) -> np.ndarray:
        """Returns the last samples, float32 (N,). Raises AudioError when the audio ended within a sample or header."""
        first = np.zeros(0, dtype=np.float32)
        if self._head:
            if looks_like_wav(self._head) and len(self._head) >= HEAD_BYTES:
                raise AudioError("the audio ended within its WAV header: send the whole file, or raw samples")
            first = self._resampler.push(self._decoder.push(self._head))
        self._decoder.finish()
        return np.concatenate([first, self._resampler.finish()])

    def _after_head(self, head: bytes) -> bytes:
        """Returns the sample bytes in `head`: nothing as long as it is not known where they start."""
        container = foreign_container(head)
        if container is not None:
            raise AudioError(
                f"this is a {container} file, but raw {self.encoding} samples were announced: say so in the encoding, "
                "or decode it before sending"
            )
        if not looks_like_wav(head):
            self._head = None
            return head
        header = parse_wav_header(head) if len(head) >= HEAD_BYTES else None
        if header is None:
            self._head = head
            return b""
        self._check_header(header)
        self._head = None
        self._data_bytes_left = header.data_bytes
        return head[header.data_start :]

    def _check_header(self, header: WavHeader) -> None:
        said = (self.encoding, self.rate_hz, self.channels)
        if said == (header.encoding, header.rate_hz, header.channels):
            return
        number = "mono" if self.channels == 1 else f"{self.channels}-channel"
        raise AudioError(
            f"the audio starts with a WAV header that says {header.description}, but the stream was announced as "
            f"{number} {self.encoding} at {self.rate_hz} Hz: make the two agree, or send raw samples without a header"
        )
