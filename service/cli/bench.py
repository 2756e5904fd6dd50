"""`asr-exit bench`: measurements behind the claims; each ends with status 1 when its bar is not met."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from asr_exit.backend import StreamingModel

HELP = "measure speed, parity, depth switches, memory, criteria, fills, an exported model, a server, or its clients"
DEVIATION_BAR = 0.15
DEVIATION_BATCH = 16  # the bar holds from this batch size on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand for each measurement."""
    from service.cli import bench_clients
    from service.cli.bench_depth import add_depth_arguments
    from service.cli.bench_edge import add_edge, run_edge
    from service.cli.bench_service import add_kinds
    from service.cli.options import add_model_options
    from service.cli.recordings import add_recordings_options

    kinds = parser.add_subparsers(dest="kind", required=True, metavar="MEASUREMENT")
    engine = kinds.add_parser("engine", help="time of every exit: step, real-time factor, streams per core")
    engine.add_argument("--batches", default="1,16", metavar="LIST", help="streams per batch (default: 1,16)")
    engine.add_argument("--seconds", type=float, default=30, metavar="N", help="audio per stream (default: 30)")
    engine.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu = time this thread ran, for a machine that does other things, too (default: wall)",
    )
    engine.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="fp32", help="default: fp32")
    parity = kinds.add_parser("parity", help="streaming against an offline pass with the same mask")
    switches = kinds.add_parser("switches", help="text after changes of depth, with and without revision")
    for kind in (parity, switches):
        add_recordings_options(kind)
        kind.add_argument("--streams", type=int, default=16, metavar="N", help="recordings at a time (default: 16)")
    switches.add_argument("--seed", type=int, default=0, metavar="N", help="of the random depths (default: 0)")
    memory = kinds.add_parser("memory", help="memory and step time over hours of one stream")
    memory.add_argument("--hours", type=float, default=1, metavar="N", help="of audio (default: 1)")
    memory.add_argument("--audio", metavar="FILE", help="repeated under faint noise (default: the bundled sample)")
    memory.add_argument("--edge-model", metavar="DIR", help="an exported model, without torch's weights")
    memory.add_argument("--policy", default="full", metavar="P", help="as in transcribe, or random (default: full)")
    add_kinds(kinds)
    edge = add_edge(kinds)
    runs = {edge: run_edge, engine: _engine, parity: _parity, switches: _switches, memory: _memory}
    runs |= bench_clients.add_kinds(kinds)
    for kind, run_kind in runs.items():
        kind.add_argument("--chunk-ms", type=int, choices=(160, 320, 640, 1280), default=640, help="default: 640")
        kind.add_argument("--json", action="store_true", help="one JSON object instead of the table")
        add_model_options(kind)
        kind.set_defaults(run_kind=run_kind)
    add_depth_arguments(kinds)


def run(arguments: argparse.Namespace) -> int:
    """Prints a table or one JSON object; 1 when the bar is not met."""
    return int(arguments.run_kind(arguments))


