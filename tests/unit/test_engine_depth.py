"""Budgets, guarantees, late filling and idle moments in the running engine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from asr_exit.budget import Budget
from asr_exit.checkpoint import Model
from asr_exit.engine import Engine
from asr_exit.policy import CostTable, Evidence, Full, Posterior, RandomDepth, Reason, Scheduled, Sentence
from asr_exit.recognizer import Recognizer
from asr_exit.stream import ChunkResult, Fill, Stream, StreamOptions
from tests.conftest import babble

PROPAGATE = StreamOptions(fill=Fill.PROPAGATE)


class AlwaysStop(Full):
    """Leaves at the first exit."""

    needs_evidence = True

    def stop(self, exit_index: int, evidence: Evidence | None) -> bool:
        return True


def run(engine: Engine, stream: Stream) -> list[ChunkResult]:
    """Every result until nothing is ready."""
    results = []
    while engine.ready():
        results += engine.step().results
    return results


def transcript(results: list[ChunkResult]) -> str:
    return " ".join(result.committed for result in results if result.is_final and result.committed)


@pytest.mark.parametrize("chunk_ms", [160, 640, 1280])
@pytest.mark.parametrize("seed", [0, 1])
def test_filling_late_equals_the_offline_pass_that_fills_at_once(model: Model, chunk_ms: float, seed: int) -> None:
    """Depths in runs, some longer than the left context."""
    rng = np.random.default_rng(seed)
    exits = tuple(int(k) for k in np.repeat(rng.integers(0, 6, 30), rng.integers(1, 40 if chunk_ms < 300 else 12, 30)))
    samples = babble(25.6, seed)
    engine = Engine(model, slots=1)
    options = dataclasses.replace(PROPAGATE, chunk_ms=chunk_ms, policy=Scheduled(exits), decoder="beam", beam_size=1)
    stream = engine.open(options)
    engine.push(stream, samples)
    engine.finish(stream)
    ours: list[np.ndarray] = []
    while not stream.ended:
        engine.step()
        if stream.current is not None and stream.current.scores is not None:
            log_probs = stream.current.scores.frames.log_probs
            assert log_probs is not None
            ours.append(log_probs)
    from asr_exit.features import log_mel

    features = torch.from_numpy(log_mel(samples, model.config.features))[None]
    depth = torch.tensor([[k + 1 for k in exits[: stream.chunks]]])
    frames = model.config.chunk_frames(chunk_ms)
    output = model.encoder(features, torch.tensor([features.shape[1]]), chunk_frames=frames, chunk_depth=depth)
    assert output.mixed_logits is not None
    theirs = output.mixed_logits[0].log_softmax(dim=-1).numpy()
    np.testing.assert_allclose(np.concatenate(ours), theirs, atol=1e-4)


def test_nothing_is_filled_that_nobody_looks_at(model: Model) -> None:
    engine = Engine(model, slots=1)
    stream = engine.open(dataclasses.replace(PROPAGATE, policy=Scheduled((0,) * 30 + (5,))))
    engine.push(stream, babble(31 * 0.64))
    results = run(engine, stream)
    shallow = engine.macs.to_exit(0, 8)
    assert [result.encoder_macs for result in results[:30]] == [shallow] * 30
    late = engine.macs.full(8) + 5 * 8 * engine.macs.propagate(8)  # left context: eight chunks, five segments
    assert results[30].encoder_macs == late
    assert sum(map(stream.waiting, range(6))) == 0


@pytest.fixture(scope="module")
def steerable(model: Model) -> Posterior:
    """A policy with the table that this model has on this kind of sound."""
    engine = Engine(model, slots=1)
    rows = {}
    for threshold in (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0):
        stream = engine.open(dataclasses.replace(PROPAGATE, policy=Posterior(float(threshold))))
        engine.push(stream, babble(10.0, seed=5))
        run(engine, stream)
        rows[stream.total_macs / engine.macs.full(stream.next_frame)] = (float(threshold),) * 5
        engine.close(stream)
    ordered = sorted(rows)
    table = CostTable(tuple(ordered), tuple(rows[cost] for cost in ordered))
    return Posterior(table.at(0.6), table)


@pytest.mark.parametrize("asked", [0.5, 0.8])
def test_a_stream_lands_on_its_budget(model: Model, steerable: Posterior, asked: float) -> None:
    engine = Engine(model, slots=1)
    stream = engine.open(dataclasses.replace(PROPAGATE, policy=steerable, budget=Budget(mean_depth=asked)))
    engine.push(stream, babble(40.0, seed=9))
    run(engine, stream)
    assert stream.total_macs / engine.macs.full(stream.next_frame) == pytest.approx(asked, abs=0.03)
    assert stream.budget.spent_fraction == pytest.approx(asked, abs=0.03)


def test_a_budget_changed_mid_stream_counts_from_the_next_chunk(model: Model, steerable: Posterior) -> None:
    engine = Engine(model, slots=1)
    stream = engine.open(dataclasses.replace(PROPAGATE, policy=steerable, budget=Budget(mean_depth=0.95)))
    samples = babble(40.0, seed=9)
    engine.push(stream, samples[: 10 * 16_000])
    run(engine, stream)
    before = stream.total_macs
    frames = stream.next_frame
    engine.set_budget(stream, Budget(max_exit_layer=2))
    engine.push(stream, samples[10 * 16_000 : 11 * 16_000])
    assert {result.exit_layer for result in run(engine, stream)} == {2}
    engine.set_budget(stream, Budget(mean_depth=0.45))
    spent, frames = stream.total_macs, stream.next_frame
    engine.push(stream, samples[11 * 16_000 :])
    run(engine, stream)
    assert (stream.total_macs - spent) / engine.macs.full(stream.next_frame - frames) == pytest.approx(0.45, abs=0.05)
    assert before > 0


def test_load_leaves_a_request_its_guaranteed_minimum(model: Model) -> None:
    engine = Engine(model, slots=2)
    plain = engine.open(PROPAGATE)
    assured = engine.open(dataclasses.replace(PROPAGATE, budget=Budget(min_exit_layer=7)))
    engine.set_load_ceiling(0)
    for stream in (plain, assured):
        engine.push(stream, babble(0.64))
    results = {result.stream: result for result in engine.step().results}
    assert (results[plain].exit_layer, results[plain].reason) == (2, Reason.LOAD)
    assert (results[assured].exit_layer, results[assured].reason) == (6, Reason.LOAD)


def test_idle_moments_catch_up_and_are_paid_for(model: Model) -> None:
    samples = babble(6.4, seed=3)
    engine = Engine(model, slots=1)
    stream = engine.open(StreamOptions(policy=AlwaysStop(), fill=Fill.CATCH_UP))
    engine.push(stream, samples)
    shallow = run(engine, stream)
    assert stream.waiting(1) == 10
    rounds = 0
    while engine.catch_up():
        rounds += 1
    assert rounds == 10
    assert sum(map(stream.waiting, range(6))) == 0
    assert stream.idle_macs > 0
    engine.finish(stream)
    last = run(engine, stream)
    assert transcript(shallow + last) == Recognizer(model, StreamOptions()).transcribe(samples).text
    frames = stream.next_frame
    extra = sum(engine.macs.segment(k, frames, with_head=True) for k in range(6)) + engine.macs.stem(frames)
    assert stream.total_macs == pytest.approx(extra, rel=0.01)


def test_idle_moments_respect_budget_load_and_fill(model: Model) -> None:
    engine = Engine(model, slots=4)
    for options in (
        StreamOptions(policy=AlwaysStop(), fill=Fill.PROPAGATE),
        StreamOptions(policy=AlwaysStop(), budget=Budget(mean_depth=0.5), fill=Fill.CATCH_UP),
        StreamOptions(policy=AlwaysStop(), budget=Budget(max_exit_layer=2), fill=Fill.CATCH_UP),
    ):
        engine.push(engine.open(options), babble(3.2))
    while engine.ready():
        engine.step()
    assert not engine.catch_up()
    stream = engine.open(StreamOptions(policy=AlwaysStop(), fill=Fill.CATCH_UP))
    engine.push(stream, babble(1.28))
    run(engine, stream)
    engine.set_load_ceiling(0)
    assert not engine.catch_up()
    engine.set_load_ceiling(1)
    assert engine.catch_up()


def test_beams_are_computed_for_the_sentence_criterion_only(model: Model) -> None:
    seen: list[float] = []

    class Spy(Sentence):
        def stop(self, exit_index: int, evidence: Evidence | None) -> bool:
            assert evidence is not None
            seen.append(evidence.beam_share)
            return super().stop(exit_index, evidence)

    Recognizer(model, dataclasses.replace(PROPAGATE, policy=Spy(1.0))).transcribe(babble(2.0))
    assert seen
    assert all(0 < share <= 1 for share in seen)
    assert RandomDepth(0).beams == 0
