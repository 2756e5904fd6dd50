"""The files of a training run: config.json, tokenizer.model, data.json, provenance.json, log.jsonl, state.pt (resume)
and ema.safetensors (the model)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from asr_exit.errors import CheckpointError


class RunFolder:
    """Writes by rename, so that a kill at any moment leaves the file before. Inactive it writes nothing."""

    def __init__(self, path: Path, active: bool = True) -> None:
        self.path, self._active = path, active
        path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, content: str | bytes) -> None:
        """A small file."""
        data = content.encode() if isinstance(content, str) else content
        self._replace(name, lambda file: file.write(data))

    def save_state(self, state: Mapping[str, Any]) -> None:
        """state.pt, from which the run goes on."""
        self._replace("state.pt", lambda file: torch.save(state, file))

    def load_state(self, device: torch.device) -> dict[str, Any] | None:
        """What `save_state` wrote; None where there is no state yet.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self.path / "state.pt"
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # torch.load raises many kinds
            raise CheckpointError(f"{path} is damaged ({error}); train anew into another folder") from error
        return state

    def export(self, weights: Mapping[str, Tensor]) -> bool:
        """ema.safetensors. Returns whether it was written: the safetensors package may be missing where one trains."""
        if importlib.util.find_spec("safetensors") is None:
            return False
        save = importlib.import_module("safetensors.torch").save
        self.write("ema.safetensors", save({name: value.cpu().contiguous() for name, value in weights.items()}))
        return True

    def _replace(self, name: str, fill: Callable[[IO[bytes]], object]) -> None:
        if not self._active:
            return
        temporary = self.path / f".{name}.tmp"
        with temporary.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / name)
