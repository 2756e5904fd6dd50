"""When to leave: exit policies and the evidence they look at.

Before a chunk is computed the engine asks `max_exit`; after every exit shallower than that ceiling it asks `stop`.
Budget and load may lower the ceiling further (`asr_exit.budget`, `asr_exit.load_control`). A policy holds no stream
state, so one object serves any number of streams. No torch here: evidence arrives as floats.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeGuard

from asr_exit.errors import ConfigError

Thresholds = float | tuple[float | None, ...]


class Reason(StrEnum):
    """Why a chunk ended at its exit."""

    CONFIDENT = "confident"  # the policy's criterion was met
    BUDGET = "budget"  # the caller's compute budget set the ceiling
    LOAD = "load"  # the machine's load set the ceiling
    FULL = "full"  # as deep as the policy goes
    FINAL = "final"  # the end of the utterance or stream was drained at full depth


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one exit knows about one chunk of one stream. Frames whose most likely label is blank are blank frames.

    Attributes:
        max_posterior: mean over non-blank frames of the largest posterior; over all frames if all are blank.
        max_posterior_all: the same over all frames.
        entropy: mean over non-blank frames of -sum_v p ln p / ln V, in [0, 1]; over all frames if all are blank.
        entropy_all: the same over all frames.
        blank_mass: share of blank frames.
        agreement: 1 if the greedy text of the chunk equals the previous exit's, else 0; 0 at the first exit.
        similarity: mean cosine between a frame's hidden state at this exit and at the one before (at the first exit:
            before the first layer).

    A value that is not a number never stops a chunk.
    """

    max_posterior: float
    max_posterior_all: float
    entropy: float
    entropy_all: float
    blank_mass: float
    agreement: float = 0.0
    similarity: float = 0.0


class ExitPolicy(Protocol):
    """Chooses the exit of a chunk. Inherit from it to get the defaults: full depth, no evidence, never stop."""

    @property
    def name(self) -> str:
        """Short name for tables and logs, e.g. "exit:4"."""

    @property
    def needs_evidence(self) -> bool:
        """Whether `stop` looks at its evidence; if not, the engine need not compute any."""
        return False

    def deepest(self, num_exits: int) -> int:
        """Deepest exit index that any chunk may take: deeper layers never run, and its answers are final.

        Raises:
            ConfigError: the policy does not fit a model with `num_exits` exits.
        """
        return num_exits - 1

    def max_exit(self, num_exits: int, chunk_index: int = 0) -> int:
        """Deepest exit index for chunk `chunk_index` of a stream, known before anything is computed.

        Raises:
            ConfigError: the policy does not fit a model with `num_exits` exits.
        """
        return self.deepest(num_exits)

    def stop(self, exit_index: int, evidence: Evidence | None) -> bool:
        """Whether to leave at `exit_index`, which lies above the ceiling."""
        return False


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
class _Threshold(ExitPolicy):
    """Common part of the threshold criteria: one threshold for all exits, or one per exit with None for "not here".

    The last exit needs none: a per-exit tuple may leave it out.
    """

    threshold: Thresholds
    needs_evidence = True

    def __post_init__(self) -> None:
        values = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        for value in values:
            if value is None and isinstance(self.threshold, tuple):
                continue
            if not _is_number(value) or not 0.0 <= value <= 1.0:
                raise ConfigError(f"{self.criterion()} threshold {value!r} must be a number from 0 to 1")

    @classmethod
    def criterion(cls) -> str:
        return cls.__name__.lower()

    @property
    def name(self) -> str:
        return self.criterion() if isinstance(self.threshold, tuple) else f"{self.criterion()}:{self.threshold:g}"

    def deepest(self, num_exits: int) -> int:
        if isinstance(self.threshold, tuple) and len(self.threshold) not in (num_exits - 1, num_exits):
            raise ConfigError(
                f"{self.criterion()} has {len(self.threshold)} thresholds; a model with {num_exits} exits needs "
                f"{num_exits - 1} or {num_exits}"
            )
        return num_exits - 1

    def at(self, exit_index: int) -> float | None:
        """Threshold of one exit; None where the criterion never stops."""
        if not isinstance(self.threshold, tuple):
            return self.threshold
        return self.threshold[exit_index] if exit_index < len(self.threshold) else None


@dataclass(frozen=True)
class Posterior(_Threshold):
    """Leave when `Evidence.max_posterior` reaches the threshold.

    The cheap per-chunk form of the sentence confidence of arXiv 2309.09546 ("Training dynamic models using early exits
    for automatic speech recognition on resource-constrained devices"), which needs K beams.
    """

    def stop(self, exit_index: int, evidence: Evidence | None) -> bool:
        threshold = self.at(exit_index)
        return threshold is not None and evidence is not None and evidence.max_posterior >= threshold


@dataclass(frozen=True)
class Entropy(_Threshold):
    """Leave when `Evidence.entropy` falls to the threshold.

    Frame entropy as in arXiv 2309.09546, but divided by ln V instead of V, so that it lies in [0, 1], and averaged over
    non-blank frames; thresholds of that paper do not transfer.
    """

    def stop(self, exit_index: int, evidence: Evidence | None) -> bool:
        threshold = self.at(exit_index)
        return threshold is not None and evidence is not None and evidence.entropy <= threshold


