"""The word at the endpoint: two recordings joined by silence against each of them alone.

An endpoint cuts the text, never the recogniser's context. Compared are

- the *cuts*: the joined audio with endpoints against the same audio without: words lost (deletions) or doubled
  (insertions) by the cuts themselves;
- the *joint*: errors against what was said, joined and apart: how many more words are deleted or inserted joined;
- the *texts*: joined against apart, word by word. A recogniser that errs often writes other words when anything
  changes before them, such as the chunk grid; *uncut* says how much of that there is without any endpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from asr_exit.audio import MODEL_RATE_HZ, load_audio
from asr_exit.config import require
from asr_exit.engine import Engine
from asr_exit.metrics import WordErrors, wer
from asr_exit.stream import StreamOptions
from asr_exit.tokenizer import normalise
from service.bench.streams import stream_all
from service.corpus import Utterance

SILENCE_S = (0.3, 3.0)
LOST_OR_DOUBLED_BAR = 0.005
_NOISE = 1e-4  # of the silence between: about the floor of a quiet recording


@dataclass(frozen=True)
class Pair:
    """Two recordings and the silence between them."""

    first: Utterance
    second: Utterance
    silence_s: float

    @property
    def text(self) -> str:
        """What was said."""
        return f"{normalise(self.first.text)} {normalise(self.second.text)}"


@dataclass(frozen=True)
class EndpointReport:
    """Word errors of the ways to decode the pairs."""

    pairs: int
    utterances: int  # that the pairs were cut into
    said_apart: WordErrors  # against what was said
    said_joined: WordErrors
    joined: WordErrors  # against the texts apart
    uncut: WordErrors
    cuts: WordErrors  # joined against uncut

    @property
    def by_cuts(self) -> float:
        """Share of words lost or doubled by the cuts."""
        return lost_or_doubled(self.cuts)

    @property
    def by_joint(self) -> float:
        """Share of words that are lost or doubled, as against what was said, more often joined than apart."""
        lost = self.said_joined.deletions - self.said_apart.deletions
        doubled = self.said_joined.insertions - self.said_apart.insertions
        return (max(0, lost) + max(0, doubled)) / max(1, self.said_apart.words)

    @property
    def holds(self) -> bool:
        """Neither loses or doubles more words than the bar allows."""
        return max(self.by_cuts, self.by_joint) <= LOST_OR_DOUBLED_BAR


def lost_or_doubled(errors: WordErrors) -> float:
    """Deletions and insertions as a share of the reference."""
    return (errors.deletions + errors.insertions) / max(1, errors.words)


def draw_pairs(utterances: Sequence[Utterance], count: int, seed: int, *, grid_ms: int = 0) -> list[Pair]:
    """`count` pairs of different recordings and the silence between, drawn with `seed`.

    Args:
        grid_ms: change the silence to the nearest within bounds after which the second recording begins on this grid of
            chunks, as it does alone; 0: leave it as drawn.
    Raises ConfigError when there are too few recordings.
    """
    require(len(utterances) >= 2 * count, f"{count} pairs need {2 * count} recordings, but there are {len(utterances)}")
    rng = np.random.default_rng(seed)
    picked = [utterances[index] for index in rng.permutation(len(utterances))[: 2 * count]]
    pairs = []
    for first, second in zip(picked[::2], picked[1::2], strict=True):
        silence_s = float(rng.uniform(*SILENCE_S))
        if grid_ms:
            before_s = len(load_audio(first.path)) / MODEL_RATE_HZ
            ends = np.arange(1, 10_000) * grid_ms / 1000 - before_s
            ends = ends[(ends >= SILENCE_S[0]) & (ends <= SILENCE_S[1])]
            silence_s = float(ends[np.abs(ends - silence_s).argmin()])
        pairs.append(Pair(first, second, silence_s))
    return pairs


def check_endpoint(
    engine: Engine,
    pairs: Sequence[Pair],
    options: StreamOptions,
    on_done: Callable[[], None] = lambda: None,
) -> EndpointReport:
    """Decode every pair apart, joined, and joined without endpoints. Raises AudioError or EngineError."""
    apart = _texts(engine, chain.from_iterable(map(_apart, pairs)), options, on_done)
    joined = _texts(engine, map(_joined, pairs), options, on_done)
    endless = replace(options, endpoint_silence_ms=0, endpoint_rules=(), max_utterance_ms=3_600_000)
    uncut = [finals[-1] for finals in _texts(engine, map(_joined, pairs), endless, on_done)]
    alone = [" ".join(_words(a + b)) for a, b in zip(apart[::2], apart[1::2], strict=True)]
    together = [" ".join(_words(finals)) for finals in joined]
    said = [pair.text for pair in pairs]
    return EndpointReport(
        pairs=len(pairs),
        utterances=sum(len([final for final in finals if final]) for finals in joined),
        said_apart=wer(said, alone),
        said_joined=wer(said, together),
        joined=wer(alone, together),
        uncut=wer(alone, uncut),
        cuts=wer(uncut, together),
    )


def _words(finals: Sequence[str]) -> list[str]:
    return [word for final in finals for word in final.split()]


def _apart(pair: Pair) -> Iterator[np.ndarray]:
    yield load_audio(pair.first.path)
    yield load_audio(pair.second.path)


def _joined(pair: Pair) -> np.ndarray:
    first, second = _apart(pair)
    noise = np.random.default_rng(0).standard_normal(round(pair.silence_s * MODEL_RATE_HZ))
    return np.concatenate([first, (_NOISE * noise).astype(np.float32), second])


def _texts(
    engine: Engine, recordings: Iterator[np.ndarray], options: StreamOptions, on_done: Callable[[], None]
) -> list[list[str]]:
    """The final texts of each recording, in the order given."""
    found: dict[int, list[str]] = {}
    for streamed in stream_all(engine, recordings, lambda _: options):
        found[streamed.index] = streamed.finals
        on_done()
    return [found[index] for index in sorted(found)]
