"""CTC states: collapse, exactness of the beam, immutability, restarts, seams."""

from __future__ import annotations

import gc
import itertools
import math
import sys
import tracemalloc
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from asr_exit.beam import BeamState, PrefixBeamDecoder
from asr_exit.ctc import BLANK, FrameScores, GreedyDecoder
from asr_exit.errors import ConfigError, EngineError

EXACT = PrefixBeamDecoder(beam_size=10_000, top_tokens=1_000)
DECODERS: list[Any] = [GreedyDecoder(), PrefixBeamDecoder(), PrefixBeamDecoder(beam_size=2, top_tokens=3)]


def random_scores(rng: np.random.Generator, frames: int, vocab: int, sharpness: float = 1.0) -> np.ndarray:
    logits = rng.normal(size=(frames, vocab)) * sharpness
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def peaked(labels: list[int], vocab: int = 6, confidence: float = 0.98, **options: bool) -> FrameScores:
    """Scores whose best path is `labels`."""
    probs = np.full((len(labels), vocab), (1 - confidence) / (vocab - 1))
    probs[np.arange(len(labels)), labels] = confidence
    return FrameScores.from_log_probs(np.log(probs).astype(np.float32), **options)


def ids(state: Any) -> tuple[int, ...]:
    return tuple(token.id for token in state.tokens())


def collapse(path: tuple[int, ...], before: int = BLANK) -> tuple[int, ...]:
    kept = [label for previous, label in itertools.pairwise((before, *path)) if label not in (previous, BLANK)]
    return tuple(kept)


def enumerate_all(log_probs: np.ndarray, before: dict[int, float] | None = None) -> dict[tuple[int, ...], float]:
    """Probability of every label sequence, summed over all alignments; `before` weighs the label one frame earlier."""
    total: dict[tuple[int, ...], float] = defaultdict(float)
    probs = np.exp(log_probs.astype(np.float64))
    for path in itertools.product(range(probs.shape[1]), repeat=len(probs)):
        weight = math.prod(row[label] for row, label in zip(probs, path, strict=True))
        for label, share in (before or {BLANK: 1.0}).items():
            total[collapse(path, label)] += share * weight
    return total


def beam_table(state: BeamState) -> dict[tuple[int, ...], float]:
    table = {tuple(t.id for t in h.tokens): math.exp(h.log_prob) for h in state.hypotheses()}
    assert len(table) == len(state.hypotheses()), "one label sequence stands in the beam twice"
    return table


def assert_same(got: dict[tuple[int, ...], float], want: dict[tuple[int, ...], float]) -> None:
    assert set(want) == set(got)
    for sequence, probability in want.items():
        assert got[sequence] == pytest.approx(probability, rel=1e-9)


# -- greedy -----------------------------------------------------------------------------------------------------------


def test_greedy_collapses_repeats_and_drops_blanks_with_times_and_peaks() -> None:
    scores = FrameScores(np.array([0, 1, 1, 0, 1, 2, 0, 0]), np.log([0.9, 0.5, 0.8, 0.7, 0.6, 0.95, 1.0, 1.0]))
    state = GreedyDecoder().advance(GreedyDecoder().initial(), scores)
    spans = [(t.id, t.start_frame, t.end_frame) for t in state.tokens()]
    assert spans == [(1, 1, 3), (1, 4, 5), (2, 5, 6)]
    assert [math.exp(t.log_prob) for t in state.tokens()] == pytest.approx([0.8, 0.6, 0.95])
    assert (state.num_frames, state.trailing_blank_frames, state.num_stable_tokens) == (8, 2, 3)


def test_greedy_agrees_with_the_definition_on_random_paths() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        path = rng.integers(0, 3, size=30)
        state = GreedyDecoder().advance(GreedyDecoder().initial(), FrameScores(path, np.zeros(30)))
        assert ids(state) == collapse(tuple(path.tolist()))
        assert all(set(path[t.start_frame : t.end_frame]) == {t.id} for t in state.tokens())


