"""Knowledge beyond the acoustics that ranks the prefixes of a beam: language models, phrase hints.

A scorer reads pieces one by one. Its states are immutable and depend on nothing but the pieces since `initial`, so
prefixes of a beam that merge agree about them. Scores are natural logs, added to the log-probability of a prefix; what
`advance` returned on the way plus `finish` at the end is the score of the text, exactly. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

S = TypeVar("S")


class Scorer(Protocol[S]):
    """Options only; all progress is in the states."""

    def initial(self) -> S:
        """Before the first piece of an utterance."""

    def advance(self, state: S, piece: int) -> tuple[S, float]:
        """The state after one more piece, and what this piece adds."""

    def finish(self, state: S) -> float:
        """What is still to be added if nothing follows, e.g. for the word that the last pieces spell."""

    def continuations(self, state: S) -> Iterable[int]:
        """Pieces that may follow even when they are not among the likely ones of a frame; usually none."""


class SumScorer:
    """Several scorers at once; states are tuples of theirs."""

    def __init__(self, scorers: Sequence[Scorer[Any]]) -> None:
        self._scorers = tuple(scorers)

    def initial(self) -> tuple[Any, ...]:
        """See `Scorer`."""
        return tuple(scorer.initial() for scorer in self._scorers)

    def advance(self, state: tuple[Any, ...], piece: int) -> tuple[tuple[Any, ...], float]:
        """See `Scorer`."""
        steps = [scorer.advance(part, piece) for scorer, part in zip(self._scorers, state, strict=True)]
        return tuple(part for part, _ in steps), sum(score for _, score in steps)

    def finish(self, state: tuple[Any, ...]) -> float:
        """See `Scorer`."""
        return sum(scorer.finish(part) for scorer, part in zip(self._scorers, state, strict=True))

    def continuations(self, state: tuple[Any, ...]) -> Iterable[int]:
        """See `Scorer`."""
        return {
            piece for scorer, part in zip(self._scorers, state, strict=True) for piece in scorer.continuations(part)
        }
