"""The early-exit encoder: subsampling, segments of Conformer blocks, and an exit head after each segment.

Shapes: B batch, T encoder frames, D model dimension, V vocabulary, L = T * `labels_per_frame` labels. A segment is the
layers between two exits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from asr_exit.attention import FrameContext, additive, rotary, visible
from asr_exit.config import ModelConfig
from asr_exit.conformer import ConformerBlock, LayerState
from asr_exit.conv import ConvSubsampling


@dataclass(frozen=True)
class EncoderOutput:
    """What an offline pass returns."""

    logits: list[Tensor]  # per exit (B, L, V); empty when depth was given per chunk
    lengths: Tensor  # (B,) labels of each utterance, blanks counted
    mixed_logits: Tensor | None = None  # (B, L, V): every chunk's logits at its own exit


class ExitHead(nn.Module):
    """Normalisation and linear CTC layer, with a hidden layer in between where shallow states need one (LGViT).

    A frame may write several labels in a row: CTC needs one for every piece, and more of them than there are frames
    where speech is fast and its words are spelled in small pieces.
    """

    def __init__(self, d_model: int, vocab_size: int, hidden: int = 0, labels_per_frame: int = 1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.hidden = nn.Linear(d_model, hidden) if hidden else None
        self.out = nn.Linear(hidden or d_model, labels_per_frame * vocab_size)
        self.vocab_size = vocab_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, L, V) logits."""
        return self.logits(self.norm(x))

    def logits(self, x: Tensor) -> Tensor:
        """The same of a state that has been normalised."""
        x = self.out(x if self.hidden is None else nn.functional.silu(self.hidden(x)))
        return x if x.shape[-1] == self.vocab_size else x.reshape(x.shape[0], -1, self.vocab_size)

    def macs_per_frame(self) -> int:
        """Multiply-accumulates per frame."""
        return self.out.weight.numel() + (0 if self.hidden is None else self.hidden.weight.numel())


class Segment(nn.Module):
    """The layers between two exits, the exit after them, and the optional self-conditioning that feeds it back.

    Self-conditioning (arXiv 2104.02724) adds a projection of the exit's posteriors to the state that deeper segments
    read. The state handed on has unit root mean square: without that the residual stream outgrows its branches, and
    deep layers can hardly change it. Every reader of the state normalises it first, so a state can wait in an inbox, or
    be propagated past any number of segments, as it is.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        last = index == config.num_exits - 1
        self.layers = cast(
            "list[ConformerBlock]", nn.ModuleList(ConformerBlock(config) for _ in range(config.exit_every))
        )
        hidden = config.head_hidden[index] if config.head_hidden else 0
        self.head = ExitHead(config.d_model, config.vocab_size, hidden, config.labels_per_frame)
        posteriors = config.labels_per_frame * config.vocab_size
        self.feedback = nn.Linear(posteriors, config.d_model) if config.self_conditioning and not last else None
        self.gain = nn.Parameter(torch.ones(())) if config.handover_gain and not last else None
        self.last = last

    def forward(
        self,
        x: Tensor,
        context: FrameContext,
        states: Sequence[LayerState] | None = None,
        gate: Tensor | None = None,
        hole: bool = False,
        want_logits: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> the next segment's input (B, T, D), and the exit's logits (B, L, V) if wanted."""
        for index, layer in enumerate(self.layers):
            x = layer(x, context, None if states is None else states[index], gate, hole)
        logits = self.head(x) if want_logits or self.feedback is not None else None
        if self.feedback is not None and logits is not None:
            fed_back = self.fed_back(logits)
            x = x + (fed_back if gate is None else gate * fed_back)
        if not self.last:
            x = nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)
            x = x if self.gain is None else x * self.gain.to(x.dtype)
        return x, logits

    def fed_back(self, logits: Tensor) -> Tensor:
        """What an exit's (B, L, V) logits add to the state that deeper segments read, (B, T, D)."""
        assert self.feedback is not None
        posteriors = logits.softmax(dim=-1)
        if posteriors.shape[-1] != self.feedback.in_features:  # a frame's labels side by side
            posteriors = posteriors.reshape(len(posteriors), -1, self.feedback.in_features)
        return self.feedback(posteriors)

    def propagate(
        self, x: Tensor, context: FrameContext, states: Sequence[LayerState], last: Tensor | None = None
    ) -> None:
        """Fill the states of skipped layers from the exit's hidden state; arguments as `ConformerBlock.propagate`."""
        for layer, state in zip(self.layers, states, strict=True):
            layer.propagate(x, context, state, last)


