"""Streaming features equal whole-file features; both equal the definition."""

from __future__ import annotations

import numpy as np
import pytest

from asr_exit.config import FeatureConfig
from asr_exit.features import StreamingLogMel, log_mel
from tests.conftest import babble


def definition(samples: np.ndarray, config: FeatureConfig, frame: int) -> np.ndarray:
    """One frame written out longhand from Kaldi's description."""
    end = (frame + 1) * config.hop_samples
    x = np.concatenate([np.zeros(400), samples])[end : end + 400].astype(np.float64) * 32768  # ends at sample `end`
    x = x - x.mean()
    y = np.empty_like(x)
    for n in range(len(x)):
        y[n] = x[n] - 0.97 * x[max(n - 1, 0)]
    y *= (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    power = np.abs(np.fft.fft(y, 512)[:257]) ** 2
    mel = 1127 * np.log(1 + np.arange(257) * 16000 / 512 / 700)
    low, high = 1127 * np.log(1 + 20 / 700), 1127 * np.log(1 + 7600 / 700)
    step = (high - low) / 81
    out = np.empty(80)
    for band in range(80):
        centre = low + (band + 1) * step
        weights = np.clip(1 - np.abs(mel - centre) / step, 0, None)
        out[band] = np.log(max(1.0, float(weights @ power)))
    return out


def test_log_mel_matches_its_definition() -> None:
    samples, config = babble(0.5), FeatureConfig()
    features = log_mel(samples)
    assert features.shape == (8000 // 160, 80)
    for frame in (0, 1, 17, 49):
        assert np.abs(features[frame] - definition(samples, config, frame)).max() < 1e-4


@pytest.mark.parametrize("splits", ["one sample", "random", "whole"])
def test_streaming_equals_whole_file_at_any_split(splits: str) -> None:
    samples = babble(0.4 if splits == "one sample" else 3.0, seed=3)
    rng = np.random.default_rng(1)
    sizes = {"one sample": [1] * len(samples), "whole": [len(samples)]}.get(splits) or list(rng.integers(0, 2000, 100))
    streaming, parts, start = StreamingLogMel(), [], 0
    for size in sizes:
        streaming.push(samples[start : start + size])
        start += size
        parts.append(streaming.pull(max_frames=int(rng.integers(0, 9))))
    streaming.push(samples[start:])
    parts.append(streaming.pull())
    assert np.abs(np.concatenate(parts) - log_mel(samples)).max() < 1e-6


def test_pushed_samples_may_be_reused_by_the_caller_after_a_pull() -> None:
    samples = babble(1.0)
    streaming, buffer, parts = StreamingLogMel(), np.empty(1000, np.float32), []
    for start in range(0, 16_000, 1000):
        buffer[:] = samples[start : start + 1000]
        streaming.push(buffer.copy())
        parts.append(streaming.pull())
    assert np.abs(np.concatenate(parts) - log_mel(samples)).max() < 1e-6


@pytest.mark.parametrize("num_samples", [0, 1, 159])
def test_too_short_for_a_frame_gives_none(num_samples: int) -> None:
    assert log_mel(np.zeros(num_samples, np.float32)).shape == (0, 80)


def test_digital_silence_is_finite() -> None:
    assert np.isfinite(log_mel(np.zeros(1600, np.float32))).all()
