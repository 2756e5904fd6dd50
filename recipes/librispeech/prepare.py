"""Recordings and transcripts in, feature shards, tokenizer and statistics out.

    python -m recipes.librispeech.prepare --librispeech DIR --subsets train-clean-5 --dev dev-clean --out DATA \\
        [--download] [--manifest corpus/manifest.tsv ...] [--text sentences.txt.xz --synthetic-hours 3] [--noise DIR] \\
        [--tokenizer-of model.safetensors]

writes DATA/{train,dev,noise}/*.npy + *.json, DATA/tokenizer.model and, last, DATA/data.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile

from asr_exit.config import FeatureConfig
from asr_exit.errors import AsrExitError, ConfigError
from asr_exit.tokenizer import Tokenizer
from recipes.librispeech.corpora import AUDIO_SUFFIXES, Corpus, Utterance, read_librispeech, read_manifest
from recipes.librispeech.download import MIRROR, ensure_subset
from recipes.librispeech.rooms import room_envelopes
from recipes.librispeech.shards import SHARD_FRAMES, ShardJob, ShardReport, pack, write_atomically
from recipes.librispeech.synthesize import synthesize

VOCAB_SIZE = 256
SPEEDS = (0.9, 1.0, 1.1)
SHARD_SECONDS = SHARD_FRAMES * 0.01 * min(SPEEDS)  # so that the slowest copy still fits


def noise_corpus(folder: Path) -> Corpus:
    """Every sound under `folder`, without text.

    Raises:
        ConfigError: none there.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix in AUDIO_SUFFIXES)
    if not paths:
        raise ConfigError(f"no sound under {folder}; leave --noise out or give a folder of {', '.join(AUDIO_SUFFIXES)}")
    return Corpus("noise", tuple(Utterance(path.stem, "noise", path, "") for path in paths))


def jobs_of(corpus: Corpus, speeds: Sequence[float], out_dir: Path, features: FeatureConfig) -> list[ShardJob]:
    """Cut `corpus` into jobs whose shards stay below the shard size. Order is shuffled, deterministically."""
    order = np.random.default_rng(0).permutation(len(corpus.utterances))
    jobs: list[ShardJob] = []
    part: list[Utterance] = []
    seconds = 0.0

    def close() -> None:
        name = f"{corpus.name}-{len(jobs):04d}"
        jobs.append(ShardJob(name, corpus.name, tuple(part), tuple(speeds), out_dir, features))

    for index in order:
        utterance = corpus.utterances[index]
        length = _seconds(utterance.path)
        if part and seconds + length > SHARD_SECONDS:
            close()
            part, seconds = [], 0.0
        part.append(utterance)
        seconds += length
    close()
    return jobs


def _seconds(path: Path) -> float:
    """Length from the header; 0 for what cannot be read (the packing counts it)."""
    try:
        return float(soundfile.info(path).duration)
    except (soundfile.SoundFileError, OSError):
        return 0.0


