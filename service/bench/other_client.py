"""NVIDIA's own Riva client against our own: the same text, and the same word times, file by file."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asr_exit.config import require
from asr_exit.errors import ConfigError
from service.client import Caption, SpeechClient, StreamSettings

CLIENT = Path(__file__).with_name("riva_client.py")
WORD_TIME_BAR_MS = 80.0


@dataclass(frozen=True)
class RivaReport:
    """What the comparison found; paths of the files that differ."""

    files: int
    words: int
    streaming_texts_differ: list[str]
    offline_texts_differ: list[str]
    largest_time_error_ms: float  # of a word's start or end, where the texts agree
    errors: dict[str, str | None]  # status of provoked errors, as grpc.RpcError
    models: list[str]

    @property
    def holds(self) -> bool:
        """Same texts, word times within the bar, errors and models as Riva's client expects them."""
        same = not self.streaming_texts_differ and not self.offline_texts_differ
        served = set(self.errors.values()) == {"INVALID_ARGUMENT"} and bool(self.models)
        return same and self.largest_time_error_ms <= WORD_TIME_BAR_MS and served


def check_riva(
    address: str, python: str, paths: Sequence[Path], on_done: Callable[[], None] = lambda: None
) -> RivaReport:
    """Recognise `paths` with both clients at the server listening at `address`.

    Args:
        python: interpreter of an environment that has nvidia-riva-client.
    Raises ConfigError when it has not, or its client fails; AudioError; ServiceError.
    """
    require(bool(paths), "there are no recordings to compare")
    command = [python, str(CLIENT), address, *map(str, paths)]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        raise ConfigError(f"cannot run {python}: {error.strerror}") from None
    with process, SpeechClient(address) as client:
        assert process.stdout is not None
        about = process.stdout.readline()
        if not about:
            raise ConfigError(
                f"Riva's client failed; does {python} have it? {python} -m pip install nvidia-riva-client"
            )
        described = json.loads(about)
        streaming: list[str] = []
        offline: list[str] = []
        words, largest = 0, 0.0
        for path, line in zip(paths, process.stdout, strict=False):
            theirs = json.loads(line)
            text, ours = _our_own(client, path)
            words += len(ours)
            for kind, differing in (("streaming", streaming), ("offline", offline)):
                if theirs[kind]["text"] == text:
                    largest = max(largest, _time_error(theirs[kind]["words"], ours))
                else:
                    differing.append(str(path))
            on_done()
    require(process.returncode == 0, "Riva's client failed before the last file; see its message above")
    models = [name for name, _ in described["models"]]
    return RivaReport(len(paths), words, streaming, offline, largest, described["errors"], models)


def _our_own(client: SpeechClient, path: Path) -> tuple[str, list[tuple[str, float, float]]]:
    """What `asr-exit stream` gets: its text and words."""
    from service.cli.sources import file_parts

    parts, rate_hz = file_parts(str(path))
    captions: list[Caption] = [
        caption
        for caption in client.stream(parts, StreamSettings(rate_hz=rate_hz, word_times=True))
        if caption.is_final and caption.text
    ]
    words = [(word.text, word.start_ms, word.end_ms) for caption in captions for word in caption.words]
    return " ".join(caption.text for caption in captions), words


def _time_error(theirs: Sequence[Any], ours: Sequence[tuple[str, float, float]]) -> float:
    if len(theirs) != len(ours):
        return float("inf")
    return max(
        (max(abs(their[1] - our[1]), abs(their[2] - our[2])) for their, our in zip(theirs, ours, strict=True)),
        default=0.0,
    )
