"""Streaming state in slots: ring buffers of keys and values, convolution tails, and one clock per layer and slot.

A slot is one stream's row in every tensor. A layer's clock is the next absolute frame it will consume; clocks never
increase with depth, and an early exit only means that deeper clocks have not moved yet. Positions live on the host, so
masks cost no device synchronisation.

Shapes: S slots, B streams of a batch, T frames of a chunk, W ring cells, H heads, E head dimension, D = H * E, h halo.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asr_exit.attention import FrameContext, additive, rotary, visible
from asr_exit.config import ModelConfig

EMPTY = -1


@dataclass
class LayerCache:
    """One layer's state for every slot."""

    keys: Tensor  # (S, W, H, E), stored after rotary embedding
    values: Tensor  # (S, W, H, E)
    conv: Tensor  # (S, h, D) gated convolution inputs
    positions: np.ndarray  # (S, W) absolute frame that each ring cell holds, EMPTY = none
    clock: np.ndarray  # (S,) next absolute frame this layer will consume

    def advance(self, slots: np.ndarray, frames: int, hole: bool = False) -> np.ndarray:
        """Move the clocks of (B,) different slots over `frames` frames and claim ring cells; returns (B * T,) cells."""
        window = self.positions.shape[1]
        positions = self.clock[slots][:, None] + np.arange(frames)
        cells = positions % window
        self.positions[slots[:, None], cells] = EMPTY if hole else positions
        self.clock[slots] += frames
        return (slots[:, None] * window + cells).ravel()


