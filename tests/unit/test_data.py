"""Shards, batches, and a loader that can stop and go on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from asr_exit.data import BatchPlan, BatchStream, FeatureStore, Position, collate, plan_epoch
from asr_exit.errors import ConfigError
from asr_exit.tokenizer import Tokenizer

FILL = np.zeros(8, np.float32)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    rng = np.random.default_rng(0)
    tokenizer = Tokenizer.train(["abc abd bcd cde"] * 3, vocab_size=34)
    for speed in (0.9, 1.0):
        clips, start = [], 0
        for number in range(30):
            frames = int((100 + 10 * number) / speed)
            clips.append({"id": f"u{number}", "speaker": "s", "text": "abc abd", "start": start, "frames": frames})
            start += frames
        name = f"c-{speed}"
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(start, 8)).astype(np.float16))
        index = {"format": 1, "corpus": "c", "speed": speed, "frames": start, "num_mels": 8, "clips": clips}
        (tmp_path / f"{name}.json").write_text(json.dumps(index))
    return FeatureStore(tmp_path, tokenizer)


def test_every_utterance_once_and_batches_within_the_limit(store: FeatureStore) -> None:
    plan = BatchPlan(batch_seconds=12.0)
    batches = plan_epoch(store.clips, plan, 4, seed=1, epoch=0)
    ids = [clip.utterance_id for batch in batches for clip in batch]
    assert sorted(ids) == sorted({clip.utterance_id for clip in store.clips})
    for batch in batches:
        assert len(batch) * max(clip.frames for clip in batch) <= 1200
        assert max(clip.frames for clip in batch) <= 1.5 * min(clip.frames for clip in batch)


def test_epochs_differ_and_are_reproducible(store: FeatureStore) -> None:
    plan = BatchPlan(batch_seconds=12.0)
    first, again, second = (plan_epoch(store.clips, plan, 4, 1, epoch) for epoch in (0, 0, 1))
    assert first == again
    assert first != second


def test_limits_shares_and_impossible_alignments(store: FeatureStore) -> None:
    short = plan_epoch(store.clips, BatchPlan(max_seconds=2.0), 4, 1, 0)
    assert all(clip.frames <= 200 for batch in short for clip in batch)
    half = plan_epoch(store.clips, BatchPlan(corpus_shares=(("c", 0.5),)), 4, 1, 0)
    assert 5 <= sum(map(len, half)) <= 25
    with pytest.raises(ConfigError, match="widen"):
        plan_epoch(store.clips, BatchPlan(min_seconds=50.0, max_seconds=60.0), 4, 1, 0)
    with pytest.raises(ConfigError, match="widen"):
        plan_epoch(store.clips, BatchPlan(), 400, 1, 0)  # too few frames for the tokens


def test_collate_pads_with_the_fill(store: FeatureStore) -> None:
    clips = [store.clips[0], store.clips[3]]
    batch = collate(store, clips, FILL + 7.0)
    assert batch.features.shape[1] % 64 == 0
    assert batch.feature_lengths.tolist() == [clip.frames for clip in clips]
    np.testing.assert_array_equal(batch.features[0, : clips[0].frames].numpy(), store.features(clips[0]))
    assert (batch.features[0, clips[0].frames :] == 7.0).all()
    assert batch.target_lengths.tolist() == [len(clip.tokens) for clip in clips]
    assert batch.seconds == pytest.approx(sum(clip.frames for clip in clips) / 100)


def take(store: FeatureStore, count: int, start: Position, **options: int) -> list[tuple[object, Position]]:
    stream = BatchStream(
        store, BatchPlan(batch_seconds=12.0), FILL, features_per_label=4, seed=3, start=start, **options
    )
    taken = []
    with stream as batches:
        for batch, position in batches:
            taken.append((tuple(batch.feature_lengths.tolist()), position))
            if len(taken) == count:
                break
    return taken


def test_resume_goes_on_where_it_stopped(store: FeatureStore) -> None:
    whole = take(store, 20, Position())
    assert whole[19][1].epoch > 0
    assert take(store, 13, whole[6][1]) == whole[7:]


def test_ranks_share_the_batches(store: FeatureStore) -> None:
    both = [take(store, 4, Position(), rank=rank, world=2) for rank in (0, 1)]
    alone = take(store, 8, Position())
    assert [item[0] for pair in zip(*both, strict=True) for item in pair] == [item[0] for item in alone]


def test_unfinished_or_damaged_shards(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((5, 8), np.float16))
    with pytest.raises(ConfigError, match="prepare"):  # no index: not finished
        FeatureStore(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"frames": 6, "num_mels": 8, "corpus": "c", "speed": 1, "clips": []}))
    with pytest.raises(ConfigError, match="does not match"):
        FeatureStore(tmp_path)


def test_loader_errors_reach_the_reader(store: FeatureStore) -> None:
    stream = BatchStream(
        store, BatchPlan(min_seconds=90.0, max_seconds=99.0), FILL, features_per_label=4, seed=0, start=Position()
    )
    with stream as batches, pytest.raises(ConfigError):
        next(iter(batches))


def test_speeds_can_be_left_out(store: FeatureStore) -> None:
    drawn = plan_epoch(store.clips, BatchPlan(speeds=(1.0,)), 4, 1, 0)
    assert {clip.speed for batch in drawn for clip in batch} == {1.0}
    with pytest.raises(ConfigError, match="widen"):
        plan_epoch(store.clips, BatchPlan(speeds=(3.0,)), 4, 1, 0)
