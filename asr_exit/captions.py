"""From exits to text: what is settled, what deeper exits may still revise, and where an utterance ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asr_exit.ctc import CtcDecoder, CtcState, Word, split_stable, text_from_words, words_from_tokens

if TYPE_CHECKING:
    from asr_exit.stream import Chunk


@dataclass(frozen=True)
class Caption:
    """Text of the current utterance."""

    committed: str
    tail: str
    words: tuple[Word, ...]

    @property
    def confidence(self) -> float:
        """Mean word confidence; 0 without words."""
        return sum(word.confidence for word in self.words) / len(self.words) if self.words else 0.0


class Captions:
    """The text of one stream.

    Chunks whose answer is settled are folded into one decoder state. Later ones stay revisable: decoding goes on from
    the settled state over their latest scores, and is repeated when a deeper exit replaces them. Decoder states are
    immutable, so that costs nothing but the frames decoded again.
    """

    def __init__(self, decoder: CtcDecoder, pieces: Sequence[str], frame_ms: float) -> None:
        self._decoder, self._pieces, self._frame_ms = decoder, pieces, frame_ms
        self._settled: CtcState = decoder.initial()
        self._settled_chunks = 0
        self._revisable: deque[Chunk] = deque()
        self._words_of: tuple[CtcState, tuple[Word, ...]] | None = None

    def add(self, chunk: Chunk) -> None:
        """Take the next chunk, in order."""
        self._revisable.append(chunk)

    @property
    def revisable(self) -> bool:
        """Whether a deeper exit could still change text."""
        self._fold()
        return bool(self._revisable)

    def freeze(self) -> None:
        """Settle every chunk as it is."""
        for chunk in self._revisable:
            chunk.settled = True
        self._fold()

    def _fold(self) -> None:
        while self._revisable and self._revisable[0].settled:
            self._settled = self._advance(self._settled, self._revisable.popleft())

    def _advance(self, state: CtcState, chunk: Chunk) -> CtcState:
        return state if chunk.scores is None else self._decoder.advance(state, chunk.scores.frames)

    def _view(self) -> CtcState:
        self._fold()
        state = self._settled
        for chunk in self._revisable:
            state = self._advance(state, chunk)
        return state

    def _words(self, state: CtcState) -> tuple[Word, ...]:
        if self._words_of is None or self._words_of[0] is not state:
            self._words_of = (state, words_from_tokens(state.tokens(), self._pieces, self._frame_ms))
        return self._words_of[1]

    def caption(self) -> Caption:
        """Text so far: committed words cannot change any more, the tail can."""
        view = self._view()
        words = self._words(view)
        if self._revisable:
            stable = [word for word in self._words(self._settled)[:-1]]
            stable_count = len(stable) if tuple(stable) == words[: len(stable)] else 0
        else:
            stable_count = len(split_stable(words, view.trailing_blank_frames)[0])
        return Caption(text_from_words(words[:stable_count]), text_from_words(words[stable_count:]), words)

    def silence_ms(self) -> float:
        """Silence since the last word of the utterance; 0 before its first word."""
        view = self._view()
        return view.trailing_blank_frames * self._frame_ms if view.tokens() else 0.0

    def utterance_ms(self) -> float:
        """Time from the first word to now; 0 before it."""
        view = self._view()
        tokens = view.tokens()
        return (view.num_frames - tokens[0].start_frame) * self._frame_ms if tokens else 0.0

    def take_final(self) -> Caption:
        """End the utterance: everything becomes final, the next one starts empty."""
        self.freeze()
        words = self._words(self._settled)
        self._settled = self._settled.restart()
        return Caption(text_from_words(words), "", words)

    def take_all_but_last_word(self) -> Caption | None:
        """Final text of an over-long utterance; its last word, which may go on, opens the next one."""
        self.freeze()
        words = self._words(self._settled)
        if len(words) < 2:
            return None
        self._settled = self._settled.restart(keep_tokens=words[-1].num_tokens)
        return Caption(text_from_words(words[:-1]), "", words[:-1])
