"""Phrase hints: a bonus for label sequences that are being spelled out, taken back when they turn into something else.

Aho-Corasick without failure links, as phrases begin at word boundaries only: Zhao et al., "Shallow-Fusion End-to-End
Contextual Biasing" (Interspeech 2019). A match is a pure function of the labels so far, so prefixes of the beam that
merge agree about it. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from asr_exit.config import require

DEFAULT_BOOST, LARGEST_BOOST = 2.0, 9.0  # the beam's pruning relies on pieces that gain no more: beam.LARGEST_GAIN


@dataclass(frozen=True, slots=True)
class PhraseHint:
    """A phrase that is likely to be said. `boost` is added to the log-probability for each of its pieces.

    Raises ConfigError when the boost is not from -9 to 9. Negative ones make the phrase less likely.
    """

    phrase: str
    boost: float = DEFAULT_BOOST

    def __post_init__(self) -> None:
        require(
            -LARGEST_BOOST <= self.boost <= LARGEST_BOOST,
            f"boost={self.boost:g} of phrase {self.phrase!r} must be from {-LARGEST_BOOST:g} to {LARGEST_BOOST:g}",
        )


@dataclass(eq=False, slots=True)
class _Node:
    """Where a match stands: `bonus` is that of all pieces from the root to here."""

    bonus: float = 0.0
    ends_phrase: bool = False
    children: dict[int, _Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Match:
    """How far the newest labels match, and what has been won for good."""

    node: _Node
    kept: float = 0.0  # of phrases that were said in full
    secured: float = 0.0  # part of the node's bonus that stays when the match breaks here: a shorter phrase in full

    @property
    def bonus(self) -> float:
        """What ranks the prefix now: open matches included."""
        return self.kept + self.node.bonus

    @property
    def final_bonus(self) -> float:
        """What is left when nothing follows: phrases said in full only."""
        return self.kept + (self.node.bonus if self.node.ends_phrase else self.secured)


class PhraseScorer:
    """All hints of a stream as one tree of pieces; see `asr_exit.scoring.Scorer`."""

    def __init__(self, hints: Iterable[tuple[Sequence[int], float]], word_starts: frozenset[int]) -> None:
        """Args:
        hints: pieces of each phrase, and the boost for each piece. Where phrases begin alike, the larger one counts.
        word_starts: the pieces that begin a word. Only before one of them, or at the end, has a phrase been said.
        """
        self._root = _Node()
        self._word_starts = word_starts
        for pieces, boost in hints:
            node = self._root
            for piece in pieces:
                bonus = node.bonus + boost
                node = node.children.setdefault(piece, _Node(bonus))
                node.bonus = max(node.bonus, bonus) if boost > 0 else node.bonus
            node.ends_phrase = node is not self._root

    def initial(self) -> Match:
        """See `Scorer`."""
        return Match(self._root)

    def advance(self, match: Match, label: int) -> tuple[Match, float]:
        """See `Scorer`."""
        after = self._follow(match, label)
        return after, after.bonus - match.bonus

    def finish(self, match: Match) -> float:
        """See `Scorer`: what is only begun is taken back."""
        return match.final_bonus - match.bonus

    def continuations(self, match: Match) -> Iterable[int]:
        """See `Scorer`: the pieces that would carry a match on."""
        return match.node.children.keys() if match.node is not self._root else ()

    def _follow(self, match: Match, label: int) -> Match:
        starts_word = label in self._word_starts
        secured = match.node.bonus if match.node.ends_phrase and starts_word else match.secured
        child = match.node.children.get(label)
        if child is not None and match.node is not self._root:
            return Match(child, match.kept, secured)
        fresh = self._root.children.get(label) if starts_word else None
        return Match(fresh or self._root, match.kept + secured)
