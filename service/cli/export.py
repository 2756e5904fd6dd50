"""`asr-exit export`: a model for phones and small boards."""

from __future__ import annotations

import argparse

HELP = "write a model for devices: ONNX graphs and a manifest that asr_exit.edge runs without torch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to, in which form, and what to recalibrate on."""
    from service.cli.recordings import add_recordings_options

    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; an earlier export is replaced")
    parser.add_argument("--model", metavar="FILE", help="model file (default: the bundled one)")
    parser.add_argument("--precision", choices=("int8", "fp32"), default="int8", help="default: int8")
    parser.add_argument(
        "--chunk-ms",
        type=int,
        choices=(160, 320, 640, 1280),
        default=640,
        help="audio per chunk where a stream asks for no other (default: 640)",
    )
    parser.add_argument("--ort", action="store_true", help="ONNX Runtime's own format, for its reduced builds")
    group = parser.add_argument_group("recalibration of exit decisions for int8 (default: those of fp32 are kept)")
    add_recordings_options(group, required=False)


def run(arguments: argparse.Namespace) -> int:
    """Prints each file as it is written, then what came out."""
    import sys

    from asr_exit.checkpoint import load
    from asr_exit.edge.export import export_model
    from service.cli.recordings import list_recordings

    recordings = list_recordings(arguments) if arguments.manifest or arguments.librispeech else []
    manifest = export_model(
        load(arguments.model),
        arguments.out,
        precision=arguments.precision,
        chunk_ms=arguments.chunk_ms,
        ort_format=arguments.ort,
        calibrate_on=[utterance.path for utterance in recordings],
        on_graph=lambda name: print(name, file=sys.stderr, flush=True),
    )
    total = sum(graph.bytes for graph in manifest.graphs)
    print(f"{arguments.out}: {manifest.precision}, {len(manifest.graphs)} graphs, {total / 1e6:.1f} MB")
    if manifest.precision == "int8" and manifest.calibration:
        source = manifest.calibrated_on or "fp32; give --librispeech or --manifest to solve them for int8"
        print(f"exit thresholds: {source}")
    return 0
