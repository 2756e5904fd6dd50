"""The word at the endpoint: two recordings joined by silence against each of them alone.

An endpoint cuts the text, never the recogniser's context, so three things are compared:

- *joined* against *apart*: words lost (deletions) or doubled (insertions). This includes what any change of context does
  to a recogniser, such as another chunk grid for the second recording;
- *uncut* against *apart*: the same audio without endpoints, the floor of the above;
- *joined* against *uncut*: what the cuts themselves did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from asr_exit.audio import MODEL_RATE_HZ, load_audio
from asr_exit.config import require
from asr_exit.engine import Engine
from asr_exit.metrics import WordErrors, wer
from asr_exit.stream import StreamOptions
from service.bench.streams import stream_all

SILENCE_S = (0.3, 3.0)
LOST_OR_DOUBLED_BAR = 0.005
_NOISE = 1e-4  # of the silence between: about the floor of a quiet recording


@dataclass(frozen=True)
class Pair:
    """Two recordings and the silence between them."""

    first: Path
    second: Path
    silence_s: float


@dataclass(frozen=True)
class EndpointReport:
    """Word errors of one way to decode the pairs against another, and how many utterances the pairs were cut into."""

    pairs: int
    joined: WordErrors
    uncut: WordErrors
    cuts: WordErrors
    finals: int
    inside_words: int  # cuts that fell into a word: its halves are then two words

    @property
    def lost_or_doubled(self) -> float:
        """Share of the words, joined against apart."""
        return lost_or_doubled(self.joined)

    @property
    def holds(self) -> bool:
        """The cuts lose or double no more words than the bar allows."""
        return lost_or_doubled(self.cuts) <= LOST_OR_DOUBLED_BAR


def lost_or_doubled(errors: WordErrors) -> float:
    """Deletions and insertions as a share of the reference."""
    return (errors.deletions + errors.insertions) / max(1, errors.words)


def draw_pairs(paths: Sequence[Path], count: int, seed: int, *, grid_ms: int = 0) -> list[Pair]:
    """`count` pairs of different recordings and the silence between, drawn with `seed`.

    Args:
        grid_ms: lengthen or shorten the silence to the next value within bounds that lets the second recording begin on
            this grid of chunks, as it does alone; 0: leave it as drawn.
    Raises ConfigError when there are too few recordings.
    """
    require(len(paths) >= 2 * count, f"{count} pairs need {2 * count} recordings, but there are {len(paths)}")
    rng = np.random.default_rng(seed)
    picked = [paths[index] for index in rng.permutation(len(paths))[: 2 * count]]
    pairs = []
    for first, second in zip(picked[::2], picked[1::2], strict=True):
        silence_s = float(rng.uniform(*SILENCE_S))
        if grid_ms:
            before_s = len(load_audio(first)) / MODEL_RATE_HZ
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
    return EndpointReport(
        pairs=len(pairs),
        joined=wer(alone, together),
        uncut=wer(alone, uncut),
        cuts=wer(uncut, together),
        finals=sum(len([final for final in finals if final]) for finals in joined),
        inside_words=sum(
            "".join(cut) == "".join(whole) and len(cut) > len(whole)
            for cut, whole in ((_words(f), _words([u])) for f, u in zip(joined, uncut, strict=True))
        ),
    )


def _words(finals: Sequence[str]) -> list[str]:
    return [word for final in finals for word in final.split()]


def _apart(pair: Pair) -> Iterator[np.ndarray]:
    yield load_audio(pair.first)
    yield load_audio(pair.second)


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
