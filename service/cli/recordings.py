"""Options that name a set of recordings."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from service.corpus import Utterance

AUDIO_SUFFIXES = (".flac", ".opus", ".wav", ".ogg", ".mp3")


def add_recordings_options(parser: argparse._ActionsContainer, *, required: bool = True) -> None:
    """--manifest or --librispeech with --subset; --limit."""
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument(
        "--manifest", metavar="TSV", help="first line names the columns: path and transcript are needed"
    )
    source.add_argument("--librispeech", metavar="DIR", help="folder with LibriSpeech subsets; needs --subset")
    parser.add_argument("--subset", metavar="NAME", help="of LibriSpeech, e.g. dev-clean")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N recordings")


def list_recordings(arguments: argparse.Namespace) -> list[Utterance]:
    """The recordings that the options name. Raises ConfigError when they do not fit together or nothing is there."""
    from asr_exit.config import require
    from service.corpus import read_librispeech, read_manifest

    require(arguments.limit is None or arguments.limit >= 1, f"--limit {arguments.limit} must be at least 1")
    if arguments.manifest:
        require(not arguments.subset, "--subset belongs to --librispeech")
        utterances = read_manifest(arguments.manifest)
    else:
        require(bool(arguments.subset), "--librispeech needs --subset, e.g. --subset dev-clean")
        utterances = read_librispeech(arguments.librispeech, arguments.subset)
    return utterances[: arguments.limit]


def spread_recordings(arguments: argparse.Namespace) -> list[Utterance]:
    """As `list_recordings`, but --limit takes recordings from all over the set: sets are sorted by speaker."""
    limit, arguments.limit = arguments.limit, None
    utterances = list_recordings(arguments)
    arguments.limit = limit
    if limit is None or limit >= len(utterances):
        return utterances
    return [utterances[index * len(utterances) // limit] for index in range(limit)]


def audio_files(folder: str) -> list[Path]:
    """Every recording below `folder`, in order. Raises ConfigError when there is none."""
    from pathlib import Path

    from asr_exit.config import require

    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    require(bool(found), f"no recordings below {folder} ({', '.join(AUDIO_SUFFIXES)})")
    return found
