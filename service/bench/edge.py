"""The device path against the torch path: time and latency of every exit, memory, bytes, and what it writes.

Time: every exit of both runtimes transcribes the same audio in one process and thread, a few chunks each in turn, so
that a ratio is taken within a turn, where both sides met the same machine. The first chunk of a lane's turn meets the
caches that another lane filled, and is not counted. Memory and bytes: one fresh process per setting.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from asr_exit.backend import StreamingModel
from asr_exit.budget import Budget
from asr_exit.checkpoint import Model
from asr_exit.edge import EdgeModel
from asr_exit.engine import Engine
from asr_exit.metrics import WordErrors, word_errors
from asr_exit.policy import Fixed, Full, parse_policy
from asr_exit.stream import Fill, Stream, StreamOptions
from asr_exit.transcript import transcribe
from service.bench.probe import Probe
from service.bench.speed import CLOCKS, WARM_UP_TURNS
from service.bench.streams import looped

SPEED_BAR = 0.5  # int8 at full depth: share of torch's time
DEVIATION_BAR = 0.15  # time of an exit over its share of the operations
RSS_BAR_MB, ABOVE_BARE_BAR_MB = 150.0, 60.0
BUDGET_BAR = 0.10
LOG_PROB_BAR = 1e-4  # fp32
WER_BAR = 0.01  # int8, relative
CHILD_TIMEOUT_S = 1800
BURST = 4  # chunks of one lane in a row; the first is not counted


@dataclass
class _Lane:
    """One runtime at one exit."""

    runtime: str
    exit_layer: int
    macs_ratio: float
    engine: Engine
    probe: Probe
    stream: Stream
    fed: int = 0
    seconds: list[float] = field(default_factory=list)  # per turn, mean of a chunk's push and step
    encoder: list[float] = field(default_factory=list)  # of it, in the backend


@dataclass(frozen=True)
class ExitRow:
    """One runtime at one exit; ratios are fractions of the same runtime at full depth."""

    runtime: str
    exit_layer: int
    step_ms: float  # median
    step_ms_p95: float
    real_time_factor: float
    over_torch: float  # step time over torch's at the same exit, median of the turns
    macs_ratio: float
    encoder_ratio: float
    step_ratio: float

    @property
    def encoder_deviation(self) -> float:
        """Encoder time over operations, both relative to full depth, minus one."""
        return self.encoder_ratio / self.macs_ratio - 1


def measure_exits(
    models: dict[str, StreamingModel],
    samples: np.ndarray,
    *,
    chunk_ms: float,
    turns: int,
    clock: str = "wall",
    on_turn: Callable[[], None] = lambda: None,
) -> list[ExitRow]:
    """Time every exit of every model ("torch" first) for `turns` chunks of (N,) float32 samples, repeated endlessly."""
    now = CLOCKS[clock]
    lanes = [
        _lane(name, model, index, chunk_ms, now)
        for name, model in models.items()
        for index in range(model.config.num_exits)
    ]
    config = lanes[0].engine.config
    size = config.chunk_frames(chunk_ms) * config.samples_per_frame
    for turn in range(-WARM_UP_TURNS, bursts(turns)):
        for place in range(len(lanes)):
            lane = lanes[(place + turn) % len(lanes)]  # nobody always comes first
            spent, encoder = zip(*(_chunk(lane, samples, size, now) for _ in range(BURST)), strict=True)
            if turn >= 0:
                lane.seconds.append(fmean(spent[1:]))
                lane.encoder.append(fmean(encoder[1:]))
        on_turn()
    full = {lane.runtime: lane for lane in lanes}  # the last of each runtime is the deepest
    torch = {lane.exit_layer: lane for lane in lanes if lane.runtime == lanes[0].runtime}
    return [
        ExitRow(
            runtime=lane.runtime,
            exit_layer=lane.exit_layer,
            step_ms=1000 * median(lane.seconds),
            step_ms_p95=1000 * float(np.quantile(lane.seconds, 0.95)),
            real_time_factor=1000 * median(lane.seconds) / chunk_ms,
            over_torch=_paired(lane.seconds, torch[lane.exit_layer].seconds),
            macs_ratio=lane.macs_ratio,
            encoder_ratio=_paired(lane.encoder, full[lane.runtime].encoder),
            step_ratio=_paired(lane.seconds, full[lane.runtime].seconds),
        )
        for lane in lanes
    ]


def bursts(turns: int) -> int:
    """Turns of `BURST` chunks that cover `turns` chunks."""
    return -(-turns // BURST)


def _chunk(lane: _Lane, samples: np.ndarray, size: int, now: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a lane's next chunk, and those of them in the backend."""
    part = looped(samples, lane.fed, size)
    lane.fed += size
    lane.probe.seconds, begin = 0.0, now()
    lane.engine.push(lane.stream, part)
    output = lane.engine.step()
    spent = now() - begin
    if output.failures:
        raise output.failures[0][1]
    return spent, lane.probe.seconds


