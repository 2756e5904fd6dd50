"""The encoder's parts as modules that `torch.onnx.export` takes: caches come in and new cache entries go out.

Nothing here repeats the model: the wrappers call the same `Segment` as training and serving, with a streaming state
whose tensors are the graph's inputs. Batch is 1 and left out of every shape.

Shapes: T frames of a chunk, W cached frames, L layers of a segment, H heads, E head dimension, D = H * E, h halo of the
convolution, V vocabulary, F = T * subsampling feature frames, N = T * labels_per_frame labels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from asr_exit.attention import FrameContext
from asr_exit.conv import ConvSubsampling
from asr_exit.encoder import Segment
from asr_exit.evidence import summarise


@dataclass
class _GraphState:
    """One layer's state inside a graph (an `asr_exit.conformer.LayerState`)."""

    keys: Tensor | None  # (H, W, E) held before the chunk; None = nothing is read, only written
    values: Tensor | None
    conv: Tensor  # (h, D)
    new: list[Tensor] = field(default_factory=list)  # (H, T, E) keys and values of the chunk
    new_conv: Tensor | None = None  # (h, D)

    def write(self, keys: Tensor, values: Tensor) -> None:
        self.new = [keys[0].transpose(0, 1), values[0].transpose(0, 1)]

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.write(keys, values)
        assert self.keys is not None, "a part that reads keys is given them"
        assert self.values is not None
        held = [torch.cat((old, new), dim=1) for old, new in zip((self.keys, self.values), self.new, strict=True)]
        return held[0].transpose(0, 1)[None], held[1].transpose(0, 1)[None]

    def conv_left(self) -> Tensor:
        return self.conv[None]

    def set_conv(self, gated: Tensor) -> None:
        halo = self.conv.shape[0]
        joined = torch.cat((self.conv, gated[0]), dim=0)
        self.new_conv = joined[joined.shape[0] - halo :]


class _Part(nn.Module):
    """What the graphs share: states from stacked caches, and stacked new entries from states."""

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self.segment = segment

    def _states(self, keys: Tensor | None, values: Tensor | None, conv: Tensor) -> list[_GraphState]:
        return [
            _GraphState(None if keys is None else keys[i], None if values is None else values[i], conv[i])
            for i in range(len(self.segment.layers))
        ]

    def _written(self, states: list[_GraphState]) -> tuple[Tensor, Tensor, Tensor]:
        """(L, H, T, E) keys and values, (L, h, D) convolution inputs."""
        keys, values = (torch.stack([state.new[which] for state in states]) for which in (0, 1))
        return keys, values, torch.stack([state.new_conv for state in states if state.new_conv is not None])


class SegmentGraph(_Part):
    """A segment, its exit, and the exit's evidence."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, keys: Tensor, values: Tensor, conv: Tensor
    ) -> tuple[Tensor, ...]:
        """One chunk.

        Args:
            x: (T, D). cos, sin: (T, E / 2) of the chunk's positions. mask: (W,) added to the scores of cached frames.
            keys, values: (L, H, W, E) cached, in any order. conv: (L, h, D).
        Returns:
            state (T, D); scores (NUM_COLUMNS + 2 N,) for `asr_exit.evidence.unpack`; log_probs (N, V); new_keys and
            new_values (L, H, T, E); new_conv (L, h, D).
        """
        seen = torch.cat((mask, mask.new_zeros(x.shape[0])))
        context = FrameContext(cos[None, :, None], sin[None, :, None], seen[None, None, None], None)
        states = self._states(keys, values, conv)
        after, logits = self.segment(x[None], context, states)
        log_probs = logits.log_softmax(dim=-1)
        top, ids = log_probs.max(dim=-1)
        summary = summarise(log_probs, top, ids, x[None], after)
        scores = torch.cat((summary[0], ids[0].to(top.dtype), top[0]))
        return after[0], scores, log_probs[0], *self._written(states)


class StemGraph(nn.Module):
    """Subsampling and the first segment."""

    def __init__(self, subsampling: ConvSubsampling, segment: Segment) -> None:
        super().__init__()
        self.subsampling, self.first = subsampling, SegmentGraph(segment)

    def forward(
        self,
        features: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        keys: Tensor,
        values: Tensor,
        conv: Tensor,
        tails: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """features (F, num_mels), normalised; tails: per stage (1, channels, 1, bands). Returns those of
        `SegmentGraph`, then the new tails."""
        x, new_tails = self.subsampling(features[None], tails)
        outputs = self.first(x[0], cos, sin, mask, keys, values, conv)
        return *outputs, *new_tails


class PropagateGraph(_Part):
    """What a skipped segment remembers of a chunk: keys, values and convolution input from the exit's state."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, conv: Tensor) -> tuple[Tensor, ...]:
        """As `SegmentGraph`; returns new_keys, new_values, new_conv."""
        context = FrameContext(cos[None, :, None], sin[None, :, None], None, None)
        states = self._states(None, None, conv)
        self.segment.propagate(x[None], context, states)
        return self._written(states)
