"""`asr-exit bench load`: real-time streams on one core at a p99 latency, policy against policy, and overload."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from service.cli.under_test import model_name, serve_arguments, speeches

if TYPE_CHECKING:
    from service.bench.load import Trial
    from service.bench.overload import OverloadReport, Phase
    from service.bench.speakers import Speech

ENCODER_BAR = 0.2  # share of the core's matrix rate
_LATE_GENERATOR = "WARNING: the generator sent more than 1 % of its messages late: those trials say nothing"


def add_load(kinds: Any) -> argparse.ArgumentParser:
    """The subcommand, without the options that it shares with others."""
    load: argparse.ArgumentParser = kinds.add_parser(
        "load", help="most real-time streams at a p99 chunk latency; the server has a core to itself"
    )
    load.add_argument("--latency-ms", type=float, metavar="N", help="p99 to hold (default: the chunk length)")
    load.add_argument("--streams", type=int, metavar="N", help="run just this one trial")
    load.add_argument("--start", type=int, default=32, metavar="N", help="first of the search (default: 32)")
    load.add_argument("--most", type=int, default=512, metavar="N", help="never more streams (default: 512)")
    load.add_argument("--trials", type=int, default=8, metavar="N", help="at most, of each policy (default: 8)")
    load.add_argument("--seconds", type=float, default=30, metavar="N", help="measured in each trial (default: 30)")
    load.add_argument("--warm-up", type=float, default=8, metavar="N", help="seconds before that (default: 8)")
    load.add_argument(
        "--message-ms", type=int, metavar="N", help="audio per message (default: a chunk, as the clients here send it)"
    )
    load.add_argument("--raw", action="store_true", help="first time the engine alone on that core, batch 32")
    load.add_argument("--plot", metavar="FILE", help="latency over streams as an image (needs matplotlib)")
    load.add_argument(
        "--overload",
        type=int,
        metavar="N",
        help="instead: 1.5 times N streams, then 0.5 times N; N = what the server holds at full depth",
    )
    return load


def run_load(arguments: argparse.Namespace) -> int:
    """Runs the searches, or the overload."""
    from asr_exit.config import require

    for name in ("start", "most", "trials", "seconds", "message_ms", "overload"):
        value = getattr(arguments, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')} {value} must be more than 0")
    return _searches(arguments) if arguments.overload is None else _overload(arguments)


def _searches(arguments: argparse.Namespace) -> int:
    from service.bench import load
    from service.bench.served import cores, pin, serving
    from service.cli.bench import print_report
    from service.client import StreamSettings

    latency_ms = arguments.latency_ms or float(arguments.chunk_ms)
    said = speeches(arguments)
    server_cores, generator_cores = (set(), set()) if arguments.no_pin else cores()
    raw = _raw(arguments, server_cores) if arguments.raw else None
    precision, rate = _matrix_rate(arguments, server_cores)
    policies = arguments.policy.split(",")
    most = arguments.streams or arguments.most
    line, toml = serve_arguments(arguments, most)
    pin(0, generator_cores)
    trials: list[Trial] = []
    found: dict[str, Trial | None] = {}
    with serving(line, toml, server_cores) as server:

        def run(streams: int) -> Trial:
            trial, _ = load.run_trial(
                server,
                said,
                settings,
                streams=streams,
                warm_up_s=arguments.warm_up,
                seconds=arguments.seconds,
                message_ms=arguments.message_ms or arguments.chunk_ms,
            )
            p99 = trial.chunk_latency_ms[-1] if trial.chunk_latency_ms else float("nan")
            print(f"{streams} streams: p99 {p99:.0f} ms, {100 * trial.cpu_share:.0f} % of a core", file=sys.stderr)
            return trial

        for policy in policies:
            settings = StreamSettings(chunk_ms=arguments.chunk_ms, policy=policy, whole_chunks=False)
            if arguments.streams:
                ours = [run(arguments.streams)]
            else:
                held = max((trial.streams for trial in found.values() if trial), default=0)
                start = max(arguments.start, round(1.8 * held))  # of later policies: the bar against the first
                ours = load.search(run, start=start, most=most, latency_ms=latency_ms, trials=arguments.trials)
            trials += ours
            found[policy] = load.best(ours, latency_ms)
    best = found[policies[0]]
    if arguments.plot:
        load.plot([trial for trial in trials if trial.policy == policies[0]], latency_ms, arguments.plot)
    values: dict[str, object] = {
        "latency_bar_ms": latency_ms,
        "policy": arguments.policy or "the server's",
        "precision": precision,
        "message_ms": arguments.message_ms or arguments.chunk_ms,
        "shedding": not arguments.no_shedding,
        "pinned": bool(server_cores),
        "streams": best.streams if best else 0,
        "streams_by_policy": {policy: trial.streams if trial else 0 for policy, trial in found.items()},
        "raw_streams_per_core": raw and raw["streams_per_core"],
        "raw_encoder_gmacs_per_second": raw and raw["encoder_gmacs_per_second"],
        "raw_matrix_share": raw and raw["matrix_share"],
        "matrix_gmacs_per_second": rate,
        "encoder_bar": ENCODER_BAR,
        "trials": [load.as_json(trial) for trial in trials],
    }
    columns = (
        *("policy", "streams", "p50 ms", "p95 ms", "p99 ms", "first text ms", "end ms", "WER %", "core %"),
        *("overhead %", "matrix %", "per step", "MB", "mean exit", "holds"),
    )
    notes = [*_findings(found, latency_ms), *_shares(best, raw, precision, rate)]
    if any(trial.generator_late > load.GENERATOR_BAR for trial in trials):
        notes.append(_LATE_GENERATOR)
    if not server_cores:
        notes.append("not pinned: server and generator shared their cores")
    notes.append("first text and end of speech (last sample sent to last final): p95; overhead: outside engine steps")
    rows = [_row(trial, latency_ms, rate) for trial in trials]
    return print_report(arguments, "cpu", model_name(arguments), values, bool(best), "load", columns, rows, notes)


def _findings(found: dict[str, Trial | None], latency_ms: float) -> list[str]:
    """What each policy held, and how the others compare with the first."""
    first, *others = found.items()
    notes = []
    for policy, trial in found.items():
        name = f" of {policy}" if policy else ""
        notes.append(f"most streams{name} with p99 within {latency_ms:.0f} ms: {trial.streams if trial else 'none'}")
    for policy, trial in others:
        if trial and first[1]:
            note = f"{policy}: {trial.streams / first[1].streams:.2f} times the streams of {first[0]}"
            if trial.word_error_rate is not None and first[1].word_error_rate:
                more = 100 * (trial.word_error_rate / first[1].word_error_rate - 1)
                note += f", WER at that load {more:+.1f} % relative"
            notes.append(note)
    return notes


def _shares(best: Trial | None, raw: dict[str, float] | None, precision: str, rate: float) -> list[str]:
    """Against the engine alone, and against a large matrix product."""
    notes = []
    if best:
        seen, counted = best.mean_latency_ms, best.server_latency_ms
        notes.append(f"at {best.streams} streams: mean latency {seen:.0f} ms; as the server counts it {counted:.0f} ms")
    if raw and best:
        alone = raw["streams_per_core"]
        notes.append(f"{100 * best.streams / alone:.0f} % of the {alone:.0f} that the engine alone does at batch 32")
    if raw:
        gmacs, share = raw["encoder_gmacs_per_second"], raw["matrix_share"]
        notes.append(
            f"encoder alone at batch 32: {gmacs:.0f} billion MACs a second, {100 * share:.0f} % of what a large matrix "
            "product did in the same turns"
        )
    notes.append(
        f"matrix %: the encoder's MACs in the processor time of engine steps, against {rate:.0f} billion a second of "
        f"a large {precision} matrix product on that core (bar: {100 * ENCODER_BAR:.0f} %)"
    )
    return notes


def _row(trial: Trial, latency_ms: float, matrix_rate: float) -> tuple[object, ...]:
    chunks = max(1, sum(trial.chunks_by_layer.values()))
    return (
        trial.policy or "server's",
        trial.streams,
        *_shown(trial.chunk_latency_ms, 0, 1, 2),
        *_shown(trial.first_partial_ms, 1),
        *_shown(trial.end_of_speech_ms, 1),
        "-" if trial.word_error_rate is None else f"{100 * trial.word_error_rate:.1f}",
        f"{100 * trial.cpu_share:.0f}",
        f"{100 * trial.overhead_share:.0f}",
        f"{100 * trial.encoder_gmacs_per_second / matrix_rate:.1f}",
        f"{trial.streams_per_step:.1f}",
        f"{trial.rss_mb:.0f}",
        f"{sum(layer * count for layer, count in trial.chunks_by_layer.items()) / chunks:.1f}",
        "yes" if trial.holds(latency_ms) else f"no {trial.errors or ''}".strip(),
    )


def _shown(values: tuple[float, ...] | None, *which: int) -> list[str]:
    return ["-"] * len(which) if values is None else [f"{values[index]:.0f}" for index in which]


def _matrix_rate(arguments: argparse.Namespace, on_cores: set[int]) -> tuple[str, float]:
    """The precision that is served, and billions of MACs a second of a large matrix product in it on these cores."""
    import torch

    from asr_exit.checkpoint import DTYPES
    from service.bench.served import pin
    from service.bench.speed import matrix_rate
    from service.device import pick_precision

    precision = pick_precision(arguments.precision, "cpu")
    torch.set_num_threads(1)
    pin(0, on_cores)
    return precision, matrix_rate(DTYPES[precision])


def _raw(arguments: argparse.Namespace, on_cores: set[int]) -> dict[str, float]:
    """`bench engine` at batch 32, its row of full depth, in a process of its own on the server's core."""
    from service.bench.served import BenchError, pin

    command = [sys.executable, "-m", "service.cli.main", "bench", "engine", "--batches", "32", "--json"]
    command += ["--device", "cpu", "--precision", arguments.precision, "--chunk-ms", str(arguments.chunk_ms)]
    command += ["--seconds", "13"] + (["--model", arguments.model] if arguments.model else [])
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    pin(child.pid, on_cores)
    out, _ = child.communicate()
    if not out.strip():
        raise BenchError("`asr-exit bench engine` failed: run it by itself to see why")
    full: dict[str, float] = json.loads(out)["rows"][-1]
    return full


