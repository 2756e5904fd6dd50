"""One-file models: weights in safetensors; configuration, tokenizer, calibration and provenance in its metadata."""

from __future__ import annotations

import base64
import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from asr_exit.config import ModelConfig
from asr_exit.cost import SegmentMacs
from asr_exit.encoder import Encoder
from asr_exit.errors import CheckpointError, ConfigError
from asr_exit.tokenizer import Tokenizer
from asr_exit.torch_backend import TorchBackend

FORMAT = "asr-exit/1"
BUNDLED = "model.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Model:
    """A loaded model, ready to run."""

    name: str
    config: ModelConfig
    encoder: Encoder
    tokenizer: Tokenizer
    calibration: Mapping[str, Any]  # per policy name, e.g. {"posterior": {"thresholds": [...]}}
    provenance: Mapping[str, Any]  # commit, data, seed, hours seen, ...

    @property
    def macs(self) -> SegmentMacs:
        """Multiply-accumulates of every part."""
        return SegmentMacs.of(self.encoder)

    @property
    def pieces(self) -> tuple[str, ...]:
        """The tokenizer's pieces by id."""
        return self.tokenizer.pieces

    def in_precision(self, precision: str) -> Model:
        """This model with weights, and so activations and caches, in "fp32" (itself) or "bf16" (a copy).

        Raises ConfigError for another name.
        """
        if precision not in DTYPES:
            raise ConfigError(f"unknown precision {precision!r}; use {' or '.join(DTYPES)}")
        if self.encoder.subsampling.out.weight.dtype == DTYPES[precision]:
            return self
        return replace(self, encoder=copy.deepcopy(self.encoder).in_precision(DTYPES[precision]))

    def backend(self, slots: int, device: str | torch.device, **options: Any) -> TorchBackend:
        """What the engine runs this model with; moves it to `device`. `options` are those of `TorchBackend`."""
        return TorchBackend(self.encoder, slots, device, **options)


def save_model(
    path: Path | str,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    calibration: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a model file atomically. Weights are stored as `dtype`; feature statistics stay float32."""
    tensors = {
        key: value.detach().to("cpu", torch.float32 if key.startswith("feature_") else dtype).contiguous()
        for key, value in state.items()
    }
    metadata = {
        "format": FORMAT,
        "config": json.dumps(config.to_dict()),
        "tokenizer": base64.b64encode(tokenizer.proto).decode(),
        "calibration": json.dumps(calibration or {}),
        "provenance": json.dumps(provenance or {}),
    }
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, path)


def bundled_model_path() -> Path:
    """The model that ships with the package."""
    return Path(str(files("asr_exit") / "assets" / BUNDLED))


def load(path: Path | str | None = None, device: str | torch.device = "cpu") -> Model:
    """Load a model file (default: the bundled one) in float32 for inference.

    Raises:
        CheckpointError: no such file, not a safetensors file, or not written by `save_model`.
    """
    path = bundled_model_path() if path is None else Path(path)
    if not path.is_file():
        raise CheckpointError(f"no model file at {path}; pass the path of a .safetensors file written by asr-exit")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was not written by asr-exit (format {metadata.get('format')!r}, expected {FORMAT!r}); "
            "save models with asr_exit.checkpoint.save_model"
        )
    try:
        config = ModelConfig.from_dict({"handover_gain": True, **json.loads(metadata["config"])})  # older files had it
        tokenizer = Tokenizer(base64.b64decode(metadata["tokenizer"]))
        calibration, provenance = json.loads(metadata["calibration"]), json.loads(metadata["provenance"])
        encoder = Encoder(config)
        encoder.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged or of another version: {error}") from error
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(f"{path}: tokenizer has {tokenizer.vocab_size} pieces, encoder {config.vocab_size}")
    encoder.to(device).eval().requires_grad_(False)
    return Model(path.stem, config, encoder, tokenizer, calibration, provenance)
