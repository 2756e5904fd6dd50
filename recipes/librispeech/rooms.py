"""Room impulse responses, reduced to what log-mel augmentation needs: how their energy decays from frame to frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

from asr_exit.config import FeatureConfig
from asr_exit.errors import ConfigError
from recipes.librispeech.corpora import AUDIO_SUFFIXES
from recipes.librispeech.shards import read_samples

MAX_SECONDS = 0.6  # later energy is below what a mel band resolves


def room_envelope(response: np.ndarray, features: FeatureConfig) -> list[float]:
    """Energy of an (N,) impulse response per feature frame, from its peak on, summing to 1.

    Raises:
        ConfigError: the response is silent.
    """
    response = response.astype(np.float64)
    tail = response[int(np.abs(response).argmax()) :][: int(MAX_SECONDS * features.sample_rate_hertz)]
    frames = -(-len(tail) // features.hop_samples)
    energy = np.square(np.pad(tail, (0, frames * features.hop_samples - len(tail)))).reshape(frames, -1).sum(axis=1)
    if not energy.sum() > 0:
        raise ConfigError("an impulse response is silent")
    return [round(float(share), 7) for share in energy / energy.sum()]


def room_envelopes(folder: Path, features: FeatureConfig) -> list[list[float]]:
    """`room_envelope` of every recording under `folder`.

    Raises:
        ConfigError: none there, or one cannot be read.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix in AUDIO_SUFFIXES)
    if not paths:
        raise ConfigError(f"no impulse response under {folder}; leave --rooms out")
    envelopes = []
    for path in paths:
        try:
            envelopes.append(room_envelope(read_samples(path, features.sample_rate_hertz), features))
        except (soundfile.SoundFileError, ValueError, OSError) as error:
            raise ConfigError(f"{path} is no usable impulse response: {error}") from error
    return envelopes
