"""Chunk-limited self-attention whose mask is built from absolute frame positions.

Shapes: B batch, T query frames, S key frames, H heads, E head dimension, D = H * E model dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -30_000.0  # finite, so that a padding query that sees no key stays finite too; exact zero after softmax


class KeyValueStore(Protocol):
    """Where one layer's keys and values of earlier chunks live (see `asr_exit.cache`)."""

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, T, H, E) keys and values of this chunk; return (B, S, H, E) ones of every frame held."""

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Only store them."""


@dataclass(frozen=True)
class FrameContext:
    """What all layers of one pass share about its frames."""

    cos: Tensor  # (B or 1, T, 1, E / 2) rotary cosines of the query positions
    sin: Tensor  # (B or 1, T, 1, E / 2)
    mask: Tensor | None  # additive, broadcastable to (B, H, T, S); None = every key visible
    chunk_frames: int | None  # chunk grid of the convolution; None = the whole utterance is one chunk
    valid: Tensor | None = None  # (B, T, 1) 1 for real frames, 0 for padding; None = no padding


def rotary(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for rotary position embedding (RoFormer, arXiv 2104.09864).

    Angles are taken in float64, so that a stream of many hours is as exact as its first second.

    Args:
        positions: (B, T) int64 absolute frames.
    Returns:
        Two (B, T, 1, head_dim / 2) tensors of `dtype`.
    """
    half = head_dim // 2
    inverse = 10_000.0 ** (-torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    angles = positions.to(torch.float64)[..., None, None] * inverse
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding to (B, T, N, E) with cosines and sines broadcastable to (B, T, N, E / 2)."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, cos, sin)
    return _rotate(x, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float = 1.0) -> Tensor:
    if torch.compiler.is_exporting():  # writing into views would become scatters
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    out = torch.empty_like(x)
    (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=direction)
    return out


class _Rotate(torch.autograd.Function):
    """Rotation whose gradient is the rotation back: four kernels each way, where autograd would record dozens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, direction=-1.0), None, None


def visible(query_pos: Tensor, key_pos: Tensor, chunk_frames: int | None, left_frames: int) -> Tensor:
    """Which keys each query sees: its own chunk and `left_frames // chunk_frames` chunks before it.

    Args:
        query_pos: (B, T) absolute frames. key_pos: (B, S) absolute frames, -1 = nothing there.
        chunk_frames: None = all keys that exist.
    Returns:
        (B, T, S) bool.
    """
    exists = (key_pos >= 0)[:, None, :]
    if chunk_frames is None:
        return exists.expand(-1, query_pos.shape[1], -1)
    query_chunk = (query_pos // chunk_frames)[:, :, None]
    key_chunk = torch.div(key_pos, chunk_frames, rounding_mode="floor")[:, None, :]
    return exists & (key_chunk <= query_chunk) & (key_chunk >= query_chunk - left_frames // chunk_frames)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool (B, T, S) -> additive (B, 1, T, S) of `dtype`."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, MASKED)[:, None]


class SelfAttention(nn.Module):
    """Multi-head self-attention; keys are stored after rotary embedding, so the cache never moves."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, d_model // num_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, context: FrameContext, store: KeyValueStore | None) -> Tensor:
        """(B, T, D) -> (B, T, D). Without a store the keys are those of this pass (offline: an empty cache)."""
        batch, frames, _ = x.shape
        qk, v = self.qkv(x).view(batch, frames, 3 * self.num_heads, self.head_dim).tensor_split([2 * self.num_heads], 2)
        q, k = rotate(qk, context.cos, context.sin).chunk(2, dim=2)
        if store is not None:
            k, v = store.update(k, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if torch.is_grad_enabled() and not q.is_cuda:  # the CPU's fused backward is 4 times slower than the plain one
            scores = torch.matmul(q * self.head_dim**-0.5, k.transpose(-1, -2))
            y = torch.matmul((scores if context.mask is None else scores + context.mask).softmax(dim=-1), v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask)
        return self.out(y.transpose(1, 2).reshape(batch, frames, -1))

    def store_only(self, x: Tensor, context: FrameContext, store: KeyValueStore) -> None:
        """Keys and values of (B, T, D) without the queries: what `propagate` needs (CALM, arXiv 2207.07061)."""
        batch, frames, _ = x.shape
        k, v = self.keys_values(x).view(batch, frames, 2, self.num_heads, self.head_dim).unbind(2)
        store.write(rotate(k, context.cos, context.sin), v)

    def keys_values(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, 2 * D): the last two thirds of `qkv`."""
        d_model = x.shape[-1]
        return F.linear(x, self.qkv.weight[d_model:], self.qkv.bias[d_model:])
