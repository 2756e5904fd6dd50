"""A small gate per exit, trained together with the encoder: the joint form of the gates that calibration trains.

After JEI-DNN (arXiv 2310.09163). Gate k sees statistics of exit k's posteriors and says with what probability d_k going
deeper would help, so that a chunk leaves at exit k with P_k = (1 - d_k) prod_{j<k} d_j. JEI-DNN minimises the expected
loss sum_k P_k (loss_k + price * cost_k), where each sample has a loss of its own. An utterance's CTC loss is no sum of
losses of chunks: its expectation over their exits has a term for each combination. What is minimised is a bound on it
from above, CTC of the scores sum_k P_k log p_k(label | frame), which are not normalised (Jensen: log-sum-exp over
alignments is convex), plus the price of the expected MACs. Where the gates have decided, the bound is the CTC loss of
what serving decodes. A mixture of probabilities would be bounded the other way: it rewards exits for being averaged,
and serving reads only one. JEI-DNN takes turns, gates on which exit would have been cheapest, exits weighted by P; here
one gradient has both. Exits keep their own CTC losses besides.

The states are those of full depth: what skipped layers see is left to batches with random depth.

Shapes: E exits, B batch, T encoder frames, L labels, C chunks, V vocabulary, F features
(`asr_exit.policies.learned.FEATURES`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr_exit.cost import SegmentMacs
from asr_exit.encoder import Encoder
from asr_exit.loss import ctc_loss
from asr_exit.policies.learned import FEATURES, FLOOR, LOGARITHMIC, OFFSET, SIGN, SOURCE
from asr_exit.policy import JointGate
from asr_exit.tokenizer import BLANK_ID

KEY = "gates"  # of the gates among a run's exported weights: (E - 1, F + 1) as in `ExitWeights.rows`
_CENTRE = np.where(LOGARITHMIC, -3.0, 0.5)  # about where a trained model's features lie: weights then move no bias
_PACE = 10.0  # AdamW moves a number by about the learning rate per update: gates move so many times faster
_SMALLEST_NORM = 1e-8


class JointGates(nn.Module):
    """Logistic regression per exit but the last, with its moving average. Draws no random numbers.

    All exits are equally likely at first, so that training begins as it does without gates.
    """

    averaged_weight: Tensor
    averaged_bias: Tensor
    costs: Tensor
    centre: Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        macs, exits = SegmentMacs.of(encoder), encoder.config.num_exits
        self.weight = nn.Parameter(torch.zeros(exits - 1, len(FEATURES)))
        self.bias = nn.Parameter(torch.log(torch.arange(exits - 1, 0, -1).float()) / _PACE)
        self.register_buffer("averaged_weight", self.weight.detach().clone())
        self.register_buffer("averaged_bias", self.bias.detach().clone())
        judged = torch.tensor([float(macs.judged_to_exit(k, 1)) for k in range(exits)])
        self.register_buffer("costs", judged / judged[-1], persistent=False)
        self.register_buffer("centre", torch.tensor(_CENTRE, dtype=torch.float32), persistent=False)
        self.spent = torch.zeros(())  # expected share of full-depth MACs at the last `loss`

    def forward(self, features: Tensor) -> Tensor:
        """(E - 1, B, C, F) -> (E - 1, B, C) log odds that going deeper would help."""
        seen = features.to(self.weight.dtype) - self.centre
        return _PACE * ((seen * self.weight[:, None, None]).sum(dim=-1) + self.bias[:, None, None])

    def loss(
        self,
        logits: Sequence[Tensor],
        states: Sequence[tuple[Tensor, Tensor]],
        lengths: Tensor,
        targets: Tensor,
        target_lengths: Tensor,
        *,
        chunk_frames: int,
        price: float,
    ) -> Tensor:
        """The bound on the expected CTC loss per target token, plus `price` times the expected share of MACs; scalar.

        The gradient of the first reaches the encoder through the posteriors and through the gates' features. That of
        the second reaches the gates only: an encoder must not save compute by looking surer than it is.

        Args:
            logits: (B, L, V) per exit. states: per exit (B, T, D) before and after its segment.
            lengths: (B,) valid labels. targets, target_lengths: as in `ctc_loss`.
        """
        log_probs = torch.stack([item.float().log_softmax(dim=-1) for item in logits])
        features = chunk_features(log_probs[:-1], states[:-1], lengths, chunk_frames)
        leaving = exit_log_probabilities(self(features))
        labels = chunk_frames * (log_probs.shape[2] // states[0][0].shape[1])  # of a chunk
        per_label = leaving.repeat_interleave(labels, dim=-1)[..., : log_probs.shape[2], None]
        scores = (per_label.exp() * log_probs).sum(dim=0)
        valid = torch.arange(scores.shape[1], device=lengths.device) < lengths[:, None]
        missing = (scores.logsumexp(dim=-1) * valid).sum() / target_lengths.sum().clamp(min=1)  # `ctc_loss` normalises
        starts = labels * torch.arange(leaving.shape[-1], device=lengths.device)
        frames = (lengths[:, None] - starts).clamp(0, labels)
        share = exit_log_probabilities(self(features.detach())).exp()
        spent = ((self.costs[:, None, None] * share).sum(dim=0) * frames).sum() / frames.sum()
        self.spent = spent.detach()
        return ctc_loss(scores, lengths, targets, target_lengths) - missing + price * spent

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """One step of the moving average."""
        self.averaged_weight.lerp_(self.weight, 1.0 - decay)
        self.averaged_bias.lerp_(self.bias, 1.0 - decay)

    def exported(self) -> dict[str, Tensor]:
        """The moving average as the policy reads it: one tensor (E - 1, F + 1), the bias last, under `KEY`."""
        weight, centre = self.averaged_weight.double(), self.centre.double()
        bias = self.averaged_bias.double() - weight @ centre
        return {KEY: (_PACE * torch.cat((weight, bias[:, None]), dim=1)).float()}


def chunk_features(
    log_probs: Tensor, states: Sequence[tuple[Tensor, Tensor]], lengths: Tensor, chunk_frames: int
) -> Tensor:
    """(E, B, L, V) log-posteriors -> (E, B, C, F) float64: `features` of the evidence that serving would have.

    Differentiable, but for `blank_mass`, `agreement` and which frames are blank, which have no gradient, and for
    `dissimilarity`, whose logarithm's grows without bound where a segment changes little: the gates read it as it is.
    Chunks without a valid frame hold numbers without meaning.

    Args:
        states: per exit (B, T, D) before and after its segment. lengths: (B,) valid labels.
    """
    per_frame = log_probs.shape[2] // states[0][0].shape[1]
    top, ids = log_probs.max(dim=-1)
    entropy = torch.linalg.vecdot(log_probs.exp(), log_probs) / -math.log(log_probs.shape[-1])
    similarity = torch.stack([_similarity(before.detach().float(), after.detach().float()) for before, after in states])
    similarity = similarity.repeat_interleave(per_frame, dim=-1)
    size = chunk_frames * per_frame
    padding = -log_probs.shape[2] % size

    def by_chunk(x: Tensor) -> Tensor:
        return F.pad(x, (0, padding)).unflatten(-1, (-1, size))

    valid = by_chunk(torch.arange(log_probs.shape[2], device=lengths.device) < lengths[:, None])
    labels = by_chunk(ids)
    spoken = valid & (labels != BLANK_ID)
    count = spoken.sum(dim=-1, keepdim=True)
    judged = _share(spoken | (valid & (count == 0)))
    every = _share(valid)
    posterior, entropies = by_chunk(top.exp().double()), by_chunk(entropy.double())
    numbers = torch.stack(
        [
            (posterior * judged).sum(dim=-1),
            (posterior * every).sum(dim=-1),
            (entropies * judged).sum(dim=-1),
            (entropies * every).sum(dim=-1),
            1.0 - (spoken * every).sum(dim=-1),
            _agreement(labels, spoken),
            (by_chunk(similarity.double()) * every).sum(dim=-1),
            torch.where(valid, posterior, 1.0).amin(dim=-1),
        ],
        dim=-1,
    )
    before = torch.cat((numbers[:1], numbers[:-1]))
    source, offset, sign, logarithmic = (
        torch.from_numpy(np.asarray(x)).to(numbers.device) for x in (SOURCE, OFFSET, SIGN, LOGARITHMIC)
    )
    values = offset + sign * torch.cat((numbers, before), dim=-1).index_select(-1, source)
    return torch.where(logarithmic, values.clamp(min=FLOOR).log(), values)


def exit_log_probabilities(deeper: Tensor) -> Tensor:
    """(E - 1, ...) log odds of going deeper at each exit -> (E, ...) log P(leave at exit k)."""
    leave, going_on = F.logsigmoid(-deeper), F.logsigmoid(deeper).cumsum(dim=0)
    sure = torch.zeros_like(deeper[:1])
    return torch.cat((leave, sure)) + torch.cat((sure, going_on))


def without_gates(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """A run's exported weights -> the encoder's, and the gates' rows where it trained any."""
    return {name: value for name, value in weights.items() if name != KEY}, weights.get(KEY)


