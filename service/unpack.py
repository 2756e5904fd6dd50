"""Audio that arrives as a file: WAV, FLAC or Ogg Opus, in pieces of any size, to 16 kHz mono float samples.

Decoding is pulled in small steps, so that a few bytes that stand for hours of silence cost no more memory and hold
nobody up longer than any other audio.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np

from asr_exit.audio import (
    Resampler,
    SampleDecoder,
    check_channels,
    check_rate,
    foreign_container,
    looks_like_wav,
    one_channel,
    parse_wav_header,
)
from asr_exit.containers import ContainerDecoder, FlacFramer, OggOpusFramer
from asr_exit.errors import AudioError
from service.audio_input import HEAD_BYTES, AudioFormat

_STEP_S = 0.5
_NAMES = {"flac": "FLAC", "ogg_opus": "Ogg Opus"}


class _Source(Protocol):
    """A container's samples as they come."""

    rate_hz: int
    channels: int

    def push(self, data: bytes) -> None:
        """Takes the next bytes."""

    def pull(self, max_seconds: float) -> np.ndarray | None:
        """Returns float32 (N, channels), N > 0, or None when more bytes are needed."""

    def finish(self) -> None:
        """No more bytes will come."""


class _WavSource:
    """The samples of a WAV file of 16-bit, float, mu-law or A-law samples."""

    def __init__(self) -> None:
        self.rate_hz = self.channels = 0
        self._head = b""
        self._decoder: SampleDecoder | None = None
        self._bytes_left: int | None = None
        self._samples: deque[np.ndarray] = deque()

    def push(self, data: bytes) -> None:
        if self._decoder is None:
            data = self._head + data
            header = parse_wav_header(data)
            if header is None:
                self._head = data
                return
            if header.encoding is None:
                raise AudioError(f"a WAV file with {header.description}: use 16-bit, 32-bit float, mu-law or A-law")
            self.rate_hz, self.channels = header.rate_hz, header.channels
            check_channels(self.channels, 0)
            self._decoder, self._bytes_left = SampleDecoder(header.encoding, self.channels), header.data_bytes
            data, self._head = data[header.data_start :], b""
        if self._bytes_left is not None:
            data = data[: self._bytes_left]
            self._bytes_left -= len(data)
        samples = self._decoder.push_all(data)
        if len(samples):
            self._samples.append(samples)

    def pull(self, max_seconds: float) -> np.ndarray | None:
        return self._samples.popleft() if self._samples else None

    def finish(self) -> None:
        if self._decoder is None:
            raise AudioError("the audio ended within its WAV header: send the whole file")
        self._decoder.finish()


class Unpacker:
    """One stream's container. Push small pieces and pull until None after each; finish, and pull again."""

    def __init__(self, audio: AudioFormat) -> None:
        """`audio` is not raw; what it leaves open, the file decides."""
        self._audio = audio
        self._head = b""
        self._source: _Source | None = None
        self._resampler: Resampler | None = None
        self._finished = False

    def push(self, data: bytes) -> None:
        """Takes the next bytes. Raises AudioError for anything but the container announced."""
        if self._source is None:
            self._head += data
            if len(self._head) < HEAD_BYTES:
                return
            self._source, data = self._open(self._head), self._head
            self._head = b""
        self._source.push(data)

    def finish(self) -> None:
        """No more bytes will come. Raises AudioError when the container is cut off."""
        if self._source is None:
            self._source = self._open(self._head)
            self._source.push(self._head)
        self._source.finish()
        self._finished = True

    def pull(self) -> np.ndarray | None:
        """Returns the next samples, float32 (N,) at 16 kHz, about half a second at most; None when there are none yet.

        Raises AudioError when the audio is damaged, or is not what was announced.
        """
        if self._source is None:
            return None
        samples = self._source.pull(_STEP_S)
        if samples is not None:
            if self._resampler is None:
                self._check(self._source)
                self._resampler = Resampler(self._source.rate_hz)
            return self._resampler.push(one_channel(samples, self._audio.channel))
        if self._finished and self._resampler is not None:
            last, self._resampler, self._finished = self._resampler.finish(), None, False
            return last
        return None

    def _open(self, head: bytes) -> _Source:
        name = "wav" if len(head) >= HEAD_BYTES and looks_like_wav(head) else foreign_container(head)
        wanted = self._audio.encoding
        if name == "wav" and wanted == "any":
            return _WavSource()
        if name == "FLAC" and wanted in ("any", "flac"):
            return ContainerDecoder(FlacFramer())
        if name == "Ogg" and wanted in ("any", "ogg_opus"):
            return ContainerDecoder(OggOpusFramer())
        if wanted != "any":
            raise AudioError(f"{_NAMES[wanted]} audio was announced, but this is not: set the encoding that is sent")
        found = f"this is a {name} file" if name else "this is no WAV, FLAC or Ogg Opus file"
        raise AudioError(
            f"the encoding is not set, or no rate with it, and {found}: set encoding and sample_rate_hertz for raw "
            "samples, or send a WAV, FLAC or Ogg Opus file"
        )

    def _check(self, source: _Source) -> None:
        said, opus = self._audio, isinstance(source, ContainerDecoder) and source.is_opus
        check_rate(source.rate_hz)
        if said.rate_hz not in (0, source.rate_hz) and not opus:  # Opus has no rate of its own
            raise AudioError(f"the file says {source.rate_hz} Hz, the request {said.rate_hz} Hz: make the two agree")
        announced = said.channels or (source.channels if said.channel else 1)
        if announced != source.channels:
            raise AudioError(
                f"the file has {source.channels} channels, the request announced {announced}: set the number of "
                "channels, or the one to recognise"
            )
        check_channels(source.channels, said.channel)