class LayerView:
    """One layer's cache as the streams of one batch see it (an `asr_exit.conformer.LayerState`)."""

    def __init__(self, cache: LayerCache, slots: Tensor, cells: Tensor) -> None:
        self._cache, self._slots, self._cells = cache, slots, cells

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, T, H, E) keys and values in place; return (B, W, H, E) of everything held."""
        cache = self._cache
        cache.keys.flatten(0, 1).index_copy_(0, self._cells, keys.flatten(0, 1))
        cache.values.flatten(0, 1).index_copy_(0, self._cells, values.flatten(0, 1))
        return cache.keys.index_select(0, self._slots), cache.values.index_select(0, self._slots)

    def conv_left(self) -> Tensor:
        """(B, h, D)."""
        return self._cache.conv.index_select(0, self._slots)

    def set_conv(self, gated: Tensor) -> None:
        """Keep the last h frames of (B, T, D), after those held before when T < h."""
        halo = self._cache.conv.shape[1]
        if gated.shape[1] < halo:
            gated = torch.cat((self.conv_left(), gated), dim=1)
        self._cache.conv.index_copy_(0, self._slots, gated[:, gated.shape[1] - halo :])


class CachePool:
    """The state of every layer for `slots` streams. A free slot is NaN throughout, so that a stale read shows."""

    def __init__(
        self, config: ModelConfig, slots: int, tail_shapes: list[tuple[int, int]], device: torch.device
    ) -> None:
        """`tail_shapes`: per subsampling stage (channels, bands), from `ConvSubsampling.tail_shapes`."""
        self.config, self.device = config, device
        window = config.left_context_frames + config.max_chunk_frames
        heads, halo = config.num_heads, (config.conv_kernel - 1) // 2

        def poisoned(*shape: int) -> Tensor:
            return torch.full(shape, torch.nan, device=device)

        self.segments = [
            [
                LayerCache(
                    keys=poisoned(slots, window, heads, config.d_model // heads),
                    values=poisoned(slots, window, heads, config.d_model // heads),
                    conv=poisoned(slots, halo, config.d_model),
                    positions=np.full((slots, window), EMPTY, np.int64),
                    clock=np.zeros(slots, np.int64),
                )
                for _ in range(config.exit_every)
            ]
            for _ in range(config.num_exits)
        ]
        self.tails = [poisoned(slots, channels, 1, bands) for channels, bands in tail_shapes]
        self.free = list(range(slots - 1, -1, -1))
        self._shared: tuple[tuple[int, int], np.ndarray, np.ndarray, FrameContext] | None = None  # of the last `begin`

    def acquire(self) -> int | None:
        """Take a free slot and clear it; None when all are taken. Unwritten cells are 0: they are masked anyway."""
        if not self.free:
            return None
        slot = self.free.pop()
        self._fill(slot, 0.0)
        for cache in self._layers():
            cache.positions[slot], cache.clock[slot] = EMPTY, 0
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back, poisoned."""
        self._fill(slot, torch.nan)
        self.free.append(slot)

    def _layers(self) -> list[LayerCache]:
        return [cache for segment in self.segments for cache in segment]

    def _fill(self, slot: int, value: float) -> None:
        for cache in self._layers():
            cache.keys[slot], cache.values[slot], cache.conv[slot] = value, value, value
        for tail in self.tails:
            tail[slot] = value

    def swap_tails(self, slots: Tensor, new: list[Tensor] | None = None) -> list[Tensor]:
        """Subsampling tails of (B,) slots; with `new`, store those instead."""
        if new is None:
            return [tail.index_select(0, slots) for tail in self.tails]
        for tail, value in zip(self.tails, new, strict=True):
            tail.index_copy_(0, slots, value)
        return new

    def begin(
        self, segment: int, slots: np.ndarray, frames: int, chunk_frames: int
    ) -> tuple[FrameContext, list[LayerView]]:
        """Advance one segment's clocks over a chunk of (B,) slots; returns what its layers need to run or propagate.

        Every chunk starts on its own chunk grid, so all its frames see the same keys and the mask is (B, 1, 1, W).
        """
        caches = self.segments[segment]
        start = caches[0].clock[slots]
        cells = [cache.advance(slots, frames) for cache in caches]
        slot_index = torch.from_numpy(slots).to(self.device)
        cell_index = torch.from_numpy(cells[0]).to(self.device)
        context = self._context(start, caches[0].positions[slots], frames, chunk_frames)
        return context, [LayerView(cache, slot_index, cell_index) for cache in caches]

    def _context(self, start: np.ndarray, held: np.ndarray, frames: int, chunk_frames: int) -> FrameContext:
        """For chunks from frames `start` (B,) on over ring cells `held` (B, W); deeper segments mostly ask the same."""
        sizes, last = (frames, chunk_frames), self._shared
        if last is None or last[0] != sizes or not np.array_equal(last[1], start) or not np.array_equal(last[2], held):
            query = torch.from_numpy(start[:, None] + np.arange(frames))
            keys = torch.from_numpy(held)
            mask = additive(visible(query[:, :1], keys, chunk_frames, self.config.left_context_frames), torch.float32)
            cos, sin = rotary(query, self.config.d_model // self.config.num_heads, torch.float32)
            context = FrameContext(cos.to(self.device), sin.to(self.device), mask.to(self.device), chunk_frames)
            last = self._shared = (sizes, start, held, context)
        return last[3]

    def leave_hole(self, segment: int, slots: np.ndarray, frames: int) -> None:
        """Advance one segment's clocks and remember nothing of the frames skipped."""
        slot_index = torch.from_numpy(slots).to(self.device)
        for cache in self.segments[segment]:
            cache.advance(slots, frames, hole=True)
            zeros = cache.conv.new_zeros(len(slots), frames, cache.conv.shape[2])
            LayerView(cache, slot_index, slot_index).set_conv(zeros)

    def check_frontier(self, slots: np.ndarray) -> None:
        """Raise RuntimeError if a clock of one of (B,) slots increases with depth."""
        clocks = np.stack([cache.clock[slots] for cache in self._layers()])
        if (np.diff(clocks, axis=0) > 0).any():
            raise RuntimeError(f"layer clocks increase with depth: {clocks.tolist()}")
