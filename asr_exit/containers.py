"""FLAC and Ogg Opus as they arrive on a wire: bytes in pieces of any size, samples out as soon as they are complete.

libsndfile reads files, not streams: asked for more than is there, it takes that for the end. So the framing is read
here first, and libsndfile is only ever asked for samples whose bytes have arrived. The samples equal those of the whole
file, however its bytes were split; memory is bounded by the largest legal frame or page.

FLAC: RFC 9639. Ogg: RFC 3533. Opus in Ogg: RFC 7845, packets: RFC 6716.
"""

from __future__ import annotations

import io
from typing import Protocol

import numpy as np
import soundfile

from asr_exit.errors import AudioError

_FLAC_BLOCK_SIZES = {1: 192} | {n: 576 << n - 2 for n in range(2, 6)} | {n: 256 << n - 8 for n in range(8, 16)}
_FLAC_RATES_HZ = [0, 88_200, 176_400, 192_000, 8_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000]
_FLAC_SAMPLE_BITS = [0, 8, 12, -1, 16, 20, 24, 32]  # 0: as in the stream information; -1: reserved
_FLAC_HEADER_BYTES = 16  # the longest frame header
_STREAMINFO_BYTES = 34
_SILK_FRAMES, _HYBRID_FRAMES, _CELT_FRAMES = (480, 960, 1920, 2880), (480, 960), (120, 240, 480, 960)
_OPUS_RATE_HZ = 48_000
_OPUS_PACKET_SAMPLES = 5_760  # 120 ms, the longest legal packet
_OGG_HEADER_BYTES = 27
_OGG_EOS = 4
_MAX_OGG_HEADERS_BYTES = 1 << 20  # comments may hold pictures
_ENDLESS = 1 << 62


class Framer(Protocol):
    """Finds out how much of a container has arrived."""

    ended: bool  # the container said that nothing follows; it may hold fewer samples than were counted

    def push(self, data: bytes) -> tuple[bytes, int]:
        """Takes the next bytes; returns what libsndfile may see of them, and how many samples they complete."""

    def finish(self) -> tuple[bytes, int]:
        """The same for what was held back, now that nothing will follow."""


