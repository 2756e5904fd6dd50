"""Where the audio of a stream comes from: a file, standard input, a microphone, at real-time pace or at once."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator

import numpy as np

from asr_exit.errors import AudioError

MESSAGE_S = 0.08  # audio in one part: whole chunks are made of such


def file_parts(path: str) -> tuple[list[bytes], int]:
    """A file as messages of 16-bit samples, and its rate in Hz. Raises AudioError."""
    from asr_exit.audio import read_audio

    samples, rate_hz = read_audio(path)
    data = np.clip((samples * 32768.0).round(), -32768.0, 32767.0).astype("<i2").tobytes()  # exact for 16-bit files
    size = 2 * int(MESSAGE_S * rate_hz)
    return [data[start : start + size] for start in range(0, len(data), size)], rate_hz


def stdin_parts(rate_hz: int) -> Iterator[bytes]:
    """Raw 16-bit mono samples from standard input, as they come."""
    if sys.stdin.isatty():
        raise AudioError("standard input is a terminal: pipe raw 16-bit mono samples into it, or name a file")
    while data := os.read(sys.stdin.fileno(), 2 * int(MESSAGE_S * rate_hz)):
        yield data


def microphone_parts(rate_hz: int) -> Iterator[bytes]:
    """16-bit samples of the default microphone until interrupted. Raises AudioError without sounddevice or device."""
    try:
        import sounddevice
    except (ImportError, OSError) as error:
        raise AudioError(
            f"--microphone needs sounddevice and PortAudio ({error}): pip install 'asr-exit[microphone]', "
            "or pipe samples into `asr-exit stream -`"
        ) from None
    frames = int(MESSAGE_S * rate_hz)
    try:
        with sounddevice.RawInputStream(samplerate=rate_hz, blocksize=frames, channels=1, dtype="int16") as microphone:
            while True:
                data, _ = microphone.read(frames)
                yield bytes(data)
    except sounddevice.PortAudioError as error:
        raise AudioError(f"the microphone cannot be opened: {error}") from None


def paced(parts: Iterable[bytes], bytes_per_second: int) -> Iterator[bytes]:
    """The same parts, each when its last sample would have been spoken."""
    begin, sent = time.monotonic(), 0
    for part in parts:
        sent += len(part)
        time.sleep(max(0.0, begin + sent / bytes_per_second - time.monotonic()))
        yield part
