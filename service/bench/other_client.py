"""Others' own clients (NVIDIA's for Riva, Google's) against ours: the same text and word times, file by file."""

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

WORD_TIME_BAR_MS = 80.0


@dataclass(frozen=True)
class OtherClient:
    """A client that is not ours, for an interpreter in an environment of its own."""

    name: str
    package: str  # which has it, in the package registry
    script: Path  # runs it; prints one JSON object about it, then one for each file


CLIENTS = {
    "riva": OtherClient("Riva's client", "nvidia-riva-client", Path(__file__).with_name("riva_client.py")),
    "google": OtherClient("Google's client", "google-cloud-speech", Path(__file__).with_name("google_client.py")),
}


@dataclass(frozen=True)
class ClientReport:
    """What the comparison found; paths of the files that differ."""

    files: int
    words: int
    streaming_texts_differ: list[str]
    offline_texts_differ: list[str]
    largest_time_error_ms: float  # of a word's start or end, where the texts agree
    errors: dict[str, str | None]  # status of provoked errors, as the client's own exceptions
    models: list[str] | None  # None: the API lists none

    @property
    def holds(self) -> bool:
        """Same texts, word times within the bar, errors and models as the client expects them."""
        same = not self.streaming_texts_differ and not self.offline_texts_differ
        served = set(self.errors.values()) == {"INVALID_ARGUMENT"} and self.models != []
        return same and self.largest_time_error_ms <= WORD_TIME_BAR_MS and served


def check_client(
    other: OtherClient, address: str, python: str, paths: Sequence[Path], on_done: Callable[[], None] = lambda: None
) -> ClientReport:
    """Recognise `paths` with both clients at the server listening at `address`.

    Args:
        python: interpreter of an environment that has the other client.
    Raises ConfigError when it has not, or its client fails; AudioError; ServiceError.
    """
    require(bool(paths), "there are no recordings to compare")
    command = [python, str(other.script), address, *map(str, paths)]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        raise ConfigError(f"cannot run {python}: {error.strerror}") from None
    with process, SpeechClient(address) as client:
        assert process.stdout is not None
        about = process.stdout.readline()
        if not about:
            raise ConfigError(f"{other.name} failed; does {python} have it? {python} -m pip install {other.package}")
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
    require(process.returncode == 0, f"{other.name} failed before the last file; see its message above")
    models = [name for name, _ in described["models"]] if "models" in described else None
    return ClientReport(len(paths), words, streaming, offline, largest, described["errors"], models)


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
