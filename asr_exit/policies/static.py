"""Policies that look at no evidence: full depth, a fixed exit, random depth, and a depth given per chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from asr_exit.errors import ConfigError
from asr_exit.policies.base import ExitPolicy, is_number


@dataclass(frozen=True)
class Full(ExitPolicy):
    """Every chunk runs to the last exit."""

    name = "full"


@dataclass(frozen=True)
class Fixed(ExitPolicy):
    """Every chunk leaves after layer `exit_layer`, of a model with an exit every `exit_every` layers."""

    exit_layer: int
    exit_every: int = 2

    def __post_init__(self) -> None:
        if self.exit_every < 1 or self.exit_layer < 1 or self.exit_layer % self.exit_every:
            raise ConfigError(
                f"there is no exit after layer {self.exit_layer}; exits follow every {self.exit_every} layers"
            )

    @property
    def name(self) -> str:
        return f"exit:{self.exit_layer}"

    def deepest(self, num_exits: int) -> int:
        if self.exit_layer > num_exits * self.exit_every:
            raise ConfigError(
                f"there is no exit after layer {self.exit_layer}; the last one is after {num_exits * self.exit_every}"
            )
        return self.exit_layer // self.exit_every - 1


@dataclass(frozen=True)
class RandomDepth(ExitPolicy):
    """Exits drawn independently per chunk: the baseline that every criterion must beat.

    The draw is a hash of (seed, chunk index). It needs no state, so batch order, neighbours and a replay of the stream
    cannot change it. Streams with the same seed draw the same depths.

    Attributes:
        seed: of the draws.
        mean_depth: wanted mean of (exit index) / (last exit index), in [0, 1]. The exits' probabilities are those of
            the largest entropy with that mean; None = uniform, which is the case 0.5.
    """

    seed: int = 0
    mean_depth: float | None = None

    def __post_init__(self) -> None:
        if self.mean_depth is not None and not (is_number(self.mean_depth) and 0.0 <= self.mean_depth <= 1.0):
            raise ConfigError(f"the mean of a random depth must be a number from 0 to 1, got {self.mean_depth!r}")

    @property
    def name(self) -> str:
        return f"random:{self.seed}" if self.mean_depth is None else f"random:{self.seed}/{self.mean_depth:g}"

    def max_exit(self, num_exits: int, chunk_index: int = 0) -> int:
        draw = _mix(_mix(self.seed) ^ chunk_index)
        if self.mean_depth is None:
            return draw * num_exits >> 64
        bounds = _tilted(num_exits, self.mean_depth)
        return sum(draw / 2.0**64 >= bound for bound in bounds[:-1])


@dataclass(frozen=True)
class Scheduled(ExitPolicy):
    """Chunk n of the stream leaves at `exits[n]` (exit indices); chunks beyond the end run to the last exit.

    For replaying depths that were chosen with knowledge no running policy has, such as an oracle's.
    """

    exits: tuple[int, ...]
    name = "scheduled"

    def max_exit(self, num_exits: int, chunk_index: int = 0) -> int:
        return min(self.exits[chunk_index], num_exits - 1) if chunk_index < len(self.exits) else num_exits - 1


@lru_cache(maxsize=256)
def _tilted(num_exits: int, mean_depth: float) -> tuple[float, ...]:
    """Cumulative probabilities of exits 0.. whose mean index is `mean_depth` * (num_exits - 1)."""
    last = num_exits - 1
    low, high = -60.0, 60.0
    for _ in range(60):
        tilt = (low + high) / 2
        weights = [math.exp(tilt * (k / max(1, last) - (tilt > 0))) for k in range(num_exits)]
        mean = sum(k * w for k, w in enumerate(weights)) / sum(weights)
        low, high = (tilt, high) if mean < mean_depth * last else (low, tilt)
    cumulative: list[float] = []
    total = sum(weights)
    for weight in weights:
        cumulative.append((cumulative[-1] if cumulative else 0.0) + weight / total)
    return tuple(cumulative)


def _mix(value: int) -> int:
    """The splitmix64 generator's output for state `value` (Steele et al., OOPSLA 2014), in 0..2**64-1."""
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
