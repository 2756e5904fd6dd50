"""Segments whose work between matrix products is done by the kernels of `asr_exit.kernels`: bf16 on a CPU.

Same results as `Segment` up to the rounding of bf16 (less of it: sums that are normalised are not rounded before). Only
passes with streaming state run this way; offline passes, gates and other processors keep to torch.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr_exit.cache import CachePool, LayerView, as_bits
from asr_exit.conv import join
from asr_exit.packing import can_pack

if TYPE_CHECKING:
    from asr_exit.attention import FrameContext
    from asr_exit.config import ModelConfig
    from asr_exit.conformer import ConformerBlock, LayerState
    from asr_exit.encoder import Encoder, Segment

log = logging.getLogger(__name__)
_LANES = 16


def can_fuse(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels for this model, in this precision and on this device, are there and fit."""
    window = config.left_context_frames + config.max_chunk_frames
    head_dim = config.d_model // config.num_heads
    fits = window % _LANES == 0 and head_dim % _LANES == 0
    return dtype == torch.bfloat16 and device.type == "cpu" and can_pack() and fits and _kernels_work()


def _kernels_work() -> bool:
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        importlib.import_module("asr_exit.kernels")
    except ImportError as error:  # numba refuses a numpy that it does not know
        log.warning("bf16 runs without compiled kernels, which takes longer: %s", error)
        return False
    return True


def fuse(encoder: Encoder) -> None:
    """Let every segment of an encoder with packed linear layers run by kernels, in place, for inference only.

    The states it is then given must come from a `CachePool` with `keys_by_lane`.
    """
    for segment in encoder.segments:
        if "forward" in vars(segment):  # for another engine before
            continue
        fused = _FusedSegment(segment)
        segment.forward = partial(fused.forward, segment.forward)  # type: ignore[method-assign]
        segment.propagate = fused.propagate  # type: ignore[method-assign]


