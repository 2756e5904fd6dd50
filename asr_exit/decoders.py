"""From what a stream asks for to the decoder that does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from asr_exit.beam import PrefixBeamDecoder
from asr_exit.ctc import CtcDecoder, GreedyDecoder
from asr_exit.fusion import LanguageModelScorer
from asr_exit.scoring import Scorer, SumScorer

if TYPE_CHECKING:
    from asr_exit.stream import StreamOptions


def make_decoder(options: StreamOptions, pieces: Sequence[str]) -> CtcDecoder[Any]:
    """The decoder that a stream asks for; `pieces` are the tokenizer's, indexed by id."""
    if options.decoder == "greedy":
        return GreedyDecoder()
    scorers: list[Scorer[Any]] = []
    if options.language_model is not None:
        scorers.append(LanguageModelScorer(options.language_model, pieces))
    scorer = scorers[0] if len(scorers) == 1 else SumScorer(scorers) if scorers else None
    return PrefixBeamDecoder(beam_size=options.beam_size, scorer=scorer)
