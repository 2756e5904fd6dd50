"""Feature shards in, padded training batches out.

Shapes: B batch, F feature frames, M mel bands. A shard is a float16 .npy of stacked frames and a .json index that is
written last; only shards with an index exist for a reader. Batches are a pure function of (seed, stage, epoch), so a
resumed run sees what an uninterrupted one would have.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asr_exit.errors import ConfigError
from asr_exit.tokenizer import Tokenizer

FRAMES_PER_SECOND = 100
PAD_MULTIPLE = 64  # feature frames; few distinct lengths keep allocators and compilers calm


@dataclass(frozen=True, slots=True)
class Clip:
    """One stored copy (one speed) of an utterance."""

    utterance_id: str
    corpus: str
    speaker: str
    speed: float
    shard: int
    start: int
    frames: int
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Padded features (B, F, M) float32, their lengths (B,), and CTC targets joined end to end."""

    features: Tensor
    feature_lengths: Tensor
    targets: Tensor
    target_lengths: Tensor
    seconds: float  # of audio, padding not counted
    texts: tuple[str, ...]
    ids: tuple[str, ...]
    views: int = 1  # 2: the second half of the rows are other views of the first half, with the same targets


@dataclass(frozen=True)
class BatchPlan:
    """How an epoch is cut into batches.

    batch_seconds counts padding and views. corpus_shares: (corpus, fraction of its utterances drawn in each epoch);
    others 1.
    """

    batch_seconds: float = 100.0
    max_seconds: float = 17.0
    min_seconds: float = 0.5
    corpus_shares: tuple[tuple[str, float], ...] = ()
    views: int = 1
    speeds: tuple[float, ...] = ()  # stored copies to draw from; empty: all


