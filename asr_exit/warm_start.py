"""Start training from a model file instead of random weights: to go on with other settings, or to fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from asr_exit.encoder import Encoder, Segment
from asr_exit.errors import ConfigError


def warm_start(encoder: Encoder, source: Encoder, segments: int) -> None:
    """Copy the subsampling and the first `segments` segments of `source` into `encoder`, in place.

    Deeper segments keep their random weights, and the feature statistics those of the training data. Gains at the
    hand-over that only the source has are folded into the weights that follow them, so that the function is the same.

    Raises:
        ConfigError: the two differ in more than depth and hand-over.
    """
    ours, theirs = encoder.config, source.config
    alike = replace(theirs, num_layers=ours.num_layers, handover_gain=ours.handover_gain, head_hidden=ours.head_hidden)
    if alike != ours or theirs.head_hidden[:segments] != ours.head_hidden[:segments]:
        raise ConfigError("the model to start from has another architecture; only its number of layers may differ")
    if segments > theirs.num_exits:
        raise ConfigError(f"the first stage runs {segments} segments, the model to start from has {theirs.num_exits}")
    if ours.handover_gain and not theirs.handover_gain:
        raise ConfigError("the model to start from has no gain at its hand-overs; set handover_gain to false")
    encoder.subsampling.load_state_dict(source.subsampling.state_dict())
    gain = 1.0
    for own, other in zip(encoder.segments[:segments], source.segments, strict=False):
        _copy(own, other.state_dict())
        if own.gain is None:
            _divide_branches(own, gain)
            gain = 1.0 if other.gain is None else other.gain.item()


def _copy(segment: Segment, state: Mapping[str, Any]) -> None:
    """Load what fits: the last segment of either model has neither feedback nor gain."""
    own = segment.state_dict()
    segment.load_state_dict({name: state.get(name, value) for name, value in own.items()})


@torch.no_grad()
def _divide_branches(segment: Segment, by: float) -> None:
    """Make a segment's additions to the state smaller: every reader normalises it, so only their ratio matters."""
    for layer in segment.layers:
        for last in (layer.ff_in.down, layer.attention.out, layer.conv.out, layer.ff_out.down):
            _divide(last, by)
    if segment.feedback is not None:
        _divide(segment.feedback, by)


def _divide(linear: nn.Linear, by: float) -> None:
    linear.weight.div_(by)
    if linear.bias is not None:
        linear.bias.div_(by)
