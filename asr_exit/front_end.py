"""Log-mel features in float32, for encoders that compute in less than float32 themselves."""

from __future__ import annotations

import numpy as np
import torch

from asr_exit.config import FeatureConfig
from asr_exit.features import ENERGY_FLOOR, mel_filterbank, scaled_window


class Float32LogMel:
    """`asr_exit.features.windows_to_log_mel`, three times as fast and exact to about 1e-3."""

    def __init__(self, config: FeatureConfig) -> None:
        self._config = config
        self._window = torch.from_numpy(scaled_window(config)).float()
        self._filters = torch.from_numpy(mel_filterbank(config).repeat(2, axis=0)).float()  # of both parts of a bin

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """(B, N) float32 -> (B, T, num_mels) float32."""
        config, signal = self._config, torch.from_numpy(samples)
        keep = 1.0 - config.preemphasis
        emphasised = torch.add(signal[:, 1:], signal[:, :-1], alpha=-config.preemphasis)
        emphasised = torch.nn.functional.pad(emphasised, (1, 0))
        windows = signal.unfold(1, config.window_samples, config.hop_samples)
        mean = windows.mean(dim=-1)
        padded = torch.empty(*mean.shape, config.fft_size)
        padded[..., config.window_samples :] = 0.0
        frames = padded[..., : config.window_samples]
        torch.sub(emphasised.unfold(1, config.window_samples, config.hop_samples), keep * mean[..., None], out=frames)
        frames[..., 0] = keep * (windows[..., 0] - mean)
        frames.mul_(self._window)
        squares = torch.view_as_real(torch.fft.rfft(padded)).flatten(-2).square_()
        return (squares @ self._filters).clamp_min_(ENERGY_FLOOR).log_().numpy()


class FusedLogMel:
    """`Float32LogMel` with kernels around the Fourier transform: half of its time."""

    def __init__(self, config: FeatureConfig) -> None:
        # not on import: numba is an extra, and takes half a second
        from asr_exit import front_kernels

        self._kernels, self._config = front_kernels, config
        self._window = scaled_window(config).astype(np.float32)
        self._filters = torch.from_numpy(mel_filterbank(config)).float()

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """(B, N) float32 -> (B, T, num_mels) float32."""
        config = self._config
        frames = 1 + (samples.shape[1] - config.window_samples) // config.hop_samples
        padded = torch.empty(len(samples), frames, config.fft_size)
        self._kernels.windows(samples, self._window, config.hop_samples, np.float32(config.preemphasis), padded.numpy())
        spectrum = torch.view_as_real(torch.fft.rfft(padded)).view(len(samples) * frames, -1)
        power = spectrum.new_empty(len(spectrum), len(self._filters))
        self._kernels.power(spectrum.numpy(), power.numpy())
        energies = (power @ self._filters).clamp_min_(ENERGY_FLOOR).log_()
        return energies.view(len(samples), frames, -1).numpy()