# -- beam -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "vocab"), [(1, 3), (3, 4), (5, 3), (7, 2)])
def test_wide_beam_equals_enumeration_of_all_alignments(frames: int, vocab: int) -> None:
    for seed in range(6):
        log_probs = random_scores(np.random.default_rng(seed), frames, vocab)
        want = enumerate_all(log_probs)
        state = EXACT.advance(EXACT.initial(), FrameScores.from_log_probs(log_probs))
        assert_same(beam_table(state), want)
        assert ids(state) == max(want, key=want.__getitem__)
        assert state.confidence == pytest.approx(max(want.values()))  # nothing was pruned, so the beam holds all mass


def test_beam_finds_a_sequence_that_the_best_path_misses() -> None:
    log_probs = np.log(np.array([[0.6, 0.4], [0.6, 0.4]], dtype=np.float32))
    scores = FrameScores.from_log_probs(log_probs)
    assert ids(GreedyDecoder().advance(GreedyDecoder().initial(), scores)) == ()
    assert ids(EXACT.advance(EXACT.initial(), scores)) == (1,)


def test_labels_outside_the_top_still_merge_into_kept_prefixes() -> None:
    """A narrow beam never holds a sequence twice and never counts more than all its alignments."""
    rng = np.random.default_rng(3)
    decoder = PrefixBeamDecoder(beam_size=3, top_tokens=2)
    for _ in range(40):
        log_probs = random_scores(rng, 5, 4, sharpness=1.5)
        want, state = enumerate_all(log_probs), decoder.initial()
        for frame in range(5):
            state = decoder.advance(state, FrameScores.from_log_probs(log_probs[frame : frame + 1]))
            assert len(beam_table(state)) <= 3
        assert all(0 < p <= want[sequence] * (1 + 1e-9) for sequence, p in beam_table(state).items())


def textbook_search(log_probs: np.ndarray, beam_size: int, top_tokens: int) -> dict[tuple[int, ...], float]:
    """Prefix beam search as the paper writes it down: a dictionary of label sequences, without any shortcut."""
    beam: dict[tuple[int, ...], tuple[float, float]] = {(): (1.0, 0.0)}
    for row in np.exp(log_probs.astype(np.float64)):
        top = set((np.argsort(-row[1:], kind="stable")[:top_tokens] + 1).tolist())
        grown: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for sequence, (blank, label) in beam.items():
            grown[sequence][0] += (blank + label) * row[0]
            if sequence:
                grown[sequence][1] += label * row[sequence[-1]]
            for new in range(1, len(row)):
                if new in top or (*sequence, new) in beam:
                    repeats = bool(sequence) and sequence[-1] == new
                    grown[(*sequence, new)][1] += (blank if repeats else blank + label) * row[new]
        best = sorted(grown, key=lambda sequence: -sum(grown[sequence]))[:beam_size]
        beam = {sequence: (grown[sequence][0], grown[sequence][1]) for sequence in best}
    return {sequence: sum(masses) for sequence, masses in beam.items()}


@pytest.mark.parametrize(("beam_size", "top_tokens"), [(1, 1), (2, 2), (4, 3), (8, 16)])
def test_narrow_beam_equals_the_textbook(beam_size: int, top_tokens: int) -> None:
    rng = np.random.default_rng(10)
    decoder = PrefixBeamDecoder(beam_size=beam_size, top_tokens=top_tokens)
    for sharpness in (0.3, 1.0, 2.0, 3.0):
        log_probs = random_scores(rng, 25, 20, sharpness)
        state = decoder.advance(decoder.initial(), FrameScores.from_log_probs(log_probs))
        assert_same(beam_table(state), textbook_search(log_probs, beam_size, top_tokens))


