"""CTC prefix beam search with an immutable state.

Hannun et al., "First-Pass Large Vocabulary Continuous Speech Recognition using Bi-Directional Recurrent DNNs"
(arXiv 1408.2873, 2014): every prefix carries the probability of all its alignments, split by whether they end in blank;
alignments that reach the same prefix by different ways are merged. With a beam wide enough for all prefixes and
`top_tokens >= V - 1` the search is exact.

A scorer (`asr_exit.scoring`: language model, phrase hints) multiplies each prefix by e to the score of its pieces. That
factor depends on the prefix alone, so it is part of the probabilities here, and merging needs no second account of it.

Everything is in plain floats: with 8 prefixes the break on the worst kept prefix beats array code. Probabilities are
rescaled every frame (never per chunk), so splitting a stream into other chunks cannot change a bit of the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from asr_exit.ctc import (
    BLANK,
    FrameScores,
    TokenCell,
    TokenSpan,
    chain_of,
    check_not_nan,
    unroll,
)
from asr_exit.errors import ConfigError, EngineError
from asr_exit.scoring import Scorer

ROOT_KEY = 0
LARGEST_GAIN = 1e4  # pruning takes it that one piece gains no more from a scorer; e to the 9.2
LARGEST_EXPONENT = 300.0  # of e, for one score; floats end at 709


class _Prefix(NamedTuple):
    """One label sequence of the beam. Probabilities are relative to the state's `log_scale`.

    `key` hashes the sequence since the last restart (64 bit), `parent_key` the one without its last label: a parent
    can be dropped and found again while its child stayed, so object identity would not do. `closed` holds all tokens
    but the last; `start`, `end` (exclusive) and `peak` (posterior) describe the last one; `start` is -1 if `label`
    belongs to the text before a restart, or to nothing. `scored` is the scorer's state, `gain` e to what the last label
    added to the score; without a scorer they are None and 1.
    """

    p_blank: float
    p_label: float
    label: int
    key: int
    parent_key: int | None
    closed: TokenCell | None
    start: int
    end: int
    peak: float
    scored: Any = None
    gain: float = 1.0

    def last_span(self) -> TokenSpan | None:
        if self.start < 0:
            return None
        return TokenSpan(self.label, self.start, self.end, math.log(self.peak) if self.peak > 0 else -math.inf)

    def chain(self) -> TokenCell | None:
        """The whole sequence as finished tokens."""
        span = self.last_span()
        return self.closed if span is None else TokenCell.push(self.closed, span, self.key)


_UNSCORED = (None, 1.0)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One entry of the n-best list: tokens since the last restart, and the log of their summed probability, scores
    included."""

    tokens: tuple[TokenSpan, ...]
    log_prob: float


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class BeamState:
    """Immutable beam after `num_frames` frames; prefixes best first, see `asr_exit.ctc.CtcState`."""

    num_frames: int
    prefixes: tuple[_Prefix, ...]
    log_scale: float
    scorer: Scorer[Any] | None = None

    @property
    def trailing_blank_frames(self) -> int:
        return self.num_frames - self.prefixes[0].end

    @property
    def has_tokens(self) -> bool:
        return self.prefixes[0].start >= 0

    @property
    def num_stable_tokens(self) -> int:
        """Length of the label sequence that all prefixes of the beam begin with."""
        chains = [prefix.chain() for prefix in self.prefixes]
        shortest = min(0 if cell is None else cell.count for cell in chains)
        level = []
        for cell in chains:
            while cell is not None and cell.count > shortest:
                cell = cell.previous
            level.append(cell)
        while len({ROOT_KEY if cell is None else cell.key for cell in level}) > 1:
            level = [None if cell is None else cell.previous for cell in level]
        return 0 if level[0] is None else level[0].count

    @property
    def confidence(self) -> float:
        """Share of the best prefix in the beam: the sentence confidence of arXiv 2309.09546, in (0, 1]."""
        return _total(self.prefixes[0]) / sum(map(_total, self.prefixes))

    def tokens(self) -> tuple[TokenSpan, ...]:
        best = self.prefixes[0]
        return unroll(best.closed, best.last_span())

    def hypotheses(self) -> tuple[Hypothesis, ...]:
        """The n-best list, best first. Prefixes whose probability has vanished are left out."""
        return tuple(
            Hypothesis(unroll(prefix.closed, prefix.last_span()), self.log_scale + math.log(_total(prefix)))
            for prefix in self.prefixes
            if _total(prefix) > 0
        )

    def settle(self) -> BeamState:
        """See `asr_exit.ctc.CtcState`: what the scorer says of the last word counts, which may change the best prefix.

        Only for reading and `restart`: decoding must go on from the state before.
        """
        if self.scorer is None:
            return self
        settled = []
        for prefix in self.prefixes:
            gain = _exp(self.scorer.finish(prefix.scored))
            settled.append(prefix._replace(p_blank=prefix.p_blank * gain, p_label=prefix.p_label * gain))
        settled.sort(key=_total, reverse=True)
        return BeamState(self.num_frames, tuple(settled), self.log_scale, self.scorer)

    def restart(self, keep_tokens: int = 0) -> BeamState:
        """Keeps the best prefix's blank and label probabilities as context; the other prefixes are dropped.

        A scorer begins a new utterance, unless tokens are kept: then it goes on.
        """
        best = self.prefixes[0]
        total = _total(best)
        kept = self.tokens()[-keep_tokens:] if keep_tokens > 0 else ()
        root = best._replace(
            p_blank=best.p_blank / total,
            p_label=best.p_label / total,
            key=ROOT_KEY,
            parent_key=None,
            closed=chain_of(kept[:-1]),
            start=best.start if kept else -1,
            scored=best.scored if kept or self.scorer is None else self.scorer.initial(),
        )
        return BeamState(self.num_frames, (root,), 0.0, self.scorer)

    def __repr__(self) -> str:
        return f"BeamState(num_frames={self.num_frames}, prefixes={len(self.prefixes)})"


