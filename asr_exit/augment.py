"""Augmentation of log-mel batches in numpy, for the loader thread. All in place on (B, F, M) float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from asr_exit.data import Clip, FeatureStore


@dataclass(frozen=True)
class AugmentConfig:
    """SpecAugment (arXiv 1904.08779) with time masks proportional to the length, a level shift, and noise."""

    freq_masks: int = 2
    freq_mask_bands: int = 20  # widest
    time_masks_per_second: float = 0.5
    time_mask_frames: int = 25  # widest, feature frames
    time_masked_share: float = 0.2  # of an utterance, at most
    gain_nepers: float = 1.5  # log-power shift, uniform in +- this
    noise_probability: float = 0.0
    noise_snr_db: tuple[float, float] = (5.0, 25.0)


class Augment:
    """Callable for `collate`: level, then noise, then masks filled with the mean."""

    def __init__(self, config: AugmentConfig, mean: np.ndarray, noise: FeatureStore | None = None) -> None:
        """`mean` (M,) fills masks. `noise` clips of any length are mixed in the power domain."""
        self.config, self.mean, self.noise = config, mean.astype(np.float32), noise

    def __call__(self, features: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> None:
        """Change `features` (B, F, M) in place; padding beyond `lengths` (B,) stays of no meaning."""
        config = self.config
        if config.gain_nepers > 0:
            shift = rng.uniform(-config.gain_nepers, config.gain_nepers, (len(features), 1, 1))
            features += shift.astype(np.float32)
        if self.noise is not None and config.noise_probability > 0:
            for row in np.flatnonzero(rng.random(len(features)) < config.noise_probability):
                clip = self.noise.clips[int(rng.integers(len(self.noise.clips)))]
                self._mix(features[row, : lengths[row]], self.noise, clip, rng)
        spec_augment(features, lengths, config, self.mean, rng)

    def _mix(self, speech: np.ndarray, noise: FeatureStore, clip: Clip, rng: np.random.Generator) -> None:
        """Add one noise clip, repeated to length, to (F, M) `speech` at a random signal-to-noise ratio."""
        source = noise.features(clip)
        picks = (np.arange(len(speech)) + int(rng.integers(len(source)))) % len(source)
        sound = source[picks].astype(np.float32)
        ratio_nepers = rng.uniform(*self.config.noise_snr_db) * np.log(10.0) / 10.0
        level = _log_mean_power(speech) - ratio_nepers - _log_mean_power(sound)
        np.logaddexp(speech, sound + np.float32(level), out=speech)


def _log_mean_power(log_mel: np.ndarray) -> float:
    peak = float(log_mel.max())
    return peak + float(np.log(np.mean(np.exp(log_mel - peak))))


def spec_augment(
    features: np.ndarray,
    lengths: np.ndarray,
    config: AugmentConfig,
    fill: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Overwrite random bands and stretches of (B, F, M) `features` with `fill` (M,)."""
    batch, _, bands = features.shape
    if config.freq_masks and config.freq_mask_bands:
        width = rng.integers(0, config.freq_mask_bands + 1, (batch, config.freq_masks, 1))
        first = (rng.random((batch, config.freq_masks, 1)) * (bands - width + 1)).astype(np.int64)
        band = np.arange(bands)
        masked = ((band >= first) & (band < first + width)).any(axis=1)
        for row in range(batch):
            features[row][:, masked[row]] = fill[masked[row]]
    if config.time_masks_per_second and config.time_mask_frames:
        for row, length in enumerate(lengths.tolist()):
            budget = int(config.time_masked_share * length)
            for _ in range(max(1, round(config.time_masks_per_second * length / 100))):
                drawn = int(rng.integers(config.time_mask_frames + 1))
                length_masked = min(drawn, budget)
                start = int(rng.integers(int(length) - length_masked + 1))
                features[row, start : start + length_masked] = fill
                budget -= length_masked