@pytest.mark.parametrize("beam_size", [1, 4, 8])
def test_beam_equals_greedy_on_confident_scores_times_included(beam_size: int) -> None:
    rng = np.random.default_rng(1)
    decoder = PrefixBeamDecoder(beam_size=beam_size)
    for _ in range(20):
        scores = peaked(np.where(rng.random(40) < 0.5, 0, rng.integers(1, 6, size=40)).tolist())
        greedy = GreedyDecoder().advance(GreedyDecoder().initial(), scores)
        beam = decoder.advance(decoder.initial(), scores)
        assert [(t.id, t.start_frame, t.end_frame) for t in beam.tokens()] == [
            (t.id, t.start_frame, t.end_frame) for t in greedy.tokens()
        ]
        assert [t.log_prob for t in beam.tokens()] == pytest.approx([t.log_prob for t in greedy.tokens()])
        assert beam.trailing_blank_frames == greedy.trailing_blank_frames


def test_a_weak_early_start_does_not_fix_the_time_of_a_later_spike() -> None:
    scores = np.full((6, 3), 0.01)
    scores[:, 0] = 0.98
    scores[1] = [0.7, 0.29, 0.01]
    scores[4] = [0.01, 0.98, 0.01]
    state = EXACT.advance(EXACT.initial(), FrameScores.from_log_probs(np.log(scores).astype(np.float32)))
    (token,) = state.tokens()
    assert (token.id, token.start_frame, token.end_frame) == (1, 4, 5)
    assert math.exp(token.log_prob) == pytest.approx(0.98, rel=1e-5)


def test_spans_never_overlap() -> None:
    rng = np.random.default_rng(8)
    decoder = PrefixBeamDecoder(beam_size=6, top_tokens=4)
    for _ in range(30):
        state = decoder.advance(decoder.initial(), FrameScores.from_log_probs(random_scores(rng, 40, 5, sharpness=2)))
        for hypothesis in state.hypotheses():
            edges = [edge for token in hypothesis.tokens for edge in (token.start_frame, token.end_frame)]
            assert edges == sorted(edges)
            assert all(t.start_frame < t.end_frame <= 40 and t.log_prob <= 0 for t in hypothesis.tokens)


def test_stable_tokens_are_the_common_prefix_and_stay() -> None:
    rng, decoder, seen = np.random.default_rng(5), PrefixBeamDecoder(beam_size=4, top_tokens=4), 0
    for _ in range(20):
        state = decoder.initial()
        stable: tuple[int, ...] = ()
        for _ in range(8):
            state = decoder.advance(state, FrameScores.from_log_probs(random_scores(rng, 4, 5, sharpness=3)))
            sequences = [tuple(t.id for t in h.tokens) for h in state.hypotheses()]
            count = state.num_stable_tokens
            assert len({s[:count] for s in sequences}) == 1
            assert len({s[: count + 1] for s in sequences}) > 1
            assert ids(state)[: len(stable)] == stable
            stable = ids(state)[:count]
        seen += len(stable)
    assert seen > 20


