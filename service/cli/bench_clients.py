"""The measurements of `asr-exit bench` that are about clients: the word at the endpoint, and the clients of others."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

COLUMNS = ("", "words", "substituted", "deleted", "inserted")


def add_kinds(kinds: Any) -> dict[argparse.ArgumentParser, Callable[[argparse.Namespace], int]]:
    """Adds the subcommands; returns what runs each of them."""
    from service.cli.recordings import add_recordings_options

    endpoint = kinds.add_parser("endpoint", help="words lost or doubled where an utterance ends")
    add_recordings_options(endpoint)
    endpoint.add_argument("--pairs", type=int, default=100, metavar="N", help="of recordings (default: 100)")
    endpoint.add_argument("--seed", type=int, default=0, metavar="N", help="of the pairs and silences (default: 0)")
    endpoint.add_argument(
        "--on-grid", action="store_true", help="choose silences that let the second one begin with a chunk"
    )
    runs: dict[argparse.ArgumentParser, Callable[[argparse.Namespace], int]] = {endpoint: _endpoint}
    others = {
        "riva": ("NVIDIA's Riva client", "nvidia-riva-client"),
        "google": ("Google's Speech-to-Text client", "google-cloud-speech"),
    }
    for kind, (whose, package) in others.items():
        parser = kinds.add_parser(kind, help=f"{whose} against our own")
        add_recordings_options(parser)
        parser.add_argument(
            "--python", required=True, metavar="PATH", help=f"interpreter of an environment with {package}"
        )
        runs[parser] = partial(_other_client, kind)
    return runs


def _endpoint(arguments: argparse.Namespace) -> int:
    from asr_exit.engine import Engine
    from asr_exit.policy import parse_policy
    from asr_exit.stream import Fill, StreamOptions
    from service.bench.endpoint import LOST_OR_DOUBLED_BAR, check_endpoint, draw_pairs
    from service.cli.bench import print_report, progress_bar
    from service.cli.options import load_model
    from service.cli.recordings import list_recordings
    from service.config import StreamDefaults

    model, device = load_model(arguments)
    grid_ms = arguments.chunk_ms if arguments.on_grid else 0
    pairs = draw_pairs(list_recordings(arguments), arguments.pairs, arguments.seed, grid_ms=grid_ms)
    defaults = StreamDefaults()
    policy = parse_policy(defaults.policy, exit_layers=model.config.exit_layers, calibration=model.calibration)
    options = StreamOptions(
        chunk_ms=arguments.chunk_ms,
        policy=policy,
        fill=Fill(defaults.fill),
        endpoint_silence_ms=defaults.endpoint_silence_ms,
        max_utterance_ms=defaults.max_utterance_ms,
    )
    with progress_bar("decoding", 4 * len(pairs)) as advance:
        found = check_endpoint(Engine(model, slots=16, device=device), pairs, options, advance)
    rows = {
        "apart, against what was said": found.said_apart,
        "joined, against what was said": found.said_joined,
        "joined with endpoints, against without": found.cuts,
        "joined, against apart": found.joined,
        "joined without endpoints, against apart": found.uncut,
    }
    cells = [(name, row.words, row.substitutions, row.deletions, row.insertions) for name, row in rows.items()]
    values = asdict(found) | {
        "by_cuts": found.by_cuts,
        "by_joint": found.by_joint,
        "bar": LOST_OR_DOUBLED_BAR,
        "seed": arguments.seed,
        "on_grid": arguments.on_grid,
    }
    notes = [
        f"words lost or doubled by the cuts: {100 * found.by_cuts:.2f} %; more of them joined than apart, against what "
        f"was said: {100 * found.by_joint:.2f} % (bar: {100 * LOST_OR_DOUBLED_BAR:g} % each: "
        f"{'met' if found.holds else 'NOT met'})",
        f"the pairs were cut into {found.utterances} utterances",
    ]
    title = f"{found.pairs} pairs, 0.3 to 3 s of silence between, {arguments.chunk_ms} ms chunks"
    return print_report(arguments, device, model.name, values, found.holds, title, COLUMNS, cells, notes)


def _other_client(kind: str, arguments: argparse.Namespace) -> int:
    from asr_exit.config import from_mapping
    from service.background import BackgroundServer
    from service.bench.other_client import CLIENTS, WORD_TIME_BAR_MS, check_client
    from service.cli.bench import print_report, progress_bar
    from service.cli.options import load_model
    from service.cli.recordings import list_recordings
    from service.config import ServeConfig

    other = CLIENTS[kind]
    paths = [utterance.path for utterance in list_recordings(arguments)]
    model, device = load_model(arguments)
    tables = {
        "listen": {"port": 0},
        "load": {"shed_depth": False},  # depth must not depend on what else the machine does
        "stream": {"chunk_ms": arguments.chunk_ms},
        "model": {"device": device, "threads": arguments.threads},
    }
    with (
        BackgroundServer(model, from_mapping(ServeConfig, tables)) as server,
        progress_bar("files", len(paths)) as advance,
    ):
        found = check_client(other, server.address, arguments.python, paths, advance)
    cells = [
        ("files", found.files),
        ("words", found.words),
        ("streaming texts that differ from ours", len(found.streaming_texts_differ)),
        ("offline texts that differ from ours", len(found.offline_texts_differ)),
        (f"largest difference of a word's times, ms (bar: {WORD_TIME_BAR_MS:g})", f"{found.largest_time_error_ms:g}"),
        ("models listed", ", ".join(found.models or ["none: not in this API"])),
        ("provoked errors", ", ".join(f"{name}: {status}" for name, status in found.errors.items())),
    ]
    values = asdict(found) | {"word_time_bar_ms": WORD_TIME_BAR_MS}
    return print_report(arguments, device, model.name, values, found.holds, other.name, ("", ""), cells, [])