def with_gates(calibration: Mapping[str, Any] | None, rows: Tensor | None) -> dict[str, Any]:
    """`calibration` with the gates' weights for every chunk length; thresholds that it has for other gates are dropped.

    Args:
        rows: (E - 1, F + 1) as exported, or None.
    """
    made = dict(calibration or {})
    if rows is None:
        return made
    made[JointGate.label] = {"weights": rows.double().tolist(), "features": list(FEATURES)}
    if "by_chunk_ms" in made:
        made["by_chunk_ms"] = {length: with_gates(part, rows) for length, part in made["by_chunk_ms"].items()}
    return made


def gates_of(calibration: Mapping[str, Any]) -> Tensor | None:
    """The inverse of `with_gates`: the rows stored in a model's calibration; None where there are none."""
    stored = calibration.get(JointGate.label)
    return torch.tensor(stored["weights"]) if isinstance(stored, Mapping) and "weights" in stored else None


def _similarity(before: Tensor, after: Tensor) -> Tensor:
    """(B, T, D) states -> (B, T) cosines."""
    norms = torch.linalg.vector_norm(before, dim=-1) * torch.linalg.vector_norm(after, dim=-1)
    return torch.linalg.vecdot(before, after) / norms.clamp(min=_SMALLEST_NORM)


def _share(mask: Tensor) -> Tensor:
    """(..., n) mask -> float64 weights that add up to one where anything is set."""
    return mask.double() / mask.sum(dim=-1, keepdim=True).clamp(min=1)


def _agreement(labels: Tensor, spoken: Tensor) -> Tensor:
    """(E, B, C, n) best labels -> (E, B, C) 1 where an exit's collapsed text is the one of the exit before, else 0."""
    kept = spoken.clone()
    kept[..., 1:] &= labels[..., 1:] != labels[..., :-1]
    order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    texts = torch.where(kept, labels, BLANK_ID).gather(-1, order)
    same = (texts[1:] == texts[:-1]).all(dim=-1).double()
    return torch.cat((torch.zeros_like(texts[:1, ..., 0], dtype=same.dtype), same))
