"""From a model file to a folder that devices run: one ONNX graph per segment, and a manifest.

The graphs of middle segments differ in their weights only, so each kind of graph is traced once and filled in for every
segment. Needs torch, onnx and onnxscript; devices need none of them.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asr_exit.audio import load_audio
from asr_exit.checkpoint import Model
from asr_exit.config import ModelConfig, require
from asr_exit.edge.backend import EdgeModel, tail_shapes
from asr_exit.edge.graph import PropagateGraph, SegmentGraph, StemGraph
from asr_exit.edge.manifest import NAME, GraphFile, Manifest
from asr_exit.edge.recalibrate import CRITERIA, observe, recalibrate
from asr_exit.encoder import Encoder
from asr_exit.errors import ConfigError

OPSET = 20
_FOLD_BYTES = 1 << 30  # transposed and sliced weights are stored as such, however large: only then are they quantised
PRECISIONS = ("int8", "fp32")
_CACHES = ("cos", "sin", "mask", "keys", "values", "conv")
_OUTPUTS = ("state", "scores", "log_probs", "new_keys", "new_values", "new_conv")


@dataclass(frozen=True)
class _Kind:
    """How one kind of graph is traced: example inputs with names, and which of them grow with the chunk."""

    inputs: dict[str, Tensor | list[Tensor]]
    outputs: tuple[str, ...]

    @property
    def input_names(self) -> list[str]:
        return [
            name if isinstance(value, Tensor) else f"tail_{index}"
            for name, value in self.inputs.items()
            for index in range(1 if isinstance(value, Tensor) else len(value))
        ]


def export_model(
    model: Model,
    out: Path | str,
    *,
    precision: str = "int8",
    chunk_ms: float = 640,
    ort_format: bool = False,
    calibrate_on: Sequence[Path] = (),
    on_graph: Callable[[str], None] = lambda name: None,
) -> Manifest:
    """Write `model` to the folder `out`, replacing an earlier export; until all is written, `out` stays as it was.

    Args:
        precision: "int8" quantises weights per channel and activations dynamically; "fp32" is exact.
        chunk_ms: default chunk of the manifest. Every size that the model allows works with the same graphs.
        ort_format: write `.ort` files for builds of ONNX Runtime without an ONNX reader.
        calibrate_on: audio files to carry the exit thresholds over to int8 with; without any, those of fp32 stay.
        on_graph: called with the name of each file that is done.

    Raises:
        ConfigError: an option is out of range, `out` holds something else, or the exporter is not installed.
    """
    require(precision in PRECISIONS, f"unknown precision {precision!r}; use one of {', '.join(PRECISIONS)}")
    model.config.chunk_frames(chunk_ms)
    out = Path(out)
    require(
        not out.exists() or (out.is_dir() and (not any(out.iterdir()) or (out / NAME).is_file())),
        f"{out} exists and is no exported model; give another folder, or remove it",
    )
    _require_exporter()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        segments, propagate = _write_graphs(model, partial, precision, ort_format, on_graph)
        manifest = _manifest(model, precision, chunk_ms, segments, propagate)
        if precision == "int8" and calibrate_on and model.calibration:
            manifest = _recalibrated(model, manifest, partial, calibrate_on)
            (partial / NAME).unlink()
        publish(manifest, partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _recalibrated(model: Model, manifest: Manifest, folder: Path, recordings: Sequence[Path]) -> Manifest:
    """The manifest with thresholds for the graphs in `folder`."""
    manifest.write(folder)
    before, after = (
        observe(each, map(load_audio, recordings), manifest.chunk_ms) for each in (model, EdgeModel(folder))
    )
    calibration = recalibrate(model.calibration, before, after)
    chunks = after[next(iter(CRITERIA))].shape[1]
    return replace(manifest, calibration=calibration, calibrated_on=f"{len(recordings)} recordings, {chunks} chunks")


def publish(manifest: Manifest, partial: Path, out: Path) -> None:
    """Complete the folder `partial` and put it in the place of `out`."""
    manifest.write(partial)
    for path in [*partial.iterdir(), partial]:
        _sync(path)
    partial.chmod(0o755)
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
        os.rename(out, old)  # a folder cannot be swapped in one go; an empty one may be renamed over
        os.rename(partial, out)
        shutil.rmtree(old)
    else:
        os.rename(partial, out)
    _sync(out.parent)


def _sync(path: Path) -> None:
    """Bring a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_exporter() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"exporting needs more packages ({error}): pip install 'asr-exit[export]'") from None


def _manifest(
    model: Model, precision: str, chunk_ms: float, segments: list[GraphFile], propagate: list[GraphFile | None]
) -> Manifest:
    macs = model.macs
    return Manifest(
        name=model.name,
        precision=precision,
        config=model.config,
        pieces=tuple(model.pieces),
        feature_mean=tuple(model.encoder.feature_mean.tolist()),
        feature_std=tuple(model.encoder.feature_std.tolist()),
        costs={field.name: getattr(macs, field.name) for field in fields(macs) if field.name != "config"},
        segments=tuple(segments),
        propagate=tuple(propagate),
        chunk_ms=chunk_ms,
        calibration=model.calibration,
        provenance=model.provenance,
    )


