"""Words with times and confidence from CTC tokens, and the split into committed text and revisable tail."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from asr_exit.ctc import TokenSpan
from asr_exit.errors import ConfigError

WORD_START = "▁"


@dataclass(frozen=True, slots=True)
class Word:
    """One word; times in milliseconds of audio from the beginning of the stream, confidence in [0, 1].

    CTC marks where a token is recognised, not where its sound begins and ends, so times are good to about 100 ms.
    The words of an utterance share out all its tokens: `num_tokens` sums to their number.
    """

    text: str
    start_ms: float
    end_ms: float
    confidence: float
    num_tokens: int = 1


def words_from_tokens(tokens: Sequence[TokenSpan], pieces: Sequence[str], frame_ms: float) -> tuple[Word, ...]:
    """Group tokens into words.

    A piece that begins with "▁" begins a word; so does the first token, since an utterance can be cut inside a word.
    A bare "▁" that no letters follow makes no word; it is counted to the word before it (the first one: after it).
    Confidence is the geometric mean of the tokens' peak posteriors.

    Args:
        tokens: in time order.
        pieces: the tokenizer's pieces, indexed by token id.
        frame_ms: audio per encoder frame.

    Raises:
        ConfigError: a token id has no piece, i.e. the tokenizer does not belong to the model.
    """
    groups: list[tuple[str, list[TokenSpan]]] = []
    for token in tokens:
        if not 0 <= token.id < len(pieces):
            raise ConfigError(f"token {token.id} is not among {len(pieces)} pieces; use the model's own tokenizer")
        piece = pieces[token.id]
        if piece.startswith(WORD_START) or not groups:
            groups.append((piece.removeprefix(WORD_START), [token]))
        else:
            text, members = groups[-1]
            members.append(token)
            groups[-1] = (text + piece, members)
    words: list[Word] = []
    unclaimed = 0
    for text, members in groups:
        if text:
            mean = sum(token.log_prob for token in members) / len(members)
            start_ms, end_ms = members[0].start_frame * frame_ms, members[-1].end_frame * frame_ms
            words.append(Word(text, start_ms, end_ms, min(1.0, math.exp(mean)), unclaimed + len(members)))
            unclaimed = 0
        elif words:
            words[-1] = replace(words[-1], num_tokens=words[-1].num_tokens + len(members))
        else:
            unclaimed += len(members)
    return tuple(words)


class WordReader:
    """`words_from_tokens` for a text that grows: only the words that can have changed are made anew."""

    def __init__(self, pieces: Sequence[str], frame_ms: float) -> None:
        self._pieces, self._frame_ms = pieces, frame_ms
        self._tokens: tuple[TokenSpan, ...] = ()
        self._words: tuple[Word, ...] = ()
        self._ends: list[int] = []  # tokens up to and including each word

    @property
    def num_tokens(self) -> int:
        """Of all that was read."""
        return self._ends[-1] if self._ends else 0

    def read(self, tokens: tuple[TokenSpan, ...]) -> tuple[Word, ...]:
        """Words of `tokens`, the first of which are mostly the same objects as those read before. Errors as there."""
        ends = self._ends
        kept = bisect_left(ends, _num_equal(self._tokens, tokens), hi=max(0, len(ends) - 1))  # the last one may grow
        while kept and self._pieces[tokens[ends[kept - 1]].id] == WORD_START:
            kept -= 1  # a bare one may yet be counted to the word before it
        used = ends[kept - 1] if kept else 0
        new = words_from_tokens(tokens[used:], self._pieces, self._frame_ms)
        self._tokens, self._words = tokens, self._words[:kept] + new
        del ends[kept:]
        for word in new:
            used += word.num_tokens
            ends.append(used)
        return self._words


def _num_equal(before: tuple[TokenSpan, ...], after: tuple[TokenSpan, ...]) -> int:
    """How many leading tokens are equal. Mostly all but the newest, which comparing whole slices finds at once."""
    length = min(len(before), len(after))
    for guess in (length, length - 1, length - 2):
        if guess >= 0 and before[:guess] == after[:guess]:
            return guess
    return next(index for index in range(length) if before[index] != after[index])


def text_from_words(words: Iterable[Word]) -> str:
    """The words, one space between them."""
    return " ".join([word.text for word in words])


def stable_word_count(tokens: Sequence[TokenSpan], num_stable_tokens: int, pieces: Sequence[str]) -> int:
    """How many leading words the first `num_stable_tokens` tokens settle.

    If all tokens are stable, all words count: whether the last one may still grow is for `split_stable` to say.
    Otherwise the last word of the stable part is left out, because some hypothesis may continue it.
    """
    words = len(words_from_tokens(tokens[:num_stable_tokens], pieces, 1.0))
    return words if num_stable_tokens >= len(tokens) else max(0, words - 1)


def split_stable(
    words: Sequence[Word],
    trailing_blank_frames: int,
    *,
    min_blank_frames: int = 5,
    stable_words: int | None = None,
) -> tuple[tuple[Word, ...], tuple[Word, ...]]:
    """Split into (committed, tail).

    The last word is tail, since the next chunk may lengthen it, unless at least `min_blank_frames` blank frames
    followed it. `stable_words`, if given, limits the committed words further (beam search: see `stable_word_count`).
    """
    cut = len(words) if trailing_blank_frames >= min_blank_frames else max(0, len(words) - 1)
    if stable_words is not None:
        cut = min(cut, stable_words)
    return tuple(words[:cut]), tuple(words[cut:])
