"""Where utterances end: rules, flushes, and what interim results say about themselves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from asr_exit.biasing import PhraseHint
from asr_exit.captions import Captions
from asr_exit.ctc import GreedyDecoder
from asr_exit.endpoint import EndpointRule
from asr_exit.engine import Engine
from asr_exit.errors import ConfigError
from asr_exit.evidence import UNJUDGED, ExitScores
from asr_exit.policy import RandomDepth
from asr_exit.recognizer import Recognizer
from asr_exit.stream import Chunk, ChunkResult, Fill, Stream, StreamOptions
from tests.conftest import babble, random_model
from tests.unit.test_ctc import peaked

FRAME_MS = 80.0
PIECES = ("", "▁a", "▁b", "c", "▁d", "e")
NEVER = StreamOptions(endpoint_silence_ms=0, max_utterance_ms=10**6)


def captions_of(*labels: int, settled: bool = True, confidence: float = 0.98) -> Captions:
    captions = Captions(GreedyDecoder(), PIECES, FRAME_MS)
    frames = peaked(list(labels), vocab=len(PIECES), confidence=confidence)
    captions.add(
        Chunk(0, 0, len(labels), None, 0, ExitScores(frames.ids, frames.max_log_prob, None, UNJUDGED), settled)
    )  # type: ignore[arg-type]
    return captions


def run(engine: Engine, stream: Stream) -> list[ChunkResult]:
    results = []
    while not stream.ended and engine.ready():
        output = engine.step()
        assert not output.failures
        results += output.results
    return results


def finals_of(results: list[ChunkResult]) -> list[str]:
    return [result.committed for result in results if result.is_final]


@pytest.mark.parametrize(
    ("rule", "speech", "silence_ms", "utterance_ms", "expected"),
    [
        (EndpointRule(500), True, 480, 9_000, False),
        (EndpointRule(500), True, 500, 500, True),
        (EndpointRule(500), False, 9_000, 9_000, False),
        (EndpointRule(500, must_contain_speech=False), False, 500, 500, True),
        (EndpointRule(500, min_utterance_ms=3_000), True, 800, 2_900, False),
        (EndpointRule(500, min_utterance_ms=3_000), True, 800, 3_000, True),
        (EndpointRule(0, min_utterance_ms=3_000), True, 0, 3_000, True),
    ],
)
def test_rules(rule: EndpointRule, speech: bool, silence_ms: float, utterance_ms: float, expected: bool) -> None:
    assert rule.holds(contains_speech=speech, silence_ms=silence_ms, utterance_ms=lambda: utterance_ms) is expected


@pytest.mark.parametrize("values", [(-1.0,), (0.0,), (4e6,), (100.0, True, -1.0), (float("nan"),)])
def test_rules_out_of_range(values: tuple) -> None:
    with pytest.raises(ConfigError, match="endpoint rule"):
        EndpointRule(*values)


def test_silence_counts_from_the_last_word_or_the_last_final() -> None:
    rule = (EndpointRule(240, must_contain_speech=False),)
    captions = captions_of(0, 1, 0, 0)
    assert (captions.has_words, captions.silence_ms(), captions.utterance_ms()) == (True, 160, 240)
    assert not captions.at_endpoint(rule)
    captions.take_final()
    assert (captions.has_words, captions.silence_ms(), captions.utterance_ms()) == (False, 0, 0)
    silence = peaked([0, 0, 0], vocab=len(PIECES))
    captions.add(Chunk(1, 4, 3, None, 0, ExitScores(silence.ids, silence.max_log_prob, None, UNJUDGED), True))  # type: ignore[arg-type]
    assert (captions.has_words, captions.silence_ms(), captions.utterance_ms()) == (False, 240, 240)
    assert captions.at_endpoint(rule)
    assert not captions.at_endpoint((EndpointRule(240),))


def test_a_rule_without_speech_ends_silence_again_and_again() -> None:
    model = random_model()
    model.encoder.segments[-1].head.out.bias[0] += 1000.0  # hears nothing
    engine = Engine(model, slots=1)
    rules = (EndpointRule(1_280, must_contain_speech=False),)
    stream = engine.open(StreamOptions(endpoint_rules=rules))
    engine.push(stream, np.zeros(16_000 * 6, np.float32))
    results = run(engine, stream)
    assert [result.chunk_index for result in results if result.is_final] == [1, 3, 5, 7]
    assert set(finals_of(results)) == {""}


@pytest.mark.parametrize("fill", list(Fill))
@pytest.mark.parametrize("seconds", [0.0, 0.04, 0.64, 1.0, 2.9])
def test_a_flush_ends_the_utterance_and_loses_nothing(fill: Fill, seconds: float) -> None:
    model, audio = random_model(seed=4), babble(6.0, 5)  # a model that writes many words
    engine = Engine(model, slots=1)
    options = StreamOptions(endpoint_silence_ms=0, policy=RandomDepth(3), fill=fill)
    stream = engine.open(options)
    at = int(seconds * 16_000)
    engine.push(stream, audio[:at])
    engine.flush(stream)
    engine.push(stream, audio[at:])
    before = run(engine, stream)
    flushed = next(result for result in before if result.is_final)
    assert flushed.end_ms == at // 1_280 * FRAME_MS  # whole frames of what was there, and not a frame more
    assert not flushed.tail
    assert sum(result.is_final for result in before) == 1
    engine.finish(stream)
    results = before + run(engine, stream)
    covered = [(result.start_ms, result.end_ms) for result in results if result.chunk_ms]
    assert covered[0][0] == 0
    assert covered[-1][1] == 6_000
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(covered))
    assert all(start // 640 == (end - 1) // 640 for start, end in covered)  # the chunk grid stays
    assert results[-1].end_of_stream
    assert finals_of(results)[-1]


def test_a_flush_on_the_grid_changes_no_word() -> None:
    model, audio = random_model(seed=4), babble(6.4, 5)
    engine = Engine(model, slots=1)
    stream = engine.open(NEVER)
    for part in np.split(audio, [2 * 10_240, 6 * 10_240]):
        engine.push(stream, part)
        engine.flush(stream)
    engine.flush(stream)
    engine.finish(stream)
    engine.flush(stream)  # too late, and nothing left
    results = run(engine, stream)
    assert len(finals_of(results)) == 3  # the last flushes fall together with the end
    whole = Recognizer(model, NEVER).transcribe(audio).text
    assert "".join(finals_of(results)).replace(" ", "") == whole.replace(" ", "")


def test_stability_grows_with_silence_and_falls_with_doubt() -> None:
    after = [captions_of(1, 3, *[0] * blanks).caption().stability for blanks in range(7)]
    assert after == sorted(after)
    assert (after[0], after[-1]) == (pytest.approx(0.51), 1)
    sure, unsure = (captions_of(1, 0, 4, settled=False, confidence=c).caption().stability for c in (0.99, 0.6))
    assert 0 < unsure < sure < captions_of(1, 0, 4).caption().stability
    assert captions_of(0, 0).caption().stability == 0


def test_text_that_cannot_be_made_fails_its_stream_alone() -> None:
    engine = Engine(random_model(), slots=2)
    healthy, broken = engine.open(NEVER), engine.open(NEVER)

    def explode() -> None:
        raise RuntimeError("broken")

    broken.captions.caption = explode  # type: ignore[assignment,method-assign]
    for stream in (healthy, broken):
        engine.push(stream, babble(0.64))
    output = engine.step()
    assert [result.stream for result in output.results] == [healthy]
    assert [stream for stream, _ in output.failures] == [broken]
    assert broken.closed


def test_hints_reach_the_decoder() -> None:
    model, audio = random_model(seed=4), babble(4.0, 5)

    def words(*hints: PhraseHint) -> list[str]:
        options = StreamOptions(decoder="beam", phrase_hints=hints)
        return Recognizer(model, options).transcribe(audio).text.split()

    assert words(PhraseHint("jump", 9.0)).count("jump") > words().count("jump")
    with pytest.raises(ConfigError, match="phrase hint '12' holds no letter"):
        words(PhraseHint("12"))
    with pytest.raises(ConfigError, match="phrase hints need decoder='beam'"):
        StreamOptions(phrase_hints=(PhraseHint("jump"),))