def statistics(reports: Iterable[ShardReport]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per mel band over all frames of speed 1.

    Raises:
        ConfigError: no clip was usable.
    """
    kept = [report for report in reports if report.frames]
    frames = sum(report.frames for report in kept)
    if not frames:
        raise ConfigError("no training clip could be decoded; check the recordings")
    mean = np.sum([report.sums for report in kept], axis=0) / frames
    variance = np.sum([report.squares for report in kept], axis=0) / frames - mean**2
    return [float(x) for x in mean], [float(x) for x in np.sqrt(np.maximum(variance, 1e-4))]


def summary(reports: Iterable[ShardReport], corpora: Iterable[Corpus]) -> dict[str, dict[str, object]]:
    """Clips, hours and skipped counts per corpus."""
    skipped = {corpus.name: Counter(corpus.skipped) for corpus in corpora}
    clips: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for report in reports:
        clips[report.corpus] += report.clips
        seconds[report.corpus] += report.seconds  # type: ignore[assignment]
        skipped[report.corpus] += report.skipped
    return {
        name: {"clips": clips[name], "hours": round(seconds[name] / 3600, 3), "skipped": dict(skipped[name])}
        for name in skipped
    }


def prepare(
    out: Path,
    train: Sequence[Corpus],
    dev: Sequence[Corpus] = (),
    noise: Sequence[Corpus] = (),
    *,
    vocab_size: int = VOCAB_SIZE,
    tokenizer: Tokenizer | None = None,
    speeds: Sequence[float] = SPEEDS,
    rooms: Path | None = None,
    processes: int = 2,
) -> dict[str, object]:
    """Pack everything under `out`. Returns the content of data.json, which is written last.

    Args:
        tokenizer: to use instead of training one of `vocab_size` on the transcripts.

    Raises:
        ConfigError: `speeds` lacks 1.0, or there is nothing to train on.
        OSError: the disk is full or not writable; what is there is not marked as finished.
    """
    if 1.0 not in speeds:
        raise ConfigError("speeds must include 1.0")
    features = FeatureConfig()
    envelopes = room_envelopes(rooms, features) if rooms else []
    (out / "data.json").unlink(missing_ok=True)
    splits = {"train": (train, speeds), "dev": (dev, (1.0,)), "noise": (noise, (1.0,))}
    jobs: list[ShardJob] = []
    for split, (corpora, split_speeds) in splits.items():
        folder = out / split
        folder.mkdir(parents=True, exist_ok=True)
        for stale in [*folder.glob("*.json"), *folder.glob("*.npy")]:
            stale.unlink()
        jobs += [job for corpus in corpora for job in jobs_of(corpus, split_speeds, folder, features)]
    with ProcessPoolExecutor(processes) as pool:
        reports = list(pool.map(pack, jobs))
    in_split = {split: [r for r, j in zip(reports, jobs, strict=True) if j.out_dir.name == split] for split in splits}
    if tokenizer is None:
        tokenizer = Tokenizer.train((u.text for corpus in train for u in corpus.utterances), vocab_size)
    write_atomically(out / "tokenizer.model", tokenizer.proto)
    mean, std = statistics(in_split["train"])
    description: dict[str, object] = {
        "format": 1,
        "features": dataclasses.asdict(features),
        "feature_mean": mean,
        "feature_std": std,
        "vocab_size": tokenizer.vocab_size,
        "speeds": list(speeds),
        "room_envelopes": envelopes,
        **{split: summary(in_split[split], corpora) for split, (corpora, _) in splits.items()},
    }
    write_atomically(out / "data.json", json.dumps(description, indent=1).encode())
    return description


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Pack recordings into feature shards.")
    parser.add_argument("--librispeech", type=Path, help="folder that holds the subsets")
    parser.add_argument("--download", action="store_true", help="fetch the subsets that are not in that folder")
    parser.add_argument("--mirror", default=MIRROR, help=f"where from (default: {MIRROR})")
    parser.add_argument("--subsets", default="train-clean-5", help="comma-separated training subsets")
    parser.add_argument("--dev", default="", help="comma-separated subsets for model selection")
    parser.add_argument("--manifest", type=Path, action="append", default=[], help="manifest.tsv of another corpus")
    parser.add_argument("--text", type=Path, help="sentences for synthetic speech, one per line, plain or .xz")
    parser.add_argument("--synthetic-hours", type=float, default=0.0)
    parser.add_argument("--noise", type=Path, help="folder with noise recordings")
    parser.add_argument("--rooms", type=Path, help="folder with room impulse responses")
    parser.add_argument("--out", type=Path, required=True)
    pieces = parser.add_mutually_exclusive_group()
    pieces.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="pieces of a tokenizer of this data")
    pieces.add_argument("--tokenizer-of", type=Path, metavar="MODEL", help="model file whose tokenizer to take instead")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    try:
        tokenizer = None
        if options.tokenizer_of is not None:
            from asr_exit.checkpoint import load  # needs safetensors, which preparing alone does not

            tokenizer = load(options.tokenizer_of).tokenizer
        train = [read_manifest(path) for path in options.manifest]
        dev: list[Corpus] = []
        if options.librispeech:
            wanted = [name for name in f"{options.subsets},{options.dev}".split(",") if name]
            for name in dict.fromkeys(wanted) if options.download else ():
                ensure_subset(options.librispeech, name, mirror=options.mirror, report=_say)
            train += [read_librispeech(options.librispeech / name) for name in options.subsets.split(",") if name]
            dev += [read_librispeech(options.librispeech / name) for name in options.dev.split(",") if name]
        elif options.download:
            raise ConfigError("--download needs --librispeech, the folder to download to")
        if options.synthetic_hours > 0:
            if options.text is None:
                raise ConfigError("--synthetic-hours needs --text")
            manifest = options.out / "synthetic" / "manifest.tsv"
            if manifest.is_file():
                print(f"synthetic speech of an earlier run is used: {manifest}")
            made = (
                manifest
                if manifest.is_file()
                else synthesize(options.text, options.synthetic_hours, manifest.parent, processes=options.processes)
            )
            train += [read_manifest(made)] if made else []
        noise = [noise_corpus(options.noise)] if options.noise else []
        description = prepare(
            options.out,
            train,
            dev,
            noise,
            vocab_size=options.vocab_size,
            tokenizer=tokenizer,
            rooms=options.rooms,
            processes=options.processes,
        )
    except AsrExitError as error:
        sys.exit(f"prepare: {error}")
    except OSError as error:
        sys.exit(
            f"prepare: cannot write below {options.out}: {error.strerror or error}; nothing unfinished will be read: "
            "make room and run again"
        )
    print(json.dumps({split: description[split] for split in ("train", "dev", "noise")}, indent=1))


if __name__ == "__main__":
    main()
