"""Multiply-accumulates (MACs) of every part of the encoder: what results report and budgets are kept in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from asr_exit.budget import CostModel
from asr_exit.config import ModelConfig

if TYPE_CHECKING:
    from asr_exit.encoder import Encoder

_MAX_KNOWN = 1024


@dataclass(frozen=True)
class SegmentMacs:
    """Costs of one chunk of T encoder frames; attention counts every ring cell, as the computation does."""

    config: ModelConfig
    subsampling_per_frame: int
    layer_per_frame: int  # without attention scores
    heads_per_frame: tuple[int, ...]  # per exit
    feedback_per_frame: int

    @classmethod
    def of(cls, encoder: Encoder) -> SegmentMacs:
        """Read the costs off an encoder."""
        segment = encoder.segments[0]
        return cls(
            encoder.config,
            encoder.subsampling.macs_per_frame(),
            segment.layers[0].macs_per_frame(),
            tuple(segment.head.macs_per_frame() for segment in encoder.segments),
            0 if segment.feedback is None else segment.feedback.weight.numel(),
        )

    @cached_property
    def _window(self) -> int:
        return self.config.left_context_frames + self.config.max_chunk_frames

    def stem(self, frames: int) -> int:
        """Subsampling of T frames."""
        return frames * self.subsampling_per_frame

    def segment(self, index: int, frames: int, with_head: bool) -> int:
        """One segment over T frames; with self-conditioning the head is always computed."""
        attention = 2 * self._window * self.config.d_model
        total = frames * self.config.exit_every * (self.layer_per_frame + attention)
        feeds_back = self.config.self_conditioning and index < self.config.num_exits - 1
        if feeds_back:
            total += frames * self.feedback_per_frame
        return total + (frames * self.heads_per_frame[index] if with_head or feeds_back else 0)

    def propagate(self, frames: int) -> int:
        """Filling one skipped segment's caches from an exit's hidden state, once a later chunk needs them."""
        halo = max(1, (self.config.conv_kernel - 1) // 2)
        return self.config.exit_every * 2 * self.config.d_model**2 * (frames + min(frames, halo))

    def to_exit(self, exit_index: int, frames: int) -> int:
        """What a chunk of T frames costs when it leaves at `exit_index`, without what filling it costs later chunks."""
        total = self.stem(frames)
        for index in range(exit_index + 1):
            total += self.segment(index, frames, with_head=index == exit_index)
        return total

    def judged_to_exit(self, exit_index: int, frames: int) -> int:
        """The same where a policy has read that exit and all before it."""
        read = sum(self.segment(index, frames, with_head=True) for index in range(exit_index + 1))
        return self.stem(frames) + read

    def of_step(self, frames: int, chunk_frames: int, waiting: tuple[int, ...], propagate: bool) -> tuple[float, ...]:
        """Per exit what a step to it costs: the stem, the segments, and what waits at the doors on the way.

        Args:
            frames: of the new chunk, which is the last one waiting at the first door.
            chunk_frames: of the chunks before it.
            waiting: per segment the chunks at its door.
            propagate: earlier chunks only get their layers filled; else they run.
        """
        key = frames, chunk_frames, waiting, propagate
        known = self._known.get(key)
        if known is None:
            costs, spent, arriving = [], float(self.stem(frames)), 0
            for index, more in enumerate(waiting):
                arriving += more
                running = 1 if propagate else arriving
                spent += (arriving - running) * self.propagate(chunk_frames)
                costs.append(spent + running * self.segment(index, frames, with_head=True))
                spent += running * self.segment(index, frames, with_head=False)
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            known = self._known[key] = tuple(costs)
        return known

    @cached_property
    def _known(self) -> dict[tuple[int, int, tuple[int, ...], bool], tuple[float, ...]]:
        """Answers of `of_step`: the same few questions come back for every chunk."""
        return {}

    def full(self, frames: int) -> int:
        """Full depth."""
        return self.to_exit(self.config.num_exits - 1, frames)

    def cost_model(self, chunk_frames: int, seconds_per_mac: float | None = None) -> CostModel:
        """What leaving at each exit costs per second of audio, in chunks of `chunk_frames`, without filling."""
        costs = [float(self.to_exit(index, chunk_frames)) for index in range(self.config.num_exits)]
        return CostModel.from_chunk(costs, chunk_frames * self.config.frame_ms / 1000, seconds_per_mac)
