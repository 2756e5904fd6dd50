"""The encoder in ONNX Runtime behind the engine: one stream at a time, in numpy and nothing else.

Shapes: T frames of a chunk, W cached frames, L layers of a segment, H heads, E head dimension, D model dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asr_exit.config import ModelConfig
from asr_exit.cost import SegmentMacs
from asr_exit.edge.manifest import Manifest
from asr_exit.edge.sessions import GraphSessions
from asr_exit.errors import EngineError
from asr_exit.evidence import NUM_COLUMNS, ExitScores, unpack
from asr_exit.features import log_mels, windows_to_log_mel
from asr_exit.stream import Fill

MASKED = np.float32(-30_000.0)  # as in asr_exit.attention: exact zero after softmax
EMPTY = -1


class EdgeModel:
    """An exported model (an `asr_exit.backend.StreamingModel`). Weights are read when a chunk first needs them."""

    def __init__(self, folder: Path | str, *, threads: int = 1) -> None:
        """`folder`: what `asr-exit export` wrote. `threads`: of ONNX Runtime; one is best on a small core.

        Raises:
            CheckpointError: no export there, or its manifest is damaged.
        """
        self.manifest = Manifest.read(Path(folder))
        self.sessions = GraphSessions(Path(folder), threads)
        self.name = self.manifest.name

    @property
    def config(self) -> ModelConfig:
        return self.manifest.config

    @property
    def pieces(self) -> Sequence[str]:
        return self.manifest.pieces

    @property
    def macs(self) -> SegmentMacs:
        return self.manifest.macs

    @property
    def calibration(self) -> Mapping[str, Any]:
        return self.manifest.calibration

    def load(self, segments: int, fill: Fill) -> None:
        """Read the graphs of the first `segments` segments now, with what `fill` needs to skip them."""
        graphs = [*self.manifest.segments[:segments]]
        if fill is Fill.PROPAGATE:
            graphs += filter(None, self.manifest.propagate[1:segments])
        for graph in graphs:
            self.sessions.load(graph)

    def backend(self, slots: int, device: Any = "cpu") -> EdgeBackend:
        """Streaming state for `slots` streams. `device` is the CPU, whatever is passed."""
        return EdgeBackend(self.manifest, self.sessions, slots)


@dataclass
class _SegmentState:
    """One stream's memory of one segment. Its layers share a clock: they always run together."""

    keys: np.ndarray  # (L, H, W, E) ring, stored after rotary embedding
    values: np.ndarray
    conv: np.ndarray  # (L, h, D) gated convolution inputs before the next frame
    mask: np.ndarray  # (W,) 0 where a cell holds a frame, MASKED where it is empty
    clock: int = 0  # next absolute frame

    def write(self, frames: int, keys: np.ndarray, values: np.ndarray, conv: np.ndarray) -> None:
        """Keep what a graph returned for `frames` frames. The ring is as long as the left context, which a chunk size
        always divides: the cells that the next chunk sees are exactly those that hold a frame."""
        cells = self._advance(frames)
        self.keys[:, :, cells], self.values[:, :, cells] = keys, values
        self.conv, self.mask[cells] = conv, 0.0

    def leave_hole(self, frames: int) -> None:
        """Skip `frames` frames: no keys, and silence in the convolution."""
        self.mask[self._advance(frames)] = MASKED
        kept = self.conv[:, frames:]
        self.conv = np.concatenate((kept, np.zeros_like(self.conv[:, : self.conv.shape[1] - kept.shape[1]])), axis=1)

    def _advance(self, frames: int) -> np.ndarray:
        cells = np.arange(self.clock, self.clock + frames) % len(self.mask)
        self.clock += frames
        return cells


@dataclass
class _StreamState:
    """One stream's memory."""

    segments: list[_SegmentState]
    tails: list[np.ndarray]  # per subsampling stage (1, channels, 1, bands), its last input frame