@dataclass(frozen=True)
class PrefixBeamDecoder:
    """CTC prefix beam search.

    Args:
        beam_size: prefixes kept after each frame.
        top_tokens: most likely non-blank labels of a frame that may extend a prefix.
        seam_frames: as in `GreedyDecoder`, for chunks marked `depth_changed`.
        scorer: ranks prefixes together with the acoustics; None = acoustics alone.

    Token times follow the alignments that carry most probability: a token starts at the frame where the mass entering
    its prefix exceeded the mass already there.

    Raises:
        ConfigError: an option is out of range, or `advance` got scores without `log_probs`.
    """

    beam_size: int = 8
    top_tokens: int = 16
    seam_frames: int = 2
    scorer: Scorer[Any] | None = None

    def __post_init__(self) -> None:
        for name, least in (("beam_size", 1), ("top_tokens", 1), ("seam_frames", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be {least} or more")

    def initial(self) -> BeamState:
        scored = None if self.scorer is None else self.scorer.initial()
        return BeamState(0, (_Prefix(1.0, 0.0, BLANK, ROOT_KEY, None, None, -1, 0, 0.0, scored),), 0.0, self.scorer)

    def advance(self, state: BeamState, scores: FrameScores) -> BeamState:
        """Raises EngineError if a score is NaN or a frame gives no label any probability."""
        if scores.log_probs is None:
            raise ConfigError("beam decoding needs log_probs of shape (T, V); pass them or decode greedily")
        check_not_nan(scores.log_probs.sum(axis=1).tolist(), state.num_frames)
        probs = np.exp(scores.log_probs.astype(np.float64))
        top = self._top_labels(probs)
        prefixes, log_scale = state.prefixes, state.log_scale
        seam = state.num_frames if scores.depth_changed else -1
        for offset, (row, labels) in enumerate(zip(probs.tolist(), top.tolist(), strict=True)):
            best = _total(prefixes[0])
            if best <= 0:
                raise EngineError(f"all log posteriors of frame {state.num_frames + offset - 1} are -inf")
            log_scale += math.log(best)
            prefixes = self._step(prefixes, 1.0 / best, row, labels, state.num_frames + offset, seam)
        return BeamState(state.num_frames + len(probs), prefixes, log_scale, self.scorer)

    def _top_labels(self, probs: np.ndarray) -> np.ndarray:
        """(T, K) labels that may extend a prefix, most likely first, ties by id."""
        labels = probs[:, 1:]
        count = min(self.top_tokens, labels.shape[1])
        if count < labels.shape[1]:
            picked = np.sort(np.argpartition(labels, -count, axis=1)[:, -count:], axis=1)
            labels = np.take_along_axis(labels, picked, axis=1)
            order = np.argsort(-labels, axis=1, kind="stable")
            return np.take_along_axis(picked, order, axis=1) + 1
        return np.argsort(-labels, axis=1, kind="stable") + 1

    def _step(
        self, prefixes: tuple[_Prefix, ...], scale: float, row: list[float], labels: list[int], frame: int, seam: int
    ) -> tuple[_Prefix, ...]:
        """One frame: `row` (V,) posteriors, `labels` that may extend a prefix, `seam` the frame of a depth change."""
        # Per prefix: all its mass, the part that may repeat its last label as a new token, and the part that continues
        # that token. The parts are those ending in blank and in the label, except across a change of depth.
        masses = {}
        for prefix in prefixes:
            total = _total(prefix) * scale
            bridged = prefix.end <= seam and frame - prefix.end <= self.seam_frames
            repeating, continuing = (0.0, total) if bridged else (prefix.p_blank * scale, prefix.p_label * scale)
            masses[prefix.key] = (prefix, total, repeating, continuing)

        # (mass after this frame, prefix, label that extends it or -1, key of the extension, its scorer state and gain)
        candidates: list[tuple[float, _Prefix, int, int, Any, float]] = []
        for prefix, total, _, continuing in masses.values():
            label, closed, start, end, peak = prefix.label, prefix.closed, prefix.start, prefix.end, prefix.peak
            p_blank = total * row[BLANK]
            p_label = 0.0 if label == BLANK else continuing * row[label]
            if prefix.parent_key in masses:
                parent, parent_total, parent_repeating, _ = masses[prefix.parent_key]
                entering = (parent_repeating if parent.label == label else parent_total) * row[label] * prefix.gain
                if entering > p_blank + p_label:
                    closed, start, peak = parent.chain(), frame, 0.0
                p_label += entering
            if p_label > p_blank:
                end, peak = frame + 1, max(peak, row[label])
            same = _Prefix(
                p_blank, p_label, label, prefix.key, prefix.parent_key, closed, start, end, peak, *prefix[-2:]
            )
            candidates.append((p_blank + p_label, same, -1, prefix.key, *_UNSCORED))

        floor = min(map(itemgetter(0), candidates)) if len(candidates) >= self.beam_size else 0.0
        margin = 1.0 if self.scorer is None else LARGEST_GAIN
        for prefix, total, repeating, _ in masses.values():
            for label in self._extensions(prefix, row, labels):
                if total * row[label] * margin <= floor:
                    break
                value = (repeating if label == prefix.label else total) * row[label]
                if value * margin > floor:
                    key = hash((prefix.key, label))
                    if key not in masses:
                        scored, gain = self._score(prefix, label)
                        candidates.append((value * gain, prefix, label, key, scored, gain))
        candidates.sort(key=itemgetter(0), reverse=True)
        return tuple(
            prefix
            if label < 0
            else _Prefix(0.0, value, label, key, prefix.key, prefix.chain(), frame, frame + 1, row[label], scored, gain)
            for value, prefix, label, key, scored, gain in candidates[: self.beam_size]
        )

    def _extensions(self, prefix: _Prefix, row: list[float], labels: list[int]) -> list[int]:
        """Labels to extend a prefix by: those of the frame and those that the scorer waits for, most likely first."""
        awaited = () if self.scorer is None else self.scorer.continuations(prefix.scored)
        return sorted({*labels, *awaited}, key=row.__getitem__, reverse=True) if awaited else labels

    def _score(self, prefix: _Prefix, label: int) -> tuple[Any, float]:
        """The scorer's state after one more label, and the factor it brings."""
        if self.scorer is None:
            return _UNSCORED
        scored, score = self.scorer.advance(prefix.scored, label)
        return scored, _exp(score)


def _total(prefix: _Prefix) -> float:
    return prefix.p_blank + prefix.p_label


def _exp(score: float) -> float:
    return math.exp(max(-LARGEST_EXPONENT, min(LARGEST_EXPONENT, score)))
