"""Recordings through one engine, as many at a time as it has slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from itertools import islice
from pathlib import Path

import numpy as np

from asr_exit.audio import load_audio
from asr_exit.ctc import CtcState, FrameScores, GreedyDecoder
from asr_exit.engine import Engine
from asr_exit.stream import Stream, StreamOptions
from asr_exit.words import text_from_words, words_from_tokens


@dataclass(eq=False)
class Streamed:
    """A recording that went through the engine."""

    index: int  # place in the order given
    samples: np.ndarray  # (N,) float32
    stream: Stream
    finals: list[str] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)  # per chunk, the exit index it left at
    scores: list[FrameScores] = field(default_factory=list)  # per chunk, what that exit said

    @property
    def text(self) -> str:
        """The transcript."""
        return " ".join(final for final in self.finals if final)


def stream_all(
    engine: Engine, recordings: Iterable[np.ndarray], options: Callable[[int], StreamOptions]
) -> Iterator[Streamed]:
    """Stream every recording, (N,) float32 at the model's rate; yields each one as it ends, its slot given back.

    Args:
        options: from the place of a recording in the order given to its stream's options.
    Raises EngineError when recognition fails.
    """
    remaining = enumerate(recordings)
    running: dict[Stream, Streamed] = {}
    while True:
        for index, samples in islice(remaining, engine.free_slots):
            stream = engine.open(options(index))
            engine.push(stream, samples)
            engine.finish(stream)
            running[stream] = Streamed(index, samples, stream)
        if not running:
            return
        output = engine.step()
        for _, failure in output.failures:
            raise failure
        for result in output.results:
            streamed, chunk = running[result.stream], result.stream.current
            if chunk is not None and chunk.scores is not None:
                streamed.exits.append(chunk.exit_index)
                streamed.scores.append(chunk.scores.frames)
            if result.is_final:
                streamed.finals.append(result.committed)
            if result.end_of_stream:
                del running[result.stream]
                engine.close(result.stream)
                yield streamed


def greedy(log_probs: np.ndarray) -> CtcState:
    """Best-path decoding of the (T, V) log-posteriors of a whole recording."""
    decoder = GreedyDecoder()
    if len(log_probs) == 0:
        return decoder.initial()
    return decoder.advance(decoder.initial(), FrameScores.from_log_probs(log_probs))


def text_of(state: CtcState, engine: Engine) -> str:
    """The words of a decoding state."""
    return text_from_words(words_from_tokens(state.tokens(), engine.model.pieces, engine.config.label_ms))


def read_all(paths: Iterable[Path]) -> Iterator[np.ndarray]:
    """Audio files, one at a time, as (N,) float32 at the model's rate."""
    return (load_audio(path) for path in paths)


def sample_audio() -> np.ndarray:
    """The bundled sample, (N,) float32 at the model's rate."""
    with as_file(files("asr_exit") / "assets" / "sample.flac") as path:
        return load_audio(path)


def looped(samples: np.ndarray, start: int, length: int) -> np.ndarray:
    """`length` samples of an endless repetition, from position `start`."""
    return samples.take(np.arange(start, start + length), mode="wrap")


def difference(ours: str, theirs: str) -> str:
    """Where two texts differ: the words between what they begin and end with alike."""
    first, second = ours.split(), theirs.split()
    shorter = min(len(first), len(second))
    head = next((place for place in range(shorter) if first[place] != second[place]), shorter)
    rest = shorter - head
    tail = next((place for place in range(rest) if first[-1 - place] != second[-1 - place]), rest)
    parts = (" ".join(words[head : len(words) - tail]) for words in (first, second))
    return " / ".join(repr(part) for part in parts) + f" after {head} words"
