"""CTC decoding: frame scores, immutable states that branch in O(1), and the greedy decoder.

A state is immutable: advancing it returns a new one and leaves the old one valid, so a stream can keep the state before
a chunk, show a shallow partial, and later decode the same chunk again from a deeper exit. Finished tokens sit in a
linked list that all descendants share; nothing is ever copied. `restart()` cuts that list after a final, so memory in
a stream of hours is bounded by its longest utterance.

CTC: Graves et al., "Connectionist temporal classification", ICML 2006. Prefix beam search is in `asr_exit.beam`,
words in `asr_exit.words`. Shapes: T frames, V vocabulary. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from asr_exit.errors import ConfigError, EngineError

BLANK = 0

S = TypeVar("S")


@dataclass(frozen=True, slots=True, eq=False)
class FrameScores:
    """What one exit says about one chunk of one stream.

    Attributes:
        ids: (T,) int64, the most likely label of each frame.
        max_log_prob: (T,) float32, its natural-log posterior.
        log_probs: (T, V) float32, normalised log posteriors, or None when no beam decoder asked for them.
        depth_changed: this chunk was scored by another exit than the frames before it; see `GreedyDecoder`.

    Raises:
        ConfigError: the shapes do not belong together.
    """

    ids: np.ndarray
    max_log_prob: np.ndarray
    log_probs: np.ndarray | None = None
    depth_changed: bool = False

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.shape != self.max_log_prob.shape:
            raise ConfigError(
                f"ids {self.ids.shape} and max_log_prob {self.max_log_prob.shape} must both have shape (T,)"
            )
        if self.log_probs is not None and (self.log_probs.ndim != 2 or len(self.log_probs) != len(self.ids)):
            raise ConfigError(f"log_probs {self.log_probs.shape} must have shape ({len(self.ids)}, V)")

    @classmethod
    def from_log_probs(cls, log_probs: np.ndarray, *, depth_changed: bool = False) -> FrameScores:
        """Scores from (T, V) log posteriors; they are kept, so both decoders can use the result."""
        ids = log_probs.argmax(axis=1)
        best = np.take_along_axis(log_probs, ids[:, None], axis=1)[:, 0]
        return cls(ids, best, log_probs, depth_changed)


class TokenSpan(NamedTuple):  # not a frozen dataclass, nor is `GreedyState`: making one takes a third of the time
    """One emitted token: frames `start_frame` (inclusive) to `end_frame` (exclusive), absolute in the stream.

    `log_prob` is the token's natural-log posterior at its peak frame.
    """

    id: int
    start_frame: int
    end_frame: int
    log_prob: float


@dataclass(slots=True, eq=False, repr=False)  # not frozen for the same reason; nobody changes one
class TokenCell:
    """A finished token and everything before it. Not comparable or printable: chains can be very long.

    `count` tokens up to and including this one; `key` identifies the label sequence (beam search only).
    """

    span: TokenSpan
    previous: TokenCell | None
    count: int
    key: int = 0

    @classmethod
    def push(cls, previous: TokenCell | None, span: TokenSpan, key: int = 0) -> TokenCell:
        """`previous` with one more token."""
        return cls(span, previous, (previous.count if previous is not None else 0) + 1, key)


def unroll(cell: TokenCell | None, last: TokenSpan | None = None) -> tuple[TokenSpan, ...]:
    """All spans of a chain in time order, followed by `last` if given."""
    spans = [] if last is None else [last]
    while cell is not None:
        spans.append(cell.span)
        cell = cell.previous
    spans.reverse()
    return tuple(spans)


def chain_of(spans: Sequence[TokenSpan]) -> TokenCell | None:
    """A new chain that holds `spans` and nothing before them."""
    cell = None
    for span in spans:
        cell = TokenCell.push(cell, span)
    return cell


class CtcState(Protocol):
    """Immutable decoding state after `num_frames` frames of a stream."""

    @property
    def num_frames(self) -> int:
        """Frames consumed since the stream began; `restart` does not reset it."""

    @property
    def trailing_blank_frames(self) -> int:
        """Frames since the last token ended (since the stream began, if there was none); `restart` keeps it."""

    @property
    def has_tokens(self) -> bool:
        """Whether `tokens()` is not empty, in O(1)."""

    @property
    def num_stable_tokens(self) -> int:
        """How many leading tokens no future frame can change."""

    def tokens(self) -> tuple[TokenSpan, ...]:
        """Tokens of the best hypothesis since the last `restart`."""

    def settle(self) -> CtcState:
        """The state to read a final text from: as if nothing followed."""

    def restart(self, keep_tokens: int = 0) -> CtcState:
        """The same CTC context with only the last `keep_tokens` tokens; used after a final.

        A token that continues across the cut is not emitted again.
        """


class CtcDecoder(Protocol[S]):
    """Turns frame scores into tokens; holds options only, all progress is in the state."""

    def initial(self) -> S:
        """State of a new stream."""

    def advance(self, state: S, scores: FrameScores) -> S:
        """State after the frames of `scores`; `state` stays as it is."""


def check_not_nan(values: list[float], first_frame: int) -> None:
    """Raise EngineError if `values`, one per frame from `first_frame`, hold a NaN."""
    if math.isnan(sum(values)):
        at = first_frame + next((i for i, value in enumerate(values) if math.isnan(value)), 0)
        raise EngineError(f"the model's score of frame {at} is not a number; close the stream and open a new one")


class GreedyState(NamedTuple):
    """Best-path state. The newest token stays open, because the next frame may still belong to it.

    `label` is the newest label, BLANK if there was none; its last frame is `label_end - 1`. `start` is the first
    frame of the open token, or -1 when `label` belongs to the text before a `restart` (or to nothing).
    """

    num_frames: int = 0
    closed: TokenCell | None = None
    label: int = BLANK
    label_end: int = 0
    start: int = -1
    peak_log_prob: float = -math.inf

    @property
    def trailing_blank_frames(self) -> int:
        return self.num_frames - self.label_end

    @property
    def has_tokens(self) -> bool:
        return self.start >= 0

    @property
    def num_stable_tokens(self) -> int:
        return (self.closed.count if self.closed is not None else 0) + self.has_tokens

    def tokens(self) -> tuple[TokenSpan, ...]:
        if self.start < 0:
            return ()
        return unroll(self.closed, TokenSpan(self.label, self.start, self.label_end, self.peak_log_prob))

    def settle(self) -> GreedyState:
        return self

    def restart(self, keep_tokens: int = 0) -> GreedyState:
        if keep_tokens <= 0 or self.start < 0:
            return GreedyState(self.num_frames, None, self.label, self.label_end)
        kept = self.tokens()[-keep_tokens:]
        return self._replace(closed=chain_of(kept[:-1]))

    def __repr__(self) -> str:
        return f"GreedyState(num_frames={self.num_frames}, num_tokens={self.num_stable_tokens}, label={self.label})"


@dataclass(frozen=True)
class GreedyDecoder:
    """Best-path CTC: the most likely label of each frame, repeats collapsed, blanks dropped.

    Exits place the spike of a token a frame or so apart. Where the depth changes between two chunks, a token at the
    edge can then be seen by both. When `FrameScores.depth_changed` is set, a label equal to the newest one is taken as
    its continuation if at most `seam_frames` blank frames lie between them across the edge; 0 turns this off. The
    price: a token truly said twice within that gap, exactly across such an edge, is written once.
    """

    seam_frames: int = 2

    def __post_init__(self) -> None:
        if self.seam_frames < 0:
            raise ConfigError(f"seam_frames={self.seam_frames} must be 0 or more")

    def initial(self) -> GreedyState:
        return GreedyState()

    def advance(self, state: GreedyState, scores: FrameScores) -> GreedyState:
        """Raises EngineError if a score is NaN."""
        log_probs = scores.max_log_prob.tolist()
        check_not_nan(log_probs, state.num_frames)
        frame, closed = state.num_frames, state.closed
        label, end, start, peak = state.label, state.label_end, state.start, state.peak_log_prob
        seam = frame if scores.depth_changed else -1
        for frame_label, log_prob in zip(scores.ids.tolist(), log_probs, strict=True):
            if frame_label != BLANK:
                same_run = end == frame or (end <= seam and frame - end <= self.seam_frames)
                if frame_label != label or not same_run:
                    if start >= 0:
                        closed = TokenCell.push(closed, TokenSpan(label, start, end, peak))
                    label, start, peak = frame_label, frame, log_prob
                elif log_prob > peak:
                    peak = log_prob
                end = frame + 1
            frame += 1
        return GreedyState(frame, closed, label, end, start, peak)
