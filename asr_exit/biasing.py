"""Phrase hints: a bonus for label sequences that are being spelled out, taken back when they turn into something else.

Aho-Corasick without failure links, as phrases begin at word boundaries only: Zhao et al., "Shallow-Fusion End-to-End
Contextual Biasing" (Interspeech 2019). A match is a pure function of the labels so far, so prefixes of the beam that
merge agree about it. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from asr_exit.config import require

DEFAULT_BOOST, LARGEST_BOOST = 2.0, 20.0


@dataclass(frozen=True, slots=True)
class PhraseHint:
    """A phrase that is likely to be said. `boost` is added to the log-probability for each of its pieces.

    Raises ConfigError when the boost is not from -20 to 20. Negative ones make the phrase less likely.
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
    root: _Node
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

    @property
    def continuations(self) -> Iterable[int]:
        """Labels that would carry the match on."""
        return self.node.children.keys()


class PhraseTrie:
    """All hints of a stream as one tree of pieces."""

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

    def begin(self) -> Match:
        """Nothing said yet."""
        return Match(self._root, self._root)

    def follow(self, match: Match, label: int) -> Match:
        """The match after one more label."""
        starts_word = label in self._word_starts
        secured = match.node.bonus if match.node.ends_phrase and starts_word else match.secured
        child = match.node.children.get(label)
        if child is not None and match.node is not self._root:
            return Match(child, self._root, match.kept, secured)
        fresh = self._root.children.get(label) if starts_word else None
        return Match(fresh or self._root, self._root, match.kept + secured)


class PhraseScorer:
    """Hints as an `asr_exit.scoring.Scorer`: a prefix is ranked by its probability times e to the bonus of its match.

    Pieces that would carry a match on are tried even when they are not among the likely ones of a frame.
    """

    def __init__(self, trie: PhraseTrie) -> None:
        self._trie = trie

    def initial(self) -> Match:
        """See `Scorer`."""
        return self._trie.begin()

    def advance(self, state: Match, piece: int) -> tuple[Match, float]:
        """See `Scorer`."""
        after = self._trie.follow(state, piece)
        return after, after.bonus - state.bonus

    def finish(self, state: Match) -> float:
        """See `Scorer`: what was lent to a phrase that is not complete."""
        return state.final_bonus - state.bonus

    def continuations(self, state: Match) -> Iterable[int]:
        """See `Scorer`."""
        return state.continuations
