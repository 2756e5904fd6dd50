"""Streaming state in slots: ring buffers of keys and values, convolution tails, one clock per segment and slot.

A slot is one stream's row in every tensor. A segment's clock is the next absolute frame its layers will consume; clocks
never increase with depth, and an early exit only means that deeper clocks have not moved yet. Positions live on the
host, so masks cost no device synchronisation.

The last slot is nobody's: padding rows of a batch stand for it, and what padding writes goes there.

Shapes: S slots and the spare one, B streams of a batch, T frames of a chunk, W ring cells, H heads, E head dimension,
D = H * E, h halo.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from asr_exit.attention import MASKED, FrameContext, rotary
from asr_exit.config import ModelConfig

EMPTY = -1
_TABLE_FRAMES = 16_384  # rotary angles of so many frames are kept, 22 minutes; later ones are computed when they come


@dataclass
class LayerCache:
    """One layer's state for every slot."""

    keys: Tensor  # (S, W, H, E), stored after rotary embedding; (S, H, E, W) where `asr_exit.fused` reads them
    values: Tensor  # (S, W, H, E)
    conv: Tensor  # (S, h, D) gated convolution inputs

    @cached_property
    def bits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same memory for kernels: see `as_bits`."""
        return as_bits(self.keys), as_bits(self.values), as_bits(self.conv)


@dataclass
class SegmentCache:
    """The layers between two exits, which always hold the same frames."""

    layers: list[LayerCache]
    positions: np.ndarray  # (S, W) absolute frame that each ring cell holds, EMPTY = none; nothing in the spare slot
    clock: np.ndarray  # (S,) next absolute frame the layers will consume

    def advance(self, slots: np.ndarray, frames: np.ndarray, hole: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Move the clock of (B,) different slots over `frames` (B,) frames each and claim ring cells.

        Returns the cells and the positions of these frames, both (N,) with N = sum of `frames`, stream after stream.
        """
        window = self.positions.shape[1]
        rows = np.repeat(slots, frames)
        before = np.repeat(frames.cumsum() - frames - self.clock[slots], frames)
        positions = np.arange(len(rows)) - before
        cells = positions % window
        self.positions[rows, cells] = EMPTY if hole else positions
        self.clock[slots] += frames
        return rows * window + cells, positions


