"""From exits to text: what is settled, what deeper exits may still revise, and where an utterance ends."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from asr_exit.ctc import CtcDecoder, CtcState
from asr_exit.endpoint import EndpointRule
from asr_exit.words import Word, WordReader, split_stable, stable_word_count, text_from_words, words_from_tokens

if TYPE_CHECKING:
    from asr_exit.stream import Chunk


# Share of interim texts whose last word stayed as it was, by the blank frames after it; of 1,077 on read speech.
_LAST_WORD_STAYS = (0.51, 0.58, 0.72, 0.91, 0.92, 1.0)


class Caption(NamedTuple):
    """Text of the current utterance."""

    committed: str
    tail: str
    words: tuple[Word, ...]
    stability: float = 1.0  # how likely the text is to stay as it is; 0 without text


class Captions:
    """The text of one stream.

    Chunks whose answer is settled are folded into one decoder state. Later ones stay revisable: decoding goes on from
    the settled state over their latest scores, and is repeated when a deeper exit replaces them. Decoder states are
    immutable, so that costs nothing but the frames decoded again.
    """

    def __init__(self, decoder: CtcDecoder, pieces: Sequence[str], frame_ms: float) -> None:
        self._decoder, self._pieces, self._frame_ms = decoder, pieces, frame_ms
        self._settled: CtcState = decoder.initial()
        self._settled_exit: int | None = None
        self._revisable: deque[Chunk] = deque()
        self._viewed: tuple[tuple[object, ...], CtcState] | None = None  # what was decoded last, and the result
        self._reader = WordReader(pieces, frame_ms)
        self._read: tuple[CtcState, tuple[Word, ...]] | None = None
        self._settled_words: tuple[CtcState, int] | None = None  # a settled state and how many words it has
        self._began_frame = 0  # where the last final text ended

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
            chunk = self._revisable.popleft()
            self._settled = self._advance(self._settled, chunk, self._settled_exit)
            self._settled_exit = chunk.exit_index

    def _advance(self, state: CtcState, chunk: Chunk, exit_before: int | None) -> CtcState:
        if chunk.scores is None:
            return state
        frames = chunk.scores.frames
        if exit_before is not None and exit_before != chunk.exit_index:
            frames = replace(frames, depth_changed=True)
        return self._decoder.advance(state, frames)

    def _view(self) -> CtcState:
        self._fold()
        if not self._revisable:
            return self._settled
        key = (self._settled, *(chunk.exit_index for chunk in self._revisable))
        if self._viewed is None or self._viewed[0] != key:
            state, exit_index = self._settled, self._settled_exit
            for chunk in self._revisable:
                state, exit_index = self._advance(state, chunk, exit_index), chunk.exit_index
            self._viewed = (key, state)
        return self._viewed[1]

    def _words(self, state: CtcState) -> tuple[Word, ...]:
        if self._read is None or self._read[0] is not state:
            self._read = (state, self._reader.read(state.tokens()))
        return self._read[1]

    def _num_settled_words(self) -> int:
        if self._settled_words is None or self._settled_words[0] is not self._settled:
            words = words_from_tokens(self._settled.tokens(), self._pieces, self._frame_ms)
            self._settled_words = (self._settled, len(words))
        return self._settled_words[1]

    def caption(self) -> Caption:
        """Text so far: committed words cannot change any more, the tail can."""
        view = self._view()
        words = self._words(view)
        limit: int | None = None
        if self._revisable:
            limit = max(0, self._num_settled_words() - 1)
        elif view.num_stable_tokens < self._reader.num_tokens:
            limit = stable_word_count(view.tokens(), view.num_stable_tokens, self._pieces)
        committed, tail = split_stable(words, view.trailing_blank_frames, stable_words=limit)
        stability = _stability(words, tail if limit is not None else (), view.trailing_blank_frames)
        return Caption(text_from_words(committed), text_from_words(tail), words, stability)

    @property
    def has_words(self) -> bool:
        """Whether the utterance has begun to be spoken."""
        return self._view().has_tokens

    def silence_ms(self) -> float:
        """Silence since the last word of the utterance; before its first word, since the last final text."""
        view = self._view()
        silent_frames = view.trailing_blank_frames
        if not view.has_tokens:
            silent_frames = min(silent_frames, view.num_frames - self._began_frame)
        return silent_frames * self._frame_ms

    def utterance_ms(self) -> float:
        """Time from the first word to now; before it, since the last final text."""
        view = self._view()
        words = self._words(view)
        return view.num_frames * self._frame_ms - (words[0].start_ms if words else self._began_frame * self._frame_ms)

    def at_endpoint(self, rules: Iterable[EndpointRule]) -> bool:
        """Whether one of the rules ends the utterance here."""
        has_words, silence_ms = self.has_words, self.silence_ms()
        return any(
            rule.holds(contains_speech=has_words, silence_ms=silence_ms, utterance_ms=self.utterance_ms)
            for rule in rules
        )

    def take_final(self) -> Caption:
        """End the utterance: everything becomes final, the next one starts empty."""
        self.freeze()
        self._settled = self._settled.settle()
        words = self._words(self._settled)
        self._settled = self._settled.restart()
        self._began_frame = self._settled.num_frames
        return Caption(text_from_words(words), "", words)

    def take_all_but_last_word(self) -> Caption | None:
        """Final text of an over-long utterance; its last word, which may go on, opens the next one."""
        self.freeze()
        words = self._words(self._settled)
        if len(words) < 2:
            return None
        self._settled = self._settled.restart(keep_tokens=words[-1].num_tokens)
        return Caption(text_from_words(words[:-1]), "", words[:-1])


def _stability(words: Sequence[Word], revisable: Sequence[Word], trailing_blank_frames: int) -> float:
    """How likely an interim text is to stay: its last word may grow, deeper exits or the beam may change `revisable`.

    Words were changed less often than their posteriors say: the square root of those fits what was counted.
    """
    if not words:
        return 0.0
    grows = _LAST_WORD_STAYS[min(trailing_blank_frames, len(_LAST_WORD_STAYS) - 1)]
    return grows * math.sqrt(math.prod(word.confidence for word in revisable))
