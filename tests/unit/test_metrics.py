"""Word errors against a hand-worked example, and intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from asr_exit.errors import ConfigError
from asr_exit.metrics import (
    WordErrors,
    bootstrap_difference,
    bootstrap_interval,
    bootstrap_reduction,
    wer,
    word_errors,
)


def test_hand_worked_example() -> None:
    # the -> a (substituted), on (deleted), now (inserted): no cheaper alignment exists
    errors = word_errors("the cat sat on the mat", "a cat sat the mat now")
    assert errors == WordErrors(words=6, substitutions=1, insertions=1, deletions=1)
    assert errors.errors == 3
    assert errors.rate == pytest.approx(0.5)


def test_set_rate_weighs_by_words() -> None:
    total = wer(["a", "b c d"], ["x", "b c d"])
    assert (total.errors, total.words) == (1, 4)
    assert total.rate == 0.25


def test_empty_reference_counts_insertions() -> None:
    assert word_errors("", "two words").insertions == 2
    assert math.isnan(word_errors("", "").rate)
    assert wer(["a", ""], ["a", "b"]).rate == 1.0


def test_empty_hypothesis_deletes_all() -> None:
    assert word_errors("a b", "").deletions == 2


def test_interval_holds_the_rate_and_shrinks_with_data() -> None:
    references, hypotheses = ["a b c d"] * 10, ["a b c d"] * 5 + ["a x c d"] * 5
    low, high = bootstrap_interval(references, hypotheses)
    assert low <= wer(references, hypotheses).rate <= high
    many_low, many_high = bootstrap_interval(references * 20, hypotheses * 20)
    assert many_high - many_low < high - low
    assert bootstrap_interval(references, hypotheses) == (low, high)  # seeded


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="one for each"):
        wer(["a"], [])
    with pytest.raises(ConfigError, match="at least one"):
        bootstrap_interval([], [])
    with pytest.raises(ConfigError, match="level"):
        bootstrap_interval(["a"], ["a"], level=1.0)


def test_bootstrap_reduction_is_paired() -> None:
    references = ["a b c d"] * 40
    before = ["a b x x", "a x x x"] * 20
    after = ["a b c x", "a b x x"] * 20  # always one error fewer
    reduction, low, high = bootstrap_reduction(references, before, after)
    assert reduction == pytest.approx(1 - 60 / 100)
    assert 0.33 < low <= reduction <= high < 0.5
    worse = bootstrap_reduction(references, after, before)
    assert worse[2] < 0
    with pytest.raises(ConfigError, match="no error"):
        bootstrap_reduction(references, references, after)
    with pytest.raises(ConfigError, match="references"):
        bootstrap_reduction(references, before[:3], after)


def test_bootstrap_difference_is_paired() -> None:
    rng = np.random.default_rng(0)
    theirs, words = rng.poisson(3, 300).astype(float), np.full(300, 10.0)
    found, low, high = bootstrap_difference(theirs + 1, theirs, words)  # always one error more
    assert (found, low, high) == pytest.approx((0.1, 0.1, 0.1))
    found, low, high = bootstrap_difference(rng.permutation(theirs), theirs, words)
    assert found == pytest.approx(0.0)
    assert low < 0 < high
