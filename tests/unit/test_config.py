"""Configurations are strict: what is unknown or contradictory is refused, with what to write instead."""

from __future__ import annotations

import pytest

from asr_exit.config import FeatureConfig, ModelConfig
from asr_exit.errors import ConfigError


def test_round_trip_and_derived_values() -> None:
    config = ModelConfig.from_dict(ModelConfig(d_model=96).to_dict())
    assert config == ModelConfig(d_model=96)
    assert config.exit_layers == (2, 4, 6, 8, 10, 12)
    assert (config.frame_ms, config.samples_per_frame) == (80.0, 1280)
    assert [config.chunk_frames(ms) for ms in (160, 320, 640, 1280)] == [2, 4, 8, 16]


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'conv_kernel'"):
        ModelConfig.from_dict({"conv_kernal": 9})
    with pytest.raises(ConfigError, match=r"ModelConfig\.features.*did you mean 'num_mels'"):
        ModelConfig.from_dict({"features": {"n_mels": 80}})


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": 100},
        {"num_layers": 11},
        {"conv_kernel": 8},
        {"subsampling": 6},
        {"vocab_size": 1},
        {"left_context_frames": 60},
    ],
)
def test_contradictions_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        ModelConfig.from_dict(changes)


@pytest.mark.parametrize("chunk_ms", [0, 100, 641, 2560, -640])
def test_other_chunk_lengths_are_refused_with_the_choices(chunk_ms: float) -> None:
    with pytest.raises(ConfigError, match="640"):
        ModelConfig().chunk_frames(chunk_ms)


def test_mel_band_beyond_nyquist_is_refused() -> None:
    with pytest.raises(ConfigError, match="mel band"):
        FeatureConfig(high_hertz=9000)