class FlacFramer:
    """Splits FLAC into frames. A frame is complete when the header of the next one is there."""

    def __init__(self) -> None:
        self.ended = False
        self._data = b""
        self._skip = 0  # bytes of a metadata block that are not needed
        self._info: bytes | None = None
        self._last_block = False
        self._start: tuple[int, int] | None = None  # number and block size of the frame at the start of `_data`
        self._search = 0  # where to look for the next frame's header

    def push(self, data: bytes) -> tuple[bytes, int]:
        """See Framer. Raises AudioError when this is not FLAC."""
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        self._data += data
        head = b"" if self._last_block else self._read_metadata()
        if not self._last_block:
            return head, 0
        frames, samples = self._split_frames()
        return head + frames, samples

    def finish(self) -> tuple[bytes, int]:
        """See Framer: the last frame. Raises AudioError when the stream ended before its first frame."""
        if not self._last_block or self._skip:
            raise AudioError("the FLAC audio ended within its header: send the whole file")
        if not self._data:
            return b"", 0
        self._data += bytes(_FLAC_HEADER_BYTES)  # the last header may be shorter than what the search waits for
        frames, samples = self._split_frames()
        assert self._start is not None
        return frames + self._data, samples + self._start[1]

    def _read_metadata(self) -> bytes:
        """Takes metadata blocks off the front; returns a header of their STREAMINFO alone once all are read."""
        if self._info is None:
            if len(self._data) < 8 + _STREAMINFO_BYTES:
                return b""
            if self._data[:4] != b"fLaC" or self._data[4] & 0x7F or self._data[5:8] != b"\0\0\x22":
                raise AudioError("this is not FLAC: it must begin with 'fLaC' and its stream information")
            self._last_block = bool(self._data[4] & 0x80)
            self._info = self._data[8 : 8 + _STREAMINFO_BYTES]
            self._data = self._data[8 + _STREAMINFO_BYTES :]
        while not self._last_block and len(self._data) >= 4:
            self._last_block = bool(self._data[0] & 0x80)
            size = 4 + int.from_bytes(self._data[1:4], "big")
            self._skip = max(0, size - len(self._data))
            self._data = self._data[size:]
            if self._skip:
                break
        if not self._last_block:
            return b""
        packed = int.from_bytes(self._info[10:18], "big")  # rate, channels, sample size, number of samples
        self._rate_hz, self._channels = packed >> 44, (packed >> 41 & 7) + 1
        self._bits, endless = (packed >> 36 & 31) + 1, packed >> 36 << 36
        self._longest = 65_535 * self._channels * (self._bits + 1) // 8 + 1024
        return b"fLaC\x80\0\0\x22" + self._info[:10] + endless.to_bytes(8, "big") + bytes(16)

    def _split_frames(self) -> tuple[bytes, int]:
        data, done, samples = self._data, 0, 0
        if self._start is None and data:
            header = self._frame_header(data, 0, None)
            if header is not None:
                self._start, self._search = header, 1
            elif len(data) >= _FLAC_HEADER_BYTES:
                raise AudioError("the FLAC audio is damaged: no frame follows its header")
        while self._start is not None:
            at = data.find(b"\xff", self._search)
            if at < 0 or at + _FLAC_HEADER_BYTES > len(data):
                self._search = len(data) if at < 0 else at
                break
            header = self._frame_header(data, at, self._start)
            self._search = at + 1
            if header is not None:
                samples += self._start[1]
                self._start, done = header, at
        if len(data) - done > self._longest:
            raise AudioError("the FLAC audio is damaged: a frame has no end")
        self._data, self._search = data[done:], self._search - done
        return data[:done], samples

    def _frame_header(self, data: bytes, at: int, before: tuple[int, int] | None) -> tuple[int, int] | None:
        """(number, block size) of the frame whose header is at `at`, or None when there is none.

        `before` is the frame that it has to follow: a look-alike within a frame's samples does not count on from it.
        """
        if len(data) < at + 6 or data[at] != 0xFF or data[at + 1] & 0xFE != 0xF8 or data[at + 3] & 1:
            return None
        size_code, rate_code = data[at + 2] >> 4, data[at + 2] & 15
        channel_code, bits_code = data[at + 3] >> 4, data[at + 3] >> 1 & 7
        channels = channel_code + 1 if channel_code < 8 else 2
        if channels != self._channels or _FLAC_SAMPLE_BITS[bits_code] not in (0, self._bits) or rate_code == 15:
            return None
        if 0 < rate_code < 12 and _FLAC_RATES_HZ[rate_code] != self._rate_hz:
            return None
        more = 8 - (data[at + 4] ^ 0xFF).bit_length()  # leading ones, as in UTF-8
        if more in (1, 8):
            return None
        number = data[at + 4] & (0x7F if more == 0 else 0xFF >> more + 1)
        end = at + 4 + max(1, more)
        for byte in data[at + 5 : end]:
            number = number << 6 | byte & 0x3F
        extra = {6: 1, 7: 2}.get(size_code, 0)
        size = _FLAC_BLOCK_SIZES.get(size_code) or int.from_bytes(data[end : end + extra], "big") + 1
        end += extra + {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
        if size_code == 0 or end >= len(data) or _crc8(data[at:end]) != data[end]:
            return None
        variable = data[at + 1] & 1
        if before is not None and number != before[0] + (before[1] if variable else 1):
            return None
        return number, size


class OggOpusFramer:
    """Counts the samples of the Opus packets that Ogg pages complete."""

    def __init__(self) -> None:
        self.ended = False
        self._data = b""
        self._serial: bytes | None = None
        self._packets = 0  # completed so far, headers included
        self._toc = b""  # first bytes of the packet that is not complete yet
        self._header_bytes = 0
        self._samples_48k, self._given, self._factor = 0, 0, 1

    def push(self, data: bytes) -> tuple[bytes, int]:
        """See Framer. Raises AudioError when this is not Ogg Opus, or is damaged."""
        if self.ended:
            return b"", 0
        self._data += data
        pages, position = [], 0
        while not self.ended and (size := self._page_size(position)):
            page = self._data[position : position + size]
            position += size
            if self._serial is None:
                self._read_head(page)
            if page[14:18] == self._serial:
                self._count_packets(page)
                pages.append(page)
                self.ended = bool(page[5] & _OGG_EOS)
        self._data = self._data[position:]
        complete = max(0, self._samples_48k) // self._factor
        samples, self._given = complete - self._given, complete
        return b"".join(pages), samples

    def finish(self) -> tuple[bytes, int]:
        """See Framer: every whole page is out already. Raises AudioError when the headers were not complete."""
        if self._packets < 2 or self._data:
            raise AudioError("the Ogg audio ended within a page: send the whole file")
        return b"", 0

    def _page_size(self, at: int) -> int:
        """Bytes of the page at `at`, or 0 when it is not complete."""
        data = self._data
        if not b"OggS\0".startswith(data[at : at + 5]):
            raise AudioError("the Ogg audio is damaged: no page where one must begin")
        if len(data) < at + _OGG_HEADER_BYTES or len(data) < (table := at + _OGG_HEADER_BYTES) + data[at + 26]:
            return 0
        size = _OGG_HEADER_BYTES + data[at + 26] + sum(data[table : table + data[at + 26]])
        return size if len(data) >= at + size else 0

    def _read_head(self, page: bytes) -> None:
        head = page[_OGG_HEADER_BYTES + page[26] :]
        if head[:8] != b"OpusHead" or len(head) < 19:
            name = "Vorbis" if b"vorbis" in head[:8] else "FLAC" if b"FLAC" in head[:8] else "something else"
            raise AudioError(f"this Ogg stream holds {name}, not Opus: send Ogg Opus, FLAC or raw samples")
        if head[18] != 0 and head[9] > 8:
            raise AudioError(f"this Ogg stream has {head[9]} channels: use at most 8")
        self._serial = page[14:18]
        rate_hz = int.from_bytes(head[12:16], "little")
        # libsndfile decodes at the first of Opus's rates that is no less than the original one.
        rates = (8_000, 12_000, 16_000, 24_000)
        self._factor = _OPUS_RATE_HZ // next((rate for rate in rates if rate_hz <= rate), _OPUS_RATE_HZ)
        self._samples_48k = -int.from_bytes(head[10:12], "little")

    def _count_packets(self, page: bytes) -> None:
        start = _OGG_HEADER_BYTES + page[26]
        for length in page[_OGG_HEADER_BYTES:start]:
            self._toc = (self._toc + page[start : start + length])[:2]
            start += length
            if length < 255:
                if self._packets >= 2:
                    self._samples_48k += _opus_samples(self._toc)
                self._packets, self._toc = self._packets + 1, b""
        if self._packets < 2:
            self._header_bytes += len(page)
            if self._header_bytes > _MAX_OGG_HEADERS_BYTES:
                raise AudioError("the Ogg audio has more than 1 MB of headers: send it without pictures")


def _opus_samples(toc: bytes) -> int:
    """Samples at 48 kHz of the packet that begins with these bytes."""
    if not toc:
        raise AudioError("the Opus audio is damaged: an empty packet")
    kind, code = toc[0] >> 3, toc[0] & 3
    count = (1, 2, 2, toc[1] & 0x3F if len(toc) > 1 else 0)[code]
    size = _SILK_FRAMES[kind & 3] if kind < 12 else _HYBRID_FRAMES[kind & 1] if kind < 16 else _CELT_FRAMES[kind & 3]
    if not 0 < count * size <= _OPUS_PACKET_SAMPLES:
        raise AudioError("the Opus audio is damaged: a packet of impossible length")
    return count * size


def _crc8(data: bytes) -> int:
    """CRC with polynomial x^8 + x^2 + x + 1, as FLAC frame headers carry it."""
    crc = 0
    for byte in data:
        crc = _CRC8[crc ^ byte]
    return crc


def _crc8_of(byte: int) -> int:
    for _ in range(8):
        byte = (byte << 1 ^ 0x07) & 0xFF if byte & 0x80 else byte << 1
    return byte


_CRC8 = [_crc8_of(byte) for byte in range(256)]


class _Arrived(io.RawIOBase):
    """What has arrived of a file that is still being sent, as a file without a known end."""

    def __init__(self) -> None:
        self._data, self._base, self._position = b"", 0, 0

    def append(self, data: bytes) -> None:
        used = self._position - self._base
        self._data, self._base = self._data[used:] + data, self._base + used

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        at = self._position - self._base
        part = self._data[at : at + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: _ENDLESS}[whence] + offset
        return self.tell()

    def tell(self) -> int:
        """Seeking to where nothing has arrived fails, so that libsndfile does not look for the end."""
        known = self._base <= self._position <= self._base + len(self._data)
        return self._position if known or self._position == _ENDLESS else -1


class _Forward(soundfile.SoundFile):
    """Reads on from where it is; soundfile would seek after every read."""

    def seekable(self) -> bool:
        return False


class ContainerDecoder:
    """Samples of FLAC or Ogg Opus, as far as they have arrived."""

    def __init__(self, framer: Framer) -> None:
        self.rate_hz = self.channels = 0  # known once `pull` has returned something
        self._framer = framer
        self._arrived = _Arrived()
        self._file: _Forward | None = None
        self._available = 0  # samples whose bytes have arrived
        self._finished = False

    @property
    def is_opus(self) -> bool:
        """Opus works at any rate: the one in its header is only a remark about the original."""
        return isinstance(self._framer, OggOpusFramer)

    def push(self, data: bytes) -> None:
        """Takes the next bytes. Raises AudioError for anything that is not such a container."""
        self._take(*self._framer.push(data))

    def finish(self) -> None:
        """No more bytes will come. Raises AudioError when the container is cut off."""
        if not (self._framer.ended or self._finished):
            self._take(*self._framer.finish())
        self._finished = True

    def pull(self, max_seconds: float) -> np.ndarray | None:
        """Returns at most so much of the audio: float32 (N, channels), N > 0; None when more bytes are needed.

        Raises AudioError when the audio is damaged.
        """
        if self._available == 0:
            return None
        try:
            if self._file is None:
                self._file = _Forward(self._arrived)
                self.rate_hz, self.channels = self._file.samplerate, self._file.channels
            wanted = min(self._available, max(1, int(max_seconds * self.rate_hz)))
            samples = self._file.read(wanted, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise AudioError(f"the compressed audio is damaged: {error}") from None
        self._available -= wanted
        if len(samples) < wanted:
            self._available = 0
            if not self._framer.ended:
                raise AudioError("the compressed audio is damaged: it holds fewer samples than it announces")
        return samples if len(samples) else None

    def _take(self, data: bytes, samples: int) -> None:
        self._arrived.append(data)
        self._available += samples
