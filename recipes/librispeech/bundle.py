"""One file from a run folder: weights, configuration, tokenizer and provenance; and the gates that were trained along.

    python -m recipes.librispeech.bundle --run RUN --out model.safetensors [--calibration calibration.json]

takes the moving-average weights that the run exported last, also while it goes on.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from asr_exit.checkpoint import Model, load, save_model
from asr_exit.config import ModelConfig
from asr_exit.encoder import Encoder
from asr_exit.errors import AsrExitError, CheckpointError
from asr_exit.joint_gates import with_gates, without_gates
from asr_exit.tokenizer import Tokenizer

WEIGHT_FILES = ("ema.safetensors", "state.pt")
RUN_FILES = ("config.json", "tokenizer.model", "provenance.json", "data.json")
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~])~?/[^\s,;:'\"]*")


def without_paths(value: Any) -> Any:
    """`value` (JSON) with every absolute path in its strings cut to its last part: no machine shows in a model."""
    if isinstance(value, str):
        return _ABSOLUTE_PATH.sub(lambda match: Path(match[0]).name or match[0], value)
    if isinstance(value, Mapping):
        return {str(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    return value


def hours_per_corpus(description: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """From data.json: split -> corpus -> hours of recordings (one speed)."""
    splits = ("train", "dev", "noise")
    return {split: {name: item["hours"] for name, item in description.get(split, {}).items()} for split in splits}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


@dataclass(frozen=True)
class Parts:
    """What a model file is made of."""

    config: ModelConfig
    state: Mapping[str, Tensor]
    tokenizer: Tokenizer
    provenance: Mapping[str, Any]
    gates: Tensor | None = None  # (exits - 1, features + 1), see `asr_exit.joint_gates`


def read_run(run: Path, weights: Path | None = None) -> Parts:
    """The parts that a run folder holds: its exported weights, or those in its training state if there are none.

    Args:
        weights: another file of weights: a copy of an ema.safetensors or state.pt of the run.

    Raises:
        CheckpointError: `run` is no run folder, or has exported nothing yet, or its parts do not fit together.
    """
    weights = weights or next((run / name for name in WEIGHT_FILES if (run / name).is_file()), run / WEIGHT_FILES[0])
    missing = [path.name for path in (weights, *(run / name for name in RUN_FILES)) if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{run} lacks {', '.join(missing)}; give the run folder of a training that has evaluated at least once"
        )
    config = ModelConfig.from_dict(_read_json(run / "config.json")["model"])
    made = _read_json(run / "provenance.json")
    sittings = made.get("sittings") or [{}]
    provenance = {"commit": sittings[-1].get("commit", "unknown"), **made}
    provenance["data_hours"] = hours_per_corpus(_read_json(run / "data.json"))
    try:
        if weights.suffix == ".pt":
            state = torch.load(weights, map_location="cpu", weights_only=True)["ema"]
        else:
            state = load_file(weights)
        state, gates = without_gates(state)
        Encoder(config).load_state_dict(state)
    except (SafetensorError, OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{weights} does not fit the run's configuration: {error}") from error
    return Parts(config, state, Tokenizer((run / "tokenizer.model").read_bytes()), provenance, gates)


def bundle(run: Path, out: Path, calibration: Mapping[str, Any] | None = None) -> Model:
    """Write `out` from the run folder `run` and load it back.

    Raises:
        CheckpointError: `run` is no run folder, or has exported nothing yet, or its parts do not fit together.
    """
    parts = read_run(run)
    calibration = with_gates(calibration, parts.gates)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_model(out, parts.config, parts.state, parts.tokenizer, calibration, without_paths(parts.provenance))
    return load(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make a one-file model from a run folder.")
    parser.add_argument("--run", type=Path, required=True, help="run folder of recipes.librispeech.train")
    parser.add_argument("--out", type=Path, required=True, help="model file to write (.safetensors)")
    parser.add_argument("--calibration", type=Path, help="calibration to store, e.g. of an earlier model")
    options = parser.parse_args(arguments)
    try:
        calibration = _read_json(options.calibration) if options.calibration else None
        model = bundle(options.run, options.out, calibration)
    except AsrExitError as error:
        sys.exit(f"bundle: {error}")
    parameters = sum(parameter.numel() for parameter in model.encoder.parameters())
    seen = f"{model.provenance.get('hours_seen', 0)} h seen in {model.provenance.get('updates', 0)} updates"
    size = options.out.stat().st_size / 1e6
    print(f"{options.out.name}: {size:.1f} MB, {parameters / 1e6:.1f} M parameters, {seen}; loads")


if __name__ == "__main__":
    main()
