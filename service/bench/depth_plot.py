"""The depth study as one picture. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr_exit.calibration.workers import samples_of
from asr_exit.errors import ConfigError

if TYPE_CHECKING:
    from service.bench.depth import DepthStudy

SHOWN_SECONDS = 12.0
MARKERS = "osv^<>Dphx*"


def plot(found: DepthStudy, exit_layers: Sequence[int], path: Path) -> None:
    """Word errors over cost, depth over noise, and depth over time of one recording under its waveform and words.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'asr-exit[plot]', or leave out --plot") from None
    figure = Figure(figsize=(11, 9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 3, height_ratios=(3, 1, 1))
    noisy = bool(found.values["snr"])
    _trade(figure.add_subplot(grid[0, :2] if noisy else grid[0, :]), found)
    if noisy:
        _noise(figure.add_subplot(grid[0, 2]), found.values["snr"])
    wave = figure.add_subplot(grid[1, :])
    _example(wave, figure.add_subplot(grid[2, :], sharex=wave), found, exit_layers)
    figure.savefig(path, dpi=110)


def _trade(axes: Any, found: DepthStudy) -> None:
    static = sorted(found.static, key=lambda point: point.cost)
    axes.plot(*_line(static), "k-o", label="static exits", linewidth=2, markersize=5)
    for marker, (label, curve) in zip(MARKERS * 2, found.curves.items(), strict=False):
        axes.plot(*_line(curve), marker=marker, label=label, linewidth=1, markersize=4)
    axes.plot(*_line(found.random), "--", color="grey", label="random")
    axes.scatter(*_line(found.oracles), marker="*", s=120, color="gold", edgecolor="black", label="oracle", zorder=3)
    if found.default is not None:
        axes.scatter(*_line([found.default]), marker="X", s=90, color="red", label="default", zorder=3)
    shown = [point.wer for point in (*static[1:], *found.oracles, *([found.default] if found.default else []))]
    spread = max(shown) - min(shown)
    axes.set_ylim(100 * (min(shown) - 0.1 * spread), 100 * (max(shown) + 0.4 * spread))
    axes.set_xlabel("encoder MACs, % of full depth")
    axes.set_ylabel("word error rate, %")
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.3)


def _line(points: Sequence[Any]) -> tuple[list[float], list[float]]:
    return [100 * point.cost for point in points], [100 * point.wer for point in points]


def _noise(axes: Any, snr: dict[str, Any]) -> None:
    rows = snr["rows"]
    names = ["clean" if row["snr_db"] is None else f"{row['snr_db']:g}" for row in rows]
    axes.plot(names, [row["mean_exit_layer"] for row in rows], "o-")
    axes.set_xlabel("signal-to-noise ratio, dB")
    axes.set_ylabel("mean exit layer of the default policy")
    axes.grid(alpha=0.3)


def _example(wave: Any, depth: Any, found: DepthStudy, exit_layers: Sequence[int]) -> None:
    if found.example is None:
        return
    recording, result = found.example
    samples = samples_of(recording.path)
    rate = 16_000
    until = min(SHOWN_SECONDS, len(samples) / rate)
    step = 40
    shown = samples[: int(until * rate) : step]
    wave.plot([index * step / rate for index in range(len(shown))], shown, linewidth=0.4, color="steelblue")
    wave.set_yticks([])
    top = float(abs(shown).max()) or 1.0
    for index, (word, start, end) in enumerate(result.words):
        if end <= until:
            wave.text((start + end) / 2, top * (1.15 + 0.3 * (index % 2)), word, fontsize=7, ha="center")
    wave.set_ylim(-top, 1.8 * top)
    begin = 0.0
    for seconds, exit_index in zip(result.chunk_seconds, result.exits, strict=True):
        depth.bar(begin, exit_layers[exit_index], seconds, align="edge", color="darkorange", edgecolor="white")
        begin += seconds
    depth.set_xlim(0, until)
    depth.set_ylim(0, exit_layers[-1])
    depth.set_yticks(exit_layers)
    depth.set_ylabel("exit layer")
    depth.set_xlabel("seconds")
