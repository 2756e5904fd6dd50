"""bf16 engines: close to fp32 ones, isolated from the model they were made from, features within rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from asr_exit import packing
from asr_exit.checkpoint import Model
from asr_exit.config import FeatureConfig
from asr_exit.engine import Engine
from asr_exit.errors import ConfigError
from asr_exit.features import windows_to_log_mel
from asr_exit.packing import can_pack, pack_linears
from asr_exit.policy import RandomDepth
from asr_exit.stream import Fill, StreamOptions
from asr_exit.torch_backend import TorchBackend
from service.bench.streams import Streamed, stream_all
from tests.conftest import babble, random_model

needs_packing = pytest.mark.skipif(not can_pack(), reason="this processor does not multiply bf16: nothing is packed")


def scores(engine: Engine, recordings: list[np.ndarray], fill: Fill = Fill.CATCH_UP) -> list[Streamed]:
    """Every recording streamed, in order."""
    done = stream_all(engine, recordings, lambda _: StreamOptions(fill=fill))
    return sorted(done, key=lambda streamed: streamed.index)


def test_a_bf16_engine_hears_what_an_fp32_one_hears(model: Model) -> None:
    recordings = [babble(2.0 + seed / 3, seed) for seed in range(3)]
    exact = scores(Engine(model, slots=3), recordings)
    rounded = scores(Engine(model.in_precision("bf16"), slots=3), recordings)
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
    backend = model.in_precision("bf16").backend(1, "cpu")
    assert model.in_precision("fp32") is model
    assert {parameter.dtype for parameter in model.encoder.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in backend.encoder.parameters()} == {torch.bfloat16}
    assert backend.encoder.feature_mean.dtype == torch.float32
    assert backend.pool.segments[0].layers[0].keys.dtype == torch.bfloat16


@needs_packing
def test_packed_weights_multiply_like_plain_ones() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(32, 48).bfloat16().requires_grad_(False)
    x = torch.randn(3, 5, 32).bfloat16()
    plain = layer(x)
    pack_linears(layer)
    assert "forward" in vars(layer)
    torch.testing.assert_close(layer(x), plain, rtol=2e-2, atol=1e-2)


def test_a_processor_that_cannot_multiply_bf16_keeps_plain_weights(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "can_pack", lambda: False)
    engine = Engine(model.in_precision("bf16"), slots=1)
    backend = engine.backend
    assert isinstance(backend, TorchBackend)
    linears = [layer for layer in backend.encoder.modules() if isinstance(layer, torch.nn.Linear)]
    assert linears
    assert not [layer for layer in linears if "forward" in vars(layer)]
    (streamed,) = scores(engine, [babble(1.5)], Fill.PROPAGATE)
    assert np.isfinite(np.concatenate([frames.max_log_prob for frames in streamed.scores])).all()


@pytest.mark.parametrize("fill", list(Fill))
def test_every_fill_runs_in_bf16(model: Model, fill: Fill) -> None:
    (streamed,) = scores(Engine(model.in_precision("bf16"), slots=1), [babble(1.5)], fill)
    assert np.isfinite(np.concatenate([frames.max_log_prob for frames in streamed.scores])).all()


def test_float32_features_are_within_rounding_of_the_exact_ones(model: Model) -> None:
    samples = [babble(0.655, seed)[: 10_480 - 160 * seed] for seed in range(6)]  # lengths differ
    fast = model.in_precision("bf16").backend(1, "cpu").log_mel(samples)
    exact = model.backend(1, "cpu").log_mel(samples)
    for row, (ours, theirs) in enumerate(zip(fast, exact, strict=True)):
        assert ours.shape == theirs.shape == (64 - row, 80)
        assert np.abs(ours - theirs).max() < 5e-3
        assert np.abs(theirs - windows_to_log_mel(samples[row][None], FeatureConfig())[0]).max() < 1e-5


def test_a_batch_of_features_is_each_ones_own() -> None:
    config = FeatureConfig()
    samples = np.stack([babble(0.655, seed)[:10_480] for seed in range(5)])
    together = windows_to_log_mel(samples, config)
    alone = np.concatenate([windows_to_log_mel(samples[row : row + 1], config) for row in range(5)])
    assert np.abs(together - alone).max() < 1e-5


def test_unknown_precision(model: Model) -> None:
    with pytest.raises(ConfigError, match="fp32 or bf16"):
        model.in_precision("int4")


@needs_packing
def test_warming_up_meets_every_size_that_streams_then_use(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(head_hidden=(40, 0, 0, 0, 0, 0))
    multiplied: set[tuple[int, torch.Size]] = set()
    plain = packing._multiply

    def noted(packed: Tensor, bias: Tensor, then: str, x: Tensor) -> Tensor:
        multiplied.add((x.shape[:-1].numel(), packed.shape))
        return plain(packed, bias, then, x)

    monkeypatch.setattr(packing, "_multiply", noted)
    reduced = model.in_precision("bf16")
    engines = [Engine(reduced, slots=13, backend=reduced.backend(13, "cpu")) for _ in range(2)]
    engines[0].backend.warm_up(8, 12)
    assert engines[0].backend.free_slots == 13
    warm, results = set(multiplied), []
    for engine in engines:
        options = StreamOptions(policy=RandomDepth(3), fill=Fill.PROPAGATE)
        streams = [engine.open(options) for _ in range(12)]
        for step in range(6):
            served = streams[: 12 - step]
            for place, stream in enumerate(served):
                engine.push(stream, babble(0.64 if step < 5 else 0.1 + 0.07 * place, seed=place))
                if step == 5:  # last chunks, shorter than the others
                    engine.finish(stream)
            results.append(
                [(result.exit_layer, result.committed, result.tail) for result in engine.step(served).results]
            )
    assert multiplied - warm == set()
    assert results[:6] == results[6:]
    assert len({layer for step in results for layer, _, _ in step}) > 1
