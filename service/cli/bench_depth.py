"""`asr-exit bench depth`, `bench fills` and `bench decide`: what depending on the audio is worth, and what it costs."""

from __future__ import annotations

import argparse
from typing import Any


def add_depth_arguments(kinds: Any) -> None:
    """The subcommands' own options; the common ones are added by `bench`."""
    from service.cli.recordings import add_recordings_options

    depth = kinds.add_parser("depth", help="word errors over cost: every criterion, static exits, random, oracle")
    fills = kinds.add_parser("fills", help="what skipped layers get: word errors and MACs really spent")
    decide = kinds.add_parser("decide", help="time of evidence and decision as a share of a full-depth step")
    for kind in (depth, fills):
        add_recordings_options(kind)
        kind.add_argument("--processes", type=int, default=1, metavar="N", help="one core each (default: 1)")
    depth.add_argument("--points", type=int, default=5, metavar="N", help="settings per curve (default: 5)")
    depth.add_argument("--criteria", metavar="LIST", help="separated by commas (default: all that are calibrated)")
    depth.add_argument("--noise", metavar="DIR", help="recordings mixed in at 20, 10, 5 and 0 dB (default: no noise)")
    depth.add_argument("--out", metavar="DIR", help="writes depth.md and depth.json there")
    depth.add_argument("--plot", action="store_true", help="also depth.png; needs the extra 'plot'")
    decide.add_argument("--batch", type=int, default=16, metavar="N", help="streams (default: 16)")
    decide.add_argument("--turns", type=int, default=40, metavar="N", help="steps timed (default: 40)")
    for kind, run_kind in ((depth, _depth), (fills, _fills), (decide, _decide)):
        kind.set_defaults(run_kind=run_kind)
        _add_common(kind)


def _add_common(kind: argparse.ArgumentParser) -> None:
    """Options that every measurement has."""
    from service.cli.options import add_model_options

    kind.add_argument("--chunk-ms", type=int, choices=(160, 320, 640, 1280), default=640, help="default: 640")
    kind.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    add_model_options(kind)


def _depth(arguments: argparse.Namespace) -> int:
    import json
    import sys
    from pathlib import Path

    from rich.console import Console

    from asr_exit.calibration.workers import Recording, Workers
    from asr_exit.config import require
    from asr_exit.policy import calibration_for
    from asr_exit.tokenizer import normalise
    from service.bench.depth import Runner, calibrated_criteria, study
    from service.bench.depth_plot import plot
    from service.bench.depth_report import markdown
    from service.bench.environment import caption_of, environment
    from service.cli.options import load_model
    from service.cli.recordings import audio_files, spread_recordings

    require(arguments.points >= 1, f"--points {arguments.points} must be at least 1")
    require(not arguments.plot or bool(arguments.out), "--plot needs --out")
    recordings = [Recording(item.path, normalise(item.text)) for item in spread_recordings(arguments)]
    noise = [Recording(path, "") for path in audio_files(arguments.noise)] if arguments.noise else []
    model, device = load_model(arguments)
    wanted = [part.strip() for part in arguments.criteria.split(",")] if arguments.criteria else None
    criteria = calibrated_criteria(calibration_for(model.calibration, arguments.chunk_ms), wanted)
    console = Console(file=sys.stderr)
    with Workers(model, arguments.processes) as workers, console.status("measuring") as status:
        runner = Runner(workers, recordings, arguments.chunk_ms, lambda name: status.update(name))
        found = study(runner, criteria=criteria, points=arguments.points, noise=noise)
    where = environment(device)
    values = {"bench": "depth", "model": model.name, **found.values, "environment": where}
    sections = [found.values[name] for name in ("comparisons", "budgets", "snr")]
    values["holds"] = all(holds for section in sections for holds in section.get("bars", {}).values())
    page = markdown(values, caption_of(where))
    if arguments.out:
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "depth.md").write_text(page, encoding="utf-8")
        (folder / "depth.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        if arguments.plot:
            plot(found, model.config.exit_layers, folder / "depth.png")
    print(json.dumps(values) if arguments.json else page)
    return 0 if values["holds"] else 1


def _fills(arguments: argparse.Namespace) -> int:
    import json
    import sys

    from rich.console import Console

    from asr_exit.calibration.workers import Recording, Workers
    from asr_exit.tokenizer import normalise
    from service.bench.depth import Runner
    from service.bench.depth_report import table
    from service.bench.environment import caption_of, environment
    from service.bench.fills import compare_fills
    from service.cli.options import load_model
    from service.cli.recordings import spread_recordings

    recordings = [Recording(item.path, normalise(item.text)) for item in spread_recordings(arguments)]
    model, device = load_model(arguments)
    console = Console(file=sys.stderr)
    with Workers(model, arguments.processes) as workers, console.status("measuring") as status:
        runner = Runner(workers, recordings, arguments.chunk_ms, lambda name: status.update(name))
        rows = compare_fills(runner)
    where = environment(device)
    if arguments.json:
        print(json.dumps({"bench": "fills", "model": model.name, "rows": rows, "environment": where}))
        return 0
    cells = [(row["name"], f"{100 * row['wer']:.2f}", f"{100 * row['macs_fraction']:.1f}") for row in rows]
    print("\n".join(table(("setting", "WER %", "MACs spent, % of full depth"), cells)))
    print(f"\n{len(recordings)} recordings, chunks of {arguments.chunk_ms} ms. {caption_of(where)}")
    return 0


def _decide(arguments: argparse.Namespace) -> int:
    import dataclasses
    import json

    from asr_exit.config import require
    from service.bench.decide import DECIDE_BAR, measure_decision
    from service.bench.depth_report import table
    from service.bench.environment import caption_of, environment
    from service.bench.streams import sample_audio
    from service.cli.options import load_model

    require(arguments.batch >= 1, f"--batch {arguments.batch} must be at least 1")
    require(arguments.turns >= 1, f"--turns {arguments.turns} must be at least 1")
    model, device = load_model(arguments)
    rows = measure_decision(
        model, sample_audio(), batch=arguments.batch, chunk_ms=arguments.chunk_ms, turns=arguments.turns, device=device
    )
    where = environment(device)
    holds = all(row.share <= DECIDE_BAR for row in rows if row.judged)
    if arguments.json:
        shown = [dataclasses.asdict(row) for row in rows]
        head = {"bench": "decide", "holds": holds, "model": model.name, "batch": arguments.batch}
        print(json.dumps(head | {"rows": shown, "environment": where}))
        return 0 if holds else 1
    cells = [(row.criterion, f"{row.decide_ms:.3f}", f"{row.step_ms:.2f}", f"{100 * row.share:.2f}") for row in rows]
    print("\n".join(table(("criterion", "evidence and decision ms", "full-depth step ms", "share %"), cells)))
    verdict = "met" if holds else "NOT met"
    print(f"\nbatch {arguments.batch}; bar {100 * DECIDE_BAR:g} % for the model's default criterion: {verdict}")
    print(caption_of(where))
    return 0 if holds else 1
