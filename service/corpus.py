"""Lists of recordings with their transcripts: manifests and LibriSpeech folders. Audio is read later."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from asr_exit.errors import ConfigError

_PATH_COLUMNS = ("rel_path", "path", "audio")
_TEXT_COLUMNS = ("transcript", "text")
_AUDIO_SUFFIXES = (".flac", ".opus", ".wav", ".ogg", ".mp3")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording and what was said in it."""

    path: Path
    text: str


def read_manifest(path: str | Path) -> list[Utterance]:
    """Reads a tab-separated file whose first line names its columns.

    It needs a column with the audio file (rel_path, path or audio; relative to the manifest) and one with the text
    (transcript or text). Raises ConfigError when the file or a column is missing.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the manifest {path}: {error}") from None
    columns = list(rows[0]) if rows else []
    audio = next((name for name in _PATH_COLUMNS if name in columns), None)
    text = next((name for name in _TEXT_COLUMNS if name in columns), None)
    if audio is None or text is None:
        raise ConfigError(
            f"{path}: the first line must name, separated by tabs, a column {' or '.join(_PATH_COLUMNS)} and a column "
            f"{' or '.join(_TEXT_COLUMNS)}, and at least one recording must follow"
        )
    return [Utterance(path.parent / row[audio], row[text] or "") for row in rows if row[audio]]


def read_librispeech(folder: str | Path, subset: str) -> list[Utterance]:
    """Reads FOLDER/SUBSET/SPEAKER/CHAPTER/*.trans.txt, in order. Raises ConfigError when there is nothing."""
    root = Path(folder) / subset
    utterances = [utterance for path in sorted(root.glob("*/*/*.trans.txt")) for utterance in _chapter(path)]
    if not utterances:
        raise ConfigError(
            f"no LibriSpeech transcripts at {root}/SPEAKER/CHAPTER/*.trans.txt: check --librispeech and --subset"
        )
    return utterances


def _chapter(transcripts: Path) -> Iterator[Utterance]:
    for line in transcripts.read_text(encoding="utf-8").splitlines():
        name, _, text = line.partition(" ")
        candidates = [transcripts.with_name(name + suffix) for suffix in _AUDIO_SUFFIXES]
        audio = next((path for path in candidates if path.exists()), None)
        if audio is None:
            raise ConfigError(f"{transcripts}: no recording {name} beside it ({', '.join(_AUDIO_SUFFIXES)})")
        yield Utterance(audio, text)
