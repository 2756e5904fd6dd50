"""SpecAugment, level and noise on feature batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from asr_exit.augment import (
    Augment,
    AugmentConfig,
    freq_warp,
    random_filter,
    reverberate,
    spec_augment,
    time_warp,
)
from asr_exit.config import FeatureConfig
from asr_exit.data import FeatureStore
from asr_exit.errors import ConfigError

MEAN = np.full(80, -7.0, np.float32)


def batch(frames: int = 400, rows: int = 4) -> tuple[np.ndarray, np.ndarray]:
    features = np.random.default_rng(0).normal(10.0, 1.0, (rows, frames, 80)).astype(np.float32)
    return features, np.full(rows, frames)


def test_masks_are_filled_with_the_mean_and_bounded() -> None:
    features, lengths = batch()
    config = AugmentConfig(gain_nepers=0.0)
    spec_augment(features, lengths, config, MEAN, np.random.default_rng(1))
    masked = features == -7.0
    full_frames = masked.all(axis=2).sum(axis=1)
    full_bands = masked.all(axis=1).sum(axis=1)
    assert masked.any()
    assert (full_frames <= config.time_masked_share * 400).all()
    assert (full_bands <= config.freq_masks * config.freq_mask_bands).all()


def test_longer_utterances_get_more_time_masks() -> None:
    config = AugmentConfig(freq_masks=0, time_mask_frames=10)
    share = {}
    for frames in (100, 1600):
        total = 0
        for seed in range(20):
            features, lengths = batch(frames, 2)
            spec_augment(features, lengths, config, MEAN, np.random.default_rng(seed))
            total += int((features == -7.0).all(axis=2).sum())
        share[frames] = total
    assert share[1600] > 5 * share[100]


def test_same_rng_same_result() -> None:
    results = []
    for _ in range(2):
        features, lengths = batch()
        Augment(AugmentConfig(), MEAN)(features, lengths, np.random.default_rng(3))
        results.append(features)
    np.testing.assert_array_equal(*results)


def test_gain_shifts_an_utterance_as_a_whole() -> None:
    features, lengths = batch()
    before = features.copy()
    config = AugmentConfig(freq_masks=0, time_masks_per_second=0.0, gain_nepers=1.5)
    Augment(config, MEAN)(features, lengths, np.random.default_rng(0))
    shift = features - before
    assert shift.std(axis=(1, 2)).max() < 1e-5
    assert 0.01 < np.abs(shift).max() <= 1.5


def test_every_utterance_gets_a_smooth_filter_of_its_own() -> None:
    config = AugmentConfig(freq_masks=0, time_masks_per_second=0.0, gain_nepers=0.0, filter_db=6.0)
    features, lengths = batch(rows=3)
    before = features.copy()
    Augment(config, MEAN)(features, lengths, np.random.default_rng(5))
    added = features - before
    assert np.ptp(added, axis=1).max() < 1e-5  # the same in every frame
    filters = added.mean(axis=1)
    assert np.abs(filters[0] - filters[1]).max() > 0.1
    assert np.abs(filters[0] - filters[2]).max() > 0.1


def test_random_filters_stay_in_range_and_turn_at_a_few_bands_only() -> None:
    rng = np.random.default_rng(0)
    drawn = np.stack([random_filter(80, 6.0, rng) for _ in range(300)])
    most = 0.6 * np.log(10.0)
    assert 0.9 * most < np.abs(drawn).max() <= most
    turns = np.abs(np.diff(drawn.astype(np.float64), n=2, axis=1)) > 1e-5
    assert turns.sum(axis=1).max() <= 2 * 5  # a knot between two bands bends at both
    assert (np.abs(drawn[:, 0]) > 1.0).any()  # the lowest band is filtered, too


def test_noise_raises_power_by_the_ratio_asked(tmp_path: Path) -> None:
    noise = np.full((50, 80), 3.0, np.float16)
    np.save(tmp_path / "n.npy", noise)
    clip = {"id": "n", "speaker": "n", "text": "", "start": 0, "frames": 50}
    index = {"format": 1, "corpus": "noise", "speed": 1.0, "frames": 50, "num_mels": 80, "clips": [clip]}
    (tmp_path / "n.json").write_text(json.dumps(index))
    config = AugmentConfig(
        freq_masks=0, time_masks_per_second=0.0, gain_nepers=0.0, noise_probability=1.0, noise_snr_db=(10.0, 10.0)
    )
    features = np.full((1, 120, 80), 5.0, np.float32)
    Augment(config, MEAN, FeatureStore(tmp_path))(features, np.array([100]), np.random.default_rng(0))
    assert features[0, :100].mean() == pytest.approx(5.0 + np.log(1.1), abs=1e-3)  # 10 dB: a tenth more power
    assert (features[0, 100:] == 5.0).all()


def test_frequency_warp_moves_a_band_and_keeps_a_flat_spectrum() -> None:
    features = FeatureConfig()
    np.testing.assert_allclose(np.ones((3, 80), np.float32) @ freq_warp(1.1, features), 1.0, atol=1e-6)
    np.testing.assert_array_equal(freq_warp(1.0, features).round(6), np.eye(80, dtype=np.float32))
    tone = np.zeros((1, 80), np.float32)
    tone[0, 30] = 1.0
    moved = [float((tone @ freq_warp(factor, features) @ np.arange(80))[0]) for factor in (0.9, 1.0, 1.1)]
    assert moved[0] < moved[1] < moved[2]


def test_time_warp_keeps_length_ends_and_order() -> None:
    ramp = np.linspace(0, 1, 730, dtype=np.float32)[:, None].repeat(2, axis=1)
    warped = time_warp(ramp, 0.2, np.random.default_rng(4))
    assert warped.shape == ramp.shape
    assert warped[0, 0] == 0.0
    assert warped[-1, 0] == pytest.approx(1.0, abs=1e-5)
    steps = np.diff(warped[:, 0]) * 729
    assert (steps > 0.5).all()
    assert (steps < 2.0).all()
    assert steps.std() > 0.01


def test_warps_leave_padding_alone() -> None:
    features, _ = batch()
    before = features.copy()
    config = AugmentConfig(freq_warp=0.1, time_warp=0.1, freq_masks=0, time_masks_per_second=0.0, gain_nepers=0.0)
    Augment(config, MEAN)(features, np.full(4, 250), np.random.default_rng(0))
    np.testing.assert_array_equal(features[:, 250:], before[:, 250:])
    assert np.abs(features[:, :250] - before[:, :250]).max() > 0.1


def test_views_share_the_time_warp_and_nothing_else() -> None:
    rng = np.random.default_rng(2)
    half = rng.normal(10.0, 1.0, (2, 300, 80)).astype(np.float32)
    warps = AugmentConfig(time_warp=0.2, freq_masks=0, time_masks_per_second=0.0, gain_nepers=0.0)
    both = np.concatenate([half, half])
    Augment(warps, MEAN)(both, np.full(4, 300), np.random.default_rng(1), 2)
    np.testing.assert_array_equal(both[:2], both[2:])
    assert np.abs(both[:2] - half).max() > 0.1
    masked = np.concatenate([half, half])
    Augment(AugmentConfig(time_warp=0.2), MEAN)(masked, np.full(4, 300), np.random.default_rng(1), 2)
    assert np.abs(masked[:2] - masked[2:]).max() > 0.1


def test_reverberation_spreads_power_forward_and_keeps_it() -> None:
    click = np.full((40, 80), -10.0, np.float32)
    click[10] = 8.0
    wet = reverberate(click, np.array([0.6, 0.3, 0.1], np.float32), 1.0)
    np.testing.assert_allclose(np.exp(wet[10:13, 0]) / np.exp(8.0), [0.6, 0.3, 0.1], rtol=1e-4)
    assert wet[9].max() < -9.9
    assert np.exp(wet).sum() == pytest.approx(np.exp(click).sum(), rel=1e-4)


def test_rooms_are_used_with_their_probability() -> None:
    features, lengths = batch(frames=200, rows=64)
    before = features.copy()
    config = AugmentConfig(room_probability=0.5, freq_masks=0, time_masks_per_second=0.0, gain_nepers=0.0)
    with pytest.raises(ConfigError, match="--rooms"):
        Augment(config, MEAN)
    Augment(config, MEAN, room_envelopes=[[0.5, 0.3, 0.2]])(features, lengths, np.random.default_rng(0))
    changed = np.abs(features - before).max(axis=(1, 2)) > 1e-3
    assert 20 <= changed.sum() <= 44
