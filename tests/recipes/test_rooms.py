"""Impulse responses to envelopes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_exit.config import FeatureConfig
from asr_exit.errors import ConfigError
from recipes.librispeech.rooms import room_envelope, room_envelopes


def test_envelope_starts_at_the_direct_sound_and_sums_to_one() -> None:
    response = np.zeros(4000)
    response[1000], response[1000 + 160] = 2.0, 1.0  # energies 4 and 1, one feature frame apart
    envelope = room_envelope(response, FeatureConfig())
    assert envelope[:3] == [pytest.approx(0.8), pytest.approx(0.2), 0.0]
    assert sum(envelope) == pytest.approx(1.0)


def test_folder_of_responses(tmp_path: Path) -> None:
    response = np.exp(-np.arange(8000) / 800.0).astype(np.float32)
    soundfile.write(tmp_path / "hall.wav", response, 16_000)
    (envelope,) = room_envelopes(tmp_path, FeatureConfig())
    assert envelope[0] > envelope[1] > envelope[10]
    with pytest.raises(ConfigError, match="no impulse response"):
        room_envelopes(tmp_path / "none", FeatureConfig())
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    with pytest.raises(ConfigError, match="broken"):
        room_envelopes(tmp_path, FeatureConfig())
    with pytest.raises(ConfigError, match="silent"):
        room_envelope(np.zeros(100), FeatureConfig())
