"""The part of `asr-exit bench` that measures a server from outside: load, abuse, soak."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.bench.load import Trial
    from service.bench.speakers import Speech

CHUNK_CHOICES_MS = (160, 320, 640, 1280)


def add_kinds(kinds: Any) -> None:
    """`load`, `abuse` and `soak`, to the subcommands of `bench`."""
    load = kinds.add_parser(
        "load", help="most real-time streams at a p99 chunk latency; the server has a core to itself"
    )
    load.add_argument("--latency-ms", type=float, metavar="N", help="p99 to hold (default: the chunk length)")
    load.add_argument("--streams", type=int, metavar="N", help="run just this one trial")
    load.add_argument("--start", type=int, default=32, metavar="N", help="first of the search (default: 32)")
    load.add_argument("--most", type=int, default=512, metavar="N", help="never more streams (default: 512)")
    load.add_argument("--trials", type=int, default=8, metavar="N", help="at most (default: 8)")
    load.add_argument("--seconds", type=float, default=30, metavar="N", help="measured in each trial (default: 30)")
    load.add_argument("--warm-up", type=float, default=8, metavar="N", help="seconds before that (default: 8)")
    load.add_argument("--message-ms", type=int, default=160, metavar="N", help="audio per message (default: 160)")
    load.add_argument("--raw", action="store_true", help="first time the engine alone on that core, batch 32")
    load.add_argument("--plot", metavar="FILE", help="latency over streams as an image (needs matplotlib)")
    abuse = kinds.add_parser("abuse", help="good streams among thousands that are cancelled, killed or left idle")
    abuse.add_argument("--bad", type=int, default=2000, metavar="N", help="bad streams (default: 2000)")
    abuse.add_argument("--good", type=int, default=20, metavar="N", help="good streams at a time (default: 20)")
    soak = kinds.add_parser("soak", help="steady load: slope of memory, drift of latency")
    soak.add_argument("--minutes", type=float, default=30, metavar="N", help="default: 30")
    soak.add_argument("--streams", type=int, required=True, metavar="N", help="e.g. 80 %% of what `bench load` found")
    for kind, run in {load: _load, abuse: _abuse, soak: _soak}.items():
        source = kind.add_mutually_exclusive_group()
        source.add_argument("--manifest", metavar="TSV", help="what to say: columns path and transcript")
        source.add_argument("--librispeech", metavar="DIR", help="folder with LibriSpeech subsets; needs --subset")
        kind.add_argument("--subset", metavar="NAME", help="of LibriSpeech")
        kind.add_argument("--limit", type=int, default=200, metavar="N", help="recordings (default: 200)")
        kind.add_argument("--chunk-ms", type=int, choices=CHUNK_CHOICES_MS, default=640, help="default: 640")
        policy = "full" if kind is abuse else ""
        shown = policy or "the server's"
        kind.add_argument("--policy", default=policy, metavar="P", help=f"default: {shown}")
        kind.add_argument("--no-pin", action="store_true", help="let the server share its core with the generator")
        kind.add_argument("--no-shedding", action="store_true", help="keep the depth that the policy asks for")
        kind.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="default: auto")
        kind.add_argument("--model", metavar="FILE", help="model file (default: the bundled one)")
        kind.add_argument("--json", action="store_true", help="one JSON object instead of the table")
        kind.set_defaults(run_kind=run)


def speeches(arguments: argparse.Namespace) -> list[Speech]:
    """The recordings named, or the bundled sample at several speeds."""
    from importlib.resources import files

    from asr_exit.audio import load_audio
    from service.bench.speakers import speech_of, varied
    from service.bench.streams import sample_audio
    from service.cli.recordings import list_recordings

    if not (arguments.manifest or arguments.librispeech):
        text = (files("asr_exit") / "assets" / "sample.txt").read_text(encoding="utf-8")
        return varied(sample_audio(), text)
    return [speech_of(load_audio(item.path), item.text) for item in list_recordings(arguments)]


def serve_arguments(arguments: argparse.Namespace, slots: int) -> tuple[list[str], str]:
    """Command line and configuration file of the server under test."""
    line = ["--streams", str(slots), "--precision", arguments.precision, "--device", "cpu"]
    line += ["--model", arguments.model] if arguments.model else []
    shed = str(not arguments.no_shedding).lower()
    return line, f"[load]\nshed_depth = {shed}\ntarget_latency_ms = {arguments.chunk_ms}\n[log]\nlevel = 'error'\n"


def _load(arguments: argparse.Namespace) -> int:
    from asr_exit.config import require
    from service.bench import load
    from service.bench.served import cores, pin, serving
    from service.cli.bench import print_report
    from service.client import StreamSettings

    for name in ("start", "most", "trials", "seconds", "message_ms"):
        value = getattr(arguments, name)
        require(value > 0, f"--{name.replace('_', '-')} {value} must be more than 0")
    latency_ms = arguments.latency_ms or float(arguments.chunk_ms)
    said = speeches(arguments)
    server_cores, generator_cores = (set(), set()) if arguments.no_pin else cores()
    raw = _raw_streams(arguments, server_cores) if arguments.raw else None
    settings = StreamSettings(chunk_ms=arguments.chunk_ms, policy=arguments.policy)
    most = arguments.streams or arguments.most
    line, toml = serve_arguments(arguments, most)
    pin(0, generator_cores)
    with serving(line, toml, server_cores) as server:

        def run(streams: int) -> Trial:
            trial, _ = load.run_trial(
                server,
                said,
                settings,
                streams=streams,
                warm_up_s=arguments.warm_up,
                seconds=arguments.seconds,
                message_ms=arguments.message_ms,
            )
            p99 = trial.chunk_latency_ms[-1] if trial.chunk_latency_ms else float("nan")
            print(f"{streams} streams: p99 {p99:.0f} ms, {100 * trial.cpu_share:.0f} % of a core", file=sys.stderr)
            return trial

        if arguments.streams:
            trials = [run(arguments.streams)]
        else:
            trials = load.search(run, start=arguments.start, most=most, latency_ms=latency_ms, trials=arguments.trials)
    found = load.best(trials, latency_ms)
    if arguments.plot:
        load.plot(trials, latency_ms, arguments.plot)
    values: dict[str, object] = {
        "latency_bar_ms": latency_ms,
        "policy": arguments.policy or "the server's",
        "precision": arguments.precision,
        "message_ms": arguments.message_ms,
        "shedding": not arguments.no_shedding,
        "pinned": bool(server_cores),
        "streams": found.streams if found else 0,
        "raw_streams_per_core": raw,
        "trials": [load.as_json(trial) for trial in trials],
    }
    columns = (
        *("streams", "p50 ms", "p95 ms", "p99 ms", "first text ms", "end ms", "WER %", "core %", "overhead %"),
        *("per step", "MB", "mean exit", "holds"),
    )
    notes = [f"most streams with p99 within {latency_ms:.0f} ms: {found.streams if found else 'none'}"]
    if raw and found:
        notes.append(f"{100 * found.streams / raw:.0f} % of the {raw:.0f} that the engine alone does at batch 32")
    if any(trial.generator_late > load.GENERATOR_BAR for trial in trials):
        notes.append("WARNING: the generator sent more than 1 % of its messages late: those trials say nothing")
    if not server_cores:
        notes.append("not pinned: server and generator shared their cores")
    notes.append("first text and end of speech (last sample sent to last final): p95; overhead: outside engine steps")
    rows = [_row(trial, latency_ms) for trial in trials]
    return print_report(arguments, "cpu", _name(arguments), values, bool(found), "load", columns, rows, notes)


def _name(arguments: argparse.Namespace) -> str:
    return arguments.model or "bundled"


def _row(trial: Trial, latency_ms: float) -> tuple[object, ...]:
    def shown(values: tuple[float, ...] | None, *which: int) -> list[str]:
        return ["-"] * len(which) if values is None else [f"{values[index]:.0f}" for index in which]

    chunks = max(1, sum(trial.chunks_by_layer.values()))
    return (
        trial.streams,
        *shown(trial.chunk_latency_ms, 0, 1, 2),
        *shown(trial.first_partial_ms, 1),
        *shown(trial.end_of_speech_ms, 1),
        "-" if trial.word_error_rate is None else f"{100 * trial.word_error_rate:.1f}",
        f"{100 * trial.cpu_share:.0f}",
        f"{100 * trial.overhead_share:.0f}",
        f"{trial.streams_per_step:.1f}",
        f"{trial.rss_mb:.0f}",
        f"{sum(layer * count for layer, count in trial.chunks_by_layer.items()) / chunks:.1f}",
        "yes" if trial.holds(latency_ms) else f"no {trial.errors or ''}".strip(),
    )


def _raw_streams(arguments: argparse.Namespace, on_cores: set[int]) -> float:
    """Streams per core of `bench engine` at batch 32 and full depth, in a process of its own on the server's core."""
    import json
    import subprocess

    from service.bench.served import BenchError, pin

    command = [
        sys.executable,
        "-m",
        "service.cli.main",
        "bench",
        "engine",
        "--batches",
        "32",
        "--json",
        "--device",
        "cpu",
    ]
    command += ["--precision", arguments.precision, "--chunk-ms", str(arguments.chunk_ms), "--seconds", "13"]
    command += ["--model", arguments.model] if arguments.model else []
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    pin(child.pid, on_cores)
    out, _ = child.communicate()
    if not out.strip():
        raise BenchError("`asr-exit bench engine` failed: run it by itself to see why")
    return float(json.loads(out)["rows"][-1]["streams_per_core"])


