"""What each exit costs in time: median step, real-time factor, streams per core, and time against arithmetic.

Time is compared with multiply-accumulates (MACs) twice: for the encoder, whose arithmetic the MACs count, and for the
whole step, which adds what every exit pays alike (log-mel features above all, captions, Python).

Every exit runs the policy `exit:LAYER` over the same audio through its own engine, push and step both timed. The exits
take turns, one chunk each, in one process and thread: a ratio is taken within a turn, where both sides met the same
machine, and the median over the turns is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch

from asr_exit.checkpoint import Model
from asr_exit.engine import Engine
from asr_exit.policy import Fixed
from asr_exit.stream import Stream, StreamOptions
from asr_exit.torch_backend import TorchBackend
from service.bench.streams import looped

WARM_UP_TURNS = 3
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}


@dataclass
class _Lane:
    """One exit and its streams."""

    engine: Engine
    streams: list[Stream]
    fed_samples: int = 0
    seconds: list[float] = field(default_factory=list)  # per turn
    encoder_seconds: list[float] = field(default_factory=list)  # per turn, of `seconds`


@dataclass(frozen=True)
class SpeedRow:
    """One exit at one batch size. Times are medians; shares and ratios are fractions."""

    batch: int
    exit_layer: int
    step_ms: float
    real_time_factor: float  # of one stream's audio: step time over chunk length
    streams_per_core: float  # real-time streams that one thread keeps up with
    step_ratio: float  # step time over that of full depth
    encoder_ratio: float  # the same of the encoder alone
    macs_ratio: float  # multiply-accumulates over those of full depth
    outside_share: float  # of the step: features, evidence, captions, Python
    features_share: float  # of the step: log-mel features
    encoder_gmacs_per_second: float  # billions of multiply-accumulates a second inside the encoder
    matrix_share: float  # of the rate of a large matrix product in the same turn, for the speed of a machine changes

    @property
    def encoder_deviation(self) -> float:
        """How much more encoder time than arithmetic, both relative to full depth."""
        return self.encoder_ratio / self.macs_ratio - 1

    @property
    def step_deviation(self) -> float:
        """The same of the whole step."""
        return self.step_ratio / self.macs_ratio - 1


def measure_speed(
    model: Model,
    samples: np.ndarray,
    *,
    batches: Sequence[int],
    chunk_ms: float,
    seconds: float,
    device: str = "cpu",
    clock: str = "wall",
    on_turn: Callable[[], None] = lambda: None,
) -> list[SpeedRow]:
    """Time every exit at every batch size.

    Args:
        samples: (N,) float32 audio, repeated endlessly; each stream starts elsewhere in it.
        seconds: audio per stream. clock: "wall", or "cpu" = time that this thread ran, for machines that are not idle.
        on_turn: called after every turn; there are `turns_of(seconds, chunk_ms)` for each batch size.
    """
    rows = []
    for batch in batches:
        rows += _measure_batch(
            model, samples, batch, chunk_ms, turns_of(seconds, chunk_ms), device, CLOCKS[clock], on_turn
        )
    return rows


def turns_of(seconds: float, chunk_ms: float) -> int:
    """How many chunks `seconds` of audio make, at least 5."""
    return max(5, round(1000 * seconds / chunk_ms))


def _measure_batch(
    model: Model,
    samples: np.ndarray,
    batch: int,
    chunk_ms: float,
    turns: int,
    device: str,
    clock: Callable[[], float],
    on_turn: Callable[[], None],
) -> list[SpeedRow]:
    config = model.config
    layers = config.exit_layers
    lanes = [_open_lane(model, batch, chunk_ms, layer, device) for layer in layers]
    with _encoder_clock(lanes, device, clock) as encoder_seconds:
        chunk_samples = config.chunk_frames(chunk_ms) * config.samples_per_frame
        overlap = config.features.window_samples - config.features.hop_samples
        features_seconds, matrix_rates = [], []
        dtype = model.encoder.subsampling.out.weight.dtype
        for turn in range(-WARM_UP_TURNS, turns):
            for place in range(len(lanes)):
                lane = lanes[(place + turn) % len(lanes)]  # nobody always comes first
                parts = _parts(samples, lane, chunk_samples)
                encoder_seconds[0] = 0.0
                begin = clock()
                for stream, part in zip(lane.streams, parts, strict=True):
                    lane.engine.push(stream, part)
                output = lane.engine.step()
                spent = clock() - begin
                if output.failures:
                    raise output.failures[0][1]
                if turn >= 0:
                    lane.seconds.append(spent)
                    lane.encoder_seconds.append(encoder_seconds[0])
            padded = [np.pad(part, (overlap, 0)) for part in parts]
            begin = clock()
            lane.engine.backend.log_mel(padded)
            features_seconds.append(clock() - begin)
            if turn >= 0:
                matrix_rates.append(matrix_rate(dtype, device, clock, repeats=3))
            on_turn()
    frames = config.chunk_frames(chunk_ms)
    full_macs, full = model.macs.full(frames), lanes[-1]
    return [
        _row(
            lane,
            full,
            batch,
            layer,
            chunk_ms,
            model.macs.to_exit(index, frames),
            full_macs,
            median(features_seconds),
            matrix_rates,
        )
        for index, (layer, lane) in enumerate(zip(layers, lanes, strict=True))
    ]


@torch.inference_mode()
def matrix_rate(
    dtype: torch.dtype,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    repeats: int = 12,
    size: int = 1024,
) -> float:
    """Billions of multiply-accumulates a second in a large matrix product: what the encoder is measured against."""
    left = torch.randn(size, size).to(device, dtype)
    seconds = []
    for _ in range(repeats):
        begin = clock()
        (left @ left)[0, 0].item()
        seconds.append(clock() - begin)
    return size**3 / min(seconds[2:]) / 1e9


def _open_lane(model: Model, batch: int, chunk_ms: float, layer: int, device: str) -> _Lane:
    engine = Engine(model, slots=batch, device=device)
    options = StreamOptions(chunk_ms=chunk_ms, policy=Fixed(layer, model.config.exit_every))
    return _Lane(engine, [engine.open(options) for _ in range(batch)])


def _parts(samples: np.ndarray, lane: _Lane, length: int) -> list[np.ndarray]:
    """The next chunk of each stream; neighbours are spread over the recording."""
    shift = len(samples) // len(lane.streams)
    parts = [looped(samples, lane.fed_samples + index * shift, length) for index in range(len(lane.streams))]
    lane.fed_samples += length
    return parts


def _row(
    lane: _Lane,
    full: _Lane,
    batch: int,
    layer: int,
    chunk_ms: float,
    macs: int,
    full_macs: int,
    features_seconds: float,
    matrix_rates: Sequence[float],
) -> SpeedRow:
    step = median(lane.seconds)
    outside = [1 - inside / whole for inside, whole in zip(lane.encoder_seconds, lane.seconds, strict=True)]
    return SpeedRow(
        batch=batch,
        exit_layer=layer,
        step_ms=1000 * step,
        real_time_factor=1000 * step / chunk_ms,
        streams_per_core=batch * chunk_ms / (1000 * step),
        step_ratio=_paired(lane.seconds, full.seconds),
        encoder_ratio=_paired(lane.encoder_seconds, full.encoder_seconds),
        macs_ratio=macs / full_macs,
        outside_share=median(outside),
        features_share=features_seconds / step,
        encoder_gmacs_per_second=batch * macs / median(lane.encoder_seconds) / 1e9,
        matrix_share=median(
            batch * macs / seconds / 1e9 / rate
            for seconds, rate in zip(lane.encoder_seconds, matrix_rates, strict=True)
        ),
    )


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return median(a / b for a, b in zip(ours, theirs, strict=True))


@contextmanager
def _encoder_clock(lanes: Sequence[_Lane], device: str, clock: Callable[[], float]) -> Iterator[list[float]]:
    """Adds up, in the list's only element, the time spent inside the encoder's parts."""
    total, begun = [0.0], [0.0]

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return clock()

    def enter(*_: Any) -> None:
        begun[0] = now()

    def leave(*_: Any) -> None:
        total[0] += now() - begun[0]

    backends = [lane.engine.backend for lane in lanes]
    parts: set[torch.nn.Module] = set()  # several engines share most of them
    for backend in backends:
        assert isinstance(backend, TorchBackend), "engines are made for a model in torch"
        parts.update((backend.subsampling, *backend.encoder.segments))
    handles = []
    for part in parts:
        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()
