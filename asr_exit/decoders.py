"""From what a stream asks for to the decoder that does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from asr_exit.beam import PrefixBeamDecoder
from asr_exit.biasing import PhraseScorer
from asr_exit.config import require
from asr_exit.ctc import CtcDecoder, GreedyDecoder
from asr_exit.fusion import LanguageModelScorer
from asr_exit.scoring import Scorer, SumScorer
from asr_exit.words import WORD_START

if TYPE_CHECKING:
    from asr_exit.stream import StreamOptions
    from asr_exit.tokenizer import Tokenizer


def make_decoder(options: StreamOptions, pieces: Sequence[str], tokenizer: Tokenizer | None = None) -> CtcDecoder[Any]:
    """The decoder that a stream asks for; `pieces` are the tokenizer's, indexed by id.

    Phrase hints need the tokenizer itself. Raises ConfigError when they cannot be used.
    """
    if options.decoder == "greedy":
        return GreedyDecoder()
    scorers: list[Scorer[Any]] = []
    if options.language_model is not None:
        scorers.append(LanguageModelScorer(options.language_model, pieces))
    if options.phrase_hints:
        scorers.append(_phrase_scorer(options, pieces, tokenizer))
    scorer = scorers[0] if len(scorers) == 1 else SumScorer(scorers) if scorers else None
    return PrefixBeamDecoder(beam_size=options.beam_size, scorer=scorer)


def _phrase_scorer(options: StreamOptions, pieces: Sequence[str], tokenizer: Tokenizer | None) -> PhraseScorer:
    require(tokenizer is not None, "this model holds its pieces, but not how to spell phrases: leave the hints out")
    assert tokenizer is not None
    hints = [(tokenizer.encode(hint.phrase), hint.boost) for hint in options.phrase_hints]
    for hint, (spelled, _) in zip(options.phrase_hints, hints, strict=True):
        require(bool(spelled), f"phrase hint {hint.phrase!r} holds no letter a to z: leave it out")
    starts = frozenset(index for index, piece in enumerate(pieces) if piece.startswith(WORD_START))
    return PhraseScorer(hints, starts)
