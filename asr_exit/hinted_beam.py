"""CTC prefix beam search that prefers phrases it was told to expect."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from operator import itemgetter

from asr_exit.beam import BeamState, Prefix, PrefixBeamDecoder, stay, total_mass
from asr_exit.biasing import Match, PhraseTrie

_LARGEST_EXPONENT = 600.0  # of e; beyond it floats end


@dataclass(frozen=True)
class HintedBeamDecoder(PrefixBeamDecoder):
    """Ranks each prefix by its probability times e to the bonus of `asr_exit.biasing`; probabilities stay as they are.

    Pieces that would carry a match on may extend a prefix even when they are not among the frame's `top_tokens`.
    """

    trie: PhraseTrie = field(default_factory=lambda: PhraseTrie((), frozenset()))

    def initial(self) -> BeamState:
        state = super().initial()
        return replace(state, prefixes=(state.prefixes[0]._replace(match=self.trie.begin()),))

    def _step(
        self, prefixes: tuple[Prefix, ...], scale: float, row: list[float], labels: list[int], frame: int, seam: int
    ) -> tuple[Prefix, ...]:
        reference = _match(prefixes[0]).bonus

        def weight(match: Match) -> float:
            return math.exp(max(-_LARGEST_EXPONENT, min(_LARGEST_EXPONENT, match.bonus - reference)))

        masses = self.split_masses(prefixes, scale, frame, seam)
        # (rank, mass after this frame, prefix, label that extends it or -1, key and match of the extension)
        candidates: list[tuple[float, float, Prefix, int, int, Match]] = [
            (total_mass(same) * weight(_match(same)), 0.0, same, -1, same.key, _match(same))
            for same in stay(masses, row, frame)
        ]
        for prefix, total, repeating, _ in masses.values():
            match = _match(prefix)
            for label in {*labels, *match.continuations}:
                value = (repeating if label == prefix.label else total) * row[label]
                key = hash((prefix.key, label))
                if value > 0 and key not in masses:
                    after = self.trie.follow(match, label)
                    candidates.append((value * weight(after), value, prefix, label, key, after))
        candidates.sort(key=itemgetter(0), reverse=True)
        return tuple(
            prefix
            if label < 0
            else Prefix(0.0, value, label, key, prefix.key, prefix.chain(), frame, frame + 1, row[label], match)
            for _, value, prefix, label, key, match in candidates[: self.beam_size]
        )


def _match(prefix: Prefix) -> Match:
    assert prefix.match is not None, "every prefix of this decoder has one"
    return prefix.match
