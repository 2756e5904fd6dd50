"""Interpolated modified Kneser-Ney estimation of n-gram models, with sorted arrays instead of tables of strings.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (TR-10-98, Harvard, 1998). The
counts of shorter n-grams are numbers of different words before them; counts of counts give three discounts per length.
Pruned n-grams give their probability to their context's backoff weight, so every distribution sums to 1 at any pruning.
Shapes: M running words (sentence marks included), N_K n-grams of K words, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from asr_exit.arpa import word_type
from asr_exit.errors import ConfigError
from asr_exit.ngram import BEGIN, END, UNKNOWN, Level, NgramModel

_NEVER = -99 * np.log(10)  # of a sentence to begin within a sentence


@dataclass(frozen=True)
class Counts:
    """All different n-grams of one length, sorted by parent and word."""

    parent: np.ndarray  # (N,) row among those one word shorter
    word: np.ndarray  # (N,)
    suffix: np.ndarray  # (N,) row, among those one word shorter, of the n-gram without its first word
    raw: np.ndarray  # (N,) how often it occurs
    from_begin: np.ndarray  # (N,) bool, its first word is the mark of the sentence's beginning


def vocabulary(word_counts: Mapping[str, int], extra: Mapping[str, int], min_count: int) -> list[str]:
    """Sorted words that occur at least `min_count` times in the text or in `extra`, and the special ones."""
    kept = {word for word, count in word_counts.items() if count >= min_count}
    kept |= {word for word, count in extra.items() if count >= min_count}
    return sorted(kept | {BEGIN, END, UNKNOWN})


def count(stream: np.ndarray, begin: int, num_words: int, order: int) -> list[Counts]:
    """Counts of length 1 to `order`.

    Args:
        stream: (M,) int32 word numbers, each sentence between its two marks.
        begin: number of the mark at the beginning.
    """
    unigrams = np.bincount(stream, minlength=num_words)
    none = np.zeros(num_words, np.int64)
    everything = np.arange(num_words)
    found = [Counts(none, everything, none, unigrams, everything == begin)]
    row = stream.astype(np.int64)  # (M - k + 1,): row of the n-gram of k words that begins at each place; -1 = across
    for length in range(2, order + 1):
        last = stream[length - 1 :]
        valid = (row[: len(last)] >= 0) & (last != begin)
        keys = row[: len(last)][valid] * num_words + last[valid]
        unique, place, inverse, raw = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        del keys
        positions = np.flatnonzero(valid)[place]
        parent, word = np.divmod(unique, num_words)
        found.append(Counts(parent, word, row[positions + 1], raw, stream[positions] == begin))
        row = np.full(len(last), -1, np.int64)
        row[valid] = inverse.reshape(-1)
    return found


def discounts(adjusted: np.ndarray) -> np.ndarray:
    """(4,) what is taken off a count of 0, 1, 2, and 3 or more."""
    ones, twos, threes, fours = (int((adjusted == number).sum()) for number in (1, 2, 3, 4))
    if min(ones, twos, threes) == 0:
        return np.array([0.0, 0.5, 0.75, 0.9])  # too little text to estimate them
    share = ones / (ones + 2 * twos)
    found = [1 - 2 * share * twos / ones, 2 - 3 * share * threes / twos, 3 - 4 * share * fours / threes]
    return np.array([0.0, *np.clip(found, 0.05, [1.0, 2.0, 3.0])])


def estimate(
    stream: np.ndarray,
    words: Sequence[str],
    *,
    order: int = 3,
    prune: Sequence[int] = (),
    extra: Mapping[str, int] | None = None,
) -> NgramModel:
    """An n-gram model of a text.

    Args:
        stream, words: as from `read_text`.
        prune: for lengths 2, 3, ...: drop n-grams that occur at most so often; the last number counts for longer ones.
        extra: word counts of other text. They take the place of the uniform distribution below the unigrams.
    Raises:
        ConfigError: no text, or pruning thresholds that fall with the length.
    """
    thresholds = [0, *prune][:order]
    thresholds += [thresholds[-1]] * (order - len(thresholds))
    if sorted(thresholds) != thresholds or min(thresholds) < 0:
        raise ConfigError(f"pruning thresholds {list(prune)} must be 0 or more and must not fall with the length")
    if len(stream) < order:
        raise ConfigError("no text to count; give at least one sentence")
    begin, num_words = words.index(BEGIN), len(words)
    counts = count(stream, begin, num_words, order)
    adjusted = _adjusted(counts)
    adjusted[0][begin] = 0

    unseen = np.array([(extra or {}).get(word, 0) for word in words], np.float64) + 1.0
    unseen[begin] = 0.0
    off = discounts(adjusted[0])[np.minimum(adjusted[0], 3)]
    total = adjusted[0].sum()
    prob = [(adjusted[0] - off) / total + off.sum() / total * unseen / unseen.sum()]
    backoff: list[np.ndarray] = []
    kept_rows = [np.arange(num_words)]  # rows of `counts` that stay, per length
    for length in range(2, order + 1):
        level, value = counts[length - 1], adjusted[length - 1]
        above = len(counts[length - 2].word)
        totals = np.bincount(level.parent, value, above)
        off = discounts(value)[np.minimum(value, 3)]
        keep = level.raw > thresholds[length - 1]
        ahead = np.divide(value - off, totals[level.parent])
        left = 1.0 - np.bincount(level.parent[keep], ahead[keep], above)
        backoff.append(np.where(totals > 0, np.maximum(left, 1e-12), 1.0))
        prob.append(np.where(keep, ahead + backoff[-1][level.parent] * prob[-1][level.suffix], 0.0))
        kept_rows.append(np.flatnonzero(keep))
    return NgramModel(words, _levels(counts, kept_rows, prob, backoff, begin))


def _adjusted(counts: Sequence[Counts]) -> list[np.ndarray]:
    """Counts for estimation: raw ones of the longest n-grams and those at sentence beginnings, else words before."""
    found = []
    for level, longer in pairwise(counts):
        before = np.bincount(longer.suffix, minlength=len(level.raw))
        found.append(np.where(level.from_begin, level.raw, before))
    return [*found, counts[-1].raw]


def _levels(
    counts: Sequence[Counts],
    kept_rows: Sequence[np.ndarray],
    prob: Sequence[np.ndarray],
    backoff: Sequence[np.ndarray],
    begin: int,
) -> list[Level]:
    num_words = len(counts[0].word)
    levels: list[Level] = []
    for number, kept in enumerate(kept_rows):
        real = np.float32 if number == 0 else np.float16
        log_prob = np.log(np.maximum(prob[number][kept], 1e-40))
        if number == 0:
            log_prob[begin] = _NEVER
        weight = first = None
        if number + 1 < len(kept_rows):
            weight = np.log(backoff[number][kept]).astype(real)
            # parents are kept wherever a child is: an n-gram occurs at least as often as what it begins
            parents = counts[number + 1].parent[kept_rows[number + 1]]
            first = np.searchsorted(parents, np.append(kept, len(counts[number].word))).astype(np.uint32)
        word = None if number == 0 else counts[number].word[kept].astype(word_type(num_words))
        levels.append(Level(log_prob.astype(real), word, weight, first))
    return levels


def read_text(
    lines: Iterable[str], *, min_count: int = 2, extra: Mapping[str, int] | None = None
) -> tuple[np.ndarray, list[str], int]:
    """Sentences, one per line and normalised, to word numbers.

    Returns:
        (M,) int32 stream with a mark before and after each sentence; the sorted vocabulary; words without marks.
    """
    provisional: dict[str, int] = {BEGIN: 0, END: 1}
    chunks: list[np.ndarray] = []
    for line in lines:
        if line:
            numbers = [provisional.setdefault(word, len(provisional)) for word in line.split()]
            chunks.append(np.array([0, *numbers, 1], np.int32))
    stream = np.concatenate(chunks) if chunks else np.zeros(0, np.int32)
    occurrences = np.bincount(stream, minlength=len(provisional))
    word_counts = {word: int(occurrences[number]) for word, number in provisional.items()}
    words = vocabulary(word_counts, extra or {}, min_count)
    index = {word: number for number, word in enumerate(words)}
    renumber = np.array([index.get(word, index[UNKNOWN]) for word in provisional], np.int32)
    return renumber[stream], words, len(stream) - 2 * len(chunks)
