"""Word error rate, and how sure one can be of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jiwer
import numpy as np

from asr_exit.errors import ConfigError


@dataclass(frozen=True, slots=True)
class WordErrors:
    """Edit counts over a set of utterances."""

    words: int
    substitutions: int
    insertions: int
    deletions: int

    @property
    def errors(self) -> int:
        return self.substitutions + self.insertions + self.deletions

    @property
    def rate(self) -> float:
        """Errors per reference word; may exceed 1. NaN when there are no reference words."""
        return self.errors / self.words if self.words else float("nan")

    def __add__(self, other: WordErrors) -> WordErrors:
        return WordErrors(
            self.words + other.words,
            self.substitutions + other.substitutions,
            self.insertions + other.insertions,
            self.deletions + other.deletions,
        )


def word_errors(reference: str, hypothesis: str) -> WordErrors:
    """Edits of one utterance; words are what spaces separate."""
    reference_words = len(reference.split())
    if reference_words == 0:
        return WordErrors(0, 0, len(hypothesis.split()), 0)
    counts = jiwer.process_words(reference, hypothesis)
    return WordErrors(reference_words, counts.substitutions, counts.insertions, counts.deletions)


def wer(references: Sequence[str], hypotheses: Sequence[str]) -> WordErrors:
    """Edits of a whole set.

    Raises:
        ConfigError: the two sequences differ in length.
    """
    _check_paired(references, hypotheses)
    total = WordErrors(0, 0, 0, 0)
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        total += word_errors(reference, hypothesis)
    return total


def bootstrap_interval(
    references: Sequence[str],
    hypotheses: Sequence[str],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the word error rate, resampling utterances.

    Returns:
        (low, high) rates at confidence `level`.
    Raises:
        ConfigError: lengths differ, nothing to resample, or `level` outside (0, 1).
    """
    _check_paired(references, hypotheses)
    if not references or not 0.0 < level < 1.0:
        raise ConfigError("bootstrap needs at least one utterance and a level between 0 and 1")
    each = [word_errors(reference, hypothesis) for reference, hypothesis in zip(references, hypotheses, strict=True)]
    errors = np.array([item.errors for item in each], dtype=np.float64)
    words = np.array([item.words for item in each], dtype=np.float64)
    return bootstrap((errors, words), _rate, level=level, resamples=resamples, seed=seed)


def bootstrap_reduction(
    references: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Relative reduction of the word error rate from `before` to `after`, resampling utterances in pairs.

    Returns:
        (reduction, low, high): 0.15 means 15 % fewer errors; a low above 0 means `after` is better at `level`.
    Raises:
        ConfigError: lengths differ, nothing to resample, no error to reduce, or `level` outside (0, 1).
    """
    _check_paired(references, before)
    _check_paired(references, after)
    if not references or not 0.0 < level < 1.0:
        raise ConfigError("bootstrap needs at least one utterance and a level between 0 and 1")
    errors = np.array(
        [[word_errors(r, text).errors for text in pair] for r, *pair in zip(references, before, after, strict=True)],
        dtype=np.float64,
    )
    if errors[:, 0].sum() == 0:
        raise ConfigError("there is no error to reduce")
    low, high = bootstrap(
        errors.T, lambda old, new: 1.0 - new / np.maximum(old, 1.0), level=level, resamples=resamples, seed=seed
    )
    return float(1.0 - errors[:, 1].sum() / errors[:, 0].sum()), low, high


def bootstrap_difference(
    ours: np.ndarray,
    theirs: np.ndarray,
    words: np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Word error rate of one setting minus that of another, from (N,) errors and words of the same utterances.

    Returns:
        (difference, low, high): a low above 0 means that `theirs` is better at `level`.
    """
    more = ours - theirs
    low, high = bootstrap((more, words), _rate, level=level, resamples=resamples, seed=seed)
    return float(more.sum() / max(1.0, words.sum())), low, high


def bootstrap(
    columns: Iterable[np.ndarray],
    statistic: Callable[..., np.ndarray],
    *,
    level: float,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """Percentile interval of a statistic of sums, resampling utterances: all columns in pairs.

    Args:
        columns: (N,) each, one number per utterance. statistic: takes their sums, (resamples,) each.
    """
    arrays = list(columns)
    picks = np.random.default_rng(seed).integers(0, len(arrays[0]), size=(resamples, len(arrays[0])))
    values = statistic(*(array[picks].sum(axis=1) for array in arrays))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _rate(errors: np.ndarray, words: np.ndarray) -> np.ndarray:
    return errors / np.maximum(words, 1.0)


def _check_paired(references: Sequence[str], hypotheses: Sequence[str]) -> None:
    if len(references) != len(hypotheses):
        raise ConfigError(f"{len(references)} references but {len(hypotheses)} hypotheses; give one for each")
