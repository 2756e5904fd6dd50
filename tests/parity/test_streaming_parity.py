"""Streaming equals the offline masked pass at every exit, whatever the split, the neighbours, or the depth so far."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest

from asr_exit.checkpoint import Model
from asr_exit.engine import Engine
from asr_exit.policy import Evidence, ExitPolicy, Fixed, Full, RandomDepth
from asr_exit.recognizer import Recognizer
from asr_exit.stream import Chunk, Fill, Stream, StreamOptions
from tests.conftest import babble, random_model

TOLERANCE = 1e-4
CHUNKS_MS = [160, 320, 640, 1280]


@pytest.fixture(scope="module", params=[1, 2], ids=["one label a frame", "two labels a frame"])
def model(request: pytest.FixtureRequest) -> Model:
    return random_model(labels_per_frame=request.param)


class Recorder(Engine):
    """Keeps the log-posteriors that every chunk got at every exit."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.seen: dict[Stream, dict[tuple[int, int], np.ndarray]] = {}

    def _run_batch(self, segment: int, chunk_frames: int, members: list[tuple[Stream, Chunk]]) -> None:
        super()._run_batch(segment, chunk_frames, members)
        self.backend.pool.check_frontier(np.array([stream.slot for stream, _ in members]))
        for stream, chunk in members:
            if chunk.scores is not None and chunk.scores.frames.log_probs is not None:
                self.seen.setdefault(stream, {})[segment, chunk.index] = chunk.scores.frames.log_probs

    def exit(self, stream: Stream, exit_index: int) -> np.ndarray:
        """(L, V) of one exit over the whole stream."""
        seen = self.seen[stream]
        return np.concatenate([seen[exit_index, index] for index in range(stream.chunks)])


@dataclasses.dataclass(frozen=True)
class Observed(ExitPolicy):
    """A policy that asks for evidence at every exit, so that every exit is read."""

    inner: object
    name: str = "observed"
    needs_evidence: bool = True

    def max_exit(self, num_exits: int, chunk_index: int = 0) -> int:
        return self.inner.max_exit(num_exits, chunk_index)  # type: ignore[attr-defined,no-any-return]

    def deepest(self, num_exits: int) -> int:
        return self.inner.deepest(num_exits)  # type: ignore[attr-defined,no-any-return]

    def stop(self, exit_index: int, evidence: Evidence | None) -> bool:
        return self.inner.stop(exit_index, evidence)  # type: ignore[attr-defined,no-any-return]


def options(chunk_ms: float, policy: object = None, fill: Fill = Fill.CATCH_UP) -> StreamOptions:
    # the beam decoder asks for whole log-posteriors
    return StreamOptions(chunk_ms=chunk_ms, policy=Observed(policy or Full()), fill=fill, decoder="beam", beam_size=1)


def run(
    engine: Engine, audio: list[np.ndarray], opts: list[StreamOptions], split: Callable[[int], int]
) -> list[Stream]:
    """Feed every stream in pieces of `split(stream index)` samples, stepping in between, then finish."""
    streams = [engine.open(option) for option in opts]
    offsets = [0] * len(streams)
    while not all(stream.ended for stream in streams):
        for index, stream in enumerate(streams):
            if stream.finished:
                continue
            size = split(index)
            engine.push(stream, audio[index][offsets[index] : offsets[index] + size])
            offsets[index] += size
            if offsets[index] >= len(audio[index]):
                engine.finish(stream)
        assert engine.step().failures == []
    return streams


def worst(engine: Recorder, stream: Stream, offline: list[np.ndarray], exits: range) -> float:
    return max(float(np.abs(engine.exit(stream, index) - offline[index]).max()) for index in exits)


@pytest.mark.parametrize("chunk_ms", CHUNKS_MS)
def test_streaming_equals_offline_at_every_exit(model: Model, chunk_ms: float) -> None:
    samples, rng = babble(9.3, seed=5), np.random.default_rng(0)
    engine = Recorder(model, slots=1)
    (stream,) = run(engine, [samples], [options(chunk_ms)], lambda _: int(rng.integers(1, 9000)))
    offline = Recognizer(model).log_posteriors(samples, chunk_ms)
    assert stream.next_frame > 64 + 16  # longer than the ring
    assert len(offline[0]) == stream.next_frame * model.config.labels_per_frame
    assert worst(engine, stream, offline, range(6)) < TOLERANCE


