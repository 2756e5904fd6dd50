"""Segments as CUDA graphs: one launch replays all kernels of a segment, for a batch of one shape.

A graph reads its inputs from, and leaves its outputs in, the same memory at every replay. Caches stay where they are,
too, and are written in place, so that a graph may read and write them. Written against PyTorch's rules for capture, and
not yet run or measured on a GPU.

Shapes: B rows of a batch (see `asr_exit.buckets`), T frames of a chunk, D model dimension, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asr_exit.attention import FrameContext
from asr_exit.cache import BatchIndex, CachePool
from asr_exit.encoder import Segment
from asr_exit.errors import ConfigError, EngineError

_WARM_UP_RUNS = 2  # before a capture, so that libraries have chosen their kernels and workspaces
_CAPTURING = threading.Lock()  # one capture at a time in a process

Outputs = tuple[Tensor, Tensor]  # (B, T, D) for the next segment, (B, T, V) logits
Captured = tuple[Callable[[], None], Outputs]  # a replay, and where it leaves its outputs


class CudaCapture:
    """Makes graphs that share one pool of memory: a replay may overwrite what another one left in its outputs."""

    def __init__(self, device: torch.device) -> None:
        """Raises ConfigError without a CUDA device."""
        if device.type != "cuda" or not torch.cuda.is_available():
            raise ConfigError(
                f"CUDA graphs need a CUDA device, and this engine runs on {device}: turn them off "
                "(model.cuda_graphs = false) or run on a GPU (model.device = 'cuda')"
            )
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Outputs]) -> Captured:
        """Capture `work`, which runs a few times before that. Raises EngineError if it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with _CAPTURING:
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
                with torch.cuda.stream(self._stream):
                    for _ in range(_WARM_UP_RUNS):
                        work()
                # only this thread is held to what capture allows: other engines go on
                with torch.cuda.graph(graph, self._memory, self._stream, capture_error_mode="thread_local"):
                    outputs = work()
        except RuntimeError as error:
            raise EngineError(
                f"a segment cannot be captured as a CUDA graph: turn them off (model.cuda_graphs = false) ({error})"
            ) from error
        return graph.replay, outputs


@dataclass(frozen=True)
class _Inputs:
    """All that a segment reads, but for weights and caches."""

    states: Tensor  # (B, T, D)
    context: FrameContext
    index: BatchIndex

    def tensors(self) -> list[Tensor]:
        context, index = self.context, self.index
        frames = context.cos, context.sin, context.mask, context.valid
        found = self.states, *frames, index.slots, index.cells, index.kept
        return [tensor for tensor in found if tensor is not None]

    def clone(self) -> _Inputs:
        context, index = self.context, self.index
        mask, valid, kept = (x if x is None else x.clone() for x in (context.mask, context.valid, index.kept))
        frames = FrameContext(context.cos.clone(), context.sin.clone(), mask, context.chunk_frames, valid)
        return _Inputs(self.states.clone(), frames, BatchIndex(index.slots.clone(), index.cells.clone(), kept))

    def load(self, others: _Inputs) -> None:
        """Take over the values of others of the same shapes."""
        for mine, theirs in zip(self.tensors(), others.tensors(), strict=True):
            mine.copy_(theirs)


class SegmentGraphs:
    """The graphs of one engine, captured when a segment first meets a batch of some shape."""

    def __init__(
        self, segments: Sequence[Segment], pool: CachePool, capture: Callable[[Callable[[], Outputs]], Captured]
    ) -> None:
        """`capture` makes a graph: `CudaCapture`."""
        self._segments, self._pool, self._capture = segments, pool, capture
        self._inputs: dict[tuple[int, int], _Inputs] = {}  # by rows and frames; all segments read the same ones
        self._graphs: dict[tuple[int, int, int], Captured] = {}  # by segment, rows and frames

    def run(self, segment: int, states: Tensor, context: FrameContext, index: BatchIndex) -> Outputs:
        """One segment for (B, T, D) `states` with what `CachePool.begin` gave for as many rows of T frames.

        Returns (B, T, D) for the next segment, and the exit's logits (B, L, V). Both hold until the next replay, which
        is after the next call has read its `states`.
        """
        given, shape = _Inputs(states, context, index), (states.shape[0], states.shape[1])
        inputs = self._inputs.get(shape)
        if inputs is None:
            inputs = self._inputs[shape] = given.clone()
        captured = self._graphs.get((segment, *shape))
        if captured is None:
            captured = self._graphs[segment, *shape] = self._make(segment, inputs)
        inputs.load(given)
        replay, outputs = captured
        replay()
        return outputs

    def _make(self, segment: int, inputs: _Inputs) -> Captured:
        inputs.index.slots.fill_(self._pool.spare_slot)  # runs before the capture must not touch a stream's state
        inputs.index.cells.fill_(self._pool.spare_cell)
        layers = self._pool.views(segment, inputs.index)
        return self._capture(lambda: self._segments[segment](inputs.states, inputs.context, layers))
