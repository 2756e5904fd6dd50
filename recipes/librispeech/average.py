"""One model from several: the mean of their weights.

    python -m recipes.librispeech.average RUN/ema-3.safetensors RUN/ema-4.safetensors RUN --out model.safetensors \\
        [--weights 1,1,2]

Sources are model files, run folders (their ema.safetensors), and copies of a run's ema.safetensors or state.pt that lie
in its folder. They must be stages of one training, or trainings that began from one: the mean of unrelated models is
noise. Where one has a linear exit head and the last a hidden layer of twice the model's width there, its head becomes
such a layer that says the same, as it did in training with --start-from. Calibration is not carried over, since its
thresholds belong to the weights they were found for: calibrate again.
Gates that were trained with the encoder are averaged, too, where all sources have them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from asr_exit.checkpoint import Model, load, save_model
from asr_exit.config import ModelConfig
from asr_exit.encoder import Encoder
from asr_exit.errors import AsrExitError, CheckpointError, ConfigError
from asr_exit.joint_gates import KEY, gates_of, with_gates
from asr_exit.warm_start import in_shape_of
from recipes.librispeech.bundle import Parts, read_run, without_paths


def read_source(path: Path) -> Parts:
    """Weights and what belongs to them.

    Raises:
        CheckpointError: neither a model file, nor a run folder, nor a file of weights in one.
    """
    if path.is_dir():
        return read_run(path)
    if (path.parent / "config.json").is_file():
        return read_run(path.parent, path)
    model = load(path)
    return Parts(
        model.config, model.encoder.state_dict(), model.tokenizer, model.provenance, gates_of(model.calibration)
    )


def mean_of(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of each tensor, summed in double precision; shapes and names must agree."""
    total = sum(weights)
    mean = {}
    for name, first in states[0].items():
        summed = torch.zeros_like(first, dtype=torch.float64)
        for state, weight in zip(states, weights, strict=True):
            summed += state[name].double() * (weight / total)
        mean[name] = summed.to(first.dtype)
    return mean


def weights_for(config: ModelConfig, source: Parts) -> Mapping[str, Tensor] | None:
    """Weights of `source` as those of a model of `config` that computes the same; None if there is no such thing.

    The two may differ in exit heads: linear in `source`, with a hidden layer of 2 D units in `config`.
    """
    if source.config == config:
        return source.state
    ours, theirs = (c.head_hidden or (0,) * c.num_exits for c in (config, source.config))
    if dataclasses.replace(source.config, head_hidden=config.head_hidden) != config or any(
        width != before and (before, width) != (0, 2 * config.d_model)
        for before, width in zip(theirs, ours, strict=True)
    ):
        return None
    encoder = Encoder(source.config)
    encoder.load_state_dict(source.state)
    return in_shape_of(config, encoder).state_dict()


def average(paths: Sequence[Path], out: Path, weights: Sequence[float] | None = None) -> Model:
    """Write the mean of `paths` to `out` and load it back.

    Raises:
        ConfigError: fewer than two sources, or weights that do not fit them.
        CheckpointError: a source that cannot be read, or sources of different shape, tokenizer or feature statistics.
    """
    weights = [1.0] * len(paths) if weights is None else list(weights)
    if len(paths) < 2:
        raise ConfigError("give at least two models to average")
    if len(weights) != len(paths) or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(f"--weights must be {len(paths)} positive numbers, one for each source")
    sources = [read_source(path) for path in paths]
    last = sources[-1]
    states: list[Mapping[str, Tensor]] = []
    for path, source in zip(paths, sources, strict=True):
        state = weights_for(last.config, source)
        if state is None:
            raise CheckpointError(f"{path} has another shape than {paths[-1]}: average stages of one training only")
        if source.tokenizer.proto != last.tokenizer.proto:
            raise CheckpointError(f"{path} has another tokenizer than {paths[-1]}: average stages of one training only")
        for name in ("feature_mean", "feature_std"):
            if not torch.equal(source.state[name], last.state[name]):
                raise CheckpointError(f"{path} has other feature statistics than {paths[-1]}: it saw other data")
        states.append(state)
    made = [
        {"source": path.name, "weight": weight, **source.provenance}
        for path, weight, source in zip(paths, weights, sources, strict=True)
    ]
    provenance = {**last.provenance, "averaged": made}
    mean = mean_of(states, weights)
    gates = [{KEY: source.gates} for source in sources if source.gates is not None]
    rows = mean_of(gates, weights)[KEY] if len(gates) == len(sources) else None
    out.parent.mkdir(parents=True, exist_ok=True)
    save_model(out, last.config, mean, last.tokenizer, with_gates(None, rows), without_paths(provenance))
    return load(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Average models, or stages of a training, into one model file.")
    parser.add_argument("sources", type=Path, nargs="+", help="model files, run folders, or weights in run folders")
    parser.add_argument("--weights", help="one number per source, comma-separated (default: all equal)")
    parser.add_argument("--out", type=Path, required=True, help="model file to write (.safetensors)")
    options = parser.parse_args(arguments)
    try:
        try:
            weights = [float(part) for part in options.weights.split(",")] if options.weights else None
        except ValueError:
            raise ConfigError(f"--weights {options.weights!r} must be numbers, joined by commas") from None
        model = average(options.sources, options.out, weights)
    except AsrExitError as error:
        sys.exit(f"average: {error}")
    parameters = sum(parameter.numel() for parameter in model.encoder.parameters())
    size = options.out.stat().st_size / 1e6
    print(
        f"{options.out.name}: {size:.1f} MB, {parameters / 1e6:.1f} M parameters, mean of {len(options.sources)}; loads"
    )


if __name__ == "__main__":
    main()
