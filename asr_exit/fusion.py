"""Fusion of a word language model into the prefix beam.

A word is scored when it is complete: when the next one begins, or the text ends. Until then a prefix carries what its
letters promise, the unigram probability of the likeliest word that begins with them (lookahead: Ortmanns,
Ney and Eiden, "Language-model look-ahead for large vocabulary speech recognition", ICSLP 1996), so that prefixes within
a word compete with those that have just paid for one. The promise is taken back when the word is complete. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from asr_exit.config import require
from asr_exit.ngram import NgramModel
from asr_exit.words import WORD_START


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """An n-gram model and how much it counts.

    A word w after the words h adds `weight` * ln P(w | h) + `word_bonus` to the log-probability of its prefix. A word
    that the model does not know counts as `<unk>` at e to the `-unknown_penalty` of its probability.

    Raises ConfigError when a number is out of range.
    """

    model: NgramModel
    weight: float = 0.4
    word_bonus: float = 1.0
    unknown_penalty: float = 20.0

    def __post_init__(self) -> None:
        require(0 <= self.weight <= 5, f"language model weight {self.weight:g} must be 0 to 5")
        require(-10 <= self.word_bonus <= 10, f"word bonus {self.word_bonus:g} must be -10 to 10")
        require(0 <= self.unknown_penalty <= 50, f"unknown_penalty={self.unknown_penalty:g} must be 0 to 50")


class FusionState(NamedTuple):
    """Complete words that the model looks back to, letters of the word begun, and what has been added for them."""

    context: tuple[int, ...]
    letters: str = ""
    promised: float = 0.0


class LanguageModelScorer:
    """See `asr_exit.scoring.Scorer`; words as `words_from_tokens` finds them."""

    def __init__(self, fusion: LanguageModel, pieces: Sequence[str]) -> None:
        """`pieces`: the tokenizer's, indexed by id."""
        self._fusion, self._model = fusion, fusion.model
        self._pieces = [(piece.startswith(WORD_START), piece.removeprefix(WORD_START)) for piece in pieces]

    def initial(self) -> FusionState:
        """See `Scorer`."""
        return FusionState(self._model.extend((), self._model.begin))

    def advance(self, state: FusionState, piece: int) -> tuple[FusionState, float]:
        """See `Scorer`."""
        begins, text = self._pieces[piece]
        context, letters, promised = state
        score = 0.0
        if begins and letters:
            score = self.finish(state)
            context, letters, promised = self._model.extend(context, self._model.index(letters)), "", 0.0
        letters += text
        promise = self._promise(letters) if letters else 0.0
        return FusionState(context, letters, promise), score + promise - promised

    def finish(self, state: FusionState) -> float:
        """See `Scorer`."""
        if not state.letters:
            return 0.0
        word = self._model.index(state.letters)
        log_prob = self._model.log_prob(state.context, word)
        if word == self._model.unknown:
            log_prob -= self._fusion.unknown_penalty
        return self._fusion.weight * log_prob + self._fusion.word_bonus - state.promised

    def continuations(self, state: FusionState) -> Iterable[int]:
        """See `Scorer`."""
        return ()

    def _promise(self, letters: str) -> float:
        log_prob = self._model.best_log_prob(letters)
        if log_prob == -math.inf:
            log_prob = self._model.log_prob((), self._model.unknown) - self._fusion.unknown_penalty
        return self._fusion.weight * log_prob + self._fusion.word_bonus
