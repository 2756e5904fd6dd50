"""The Conformer block (arXiv 2005.08100), pre-norm, with residual branches that can be gated per frame.

The gate is how training sees random depth per chunk: a frame whose gate is 0 keeps its state through the block while
its keys, values and convolution input are still projected from that state, which is what the `propagate` fill does in
serving.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr_exit.attention import FrameContext, KeyValueStore, SelfAttention
from asr_exit.config import ModelConfig
from asr_exit.conv import ChunkConv


class LayerState(KeyValueStore, Protocol):
    """One layer's streaming state for the streams of a batch."""

    def conv_left(self) -> Tensor:
        """(B, h, D) gated convolution inputs before this chunk."""

    def set_conv(self, gated: Tensor) -> None:
        """Remember the last h frames of (B, T, D)."""


class FeedForward(nn.Module):
    """Position-wise feed-forward with SiLU."""

    def __init__(self, d_model: int, ff_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, ff_dim)
        self.down = nn.Linear(ff_dim, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.expand(self.norm(x)))

    def expand(self, x: Tensor) -> Tensor:
        """The hidden layer."""
        return F.silu(self.up(x))


class ConformerBlock(nn.Module):
    """Half feed-forward, self-attention, convolution, half feed-forward; no closing norm (the exits have their own)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_model = config.d_model
        self.ff_in = FeedForward(d_model, config.ff_dim)
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = SelfAttention(d_model, config.num_heads)
        self.conv_norm = nn.LayerNorm(d_model)
        self.conv = ChunkConv(d_model, config.conv_kernel, config.conv_lookahead)
        self.ff_out = FeedForward(d_model, config.ff_dim)

    def forward(
        self,
        x: Tensor,
        context: FrameContext,
        state: LayerState | None = None,
        gate: Tensor | None = None,
        hole: bool = False,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D).

        Args:
            state: streaming state; None = offline pass.
            gate: (B, T, 1) of 0 and 1; None = all 1. hole: frames with gate 0 leave zeros in the convolution, too
                (their keys are masked by `context`).
        """

        def add(x: Tensor, branch: Tensor, scale: float = 1.0) -> Tensor:
            return torch.add(x, branch if gate is None else gate * branch, alpha=scale)

        x = add(x, self.ff_in(x), 0.5)
        x = add(x, self.attention(self.attention_norm(x), context, state))
        gated = self.conv.gated(self.conv_norm(x))
        if context.valid is not None:
            gated = gated * context.valid
        if hole and gate is not None:
            gated = gated * gate
        left = None
        if state is not None:
            left = state.conv_left()
            state.set_conv(gated)
        x = add(x, self.conv(gated, left, context.chunk_frames))
        return add(x, self.ff_out(x), 0.5)

    def propagate(self, x: Tensor, context: FrameContext, state: LayerState, last: Tensor | None = None) -> None:
        """Advance the streaming state over frames that skip this block: same effect as `gate` = 0.

        Args:
            x: (B, T, D); or (1, N, D), the frames of all streams in a row, together with `last`.
            last: (B, h, D) last frames of each stream; None = those of `x`.
        """
        self.attention.store_only(self.attention_norm(x), context, state)
        last = x[:, -max(1, self.conv.halo) :] if last is None else last
        state.set_conv(self.conv.gated(self.conv_norm(last)))

    def macs_per_frame(self) -> int:
        """Multiply-accumulates per frame, without attention scores (they depend on the keys visible)."""
        return sum(p.numel() for m in self.modules() if isinstance(m, nn.Linear | nn.Conv1d) for p in [m.weight])
