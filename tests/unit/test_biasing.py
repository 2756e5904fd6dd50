"""Phrase hints: won piece by piece, taken back when the match breaks, never counted twice."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from asr_exit.beam import PrefixBeamDecoder
from asr_exit.biasing import PhraseHint, PhraseScorer
from asr_exit.ctc import BLANK, FrameScores
from asr_exit.errors import ConfigError
from tests.unit.test_ctc import beam_table, enumerate_all, ids, peaked, random_scores

# Pieces of these tests: 1 "▁new", 2 "▁york", 3 "▁city", 4 "s", 5 "▁ham". 1, 2, 3 and 5 begin words.
NEW, YORK, CITY, S, HAM = 1, 2, 3, 4, 5
STARTS = frozenset({NEW, YORK, CITY, HAM})


def bonuses(scorer: PhraseScorer, *labels: int) -> list[tuple[float, float]]:
    """Bonus and final bonus after every label."""
    match, found = scorer.initial(), []
    for label in labels:
        match, _ = scorer.advance(match, label)
        found.append((match.bonus, match.final_bonus))
    return found


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ((NEW, YORK), [(2, 0), (4, 4)]),  # the first piece alone is only lent
        ((NEW, HAM), [(2, 0), (0, 0)]),  # taken back
        ((NEW, YORK, HAM), [(2, 0), (4, 4), (4, 4)]),  # said in full: kept
        ((NEW, YORK, S), [(2, 0), (4, 4), (0, 0)]),  # "yorks" is another word: taken back
        ((NEW, NEW, YORK), [(2, 0), (2, 0), (4, 4)]),  # a broken match may begin anew at once
        ((NEW, YORK, NEW, YORK), [(2, 0), (4, 4), (6, 4), (8, 8)]),  # said twice: won twice
        ((HAM, S), [(0, 0), (0, 0)]),
    ],
)
def test_by_hand(labels: tuple[int, ...], expected: list[tuple[float, float]]) -> None:
    assert bonuses(PhraseScorer([((NEW, YORK), 2.0)], STARTS), *labels) == expected


def test_a_phrase_within_a_longer_one_is_kept_when_the_longer_one_breaks() -> None:
    scorer = PhraseScorer([((NEW, YORK), 1.0), ((NEW, YORK, CITY, HAM), 1.0)], STARTS)
    assert bonuses(scorer, NEW, YORK, CITY, S) == [(1, 0), (2, 2), (3, 2), (2, 2)]
    assert bonuses(scorer, NEW, YORK, CITY, HAM) == [(1, 0), (2, 2), (3, 2), (4, 4)]


def test_negative_hints_make_a_phrase_less_likely() -> None:
    assert bonuses(PhraseScorer([((NEW, YORK), -1.5)], STARTS), NEW, YORK) == [(-1.5, 0), (-3, -3)]


def total_bonus(scorer: PhraseScorer, labels: tuple[int, ...]) -> float:
    return ([0.0] + [bonus for bonus, _ in bonuses(scorer, *labels)])[-1]


def decode(decoder: PrefixBeamDecoder, log_probs: np.ndarray, cut: int | None = None):
    state = decoder.initial()
    for part in np.split(log_probs, [cut] if cut else []):
        state = decoder.advance(state, FrameScores.from_log_probs(part))
    return state


@pytest.mark.parametrize("boost", [0.5, 2.0, -1.0])
def test_a_wide_beam_ranks_by_probability_times_bonus(boost: float) -> None:
    scorer = PhraseScorer([((1, 2), boost), ((3,), boost / 2)], frozenset({1, 3}))
    decoder = PrefixBeamDecoder(beam_size=10_000, top_tokens=1_000, scorer=scorer)
    for seed in range(4):
        log_probs = random_scores(np.random.default_rng(seed), 5, 4)
        want = enumerate_all(log_probs)
        state = decode(decoder, log_probs, cut=2)
        weighed = {labels: p * math.exp(total_bonus(scorer, labels)) for labels, p in want.items()}
        assert beam_table(state) == pytest.approx(weighed, rel=1e-9)
        assert ids(state) == max(weighed, key=weighed.__getitem__)
        final = {labels: p * math.exp(([(0, 0), *bonuses(scorer, *labels)])[-1][1]) for labels, p in want.items()}
        assert ids(state.settle()) == max(final, key=final.__getitem__)


def test_without_hints_it_is_the_plain_beam() -> None:
    log_probs = random_scores(np.random.default_rng(7), 30, 12)
    plain = decode(PrefixBeamDecoder(), log_probs)
    hinted = decode(PrefixBeamDecoder(scorer=PhraseScorer((), frozenset())), log_probs)
    assert [h.tokens for h in hinted.hypotheses()] == [h.tokens for h in plain.hypotheses()]


def test_a_hint_decides_between_two_that_sound_alike() -> None:
    probs = np.full((3, 6), 0.001)
    probs[0, NEW], probs[1, YORK], probs[1, HAM], probs[2, BLANK] = 0.99, 0.4, 0.59, 0.99
    scores = FrameScores.from_log_probs(np.log(probs).astype(np.float32))
    hinted = PrefixBeamDecoder(scorer=PhraseScorer([((NEW, YORK), 1.0)], STARTS))
    assert ids(PrefixBeamDecoder().advance(PrefixBeamDecoder().initial(), scores)) == (NEW, HAM)
    assert ids(hinted.advance(hinted.initial(), scores)) == (NEW, YORK)


def test_a_piece_below_the_top_is_found_when_a_hint_waits_for_it() -> None:
    probs = np.full((2, 6), 0.01)
    probs[0, NEW], probs[1, HAM], probs[1, YORK] = 0.95, 0.6, 0.3
    scores = FrameScores.from_log_probs(np.log(probs).astype(np.float32))
    decoder = PrefixBeamDecoder(top_tokens=1, scorer=PhraseScorer([((NEW, YORK), 3.0)], STARTS))
    assert ids(decoder.advance(decoder.initial(), scores)) == (NEW, YORK)


def test_what_is_only_begun_at_the_end_is_taken_back() -> None:
    """ "ham" is likelier than the first piece of the hint, which nothing follows."""
    probs = np.full((1, 6), 0.01)
    probs[0, HAM], probs[0, NEW] = 0.6, 0.3
    decoder = PrefixBeamDecoder(scorer=PhraseScorer([((NEW, YORK), 2.0)], STARTS))
    state = decoder.advance(decoder.initial(), FrameScores.from_log_probs(np.log(probs).astype(np.float32)))
    assert ids(state) == (NEW,)
    assert ids(state.settle()) == (HAM,)


def test_a_restart_forgets_what_was_won() -> None:
    decoder = PrefixBeamDecoder(scorer=PhraseScorer([((NEW, YORK), 5.0)], STARTS))
    state = decoder.advance(decoder.initial(), peaked([NEW, YORK, BLANK]))
    match = state.restart().prefixes[0].scored
    assert (match.bonus, match.final_bonus) == (0, 0)
    again = decoder.advance(state.restart(), peaked([BLANK, NEW, YORK]))
    assert ids(again) == (NEW, YORK)


def test_hours_of_hints_stay_finite() -> None:
    decoder = PrefixBeamDecoder(scorer=PhraseScorer([((NEW,), 9.0), ((YORK,), -9.0)], STARTS))
    state = decoder.initial()
    for chunk in itertools.repeat([NEW, BLANK, YORK, BLANK, NEW, BLANK], 100):
        state = decoder.advance(state, peaked(chunk))
    assert ids(state)[:3] == (NEW, NEW, NEW)  # what is discouraged so hard is not written
    assert math.isfinite(state.log_scale)


@pytest.mark.parametrize("boost", [9.1, -10.0, math.nan])
def test_a_boost_out_of_range(boost: float) -> None:
    with pytest.raises(ConfigError, match="from -9 to 9"):
        PhraseHint("a", boost)
