"""What changes of depth do to the text.

**With revision** (fill `catch_up`, a random depth for every chunk, the end of the stream drained): the text must be
exactly the full-depth text. A text that differs is excused only if a frame of the full-depth pass was within 1e-4 of a
tie; the posteriors agree to about that much.

**Without revision** (fill `propagate` or `hole`, the same random depths) every chunk keeps the labels of its own exit,
and exits place the spike of a token a frame or so apart. So where exit a hands over to exit b, a token at the edge can
be written by both (doubled) or by neither (dropped). To tell this from plain recognition errors of shallow exits, both
exits' own passes over the recording (offline, same chunk mask, one exit throughout) are the witnesses: for each label,
its tokens that touch the `WINDOW_FRAMES` frames before or after the edge are counted in the pass of a (n_a), in that of
b (n_b) and in the spliced stream (n). Then

    doubled += max(0, n - max(n_a, n_b))    if n_a or n_b: written more often than either exit alone would
    foreign += n                            if neither: the fill changed what the exit says, not the seam
    dropped += max(0, min(n_a, n_b) - n)    written less often than both exits alone would

Edges where the depth stays the same are counted apart: what happens there is not the change of depth, but the fill that
earlier shallow chunks left in the deeper layers. The labels are decoded twice, with the greedy decoder's seam handling
(`FrameScores.depth_changed`) and without it, so that its effect shows, and its price: a token truly said twice and
written once counts as dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from asr_exit.ctc import FrameScores, GreedyDecoder, TokenSpan
from asr_exit.engine import Engine
from asr_exit.policy import RandomDepth
from asr_exit.recognizer import Recognizer
from asr_exit.stream import Fill, StreamOptions
from service.bench.parity import TOLERANCE, margins
from service.bench.streams import Streamed, greedy, stream_all

WINDOW_FRAMES = 3
ROUNDS = 4  # passes over the recordings
SEAM_OFF = GreedyDecoder(seam_frames=0)


@dataclass(frozen=True)
class RevisedDifference:
    """A recording whose random-depth text, caught up, is not the full-depth text."""

    index: int
    random_depth: str
    full_depth: str
    smallest_margin: float  # over all frames of the full-depth pass, in log-posteriors
    excused: bool


@dataclass
class SeamCounts:
    """Tokens doubled, dropped and foreign at the edges between chunks, for one fill and one way of decoding."""

    fill: str
    seam_handling: bool
    depth_changed: bool  # counts edges where it did, or edges where it did not
    edges: int = 0
    witnessed: int = 0  # tokens that both exits' own passes put at an edge
    doubled: int = 0
    dropped: int = 0
    foreign: int = 0

    def per_thousand(self, count: int) -> float:
        """`count` per 1,000 edges."""
        return 1000 * count / max(1, self.edges)


@dataclass(frozen=True)
class SwitchReport:
    """What was found."""

    recordings: int
    audio_seconds: float
    differences: list[RevisedDifference]
    seams: list[SeamCounts]

    @property
    def holds(self) -> bool:
        """Every difference with revision is excused by a tie."""
        return all(found.excused for found in self.differences)


def check_switches(
    recognizer: Recognizer,
    recordings: Callable[[], Iterable[np.ndarray]],
    *,
    chunk_ms: float,
    streams: int,
    device: str = "cpu",
    seed: int = 0,
    on_done: Callable[[], None] = lambda: None,
) -> SwitchReport:
    """Run all recordings at full depth, at random depth with revision, and at random depth with each other fill.

    Args:
        recordings: gives the (N,) float32 recordings at the model's rate anew for each of the four rounds.
        streams: recordings per batch. seed: of the depths; recording i uses seed + i.
        on_done: called for each recording of each round.
    """
    engine = Engine(recognizer.model, slots=streams, device=device)
    frame_ms = engine.config.chunk_frames(chunk_ms) * engine.config.frame_ms

    def run(fill: Fill, full_depth: bool = False) -> Iterable[Streamed]:
        def options(index: int) -> StreamOptions:
            plain = StreamOptions(chunk_ms=frame_ms, fill=fill)
            return plain if full_depth else replace(plain, policy=RandomDepth(seed + index))

        for streamed in stream_all(engine, recordings(), options):
            on_done()
            yield streamed

    full_texts, num_samples = {}, 0
    for streamed in run(Fill.CATCH_UP, full_depth=True):
        full_texts[streamed.index] = streamed.text
        num_samples += len(streamed.samples)
    differences = []
    for streamed in run(Fill.CATCH_UP):
        if streamed.text != full_texts[streamed.index]:
            log_probs = recognizer.log_posteriors(streamed.samples, chunk_ms)[-1]
            smallest = float(margins(log_probs).min(initial=np.inf))
            full = full_texts[streamed.index]
            differences.append(RevisedDifference(streamed.index, streamed.text, full, smallest, smallest <= TOLERANCE))
    witnesses: dict[int, list[tuple[TokenSpan, ...]]] = {}
    seams = []
    for fill in (Fill.PROPAGATE, Fill.HOLE):
        counts = [SeamCounts(fill.value, handled, changed) for handled in (True, False) for changed in (True, False)]
        for streamed in run(fill):
            if streamed.index not in witnesses:
                by_exit = recognizer.log_posteriors(streamed.samples, chunk_ms)
                witnesses[streamed.index] = [greedy(log_probs).tokens() for log_probs in by_exit]
            for decoder, pair in ((GreedyDecoder(), counts[:2]), (SEAM_OFF, counts[2:])):
                count_edges(streamed.exits, streamed.scores, witnesses[streamed.index], decoder, *pair)
        seams += counts
    seconds = num_samples / engine.config.features.sample_rate_hertz
    return SwitchReport(len(full_texts), seconds, sorted(differences, key=lambda found: found.index), seams)


def splice(exits: Sequence[int], scores: Sequence[FrameScores], decoder: GreedyDecoder) -> tuple[TokenSpan, ...]:
    """Tokens of a stream whose chunk i left at exits[i] and was never revised."""
    state = decoder.initial()
    for index, frames in enumerate(scores):
        state = decoder.advance(state, replace(frames, depth_changed=index > 0 and exits[index] != exits[index - 1]))
    return state.tokens()


def count_edges(
    exits: Sequence[int],
    scores: Sequence[FrameScores],
    witnesses: Sequence[Sequence[TokenSpan]],
    decoder: GreedyDecoder,
    changed: SeamCounts,
    unchanged: SeamCounts,
) -> None:
    """Add one recording's edges to the counts.

    Args:
        exits, scores: per chunk. witnesses: per exit the tokens of its own pass.
        changed, unchanged: for edges where the depth changes, and where it does not.
    """
    by_edge = [_near_edges(tokens, scores) for tokens in witnesses]
    spliced = _near_edges(splice(exits, scores, decoder), scores)
    for edge in range(len(scores) - 1):
        left, right = by_edge[exits[edge]][edge], by_edge[exits[edge + 1]][edge]
        written = spliced[edge]
        counts = unchanged if exits[edge] == exits[edge + 1] else changed
        counts.edges += 1
        for label in left.keys() | right.keys() | written.keys():
            most, least = max(left[label], right[label]), min(left[label], right[label])
            counts.witnessed += least
            if most:
                counts.doubled += max(0, written[label] - most)
            else:
                counts.foreign += written[label]
            counts.dropped += max(0, least - written[label])


def _near_edges(tokens: Sequence[TokenSpan], scores: Sequence[FrameScores]) -> list[Counter[int]]:
    """Per edge between two chunks, the labels of the tokens that touch the window around it."""
    starts = np.array([token.start_frame for token in tokens], np.int64)
    ends = np.array([token.end_frame for token in tokens], np.int64)
    found = []
    for edge in np.cumsum([len(frames.ids) for frames in scores])[:-1]:
        touching = np.flatnonzero((starts < edge + WINDOW_FRAMES) & (ends > edge - WINDOW_FRAMES))
        found.append(Counter(tokens[place].id for place in touching.tolist()))
    return found