def test_one_sample_at_a_time(model: Model) -> None:
    samples = babble(1.5, seed=6)
    engine = Recorder(model, slots=1)
    stream = engine.open(options(320))
    for index in range(len(samples)):
        engine.push(stream, samples[index : index + 1])
        if engine.ready():
            engine.step()
    engine.finish(stream)
    engine.step()
    assert worst(engine, stream, Recognizer(model).log_posteriors(samples, 320), range(6)) < TOLERANCE


def test_batch_of_16_at_different_positions_and_chunk_sizes(model: Model) -> None:
    rng = np.random.default_rng(2)
    audio = [babble(float(rng.uniform(0.2, 8.0)), seed=seed) for seed in range(16)]
    chunk_ms = [CHUNKS_MS[index % 4] for index in range(16)]
    engine = Recorder(model, slots=16)
    streams = run(engine, audio, [options(c) for c in chunk_ms], lambda _: int(rng.integers(0, 30_000)))
    for stream, samples, c in zip(streams, audio, chunk_ms, strict=True):
        assert worst(engine, stream, Recognizer(model).log_posteriors(samples, c), range(6)) < TOLERANCE


@pytest.mark.parametrize("chunk_ms", CHUNKS_MS)
def test_random_depth_with_catch_up_equals_full_depth(model: Model, chunk_ms: float) -> None:
    rng = np.random.default_rng(3)
    audio = [babble(float(rng.uniform(1.0, 7.0)), seed=20 + seed) for seed in range(8)]
    engine = Recorder(model, slots=8)
    opts = [options(chunk_ms, RandomDepth(seed=seed)) for seed in range(8)]
    streams = run(engine, audio, opts, lambda _: int(rng.integers(1, 20_000)))
    for stream, samples in zip(streams, audio, strict=True):
        assert worst(engine, stream, Recognizer(model).log_posteriors(samples, chunk_ms), range(6)) < TOLERANCE


def test_finish_after_shallow_chunks_equals_full_depth(model: Model) -> None:
    samples = babble(6.0, seed=9)

    class AlwaysFirst(Full):
        needs_evidence = True

        def stop(self, exit_index: int, evidence: Evidence | None) -> bool:
            return True

    engine = Recorder(model, slots=1)
    (stream,) = run(engine, [samples], [options(640, AlwaysFirst())], lambda _: 10_240)
    assert worst(engine, stream, Recognizer(model).log_posteriors(samples, 640), range(6)) < TOLERANCE
    transcribe = Recognizer(model, StreamOptions(policy=AlwaysFirst(), fill=Fill.CATCH_UP)).transcribe(samples)
    full = Recognizer(model, StreamOptions()).transcribe(samples)
    assert transcribe.text == full.text
    assert transcribe.text
    assert any(chunk.exit_layer == 2 for chunk in transcribe.chunks)
    assert transcribe.encoder_macs >= full.encoder_macs


@pytest.mark.parametrize("fill", [Fill.PROPAGATE, Fill.HOLE])
@pytest.mark.parametrize("chunk_ms", [160, 640])
def test_fills_equal_the_training_pass(model: Model, fill: Fill, chunk_ms: float) -> None:
    """What training computes for a random depth per chunk is what serving computes with that fill."""
    import torch

    from asr_exit.features import log_mel

    samples, depths = babble(7.0, seed=11), [3, 1, 6, 2, 2, 5, 1, 4, 6, 3, 1]
    chunk_frames = model.config.chunk_frames(chunk_ms)
    features = torch.from_numpy(log_mel(samples))[None]
    chunks = math.ceil(math.ceil(features.shape[1] / 8) / chunk_frames)
    per_chunk = [depths[index % len(depths)] for index in range(chunks)]

    at: list[int] = []

    class Scripted(Full):
        needs_evidence = True

        def stop(self, exit_index: int, evidence: Evidence | None) -> bool:
            if exit_index == 0:
                at.append(len(at))
            return exit_index + 1 >= per_chunk[at[-1]]

    offline = model.encoder(
        features,
        torch.tensor([features.shape[1]]),
        chunk_frames=chunk_frames,
        chunk_depth=torch.tensor([per_chunk]),
        fill=fill.value,
    ).mixed_logits
    assert offline is not None
    engine = Recorder(model, slots=1)
    (stream,) = run(engine, [samples], [options(chunk_ms, Scripted(), fill)], lambda _: 4_000)
    taken = [engine.seen[stream][depth - 1, index] for index, depth in enumerate(per_chunk)]
    reference = offline[0].log_softmax(-1).numpy()
    assert np.abs(np.concatenate(taken) - reference).max() < TOLERANCE


