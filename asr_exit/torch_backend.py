"""The encoder in torch behind the engine: many streams in one batch, on a CPU or a GPU."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from asr_exit.attention import FrameContext
from asr_exit.buckets import CPU_BUCKETS, BatchBuckets
from asr_exit.cache import CachePool, extended, real_frames
from asr_exit.cost import SegmentMacs
from asr_exit.cuda_graphs import CudaCapture, SegmentGraphs
from asr_exit.encoder import Encoder
from asr_exit.evidence import ExitScores, score
from asr_exit.features import log_mels, windows_to_log_mel
from asr_exit.front_end import Float32LogMel, FusedLogMel
from asr_exit.fused import FusedSubsampling, can_fuse, fuse, measured
from asr_exit.packing import pack_linears

_ROWS_AT_ONCE = 8  # frames of skipped chunks are padded to multiples of this many


class TorchBackend:
    """Runs an `Encoder` (an `asr_exit.backend.Backend`) in the precision of its weights.

    An fp32 encoder gets the features that every device computes, float64 inside. A reduced one gets float32 features:
    three times the speed, and errors far below those of its weights.
    """

    def __init__(
        self,
        encoder: Encoder,
        slots: int,
        device: str | torch.device,
        *,
        buckets: BatchBuckets | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        """Batches are padded to few sizes, and on a GPU chunks to their full length; neither changes a stream's answer.

        Args:
            buckets: those sizes; None = the usual ones on a GPU and for a reduced precision, no padding elsewhere.
            cuda_graphs: replay captured segments instead of launching their kernels one by one. Not yet measured.
        Raises:
            ConfigError: `cuda_graphs` without a CUDA device.
        """
        self.config, self.encoder, self.device = encoder.config, encoder.to(device), torch.device(device)
        self.dtype = encoder.subsampling.out.weight.dtype
        usual = BatchBuckets() if self.device.type == "cuda" else None
        if self.dtype != torch.float32 and self.device.type == "cpu":
            pack_linears(self.encoder)
            usual = CPU_BUCKETS
        fused = can_fuse(self.config, self.dtype, self.device)
        if fused:
            fuse(self.encoder)
        tails = encoder.subsampling.tail_shapes()
        self.pool = CachePool(self.config, slots, tails, self.device, self.dtype, keys_by_lane=fused)
        self.subsampling = FusedSubsampling(self.encoder, self.pool) if fused else self.encoder.subsampling
        self._subsample = self.subsampling if fused else self._plain_subsample
        self._measure = measured if fused else None
        self.buckets = usual if buckets is None else buckets
        self._graphs: SegmentGraphs | None = None
        if cuda_graphs:
            self._graphs = SegmentGraphs(self.encoder.segments, self.pool, CudaCapture(self.device))
        self._newest: tuple[list[Tensor], Tensor] = [], torch.empty(0)  # rows that `run` gave last, and their batch
        self._fast_log_mel: Callable[[np.ndarray], np.ndarray] | None = None
        if self.dtype != torch.float32:
            self._fast_log_mel = (FusedLogMel if fused else Float32LogMel)(self.config.features)

    @property
    def free_slots(self) -> int:
        return len(self.pool.free)

    def acquire(self) -> int | None:
        return self.pool.acquire()

    def release(self, slot: int) -> None:
        self.pool.release(slot)

    @torch.inference_mode()
    def log_mel(self, samples: Sequence[np.ndarray]) -> list[np.ndarray]:
        if self._fast_log_mel is None:
            return log_mels(samples, lambda batch: windows_to_log_mel(batch, self.config.features))
        return log_mels(samples, self._fast_log_mel)

    @torch.inference_mode()
    def subsample(
        self, slots: np.ndarray, features: Sequence[np.ndarray], frames: np.ndarray, chunk_frames: int
    ) -> list[Tensor]:
        longest = int(frames.max()) if self.buckets is None else chunk_frames
        rows = self._rows_of(slots)
        padded = np.zeros((rows, longest * self.config.subsampling, self.config.features.num_mels), np.float32)
        for row, values in enumerate(features):
            padded[row, : len(values)] = values
        lengths = extended(np.array([len(values) for values in features]), rows, padded.shape[1])
        places = extended(slots, rows, self.pool.spare_slot), extended(frames, rows, longest)
        states = self._subsample(padded, lengths, *places)
        real = self.pool.tensor(real_frames(frames, longest)) if frames.min() < longest else None
        return _rows(states[: len(slots)], real, frames)

    def _plain_subsample(
        self, log_mel: np.ndarray, lengths: np.ndarray, slots: np.ndarray, frames: np.ndarray
    ) -> Tensor:
        """(B, F, num_mels) with real features (B,), slots (B,) and model frames (B,) -> (B, T, D)."""
        batch = self.encoder.normalise(self.pool.tensor(log_mel))
        for row in np.flatnonzero(lengths < log_mel.shape[1]).tolist():
            batch[row, lengths[row] :] = 0.0
        index = self.pool.tensor(slots)
        padded = frames.min() * self.config.subsampling < log_mel.shape[1]
        ends = self.pool.tensor(frames) if padded else None
        states, tails = self.encoder.subsampling(batch.to(self.dtype), self.pool.swap_tails(index), ends)
        self.pool.swap_tails(index, tails)
        return states

    def _rows_of(self, slots: np.ndarray) -> int:
        """Rows of the batch for (B,) slots."""
        return len(slots) if self.buckets is None else self.buckets.size(len(slots))

    @torch.inference_mode()
    def run(
        self,
        segment: int,
        slots: np.ndarray,
        states: Sequence[Tensor],
        frames: np.ndarray,
        chunk_frames: int,
        previous: Sequence[ExitScores | None],
        *,
        read: bool,
        want_log_probs: bool,
        want_evidence: bool,
        want_similarity: bool,
    ) -> tuple[list[Tensor], list[ExitScores] | None]:
        shape, masked = None, False
        if self.buckets is not None:
            shape = self.buckets.shape(len(slots), int(frames.max()), chunk_frames)
            masked = self.buckets.whole_chunks
        context, index, real = self.pool.begin(segment, slots, frames, chunk_frames, shape, masked)
        before = self._batch_of(states, real, context)
        if self._graphs is None:
            layers = self.pool.views(segment, index)
            after, logits = self.encoder.segments[segment](before, context, layers, want_logits=read)
        else:
            after, logits = self._graphs.run(segment, before, context, index)
        rows = _rows(after, real, frames)  # copies, where graphs write into the same memory again
        self._newest = rows, after
        if not read:
            return rows, None
        longest = int(frames.max())
        real_part = slice(len(slots)), slice(longest)
        return rows, score(
            logits[: len(slots), : longest * self.config.labels_per_frame],
            before[real_part] if want_similarity else None,
            after[real_part],
            previous,
            want_log_probs,
            want_evidence,
            frames,
            self._measure,
        )

    def _batch_of(self, states: Sequence[Tensor], real: Tensor | None, context: FrameContext) -> Tensor:
        """(B, T, D) of per-stream states: as it left the segment before, if the same streams go on."""
        rows, batch = self._newest
        if len(rows) == len(states) and all(map(operator.is_, rows, states)):
            return batch
        return _padded(states, real, context.cos.shape[:2])

    @torch.inference_mode()
    def propagate(
        self, segment: int, slots: np.ndarray, states: Sequence[Sequence[Tensor]], frames: np.ndarray
    ) -> None:
        rows, total = self._rows_of(slots), int(frames.sum())
        padded = total if self.buckets is None else _ROWS_AT_ONCE * self.buckets.size(-(-total // _ROWS_AT_ONCE))
        context, layers, last = self.pool.begin_filling(segment, slots, frames, rows, padded)
        chunks = [state for chunks in states for state in chunks]
        skipped = chunks[0].new_zeros(padded, chunks[0].shape[1])
        torch.cat(chunks, out=skipped[:total])
        self.encoder.segments[segment].propagate(skipped[None], context, layers, skipped[self.pool.tensor(last)])

    @torch.inference_mode()
    def leave_hole(self, segment: int, slots: np.ndarray, frames: np.ndarray) -> None:
        self.pool.leave_hole(segment, slots, frames)

    @torch.inference_mode()
    def warm_up(self, chunk_frames: int, most: int) -> None:
        """On a CPU: run every size that batches of up to `most` chunks are padded to: no stream then waits for kernels.

        To be called before the first stream, on the thread that will run the engine.
        """
        if self.buckets is None or self.device.type != "cpu":
            return
        taken = [slot for slot in (self.acquire() for _ in range(min(most, self.free_slots))) if slot is not None]
        features, length = self.config.features, chunk_frames * self.config.subsampling
        self.log_mel([np.zeros((length - 1) * features.hop_samples + features.window_samples, np.float32)])
        silence = np.zeros((length, features.num_mels), np.float32)
        for size in [size for size in self.buckets.sizes if size <= len(taken)]:
            slots, frames = np.array(taken[:size]), np.full(size, chunk_frames)
            states = self.subsample(slots, [silence] * size, frames, chunk_frames)
            wanted = {"read": True, "want_log_probs": False, "want_evidence": True, "want_similarity": True}
            states, _ = self.run(0, slots, states, frames, chunk_frames, [None] * size, **wanted)
            self.encoder.segments[-1].head.logits(self._newest[1])  # that of the first exit may have a hidden layer
            if self.config.num_exits > 1:
                self.propagate(1, slots, [[state] for state in states], frames)
        for slot in taken:
            self.release(slot)

    @torch.inference_mode()
    def seconds_per_mac(self) -> float:
        """Median over a few full-depth chunks."""
        frames, times = self.config.max_chunk_frames, []
        features = torch.zeros(1, frames * self.config.subsampling, self.config.features.num_mels, device=self.device)
        lengths = torch.tensor([features.shape[1]], device=self.device)
        for _ in range(7):
            begin = time.perf_counter()
            self.encoder(features, lengths, chunk_frames=frames).logits[-1].cpu()
            times.append(time.perf_counter() - begin)
        return float(np.median(times[2:])) / SegmentMacs.of(self.encoder).full(frames)


def _padded(states: Sequence[Tensor], real: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Per stream (frames, D) -> (B, T, D) with B and T = `shape`; the inverse of `_rows`."""
    if real is None:
        batch = states[0].new_zeros(*shape, states[0].shape[1])
        torch.stack(list(states), out=batch[: len(states)])
        return batch
    flat = torch.cat(list(states))
    batch = flat.new_zeros(*shape, flat.shape[1])
    batch.flatten(0, 1).index_copy_(0, real, flat)
    return batch


def _rows(batch: Tensor, real: Tensor | None, frames: np.ndarray) -> list[Tensor]:
    """(B, T, D) -> per stream its own (frames, D). `real`: places of its frames among B * T, None = no short chunks."""
    if real is None:
        return list(batch[: len(frames)].unbind())
    return list(batch.flatten(0, 1).index_select(0, real).split(frames.tolist()))
