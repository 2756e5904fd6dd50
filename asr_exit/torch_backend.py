"""The encoder in torch behind the engine: many streams in one batch, on a CPU or a GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from asr_exit.cache import CachePool
from asr_exit.cost import SegmentMacs
from asr_exit.encoder import Encoder
from asr_exit.evidence import ExitScores, score


class TorchBackend:
    """Runs an `Encoder` (an `asr_exit.backend.Backend`)."""

    def __init__(self, encoder: Encoder, slots: int, device: str | torch.device) -> None:
        self.config, self.encoder, self.device = encoder.config, encoder.to(device), torch.device(device)
        self.pool = CachePool(self.config, slots, encoder.subsampling.tail_shapes(), self.device)

    @property
    def free_slots(self) -> int:
        return len(self.pool.free)

    def acquire(self) -> int | None:
        return self.pool.acquire()

    def release(self, slot: int) -> None:
        self.pool.release(slot)

    @torch.inference_mode()
    def subsample(self, slots: np.ndarray, features: Sequence[np.ndarray], frames: int) -> list[Tensor]:
        padded = np.zeros((len(features), frames * self.config.subsampling, self.config.features.num_mels), np.float32)
        for row, values in enumerate(features):
            padded[row, : len(values)] = values
        batch = self.encoder.normalise(torch.from_numpy(padded).to(self.device))
        for row, values in enumerate(features):
            batch[row, len(values) :] = 0.0
        index = torch.from_numpy(slots).to(self.device)
        states, tails = self.encoder.subsampling(batch, self.pool.swap_tails(index))
        self.pool.swap_tails(index, tails)
        return list(states)

    @torch.inference_mode()
    def run(
        self,
        segment: int,
        slots: np.ndarray,
        states: Sequence[Tensor],
        frames: int,
        chunk_frames: int,
        previous: Sequence[ExitScores | None],
        *,
        read: bool,
        want_log_probs: bool,
        want_evidence: bool,
        want_similarity: bool,
    ) -> tuple[list[Tensor], list[ExitScores] | None]:
        before = torch.stack(list(states))
        context, layers = self.pool.begin(segment, slots, frames, chunk_frames)
        after, logits = self.encoder.segments[segment](before, context, layers, want_logits=read)
        if not read:
            return list(after), None
        return list(after), score(
            logits, before if want_similarity else None, after, previous, want_log_probs, want_evidence
        )

    @torch.inference_mode()
    def propagate(
        self, segment: int, slots: np.ndarray, states: Sequence[Sequence[Tensor]], frames: int, chunk_frames: int
    ) -> None:
        context, layers = self.pool.begin(segment, slots, frames, chunk_frames)
        self.encoder.segments[segment].propagate(
            torch.stack([torch.cat(list(chunks)) for chunks in states]), context, layers
        )

    @torch.inference_mode()
    def leave_hole(self, segment: int, slots: np.ndarray, frames: int) -> None:
        self.pool.leave_hole(segment, slots, frames)

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
