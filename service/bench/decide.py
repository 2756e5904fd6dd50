"""What deciding costs: evidence at every exit but the last, and the policy's answer, against a full-depth step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import torch

from asr_exit.checkpoint import Model
from asr_exit.engine import Engine
from asr_exit.evidence import ExitScores, score, with_beam_share
from asr_exit.policies.learned import FEATURES, ExitWeights, Learned
from asr_exit.policy import CRITERIA, Criterion, Full, default_criterion, stops
from asr_exit.stream import StreamOptions
from service.bench.streams import looped

DECIDE_BAR = 0.03
WARM_UP_TURNS = 3


@dataclass(frozen=True)
class DecisionRow:
    """One criterion. Times are medians over turns."""

    criterion: str
    decide_ms: float
    step_ms: float
    share: float
    judged: bool  # the bar is for the model's default criterion


def measure_decision(
    model: Model, samples: np.ndarray, *, batch: int, chunk_ms: float, turns: int, device: str = "cpu"
) -> list[DecisionRow]:
    """Time every criterion on the states of random audio frames; criteria and full-depth steps take turns.

    Args:
        samples: (N,) float32 audio, repeated endlessly; each stream starts elsewhere in it.
    """
    clock = time.perf_counter if device.startswith("cuda") else time.thread_time
    config = model.config
    frames = config.chunk_frames(chunk_ms)
    engine = Engine(model, slots=batch, device=device)
    streams = [engine.open(StreamOptions(chunk_ms=chunk_ms, policy=Full())) for _ in range(batch)]
    generator = torch.Generator().manual_seed(0)
    labels = frames * config.labels_per_frame
    logits = 4 * torch.randn(batch, labels, config.vocab_size, generator=generator).to(device)
    hidden = torch.randn(2, batch, frames, config.d_model, generator=generator).to(device)
    policies = [_never(label, config.num_exits) for label in CRITERIA]
    length = frames * config.samples_per_frame
    steps: list[float] = []
    decisions: dict[str, list[float]] = {policy.label: [] for policy in policies}
    for turn in range(-WARM_UP_TURNS, turns):
        for index, stream in enumerate(streams):
            start = (turn + WARM_UP_TURNS) * length + index * (len(samples) // batch)
            engine.push(stream, looped(samples, start, length))
        times = [_timed(clock, engine.step)]
        times += [_timed(clock, partial(_decide, policy, logits, hidden, config.num_exits)) for policy in policies]
        if turn >= 0:
            steps.append(times[0])
            for policy, seconds in zip(policies, times[1:], strict=True):
                decisions[policy.label].append(seconds)
    step = median(steps)
    return [
        DecisionRow(
            criterion=policy.label,
            decide_ms=1000 * median(decisions[policy.label]),
            step_ms=1000 * step,
            share=median(decisions[policy.label]) / step,
            judged=policy.label == (default_criterion(model.calibration) or "posterior"),
        )
        for policy in policies
    ]


def _never(label: str, num_exits: int) -> Criterion:
    """A criterion that looks and never leaves."""
    kind = CRITERIA[label]
    threshold = 0.0 if kind.low_is_sure else kind.largest
    weights = ExitWeights(((0.1,) * (len(FEATURES) + 1),) * (num_exits - 1))
    return kind(threshold, weights=weights) if issubclass(kind, Learned) else kind(threshold)


@torch.inference_mode()
def _decide(policy: Criterion, logits: torch.Tensor, hidden: torch.Tensor, num_exits: int) -> None:
    previous: list[ExitScores | None] = [None] * len(logits)
    for exit_index in range(num_exits - 1):
        before = hidden[0] if policy.needs_similarity else None
        scores = score(logits, before, hidden[1], previous, want_log_probs=policy.beams > 0)
        if policy.beams:
            scores = [with_beam_share(item, policy.beams) for item in scores]
        stops(exit_index, [policy] * len(scores), [item.evidence for item in scores])
        previous = list(scores)


def _timed(clock: Callable[[], float], work: Callable[[], object]) -> float:
    begin = clock()
    work()
    return clock() - begin
