"""From the samples of many streams to the door of the first segment: log-mel features and subsampling, in batches.

Two ways to the features: `asr_exit.features` (numpy, float64 inside: what every other device computes) for fp32
engines, and float32 on the engine's device for bf16 ones, where three times the speed costs errors far below those of
the weights. Shapes: B streams, N samples, F feature frames, T encoder frames.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from asr_exit.config import FeatureConfig
from asr_exit.encoder import Encoder
from asr_exit.features import ENERGY_FLOOR, MAX_FRAMES_PER_BLOCK, mel_filterbank, scaled_window, windows_to_log_mel
from asr_exit.stream import Stream


class FrontEnd:
    """Features and subsampling input of the streams of one engine."""

    def __init__(self, encoder: Encoder, dtype: torch.dtype, device: torch.device) -> None:
        self._encoder, self._dtype, self._device = encoder, dtype, device
        self._config = encoder.config
        self._log_mel = _Float32LogMel(self._config.features, device) if dtype != torch.float32 else None

    def take(self, streams: Sequence[Stream]) -> dict[int, tuple[list[Stream], Tensor]]:
        """The next chunk of each stream that has audio.

        Returns:
            By number of encoder frames T: the streams, and their normalised features (B, T * subsampling, num_mels) in
            the encoder's type, zero where a stream's last chunk is shorter.
        """
        factor = self._config.subsampling
        hop = self._config.features.hop_samples
        groups: dict[int, list[tuple[Stream, np.ndarray]]] = defaultdict(list)
        for stream in streams:
            samples = stream.features.take(stream.chunk_frames * factor)
            if len(samples):
                groups[-(-_num_frames(samples, self._config.features) // factor)].append((stream, samples))
        batches = {}
        for frames, members in groups.items():
            wanted = frames * factor * hop + self._config.features.window_samples - hop
            padded = np.zeros((len(members), wanted), np.float32)
            for row, (_, samples) in enumerate(members):
                padded[row, : len(samples)] = samples
            batch = self.features(padded)
            for row, (_, samples) in enumerate(members):
                if len(samples) < wanted:
                    batch[row, _num_frames(samples, self._config.features) :] = 0.0
            batches[frames] = ([stream for stream, _ in members], batch.to(self._dtype))
        return batches

    def features(self, samples: np.ndarray) -> Tensor:
        """(B, N) -> normalised (B, F, num_mels) float32 on the device."""
        frames = _num_frames(samples[0], self._config.features)
        rows = max(1, MAX_FRAMES_PER_BLOCK // frames)
        blocks = [samples[first : first + rows] for first in range(0, len(samples), rows)]
        if self._log_mel is None:
            features = [torch.from_numpy(windows_to_log_mel(block, self._config.features)) for block in blocks]
        else:
            features = [self._log_mel(torch.from_numpy(block).to(self._device)) for block in blocks]
        return self._encoder.normalise(torch.cat(features).to(self._device))


def _num_frames(samples: np.ndarray, config: FeatureConfig) -> int:
    return 1 + (len(samples) - config.window_samples) // config.hop_samples


class _Float32LogMel:
    """`windows_to_log_mel` in float32 torch: (B, N) -> (B, F, num_mels)."""

    def __init__(self, config: FeatureConfig, device: torch.device) -> None:
        self._config = config
        self._window = torch.from_numpy(scaled_window(config)).float().to(device)
        self._filters = torch.from_numpy(mel_filterbank(config)).float().to(device)

    def __call__(self, samples: Tensor) -> Tensor:
        config = self._config
        keep = 1.0 - config.preemphasis
        emphasised = torch.nn.functional.pad(samples[:, 1:] - config.preemphasis * samples[:, :-1], (1, 0))
        windows = samples.unfold(1, config.window_samples, config.hop_samples)
        mean = windows.mean(dim=-1)
        frames = emphasised.unfold(1, config.window_samples, config.hop_samples) - keep * mean[..., None]
        frames[..., 0] = keep * (windows[..., 0] - mean)
        spectrum = torch.fft.rfft(frames.mul_(self._window), config.fft_size)
        power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
        return (power @ self._filters).clamp_min_(ENERGY_FLOOR).log_()
