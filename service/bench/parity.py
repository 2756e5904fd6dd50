"""Streaming against one offline pass with the same chunk mask, over whole recordings.

Many streams share one engine, so that batching and slot reuse are part of what is compared. The text counts, and so do
the log-posteriors of every exit. A text that differs is *excused* only if every frame whose best label differs was
within 1e-4 of a tie in the offline pass; and there must be such a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asr_exit.encoder import Encoder
from asr_exit.engine import Engine
from asr_exit.policy import Full
from asr_exit.recognizer import Recognizer
from asr_exit.stream import Chunk, Stream, StreamOptions
from service.bench.streams import greedy, stream_all, text_of

TOLERANCE = 1e-4


@dataclass(frozen=True)
class _EveryExit(Full):
    """Full depth, every exit read on the way."""

    needs_evidence = True


@dataclass(frozen=True)
class TextDifference:
    """A recording whose streaming text is not the offline text."""

    index: int
    streaming: str
    offline: str
    frames: int  # frames whose best label differs at the last exit
    widest_margin: float  # of those frames, the largest lead of the best label over the next, in log-posteriors
    excused: bool


@dataclass(frozen=True)
class ParityReport:
    """What the comparison found."""

    recordings: int
    audio_seconds: float
    max_error_by_exit: list[float]  # of log-posteriors, over all frames and labels
    differences: list[TextDifference]

    @property
    def holds(self) -> bool:
        """No difference that a tie does not excuse, and no error beyond the tolerance."""
        return max(self.max_error_by_exit) <= TOLERANCE and all(found.excused for found in self.differences)


class _RecordingEngine(Engine):
    """Keeps the log-posteriors of every exit and chunk."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.logits: Tensor | None = None  # of the segment that ran last, (B, L, V)
        self.log_probs: dict[Stream, list[list[np.ndarray]]] = {}  # per exit, per chunk (L, V)

    def _run_batch(self, segment: int, chunk_frames: int, members: list[tuple[Stream, Chunk]]) -> None:
        super()._run_batch(segment, chunk_frames, members)
        assert self.logits is not None
        log_probs = self.logits.float().log_softmax(dim=-1).cpu().numpy()
        for row, (stream, chunk) in enumerate(members):
            by_exit = self.log_probs.setdefault(stream, [[] for _ in range(self.config.num_exits)])
            by_exit[segment].append(log_probs[row, : chunk.frames * self.config.labels_per_frame])

    @contextmanager
    def observing(self, encoder: Encoder) -> Iterator[None]:
        """While inside, the segments of `encoder` hand over their logits."""

        def keep(_module: object, _inputs: object, outputs: tuple[Tensor, Tensor | None]) -> None:
            self.logits = outputs[1]

        handles = [segment.register_forward_hook(keep) for segment in encoder.segments]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def check_parity(
    recognizer: Recognizer,
    recordings: Iterable[np.ndarray],
    *,
    chunk_ms: float,
    streams: int,
    device: str | torch.device = "cpu",
    on_done: Callable[[], None] = lambda: None,
) -> ParityReport:
    """Compare both ways for (N,) float32 recordings at the model's rate; `streams` of them share a batch."""
    engine = _RecordingEngine(recognizer.model, slots=streams, device=device)
    options = StreamOptions(chunk_ms=chunk_ms, policy=_EveryExit())
    errors = np.zeros(engine.config.num_exits)
    differences, count, num_samples = [], 0, 0
    with engine.observing(recognizer.model.encoder):
        for streamed in stream_all(engine, recordings, lambda _: options):
            offline = recognizer.log_posteriors(streamed.samples, chunk_ms)
            chunks = engine.log_probs.pop(streamed.stream, None)
            streaming = offline if chunks is None else [np.concatenate(parts) for parts in chunks]
            errors = np.maximum(errors, [_error(a, b) for a, b in zip(streaming, offline, strict=True)])
            text = text_of(greedy(offline[-1]), engine)
            if streamed.text != text:
                differences.append(_difference(streamed.index, streamed.text, text, streaming[-1], offline[-1]))
            count += 1
            num_samples += len(streamed.samples)
            on_done()
    seconds = num_samples / engine.config.features.sample_rate_hertz
    return ParityReport(count, seconds, errors.tolist(), sorted(differences, key=lambda found: found.index))


def _error(streaming: np.ndarray, offline: np.ndarray) -> float:
    if streaming.shape != offline.shape:
        return float("inf")
    return float(np.abs(streaming - offline).max(initial=0.0))


def _difference(
    index: int, streaming_text: str, offline_text: str, streaming: np.ndarray, offline: np.ndarray
) -> TextDifference:
    if streaming.shape != offline.shape:
        return TextDifference(index, streaming_text, offline_text, len(offline), float("inf"), False)
    changed = streaming.argmax(axis=1) != offline.argmax(axis=1)
    widest = float(margins(offline[changed]).max(initial=0.0))
    frames = int(changed.sum())
    return TextDifference(index, streaming_text, offline_text, frames, widest, frames > 0 and widest <= TOLERANCE)


def margins(log_probs: np.ndarray) -> np.ndarray:
    """(T, V) -> (T,) lead of the best label over the second best."""
    best_two = np.partition(log_probs, -2, axis=1)[:, -2:]
    return np.asarray(best_two[:, 1] - best_two[:, 0])