def _abuse(arguments: argparse.Namespace) -> int:
    import asyncio
    from dataclasses import asdict

    from service.bench.abuse import MEMORY_BAR_MB, SERVER_TOML, measure_abuse
    from service.bench.served import cores, pin, serving
    from service.cli.bench import print_report

    server_cores, generator_cores = (set(), set()) if arguments.no_pin else cores()
    slots = arguments.good + 400
    line = ["--precision", "fp32", "--device", "cpu"] + (["--model", arguments.model] if arguments.model else [])
    toml = SERVER_TOML.format(slots=slots) + f"[stream]\npolicy = '{arguments.policy}'\n"
    said = speeches(arguments)
    pin(0, generator_cores)
    with serving(line, toml, server_cores) as server:
        report = asyncio.run(measure_abuse(server, said, bad=arguments.bad, good=arguments.good))
    values = asdict(report) | {"growth_mb": report.growth_mb, "growth_bar_mb": MEMORY_BAR_MB}
    cells = [
        *((f"bad streams: {kind}", count) for kind, count in report.bad_streams.items()),
        ("good streams among them", report.good_streams),
        ("whose text changed", len(report.changed_texts)),
        ("which failed", report.failed_streams),
        ("streams open at the end", report.open_streams),
        ("resident memory before and after, MB", f"{report.rss_before_mb:.1f}, {report.rss_after_mb:.1f}"),
        (f"growth, MB (bar: {MEMORY_BAR_MB:g})", f"{report.growth_mb:+.2f}"),
    ]
    return print_report(arguments, "cpu", _name(arguments), values, report.holds, "abuse", ("", ""), cells, [])


