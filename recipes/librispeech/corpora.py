"""Finding utterances: the LibriSpeech folder layout and manifest.tsv corpora. Broken entries are only counted."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from asr_exit.errors import ConfigError
from asr_exit.tokenizer import normalise

AUDIO_SUFFIXES = (".flac", ".opus", ".wav", ".ogg")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording and what is said in it (normalised)."""

    id: str
    speaker: str
    path: Path
    text: str


@dataclass(frozen=True)
class Corpus:
    """A named list of utterances and why others were left out."""

    name: str
    utterances: tuple[Utterance, ...]
    skipped: Counter[str] = field(default_factory=Counter)


def read_librispeech(subset_dir: Path) -> Corpus:
    """SUBSET/SPEAKER/CHAPTER/{SPEAKER-CHAPTER.trans.txt, SPEAKER-CHAPTER-UTT.flac|opus}.

    Raises:
        ConfigError: there is no such folder, or nothing usable in it.
    """
    if not subset_dir.is_dir():
        raise ConfigError(f"no LibriSpeech subset at {subset_dir}; --librispeech is the folder that holds the subsets")
    texts: dict[str, str] = {}
    for transcript in sorted(subset_dir.rglob("*.trans.txt")):
        for line in transcript.read_text(encoding="utf-8").splitlines():
            utterance_id, _, text = line.strip().partition(" ")
            texts[utterance_id] = normalise(text)
    found: list[Utterance] = []
    skipped: Counter[str] = Counter()
    audio = {path.stem: path for path in sorted(subset_dir.rglob("*")) if path.suffix in AUDIO_SUFFIXES}
    for utterance_id, path in audio.items():
        if not texts.get(utterance_id):
            skipped["no transcript"] += 1
            continue
        found.append(Utterance(utterance_id, utterance_id.split("-")[0], path, texts[utterance_id]))
    skipped["no audio"] += len(texts.keys() - audio.keys())
    return _finished(subset_dir.name, found, skipped, subset_dir)


def read_manifest(manifest: Path, name: str | None = None) -> Corpus:
    """A tab-separated table with the columns utt_id, speaker_id, rel_path, transcript (others are ignored).

    Raises:
        ConfigError: no such file, a missing column, or nothing usable in it.
    """
    if not manifest.is_file():
        raise ConfigError(f"no manifest at {manifest}; give the path of a manifest.tsv")
    found: list[Utterance] = []
    skipped: Counter[str] = Counter()
    with manifest.open(encoding="utf-8", newline="") as lines:
        table = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        missing = {"utt_id", "speaker_id", "rel_path", "transcript"} - set(table.fieldnames or ())
        if missing:
            raise ConfigError(f"{manifest} lacks the column(s) {', '.join(sorted(missing))}")
        for row in table:
            text = normalise(row["transcript"] or "")
            path = manifest.parent / (row["rel_path"] or "")
            if not text:
                skipped["no transcript"] += 1
            elif not path.is_file():
                skipped["no audio"] += 1
            else:
                found.append(Utterance(row["utt_id"], row["speaker_id"], path, text))
    return _finished(name or manifest.parent.name, found, skipped, manifest)


def _finished(name: str, found: list[Utterance], skipped: Counter[str], where: Path) -> Corpus:
    if not found:
        raise ConfigError(f"no usable utterance in {where}: need audio ({', '.join(AUDIO_SUFFIXES)}) with transcripts")
    return Corpus(name, tuple(sorted(found, key=lambda item: item.id)), +skipped)
