"""What an update minimises: CTC at every exit, in random shapes of streaming, and what is switched on besides.

Shapes: B batch, T encoder frames, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asr_exit.data import Batch
from asr_exit.encoder import Encoder, segment_states
from asr_exit.joint_gates import JointGates
from asr_exit.loss import consistency_loss, ctc_loss, distillation_losses, exit_losses, random_depth
from asr_exit.phones import PhoneExit
from asr_exit.schedule import Stage, TrainConfig


@dataclass(frozen=True)
class Draw:
    """What is random about one update; alike in all processes."""

    chunk_frames: int | None  # None = full context
    left_frames: int | None  # None = the model's
    segments: int  # how many run
    mixed_depth: bool  # every chunk leaves at an exit of its own
    seed: int


def draw(config: TrainConfig, stage: Stage, update: int) -> Draw:
    """The draw of update number `update`: a function of the configuration, so that a resumed run repeats it."""
    rng = np.random.default_rng((config.seed, update))
    chunk = _weighted(config.chunk_weights, rng)
    segments = stage.segments
    if rng.random() < config.shallow_probability:
        least = 1 + config.frozen_segments
        segments = int(rng.integers(least, max(least + 1, segments)))
    mixed = segments == config.model.num_exits and chunk > 0
    mixed = mixed and rng.random() < config.random_depth_probability
    seed = int(rng.integers(2**40))
    left = _weighted(config.left_weights, rng) if config.left_weights else None
    return Draw(chunk or None, left, segments, mixed, seed)


def _weighted(weights: Sequence[tuple[int, float]], rng: np.random.Generator) -> int:
    shares = np.array([weight for _, weight in weights])
    return weights[int(rng.choice(len(shares), p=shares / shares.sum()))][0]


def objective(
    model: Encoder,
    batch: Batch,
    config: TrainConfig,
    draw: Draw,
    device: torch.device,
    rank: int = 0,
    gates: JointGates | None = None,
    phones: PhoneExit | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of one batch.

    The `gates` learn from batches in chunks that run all exits, each at full depth; `phones` from batches that run the
    segment it reads, none at mixed depth.

    Returns:
        The scalar to minimise; and CTC per target token of every exit that ran, (exits,), or the one of a batch of
        mixed depth, (1,).
    """
    features, lengths = batch.features.to(device), batch.feature_lengths.to(device)
    targets, target_lengths = batch.targets.to(device), batch.target_lengths.to(device)
    depth = None
    if draw.mixed_depth:
        assert draw.chunk_frames is not None
        frames = math.ceil(features.shape[1] / config.model.subsampling)
        chunks = math.ceil(frames / draw.chunk_frames)
        generator = torch.Generator().manual_seed(draw.seed + rank)
        depth = random_depth(len(features), chunks, draw.segments, generator).to(device)
        if config.frozen_segments:
            depth[0, 0] = draw.segments  # something there is that learns
    if draw.segments < config.model.num_exits or depth is not None:
        gates = None
    if draw.segments < config.phone_segment or depth is not None:
        phones = None
    watch: AbstractContextManager[list[tuple[Tensor, Tensor]]] = (
        nullcontext([]) if gates is None and phones is None else segment_states(model)
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16), watch as states:
        output = model(
            features,
            lengths,
            chunk_frames=draw.chunk_frames,
            left_frames=draw.left_frames,
            num_segments=draw.segments,
            chunk_depth=depth,
            fill=config.random_depth_fill,
        )
    if output.mixed_logits is not None:
        loss = ctc_loss(output.mixed_logits, output.lengths, targets, target_lengths)
        return loss, loss.detach()[None]
    losses = exit_losses(output.logits, output.lengths, targets, target_lengths)
    weights = losses.new_tensor((config.exit_weights or (1.0,) * len(losses))[: len(losses)])
    weights[: config.frozen_segments] = 0.0
    weights = weights / weights.sum()
    total = (weights * losses).sum()
    if config.consistency_weight and batch.views == 2:
        consistency = consistency_loss(output.logits, output.lengths, target_lengths)
        total = total + config.consistency_weight * (weights * consistency).sum()
    if config.distillation_weight and len(losses) > 1:
        distilled = distillation_losses(output.logits, output.lengths, target_lengths)
        total = total + config.distillation_weight * (weights[:-1] * distilled).sum()
    if phones is not None:
        frames = output.lengths // config.model.labels_per_frame
        total = total + config.phone_weight * phones.loss(states[config.phone_segment - 1][1], frames, batch.texts)
    if gates is not None and draw.chunk_frames is not None:
        gate_loss = gates.loss(
            output.logits,
            states,
            output.lengths,
            targets,
            target_lengths,
            chunk_frames=draw.chunk_frames,
            price=config.gate_price,
        )
        total = total + config.gate_weight * gate_loss
    return total, losses.detach()