def _soak(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from asr_exit.config import require
    from service.bench.served import cores, pin, serving
    from service.bench.soak import DRIFT_BAR, MEMORY_BAR_MB, measure_soak
    from service.cli.bench import print_report
    from service.client import StreamSettings

    require(arguments.minutes > 0, f"--minutes {arguments.minutes:g} must be more than 0")
    require(arguments.streams > 0, f"--streams {arguments.streams} must be more than 0")
    server_cores, generator_cores = (set(), set()) if arguments.no_pin else cores()
    line, toml = serve_arguments(arguments, arguments.streams)
    settings = StreamSettings(chunk_ms=arguments.chunk_ms, policy=arguments.policy)
    said = speeches(arguments)
    pin(0, generator_cores)
    with serving(line, toml, server_cores) as server:
        report = measure_soak(server, said, settings, streams=arguments.streams, minutes=arguments.minutes)
    values = asdict(report) | {"drift": report.drift, "memory_bar_mb": MEMORY_BAR_MB, "drift_bar": DRIFT_BAR}
    cells: Sequence[tuple[str, object]] = [
        ("streams", report.trial.streams),
        ("minutes", f"{arguments.minutes:g}"),
        ("p99 chunk latency, ms", f"{report.trial.chunk_latency_ms[-1]:.0f}" if report.trial.chunk_latency_ms else "-"),
        (f"memory slope, MB in ten minutes (bar: {MEMORY_BAR_MB:g})", f"{report.slope_mb:+.2f}"),
        ("median latency, first third, ms", f"{report.latency_first_ms:.0f}"),
        ("median latency, last third, ms", f"{report.latency_last_ms:.0f}"),
        (f"drift, % (bar: {100 * DRIFT_BAR:g})", f"{100 * report.drift:+.1f}"),
        ("streams that failed", sum(report.trial.errors.values())),
    ]
    return print_report(arguments, "cpu", _name(arguments), values, report.holds, "soak", ("", ""), cells, [])