class FeatureStore:
    """All shards of one folder, memory-mapped."""

    def __init__(self, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        """Clips carry token ids when `tokenizer` is given.

        Raises:
            ConfigError: no finished shard, or a shard that does not match its index.
        """
        indexes = sorted(folder.glob("*.json"))
        if not indexes:
            raise ConfigError(f"no feature shards in {folder}; run the recipe's prepare step first")
        self.shards: list[np.ndarray] = []
        self.clips: list[Clip] = []
        tokens_of: dict[str, tuple[int, ...]] = {}
        for number, path in enumerate(indexes):
            index = json.loads(path.read_text(encoding="utf-8"))
            frames = np.load(path.with_suffix(".npy"), mmap_mode="r")
            if frames.shape != (index["frames"], index["num_mels"]):
                raise ConfigError(f"{path.with_suffix('.npy')} does not match its index; run prepare again")
            self.shards.append(frames)
            for item in index["clips"]:
                text = item["text"]
                if tokenizer is not None and text not in tokens_of:
                    tokens_of[text] = tuple(tokenizer.encode(text))
                self.clips.append(
                    Clip(
                        item["id"],
                        index["corpus"],
                        item["speaker"],
                        index["speed"],
                        number,
                        item["start"],
                        item["frames"],
                        text,
                        tokens_of.get(text, ()),
                    )
                )

    def features(self, clip: Clip) -> np.ndarray:
        """(F, M) float16 view."""
        return self.shards[clip.shard][clip.start : clip.start + clip.frames]


def plan_epoch(
    clips: Sequence[Clip], plan: BatchPlan, features_per_label: int, seed: int, epoch: int
) -> list[list[Clip]]:
    """Batches of one pass: every utterance once, at a random speed, among neighbours of nearly its length.

    Utterances outside the plan's lengths, or with more tokens than CTC can place, are left out.

    Raises:
        ConfigError: nothing is left.
    """
    rng = np.random.default_rng((seed, epoch))
    by_utterance: dict[tuple[str, str], list[Clip]] = {}
    for clip in clips:
        by_utterance.setdefault((clip.corpus, clip.utterance_id), []).append(clip)
    shares = dict(plan.corpus_shares)
    low, high = plan.min_seconds * FRAMES_PER_SECOND, plan.max_seconds * FRAMES_PER_SECOND
    drawn: list[Clip] = []
    for copies in by_utterance.values():
        if plan.speeds:
            copies = [clip for clip in copies if clip.speed in plan.speeds]
            if not copies:
                continue
        clip = copies[int(rng.integers(len(copies)))]
        keep = rng.random() < shares.get(clip.corpus, 1.0)
        if keep and low <= clip.frames <= high and _placeable(clip, features_per_label):
            drawn.append(clip)
    if not drawn:
        raise ConfigError(f"no clip lasts {plan.min_seconds:g}-{plan.max_seconds:g} s; widen the limits of the stage")
    jitter = rng.uniform(0.95, 1.05, len(drawn))
    order = np.argsort(np.array([clip.frames for clip in drawn]) * jitter, kind="stable")
    batches: list[list[Clip]] = []
    batch: list[Clip] = []
    longest = 0
    for index in order:
        longest_then = max(longest, drawn[index].frames)
        if batch and longest_then * (len(batch) + 1) * plan.views > plan.batch_seconds * FRAMES_PER_SECOND:
            batches.append(batch)
            batch, longest_then = [], drawn[index].frames
        batch.append(drawn[index])
        longest = longest_then
    batches.append(batch)
    return [batches[index] for index in rng.permutation(len(batches))]


def _placeable(clip: Clip, features_per_label: int) -> bool:
    """Whether CTC has a frame for every token, and one more between equal neighbours."""
    repeats = sum(a == b for a, b in zip(clip.tokens, clip.tokens[1:], strict=False))
    return 0 < len(clip.tokens) + repeats <= -(-clip.frames // features_per_label)


# (B, F, M) in place, (B,) lengths, rng, views: the later rows are copies of the first B / views and must stay aligned
Augmenter = Callable[[np.ndarray, np.ndarray, np.random.Generator, int], None]


def collate(
    store: FeatureStore,
    clips: Sequence[Clip],
    fill: np.ndarray,
    augment: Augmenter | None = None,
    rng: np.random.Generator | None = None,
    views: int = 1,
) -> Batch:
    """Pad `clips` with `fill` (M,), repeat them `views` times, and augment them."""
    clips = list(clips) * views
    lengths = np.array([clip.frames for clip in clips], dtype=np.int64)
    frames = -(-int(lengths.max()) // PAD_MULTIPLE) * PAD_MULTIPLE
    features = np.empty((len(clips), frames, len(fill)), np.float32)
    for row, clip in enumerate(clips):
        features[row, : clip.frames] = store.features(clip)
        features[row, clip.frames :] = fill
    if augment is not None:
        augment(features, lengths, rng or np.random.default_rng(), views)
    return Batch(
        torch.from_numpy(features),
        torch.from_numpy(lengths),
        torch.tensor([token for clip in clips for token in clip.tokens], dtype=torch.int64),
        torch.tensor([len(clip.tokens) for clip in clips], dtype=torch.int64),
        float(lengths.sum()) / FRAMES_PER_SECOND,
        tuple(clip.text for clip in clips),
        tuple(clip.utterance_id for clip in clips),
        views,
    )


@dataclass(frozen=True, slots=True)
class Position:
    """Where a sampler stands: the next batch is number `batch` of `epoch`."""

    epoch: int = 0
    batch: int = 0


class BatchStream:
    """Endless batches from a background thread, a few ahead of the reader. Use as a context manager."""

    def __init__(
        self,
        store: FeatureStore,
        plan: BatchPlan,
        fill: np.ndarray,
        *,
        features_per_label: int,
        seed: int,
        start: Position,
        augment: Augmenter | None = None,
        rank: int = 0,
        world: int = 1,
        ahead: int = 4,
    ) -> None:
        """Of every `world` batches in a row this stream yields number `rank`; an incomplete last group is left out."""
        self._rank, self._world = rank, world
        self._store, self._plan, self._fill, self._augment = store, plan, fill, augment
        self._features_per_label, self._seed, self._start = features_per_label, seed, start
        self._queue: queue.Queue[tuple[Batch, Position] | BaseException] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill_queue, name="batches", daemon=True)

    def __enter__(self) -> BatchStream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def __iter__(self) -> Iterator[tuple[Batch, Position]]:
        """Batches, each with the position that follows it (what a checkpoint must hold)."""
        while True:
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def _put(self, item: tuple[Batch, Position] | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _fill_queue(self) -> None:
        try:
            epoch, first = self._start.epoch, self._start.batch
            while True:
                batches = plan_epoch(self._store.clips, self._plan, self._features_per_label, self._seed, epoch)
                if len(batches) < self._world:
                    raise ConfigError(f"{len(batches)} batches are too few for {self._world} processes")
                for group in range(first, len(batches) - self._world + 1, self._world):
                    number = group + self._rank
                    rng = np.random.default_rng((self._seed, epoch, number))
                    batch = collate(self._store, batches[number], self._fill, self._augment, rng, self._plan.views)
                    if not self._put((batch, Position(epoch, group + self._world))):
                        return
                epoch, first = epoch + 1, 0
        except BaseException as error:  # the reader raises it; a dead thread would leave it waiting for ever
            self._put(error)
