"""A backend that is watched while it works."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from asr_exit.backend import Backend, State
from asr_exit.evidence import ExitScores


class Probe:
    """Passes everything on to another backend; adds up the time spent there and, if asked, keeps log-posteriors."""

    def __init__(
        self, inner: Backend, *, keep_log_probs: bool = False, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._inner, self._keep, self._clock = inner, keep_log_probs, clock
        self.seconds = 0.0
        self.log_probs: dict[int, list[np.ndarray]] = {}  # per segment, of every chunk that was read there (T, V)

    @property
    def free_slots(self) -> int:
        return self._inner.free_slots

    def acquire(self) -> int | None:
        return self._inner.acquire()

    def release(self, slot: int) -> None:
        self._inner.release(slot)

    def seconds_per_mac(self) -> float | None:
        return self._inner.seconds_per_mac()

    def log_mel(self, samples: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self._inner.log_mel(samples)

    def subsample(
        self, slots: np.ndarray, features: Sequence[np.ndarray], frames: np.ndarray, chunk_frames: int
    ) -> list[State]:
        return list(self._timed(self._inner.subsample, slots, features, frames, chunk_frames))

    def run(
        self,
        segment: int,
        slots: np.ndarray,
        states: Sequence[State],
        frames: np.ndarray,
        chunk_frames: int,
        previous: Sequence[ExitScores | None],
        *,
        read: bool,
        want_log_probs: bool,
        want_evidence: bool,
        want_similarity: bool,
    ) -> tuple[list[State], list[ExitScores] | None]:
        after, scores = self._timed(
            self._inner.run,
            segment,
            slots,
            states,
            frames,
            chunk_frames,
            previous,
            read=read or self._keep,
            want_log_probs=want_log_probs or self._keep,
            want_evidence=want_evidence,
            want_similarity=want_similarity,
        )
        if self._keep:
            kept = [one.frames.log_probs for one in scores]
            self.log_probs.setdefault(segment, []).extend(kept)
        return after, scores if read else None

    def propagate(self, segment: int, slots: np.ndarray, states: Sequence[Sequence[State]], frames: np.ndarray) -> None:
        self._timed(self._inner.propagate, segment, slots, states, frames)

    def leave_hole(self, segment: int, slots: np.ndarray, frames: np.ndarray) -> None:
        self._timed(self._inner.leave_hole, segment, slots, frames)

    def _timed(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        begin = self._clock()
        try:
            return method(*arguments, **options)
        finally:
            self.seconds += self._clock() - begin
