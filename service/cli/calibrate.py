"""`asr-exit calibrate`: solve the exit policies' thresholds on held-out recordings and store them with the model."""

from __future__ import annotations

import argparse

HELP = "solve the exit policies' thresholds for every mean cost on held-out recordings; store them with the model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One set of recordings, what to solve, and where to write."""
    from service.cli.recordings import add_recordings_options

    add_recordings_options(parser)
    parser.add_argument("--model", metavar="FILE", help="model file to read (default: the bundled one)")
    parser.add_argument("--out", metavar="FILE", required=True, help="model file to write; may equal --model")
    parser.add_argument(
        "--chunk-ms",
        default="640,160,320,1280",
        metavar="LIST",
        help="saved one by one; others stay as the model has them, and so does its default length, which is the first "
        "one of a model that has none (default: %(default)s)",
    )
    parser.add_argument("--criteria", metavar="LIST", help="separated by commas (default: all that the model can have)")
    parser.add_argument(
        "--target", type=float, metavar="X", help="mean cost of the default thresholds as a share of full depth"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="without --target: relative word errors that the default thresholds may add (default: 0.0175)",
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="one core each (default: 1)")
    parser.add_argument("--json", action="store_true", help="print the calibration instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Writes the model and prints what was found."""
    import json
    import sys
    from pathlib import Path

    import torch
    from rich.console import Console

    from asr_exit.calibration.calibrate import TOLERANCE, calibrate
    from asr_exit.calibration.workers import Recording, Workers
    from asr_exit.checkpoint import load, save_model
    from asr_exit.config import require
    from asr_exit.tokenizer import normalise
    from service.allocator import keep_freed_memory
    from service.cli.recordings import spread_recordings

    lengths = [int(part) if part.strip().isdecimal() else 0 for part in arguments.chunk_ms.split(",")]
    require(min(lengths) > 0, f"--chunk-ms {arguments.chunk_ms!r} must be numbers joined by commas")
    criteria = [part.strip() for part in arguments.criteria.split(",")] if arguments.criteria else None
    recordings = [Recording(item.path, normalise(item.text)) for item in spread_recordings(arguments)]
    torch.set_num_threads(1)
    keep_freed_memory()
    model = load(arguments.model)
    console = Console(file=sys.stderr)

    def save(calibration: dict) -> None:
        with torch.inference_mode():
            state = model.encoder.state_dict()
        save_model(arguments.out, model.config, state, model.tokenizer, calibration, model.provenance)

    with Workers(model, arguments.processes) as workers, console.status("calibrating") as status:
        calibration = calibrate(
            workers,
            recordings,
            name=arguments.subset or Path(arguments.manifest).parent.name,
            chunks_ms=lengths,
            criteria=criteria,
            target=arguments.target,
            tolerance=TOLERANCE if arguments.tolerance is None else arguments.tolerance,
            on_stage=lambda stage: status.update(stage),
            on_length=save,
        )
    load(arguments.out)
    if arguments.json:
        print(json.dumps(calibration))
        return 0
    _print_tables(calibration)
    return 0


def _print_tables(calibration: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    from asr_exit.policy import CRITERIA

    for part in (calibration, *calibration.get("by_chunk_ms", {}).values()):
        table = Table(
            title=f"{part['data']}, {part['chunk_ms']:g} ms, full depth {100 * part['full_wer']:.2f} % word errors"
        )
        table.add_column("criterion")
        for name in ("share of full MACs %", "WER %", "measured: MACs %", "WER %", "WER % unseen", "rows"):
            table.add_column(name, justify="right")
        for label in CRITERIA:
            row = part.get(label)
            if row:
                measured = [row.get(name) for name in ("macs_fraction_measured", "wer_measured", "wer_unseen")]
                table.add_row(
                    label + (" (default)" if label == part["default"] else ""),
                    f"{100 * row['macs_fraction']:.1f}",
                    f"{100 * row['wer']:.2f}",
                    *("" if value is None else f"{100 * value:.2f}" for value in measured),
                    str(len(row["table"])),
                )
        Console().print(table)
