"""Convolutions with explicit streaming state: strided subsampling, and the Conformer's depthwise convolution.

Shapes: B batch, T frames, D model dimension, C frames of a chunk, h halo frames = (kernel - 1) / 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvSubsampling(nn.Module):
    """log2(factor) convolutions of kernel 3 and stride 2, each with one frame of left context and no lookahead.

    Output frame t reads the feature frames up to factor * t + factor - 1, so a chunk needs exactly its own features.
    The state is one input frame per stage.
    """

    def __init__(self, num_mels: int, channels: int, d_model: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        stages = factor.bit_length() - 1
        self.bands = [num_mels]  # frequency bins at the input of each stage
        self.channels = [1] + [channels] * (stages - 1)
        self.convs = cast("list[nn.Conv2d]", nn.ModuleList())  # the list type is for the checker: indexing stays typed
        for stage in range(stages):
            self.convs.append(nn.Conv2d(self.channels[stage], channels, 3, stride=2, padding=(0, 1)))
            self.bands.append((self.bands[-1] + 1) // 2)
        for conv in self.convs:
            # several times faster on CPUs, and the closing view is free
            conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
        self.out = nn.Linear(channels * self.bands[-1], d_model)

    def tail_shapes(self) -> list[tuple[int, int]]:
        """(channels, bands) of the one-frame state that each stage carries."""
        return list(zip(self.channels, self.bands[:-1], strict=True))

    def forward(
        self, features: Tensor, tails: list[Tensor] | None = None, frames: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Normalised features -> model frames.

        Args:
            features: (B, factor * T, num_mels).
            tails: per stage (B, channels, 1, bands), the last input frame of the chunk before; None = start of audio.
            frames: (B,) model frames of each row, after which its tails are taken; None = all T.
        Returns:
            (B, T, D) and the new tails.
        """
        x = features.unsqueeze(-1).permute(0, 3, 1, 2)  # so that strides say channels-last, even of one channel
        new_tails = []
        for stage, conv in enumerate(self.convs):
            if frames is None:
                new_tails.append(x[:, :, -1:])
            else:
                ends = frames * (self.factor >> stage) - 1
                new_tails.append(x[torch.arange(len(x), device=x.device), :, ends].unsqueeze(2))
            if tails is None:  # zeros before the first frame; those after the last are never read, as T is even
                x = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
            else:
                x = conv(join(tails[stage].to(x.dtype), x))
            x = F.relu_(x)
        return self.out(x.permute(0, 2, 3, 1).flatten(2)), new_tails

    def macs_per_frame(self) -> int:
        """Multiply-accumulates per output frame."""
        total, frames = 0, self.factor
        for stage, conv in enumerate(self.convs):
            frames //= 2
            total += frames * self.bands[stage + 1] * conv.weight.numel()
        return total + self.out.weight.numel()


def join(tail: Tensor, x: Tensor) -> Tensor:
    """(B, channels, 1, bands) and (B, channels, T, bands) -> (B, channels, 1 + T, bands), channels-last in memory.

    `torch.cat` would forget that about a single channel, and every convolution after it would take three times as long.
    """
    if torch.compiler.is_exporting():  # a graph has no memory layout
        return torch.cat((tail, x), dim=2)
    return torch.cat((tail.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)), dim=1).permute(0, 3, 1, 2)