def test_neighbours_batch_order_and_slot_reuse_change_nothing(model: Model) -> None:
    samples = babble(5.0, seed=13)
    alone = Recorder(model, slots=1)
    (reference,) = run(alone, [samples], [options(640)], lambda _: 5_000)
    rng = np.random.default_rng(4)
    crowd = Recorder(model, slots=6)
    for round_ in range(3):  # slots are poisoned with NaN when given back, and used again
        others = [babble(float(rng.uniform(0.5, 6.0)), seed=100 * round_ + k) for k in range(5)]
        place = int(rng.integers(0, 6))
        audio = [*others[:place], samples, *others[place:]]
        opts = [options(640, RandomDepth(seed=k) if k != place else Full()) for k in range(6)]
        streams = run(crowd, audio, opts, lambda k, place=place: 5_000 if k == place else int(rng.integers(1, 15_000)))
        for index in range(6):
            assert np.abs(crowd.exit(streams[place], index) - alone.exit(reference, index)).max() < 1e-5
        for stream in streams:
            crowd.close(stream)
    assert crowd.free_slots == 6


@pytest.mark.parametrize("fill", list(Fill))
@pytest.mark.parametrize("chunk_ms", [160, 640, 1280])
def test_chunks_of_different_lengths_share_a_batch(model: Model, fill: Fill, chunk_ms: float) -> None:
    recordings = [babble(2.3 + 0.37 * k, seed=40 + k) for k in range(5)]

    def drive(engine: Recorder, chosen: list[int]) -> list[Stream]:
        """Flushes cut chunks at places of their own in every stream, and the last chunks differ, too."""
        streams = [engine.open(options(chunk_ms, RandomDepth(seed=k), fill)) for k in chosen]
        for turn in range(12):
            for k, stream in zip(chosen, streams, strict=True):
                engine.push(stream, recordings[k][turn * 4_000 : (turn + 1) * 4_000])
                if (turn + k) % 3 == 0:
                    engine.flush(stream)
                if turn == 11:
                    engine.finish(stream)
            assert engine.step().failures == []
        while not all(stream.ended for stream in streams):
            assert engine.step().failures == []
        return streams

    crowd = Recorder(model, slots=5)
    together = drive(crowd, [0, 1, 2, 3, 4])
    for k in range(5):
        alone = Recorder(model, slots=1)
        (reference,) = drive(alone, [k])
        seen, expected = crowd.seen[together[k]], alone.seen[reference]
        assert seen.keys() == expected.keys()
        assert together[k].total_macs == reference.total_macs
        assert max(np.abs(seen[key] - expected[key]).max() for key in seen) < TOLERANCE


def test_fixed_exit_costs_less_and_reads_that_exit(model: Model) -> None:
    samples = babble(4.0, seed=15)
    engine = Recorder(model, slots=1)
    (stream,) = run(engine, [samples], [options(640, Fixed(4))], lambda _: 10_240)
    offline = Recognizer(model).log_posteriors(samples, 640)
    assert np.abs(engine.exit(stream, 1) - offline[1]).max() < TOLERANCE
    assert max(segment for segment, _ in engine.seen[stream]) == 1
    assert stream.total_macs < 0.5 * engine.macs.full(stream.next_frame)
