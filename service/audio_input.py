"""The audio side of one stream: bytes as they arrive on the wire to 16 kHz float samples for the engine."""

from __future__ import annotations

import numpy as np

from asr_exit.audio import (
    Encoding,
    Resampler,
    SampleDecoder,
    WavHeader,
    bytes_per_second,
    foreign_container,
    looks_like_wav,
    parse_wav_header,
)
from asr_exit.errors import AudioError

_HEAD_BYTES = 12  # enough to tell a WAV file from samples


class AudioInput:
    """Decodes and resamples one stream; a WAV header at its start is read and checked, never decoded as sound."""

    def __init__(self, encoding: Encoding, rate_hz: int) -> None:
        """`rate_hz` is the rate of the samples on the wire; AudioError outside 8000..48000."""
        self.encoding: Encoding = encoding
        self.rate_hz = rate_hz
        self.bytes_per_second = bytes_per_second(encoding, rate_hz)
        self._decoder = SampleDecoder(encoding)
        self._resampler = Resampler(rate_hz)
        self._head: bytes | None = b""  # None once it is known where the samples start
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
            if looks_like_wav(self._head) and len(self._head) >= _HEAD_BYTES:
                raise AudioError("the audio ended within its WAV header: send the whole file, or raw samples")
            first = self._resampler.push(self._decoder.push(self._head))
        self._decoder.finish()
        return np.concatenate([first, self._resampler.finish()])

    def _after_head(self, head: bytes) -> bytes:
        """Returns the sample bytes in `head`: nothing as long as it is not known where they start."""
        container = foreign_container(head)
        if container is not None:
            raise AudioError(
                f"this is a {container} file, but raw {self.encoding} samples were announced: decode it before sending"
            )
        if not looks_like_wav(head):
            self._head = None
            return head
        header = parse_wav_header(head) if len(head) >= _HEAD_BYTES else None
        if header is None:
            self._head = head
            return b""
        self._check_header(header)
        self._head = None
        self._data_bytes_left = header.data_bytes
        return head[header.data_start :]

    def _check_header(self, header: WavHeader) -> None:
        if header.encoding == self.encoding and header.rate_hz == self.rate_hz and header.channels == 1:
            return
        raise AudioError(
            f"the audio starts with a WAV header that says {header.description}, but the stream was announced as mono "
            f"{self.encoding} at {self.rate_hz} Hz: make the two agree, or send raw samples without a header"
        )