class _ShiftedDepthwise(torch.autograd.Function):
    """`ChunkConv`'s depthwise convolution as one multiply-add per tap, on (B, T, D) as it lies in memory.

    For training on a CPU, where a grouped convolution's backward pass over many short chunks is 5 to 10 times slower.
    """

    @staticmethod
    def _pairs(padded: Tensor, out: Tensor, halo: int, chunk: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(tap, input view, output view) for every tap; views of equal shape (B, ..., D)."""
        batch, total, d_model = out.shape
        inside = padded[:, halo:].unflatten(1, (total // chunk, chunk))
        by_chunk = out.view(batch, total // chunk, chunk, d_model)
        for tap in range(2 * halo + 1):
            ahead = tap - halo
            if ahead <= 0:
                yield tap, padded[:, tap : tap + total], out
            elif ahead < chunk:
                yield tap, inside[:, :, ahead:], by_chunk[:, :, : chunk - ahead]

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor, chunk: int) -> Tensor:
        """padded (B, h + T, D) with T a multiple of `chunk`; weight (K, D); bias (D,) -> (B, T, D)."""
        halo = weight.shape[0] // 2
        out = bias.expand(padded.shape[0], padded.shape[1] - halo, -1).contiguous()
        for tap, source, target in _ShiftedDepthwise._pairs(padded, out, halo, chunk):
            target.addcmul_(source, weight[tap])
        ctx.save_for_backward(padded, weight)
        ctx.chunk = chunk
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        padded, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        halo = weight.shape[0] // 2
        grad_padded, grad_weight = torch.zeros_like(padded), torch.zeros_like(weight)
        sources = _ShiftedDepthwise._pairs(padded, grad, halo, ctx.chunk)
        targets = _ShiftedDepthwise._pairs(grad_padded, grad, halo, ctx.chunk)
        for (tap, source, part), (_, grad_source, _) in zip(sources, targets, strict=True):
            grad_source.addcmul_(part, weight[tap])
            grad_weight[tap] = (source * part).flatten(0, -2).sum(dim=0)
        return grad_padded, grad_weight, grad.flatten(0, 1).sum(dim=0), None


class ChunkConv(nn.Module):
    """Depthwise convolution that looks back into earlier chunks but never past the end of its own chunk.

    Frames near the end of a chunk see zeros where the future would be (dynamic chunk convolution, arXiv 2304.09325):
    more accurate than a causal kernel at the same latency, and streaming equals offline on the same chunk grid.
    Without `lookahead` it is causal: only the first half of the kernel is used.
    """

    def __init__(self, d_model: int, kernel: int, lookahead: bool = True) -> None:
        super().__init__()
        self.halo, self.lookahead = (kernel - 1) // 2, lookahead
        self.expand = nn.Linear(d_model, 2 * d_model)
        self.depthwise = nn.Conv1d(d_model, d_model, kernel, groups=d_model)
        self.norm = nn.LayerNorm(d_model)
        self.out = nn.Linear(d_model, d_model)

    def taps(self) -> Tensor:
        """The kernel, (D, 1, K)."""
        weight = self.depthwise.weight
        return weight if self.lookahead else F.pad(weight[..., : self.halo + 1], (0, self.halo))

    def gated(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D): the depthwise convolution's input, which is also what streaming state holds."""
        return F.glu(self.expand(x), dim=-1)

    def forward(self, gated: Tensor, left: Tensor | None, chunk_frames: int | None) -> Tensor:
        """Depthwise convolution, normalisation and output projection.

        Args:
            gated: (B, T, D) from `gated`, zero in padding frames, starting on a chunk boundary.
            left: (B, h, D) gated frames before the first one; None = start of audio.
            chunk_frames: C; None = one chunk of T frames.
        Returns:
            (B, T, D).
        """
        batch, frames, d_model = gated.shape
        halo = self.halo
        chunk = frames if chunk_frames is None else min(chunk_frames, frames)
        chunks = -(-frames // chunk)
        if left is None:
            left = gated.new_zeros(batch, halo, d_model)
        x = torch.cat((left.to(gated.dtype), gated), dim=1)
        x = F.pad(x, (0, 0, 0, chunks * chunk - frames))
        if torch.is_grad_enabled():
            taps = self.taps()[:, 0].t().to(x.dtype).contiguous()  # strided taps cost five times as much
            bias = cast(Tensor, self.depthwise.bias).to(x.dtype)
            y = _ShiftedDepthwise.apply(x, taps, bias, chunk)[:, :frames]
            return self.out(F.silu(self.norm(y)))
        if chunks == 1 and x.is_cpu and not torch.compiler.is_exporting():
            # (B, D, 1, h + C + h) as it lies in memory: oneDNN takes that twice as fast as the rows of `conv1d`
            x = F.pad(x, (0, 0, 0, halo)).unsqueeze(1).permute(0, 3, 1, 2)
            y = F.conv2d(x, self.taps().unsqueeze(2), self.depthwise.bias, groups=d_model)
            return self.out(F.silu(self.norm(y.permute(0, 2, 3, 1).squeeze(1)[:, :frames])))
        if chunks > 1:  # (B, n, D, h + C): every chunk with the frames before it, and nothing after it
            x = x.unfold(1, halo + chunk, chunk).reshape(batch * chunks, d_model, halo + chunk)
        else:
            x = x.transpose(1, 2)
        y = F.conv1d(F.pad(x, (0, halo)), self.taps(), self.depthwise.bias, groups=d_model)
        y = y.transpose(1, 2).reshape(batch, chunks * chunk, d_model)[:, :frames]
        return self.out(F.silu(self.norm(y)))