class Encoder(nn.Module):
    """Conformer/CTC encoder with an exit after every `config.exit_every` layers."""

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        num_mels = config.features.num_mels
        self.register_buffer("feature_mean", torch.zeros(num_mels))
        self.register_buffer("feature_std", torch.ones(num_mels))
        self.subsampling = ConvSubsampling(num_mels, config.subsampling_channels, config.d_model, config.subsampling)
        self.segments = cast(
            "list[Segment]",
            nn.ModuleList(Segment(config, index) for index in range(config.num_exits)),
        )
        for segment in self.segments:
            if segment.feedback is not None:
                nn.init.zeros_(segment.feedback.weight)
                nn.init.zeros_(segment.feedback.bias)

    def set_feature_stats(self, mean: Tensor, std: Tensor) -> None:
        """Store per-bin statistics of the training data, both (num_mels,)."""
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std)

    def in_precision(self, dtype: torch.dtype) -> Encoder:
        """Make weights and activations `dtype`, in place; feature statistics stay float32. Returns itself."""
        mean, std = self.feature_mean, self.feature_std
        self.to(dtype)
        self.feature_mean, self.feature_std = mean, std
        return self

    def normalise(self, features: Tensor) -> Tensor:
        """(..., num_mels) log-mel -> zero mean, unit variance by the training statistics."""
        return (features - self.feature_mean) / self.feature_std

    def forward(
        self,
        features: Tensor,
        feature_lengths: Tensor,
        *,
        chunk_frames: int | None,
        left_frames: int | None = None,
        num_segments: int | None = None,
        chunk_depth: Tensor | None = None,
        fill: str = "propagate",
    ) -> EncoderOutput:
        """Offline pass over whole utterances: one call with an empty cache and the chunk mask.

        Args:
            features: (B, F, num_mels) log-mel. feature_lengths: (B,) valid feature frames.
            chunk_frames: chunk grid of attention and convolution; None = full context.
            left_frames: keys visible before the chunk; default from the configuration.
            num_segments: run only the first segments. chunk_depth: (B, chunks) in 1..num_segments, segments that each
                chunk runs; deeper layers see what `fill` ("propagate", "hole", or "catch_up": the chunk itself) leaves
                them in serving.
        """
        factor = self.config.subsampling
        padded = -(-features.shape[1] // factor) * factor
        frame_index = torch.arange(padded, device=features.device)
        real = (frame_index < feature_lengths[:, None])[:, :, None]
        x = nn.functional.pad(self.normalise(features), (0, 0, 0, padded - features.shape[1]))
        x, _ = self.subsampling((x * real).to(self.subsampling.out.weight.dtype))
        lengths = (feature_lengths + factor - 1) // factor
        positions = torch.arange(x.shape[1], device=x.device)[None]
        valid = positions < lengths[:, None]
        left = self.config.left_context_frames if left_frames is None else left_frames
        depth = None
        if chunk_depth is not None:
            if chunk_frames is None:
                raise ValueError("chunk_depth needs chunk_frames")
            depth = chunk_depth.repeat_interleave(chunk_frames, dim=1)[:, : x.shape[1], None]
        cos, sin = rotary(positions, self.config.d_model // self.config.num_heads, x.dtype)
        logits: list[Tensor] = []
        mixed: Tensor | None = None
        for index, segment in enumerate(self.segments[: num_segments or len(self.segments)]):
            hole = depth is not None and fill == "hole"
            if index == 0 or hole:
                keys = torch.where(
                    valid & (depth[..., 0] > index) if hole and depth is not None else valid, positions, -1
                )
                mask = additive(visible(positions.expand_as(keys), keys, chunk_frames, left), x.dtype)
                context = FrameContext(cos, sin, mask, chunk_frames, valid[..., None].to(x.dtype))
            gate = None if depth is None or fill == "catch_up" else (depth > index).to(x.dtype)
            x, exit_logits = segment(x, context, gate=gate, hole=hole)
            if depth is None:
                logits.append(exit_logits)
            else:
                deep = (depth > index).repeat_interleave(self.config.labels_per_frame, dim=1)
                mixed = exit_logits if mixed is None else torch.where(deep, exit_logits, mixed)
        return EncoderOutput(logits, lengths * self.config.labels_per_frame, mixed)


@contextmanager
def segment_states(encoder: Encoder) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects the (B, T, D) states before and after each segment, in the order of the calls that are made inside."""
    states: list[tuple[Tensor, Tensor]] = []
    handles = [
        segment.register_forward_hook(lambda _, inputs, output: states.append((inputs[0], output[0])))
        for segment in encoder.segments
    ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
