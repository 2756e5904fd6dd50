"""Augmentation of log-mel batches in numpy, for the loader thread. All in place on (B, F, M) float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asr_exit.config import FeatureConfig
from asr_exit.data import Clip, FeatureStore
from asr_exit.errors import ConfigError


@dataclass(frozen=True)
class AugmentConfig:
    """SpecAugment (arXiv 1904.08779) with time masks proportional to the length, warps, a level shift, and noise.

    The frequency warp is vocal tract length perturbation (Jaitly and Hinton, ICML WDLASL 2013) on log-mel bands: it
    makes new speakers. The random filter is FilterAugment's linear one (arXiv 2110.03282): it makes new microphones
    and voices of another timbre. The time warp changes the tempo about once a second and keeps the length.
    Reverberation spreads each band's power over the following frames as a room's impulse response spreads energy;
    phases are ignored.
    """

    freq_warp: float = 0.0  # frequencies are scaled by a factor uniform in 1 +- this
    time_warp: float = 0.0  # tempo, likewise
    freq_masks: int = 2
    freq_mask_bands: int = 20  # widest
    time_masks_per_second: float = 0.5
    time_mask_frames: int = 25  # widest, feature frames
    time_masked_share: float = 0.2  # of an utterance, at most
    gain_nepers: float = 1.5  # log-power shift, uniform in +- this
    filter_db: float = 0.0  # gains of a random filter over the bands, uniform in +- this
    noise_probability: float = 0.0
    noise_snr_db: tuple[float, float] = (5.0, 25.0)
    room_probability: float = 0.0  # of reverberation


class Augment:
    """Callable for `collate`: warps, rooms, level, filter, noise, then masks filled with the mean."""

    def __init__(
        self,
        config: AugmentConfig,
        mean: np.ndarray,
        noise: FeatureStore | None = None,
        features: FeatureConfig | None = None,
        room_envelopes: Sequence[Sequence[float]] = (),
    ) -> None:
        """`mean` (M,) fills masks. `noise` clips of any length are mixed in the power domain.

        `room_envelopes`: per room the energy of its impulse response in each feature frame after the direct sound.

        Raises:
            ConfigError: reverberation is asked for and there is no room.
        """
        if config.room_probability > 0 and not room_envelopes:
            raise ConfigError("room_probability is positive and the data has no rooms; prepare it with --rooms DIR")
        self.config, self.mean, self.noise = config, mean.astype(np.float32), noise
        self.rooms = [np.asarray(envelope, np.float32) for envelope in room_envelopes]
        self.features = features or FeatureConfig(num_mels=len(mean))

    def __call__(self, features: np.ndarray, lengths: np.ndarray, rng: np.random.Generator, views: int = 1) -> None:
        """Change `features` (B, F, M) in place; padding beyond `lengths` (B,) stays of no meaning.

        Of `views` copies of the same utterances all get the same time warp, so that their frames still correspond.
        """
        config = self.config
        if config.time_warp > 0:
            first = len(features) // views
            for row, length in enumerate(lengths[:first].tolist()):
                features[row, :length] = time_warp(features[row, :length], config.time_warp, rng)
            for view in range(1, views):
                features[view * first : (view + 1) * first] = features[:first]
        if config.freq_warp > 0:
            for row, length in enumerate(lengths.tolist()):
                factor = 1.0 + rng.uniform(-1, 1) * config.freq_warp
                features[row, :length] = features[row, :length] @ freq_warp(factor, self.features)
        if config.room_probability > 0:
            for row in np.flatnonzero(rng.random(len(features)) < config.room_probability).tolist():
                room = self.rooms[int(rng.integers(len(self.rooms)))]
                features[row, : lengths[row]] = reverberate(features[row, : lengths[row]], room, rng.uniform(0.1, 1.0))
        if config.gain_nepers > 0:
            shift = rng.uniform(-config.gain_nepers, config.gain_nepers, (len(features), 1, 1))
            features += shift.astype(np.float32)
        if config.filter_db > 0:
            for row in features:
                row += random_filter(features.shape[-1], config.filter_db, rng)
        if self.noise is not None and config.noise_probability > 0:
            for row in np.flatnonzero(rng.random(len(features)) < config.noise_probability).tolist():
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


def freq_warp(factor: float, features: FeatureConfig) -> np.ndarray:
    """(M, M) matrix that moves the content of log-mel bands from frequency f to about `factor` * f.

    Frequencies above the middle of the band are squeezed or stretched so that its upper edge stays.
    """
    low, high = (1127.0 * np.log1p(edge / 700.0) for edge in (features.low_hertz, features.high_hertz))
    step = (high - low) / (features.num_mels + 1)
    centres = 700.0 * np.expm1((low + step * np.arange(1, features.num_mels + 1)) / 1127.0)
    knee = 0.5 * features.high_hertz
    above = features.high_hertz - (features.high_hertz - centres) * (features.high_hertz - knee / factor) / (
        features.high_hertz - knee
    )
    sources = np.where(centres < knee, centres / factor, above)
    bands = (1127.0 * np.log1p(np.maximum(sources, 0.0) / 700.0) - low) / step - 1.0
    bands = np.clip(bands, 0, features.num_mels - 1)
    return np.maximum(0.0, 1.0 - np.abs(np.arange(features.num_mels)[:, None] - bands)).astype(np.float32)


def random_filter(bands: int, gain_db: float, rng: np.random.Generator) -> np.ndarray:
    """(bands,) to add to log-power: 4 to 7 gains uniform in +- `gain_db`, at both ends and at random bands between."""
    knots = int(rng.integers(4, 8))
    at = np.concatenate(([0.0], np.sort(rng.uniform(0, bands - 1, knots - 2)), [bands - 1.0]))
    gains = rng.uniform(-gain_db, gain_db, knots) * (np.log(10.0) / 10.0)
    return np.interp(np.arange(bands), at, gains).astype(np.float32)


def time_warp(speech: np.ndarray, width: float, rng: np.random.Generator) -> np.ndarray:
    """(F, M) read at a tempo that changes every second within 1 +- `width`; length and ends stay."""
    frames = len(speech)
    if frames < 2:
        return speech
    rates = 1.0 + width * rng.uniform(-1, 1, frames // 100 + 2)
    position = np.cumsum(np.interp(np.arange(frames) / 100.0, np.arange(len(rates)), rates))
    position = (position - position[0]) * ((frames - 1) / (position[-1] - position[0]))
    first = np.minimum(position.astype(np.int64), frames - 2)
    share = (position - first).astype(np.float32)[:, None]
    return speech[first] * (1.0 - share) + speech[first + 1] * share


def reverberate(speech: np.ndarray, envelope: np.ndarray, strength: float) -> np.ndarray:
    """(F, M) log-mel as it would sound in a room whose tail is scaled by `strength`; the level stays."""
    taps = envelope * np.where(np.arange(len(envelope)) == 0, 1.0, strength).astype(np.float32)
    taps /= taps.sum()
    peak = speech.max()
    power = np.exp(speech - peak)
    wet = np.zeros_like(power)
    for delay, tap in enumerate(taps[: len(power)]):
        wet[delay:] += tap * power[: len(power) - delay]
    return np.log(np.maximum(wet, 1e-30)) + peak


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
