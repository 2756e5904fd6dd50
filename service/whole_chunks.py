"""Audio in messages that end where the server's chunks do: it begins a chunk when all of it is there, not before.

A microphone gives audio every few milliseconds. Collected here, that makes one message a chunk instead of a dozen. It
is answered as soon, for the last sample of a chunk is sent when it comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from asr_exit.audio import looks_like_wav

_HEAD_BYTES = 12  # enough to tell a WAV file from samples


class Collector:
    """Collects the audio among the parts of one stream; other parts go on at once, behind what was collected."""

    def __init__(self, chunk_bytes: int) -> None:
        """`chunk_bytes`: raw audio of a chunk. Chunks count from the first sample, whatever ends utterances."""
        self._chunk_bytes = self._missing = chunk_bytes
        self._head: bytes | None = b""  # None once it is known what the audio begins with
        self._passes = False  # a WAV header would shift all chunks: nothing is collected
        self._kept: list[bytes] = []
        self._size = 0

    def add(self, part: Any) -> Iterator[Any]:
        """What to send now that `part` has come."""
        if not isinstance(part, bytes):
            yield from self.rest()
            yield part
            return
        if self._head is not None:
            part = self._head + part
            self._head = None
            if looks_like_wav(part):
                if len(part) < _HEAD_BYTES:
                    self._head = part
                    return
                self._passes = True
        if self._passes:
            yield part
            return
        start = 0
        while self._size + len(part) - start >= self._missing:
            end = start + self._missing - self._size
            yield self._joined(part[start:end])
            start, self._missing = end, self._chunk_bytes
        if start < len(part):
            self._kept.append(part[start:])
            self._size += len(part) - start

    def rest(self) -> Iterator[bytes]:
        """What has been collected and belongs to no whole chunk: to be sent at the end of the stream."""
        if self._head:
            head, self._head = self._head, None
            yield head
        if self._kept:
            self._missing -= self._size
            yield self._joined(b"")

    def _joined(self, part: bytes) -> bytes:
        data = b"".join((*self._kept, part))
        self._kept, self._size = [], 0
        return data
