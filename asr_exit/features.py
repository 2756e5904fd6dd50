"""Kaldi-style log-mel features in numpy: the streaming and the whole-file path are the same code.

Frame i covers the window of samples that ends at (i + 1) * hop; what lies before the recording is silence. So N samples
give N // hop frames, a chunk needs exactly its own samples, and no frame depends on how samples were split into
pushes. Torch-free on purpose, so that devices without torch compute the same features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from asr_exit.config import FeatureConfig

INT16_SCALE = 32768.0
ENERGY_FLOOR = 1.0  # on the int16 scale: below one bit of noise, so digital silence stays finite
_BLOCK_SAMPLES = 40_960  # of one batch of streams: the working set stays in the cache
MAX_FRAMES_PER_BLOCK = 256  # keeps the working set in the cache, and bounds it for hours-long files


@lru_cache(maxsize=8)
def mel_filterbank(config: FeatureConfig) -> np.ndarray:
    """Triangular filters on the HTK mel scale. Returns (fft_size // 2 + 1, num_mels) float64."""

    def to_mel(hertz: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(hertz, dtype=np.float64) / 700.0)

    edges = np.linspace(to_mel(config.low_hertz), to_mel(config.high_hertz), config.num_mels + 2)
    bins = to_mel(np.arange(config.fft_size // 2 + 1) * config.sample_rate_hertz / config.fft_size)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return np.maximum(0.0, np.minimum(rising, falling))


@lru_cache(maxsize=8)
def povey_window(length_samples: int) -> np.ndarray:
    """Kaldi's default window: a Hann window to the power 0.85. Returns (length_samples,) float64."""
    return np.asarray(np.hanning(length_samples) ** 0.85, dtype=np.float64)


@lru_cache(maxsize=8)
def scaled_window(config: FeatureConfig) -> np.ndarray:
    """`povey_window` on the int16 scale. Returns (window,) float64."""
    return povey_window(config.window_samples) * INT16_SCALE


def windows_to_log_mel(samples: np.ndarray, config: FeatureConfig) -> np.ndarray:
    """(B, N) float32 samples -> (B, T, num_mels) float32 for every window that fits into N.

    Float64 up to the logarithm, so that neither block size nor batch shows in the result. Pre-emphasis is done once per
    sample, not once per window: windows overlap.
    """
    keep = 1.0 - config.preemphasis
    x = samples.astype(np.float64)
    emphasised = np.zeros_like(x)  # the first one is only ever the first sample of a window, which is set below
    np.multiply(x[:, :-1], -config.preemphasis, out=emphasised[:, 1:])
    emphasised[:, 1:] += x[:, 1:]
    windows = _windows(x, config)
    mean = windows.mean(axis=2)
    frames = _windows(emphasised, config) - keep * mean[:, :, None]
    frames[:, :, 0] = keep * (windows[:, :, 0] - mean)
    frames *= scaled_window(config)
    spectrum = np.fft.rfft(frames.reshape(-1, config.window_samples), config.fft_size, axis=1)
    power = np.square(spectrum.real)
    power += np.square(spectrum.imag)
    mel = np.maximum(power @ mel_filterbank(config), ENERGY_FLOOR).astype(np.float32)
    return np.log(mel, out=mel).reshape(len(samples), -1, config.num_mels)


def _windows(samples: np.ndarray, config: FeatureConfig) -> np.ndarray:
    """(B, N) -> a view (B, T, window)."""
    return np.lib.stride_tricks.sliding_window_view(samples, config.window_samples, axis=1)[:, :: config.hop_samples]


def log_mel(samples: np.ndarray, config: FeatureConfig | None = None) -> np.ndarray:
    """Log-mel features of a whole recording.

    Args:
        samples: (N,) float32 in [-1, 1] at `config.sample_rate_hertz`.
    Returns:
        (T, num_mels) float32 with T = N // hop.
    """
    config = config or FeatureConfig()
    return _log_mel(np.concatenate((_silence(config), samples)), config)


def _silence(config: FeatureConfig) -> np.ndarray:
    """What the first window sees before the recording."""
    return np.zeros(config.window_samples - config.hop_samples, np.float32)


def _log_mel(samples: np.ndarray, config: FeatureConfig) -> np.ndarray:
    """(N,) samples -> (T, num_mels) for every window that fits."""
    count = num_frames(len(samples), config)
    if count == 0:
        return np.zeros((0, config.num_mels), np.float32)
    overlap = config.window_samples - config.hop_samples
    blocks = []
    for first in range(0, count, MAX_FRAMES_PER_BLOCK):
        frames = min(MAX_FRAMES_PER_BLOCK, count - first)
        begin = first * config.hop_samples
        end = begin + frames * config.hop_samples + overlap
        blocks.append(windows_to_log_mel(samples[None, begin:end], config)[0])
    return np.concatenate(blocks)


def num_frames(num_samples: int, config: FeatureConfig) -> int:
    """Windows that fit into so many samples."""
    return max(0, 1 + (num_samples - config.window_samples) // config.hop_samples)


def log_mels(samples: Sequence[np.ndarray], compute: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """Features of many streams at once, from what `StreamingLogMel.take` gave of each.

    Args:
        compute: from (B, N) samples to (B, T, num_mels); called for a few streams of equal length at a time.
    """
    by_length: dict[int, list[int]] = {}
    for index, part in enumerate(samples):
        by_length.setdefault(len(part), []).append(index)
    features: dict[int, np.ndarray] = {}
    for length, members in by_length.items():
        rows = max(1, _BLOCK_SAMPLES // length)
        for first in range(0, len(members), rows):
            block = members[first : first + rows]
            features.update(zip(block, compute(np.stack([samples[index] for index in block])), strict=True))
    return [features[index] for index in range(len(samples))]


class StreamingLogMel:
    """Features of a stream, computed lazily in batches; equal to `log_mel` at any split of the samples."""

    def __init__(self, config: FeatureConfig | None = None) -> None:
        self.config = config or FeatureConfig()
        self._pending = [_silence(self.config)]  # samples not yet consumed: one window's overlap and what followed
        self._pending_samples = len(self._pending[0])

    def push(self, samples: np.ndarray) -> None:
        """Append (N,) float32 samples. Cheap for any N; `pull` does the arithmetic."""
        if len(samples):
            self._pending.append(samples)
            self._pending_samples += len(samples)

    @property
    def ready_frames(self) -> int:
        """Feature frames that `pull` can return now."""
        return num_frames(self._pending_samples, self.config)

    def take(self, max_frames: int | None = None) -> np.ndarray:
        """The samples of the next T = min(ready_frames, max_frames) feature frames: (T * hop + overlap,), 0 for T = 0.

        For callers that compute the features of many streams at once, with `windows_to_log_mel`.
        """
        frames = self.ready_frames if max_frames is None else min(self.ready_frames, max_frames)
        if frames == 0:
            return np.zeros(0, np.float32)
        samples = self._pending[0] if len(self._pending) == 1 else np.concatenate(self._pending)
        used = frames * self.config.hop_samples
        self._pending = [samples[used:].copy()]  # a copy, so that the consumed part is freed
        self._pending_samples = len(self._pending[0])
        return samples[: used - self.config.hop_samples + self.config.window_samples]

    def pull(self, max_frames: int | None = None) -> np.ndarray:
        """The next min(ready_frames, max_frames) feature frames, (T, num_mels) float32."""
        return _log_mel(self.take(max_frames), self.config)