# -- every decoder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_chunks_equal_the_whole_at_any_split(decoder: Any) -> None:
    rng = np.random.default_rng(2)
    for _ in range(10):
        log_probs = random_scores(rng, 48, 12, sharpness=2.5)
        whole = decoder.advance(decoder.initial(), FrameScores.from_log_probs(log_probs))
        assert len(whole.tokens()) > 5
        state = decoder.initial()
        for part in np.split(log_probs, np.sort(rng.integers(0, 49, size=9))):  # some parts are empty
            state = decoder.advance(state, FrameScores.from_log_probs(part) if len(part) else peaked([], 12))
        assert state.tokens() == whole.tokens()
        assert state.num_frames == 48
        assert state.trailing_blank_frames == whole.trailing_blank_frames
        if isinstance(state, BeamState):
            assert state.hypotheses() == whole.hypotheses()


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_advancing_leaves_the_old_state_as_it_was(decoder: Any) -> None:
    rng = np.random.default_rng(4)
    first, left, right = (FrameScores.from_log_probs(random_scores(rng, 16, 8, 2.5)) for _ in range(3))
    base = decoder.advance(decoder.initial(), first)
    before = base.tokens()
    one = decoder.advance(base, left).tokens()
    decoder.advance(base, right).restart()
    assert base.tokens() == before
    assert decoder.advance(base, left).tokens() == one


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_no_tokens_before_speech(decoder: Any) -> None:
    state = decoder.advance(decoder.initial(), peaked([0, 0, 0]))
    assert (state.tokens(), state.has_tokens, state.num_stable_tokens) == ((), False, 0)
    assert (state.num_frames, state.trailing_blank_frames) == (3, 3)


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_restart_does_not_double_a_token_that_continues_but_allows_a_repeat(decoder: Any) -> None:
    state = decoder.advance(decoder.initial(), peaked([0, 1, 2, 2])).restart()
    assert not state.has_tokens
    assert state.num_frames == 4
    continued = decoder.advance(state, peaked([2, 0, 3]))
    assert [(t.id, t.start_frame, t.end_frame) for t in continued.tokens()] == [(3, 6, 7)]
    repeated = decoder.advance(state, peaked([0, 2, 0, 0]))
    assert [(t.id, t.start_frame, t.end_frame) for t in repeated.tokens()] == [(2, 5, 6)]
    silent = decoder.advance(state, peaked([2, 0, 0]))
    assert (silent.tokens(), silent.trailing_blank_frames) == ((), 2)


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_restart_at_every_cut_loses_and_doubles_nothing(decoder: Any) -> None:
    rng = np.random.default_rng(6)
    for _ in range(10):
        labels = np.where(rng.random(60) < 0.4, 0, rng.integers(1, 4, size=60)).tolist()
        whole = decoder.advance(decoder.initial(), peaked(labels))
        state = decoder.initial()
        collected: list[int] = []
        for at in range(0, 60, 6):
            state = decoder.advance(state, peaked(labels[at : at + 6]))
            collected += ids(state)
            state = state.restart()
        assert tuple(collected) == ids(whole)


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
@pytest.mark.parametrize("keep", [1, 2, 5])
def test_restart_can_keep_the_last_tokens(decoder: Any, keep: int) -> None:
    state = decoder.advance(decoder.initial(), peaked([1, 0, 2, 3, 3, 0, 4, 4]))
    kept = state.restart(keep_tokens=keep)
    assert kept.tokens() == state.tokens()[-keep:]
    assert kept.num_stable_tokens == min(keep, 4)
    after = decoder.advance(kept, peaked([4, 0, 4]))
    assert ids(after) == (1, 2, 3, 4, 4)[-keep - 1 :]
    assert after.tokens()[-2].end_frame == 9  # the kept token went on


def test_beam_restart_keeps_the_context_of_the_best_prefix_exactly() -> None:
    rng = np.random.default_rng(7)
    for _ in range(8):
        head, tail = random_scores(rng, 3, 3), random_scores(rng, 4, 3)
        state = EXACT.advance(EXACT.initial(), FrameScores.from_log_probs(head))
        best, probs = ids(state), np.exp(head.astype(np.float64))
        ends: dict[int, float] = defaultdict(float)  # mass of the best sequence by the label of its last frame
        for path in itertools.product(range(3), repeat=3):
            if collapse(path) == best:
                ends[path[-1]] += math.prod(row[label] for row, label in zip(probs, path, strict=True))
        total = sum(ends.values())
        want = enumerate_all(tail, {label: mass / total for label, mass in ends.items()})
        after = EXACT.advance(state.restart(), FrameScores.from_log_probs(tail))
        assert_same(beam_table(after), want)


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_a_token_seen_on_both_sides_of_a_depth_change_is_written_once(decoder: Any) -> None:
    state = decoder.advance(decoder.initial(), peaked([0, 0, 1, 0]))
    same_depth = decoder.advance(state, peaked([0, 1, 0, 2]))
    assert ids(same_depth) == (1, 1, 2)
    changed = decoder.advance(state, peaked([0, 1, 0, 2], depth_changed=True))
    assert [(t.id, t.start_frame, t.end_frame) for t in changed.tokens()] == [(1, 2, 6), (2, 7, 8)]
    assert ids(decoder.advance(state, peaked([0, 0, 1, 0], depth_changed=True))) == (1, 1)  # three blanks between
    assert ids(decoder.advance(state, peaked([2, 0, 1, 0], depth_changed=True))) == (1, 2, 1)  # another one between
    # repeats inside the new chunk are real ones
    assert ids(decoder.advance(state, peaked([2, 0, 2, 0], depth_changed=True))) == (1, 2, 2)
    # after a restart the token belongs to the text before it
    assert ids(decoder.advance(state.restart(), peaked([1, 0, 2, 0], depth_changed=True))) == (2,)
    off = type(decoder)(seam_frames=0)
    assert ids(off.advance(off.advance(off.initial(), peaked([0, 1, 0])), peaked([1, 0], depth_changed=True))) == (1, 1)