class _Norm:
    """Weights of a LayerNorm as the kernels want them."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self.gamma, self.beta = (_fp32(parameter) for parameter in (norm.weight, norm.bias))


class _FusedBlock:
    """A Conformer block: its products, and what the kernels between them need."""

    def __init__(self, block: ConformerBlock) -> None:
        self.block = block
        norms = block.ff_in.norm, block.attention_norm, block.conv_norm, block.ff_out.norm
        self.norms = [_Norm(norm) for norm in norms]
        conv = block.conv
        self.taps = np.ascontiguousarray(_fp32(conv.taps())[:, 0].T)
        self.bias, self.conv_norm = _fp32(cast(Tensor, conv.depthwise.bias)), _Norm(conv.norm)


class FusedSubsampling(nn.Module):
    """`Encoder.normalise` and `ConvSubsampling` for streams, the first stage by a kernel."""

    def __init__(self, encoder: Encoder, pool: CachePool) -> None:
        """`pool`'s tails must lie channels last."""
        super().__init__()
        from asr_exit import front_kernels

        self._kernels, self._pool, self._stages = front_kernels, pool, encoder.subsampling
        self._mean, self._deviation = _fp32(encoder.feature_mean), _fp32(encoder.feature_std)
        first = self._stages.convs[0]
        self._weight = np.ascontiguousarray(_fp32(first.weight).reshape(len(first.weight), -1).T)
        self._bias = _fp32(cast(Tensor, first.bias))
        # as they lie in memory: (S, 1, bands, channels)
        self._tails = [as_bits(tail.permute(0, 2, 3, 1)[:, 0]) for tail in pool.tails[:2]]

    def forward(self, log_mel: np.ndarray, lengths: np.ndarray, slots: np.ndarray, frames: np.ndarray) -> Tensor:
        """(B, F, num_mels) fp32 with real features (B,), slots (B,) and model frames (B,) -> (B, T, D)."""
        stages, pool, factor = self._stages, self._pool, self._stages.factor
        rows, features, _ = log_mel.shape
        joined = torch.empty(rows, 1 + features // 2, stages.bands[1], stages.channels[1], dtype=pool.dtype)
        first, second = self._tails
        statistics, weights = (self._mean, self._deviation), (self._weight, self._bias)
        given = log_mel, lengths, frames * factor, *statistics, slots
        self._kernels.first_stage(*given, first[..., 0], second, *weights, as_bits(joined))
        x = F.relu_(stages.convs[1](joined.permute(0, 3, 1, 2)))
        index = pool.tensor(slots)
        for stage, conv in enumerate(stages.convs[2:], 2):
            ends = pool.tensor(frames * (factor >> stage) - 1)
            before = pool.tails[stage].index_select(0, index)
            pool.tails[stage].index_copy_(0, index, x[torch.arange(rows), :, ends].unsqueeze(2))
            x = F.relu_(conv(join(before, x)))
        return stages.out(x.permute(0, 2, 3, 1).flatten(2))


class _FusedSegment:
    def __init__(self, segment: Segment) -> None:
        # not on import: numba is an extra, and takes half a second
        from asr_exit import kernels

        self._kernels = kernels
        self._segment = segment
        self._blocks = [_FusedBlock(layer) for layer in segment.layers]
        self._head_norm = _Norm(segment.head.norm)
        self._gain = np.float32(1.0 if segment.gain is None else segment.gain.item())

    def forward(
        self,
        plain: Callable[..., tuple[Tensor, Tensor | None]],
        x: Tensor,
        context: FrameContext,
        states: Sequence[LayerState] | None = None,
        gate: Tensor | None = None,
        hole: bool = False,
        want_logits: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Segment.forward`; `plain` is that."""
        if states is None or gate is not None:
            return plain(x, context, states, gate, hole, want_logits)
        kernels, half, whole = self._kernels, np.float32(0.5), np.float32(1.0)
        shape, width = x.shape, x.shape[-1]
        given = as_bits(x.reshape(-1, width))
        total, normed, mixed = (x.new_empty(len(given), width) for _ in range(3))
        sums, y, z = as_bits(total), as_bits(normed), as_bits(mixed)
        cos, sin = (
            as_bits(part.expand(*shape[:2], 1, -1).reshape(len(given), -1)) for part in (context.cos, context.sin)
        )
        assert context.mask is not None, "streams have a mask"
        mask = as_bits(context.mask[:, 0, 0])
        slots, cells, frames = cast(LayerView, states[0]).index.on_host(shape[1])  # all layers of a segment share it
        first = self._blocks[0].norms[0]
        kernels.norm(given, first.gamma, first.beta, y)
        for index, (block, state) in enumerate(zip(self._blocks, states, strict=True)):
            layer = block.block
            keys, values, conv = cast(LayerView, state).cache.bits
            _, before_attention, before_conv, before_last = block.norms
            branch = layer.ff_in.down(layer.ff_in.expand(normed))
            kernels.add_norm(given, as_bits(branch), half, before_attention.gamma, before_attention.beta, sums, y)
            qkv = as_bits(layer.attention.qkv(normed))
            kernels.store(qkv, cells, cos, sin, keys, values)
            kernels.attend(qkv, slots, mask, cos, sin, keys, values, z)
            branch = layer.attention.out(mixed)
            kernels.add_norm(sums, as_bits(branch), whole, before_conv.gamma, before_conv.beta, sums, y)
            expanded = as_bits(layer.conv.expand(normed))
            inner = block.conv_norm
            kernels.convolve(expanded, slots, frames, conv, block.taps, block.bias, inner.gamma, inner.beta, z)
            branch = layer.conv.out(mixed)
            kernels.add_norm(sums, as_bits(branch), whole, before_last.gamma, before_last.beta, sums, y)
            branch = layer.ff_out.down(layer.ff_out.expand(normed))
            following = self._blocks[index + 1].norms[0] if index + 1 < len(self._blocks) else self._head_norm
            kernels.add_norm(sums, as_bits(branch), half, following.gamma, following.beta, sums, y)
            given = sums
        segment, logits, fed_back = self._segment, None, None
        if want_logits or segment.feedback is not None:
            logits = segment.head.logits(normed.view(shape))
        if segment.feedback is not None and logits is not None:
            fed_back = as_bits(segment.fed_back(logits).reshape(-1, width))
        if not segment.last:
            kernels.add_rms_norm(sums, np.zeros_like(sums) if fed_back is None else fed_back, self._gain, sums)
        return total.view(shape), logits

    def propagate(
        self, x: Tensor, context: FrameContext, states: Sequence[LayerState], last: Tensor | None = None
    ) -> None:
        """See `Segment.propagate`; frames of all streams in a row, (1, N, D), with `last`."""
        assert last is not None, "skipped frames come in a row"
        given, normed = as_bits(x[0]), torch.empty_like(x[0])
        cos, sin = (as_bits(part.reshape(len(given), -1)) for part in (context.cos, context.sin))
        latest = last.flatten(0, 1)
        ends, normed_ends = as_bits(latest), torch.empty_like(latest)
        slots, cells, frames = cast(LayerView, states[0]).index.on_host(last.shape[1])
        for block, state in zip(self._blocks, states, strict=True):
            _, before_attention, before_conv, _ = block.norms
            keys, values, conv = cast(LayerView, state).cache.bits
            self._kernels.norm(given, before_attention.gamma, before_attention.beta, as_bits(normed))
            projected = as_bits(block.block.attention.keys_values(normed))
            self._kernels.store(projected, cells, cos, sin, keys, values)
            self._kernels.norm(ends, before_conv.gamma, before_conv.beta, as_bits(normed_ends))
            self._kernels.keep(as_bits(block.block.conv.expand(normed_ends)), slots, frames, conv)


def measured(logits: Tensor, before: Tensor | None, after: Tensor, want_evidence: bool) -> list[np.ndarray]:
    """As `asr_exit.evidence.score` wants frames measured: (B, L, V) logits, (B, T, D) states, contiguous bf16."""
    from asr_exit import score_kernels

    def per_row(x: Tensor, count: int) -> list[np.ndarray]:
        return [np.empty(x.shape[:2], np.float32) for _ in range(count)]

    top, negative_entropy = per_row(logits, 2)
    labels = np.empty(top.shape, np.int64)
    rows = as_bits(logits.reshape(-1, logits.shape[-1]))
    score_kernels.posteriors(rows, top.reshape(-1), labels.reshape(-1), negative_entropy.reshape(-1))
    if not want_evidence:
        return [top, labels]
    products = [] if before is None else per_row(after, 3)
    if before is not None:
        states = (as_bits(x.reshape(-1, x.shape[-1])) for x in (before, after))
        score_kernels.likeness(*states, *(values.reshape(-1) for values in products))
    return [top, labels, negative_entropy, *products]


def _fp32(weights: Tensor) -> np.ndarray:
    return weights.detach().float().numpy()