@dataclass(frozen=True)
class BatchIndex:
    """Where the frames of one batch belong."""

    slots: Tensor  # (B,)
    cells: Tensor  # (N,) ring cells of the frames, stream after stream; those of padding are all the same spare one
    kept: Tensor | None = None  # (B * h,) places of what `set_conv` keeps among B * (h + T); None: the last of each row
    frames: np.ndarray | None = None  # (B,) real frames of each row; None: there is no padding

    def on_host(self, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For kernels on a CPU: slots (B,), cells (N,) and real frames (B,) of rows of `longest` frames."""
        frames = np.full(len(self.slots), longest) if self.frames is None else self.frames
        return self.slots.numpy(), self.cells.numpy(), frames


def as_bits(values: Tensor) -> np.ndarray:
    """bf16 values on a CPU as an array of the same shape, uint16, that shares their memory."""
    return values.view(torch.int16).numpy().view(np.uint16)


def real_frames(frames: np.ndarray, longest: int) -> np.ndarray:
    """(N,) places among B * `longest` of the frames that are no padding, in a batch of chunks `frames` (B,) long."""
    return np.flatnonzero(np.arange(longest) < frames[:, None])


def extended(values: np.ndarray, rows: int, fill: int) -> np.ndarray:
    """(B,) whole numbers of a batch's streams -> (rows,), those of padding rows being `fill`."""
    out = np.full(rows, fill)
    out[: len(values)] = values
    return out


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values`, which lie on the host, on `device`; without waiting for what a GPU still has to do.

    A copy from pageable memory would: each one would be a synchronisation. PyTorch keeps pinned memory until the copy
    is done.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class LayerView:
    """One layer's cache as the streams of one batch see it (an `asr_exit.conformer.LayerState`)."""

    def __init__(self, cache: LayerCache, index: BatchIndex) -> None:
        self.cache, self.index = cache, index

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Write (B, T, H, E) keys and values in place."""
        self.cache.keys.flatten(0, 1).index_copy_(0, self.index.cells, keys.flatten(0, 1))
        self.cache.values.flatten(0, 1).index_copy_(0, self.index.cells, values.flatten(0, 1))

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`write`, and return (B, W, H, E) of everything held."""
        self.write(keys, values)
        slots = self.index.slots
        return self.cache.keys.index_select(0, slots), self.cache.values.index_select(0, slots)

    def conv_left(self) -> Tensor:
        """(B, h, D)."""
        return self.cache.conv.index_select(0, self.index.slots)

    def set_conv(self, gated: Tensor) -> None:
        """Keep the last h frames of (B, T, D), padding aside, after those held before where a row has fewer."""
        halo, kept = self.cache.conv.shape[1], self.index.kept
        if gated.shape[1] < halo or kept is not None:
            gated = torch.cat((self.conv_left(), gated), dim=1)
        if kept is not None:
            gated = gated.flatten(0, 1).index_select(0, kept).unflatten(0, (len(gated), halo))
        self.cache.conv.index_copy_(0, self.index.slots, gated[:, gated.shape[1] - halo :])


class CachePool:
    """The state of every layer for `slots` streams. A free slot is NaN throughout, so that a stale read shows."""

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        tail_shapes: list[tuple[int, int]],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        keys_by_lane: bool = False,
    ) -> None:
        """`tail_shapes`: per subsampling stage (channels, bands), from `ConvSubsampling.tail_shapes`.

        `keys_by_lane`: keys lie as `asr_exit.fused` reads them, and only it may run on this pool.
        """
        self.config, self.device, self.dtype = config, device, dtype
        window = config.left_context_frames + config.max_chunk_frames
        heads, halo = config.num_heads, (config.conv_kernel - 1) // 2

        def poisoned(*shape: int) -> Tensor:
            return torch.full(shape, torch.nan, device=device, dtype=dtype)

        layers, head_dim = config.num_layers, config.d_model // heads
        self.spare_slot, self.spare_cell = slots, slots * window
        by_position, by_lane = (window, heads, head_dim), (heads, head_dim, window)
        keys = poisoned(layers, slots + 1, *(by_lane if keys_by_lane else by_position))
        values = poisoned(layers, slots + 1, window, heads, head_dim)
        conv = poisoned(layers, slots + 1, halo, config.d_model)
        self._by_layer = [keys, values, conv]
        by_layer = [LayerCache(*parts) for parts in zip(keys, values, conv, strict=True)]
        self.segments = [
            SegmentCache(
                by_layer[first : first + config.exit_every],
                positions=np.full((slots + 1, window), EMPTY, np.int64),
                clock=np.zeros(slots + 1, np.int64),
            )
            for first in range(0, layers, config.exit_every)
        ]
        table = rotary(torch.arange(_TABLE_FRAMES)[None], head_dim, dtype)
        self._cos, self._sin = (values[0].to(device) for values in table)  # (frames, 1, E / 2)
        by_band = [poisoned(slots + 1, 1, bands, channels) for channels, bands in tail_shapes]
        self.tails = [tail.permute(0, 3, 1, 2) for tail in by_band]  # channels last, as the convolutions want them
        self.free = list(range(slots - 1, -1, -1))
        self._shared: tuple[tuple[np.ndarray, ...], FrameContext] | None = None  # of the last `begin`

    def acquire(self) -> int | None:
        """Take a free slot and clear it; None when all are taken. Unwritten cells are 0: they are masked anyway."""
        if not self.free:
            return None
        slot = self.free.pop()
        self._fill(slot, 0.0)
        for segment in self.segments:
            segment.positions[slot], segment.clock[slot] = EMPTY, 0
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back, poisoned."""
        self._fill(slot, torch.nan)
        self.free.append(slot)

    def _fill(self, slot: int, value: float) -> None:
        for cache in self._by_layer:
            cache[:, slot] = value
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
        self,
        segment: int,
        slots: np.ndarray,
        frames: np.ndarray,
        chunk_frames: int,
        shape: tuple[int, int] | None = None,
        masked: bool = False,
    ) -> tuple[FrameContext, BatchIndex, Tensor | None]:
        """Advance one segment's clocks over a chunk of (B,) slots, `frames` (B,) long; returns what its layers need.

        The layers get (B, T, D) with T the longest chunk; shorter ones are padded behind, and the last value returned
        is where the real frames lie (see `real_frames`), None without such padding. Every chunk starts on its own chunk
        grid, so all its frames see the same keys and the mask is (B, 1, 1, W).

        With `shape` the layers get so many rows of so many frames, at least as many as there are. If `masked`, what
        tells padding from frames is there without padding, too, so that `shape` decides that of everything returned.
        """
        cache, count = self.segments[segment], len(slots)
        rows, longest = (count, int(frames.max())) if shape is None else shape
        padded = masked or int(frames.min()) < longest
        if rows > count:
            slots = extended(slots, rows, self.spare_slot)
            frames = extended(frames, rows, 0 if padded else longest)
        start = cache.clock[slots]
        cells, _ = cache.advance(slots[:count], frames[:count])
        context = self._context(start, cache.positions[slots], frames, longest if padded else None, chunk_frames)
        if not padded:
            everywhere = extended(cells, len(frames) * longest, self.spare_cell)
            return context, BatchIndex(self.tensor(slots), self.tensor(everywhere)), None
        places = real_frames(frames, longest)
        spread = np.full(len(frames) * longest, self.spare_cell)
        spread[places] = cells
        index = BatchIndex(self.tensor(slots), self.tensor(spread), self._kept(frames, longest), frames)
        return context, index, self.tensor(places)

    def views(self, segment: int, index: BatchIndex) -> list[LayerView]:
        """The layers of one segment for the batch that `begin` gave `index` for."""
        return [LayerView(cache, index) for cache in self.segments[segment].layers]

    def _kept(self, ends: np.ndarray, longest: int) -> Tensor:
        """`BatchIndex.kept` where row b of (B, longest) ends after `ends[b]` frames."""
        halo = self._by_layer[2].shape[2]
        first = np.arange(len(ends)) * (halo + longest) + ends
        return self.tensor((first[:, None] + np.arange(halo)).ravel())

    def begin_filling(
        self, segment: int, slots: np.ndarray, frames: np.ndarray, rows: int, total: int
    ) -> tuple[FrameContext, list[LayerView], np.ndarray]:
        """`begin` for skipped frames: the layers get all of them in a row, (1, N, D), and the last of each stream.

        Padded to N = `total` frames and to B = `rows` streams. Returns also where the last ones lie: (B, h) places
        among N, padded behind where a stream skipped fewer than h frames.
        """
        cells, positions = self.segments[segment].advance(slots, frames)
        halo = max(1, self._by_layer[2].shape[2])
        kept, ends = np.minimum(frames, halo), frames.cumsum()
        longest = int(kept.max())
        last = np.zeros((rows, longest), np.int64)
        np.minimum((ends - kept)[:, None] + np.arange(longest), ends[:, None] - 1, out=last[: len(slots)])
        uneven = kept.min() < longest
        index = BatchIndex(
            self.tensor(extended(slots, rows, self.spare_slot)),
            self.tensor(extended(cells, total, self.spare_cell)),
            self._kept(extended(kept, rows, longest), longest) if uneven else None,
            extended(kept, rows, longest),
        )
        cos, sin = self._rotary(extended(positions, total, 0)[None])
        return FrameContext(cos, sin, None, None), self.views(segment, index), last

    def _context(
        self, start: np.ndarray, held: np.ndarray, frames: np.ndarray, padded_to: int | None, chunk_frames: int
    ) -> FrameContext:
        """For chunks from frames `start` (B,) on over ring cells `held` (B, W); deeper segments mostly ask the same.

        `padded_to`: frames of a row of the batch; None = all of `frames` are as many.
        """
        asked, last = (np.array((chunk_frames, padded_to or 0)), frames, start, held), self._shared
        if last is None or not all(map(np.array_equal, last[0], asked)):
            steps = np.arange(padded_to or frames[0])
            first = start[:, None] // chunk_frames * chunk_frames
            oldest = np.maximum(first - self.config.left_context_frames // chunk_frames * chunk_frames, 0)
            hidden = (held < oldest) | (held >= first + chunk_frames)  # as `attention.visible` has it
            mask = torch.from_numpy(np.where(hidden, np.float32(MASKED), np.float32(0.0))[:, None, None]).to(self.dtype)
            valid = None
            if padded_to is not None:
                valid = to_device(torch.from_numpy(steps < frames[:, None])[..., None].to(self.dtype), self.device)
            context = FrameContext(
                *self._rotary(start[:, None] + steps), to_device(mask, self.device), chunk_frames, valid
            )
            last = self._shared = asked, context
        return last[1]

    def _rotary(self, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        """`attention.rotary` of (B, T) frames."""
        if positions.max() < len(self._cos):
            places, shape = self.tensor(positions.reshape(-1)), (*positions.shape, *self._cos.shape[1:])
            return self._cos.index_select(0, places).view(shape), self._sin.index_select(0, places).view(shape)
        cos, sin = rotary(torch.from_numpy(positions), self.config.d_model // self.config.num_heads, self.dtype)
        return to_device(cos, self.device), to_device(sin, self.device)

    def tensor(self, values: np.ndarray) -> Tensor:
        """A host array on this pool's device."""
        return to_device(torch.from_numpy(values), self.device)

    def leave_hole(self, segment: int, slots: np.ndarray, frames: np.ndarray) -> None:
        """Advance one segment's clocks over `frames` (B,) frames and remember nothing of them."""
        cells, _ = self.segments[segment].advance(slots, frames, hole=True)
        longest = int(frames.max())
        index = BatchIndex(self.tensor(slots), self.tensor(cells), self._kept(frames, longest))
        nothing = self._by_layer[2].new_zeros(len(slots), longest, self.config.d_model)
        for view in self.views(segment, index):
            view.set_conv(nothing)

    def check_frontier(self, slots: np.ndarray) -> None:
        """Raise RuntimeError if a clock of one of (B,) slots increases with depth."""
        clocks = np.stack([segment.clock[slots] for segment in self.segments])
        if (np.diff(clocks, axis=0) > 0).any():
            raise RuntimeError(f"clocks increase with depth: {clocks.tolist()}")
