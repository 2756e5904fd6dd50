"""Log-mel features in float32, for encoders that compute in less than float32 themselves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from asr_exit.config import FeatureConfig
from asr_exit.features import ENERGY_FLOOR, mel_filterbank, scaled_window

_TOGETHER = 16  # filters


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
        self._bands = list(_bands(torch.from_numpy(mel_filterbank(config)).float()))

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """(B, N) float32 -> (B, T, num_mels) float32."""
        config = self._config
        frames = 1 + (samples.shape[1] - config.window_samples) // config.hop_samples
        padded = torch.empty(len(samples), frames, config.fft_size)
        self._kernels.windows(samples, self._window, config.hop_samples, np.float32(config.preemphasis), padded.numpy())
        spectrum = torch.view_as_real(torch.fft.rfft(padded)).view(len(samples) * frames, -1)
        power = spectrum.new_empty(len(spectrum), spectrum.shape[1] // 2)
        self._kernels.power(spectrum.numpy(), power.numpy())
        energies = power.new_empty(len(power), config.num_mels)
        for first, low, high, filters in self._bands:
            torch.mm(power[:, low:high], filters, out=energies[:, first : first + _TOGETHER])
        return energies.clamp_min_(ENERGY_FLOOR).log_().view(len(samples), frames, -1).numpy()


def _bands(filters: torch.Tensor) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """(K, num_mels) filters, a few at a time: the first one's number, the range of bins that they see, their part.

    A filter sees one bin in forty. The products of all parts take half of the time of one over all bins.
    """
    for first in range(0, filters.shape[1], _TOGETHER):
        part = filters[:, first : first + _TOGETHER]
        seen = part.any(dim=1).nonzero()
        low, high = int(seen.min()), int(seen.max()) + 1
        yield first, low, high, part[low:high].contiguous()
