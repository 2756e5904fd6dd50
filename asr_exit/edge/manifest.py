"""The manifest of an exported model: everything but the weights, and a checksum of every file of weights.

It is written last and its folder is renamed last of all, so a folder with a readable manifest is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from asr_exit.config import ModelConfig, from_mapping
from asr_exit.cost import SegmentMacs
from asr_exit.errors import CheckpointError, ConfigError

FORMAT = "asr-exit-edge/2"
NAME = "manifest.json"


@dataclass(frozen=True)
class GraphFile:
    """One file of the export."""

    file: str  # name within the folder
    bytes: int
    sha256: str
    macs_per_frame: int  # multiply-accumulates per encoder frame

    @classmethod
    def of(cls, path: Path, macs_per_frame: int) -> GraphFile:
        """Describe the file at `path`."""
        return cls(path.name, path.stat().st_size, digest(path), macs_per_frame)


@dataclass(frozen=True)
class Manifest:
    """What a device needs to know of a model. Lists have one entry per segment.

    Raises:
        ConfigError: the parts do not fit together.
    """

    NESTED = {"config": ModelConfig}  # noqa: RUF012  (read by from_mapping)

    name: str
    precision: str  # "fp32" or "int8"
    config: ModelConfig
    pieces: tuple[str, ...]  # the tokenizer's, by id
    feature_mean: tuple[float, ...]  # per mel bin, over the training data
    feature_std: tuple[float, ...]
    costs: Mapping[str, Any]  # the fields of asr_exit.cost.SegmentMacs
    segments: tuple[GraphFile, ...]  # the first one with the subsampling
    propagate: tuple[GraphFile | None, ...]  # what a skipped segment remembers; none for the first, which never is
    chunk_ms: float = 640  # default of the streams; every size that the configuration allows works
    calibration: Mapping[str, Any] = field(default_factory=dict)
    calibrated_on: str = ""  # what thresholds were solved with at this precision; empty = taken over from fp32
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config
        if len(self.pieces) != config.vocab_size:
            raise ConfigError(f"{len(self.pieces)} pieces for a vocabulary of {config.vocab_size}")
        if {len(self.feature_mean), len(self.feature_std)} != {config.features.num_mels}:
            raise ConfigError(f"feature statistics must have {config.features.num_mels} entries each")
        if {len(self.segments), len(self.propagate)} != {config.num_exits}:
            raise ConfigError(f"{len(self.segments)} segments for {config.num_exits} exits")
        config.chunk_frames(self.chunk_ms)
        self.macs.full(1)

    @property
    def macs(self) -> SegmentMacs:
        """Costs, counted as the torch path counts them, so that budgets mean the same everywhere."""
        return from_mapping(SegmentMacs, {"config": self.config, **self.costs}, "costs")

    @property
    def graphs(self) -> tuple[GraphFile, ...]:
        """Every file of weights."""
        return (*self.segments, *(graph for graph in self.propagate if graph is not None))

    def write(self, folder: Path) -> None:
        """Write `folder`/manifest.json."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False, indent=1)
        (folder / NAME).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `folder`/manifest.json.

        Raises:
            CheckpointError: there is none, or it is damaged or of another version.
        """
        path = folder / NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"no exported model in {folder}; make one with `asr-exit export --out {folder}`"
            ) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); export the model again") from error
        version = values.pop("format", None) if isinstance(values, dict) else None
        if version != FORMAT:
            raise CheckpointError(f"{path} has format {version!r}, expected {FORMAT!r}; export the model again")
        try:
            for key in ("segments", "propagate"):
                values[key] = [item and from_mapping(GraphFile, item, key) for item in values[key]]
            return from_mapping(cls, values, "manifest")
        except (ConfigError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged or of another version: {error}") from error


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
