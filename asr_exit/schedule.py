"""What a training run does when: frozen settings, stages of growth, learning rate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from asr_exit.augment import AugmentConfig
from asr_exit.config import ModelConfig, from_mapping, require
from asr_exit.data import BatchPlan
from asr_exit.optimizer import OPTIMIZERS


@dataclass(frozen=True)
class Stage:
    """A stretch of the run. Growing from few segments and short utterances leaves CTC's blank plateau quickly."""

    until: float  # share of the run at which the stage ends; the last stage has 1.0
    segments: int  # how many of the model's segments run
    batch_seconds: float
    max_seconds: float
    augment: bool
    learning_rate: float
    heads_only: bool = False  # all but the exit heads is frozen (second stage of LGViT, arXiv 2308.00255)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run, except where it runs. Exactly one of `minutes` and `hours` sets its length."""

    NESTED = {"model": ModelConfig, "augment": AugmentConfig}  # noqa: RUF012  (read by from_mapping)

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    stages: tuple[Stage, ...] = (Stage(1.0, 6, 100.0, 17.0, True, 1e-3),)
    minutes: float | None = None  # wall clock
    hours: float | None = None  # of audio seen
    seed: int = 1
    min_seconds: float = 0.5
    corpus_shares: tuple[tuple[str, float], ...] = ()
    speeds: tuple[float, ...] = ()  # of speed perturbation; empty: all that prepare made
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    warmup_updates: int = 200
    stage_warmup_updates: int = 50
    decay_from: float = 0.4  # share of the run; before it the stage's learning rate holds
    final_learning_rate: float = 0.02  # share of the stage's
    optimizer: str = "adamw"  # or "muon", for the matrices inside the layers
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    # (chunk frames, weight of the draw), 0 frames: full context
    chunk_weights: tuple[tuple[int, float], ...] = ((2, 1.0), (4, 2.0), (8, 5.0), (16, 2.0), (0, 1.0))
    left_weights: tuple[tuple[int, float], ...] = ()  # likewise for the left context; empty: always the model's
    random_depth_probability: float = 0.25  # of batches that run all segments
    random_depth_fill: str = "propagate"  # what skipped layers see, as in serving; or "hole", "catch_up"
    exit_weights: tuple[float, ...] = ()  # of the exits' losses, shallow to deep; empty: equal
    consistency_weight: float = 0.0  # CR-CTC, arXiv 2410.05101; above 0 every utterance comes in two views
    distillation_weight: float = 0.0  # of the deepest exit into all others
    gate_weight: float = 0.0  # above 0 a gate per exit is trained, too, with this weight of its loss: `joint_gates`
    gate_price: float = 0.05  # of full-depth compute in that loss, in nats per target token
    phone_weight: float = 0.0  # above 0 phones are told apart, too, with this weight of their CTC loss: `phones`
    phone_segment: int = 2  # after how many segments that is done
    frozen_segments: int = 0  # of the first ones, with subsampling and exits: they stay as they are, deeper ones learn
    renew_below: float = 0.0  # in a model to start from: feed-forward units that idle begin anew (`renew_idle`)
    accumulate: int = 1  # batches per update and process
    shallow_probability: float = 0.0  # of batches that run only a random number of the first segments (Sorted LLaMA)
    bf16: bool = True  # where the processor multiplies in it
    checkpoint_seconds: float = 120.0
    evaluate_seconds: float = 480.0
    evaluate_utterances: int = 60
    max_bad_updates: int = 10

    def __post_init__(self) -> None:
        stages = tuple(from_mapping(Stage, s, "stages") if isinstance(s, Mapping) else s for s in self.stages)
        object.__setattr__(self, "stages", stages)
        for name in ("corpus_shares", "chunk_weights", "left_weights"):  # JSON has lists
            object.__setattr__(self, name, tuple(tuple(item) for item in getattr(self, name)))
        for name in ("exit_weights", "speeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require((self.minutes is None) != (self.hours is None), "set one of minutes and hours")
        require((self.minutes or self.hours or 0.0) > 0, "minutes or hours must be positive")
        ends = [stage.until for stage in stages]
        require(ends == sorted(ends) and ends[-1:] == [1.0], "stages must end in rising order, the last at 1.0")
        require(
            all(1 <= stage.segments <= self.model.num_exits for stage in stages),
            f"stages must run 1 to {self.model.num_exits} segments",
        )
        require(any(weight > 0 for _, weight in self.chunk_weights), "one chunk weight must be positive")
        require(
            all(0 <= frames <= self.model.max_chunk_frames for frames, _ in self.chunk_weights),
            f"chunks must be 0 (full context) to {self.model.max_chunk_frames} frames",
        )
        longest = self.model.left_context_frames
        require(
            all(0 <= frames <= longest for frames, _ in self.left_weights),
            f"left contexts must be 0 to {longest} frames, what the model keeps when streaming",
        )
        fills = ("propagate", "hole", "catch_up")
        require(self.random_depth_fill in fills, f"random_depth_fill must be one of {', '.join(fills)}")
        require(
            len(self.exit_weights) in (0, self.model.num_exits) and all(weight > 0 for weight in self.exit_weights),
            f"exit_weights must be {self.model.num_exits} positive numbers, or none",
        )
        require(self.optimizer in OPTIMIZERS, f"optimizer must be {' or '.join(OPTIMIZERS)}")
        require(
            self.gate_weight == 0 or (self.gate_weight > 0 and self.model.num_exits > 1),
            "gate_weight must be 0, or positive with a model of two exits or more",
        )
        require(self.gate_price >= 0, "gate_price must not be negative")
        require(self.phone_weight >= 0, "phone_weight must not be negative")
        require(
            self.phone_weight == 0 or 1 <= self.phone_segment <= self.model.num_exits,
            f"phone_segment must be 1 to {self.model.num_exits}, the model's segments",
        )
        require(
            0 <= self.frozen_segments < min(stage.segments for stage in stages),
            "frozen_segments must leave a segment to train in every stage",
        )
        require(self.renew_below >= 0, "renew_below must not be negative")
        require(self.accumulate >= 1, "accumulate must be at least 1")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Strict inverse of `to_dict`."""
        return from_mapping(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready mapping."""
        return dataclasses.asdict(self)

    def stage_index(self, progress: float) -> int:
        """Stage at `progress` in 0..1."""
        return next((i for i, stage in enumerate(self.stages) if progress < stage.until), len(self.stages) - 1)

    def learns(self, stage: Stage, parameter: str) -> bool:
        """Whether that stage trains the encoder's parameter of this name."""
        if stage.heads_only and ".head." not in parameter:
            return False
        last = self.frozen_segments - 1
        if parameter.startswith((f"segments.{last}.feedback.", f"segments.{last}.gain")):
            return True  # only deeper segments hear of it
        frozen = [f"segments.{index}." for index in range(self.frozen_segments)]
        return not parameter.startswith(("subsampling.", *frozen) if frozen else ())

    def plan(self, stage: Stage) -> BatchPlan:
        """How that stage's batches are cut."""
        views = 2 if self.consistency_weight > 0 and stage.augment else 1
        return BatchPlan(
            stage.batch_seconds, stage.max_seconds, self.min_seconds, self.corpus_shares, views, self.speeds
        )

    def learning_rate(self, stage: Stage, progress: float, updates: int, stage_updates: int) -> float:
        """Warm-up at the start and, shorter, after each growth; then constant; then half a cosine."""
        rise = min(1.0, (updates + 1) / max(1, self.warmup_updates))
        if updates != stage_updates:
            rise = min(rise, (stage_updates + 1) / max(1, self.stage_warmup_updates))
        fall = min(1.0, max(0.0, (progress - self.decay_from) / max(1e-9, 1.0 - self.decay_from)))
        floor = self.final_learning_rate
        return stage.learning_rate * rise * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * fall)))