@dataclass(frozen=True)
class RandomDepth(ExitPolicy):
    """Exits drawn uniformly and independently per chunk: the baseline that every criterion must beat.

    The draw is a hash of (seed, chunk index). It needs no state, so batch order, neighbours and a replay of the stream
    cannot change it. Streams with the same seed draw the same depths.
    """

    seed: int = 0

    @property
    def name(self) -> str:
        return f"random:{self.seed}"

    def max_exit(self, num_exits: int, chunk_index: int = 0) -> int:
        return _mix(_mix(self.seed) ^ chunk_index) * num_exits >> 64


def _mix(value: int) -> int:
    """The splitmix64 generator's output for state `value` (Steele et al., OOPSLA 2014), in 0..2**64-1."""
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def parse_policy(spec: str, *, exit_layers: Sequence[int], calibration: Mapping[str, Any] | None = None) -> ExitPolicy:
    """Policy from text: auto, full, exit:4 (or fixed:4), posterior[:0.9], entropy[:0.2], random[:seed].

    "auto" is "posterior" where the model is calibrated for it, else "full".

    Per-exit thresholds are separated by slashes: "posterior:0.95/0.9/0.9/0.85/0.8", with "-" for "not here".
    "posterior" and "entropy" without a number use `calibration["posterior"]["thresholds"]` (one number, or a list with
    one entry per exit).

    Raises:
        ConfigError: unknown name (the message suggests the nearest), a bad argument, or no calibration for it.
    """
    name, colon, argument = (part.strip() for part in spec.strip().lower().partition(":"))
    if name not in _PARSERS:
        near = difflib.get_close_matches(name, _PARSERS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"unknown policy {spec!r}; {hint}Known: auto, full, exit:LAYER, posterior[:THRESHOLD], "
            "entropy[:THRESHOLD], random[:SEED]"
        )
    if colon and not argument:
        raise ConfigError(f"policy {spec!r}: nothing follows the colon")
    return _PARSERS[name](name, argument, tuple(exit_layers), calibration or {})


def _parse_full(name: str, argument: str, exit_layers: tuple[int, ...], calibration: Mapping[str, Any]) -> ExitPolicy:
    if argument:
        raise ConfigError(f"policy 'full' takes no argument, got {argument!r}; to stop at a layer use 'exit:LAYER'")
    return Full()


def _parse_fixed(name: str, argument: str, exit_layers: tuple[int, ...], calibration: Mapping[str, Any]) -> ExitPolicy:
    choices = "/".join(map(str, exit_layers))
    if not argument.isdecimal() or int(argument) not in exit_layers:
        raise ConfigError(f"policy {name!r} needs an exit layer, {name}:{choices}; got {argument!r}")
    return Fixed(int(argument), exit_every=exit_layers[0])


def _parse_random(name: str, argument: str, exit_layers: tuple[int, ...], calibration: Mapping[str, Any]) -> ExitPolicy:
    if argument and not argument.isdecimal():
        raise ConfigError(f"policy 'random' takes a whole number as seed, e.g. 'random:7', got {argument!r}")
    return RandomDepth(int(argument or 0))


def _parse_threshold(
    name: str, argument: str, exit_layers: tuple[int, ...], calibration: Mapping[str, Any]
) -> ExitPolicy:
    kind: type[Posterior | Entropy] = Posterior if name == "posterior" else Entropy
    if argument:
        try:
            values = [None if part == "-" else float(part) for part in argument.split("/")]
        except ValueError:
            raise ConfigError(
                f"policy {name!r} takes numbers from 0 to 1, e.g. '{name}:0.5', got {argument!r}"
            ) from None
    else:
        values = _calibrated(name, calibration)
    policy = kind(values[0] if len(values) == 1 and values[0] is not None else tuple(values))
    policy.deepest(len(exit_layers))
    return policy


def _calibrated(name: str, calibration: Mapping[str, Any]) -> list[float | None]:
    """The thresholds stored with the model for criterion `name`."""
    row = calibration.get(name)
    stored = row.get("thresholds") if isinstance(row, Mapping) else None
    if stored is None:
        raise ConfigError(
            f"this model has no calibrated thresholds for {name!r}; give one, e.g. '{name}:0.5', "
            "or use 'full' or 'exit:LAYER'"
        )
    values = list(stored) if isinstance(stored, (list, tuple)) else [stored]
    if not values or not all(value is None or _is_number(value) for value in values):
        raise ConfigError(f"the model's calibration for {name!r} is not a list of numbers: {stored!r}")
    return values


def _parse_auto(name: str, argument: str, exit_layers: tuple[int, ...], calibration: Mapping[str, Any]) -> ExitPolicy:
    if argument:
        raise ConfigError(f"policy 'auto' takes no argument, got {argument!r}; did you mean 'posterior:{argument}'?")
    calibrated = "thresholds" in calibration.get("posterior", {})
    return _parse_threshold("posterior", "", exit_layers, calibration) if calibrated else Full()


_PARSERS: dict[str, Callable[[str, str, tuple[int, ...], Mapping[str, Any]], ExitPolicy]] = {
    "auto": _parse_auto,
    "full": _parse_full,
    "fixed": _parse_fixed,
    "exit": _parse_fixed,
    "posterior": _parse_threshold,
    "entropy": _parse_threshold,
    "random": _parse_random,
}
