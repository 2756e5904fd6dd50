"""Slots, stream states, failures, budgets, load, endpoints and backlogs of the engine."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from asr_exit.budget import Budget
from asr_exit.checkpoint import Model
from asr_exit.engine import Engine
from asr_exit.errors import AudioError, CapacityError, ConfigError, EngineError, StreamStateError
from asr_exit.policy import Evidence, Fixed, Full, Posterior, Reason
from asr_exit.recognizer import Recognizer
from asr_exit.stream import ChunkResult, Fill, Stream, StreamOptions
from tests.conftest import babble, random_model


class AlwaysStop(Full):
    """Leaves at the first exit."""

    needs_evidence = True

    def stop(self, exit_index: int, evidence: Evidence | None) -> bool:
        return True


def drain(engine: Engine, streams: list[Stream]) -> dict[Stream, list[ChunkResult]]:
    results: dict[Stream, list[ChunkResult]] = {stream: [] for stream in streams}
    while not all(stream.ended or stream.closed for stream in streams):
        for result in engine.step().results:
            results[result.stream].append(result)
    return results


def feed(engine: Engine, seconds: float, options: StreamOptions | None = None, seed: int = 0) -> list[ChunkResult]:
    stream = engine.open(options)
    engine.push(stream, babble(seconds, seed))
    engine.finish(stream)
    results = drain(engine, [stream])[stream]
    engine.close(stream)
    return results


def test_slots_run_out_and_come_back(model: Model) -> None:
    engine = Engine(model, slots=2)
    first, _ = engine.open(), engine.open()
    with pytest.raises(CapacityError, match="2 slots"):
        engine.open()
    engine.close(first)
    engine.close(first)
    assert engine.free_slots == 1
    engine.open()


@pytest.mark.parametrize("bad", [np.array([0.0, np.nan], np.float32), np.array([np.inf], np.float32)])
def test_samples_that_are_not_finite_are_refused_and_the_stream_lives_on(model: Model, bad: np.ndarray) -> None:
    engine = Engine(model, slots=1)
    stream = engine.open()
    with pytest.raises(AudioError, match="finite"):
        engine.push(stream, bad)
    engine.push(stream, babble(1.0))
    assert engine.ready() == 1


def test_samples_of_another_type_are_refused(model: Model) -> None:
    engine = Engine(model, slots=1)
    stream = engine.open()
    with pytest.raises(AudioError, match="float32"):
        engine.push(stream, np.zeros(4, np.int16))


def test_a_finished_or_closed_stream_takes_no_audio(model: Model) -> None:
    engine = Engine(model, slots=1)
    stream = engine.open()
    engine.finish(stream)
    with pytest.raises(StreamStateError):
        engine.push(stream, babble(0.1))
    engine.close(stream)
    with pytest.raises(StreamStateError):
        engine.finish(stream)


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.03])
def test_empty_and_tiny_streams_end(model: Model, seconds: float) -> None:
    results = feed(Engine(model, slots=1), seconds)
    assert [result.end_of_stream for result in results] == [True]
    assert results[0].is_final


def test_options_out_of_range_name_the_choices(model: Model) -> None:
    engine = Engine(model, slots=1)
    with pytest.raises(ConfigError, match="160"):
        engine.open(StreamOptions(chunk_ms=100))
    with pytest.raises(ConfigError, match="least possible"):
        engine.open(StreamOptions(budget=Budget(mean_depth=0.01)))
    with pytest.raises(ConfigError):
        engine.open(StreamOptions(policy=Fixed(14)))
    with pytest.raises(ConfigError, match="catch_up"):
        Fill.parse("catchup")
    assert engine.free_slots == 1  # none of them took a slot


def test_every_result_accounts_for_its_chunk(model: Model) -> None:
    engine = Engine(model, slots=1)
    results = feed(engine, 5.0, StreamOptions(policy=Fixed(6)))
    assert [result.chunk_index for result in results] == list(range(8))
    assert {result.exit_layer for result in results} == {6}
    assert {result.reason for result in results} == {Reason.FULL}
    for before, after in itertools.pairwise(results):
        assert after.start_ms == before.start_ms + 640
    assert results[-1].end_ms == pytest.approx(5000)
    assert all(result.encoder_macs == engine.macs.to_exit(2, 8) for result in results[:-1])


def test_confident_chunks_leave_early_and_cost_less(model: Model) -> None:
    engine = Engine(model, slots=1)
    early = feed(engine, 5.0, StreamOptions(policy=Posterior(0.0), fill=Fill.PROPAGATE))
    full = feed(engine, 5.0, StreamOptions())
    assert {result.exit_layer for result in early} == {2}
    assert {result.reason for result in early} == {Reason.CONFIDENT}
    assert early[0].encoder_macs == engine.macs.to_exit(0, 8) < full[0].encoder_macs


def test_no_evidence_at_an_exit_that_every_chunk_leaves_at(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrated thresholds often end in "always"; the answers are those of a threshold that is always met."""
    asked: list[tuple[int, bool]] = []
    engine = Engine(model, slots=1)
    run = engine.backend.run

    def spy(segment: int, *args: object, **kwargs: bool) -> object:
        asked.append((segment, kwargs["want_evidence"]))
        return run(segment, *args, **kwargs)

    monkeypatch.setattr(engine.backend, "run", spy)
    ceiling = feed(engine, 5.0, StreamOptions(policy=Posterior((1.0, 1.0, 0.0, 0.5, 0.5)), fill=Fill.PROPAGATE))
    assert set(asked) == {(0, True), (1, True), (2, False)}
    judged = feed(engine, 5.0, StreamOptions(policy=Posterior((1.0, 1.0, 1e-9, 0.5, 0.5)), fill=Fill.PROPAGATE))
    assert set(asked) == {(0, True), (1, True), (2, False), (2, True)}
    assert {result.reason for result in ceiling} == {Reason.FULL}
    assert [(r.exit_layer, r.encoder_macs, r.committed, r.tail) for r in ceiling] == [
        (r.exit_layer, r.encoder_macs, r.committed, r.tail) for r in judged
    ]