def _overload(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from asr_exit.config import require
    from service.bench import overload
    from service.bench.load import GENERATOR_BAR
    from service.bench.served import cores, pin, serving
    from service.cli.bench import print_report
    from service.client import StreamSettings

    require(not arguments.no_shedding, "--no-shedding keeps depth from giving way: leave it out with --overload")
    latency_ms = arguments.latency_ms or float(arguments.chunk_ms)
    server_cores, generator_cores = (set(), set()) if arguments.no_pin else cores()
    line, toml = serve_arguments(arguments, 2 * arguments.overload)
    said: list[Speech] = speeches(arguments)
    pin(0, generator_cores)
    with serving(line, toml, server_cores) as server:
        report: OverloadReport = overload.measure_overload(
            server,
            said,
            StreamSettings(chunk_ms=arguments.chunk_ms, policy=arguments.policy or "full", whole_chunks=False),
            capacity=arguments.overload,
            warm_up_s=arguments.warm_up,
            seconds=arguments.seconds,
            message_ms=arguments.message_ms or arguments.chunk_ms,
        )
    holds = report.holds(latency_ms)
    values = {"latency_bar_ms": latency_ms, "policy": arguments.policy or "full"} | asdict(report)
    columns = ("streams", "p50 ms", "p95 ms", "p99 ms", "p95 ms, 2nd half", "mean exit", "cut by load %")
    rows = [_phase_row(phase) for phase in (report.overload, report.relief)]
    notes = [
        f"ceiling: {report.ceiling_changes_per_second:.2f} changes a second under overload "
        f"(bar: {overload.CHANGES_BAR:g}); {_path(report.ceilings)}",
        f"last chunk cut by load {report.recovery_s:.1f} s after the overload ended (bar: {overload.RECOVERY_BAR_S:g})",
        f"bars: p95 of the overload's second half within {latency_ms:.0f} ms, mean exit lower, no errors "
        f"{report.errors or ''}: {'met' if holds else 'NOT met'}",
    ]
    if report.generator_late > GENERATOR_BAR:
        notes.append(_LATE_GENERATOR)
    return print_report(arguments, "cpu", model_name(arguments), values, holds, "overload", columns, rows, notes)


def _phase_row(phase: Phase) -> tuple[object, ...]:
    return (
        phase.streams,
        *_shown(phase.chunk_latency_ms, 0, 1, 2),
        *_shown(phase.late_half_ms, 1),
        f"{phase.mean_exit_layer:.1f}",
        f"{100 * phase.cut_by_load:.0f}",
    )


def _path(ceilings: Sequence[tuple[float, int]]) -> str:
    """Deepest layers over time, repetitions left out."""
    turns = [layer for index, (_, layer) in enumerate(ceilings) if not index or ceilings[index - 1][1] != layer]
    return "deepest layer " + " ".join(map(str, turns))
