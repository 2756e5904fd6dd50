"""bf16 engines: close to fp32 ones, isolated from the model they were made from, features within rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asr_exit.checkpoint import Model
from asr_exit.config import FeatureConfig
from asr_exit.engine import Engine
from asr_exit.errors import ConfigError
from asr_exit.features import windows_to_log_mel
from asr_exit.front_end import FrontEnd
from asr_exit.stream import Fill, StreamOptions
from service.bench.streams import Streamed, stream_all
from tests.conftest import babble, random_model


def scores(engine: Engine, recordings: list[np.ndarray], fill: Fill = Fill.CATCH_UP) -> list[Streamed]:
    """Every recording streamed, in order."""
    done = stream_all(engine, recordings, lambda _: StreamOptions(fill=fill))
    return sorted(done, key=lambda streamed: streamed.index)


def test_a_bf16_engine_hears_what_an_fp32_one_hears(model: Model) -> None:
    recordings = [babble(2.0 + seed / 3, seed) for seed in range(3)]
    exact = scores(Engine(model, slots=3), recordings)
    rounded = scores(Engine(model, slots=3, precision="bf16"), recordings)
    errors = [
        np.abs(ours.max_log_prob - theirs.max_log_prob)
        for one, other in zip(exact, rounded, strict=True)
        for ours, theirs in zip(one.scores, other.scores, strict=True)
    ]
    assert np.median(np.concatenate(errors)) < 0.05
    same = [
        (ours.ids == theirs.ids).mean()
        for one, other in zip(exact, rounded, strict=True)
        for ours, theirs in zip(one.scores, other.scores, strict=True)
    ]
    assert np.mean(same) > 0.9


def test_the_model_stays_as_it_was() -> None:
    model = random_model()
    engine = Engine(model, slots=1, precision="bf16")
    assert engine.encoder is not model.encoder
    assert {parameter.dtype for parameter in model.encoder.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in engine.encoder.parameters()} == {torch.bfloat16}
    assert engine.encoder.feature_mean.dtype == torch.float32
    assert engine.pool.segments[0][0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("fill", list(Fill))
def test_every_fill_runs_in_bf16(model: Model, fill: Fill) -> None:
    (streamed,) = scores(Engine(model, slots=1, precision="bf16"), [babble(1.5)], fill)
    assert np.isfinite(np.concatenate([frames.max_log_prob for frames in streamed.scores])).all()


def test_float32_features_are_within_rounding_of_the_exact_ones(model: Model) -> None:
    config = FeatureConfig()
    samples = np.stack([babble(0.655, seed)[:10_480] for seed in range(3)])
    engine = Engine(model, slots=1)
    fast = FrontEnd(engine.encoder, torch.bfloat16, torch.device("cpu")).features(samples)
    exact = engine.encoder.normalise(torch.from_numpy(windows_to_log_mel(samples, config)))
    assert fast.shape == exact.shape == (3, 64, 80)
    assert (fast - exact).abs().max() < 2e-3


def test_a_batch_of_features_is_each_ones_own() -> None:
    config = FeatureConfig()
    samples = np.stack([babble(0.655, seed)[:10_480] for seed in range(5)])
    together = windows_to_log_mel(samples, config)
    alone = np.concatenate([windows_to_log_mel(samples[row : row + 1], config) for row in range(5)])
    assert np.abs(together - alone).max() < 1e-5


def test_unknown_precision(model: Model) -> None:
    with pytest.raises(ConfigError, match="fp32 or bf16"):
        Engine(model, precision="int4")  # type: ignore[arg-type]