def _engine(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from asr_exit.config import require
    from service.bench.speed import WARM_UP_TURNS, measure_speed, turns_of
    from service.bench.streams import sample_audio
    from service.cli.options import load_model
    from service.device import pick_precision

    batches = [int(part) if part.strip().isdecimal() else 0 for part in arguments.batches.split(",")]
    require(min(batches) >= 1, f"--batches {arguments.batches!r} must be numbers from 1, joined by commas")
    require(arguments.seconds > 0, f"--seconds {arguments.seconds:g} must be more than 0")
    require(arguments.clock == "wall" or arguments.threads == 1, "--clock cpu sees one thread only: use --threads 1")
    model, device = load_model(arguments)
    require(arguments.clock == "wall" or device == "cpu", "--clock cpu does not see a GPU: use --clock wall")
    precision = pick_precision(arguments.precision, device)
    model = model.in_precision(precision)
    turns = len(batches) * (WARM_UP_TURNS + turns_of(arguments.seconds, arguments.chunk_ms))
    with progress_bar("timing", turns) as advance:
        rows = measure_speed(
            model,
            sample_audio(),
            batches=batches,
            chunk_ms=arguments.chunk_ms,
            seconds=arguments.seconds,
            device=device,
            clock=arguments.clock,
            on_turn=advance,
        )
    deepest = [row for row in rows if row.exit_layer == model.config.exit_layers[-1]]
    judged = [row for row in rows if row.batch >= DEVIATION_BATCH]
    holds = all(abs(row.encoder_deviation) <= DEVIATION_BAR for row in judged)
    cells = [
        (
            row.batch,
            row.exit_layer,
            f"{row.step_ms:.2f}",
            f"{row.real_time_factor:.4f}",
            f"{row.streams_per_core:.0f}",
            f"{100 * row.macs_ratio:.1f}",
            f"{100 * row.encoder_ratio:.1f} ({100 * row.encoder_deviation:+.0f})",
            f"{100 * row.step_ratio:.1f} ({100 * row.step_deviation:+.0f})",
            f"{100 * row.outside_share:.1f}",
            f"{100 * row.features_share:.1f}",
        )
        for row in rows
    ]
    columns = (
        "batch",
        "exit",
        "step ms",
        "RTF",
        "streams/core",
        "MACs %",
        "encoder time %",
        "step time %",
        "outside encoder %",
        "features %",
    )
    values = {
        "clock": arguments.clock,
        "precision": precision,
        "deviation_bar": DEVIATION_BAR,
        "deviation_batch": DEVIATION_BATCH,
        "rows": [
            asdict(row) | {"encoder_deviation": row.encoder_deviation, "step_deviation": row.step_deviation}
            for row in rows
        ],
    }
    notes = [
        "MACs and times are shares of full depth, with the deviation from the MACs in brackets; outside encoder and "
        "features are shares of the step",
        f"{precision}; encoder at full depth: "
        + ", ".join(
            f"{row.encoder_gmacs_per_second:.0f} billion MACs a second at batch {row.batch}, "
            f"{100 * row.matrix_share:.0f} % of what a large matrix product did in the same turn"
            for row in deepest
        ),
        f"bar: encoder time within {100 * DEVIATION_BAR:.0f} % of the MACs from batch {DEVIATION_BATCH} on: "
        f"{_verdict(holds, judged)}",
    ]
    return print_report(
        arguments, device, model.name, values, holds, f"one chunk of {arguments.chunk_ms} ms", columns, cells, notes
    )


def _parity(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from asr_exit.recognizer import Recognizer
    from service.bench.parity import TOLERANCE, check_parity
    from service.bench.streams import difference, read_all
    from service.cli.options import load_model
    from service.cli.recordings import list_recordings

    utterances = list_recordings(arguments)
    model, device = load_model(arguments)
    paths = [utterance.path for utterance in utterances]
    with progress_bar("comparing", len(paths)) as advance:
        report = check_parity(
            Recognizer(model, device=device),
            read_all(paths),
            chunk_ms=arguments.chunk_ms,
            streams=arguments.streams,
            device=device,
            on_done=advance,
        )
    real = sum(not found.excused for found in report.differences)
    values = {
        "recordings": report.recordings,
        "hours": report.audio_seconds / 3600,
        "tolerance": TOLERANCE,
        "max_error_by_exit": report.max_error_by_exit,
        "differences": [asdict(found) | {"path": str(paths[found.index])} for found in report.differences],
        "real_differences": real,
    }
    cells = [
        (f"exit {layer}: largest error of log-posteriors", f"{error:.1e}")
        for layer, error in zip(model.config.exit_layers, report.max_error_by_exit, strict=True)
    ]
    cells += [("texts that differ", str(len(report.differences))), ("of these not excused by a tie", str(real))]
    notes = [
        f"{paths[found.index].name}: {difference(found.streaming, found.offline)} (streaming, offline), {found.frames} "
        f"frames, margin {found.widest_margin:.1e}, {'tie' if found.excused else 'REAL'}"
        for found in report.differences
    ]
    title = f"{report.recordings} recordings, {report.audio_seconds / 3600:.2f} h, {arguments.chunk_ms} ms"
    return print_report(
        arguments, device, model.name, values, report.holds, title, ("streaming against offline", ""), cells, notes
    )


def _switches(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from asr_exit.recognizer import Recognizer
    from service.bench.streams import difference, read_all
    from service.bench.switches import ROUNDS, WINDOW_FRAMES, check_switches
    from service.cli.options import load_model
    from service.cli.recordings import list_recordings

    utterances = list_recordings(arguments)
    model, device = load_model(arguments)
    paths = [utterance.path for utterance in utterances]
    with progress_bar("switching", ROUNDS * len(paths)) as advance:
        report = check_switches(
            Recognizer(model, device=device),
            lambda: read_all(paths),
            chunk_ms=arguments.chunk_ms,
            streams=arguments.streams,
            device=device,
            seed=arguments.seed,
            on_done=advance,
        )
    real = sum(not found.excused for found in report.differences)
    seams = [
        asdict(counts)
        | {
            "doubled_per_thousand": counts.per_thousand(counts.doubled),
            "dropped_per_thousand": counts.per_thousand(counts.dropped),
            "foreign_per_thousand": counts.per_thousand(counts.foreign),
        }
        for counts in report.seams
    ]
    values = {
        "recordings": report.recordings,
        "hours": report.audio_seconds / 3600,
        "seed": arguments.seed,
        "window_frames": WINDOW_FRAMES,
        "with_revision": {
            "differences": [asdict(found) | {"path": str(paths[found.index])} for found in report.differences],
            "real_differences": real,
        },
        "without_revision": seams,
    }
    columns = (
        "fill",
        "depth",
        "seam handling",
        "edges",
        "tokens there",
        "doubled",
        "dropped",
        "doubled ‰",
        "dropped ‰",
        "foreign ‰",
    )
    cells = [
        (
            counts.fill,
            "changes" if counts.depth_changed else "stays",
            "on" if counts.seam_handling else "off",
            counts.edges,
            counts.witnessed,
            counts.doubled,
            counts.dropped,
            f"{counts.per_thousand(counts.doubled):.1f}",
            f"{counts.per_thousand(counts.dropped):.1f}",
            f"{counts.per_thousand(counts.foreign):.1f}",
        )
        for counts in report.seams
    ]
    notes = ["‰: per 1,000 edges between chunks"]
    notes.append(f"with revision: {len(report.differences)} texts differ from full depth, {real} not excused by a tie")
    notes += [
        f"{paths[found.index].name}: {difference(found.random_depth, found.full_depth)} (caught up, full depth), "
        f"margin {found.smallest_margin:.1e}, {'tie' if found.excused else 'REAL'}"
        for found in report.differences
    ]
    title = f"without revision: {report.recordings} recordings, {report.audio_seconds / 3600:.2f} h, chunks of "
    title += f"{arguments.chunk_ms} ms"
    return print_report(arguments, device, model.name, values, report.holds, title, columns, cells, notes)


def _memory(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from asr_exit.audio import load_audio
    from asr_exit.config import require
    from asr_exit.engine import Engine
    from asr_exit.policy import parse_policy
    from asr_exit.stream import StreamOptions
    from service.bench.memory import GROWTH_BAR_MB, measure_memory
    from service.bench.streams import sample_audio
    from service.cli.options import load_model

    require(arguments.hours > 0, f"--hours {arguments.hours:g} must be more than 0")
    model: StreamingModel
    if arguments.edge_model:
        from asr_exit.edge import EdgeModel

        model, device = EdgeModel(arguments.edge_model, threads=arguments.threads), "cpu"
    else:
        model, device = load_model(arguments)
    samples = load_audio(arguments.audio) if arguments.audio else sample_audio()
    policy = parse_policy(arguments.policy, exit_layers=model.config.exit_layers, calibration=model.calibration)
    with progress_bar("minutes of audio", round(60 * arguments.hours)) as advance:
        report = measure_memory(
            Engine(model, slots=1, device=device),
            samples,
            hours=arguments.hours,
            options=StreamOptions(chunk_ms=arguments.chunk_ms, policy=policy),
            on_minute=advance,
        )
    values = asdict(report) | {
        "policy": arguments.policy,
        "growth_mb": report.growth_mb,
        "growth_bar_mb": GROWTH_BAR_MB,
        "step_drift": report.drift,
    }
    cells = [
        ("resident memory after the first minute, MB", f"{report.rss_settled_mb:.1f}"),
        ("resident memory at the end, MB", f"{report.rss_end_mb:.1f}"),
        ("highest in between, MB", f"{report.rss_peak_mb:.1f}"),
        (f"growth, MB (bar: {GROWTH_BAR_MB:g})", f"{report.growth_mb:+.2f}"),
        ("step, first tenth, ms", f"{report.step_first_ms:.2f}"),
        ("step, last tenth, ms", f"{report.step_last_ms:.2f}"),
        ("change of the step time, %", f"{100 * report.drift:+.1f}"),
        ("words in finals", report.words),
        ("real-time factor", f"{report.real_time_factor:.4f}"),
    ]
    title = f"{report.hours:g} h in one stream, {report.steps} steps, {arguments.policy}"
    return print_report(arguments, device, model.name, values, report.holds, title, ("", ""), cells, [])


def _verdict(holds: bool, judged: Sequence[object]) -> str:
    return "not judged" if not judged else "met" if holds else "NOT met"


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error; yields what advances it by one."""
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)


def print_report(
    arguments: argparse.Namespace,
    device: str,
    model: str,
    values: dict[str, object],
    holds: bool,
    title: str,
    columns: Sequence[str],
    cells: Sequence[Sequence[object]],
    notes: Sequence[str],
) -> int:
    """Prints a table or one JSON object, with where it was measured; returns 1 when the bar is not met."""
    import json

    from rich.console import Console
    from rich.table import Table

    from service.bench.environment import caption_of, environment

    where = environment(device)
    if arguments.json:
        head = {"bench": arguments.kind, "holds": holds, "model": model, "chunk_ms": arguments.chunk_ms}
        print(json.dumps(head | values | {"environment": where}))
        return 0 if holds else 1
    table = Table(title=title)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    for row in cells:
        table.add_row(*map(str, row))
    console = Console(highlight=False)
    console.print(table)
    for note in (*notes, caption_of(where)):
        console.print(note, markup=False)
    return 0 if holds else 1