def _write_graphs(
    model: Model, folder: Path, precision: str, ort_format: bool, on_graph: Callable[[str], None]
) -> tuple[list[GraphFile], list[GraphFile | None]]:
    """Trace, fill in and store every graph."""
    encoder, config, macs = model.encoder, model.config, model.macs
    propagate: list[GraphFile | None] = [None]
    segments: list[GraphFile] = []

    def store(kind: str, index: int, macs_per_frame: int) -> GraphFile:
        module = _module(kind, encoder, index)
        name = f"{'propagate' if kind == 'propagate' else 'segment'}-{index}"
        path = folder / f"{name}.onnx"
        _fill_in(_template(kind, config, _representative(kind, config, index)), module, path)
        if precision == "int8":
            quantise(path)
        if ort_format:
            path = _to_ort(path)
        on_graph(path.name)
        return GraphFile.of(path, macs_per_frame)

    for index in range(config.num_exits):
        cost = macs.segment(index, 1, with_head=True)
        if index == 0:
            segments.append(store("stem", index, cost + macs.stem(1)))
            continue
        segments.append(store("last" if index == config.num_exits - 1 else "middle", index, cost))
        propagate.append(store("propagate", index, macs.propagate(1)))
    return segments, propagate


def _module(kind: str, encoder: Encoder, index: int) -> nn.Module:
    """The graph of segment `index`."""
    if kind == "stem":
        return StemGraph(encoder.subsampling, encoder.segments[0])
    return PropagateGraph(encoder.segments[index]) if kind == "propagate" else SegmentGraph(encoder.segments[index])


def _representative(kind: str, config: ModelConfig, index: int) -> int:
    """First segment whose graph of this kind differs from that of segment `index` in weights only."""
    if kind == "propagate":
        return 1
    widths = config.head_hidden or (0,) * config.num_exits
    return index if kind != "middle" else next(i for i in range(1, config.num_exits) if widths[i] == widths[index])


@lru_cache(maxsize=8)
def _template(kind: str, config: ModelConfig, index: int) -> bytes:
    """A traced graph of one kind, its weights still to be filled in. Tracing takes seconds, so it is done once."""
    return _trace(_module(kind, Encoder(config), index), _kind(kind, config))


def _kind(name: str, config: ModelConfig) -> _Kind:
    """Example inputs of one kind of graph."""
    frames, heads = max(2, config.max_chunk_frames // 2), config.num_heads
    size, halo = config.d_model // heads, (config.conv_kernel - 1) // 2
    ring = (config.exit_every, heads, config.left_context_frames, size)
    inputs: dict[str, Tensor | list[Tensor]] = {
        "x": torch.randn(frames, config.d_model),
        "cos": torch.randn(frames, size // 2),
        "sin": torch.randn(frames, size // 2),
        "mask": torch.zeros(config.left_context_frames),
        "keys": torch.randn(ring),
        "values": torch.randn(ring),
        "conv": torch.randn(config.exit_every, halo, config.d_model),
    }
    if name == "propagate":
        return _Kind({key: inputs[key] for key in ("x", "cos", "sin", "conv")}, _OUTPUTS[3:])
    if name != "stem":
        return _Kind(inputs, _OUTPUTS)
    tails: list[Tensor] = [torch.randn(shape) for shape in tail_shapes(config)]
    features = torch.randn(frames * config.subsampling, config.features.num_mels)
    stem: dict[str, Tensor | list[Tensor]] = {"features": features, **{key: inputs[key] for key in _CACHES}}
    new_tails = tuple(f"new_tail_{stage}" for stage in range(len(tails)))
    return _Kind(stem | {"tails": tails}, (*_OUTPUTS, *new_tails))


@torch.no_grad()
def _trace(module: nn.Module, kind: _Kind) -> bytes:
    """An ONNX graph with every weight under its name in `module`, not yet optimised."""
    frames = torch.export.Dim("T", min=2, max=max(2, len(next(iter(kind.inputs.values()))) * 2))
    shapes: dict[str, Any] = {}
    for name, value in kind.inputs.items():
        if name in ("x", "cos", "sin"):
            shapes[name] = {0: frames}
        elif name == "features":
            assert isinstance(value, Tensor)
            cosines = kind.inputs["cos"]
            assert isinstance(cosines, Tensor)
            shapes[name] = {0: (value.shape[0] // cosines.shape[0]) * frames}
        else:
            shapes[name] = None if isinstance(value, Tensor) else [None] * len(value)
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            kwargs=kind.inputs,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=kind.input_names,
            output_names=list(kind.outputs),
            optimize=False,
            verbose=False,
        )
    assert program is not None
    proto: bytes = program.model_proto.SerializeToString()
    return proto


def _fill_in(template: bytes, module: nn.Module, path: Path) -> None:
    """Store the template with the weights of `module`, constants folded."""
    import onnx
    import onnxscript.optimizer
    from onnxscript import ir

    proto = onnx.ModelProto.FromString(template)
    model = ir.from_proto(proto)
    weights = dict(module.named_parameters())
    for name, value in model.graph.initializers.items():
        if name in weights:
            value.const_value = ir.tensor(weights[name].detach().contiguous().numpy(), name=name)
        elif "." in name:
            raise ConfigError(
                f"the exporter renamed a weight to {name}; use a version of torch that pyproject.toml allows"
            )
    onnxscript.optimizer.optimize(model, input_size_limit=_FOLD_BYTES, output_size_limit=_FOLD_BYTES)
    onnx.save(ir.to_proto(model), path)


def quantise(path: Path) -> None:
    """Weights of matrix products to int8 per output channel, activations to uint8 per product; in place.

    Weights keep to 7 bits: where the processor has no int8 dot product (x86 before VNNI), ONNX Runtime adds pairs of
    products in 16 bits, and pairs of full-range ones saturate.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            path,
            path,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"],
        )


def _to_ort(path: Path) -> Path:
    """Convert to ONNX Runtime's own format, with optimisations that every processor can run; removes the original."""
    import onnxruntime

    target = path.with_suffix(".ort")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    path.unlink()
    return target


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and deprecation notes from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
