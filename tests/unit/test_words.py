"""Words from tokens, and what of them is settled."""

from __future__ import annotations

import math
import random

import pytest

from asr_exit.ctc import TokenSpan
from asr_exit.errors import ConfigError
from asr_exit.words import WordReader, split_stable, stable_word_count, text_from_words, words_from_tokens

PIECES = ("<blk>", "▁the", "▁cat", "s", "▁", "▁a")


def spans(*labels: int) -> tuple[TokenSpan, ...]:
    """One token per label at frames 0, 2, 4, ..., with posteriors 1/2, 1/3, ..."""
    return tuple(TokenSpan(label, 2 * at, 2 * at + 1, -math.log(at + 2)) for at, label in enumerate(labels))


def test_words_have_text_times_and_geometric_mean_confidence() -> None:
    words = words_from_tokens(spans(1, 2, 3), PIECES, 80.0)
    assert text_from_words(words) == "the cats"
    assert [(w.start_ms, w.end_ms, w.num_tokens) for w in words] == [(0, 80, 1), (160, 400, 2)]
    assert [w.confidence for w in words] == pytest.approx([1 / 2, math.sqrt(1 / 12)])
    assert words_from_tokens((), PIECES, 80.0) == ()


@pytest.mark.parametrize(
    ("labels", "text", "counts"),
    [
        ((3, 1), "s the", [1, 1]),  # cut inside a word
        ((4, 3, 1), "s the", [2, 1]),  # bare mark, then letters
        ((1, 4), "the", [2]),  # a bare mark makes no word but stays counted
        ((4, 1), "the", [2]),
        ((1, 4, 4, 2), "the cat", [3, 1]),
        ((4,), "", []),
    ],
)
def test_bare_word_marks(labels: tuple[int, ...], text: str, counts: list[int]) -> None:
    words = words_from_tokens(spans(*labels), PIECES, 80.0)
    assert text_from_words(words) == text
    assert [word.num_tokens for word in words] == counts


def test_a_growing_text_reads_as_one_that_is_read_anew() -> None:
    rng = random.Random(7)
    reader, tokens = WordReader(PIECES, 80.0), ()
    for _ in range(300):
        # the newest token is mostly another object
        kept = tokens[: rng.choice((len(tokens), len(tokens) - 1, len(tokens) - 1, rng.randint(0, len(tokens))))]
        at = len(kept)
        new = spans(*(rng.randint(1, 5) for _ in range(at + rng.randint(0, 3))))[at:]
        tokens = kept + new
        assert reader.read(tokens) == words_from_tokens(tokens, PIECES, 80.0)


def test_a_foreign_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="token 9"):
        words_from_tokens(spans(1, 9), PIECES, 80.0)


def test_the_last_word_is_tail_until_silence_follows() -> None:
    words = words_from_tokens(spans(1, 2, 3), PIECES, 80.0)
    assert split_stable(words, 0) == (words[:1], words[1:])
    assert split_stable(words, 4, min_blank_frames=5) == (words[:1], words[1:])
    assert split_stable(words, 5, min_blank_frames=5) == (words, ())
    assert split_stable(words, 99, stable_words=1) == (words[:1], words[1:])
    assert split_stable((), 99) == ((), ())


def test_words_that_another_hypothesis_may_continue_are_not_stable() -> None:
    tokens = spans(1, 2, 3, 5)  # the cat|s a
    assert [stable_word_count(tokens, count, PIECES) for count in range(5)] == [0, 0, 1, 1, 3]