@pytest.mark.parametrize("fraction", [0.4, 0.6, 0.9])
def test_a_mean_depth_budget_is_kept(model: Model, fraction: float) -> None:
    engine = Engine(model, slots=1)
    options = StreamOptions(budget=Budget(mean_depth=fraction), fill=Fill.HOLE)
    results = feed(engine, 60.0, options)
    spent = sum(result.encoder_macs for result in results) / (len(results) * engine.macs.full(8))
    assert spent == pytest.approx(fraction, abs=0.03)
    assert Reason.BUDGET in {result.reason for result in results}


def test_a_budget_change_takes_effect_at_the_next_chunk(model: Model) -> None:
    engine = Engine(model, slots=1)
    stream = engine.open(StreamOptions(fill=Fill.PROPAGATE))
    engine.push(stream, babble(4.0))
    assert engine.step().results[0].exit_layer == 12
    engine.set_budget(stream, Budget(max_exit_layer=4))
    (after,) = engine.step().results
    assert (after.exit_layer, after.reason) == (4, Reason.BUDGET)
    engine.set_budget(stream, Budget())
    assert engine.step().results[0].exit_layer == 12


def test_the_load_ceiling_holds_for_everybody_and_goes_away(model: Model) -> None:
    engine = Engine(model, slots=2)
    streams = [engine.open(StreamOptions(fill=Fill.PROPAGATE)) for _ in range(2)]
    for stream in streams:
        engine.push(stream, babble(3.0))
    engine.set_load_ceiling(1)
    assert [(r.exit_layer, r.reason) for r in engine.step().results] == [(4, Reason.LOAD)] * 2
    engine.set_load_ceiling(None)
    assert [r.exit_layer for r in engine.step().results] == [12] * 2


def test_a_stream_whose_numbers_break_fails_alone(model: Model) -> None:
    engine = Engine(model, slots=3)
    streams = [engine.open() for _ in range(3)]
    for seed, stream in enumerate(streams):
        engine.push(stream, babble(2.0, seed))
        engine.finish(stream)
    for layer in engine.backend.pool.segments[0].layers:
        layer.conv[streams[1].slot] = torch.nan
    output = engine.step()
    assert [stream for stream, _ in output.failures] == [streams[1]]
    assert isinstance(output.failures[0][1], EngineError)
    assert streams[1].closed
    assert engine.free_slots == 1
    healthy = drain(engine, [streams[0], streams[2]])
    for seed in (0, 2):
        words = [w.text for r in healthy[streams[seed]] if r.is_final for w in r.words]
        assert words == [w.text for w in Recognizer(model).transcribe(babble(2.0, seed)).words]


def test_an_exception_in_a_segment_closes_its_streams_and_the_engine_goes_on(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, slots=2)
    broken = engine.open()
    engine.push(broken, babble(1.0))
    with monkeypatch.context() as patch:
        patch.setattr(type(model.encoder.segments[3]), "forward", lambda *a, **k: 1 / 0)
        ((failed, error),) = engine.step().failures
    assert failed is broken
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert feed(engine, 2.0)[-1].end_of_stream
    assert engine.free_slots == 2


