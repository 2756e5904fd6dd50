"""`asr-exit evaluate`: word error rate, depth and cost of every exit and policy."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asr_exit.checkpoint import Model
    from asr_exit.stream import StreamOptions

HELP = "word error rate, depth and cost of every exit and policy over a set of recordings"
_CALIBRATED = ("posterior", "entropy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One set of recordings and how to run them."""
    from service.cli.options import add_decoder_options, add_model_options
    from service.cli.recordings import add_recordings_options

    add_recordings_options(parser)
    parser.add_argument("--chunk-ms", type=int, choices=(160, 320, 640, 1280), default=640, help="default: 640")
    parser.add_argument(
        "--policies",
        metavar="LIST",
        help="separated by commas (default: every exit, full, and the calibrated posterior and entropy)",
    )
    parser.add_argument(
        "--fill",
        default="propagate",
        metavar="F",
        help="what skipped layers get (default: propagate; catch_up brings every final text to full depth)",
    )
    add_decoder_options(parser)
    parser.add_argument("--streams", type=int, default=16, metavar="N", help="recordings at a time (default: 16)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints a table, or one JSON object."""
    import json
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from asr_exit.config import require
    from asr_exit.engine import Engine
    from service.cli.options import load_model
    from service.cli.recordings import list_recordings
    from service.evaluation import evaluate

    require(arguments.streams >= 1, f"--streams {arguments.streams} must be at least 1")
    utterances = list_recordings(arguments)
    model, device = load_model(arguments)
    policies = _policies(arguments, model)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task("evaluating", total=len(utterances) * len(policies))
        engine = Engine(model, slots=arguments.streams, device=device)
        evaluation = evaluate(
            engine, utterances, policies, lambda name: progress.update(task, advance=1, description=name)
        )
    if arguments.json:
        values = {
            "utterances": evaluation.utterances,
            "hours": evaluation.hours,
            "chunk_ms": arguments.chunk_ms,
            "rows": evaluation.rows,
        }
        print(json.dumps(values))
        return 0
    _print_table(
        evaluation.rows, f"{evaluation.utterances} recordings, {evaluation.hours:.2f} h, {arguments.chunk_ms} ms"
    )
    return 0


def _policies(arguments: argparse.Namespace, model: Model) -> dict[str, StreamOptions]:
    """Engine options by the policy's name. Raises ConfigError for a policy that is unknown or not calibrated."""
    from asr_exit.policy import parse_policy
    from asr_exit.stream import Fill, StreamOptions
    from service.cli.options import decoder_options

    layers = model.config.exit_layers
    if arguments.policies:
        names = [name.strip() for name in arguments.policies.split(",") if name.strip()]
    else:
        calibrated = [name for name in _CALIBRATED if "thresholds" in model.calibration.get(name, {})]
        names = [*(f"exit:{layer}" for layer in layers), "full", *calibrated]
    fill, decoding = Fill.parse(arguments.fill), decoder_options(arguments)
    return {
        name: StreamOptions(
            chunk_ms=arguments.chunk_ms,
            policy=parse_policy(name, exit_layers=layers, calibration=model.calibration, chunk_ms=arguments.chunk_ms),
            fill=fill,
            **decoding,
        )
        for name in names
    }


def _print_table(rows: list[dict[str, object]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("policy")
    for name in ("WER %", "mean exit layer", "share of full MACs %", "real-time factor"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["policy"]),
            f"{100 * float(str(row['wer'])):.2f}",
            f"{float(str(row['mean_exit_layer'])):.2f}",
            f"{100 * float(str(row['macs_fraction'])):.1f}",
            f"{float(str(row['rtf'])):.4f}",
        )
    Console().print(table)