def _lane(name: str, model: StreamingModel, index: int, chunk_ms: float, clock: Callable[[], float]) -> _Lane:
    engine, config = Engine(model, slots=1), model.config
    probe = Probe(engine.backend, clock=clock)
    engine.backend = probe
    layer, frames = config.exit_layers[index], config.chunk_frames(chunk_ms)
    stream = engine.open(StreamOptions(chunk_ms=chunk_ms, policy=Fixed(layer, config.exit_every)))
    ratio = model.macs.to_exit(index, frames) / model.macs.full(frames)
    return _Lane(name, layer, ratio, engine, probe, stream)


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def in_own_process(
    folder: Path, samples: np.ndarray, *, policy: str, budget: str, fill: str, chunk_ms: float
) -> dict[str, Any]:
    """What `service.bench.edge_child` prints about one stream of (N,) float32 samples.

    Raises:
        subprocess.CalledProcessError: it failed; its error is on standard error.
    """
    with tempfile.TemporaryDirectory() as scratch:
        audio = Path(scratch) / "audio.npy"
        np.save(audio, samples)
        command = [sys.executable, "-m", "service.bench.edge_child", str(folder), str(audio), policy, budget, fill]
        done = subprocess.run(
            [*command, str(chunk_ms)], stdout=subprocess.PIPE, check=True, text=True, timeout=CHILD_TIMEOUT_S
        )
    values: dict[str, Any] = json.loads(done.stdout)
    return values


@dataclass(frozen=True)
class TextReport:
    """Both runtimes over the same recordings."""

    recordings: int
    audio_seconds: float
    max_error_by_exit: list[float]  # of log-posteriors, over all frames and labels
    differences: list[tuple[int, str, str]]  # place in the order given, torch's text, the device's
    torch_wer: float  # full depth
    edge_wer: float
    torch_budget_wer: float
    edge_budget_wer: float
    torch_budget_spent: float  # share of full depth
    edge_budget_spent: float

    @property
    def max_error(self) -> float:
        return max(self.max_error_by_exit)


def compare_texts(
    model: Model,
    edge: EdgeModel,
    recordings: Iterable[tuple[np.ndarray, str]],
    *,
    chunk_ms: float,
    mean_depth: float,
    policy: str,
    on_done: Callable[[], None] = lambda: None,
) -> TextReport:
    """Stream (samples, reference) pairs through both: once at full depth, where every exit's log-posteriors are
    compared, and once with `policy` at the budget `mean_depth`."""
    engines = Engine(model, slots=1), Engine(edge, slots=1)
    probes = [Probe(engine.backend, keep_log_probs=True) for engine in engines]
    plain = [engine.backend for engine in engines]
    full = StreamOptions(chunk_ms=chunk_ms, policy=Full())
    granted = [
        StreamOptions(
            chunk_ms=chunk_ms,
            policy=parse_policy(policy, exit_layers=model.config.exit_layers, calibration=each.calibration),
            budget=Budget(mean_depth=mean_depth),
            fill=Fill.PROPAGATE,
        )
        for each in (model, edge)
    ]
    errors, differences = np.zeros(model.config.num_exits), []
    totals = [WordErrors(0, 0, 0, 0) for _ in range(4)]
    spent, whole, seconds, count = [0, 0], 0, 0.0, 0
    for index, (samples, reference) in enumerate(recordings):
        texts = []
        for side, engine in enumerate(engines):
            engine.backend = probes[side]
            probes[side].log_probs.clear()
            texts.append(transcribe(engine, samples, full).text)
            totals[side] += word_errors(reference, texts[side])
            engine.backend = plain[side]
            cheap = transcribe(engine, samples, granted[side])
            totals[2 + side] += word_errors(reference, cheap.text)
            spent[side] += cheap.encoder_macs
        whole += cheap.full_macs
        for segment, parts in probes[0].log_probs.items():
            ours, theirs = np.concatenate(probes[1].log_probs[segment]), np.concatenate(parts)
            errors[segment] = max(errors[segment], float(np.abs(ours - theirs).max(initial=0.0)))
        if texts[0] != texts[1]:
            differences.append((index, texts[0], texts[1]))
        seconds += len(samples) / model.config.features.sample_rate_hertz
        count += 1
        on_done()
    rates = [total.rate for total in totals]
    shares = [each / max(1, whole) for each in spent]
    return TextReport(count, seconds, errors.tolist(), differences, *rates, *shares)