def test_a_full_backlog_is_worked_off_at_once(model: Model) -> None:
    engine = Engine(model, slots=1)
    results = feed(engine, 13.0, StreamOptions(policy=AlwaysStop(), fill=Fill.CATCH_UP, catch_up_cap_chunks=4))
    layers = [result.exit_layer for result in results]
    assert layers[:4] == [2, 2, 2, 2]
    assert 12 in layers[4:6]
    assert layers.count(12) < len(layers) / 2


def test_a_backlog_that_may_never_be_worked_off_is_bounded(model: Model) -> None:
    engine = Engine(model, slots=1)
    options = StreamOptions(budget=Budget(max_exit_layer=2), fill=Fill.CATCH_UP, catch_up_cap_chunks=3)
    stream = engine.open(options)
    for seed in range(4):
        engine.push(stream, babble(3.2, seed))
        while engine.ready():
            engine.step()
    assert all(len(inbox) <= 3 for inbox in stream.inboxes)
    engine.set_budget(stream, Budget())  # deeper layers may run again, over the hole
    engine.push(stream, babble(1.28, 9))
    (result,) = engine.step().results
    assert result.exit_layer == 12


def test_a_long_silence_ends_the_utterance_and_nothing_is_lost() -> None:
    model = random_model(seed=3)
    speech, silence = babble(4.0, 1), np.zeros(40_000, np.float32)
    engine = Engine(model, slots=1)
    audio = np.concatenate([speech, silence, speech])
    deepest = Recognizer(model).log_posteriors(audio, 640)[-1]
    gap = deepest[:, 1:].max(axis=1) - deepest[:, 0]  # an untrained head never rests: lift the blank over most frames
    model.encoder.segments[-1].head.out.bias[0] += float(np.quantile(gap, 0.8))
    whole = Recognizer(model, StreamOptions(endpoint_silence_ms=0)).transcribe(audio)
    stream = engine.open(StreamOptions(endpoint_silence_ms=320))
    engine.push(stream, audio)
    engine.finish(stream)
    results = drain(engine, [stream])[stream]
    finals = [result for result in results if result.is_final]
    assert len(finals) >= 2
    assert "".join(r.committed.replace(" ", "") for r in finals) == whole.text.replace(" ", "")
    assert all(not result.tail for result in finals)


def test_an_endless_utterance_is_cut_between_words() -> None:
    model, samples = random_model(seed=9), babble(30.0, 5)  # one that writes many words
    engine = Engine(model, slots=1)
    stream = engine.open(StreamOptions(endpoint_silence_ms=0, max_utterance_ms=5_000))
    engine.push(stream, samples)
    engine.finish(stream)
    finals = [r for r in drain(engine, [stream])[stream] if r.is_final]
    assert len(finals) >= 4
    whole = Recognizer(model, StreamOptions(endpoint_silence_ms=0, max_utterance_ms=10**9)).transcribe(samples)
    assert " ".join(r.committed for r in finals if r.committed) == whole.text


def test_an_endless_word_is_cut_in_the_end() -> None:
    model = random_model(seed=2)
    starts = torch.tensor([piece.startswith("▁") for piece in model.tokenizer.pieces])
    model.encoder.segments[-1].head.out.bias[starts] -= 100.0
    results = feed(Engine(model, slots=1), 30.0, StreamOptions(endpoint_silence_ms=0, max_utterance_ms=5_000))
    finals = [result for result in results if result.is_final]
    assert len(finals) >= 2
    assert all(len(result.committed.split()) <= 1 for result in finals)


def test_committed_text_only_grows_within_an_utterance(model: Model) -> None:
    engine = Engine(model, slots=1)
    committed = ""
    for result in feed(engine, 12.0, StreamOptions(endpoint_silence_ms=0), seed=4):
        assert result.committed.startswith(committed)
        committed = result.committed
    assert committed


def test_revisions_touch_only_the_tail(model: Model) -> None:
    """Shallow partials are revised by deep passes, but never what was reported as committed."""

    class EveryThird(Full):
        needs_evidence = True
        calls = 0

        def stop(self, exit_index: int, evidence: Evidence | None) -> bool:
            type(self).calls += exit_index == 0
            return type(self).calls % 3 != 0

    engine = Engine(model, slots=1)
    committed = ""
    for result in feed(
        engine, 15.0, StreamOptions(policy=EveryThird(), fill=Fill.CATCH_UP, endpoint_silence_ms=0), seed=6
    ):
        assert result.committed.startswith(committed)
        committed = result.committed
    assert committed == Recognizer(model, StreamOptions(endpoint_silence_ms=0)).transcribe(babble(15.0, 6)).text
