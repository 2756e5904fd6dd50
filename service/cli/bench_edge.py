"""`asr-exit bench edge`: the device path against the torch path."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.bench.edge import ExitRow, TextReport

HELP = "an exported model: speed, memory and text against the torch path"


def add_edge(kinds: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the subcommand and returns its parser."""
    from service.cli.recordings import add_recordings_options

    parser = kinds.add_parser("edge", help=HELP)
    parser.add_argument("--edge-model", required=True, metavar="DIR", help="what `asr-exit export` wrote")
    parser.add_argument("--seconds", type=float, default=60, metavar="N", help="audio per setting (default: 60)")
    parser.add_argument("--mean-depth", type=float, default=0.5, metavar="X", help="budget to compare (default: 0.5)")
    parser.add_argument("--policy", default="auto", metavar="P", help="with that budget (default: auto)")
    parser.add_argument("--rtf", default="least", metavar="X", help="budget of time to keep (default: the least)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="as in bench engine (default: wall)")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    add_recordings_options(parser, required=False)
    return parser


def run_edge(arguments: argparse.Namespace) -> int:
    """Prints tables or one JSON object; 1 when a bar is not met."""
    from dataclasses import asdict
    from pathlib import Path

    from asr_exit.audio import load_audio
    from asr_exit.budget import Budget
    from asr_exit.config import require
    from asr_exit.edge import EdgeModel
    from asr_exit.engine import Engine
    from asr_exit.stream import Fill, StreamOptions
    from asr_exit.tokenizer import normalise
    from service.bench import edge as bench
    from service.bench.speed import WARM_UP_TURNS, turns_of
    from service.bench.streams import looped, sample_audio
    from service.cli.bench import progress_bar
    from service.cli.options import load_model
    from service.cli.recordings import list_recordings

    require(arguments.seconds > 0, f"--seconds {arguments.seconds:g} must be more than 0")
    require(arguments.threads == 1, "the comparison is made on one core: leave --threads at 1")
    recordings = list_recordings(arguments) if arguments.manifest or arguments.librispeech else []
    folder, chunk_ms = Path(arguments.edge_model), arguments.chunk_ms
    device_model = EdgeModel(folder)
    granted = StreamOptions(chunk_ms=chunk_ms, budget=Budget(mean_depth=arguments.mean_depth), fill=Fill.PROPAGATE)
    Engine(device_model, slots=1).open(granted)  # an impossible budget is refused here, not after the timing
    model, _ = load_model(arguments)
    samples, turns = sample_audio(), turns_of(arguments.seconds, chunk_ms)
    with progress_bar("timing", bench.bursts(turns) + WARM_UP_TURNS) as advance:
        rows = bench.measure_exits(
            {"torch": model, "edge": device_model},
            samples,
            chunk_ms=chunk_ms,
            turns=turns,
            clock=arguments.clock,
            on_turn=advance,
        )
    audio = looped(samples, 0, round(arguments.seconds * model.config.features.sample_rate_hertz))
    first, depth = f"max_exit={model.config.exit_layers[0]}", f"{arguments.mean_depth:g}"
    time_budget = "least" if arguments.rtf == "least" else f"rtf={arguments.rtf}"
    settings = [("full", "", "propagate"), ("full", first, "hole"), (arguments.policy, depth, "propagate")]
    settings += [("full", time_budget, "propagate")]
    processes = []
    for policy, budget, fill in settings:
        found = bench.in_own_process(folder, audio, policy=policy, budget=budget, fill=fill, chunk_ms=chunk_ms)
        processes.append({"policy": policy, "setting": budget or "none", "fill": fill} | found)
    texts = None
    if recordings:
        with progress_bar("comparing", len(recordings)) as advance:
            texts = bench.compare_texts(
                model,
                device_model,
                ((load_audio(each.path), normalise(each.text)) for each in recordings),
                chunk_ms=chunk_ms,
                mean_depth=arguments.mean_depth,
                policy=arguments.policy,
                on_done=advance,
            )
    bars = _bars(rows, processes, texts, device_model.manifest.precision)
    values: dict[str, object] = {
        "precision": device_model.manifest.precision,
        "clock": arguments.clock,
        "model_bytes": sum(graph.bytes for graph in device_model.manifest.graphs),
        "calibrated_on": device_model.manifest.calibrated_on,
        "rows": [asdict(row) | {"encoder_deviation": row.encoder_deviation} for row in rows],
        "processes": processes,
        "texts": texts and asdict(texts),
        "bars": bars,
    }
    return _show(arguments, model.name, values, rows, processes, bars)


def _bars(
    rows: list[ExitRow], processes: list[dict[str, Any]], texts: TextReport | None, precision: str
) -> dict[str, dict[str, Any]]:
    """What must hold, by name: measured, bar, met."""
    from service.bench import edge as bench

    exact = precision == "fp32"
    device = [row for row in rows if row.runtime == "edge"]
    kept = processes[-1]
    peak = max(process["peak_rss_mb"] for process in processes)
    above = max(process["peak_rss_mb"] - process["bare_rss_mb"] for process in processes)
    measured: dict[str, tuple[float, float]] = {
        "exit time over its share of operations": (
            max(abs(row.encoder_deviation) for row in device),
            bench.DEVIATION_BAR,
        ),
        "peak memory of the process, MB": (peak, bench.RSS_BAR_MB),
        "of it above bare Python, numpy and ONNX Runtime, MB": (above, bench.ABOVE_BARE_BAR_MB),
        "real-time factor over its budget": (
            abs(kept["real_time_factor"] / kept["real_time_budget"] - 1),
            bench.BUDGET_BAR,
        ),
    }
    if not exact:
        measured["time at full depth over torch's"] = (device[-1].over_torch, bench.SPEED_BAR)
    if texts is not None and exact:
        measured["error of log-posteriors at any exit"] = (texts.max_error, bench.LOG_PROB_BAR)
        measured["texts that differ"] = (float(len(texts.differences)), 0.0)
    elif texts is not None:
        measured["word errors over torch's, full depth"] = (_over(texts.edge_wer, texts.torch_wer), bench.WER_BAR)
        measured["word errors over torch's, budget"] = (
            _over(texts.edge_budget_wer, texts.torch_budget_wer),
            bench.WER_BAR,
        )
    return {name: {"measured": value, "bar": bar, "met": value <= bar} for name, (value, bar) in measured.items()}


def _over(ours: float, theirs: float) -> float:
    """Relative increase."""
    return ours / theirs - 1 if theirs else ours


def _show(
    arguments: argparse.Namespace,
    name: str,
    values: dict[str, Any],
    rows: list[ExitRow],
    processes: list[dict[str, Any]],
    bars: dict[str, dict[str, Any]],
) -> int:
    from service.bench.environment import caption_of, environment

    where, holds = environment("cpu"), all(bar["met"] for bar in bars.values())
    if arguments.json:
        import json

        head = {"bench": "edge", "holds": holds, "model": name, "chunk_ms": arguments.chunk_ms}
        print(json.dumps(head | values | {"environment": where}))
        return 0 if holds else 1
    by_exit = [
        [
            row.runtime,
            str(row.exit_layer),
            f"{row.step_ms:.2f}",
            f"{row.step_ms_p95:.2f}",
            f"{row.real_time_factor:.4f}",
            f"{100 * row.over_torch:.0f}",
            f"{100 * row.macs_ratio:.1f}",
            f"{100 * row.encoder_ratio:.1f} ({100 * row.encoder_deviation:+.0f})",
            f"{100 * row.step_ratio:.1f}",
        ]
        for row in rows
    ]
    columns = ["runtime", "exit", "step ms", "p95", "RTF", "of torch %", "MACs %", "encoder time %", "step time %"]
    _table(f"one chunk of {arguments.chunk_ms} ms", columns, by_exit, arguments.markdown)
    by_process = [
        [
            f"{item['policy']}, budget {item['setting']}, {item['fill']}",
            f"{item['real_time_factor']:.4f}",
            f"{item['latency_ms_p50']:.1f} / {item['latency_ms_p95']:.1f}",
            f"{item['peak_rss_mb']:.1f}",
            f"{item['peak_rss_mb'] - item['bare_rss_mb']:.1f}",
            f"{item['bytes_read'] / 1e6:.1f}",
            f"{item['encoder_macs_per_second'] / 1e6:.1f}",
            f"{item['mean_exit_layer']:.1f}",
        ]
        for item in processes
    ]
    columns = ["a process", "RTF", "latency ms p50 / p95", "peak MB", "above bare", "read MB", "MMACs/s", "mean layer"]
    _table("one stream in a process of its own", columns, by_process, arguments.markdown)
    verdicts = [
        [what, f"{bar['measured']:.3g}", f"{bar['bar']:g}", "met" if bar["met"] else "NOT met"]
        for what, bar in bars.items()
    ]
    _table(
        f"{values['precision']}, {values['model_bytes'] / 1e6:.1f} MB",
        ["bar", "measured", "at most", ""],
        verdicts,
        arguments.markdown,
    )
    if values["texts"]:
        print(_text_line(values["texts"]))
    print(caption_of(where))
    return 0 if holds else 1


def _text_line(texts: dict[str, Any]) -> str:
    """The comparison of texts in one line; which texts differ is in --json."""
    return (
        f"{texts['recordings']} recordings, {texts['audio_seconds'] / 3600:.2f} h: WER % torch "
        f"{100 * texts['torch_wer']:.2f}, edge {100 * texts['edge_wer']:.2f}; with the budget "
        f"{100 * texts['torch_budget_wer']:.2f} (spent {100 * texts['torch_budget_spent']:.1f} % of full depth) and "
        f"{100 * texts['edge_budget_wer']:.2f} ({100 * texts['edge_budget_spent']:.1f} %); "
        f"{len(texts['differences'])} texts differ at full depth; largest errors of log-posteriors by exit: "
        + ", ".join(f"{error:.1e}" for error in texts["max_error_by_exit"])
    )


def _table(title: str, columns: list[str], cells: list[list[str]], markdown: bool) -> None:
    if markdown:
        rows = [columns, ["---", *["---:"] * (len(columns) - 1)], *cells]
        print(f"\n{title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    for row in cells:
        table.add_row(*row)
    Console(highlight=False).print(table)
