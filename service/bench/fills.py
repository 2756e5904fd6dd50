"""What skipped layers get, compared on one model: word errors, and the MACs that were really spent.

The three fills run in the engine with the default policy. Others run here, as an offline pass with the serving mask in
which every frame says for itself how deep it goes:

* **perfect fill**: skipped layers hold what full depth would have left there, at the price of propagation. It cannot be
  had: its distance from `propagate` is what that fill costs in word errors.

* **feed-forward skip** (FFN-SkipLLM, arXiv 2404.03865): a chunk that the policy would let go still runs attention and
  convolution of all deeper layers, so caches stay whole, but none of their feed-forward halves; its text is the last
  exit's.
* **frame skip** (as DToP, arXiv 2308.01045, and blank skipping): frames that an exit calls blank with high confidence
  go no deeper, except `GUARD_FRAMES` around other labels; each frame's label is that of its own last exit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asr_exit.attention import FrameContext, additive, rotary, visible
from asr_exit.budget import Budget
from asr_exit.calibration.replay import Replay
from asr_exit.calibration.workers import Recording, samples_of
from asr_exit.checkpoint import Model
from asr_exit.ctc import BLANK
from asr_exit.evidence import ExitScores, collapse, score, with_beam_share
from asr_exit.features import log_mel
from asr_exit.metrics import word_errors
from asr_exit.policy import Criterion, ExitPolicy, Full
from asr_exit.stream import Fill
from service.bench.depth import Runner
from service.bench.paired import Point

GUARD_FRAMES = 1
BLANK_CONFIDENCES = (0.9, 0.99, 0.999)
CAP_CHUNKS = 4
Decide = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Skipped(Enum):
    """What the deeper layers do for frames that dropped out, and where those are read."""

    PROPAGATED = "filled by propagation; read where they dropped out"
    MIXED = "attention and convolution, no feed-forward halves; read at the last exit"
    WHOLE = "everything, at the price of propagation; read where they dropped out"


def compare_fills(runner: Runner) -> list[dict[str, Any]]:
    """Rows of name, wer and macs_fraction."""
    policy = runner.policy("auto")
    points = [runner.point("full depth", Full())]
    points += [runner.point(f"{fill}, default policy", policy, fill=fill) for fill in Fill]
    capped = f"catch_up, backlog at most {CAP_CHUNKS} chunks"
    points.append(runner.point(capped, policy, fill=Fill.CATCH_UP, catch_up_cap_chunks=CAP_CHUNKS))
    half = Budget(mean_depth=0.5)
    points.append(runner.point("catch_up, budget 0.5 (backlog given up)", policy, fill=Fill.CATCH_UP, budget=half))
    chunk_ms = runner.options.chunk_ms
    points.append(_offline(runner, "perfect fill, default policy", chunk_ms, policy, Skipped.WHOLE))
    points.append(_offline(runner, "feed-forward skip, default policy", chunk_ms, policy, Skipped.MIXED))
    for p in BLANK_CONFIDENCES:
        points.append(_offline(runner, f"frame skip, blank >= {p:g}", chunk_ms, p, Skipped.PROPAGATED))
    return [{"name": point.name, "wer": point.wer, "macs_fraction": point.cost} for point in points]


def _offline(runner: Runner, name: str, chunk_ms: float, leave: ExitPolicy | float, skipped: Skipped) -> Point:
    """`leave`: when chunks do, or the confidence in a blank at which frames do."""
    return Point.of(name, runner.workers.map(_run_all, runner.recordings, chunk_ms, leave, skipped))


def _run_all(
    model: Model, recordings: Sequence[Recording], chunk_ms: float, leave: ExitPolicy | float, skipped: Skipped
) -> list[Replay]:
    return [_run(model, recording, chunk_ms, leave, skipped) for recording in recordings]


@torch.inference_mode()
def _run(model: Model, recording: Recording, chunk_ms: float, leave: ExitPolicy | float, skipped: Skipped) -> Replay:
    features = torch.from_numpy(log_mel(samples_of(recording.path), model.config.features))[None]
    if features.shape[1] == 0:
        return Replay(errors=word_errors(recording.text, ""))
    chunk_frames = model.config.chunk_frames(chunk_ms)
    decide: Decide
    if isinstance(leave, float):
        decide = lambda k, logits, before, after: _sure_blanks(logits, leave, after.shape[1])  # noqa: E731
    else:
        decide = _ChunkDecisions(leave, chunk_frames)
    ids, macs = masked_forward(model, features, chunk_frames, decide, skipped)
    text = model.tokenizer.decode(collapse(ids).tolist())
    return Replay(
        text=text,
        errors=word_errors(recording.text, text),
        macs=macs,
        full_macs=model.macs.full(len(ids) // model.config.labels_per_frame),
    )


def _sure_blanks(logits: Tensor, confidence: float, frames: int) -> Tensor:
    """(1, L, V) -> (T,) bool: only blanks, for sure, and no other label near."""
    top, ids = logits[0].softmax(dim=-1).max(dim=-1)
    spoken = (ids != BLANK).float()[None, None]
    near = torch.nn.functional.max_pool1d(spoken, 2 * GUARD_FRAMES + 1, stride=1, padding=GUARD_FRAMES)[0, 0] > 0
    return ((ids == BLANK) & (top >= confidence) & ~near).view(frames, -1).all(dim=1)


class _ChunkDecisions:
    """An exit policy's decisions, chunk by chunk, as a mask over frames."""

    def __init__(self, policy: ExitPolicy, chunk_frames: int) -> None:
        self._policy, self._chunk_frames = policy, chunk_frames
        self._beams = policy.beams if isinstance(policy, Criterion) else 0
        self._previous: list[ExitScores | None] = []

    def __call__(self, exit_index: int, logits: Tensor, before: Tensor, after: Tensor) -> Tensor:
        stops, current = [], list[ExitScores | None]()
        labels = self._chunk_frames * (logits.shape[1] // after.shape[1])
        parts = [
            x.split(size, dim=1) for x, size in ((logits, labels), *((x, self._chunk_frames) for x in (before, after)))
        ]
        for chunk, (scores, low, high) in enumerate(zip(*parts, strict=True)):
            earlier = self._previous[chunk] if self._previous else None
            found = score(scores, low, high, [earlier], want_log_probs=self._beams > 0)[0]
            if self._beams:
                found = with_beam_share(found, self._beams)
            current.append(found)
            stops += [self._policy.stop(exit_index, found.evidence)] * low.shape[1]
        self._previous = current
        return torch.tensor(stops)


def masked_forward(
    model: Model, features: Tensor, chunk_frames: int, decide: Decide, skipped: Skipped
) -> tuple[np.ndarray, int]:
    """An offline pass in which frames drop out: (L,) labels and the MACs spent.

    Args:
        features: (1, F, num_mels) log-mel. decide: (exit index, logits (1, L, V), states before and after (1, T, D)) ->
            (T,) bool, frames that go no deeper.
    """
    encoder, config, costs = model.encoder, model.config, model.macs
    factor = config.subsampling
    padded = torch.nn.functional.pad(encoder.normalise(features), (0, 0, 0, -features.shape[1] % factor))
    x, _ = encoder.subsampling(padded)
    frames = x.shape[1]
    positions = torch.arange(frames)[None]
    mask = additive(visible(positions, positions, chunk_frames, config.left_context_frames), x.dtype)
    cos, sin = rotary(positions, config.d_model // config.num_heads, x.dtype)
    context = FrameContext(cos, sin, mask, chunk_frames, torch.ones(1, frames, 1))
    going = torch.ones(frames, dtype=torch.bool)
    labels = torch.zeros(frames * config.labels_per_frame, dtype=torch.int64)
    macs = float(costs.stem(frames))
    skipped_ff = 4 * config.d_model * config.ff_dim * config.exit_every  # both halves, up and down, per frame
    for index, segment in enumerate(encoder.segments):
        expands = going | torch.tensor(skipped is Skipped.WHOLE)
        mixes = expands | torch.tensor(skipped is Skipped.MIXED)
        gate, mixing = (kept.to(x.dtype)[None, :, None] for kept in (expands, mixes))
        before = x
        for layer in segment.layers:
            x = x + 0.5 * gate * layer.ff_in(x)
            x = x + mixing * layer.attention(layer.attention_norm(x), context, None)
            x = x + mixing * layer.conv(layer.conv.gated(layer.conv_norm(x)), None, chunk_frames)
            x = x + 0.5 * gate * layer.ff_out(x)
        logits = segment.head(x)
        read = (mixes if skipped is Skipped.MIXED else going).repeat_interleave(config.labels_per_frame)
        labels = torch.where(read, logits[0].argmax(dim=-1), labels)
        count, left = int(going.sum()), int((~going).sum())
        macs += costs.segment(index, count, with_head=True)
        if left:
            mixed_macs = costs.segment(index, left, True) - left * skipped_ff
            macs += mixed_macs if skipped is Skipped.MIXED else costs.propagate(left)
        if segment.feedback is not None:
            x = x + mixing * segment.fed_back(logits)
        if not segment.last:
            x = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)
            x = x if segment.gain is None else x * segment.gain
        if index < config.num_exits - 1:
            going = going & ~decide(index, logits, before, x)
    return labels.numpy(), round(macs)
