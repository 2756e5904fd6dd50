"""Start training from a model file instead of random weights: to go on with other settings, or to fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from asr_exit.config import ModelConfig
from asr_exit.encoder import Encoder, Segment
from asr_exit.errors import ConfigError
from asr_exit.tokenizer import BLANK_ID

_MAY_DIFFER = (
    "num_layers",
    "handover_gain",
    "self_conditioning",
    "conv_lookahead",
    "head_hidden",
    "labels_per_frame",
)
_BLANK_BIAS = 9.0  # of labels that the source does not write, over the others


def warm_start(encoder: Encoder, source: Encoder, segments: int) -> None:
    """Copy the subsampling and the first `segments` segments of `source` into `encoder`, in place.

    Deeper segments keep their random weights, so do exit heads of another size and a feedback that the source lacks;
    the feature statistics are those of the training data. A head that gets a hidden layer at least twice as wide as the
    state says at first what the source's linear head says. Gains at the hand-over that only the source has are folded
    into the weights that follow them, so that the function is the same; without its feedback, or with the
    convolution's other reach, it is near. Where a frame writes more labels than in the source, the first ones are the
    source's and the others begin as blanks.

    Raises:
        ConfigError: the two differ in more than depth, hand-over, feedback, exit heads and the convolution's reach.
    """
    ours, theirs = encoder.config, source.config
    if replace(theirs, **{name: getattr(ours, name) for name in _MAY_DIFFER}) != ours:
        raise ConfigError(
            f"the model to start from has another architecture; only these may differ: {', '.join(_MAY_DIFFER)}"
        )
    if segments > theirs.num_exits:
        raise ConfigError(f"the first stage runs {segments} segments, the model to start from has {theirs.num_exits}")
    if ours.handover_gain and not theirs.handover_gain:
        raise ConfigError("the model to start from has no gain at its hand-overs; set handover_gain to false")
    encoder.subsampling.load_state_dict(source.subsampling.state_dict())
    gain = 1.0
    for own, other in zip(encoder.segments[:segments], source.segments, strict=False):
        _copy(own, _with_hidden_layer(own, _with_labels(own, other)))
        if own.gain is None:
            _divide_branches(own, gain)
            gain = 1.0 if other.gain is None else other.gain.item()


def in_shape_of(config: ModelConfig, source: Encoder) -> Encoder:
    """A new encoder of `config`, for evaluation, with all that `source` has for it: weights and feature statistics.

    Raises:
        ConfigError: as `warm_start`.
    """
    encoder = Encoder(config).eval()
    warm_start(encoder, source, config.num_exits)
    encoder.set_feature_stats(source.feature_mean, source.feature_std)
    return encoder


@torch.no_grad()
def renew_idle(encoder: Encoder, below: float) -> int:
    """Let hidden units of feed-forward halves that have fallen idle begin anew, in place.

    A half that only adds noise at first is shut by the gain of its norm, and stays shut: near zero the gradient of the
    weights behind the gain comes through it, and the gain's through those weights. Its units hardly vary then. Gain and
    bias of its norm are folded into the weights behind them; every idle unit gets fresh input weights and an output of
    zero, and what it added goes into the bias. The function stays the same but for the little by which they varied.

    Args:
        below: units whose input weights, times gain, have a Euclidean norm less than this are idle. As their input is
            normalised, that is the standard deviation of what they see.
    Returns:
        How many units that were.
    """
    renewed = 0
    for segment in encoder.segments:
        for half in (half for layer in segment.layers for half in (layer.ff_in, layer.ff_out)):
            weight, bias = half.up.weight * half.norm.weight, half.up.bias + half.up.weight @ half.norm.bias
            idle = weight.norm(dim=1) < below
            count = int(idle.sum())
            if not count:
                continue
            half.down.bias.add_(half.down.weight[:, idle] @ nn.functional.silu(bias[idle]))
            half.down.weight[:, idle] = 0.0
            weight[idle] = torch.randn(count, weight.shape[1], device=weight.device) * weight.shape[1] ** -0.5
            bias[idle] = 0.0
            half.up.weight.copy_(weight)
            half.up.bias.copy_(bias)
            half.norm.reset_parameters()
            renewed += count
    return renewed


def _with_labels(segment: Segment, source: Segment) -> dict[str, Tensor]:
    """The source's weights; with the rows of further labels in its head, and columns for them in its feedback."""
    state = source.state_dict()
    weight, bias = state["head.out.weight"], state["head.out.bias"]
    vocab, more = segment.head.vocab_size, len(segment.head.out.bias) - len(bias)
    if more <= 0:
        return state
    blank = torch.zeros(more)
    blank[BLANK_ID::vocab] = _BLANK_BIAS
    state["head.out.weight"] = torch.cat((weight, weight.new_zeros(more, weight.shape[1])))
    state["head.out.bias"] = torch.cat((bias, blank.to(bias)))
    if segment.feedback is not None and "feedback.weight" in state:
        columns = state["feedback.weight"]
        state["feedback.weight"] = torch.cat((columns, columns.new_zeros(len(columns), more)), dim=1)
    return state


def _with_hidden_layer(segment: Segment, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A linear head as one with a hidden layer, where ours has one of 2 D units or more: x = silu(x) - silu(-x).

    What the layer has beyond them keeps its random input weights and begins with outputs of zero.
    """
    hidden, weight = segment.head.hidden, state["head.out.weight"]
    if hidden is None or "head.hidden.weight" in state or hidden.out_features < 2 * weight.shape[1]:
        return state
    identity = torch.eye(weight.shape[1])
    inputs, out = hidden.weight.detach().clone(), weight.new_zeros(len(weight), hidden.out_features)
    inputs[: 2 * len(identity)] = torch.cat((identity, -identity))
    out[:, : 2 * len(identity)] = torch.cat((weight, -weight), dim=1)
    bias = torch.zeros(hidden.out_features)
    return {**state, "head.hidden.weight": inputs, "head.hidden.bias": bias, "head.out.weight": out}


def _copy(segment: Segment, state: Mapping[str, Any]) -> None:
    """Load what fits: a last segment has neither feedback nor gain, a head may have another size."""
    own = segment.state_dict()
    fitting = {name: state[name] for name, value in own.items() if name in state and state[name].shape == value.shape}
    if any(name.startswith("head.") and name not in fitting for name in own):
        fitting = {name: value for name, value in fitting.items() if not name.startswith("head.")}
    segment.load_state_dict({**own, **fitting})


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
