"""Writing feature shards: a .npy of stacked log-mel frames and, last, the .json index that makes it count.

Both appear by rename, so a reader that starts from the indexes never sees a half-written shard.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from asr_exit.config import FeatureConfig
from asr_exit.data import FRAMES_PER_SECOND
from asr_exit.features import log_mel
from recipes.librispeech.corpora import Utterance

SHARD_FRAMES = 400_000  # 61 MiB of 80 float16 bands, 67 minutes
MIN_SECONDS = 0.3


@dataclass(frozen=True)
class ShardJob:
    """Utterances to pack together, once per speed."""

    name: str
    corpus: str
    utterances: tuple[Utterance, ...]
    speeds: tuple[float, ...]
    out_dir: Path
    features: FeatureConfig


@dataclass(frozen=True)
class ShardReport:
    """What a job wrote. `sums` and `squares` are (num_mels,) totals over `frames` frames of speed 1."""

    corpus: str
    clips: int
    seconds: float
    frames: int
    sums: np.ndarray
    squares: np.ndarray
    skipped: Counter[str]


def change_speed(samples: np.ndarray, speed: float, rate_hertz: int) -> np.ndarray:
    """(N,) to about (N / speed,): faster and higher for speed > 1."""
    return samples if speed == 1.0 else soxr.resample(samples, rate_hertz * speed, rate_hertz, quality="MQ")


def read_samples(path: Path, rate_hertz: int) -> np.ndarray:
    """(N,) float32 mono at `rate_hertz`. Raises soundfile.SoundFileError or ValueError for audio that is no good."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
    if rate != rate_hertz:
        mono = soxr.resample(mono, rate, rate_hertz)
    if not np.isfinite(mono).all():
        raise ValueError("not finite")
    return np.ascontiguousarray(mono)


def write_atomically(path: Path, data: bytes | np.ndarray) -> None:
    """Write to a temporary neighbour, flush to disk, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            if isinstance(data, bytes):
                out.write(data)
            else:
                np.save(out, data)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def pack(job: ShardJob) -> ShardReport:
    """Compute the features of `job` and write one shard per speed. Unreadable clips are counted and left out."""
    num_mels = job.features.num_mels
    skipped: Counter[str] = Counter()
    stacked: dict[float, list[np.ndarray]] = {speed: [] for speed in job.speeds}
    clips: dict[float, list[dict[str, object]]] = {speed: [] for speed in job.speeds}
    starts = dict.fromkeys(job.speeds, 0)
    seconds, frames, kept = 0.0, 0, 0
    sums, squares = np.zeros(num_mels), np.zeros(num_mels)
    for utterance in job.utterances:
        try:
            samples = read_samples(utterance.path, job.features.sample_rate_hertz)
        except (soundfile.SoundFileError, ValueError, OSError):
            skipped["does not decode"] += 1
            continue
        length_seconds = len(samples) / job.features.sample_rate_hertz
        if length_seconds < MIN_SECONDS:
            skipped["too short"] += 1
            continue
        seconds += length_seconds
        kept += 1
        for speed in job.speeds:
            mel = log_mel(change_speed(samples, speed, job.features.sample_rate_hertz), job.features)
            if speed == 1.0:
                frames += len(mel)
                sums += mel.sum(axis=0, dtype=np.float64)
                squares += np.square(mel, dtype=np.float64).sum(axis=0)
            stacked[speed].append(mel.astype(np.float16))
            clips[speed].append(
                {
                    "id": utterance.id,
                    "speaker": utterance.speaker,
                    "text": utterance.text,
                    "start": starts[speed],
                    "frames": len(mel),
                }
            )
            starts[speed] += len(mel)
    for speed in job.speeds:
        if clips[speed]:
            _write_shard(job, speed, stacked[speed], clips[speed])
    return ShardReport(job.corpus, kept, seconds, frames, sums, squares, skipped)


def _write_shard(job: ShardJob, speed: float, parts: Sequence[np.ndarray], clips: list[dict[str, object]]) -> None:
    features = np.concatenate(parts)
    stem = f"{job.name}-x{round(speed * 100):03d}"
    write_atomically(job.out_dir / f"{stem}.npy", features)
    index = {
        "format": 1,
        "corpus": job.corpus,
        "speed": speed,
        "frames": len(features),
        "num_mels": job.features.num_mels,
        "clips": clips,
    }
    write_atomically(job.out_dir / f"{stem}.json", json.dumps(index).encode())


def write_corpus(out_dir: Path, corpus: str, made: Iterable[tuple[str, str, np.ndarray]]) -> tuple[int, float]:
    """Shards of a corpus of (speaker, text, features) in `out_dir`, instead of earlier ones.

    Those stay until all of these are written.

    Returns the number of utterances and their hours.
    """
    clips: list[dict[str, object]] = []
    parts: list[np.ndarray] = []
    indexes: dict[str, bytes] = {}
    total = frames = all_frames = 0

    with tempfile.TemporaryDirectory(prefix=f".{corpus}-", dir=out_dir) as waiting:

        def close() -> None:
            nonlocal clips, parts, frames
            if not parts:
                return
            stem = f"{corpus}-{len(indexes):04d}-x100"
            features = np.concatenate(parts)
            index = {"format": 1, "corpus": corpus, "speed": 1.0, "frames": frames, "num_mels": features.shape[1]}
            write_atomically(Path(waiting, f"{stem}.npy"), features)
            indexes[stem] = json.dumps({**index, "clips": clips}).encode()
            clips, parts, frames = [], [], 0

        for speaker, text, features in made:
            if frames + len(features) > SHARD_FRAMES:
                close()
            clip = {"id": f"{corpus}-{total:06d}", "speaker": speaker, "text": text, "start": frames}
            clips.append({**clip, "frames": len(features)})
            parts.append(features)
            frames += len(features)
            all_frames += len(features)
            total += 1
        close()
        for stale in [*out_dir.glob(f"{corpus}-*.json"), *out_dir.glob(f"{corpus}-*.npy")]:  # indexes first
            stale.unlink()
        for stem, index_bytes in indexes.items():
            Path(waiting, f"{stem}.npy").replace(out_dir / f"{stem}.npy")
            write_atomically(out_dir / f"{stem}.json", index_bytes)
    return total, all_frames / FRAMES_PER_SECOND / 3600


def add_corpus(data: Path, corpus: str, made: Iterable[tuple[str, str, np.ndarray]]) -> tuple[int, float]:
    """`write_corpus` to the training shards of what `prepare` wrote, and its line in data.json."""
    total, hours = write_corpus(data / "train", corpus, made)
    about = data / "data.json"
    description = json.loads(about.read_text(encoding="utf-8"))
    description["train"][corpus] = {"clips": total, "hours": round(hours, 3), "skipped": {}}
    write_atomically(about, json.dumps(description, indent=1).encode())
    return total, hours