@pytest.mark.parametrize("decoder", DECODERS[:2], ids=str)
def test_an_hours_long_stream_needs_constant_memory(decoder: Any) -> None:
    rng = np.random.default_rng(9)
    chunks = [peaked(np.where(rng.random(8) < 0.6, 0, rng.integers(1, 6, size=8)).tolist()) for _ in range(10)]
    state = decoder.initial()

    def utterance(state: Any) -> Any:
        for chunk in chunks:
            state = decoder.advance(state, chunk)
        assert state.has_tokens
        return state.restart()

    tracemalloc.start()
    try:
        for _ in range(3):
            state = utterance(state)
        gc.collect()
        settled = tracemalloc.get_traced_memory()[0]
        for _ in range(15):
            state = utterance(state)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - settled < 20_000
    finally:
        tracemalloc.stop()


def test_a_very_long_utterance_neither_recurses_nor_prints_itself() -> None:
    frames = 4 * sys.getrecursionlimit()
    labels = np.tile([1, 2], frames)
    decoder = GreedyDecoder()
    state = decoder.advance(decoder.initial(), FrameScores(labels, np.zeros(len(labels))))
    assert len(state.tokens()) == len(labels)
    assert len(repr(state)) < 100
    assert state != decoder.initial()
    del state
    gc.collect()


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_nan_scores_are_an_error_that_names_the_frame(decoder: Any) -> None:
    scores = peaked([0, 1, 0])
    assert scores.log_probs is not None
    scores.log_probs[1] = np.nan
    scores.max_log_prob[1] = np.nan
    state = decoder.advance(decoder.initial(), peaked([0, 0]))
    with pytest.raises(EngineError, match="frame 3"):
        decoder.advance(state, scores)


def test_impossible_labels_are_no_error_but_a_frame_without_any_is() -> None:
    decoder = PrefixBeamDecoder()
    log_probs = np.full((3, 4), -np.inf, dtype=np.float32)
    log_probs[[0, 1, 2], [1, 1, 2]] = 0.0
    assert ids(decoder.advance(decoder.initial(), FrameScores.from_log_probs(log_probs))) == (1, 2)
    log_probs[1] = -np.inf
    with pytest.raises(EngineError, match="frame 1"):
        decoder.advance(decoder.initial(), FrameScores.from_log_probs(log_probs))


def test_wrong_options_and_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="beam_size"):
        PrefixBeamDecoder(beam_size=0)
    with pytest.raises(ConfigError, match="top_tokens"):
        PrefixBeamDecoder(top_tokens=0)
    with pytest.raises(ConfigError, match="seam_frames"):
        GreedyDecoder(seam_frames=-1)
    with pytest.raises(ConfigError, match="log_probs"):
        PrefixBeamDecoder().advance(PrefixBeamDecoder().initial(), FrameScores(np.zeros(2, int), np.zeros(2)))
    with pytest.raises(ConfigError, match=r"shape \(T,\)"):
        FrameScores(np.zeros(2, int), np.zeros(3))
    with pytest.raises(ConfigError, match=r"\(2, V\)"):
        FrameScores(np.zeros(2, int), np.zeros(2), np.zeros((3, 4)))
