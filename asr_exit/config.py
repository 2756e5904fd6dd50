"""Model configuration: frozen, strict, checked in one place."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from asr_exit.errors import ConfigError

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build the frozen dataclass `cls` from `values`; nested dataclasses are built from nested mappings.

    Raises:
        ConfigError: unknown key (the message names the nearest known one), missing key, or a value its type rejects.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    label = where or cls.__name__
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ConfigError(f"{label}: unknown key {key!r}; did you mean {near[0]!r}? Known: {', '.join(known)}")
    nested = getattr(cls, "NESTED", {})
    built = {
        key: from_mapping(nested[key], value, f"{label}.{key}")
        if key in nested and isinstance(value, Mapping)
        else tuple(value)
        if isinstance(value, list)
        else value
        for key, value in values.items()
    }
    try:
        return cls(**built)
    except TypeError as error:
        raise ConfigError(f"{label}: {error}") from error


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class FeatureConfig:
    """Kaldi-style log-mel filterbank."""

    sample_rate_hertz: int = 16_000
    num_mels: int = 80
    window_samples: int = 400
    hop_samples: int = 160
    fft_size: int = 512
    low_hertz: float = 20.0
    high_hertz: float = 7_600.0
    preemphasis: float = 0.97

    def __post_init__(self) -> None:
        require(0 < self.hop_samples <= self.window_samples <= self.fft_size, "need hop <= window <= fft_size samples")
        require(
            0 <= self.low_hertz < self.high_hertz <= self.sample_rate_hertz / 2,
            f"mel band {self.low_hertz}-{self.high_hertz} Hz must lie within 0-{self.sample_rate_hertz / 2} Hz",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Early-exit Conformer/CTC. Frames are encoder frames (after subsampling) unless a name says feature frames."""

    NESTED = {"features": FeatureConfig}  # noqa: RUF012  (read by from_mapping)

    features: FeatureConfig = field(default_factory=FeatureConfig)
    vocab_size: int = 256
    d_model: int = 192
    ff_dim: int = 768
    num_heads: int = 3
    num_layers: int = 12
    exit_every: int = 2
    conv_kernel: int = 9
    subsampling: int = 8
    subsampling_channels: int = 32
    left_context_frames: int = 64
    max_chunk_frames: int = 16
    conv_lookahead: bool = True  # the convolution sees to the end of its chunk; False: causal
    self_conditioning: bool = True
    handover_gain: bool = False  # a learned scale on the state between segments; lets deep segments fall idle
    labels_per_frame: int = 1  # that an exit writes per encoder frame: CTC finer than the frames that are attended
    head_hidden: tuple[int, ...] = ()  # per exit the width of a hidden layer in its head, 0 = none; empty: none

    def __post_init__(self) -> None:
        require(self.d_model % (2 * self.num_heads) == 0, "d_model must be a multiple of 2 * num_heads (rotary pairs)")
        require(self.num_layers % self.exit_every == 0, "num_layers must be a multiple of exit_every")
        require(self.conv_kernel % 2 == 1, "conv_kernel must be odd")
        require(self.subsampling in (2, 4, 8), "subsampling must be 2, 4 or 8")
        require(
            self.labels_per_frame >= 1 and self.subsampling % self.labels_per_frame == 0,
            "labels_per_frame must divide subsampling: a label stands for whole feature frames",
        )
        require(self.vocab_size >= 2, "vocab_size must hold the blank and at least one piece")
        object.__setattr__(self, "head_hidden", tuple(self.head_hidden))
        require(
            len(self.head_hidden) in (0, self.num_exits) and all(width >= 0 for width in self.head_hidden),
            f"head_hidden must be {self.num_exits} widths, one per exit (0 = none), or empty",
        )
        require(
            self.left_context_frames % self.max_chunk_frames == 0,
            "left_context_frames must be a multiple of max_chunk_frames, so that every chunk size divides it",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Strict inverse of `to_dict`."""
        return from_mapping(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready mapping."""
        return dataclasses.asdict(self)

    def with_layers(self, num_layers: int) -> ModelConfig:
        """The same for another number of layers, exit heads of deeper ones left out."""
        heads = self.head_hidden[: num_layers // self.exit_every]
        return dataclasses.replace(self, num_layers=num_layers, head_hidden=heads)

    @property
    def num_exits(self) -> int:
        return self.num_layers // self.exit_every

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layer after which each exit sits, e.g. (2, 4, ..., 12)."""
        return tuple(range(self.exit_every, self.num_layers + 1, self.exit_every))

    @property
    def samples_per_frame(self) -> int:
        return self.features.hop_samples * self.subsampling

    @property
    def frame_ms(self) -> float:
        return 1000.0 * self.samples_per_frame / self.features.sample_rate_hertz

    @property
    def features_per_label(self) -> int:
        """Feature frames that one CTC label stands for."""
        return self.subsampling // self.labels_per_frame

    @property
    def label_ms(self) -> float:
        """Audio that one CTC label stands for."""
        return self.frame_ms / self.labels_per_frame

    def chunk_frames(self, chunk_ms: float) -> int:
        """Encoder frames of a chunk of `chunk_ms` milliseconds.

        Raises:
            ConfigError: not a whole number of frames, too long for the cache, or no divisor of the left context.
        """
        frames = round(chunk_ms / self.frame_ms)
        allowed = [n for n in range(1, self.max_chunk_frames + 1) if self.left_context_frames % n == 0]
        if abs(frames * self.frame_ms - chunk_ms) > 1e-6 or frames not in allowed:
            choices = ", ".join(f"{n * self.frame_ms:g}" for n in allowed)
            raise ConfigError(f"chunk_ms={chunk_ms:g} is not supported; use one of {choices}")
        return frames
