"""Scorers in the beam: exact bookkeeping against brute force, endings, restarts, pieces that a scorer waits for."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest

from asr_exit.arpa import read_arpa
from asr_exit.beam import PrefixBeamDecoder
from asr_exit.ctc import FrameScores, TokenSpan
from asr_exit.decoders import make_decoder
from asr_exit.errors import ConfigError
from asr_exit.fusion import LanguageModel, LanguageModelScorer
from asr_exit.scoring import SumScorer
from asr_exit.stream import StreamOptions
from asr_exit.words import words_from_tokens
from tests.unit.arpa_text import ARPA, parse, textbook_log_prob
from tests.unit.test_ctc import beam_table, enumerate_all, ids, random_scores

PIECES = ("<unk>", "▁a", "b", "▁", "▁ba")  # 0 is the blank; "b" may go on with a word or begin the first one
WEIGHT, BONUS, PENALTY = 0.7, 0.6, 2.5


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    path = tmp_path_factory.mktemp("lm") / "small.arpa"
    path.write_text(ARPA)
    return LanguageModel(read_arpa(path), WEIGHT, BONUS, PENALTY)


@pytest.fixture(scope="module")
def scorer(fusion: LanguageModel) -> LanguageModelScorer:
    return LanguageModelScorer(fusion, PIECES)


def exact(scorer: object) -> PrefixBeamDecoder:
    return PrefixBeamDecoder(beam_size=10_000, top_tokens=1_000, scorer=scorer)  # type: ignore[arg-type]


def words_of(sequence: Iterable[int]) -> list[str]:
    spans = [TokenSpan(label, frame, frame + 1, 0.0) for frame, label in enumerate(sequence)]
    return [word.text for word in words_from_tokens(spans, PIECES, 80)]


def textbook_score(words: list[str]) -> float:
    """Of a text whose last word is complete."""
    table, context, total = parse(ARPA), ("<s>",), 0.0
    for word in words:
        penalty = 0.0 if (word,) in table else PENALTY
        total += WEIGHT * (textbook_log_prob(table, context, word) - penalty) + BONUS
        context = (*context, word)
    return total


def test_scores_of_every_text_equal_brute_force_at_any_split(scorer: LanguageModelScorer) -> None:
    rng = np.random.default_rng(0)
    decoder = exact(scorer)
    unknown = 0
    for split in range(6):
        log_probs = random_scores(rng, 5, len(PIECES), sharpness=1.5)
        state = decoder.initial()
        for part in np.split(log_probs, [split]):
            state = decoder.advance(state, FrameScores.from_log_probs(part))
        found = beam_table(state.settle())
        want = enumerate_all(log_probs)
        assert set(found) == set(want)
        for sequence, probability in want.items():
            words = words_of(sequence)
            unknown += "abb" in words
            score = textbook_score(words)
            assert math.log(found[sequence]) == pytest.approx(math.log(probability) + score, abs=6e-3), words
    assert unknown > 20


def test_a_narrow_beam_keeps_the_accounts_of_what_it_keeps(scorer: LanguageModelScorer) -> None:
    """Pruning loses alignments, never scores: each kept text weighs at most what brute force gives it."""
    rng = np.random.default_rng(1)
    decoder = PrefixBeamDecoder(beam_size=4, top_tokens=3, scorer=scorer)
    for _ in range(10):
        log_probs = random_scores(rng, 6, len(PIECES), sharpness=2.5)
        want = enumerate_all(log_probs)
        state = decoder.advance(decoder.initial(), FrameScores.from_log_probs(log_probs)).settle()
        for sequence, value in beam_table(state).items():
            assert math.log(value) <= math.log(want[sequence]) + textbook_score(words_of(sequence)) + 6e-3


def test_the_last_word_counts_when_the_text_ends_and_can_change_it(scorer: LanguageModelScorer) -> None:
    # the letters promise more for "a" than for "ba", but "ba" is the likelier first word of a sentence
    scores = FrameScores.from_log_probs(np.log(np.array([[0.02, 0.5, 0.02, 0.01, 0.45]], np.float32)))
    decoder = exact(scorer)
    state = decoder.advance(decoder.initial(), scores)
    assert (words_of(ids(state)), words_of(ids(state.settle()))) == (["a"], ["ba"])
    assert ids(state.settle().restart()) == ()
    assert words_of(ids(state)) == ["a"]  # the state itself stays as it was


def test_after_a_final_the_model_begins_again_and_after_a_cut_it_goes_on(scorer: LanguageModelScorer) -> None:
    rng = np.random.default_rng(3)
    decoder = exact(scorer)
    head, tail = random_scores(rng, 4, len(PIECES), 4.0), random_scores(rng, 4, len(PIECES), 1.0)
    state = decoder.advance(decoder.initial(), FrameScores.from_log_probs(head)).settle()
    fresh = decoder.advance(state.restart(), FrameScores.from_log_probs(tail)).settle()
    plain = PrefixBeamDecoder(beam_size=10_000, top_tokens=1_000)
    context = plain.advance(plain.initial(), FrameScores.from_log_probs(head))
    chosen = context.prefixes[list(beam_table(context)).index(ids(state))]
    without = type(context)(context.num_frames, (chosen,), 0.0).restart()
    acoustic = beam_table(plain.advance(without, FrameScores.from_log_probs(tail)))
    for sequence, value in beam_table(fresh).items():
        want = math.log(acoustic[sequence]) + textbook_score(words_of(sequence))
        assert math.log(value) == pytest.approx(want, abs=6e-3)

    sounds = [1, 0, 3, 4, 0]  # "a", then "ba" after a bare word mark
    probs = np.full((len(sounds), 5), 1e-6)
    probs[np.arange(len(sounds)), sounds] = 1.0
    spoken = decoder.advance(decoder.initial(), FrameScores.from_log_probs(np.log(probs).astype(np.float32)))
    cut = spoken.restart(keep_tokens=1)  # "ba" opens the next text, "a" is still before it
    assert ids(cut) == (4,)
    more = np.full((1, 5), 1e-9)
    more[0, 1] = 1.0
    after = decoder.advance(cut, FrameScores.from_log_probs(np.log(more).astype(np.float32))).settle()
    table = parse(ARPA)
    words = [(("<s>", "a"), "ba"), (("a", "ba"), "a")]
    score = sum(WEIGHT * textbook_log_prob(table, *word) + BONUS for word in words)
    promised = scorer.advance(scorer.advance(scorer.initial(), 1)[0], 4)[0].promised
    assert after.hypotheses()[0].log_prob == pytest.approx(score - promised, abs=6e-3)


class Wish:
    """Wants piece 2 after piece 1, at a bonus that is taken back when the text ends before it."""

    def initial(self) -> int:
        return 0

    def advance(self, state: int, piece: int) -> tuple[int, float]:
        return (1, 1.0) if piece == 1 else (0, 3.0) if state == 1 and piece == 2 else (0, -1.0 * state)

    def finish(self, state: int) -> float:
        return -1.0 * state

    def continuations(self, state: int) -> Iterable[int]:
        return (2,) if state == 1 else ()


def test_awaited_pieces_are_tried_and_open_bonuses_fall_at_the_end() -> None:
    probs = np.array([[0.02, 0.9, 0.02, 0.03, 0.03], [0.3, 0.005, 0.045, 0.32, 0.33]], np.float32)
    scores = FrameScores.from_log_probs(np.log(probs))
    narrow = PrefixBeamDecoder(beam_size=8, top_tokens=2)
    assert (1, 2) not in beam_table(narrow.advance(narrow.initial(), scores))
    wishing = PrefixBeamDecoder(beam_size=8, top_tokens=2, scorer=Wish())
    state = wishing.advance(wishing.initial(), scores)
    assert ids(state) == (1, 2)
    before, after = beam_table(state), beam_table(state.settle())
    assert math.log(before[1,] / after[1,]) == pytest.approx(1.0)
    assert before[1, 2] == pytest.approx(after[1, 2])


def test_several_scorers_add_up(scorer: LanguageModelScorer) -> None:
    both = SumScorer([scorer, Wish()])
    rng = np.random.default_rng(5)
    log_probs = random_scores(rng, 4, len(PIECES))
    tables = []
    for one in (both, scorer, Wish(), None):
        decoder = exact(one)
        tables.append(beam_table(decoder.advance(decoder.initial(), FrameScores.from_log_probs(log_probs)).settle()))
    for sequence, value in tables[0].items():
        with_lm, with_wish, alone = (math.log(table[sequence]) for table in tables[1:])
        assert math.log(value) == pytest.approx(with_lm + with_wish - alone)
    state = both.advance(both.initial(), 1)[0]
    assert set(both.continuations(state)) == {2}


def test_options_choose_the_decoder_and_wrong_ones_are_refused(fusion: LanguageModel) -> None:
    decoder = make_decoder(StreamOptions(decoder="beam", beam_size=5, language_model=fusion), PIECES)
    assert isinstance(decoder, PrefixBeamDecoder)
    assert (decoder.beam_size, isinstance(decoder.scorer, LanguageModelScorer)) == (5, True)
    assert make_decoder(StreamOptions(decoder="beam"), PIECES).scorer is None
    with pytest.raises(ConfigError, match="decoder='beam'"):
        StreamOptions(language_model=fusion)
    for wrong in ({"weight": -1}, {"word_bonus": 99}, {"unknown_penalty": -1}):
        with pytest.raises(ConfigError):
            LanguageModel(fusion.model, **wrong)
