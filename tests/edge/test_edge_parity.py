"""The device path writes what torch writes, at every exit, chunk size, fill and split of the samples."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from asr_exit.attention import rotary
from asr_exit.budget import Budget
from asr_exit.checkpoint import Model
from asr_exit.edge import EdgeModel, EdgeRecognizer
from asr_exit.edge.recalibrate import observe
from asr_exit.engine import Engine
from asr_exit.evidence import ExitScores
from asr_exit.policy import Entropy, Fixed, Full, Posterior, RandomDepth, Similarity
from asr_exit.recognizer import Recognizer
from asr_exit.stream import ChunkResult, Fill, StreamOptions
from asr_exit.transcript import transcribe
from service.bench.probe import Probe
from tests.conftest import babble

pytestmark = pytest.mark.timeout(600)  # exporting the model for the first test takes torch its time

TOLERANCE = 1e-4
CHUNKS_MS = [160, 320, 640, 1280]


def shown(results: tuple[ChunkResult, ...] | list[ChunkResult]) -> list[tuple[object, ...]]:
    """Everything that a caller sees, but rounding."""
    return [
        (r.chunk_index, r.start_ms, r.end_ms, r.exit_layer, r.reason, r.encoder_macs, r.committed, r.tail, r.is_final)
        for r in results
    ]


@pytest.mark.parametrize("chunk_ms", CHUNKS_MS)
def test_log_posteriors_equal_torch_at_every_exit(source: Model, edge_model: EdgeModel, chunk_ms: float) -> None:
    samples = babble(9.3, seed=5)  # longer than the window of keys, and no whole number of chunks
    engine = Engine(edge_model, slots=1)
    engine.backend = probe = Probe(engine.backend, keep_log_probs=True)
    transcribe(engine, samples, StreamOptions(chunk_ms=chunk_ms))
    offline = Recognizer(source).log_posteriors(samples, chunk_ms)
    assert list(probe.log_probs) == list(range(4))
    for segment, parts in probe.log_probs.items():
        assert np.abs(np.concatenate(parts) - offline[segment]).max() < TOLERANCE


OPTIONS = {
    "full": StreamOptions(),
    "fixed": StreamOptions(policy=Fixed(2, 1), chunk_ms=320),
    "catch up": StreamOptions(policy=RandomDepth(1), chunk_ms=320, fill=Fill.CATCH_UP, catch_up_cap_chunks=4),
    "propagate": StreamOptions(policy=RandomDepth(2), fill=Fill.PROPAGATE, chunk_ms=1280),
    "hole": StreamOptions(policy=RandomDepth(3), fill=Fill.HOLE, chunk_ms=160),
    "beam": StreamOptions(policy=RandomDepth(4), fill=Fill.PROPAGATE, decoder="beam", beam_size=4),
    "budget": StreamOptions(budget=Budget(mean_depth=0.75), fill=Fill.PROPAGATE),
    "cut": StreamOptions(endpoint_silence_ms=160, max_utterance_ms=2_000),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_results_equal_the_torch_engine(source: Model, edge_model: EdgeModel, name: str) -> None:
    engines = Engine(source, slots=1), Engine(edge_model, slots=1)
    probes = [Probe(engine.backend, keep_log_probs=True) for engine in engines]
    for engine, probe in zip(engines, probes, strict=True):
        engine.backend = probe
    for seconds, seed in ((11.3, 31), (0.03, 32), (0.0, 33)):
        torch_path, device = (transcribe(engine, babble(seconds, seed), OPTIONS[name]) for engine in engines)
        assert shown(device.chunks) == shown(torch_path.chunks)
        assert device.text == torch_path.text
        for ours, theirs in zip(device.words, torch_path.words, strict=True):
            assert ours.confidence == pytest.approx(theirs.confidence, abs=1e-4)
        assert device.encoder_macs == torch_path.encoder_macs
    for segment, expected in probes[0].log_probs.items():
        for ours, theirs in zip(probes[1].log_probs[segment], expected, strict=True):
            assert np.abs(ours - theirs).max() < TOLERANCE


@pytest.mark.parametrize(("kind", "chunk_ms"), [(Posterior, 640), (Entropy, 160)])
def test_policies_leave_where_they_leave_in_torch(
    source: Model, edge_model: EdgeModel, kind: type[Posterior | Entropy], chunk_ms: float
) -> None:
    samples = babble(11.3, seed=31)
    seen = observe(source, [samples], chunk_ms)[kind.label]
    policy = kind(tuple(float(np.quantile(each, 0.5)) + 1e-5 for each in seen))  # no chunk lies just there
    options = StreamOptions(policy=policy, fill=Fill.PROPAGATE, chunk_ms=chunk_ms)
    torch_path, device = (transcribe(Engine(model, slots=1), samples, options) for model in (source, edge_model))
    assert shown(device.chunks) == shown(torch_path.chunks)
    assert len({chunk.exit_layer for chunk in device.chunks}) > 1


def test_pushes_of_any_size_give_one_result_a_chunk(source: Model, edge_model: EdgeModel) -> None:
    samples, rng = babble(6.1, seed=8), np.random.default_rng(1)
    recognizer = EdgeRecognizer(edge_model, StreamOptions(), target_latency_ms=60_000)
    for _ in range(2):  # the second stream starts from nothing
        results, at = [], 0
        while at < len(samples):
            size = int(rng.integers(1, 9000))
            results += recognizer.push(samples[at : at + size])
            at += size
        assert recognizer.push(np.zeros(0, np.float32)) == []
        results += recognizer.finish()
        assert results[-1].end_of_stream
        assert shown(results) == shown(transcribe(Engine(source, slots=1), samples, StreamOptions()).chunks)


def test_several_streams_share_one_model(edge_model: EdgeModel) -> None:
    engine = Engine(edge_model, slots=3)
    streams = [engine.open(StreamOptions(chunk_ms=ms)) for ms in (160, 640, 320)]
    for seed, stream in enumerate(streams):
        engine.push(stream, babble(3.0, seed))
        engine.finish(stream)
    finals: dict[int, list[str]] = {stream.slot: [] for stream in streams}
    while not all(stream.ended for stream in streams):
        for result in engine.step().results:
            if result.is_final:
                finals[result.stream.slot].append(result.committed)
    for seed, stream in enumerate(streams):
        alone = transcribe(Engine(edge_model, slots=1), babble(3.0, seed), stream.options)
        assert " ".join(part for part in finals[stream.slot] if part) == alone.text


def test_positions_are_exact_after_a_year(edge_model: EdgeModel) -> None:
    start, size = 12 * 3600 * 24 * 365, 16
    ours = Engine(edge_model, slots=1).backend._positions(start, 8)  # type: ignore[attr-defined]
    cos, sin = rotary(torch.arange(start, start + 8)[None], size, torch.float32)
    assert np.abs(ours["cos"] - cos[0, :, 0].numpy()).max() < 1e-6
    assert np.abs(ours["sin"] - sin[0, :, 0].numpy()).max() < 1e-6


def test_int8_stays_near(source: Model, int8: Path) -> None:
    samples = babble(9.0, seed=5)
    engine = Engine(EdgeModel(int8), slots=1)
    engine.backend = probe = Probe(engine.backend, keep_log_probs=True)
    transcribe(engine, samples, StreamOptions(policy=Full(), chunk_ms=640))
    offline = Recognizer(source).log_posteriors(samples, 640)
    for segment, parts in probe.log_probs.items():
        ours = np.concatenate(parts)
        assert 1e-4 < np.abs(np.exp(ours) - np.exp(offline[segment])).max() < 0.2  # not exact, hence quantised
        assert (ours.argmax(1) == offline[segment].argmax(1)).mean() > 0.9


@pytest.mark.parametrize("exit_index", [0, 1, 2])
def test_evidence_is_what_torch_computes(source: Model, edge_model: EdgeModel, exit_index: int) -> None:
    seen: list[list[ExitScores]] = []
    leaves_here = Similarity((*[None] * exit_index, 1e-9, *[None] * (2 - exit_index)))  # at 0 it would not look
    for model in (source, edge_model):
        engine, found = Engine(model, slots=1), []
        stream = engine.open(StreamOptions(policy=leaves_here))
        engine.push(stream, babble(4.0, 3))
        while engine.ready():
            engine.step()
            assert stream.current is not None
            found.append(stream.current.scores)
        seen.append(found)
    for theirs, ours in zip(*seen, strict=True):
        for field in ("max_posterior", "max_posterior_all", "entropy", "entropy_all", "blank_mass", "similarity"):
            value = getattr(ours.evidence, field)
            assert math.isfinite(value)
            assert value == pytest.approx(getattr(theirs.evidence, field), abs=1e-5)
