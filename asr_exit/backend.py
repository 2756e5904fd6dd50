"""What the engine asks of whatever computes the encoder: torch (`asr_exit.torch_backend`) or, on devices, ONNX Runtime
(`asr_exit.edge`). The engine itself holds no tensors, so that both run the very same streams, budgets and captions.

Shapes: B streams of a batch, T frames of a chunk, D model dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from asr_exit.config import ModelConfig
from asr_exit.cost import SegmentMacs
from asr_exit.evidence import ExitScores

State = Any  # (T, D) of one chunk, in the backend's own array type


class Backend(Protocol):
    """Streaming state in slots, and the parts of the encoder that read and advance it.

    Every method that takes `slots` (B,) treats one chunk of each of these streams, `frames` (B,) long: the last one of
    a stream is shorter than the others, and still goes with them. No slot may stand there twice.
    """

    @property
    def free_slots(self) -> int:
        """Slots that `acquire` can still give."""

    def acquire(self) -> int | None:
        """Take a free slot, cleared; None when all are taken."""

    def release(self, slot: int) -> None:
        """Give a slot back."""

    def log_mel(self, samples: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-mel features (F, num_mels) of what `StreamingLogMel.take` gave of each stream."""

    def subsample(
        self, slots: np.ndarray, features: Sequence[np.ndarray], frames: np.ndarray, chunk_frames: int
    ) -> list[State]:
        """Log-mel features, per stream (F, num_mels) with F <= frames * subsampling -> states of T = `frames`.

        `chunk_frames`: the longest chunk that these streams may ever send.
        """

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
        """One segment: the states for the next one, and what its exit says if `read`.

        Args:
            chunk_frames: chunk grid of the streams; `frames` is less for the last chunk of a stream and around a flush.
            previous: per stream what the exit read before said about this chunk, or None.
            want_similarity: a policy looks at `Evidence.similarity`; else it may be anything.
        """

    def propagate(self, segment: int, slots: np.ndarray, states: Sequence[Sequence[State]], frames: np.ndarray) -> None:
        """Fill one skipped segment from the hidden states of the exits taken: per stream those of its chunks in a row,
        T = `frames` in all."""

    def leave_hole(self, segment: int, slots: np.ndarray, frames: np.ndarray) -> None:
        """Advance one segment's clocks and remember nothing of the frames skipped."""

    def seconds_per_mac(self) -> float | None:
        """Time of one multiply-accumulate at batch 1 on this device; None where the caller measures it."""


class StreamingModel(Protocol):
    """What the engine needs to know of a model."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def pieces(self) -> Sequence[str]:
        """The tokenizer's pieces by id."""

    @property
    def macs(self) -> SegmentMacs: ...

    @property
    def calibration(self) -> Mapping[str, Any]: ...

    def backend(self, slots: int, device: Any) -> Backend:
        """Fresh streaming state for `slots` streams."""
