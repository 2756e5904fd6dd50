"""The part of `asr-exit bench` that measures a server from outside: load, abuse, soak."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from service.cli.bench_load import add_load, run_load
from service.cli.under_test import model_name, serve_arguments, speeches

CHUNK_CHOICES_MS = (160, 320, 640, 1280)


def add_kinds(kinds: Any) -> None:
    """`load`, `abuse` and `soak`, to the subcommands of `bench`."""
    load = add_load(kinds)
    abuse = kinds.add_parser("abuse", help="good streams among thousands that are cancelled, killed or left idle")
    abuse.add_argument("--bad", type=int, default=2000, metavar="N", help="bad streams (default: 2000)")
    abuse.add_argument("--good", type=int, default=20, metavar="N", help="good streams at a time (default: 20)")
    soak = kinds.add_parser("soak", help="steady load: slope of memory, drift of latency")
    soak.add_argument("--minutes", type=float, default=30, metavar="N", help="default: 30")
    soak.add_argument("--streams", type=int, required=True, metavar="N", help="e.g. 80 %% of what `bench load` found")
    for kind, run in {load: run_load, abuse: _abuse, soak: _soak}.items():
        source = kind.add_mutually_exclusive_group()
        source.add_argument("--manifest", metavar="TSV", help="what to say: columns path and transcript")
        source.add_argument("--librispeech", metavar="DIR", help="folder with LibriSpeech subsets; needs --subset")
        kind.add_argument("--subset", metavar="NAME", help="of LibriSpeech")
        kind.add_argument("--limit", type=int, default=200, metavar="N", help="recordings (default: 200)")
        kind.add_argument("--chunk-ms", type=int, choices=CHUNK_CHOICES_MS, default=640, help="default: 640")
        policy = "full" if kind is abuse else ""
        shown = policy or "the server's"
        several = "; several, joined by commas, are compared with the first" if kind is load else ""
        kind.add_argument("--policy", default=policy, metavar="P", help=f"default: {shown}{several}")
        kind.add_argument("--no-pin", action="store_true", help="let the server share its core with the generator")
        kind.add_argument("--no-shedding", action="store_true", help="keep the depth that the policy asks for")
        kind.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="default: auto")
        kind.add_argument("--model", metavar="FILE", help="model file (default: the bundled one)")
        kind.add_argument("--json", action="store_true", help="one JSON object instead of the table")
        kind.set_defaults(run_kind=run)


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
        ("of it in use, MB", "-" if report.in_use_growth_mb is None else f"{report.in_use_growth_mb:+.2f}"),
    ]
    return print_report(arguments, "cpu", model_name(arguments), values, report.holds, "abuse", ("", ""), cells, [])


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
    settings = StreamSettings(chunk_ms=arguments.chunk_ms, policy=arguments.policy, whole_chunks=False)
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
        ("slope of what of it is in use", "-" if report.in_use_slope_mb is None else f"{report.in_use_slope_mb:+.2f}"),
        ("median latency, first third, ms", f"{report.latency_first_ms:.0f}"),
        ("median latency, last third, ms", f"{report.latency_last_ms:.0f}"),
        (f"drift, % (bar: {100 * DRIFT_BAR:g})", f"{100 * report.drift:+.1f}"),
        ("streams that failed", sum(report.trial.errors.values())),
    ]
    return print_report(arguments, "cpu", model_name(arguments), values, report.holds, "soak", ("", ""), cells, [])