class EdgeBackend:
    """Runs an exported encoder (an `asr_exit.backend.Backend`)."""

    def __init__(self, manifest: Manifest, sessions: GraphSessions, slots: int) -> None:
        self._manifest, self._sessions, self.config = manifest, sessions, manifest.config
        self._mean = np.asarray(manifest.feature_mean, np.float32)
        self._std = np.asarray(manifest.feature_std, np.float32)
        half = self.config.d_model // self.config.num_heads // 2
        self._frequencies = 10_000.0 ** (-np.arange(half) / half)
        self._rotary: tuple[tuple[int, int], dict[str, np.ndarray]] = ((0, 0), {})
        self._free = list(range(slots - 1, -1, -1))
        self._states: dict[int, _StreamState] = {}

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def acquire(self) -> int | None:
        if not self._free:
            return None
        slot = self._free.pop()
        config = self.config
        heads, window, halo = config.num_heads, config.left_context_frames, (config.conv_kernel - 1) // 2
        ring = (config.exit_every, heads, window, config.d_model // heads)
        segments = [
            _SegmentState(
                np.zeros(ring, np.float32),
                np.zeros(ring, np.float32),
                np.zeros((config.exit_every, halo, config.d_model), np.float32),
                np.full(window, MASKED, np.float32),
            )
            for _ in range(config.num_exits)
        ]
        self._states[slot] = _StreamState(segments, [np.zeros(shape, np.float32) for shape in tail_shapes(config)])
        return slot

    def release(self, slot: int) -> None:
        del self._states[slot]
        self._free.append(slot)

    def log_mel(self, samples: Sequence[np.ndarray]) -> list[np.ndarray]:
        return log_mels(samples, lambda batch: windows_to_log_mel(batch, self.config.features))

    def subsample(
        self, slots: np.ndarray, features: Sequence[np.ndarray], frames: np.ndarray, chunk_frames: int
    ) -> list[np.ndarray]:
        """Only normalises and pads; the subsampling itself is part of the first segment's graph."""
        states = []
        for values, count in zip(features, frames.tolist(), strict=True):
            padded = np.zeros((count * self.config.subsampling, self.config.features.num_mels), np.float32)
            padded[: len(values)] = (values - self._mean) / self._std
            states.append(padded)
        return states

    def run(
        self,
        segment: int,
        slots: np.ndarray,
        states: Sequence[np.ndarray],
        frames: np.ndarray,
        chunk_frames: int,
        previous: Sequence[ExitScores | None],
        *,
        read: bool,
        want_log_probs: bool,
        want_evidence: bool,
        want_similarity: bool,
    ) -> tuple[list[np.ndarray], list[ExitScores] | None]:
        after, scores = [], []
        for slot, x, count, earlier in zip(slots.tolist(), states, frames.tolist(), previous, strict=True):
            stream = self._states[slot]
            memory = stream.segments[segment]
            feeds = {"mask": memory.mask, "keys": memory.keys, "values": memory.values, "conv": memory.conv}
            feeds |= self._positions(memory.clock, count)
            if segment == 0:
                feeds |= {"features": x} | {f"tail_{stage}": tail for stage, tail in enumerate(stream.tails)}
            else:
                feeds["x"] = x
            skip = () if want_log_probs else ("log_probs",)
            outputs = self._sessions.run(self._manifest.segments[segment], feeds, skip)
            memory.write(count, outputs["new_keys"], outputs["new_values"], outputs["new_conv"])
            if segment == 0:
                stream.tails = [outputs[f"new_tail_{stage}"] for stage in range(len(stream.tails))]
            after.append(outputs["state"])
            if read:
                labels = count * self.config.labels_per_frame
                row = outputs["scores"] if want_evidence else outputs["scores"][NUM_COLUMNS:]
                scores.append(unpack(row, labels, earlier, outputs.get("log_probs")))
        return after, scores if read else None

    def propagate(
        self, segment: int, slots: np.ndarray, states: Sequence[Sequence[np.ndarray]], frames: np.ndarray
    ) -> None:
        graph = self._manifest.propagate[segment]
        if graph is None:
            raise EngineError(f"segment {segment} cannot be skipped")
        for slot, chunks, count in zip(slots.tolist(), states, frames.tolist(), strict=True):
            memory, x = self._states[slot].segments[segment], np.concatenate(chunks)
            outputs = self._sessions.run(graph, {"x": x, "conv": memory.conv} | self._positions(memory.clock, count))
            memory.write(count, outputs["new_keys"], outputs["new_values"], outputs["new_conv"])

    def leave_hole(self, segment: int, slots: np.ndarray, frames: np.ndarray) -> None:
        for slot, count in zip(slots.tolist(), frames.tolist(), strict=True):
            self._states[slot].segments[segment].leave_hole(count)

    def seconds_per_mac(self) -> None:
        """Left to `EdgeRecognizer`, which knows the streams it will run."""
        return None

    def _positions(self, start: int, frames: int) -> dict[str, np.ndarray]:
        """Rotary cosines and sines (T, E / 2); angles in float64, so that hours are as exact as the first second."""
        if self._rotary[0] != (start, frames):
            angles = np.arange(start, start + frames, dtype=np.float64)[:, None] * self._frequencies
            values = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
            self._rotary = ((start, frames), values)
        return self._rotary[1]


def tail_shapes(config: ModelConfig) -> list[tuple[int, int, int, int]]:
    """(1, channels, 1, bands) of the one-frame state that each subsampling stage carries."""
    shapes, channels, bands = [], 1, config.features.num_mels
    for _ in range(config.subsampling.bit_length() - 1):
        shapes.append((1, channels, 1, bands))
        channels, bands = config.subsampling_channels, (bands + 1) // 2
    return shapes
