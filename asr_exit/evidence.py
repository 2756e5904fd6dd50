"""What an exit says about a chunk, computed on the device in one go and brought to the host in one transfer.

The host side needs no torch, because devices run it, too; `score` and `summarise` are called by torch code only.
Shapes: B streams, T frames, L labels, a whole number for each frame, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise, repeat
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from asr_exit.beam import PrefixBeamDecoder
from asr_exit.ctc import BLANK, FrameScores
from asr_exit.policy import Evidence

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Measure = Callable[[Tensor, Tensor | None, Tensor, bool], list[np.ndarray]]

AGREEMENT = 5  # its place in `Evidence.numbers`
NUM_COLUMNS = 6  # numbers per chunk that `summarise` leaves for `unpack`
UNJUDGED = Evidence(math.nan, math.nan, math.nan, math.nan, math.nan)  # stops no chunk


class ExitScores(NamedTuple):
    """One chunk's answer at one exit, on the host."""

    ids: np.ndarray  # (L,) as in `FrameScores`, like the next two
    max_log_prob: np.ndarray
    log_probs: np.ndarray | None
    evidence: Evidence
    text: bytes = b""  # its collapsed labels, for comparison; only where there is evidence

    @property
    def frames(self) -> FrameScores:
        """Made when asked for: most exits are only judged."""
        return FrameScores(self.ids, self.max_log_prob, self.log_probs)

    @property
    def known(self) -> ExitScores | None:
        """These scores, if there is evidence in them."""
        return None if self.evidence is UNJUDGED else self


def score(
    logits: Tensor,
    before: Tensor | None,
    after: Tensor,
    previous: Sequence[ExitScores | None],
    want_log_probs: bool,
    want_evidence: bool = True,
    frames: np.ndarray | None = None,
    measure: Measure | None = None,
) -> list[ExitScores]:
    """Per-stream scores and, if wanted, evidence of a batch; one transfer to the host.

    Only what is needed per frame is computed on the device; means over frames are cheaper on the host.

    Args:
        logits: (B, L, V) of this exit. before, after: (B, T, D) hidden states around the segment; `before` None = no
            policy looks at `Evidence.similarity`, which is then not a number.
        previous: per stream what the exit before said about this chunk, or None.
        want_log_probs: also bring (L, V) log-posteriors to the host (beam search needs them).
        want_evidence: a policy will look at it. False saves most of this function's time; evidence is then `UNJUDGED`.
        frames: (B,) real frames of each stream, the most of which is T; None = all T.
        measure: another way to do the arithmetic of frames, for where no log-posteriors are wanted; None = torch.
    """
    if measure is None or want_log_probs:
        found = _measured(logits, before, after, want_log_probs, want_evidence)
    else:
        found = measure(logits, before, after, want_evidence)
    judge = partial(_judge, vocab=logits.shape[-1], want_log_probs=want_log_probs, want_evidence=want_evidence)
    lengths = set() if frames is None else set(frames.tolist())
    if frames is None or len(lengths) < 2:
        return judge(found, previous)
    longest = int(frames.max())
    scores: dict[int, ExitScores] = {}
    for length in lengths:
        rows = np.flatnonzero(frames == length)
        ours = judge(
            [values[rows, : values.shape[1] // longest * length] for values in found],
            [previous[row] for row in rows.tolist()],
        )
        scores.update(zip(rows.tolist(), ours, strict=True))
    return [scores[row] for row in range(len(scores))]


def _measured(
    logits: Tensor, before: Tensor | None, after: Tensor, want_log_probs: bool, want_evidence: bool
) -> list[np.ndarray]:
    """Per frame: log posterior of the best label, that label, and as far as wanted: the sum of posterior times log
    posterior, scalar product and norms of the states, all log posteriors."""
    import torch

    log_probs = logits.float().log_softmax(dim=-1)
    top, ids = _best(log_probs)
    columns = [top, ids]
    if want_evidence:
        columns.append(torch.linalg.vecdot(log_probs.exp(), log_probs))
        if before is not None:
            states = before.float(), after.float()
            columns += [torch.linalg.vecdot(*states), *(torch.linalg.vector_norm(x, dim=-1) for x in states)]
    columns += [log_probs] if want_log_probs else []
    return _to_host(columns)


def _judge(
    found: Sequence[np.ndarray],
    previous: Sequence[ExitScores | None],
    *,
    vocab: int,
    want_log_probs: bool,
    want_evidence: bool,
) -> list[ExitScores]:
    """What `score` brought to the host, of streams with equally many frames."""
    tops, labels, *numbers = found
    tables = list(numbers.pop()) if want_log_probs else [None] * len(tops)
    rows = list(labels), list(tops), tables
    if not want_evidence:
        return list(map(ExitScores, *rows, repeat(UNJUDGED)))
    negative_entropy, *products = numbers
    texts, known = _texts(labels), [item and item.known for item in previous]
    seen = _summaries(tops, labels, negative_entropy, vocab, products)
    seen[:, AGREEMENT] = [_agreement(text, item) for text, item in zip(texts, known, strict=True)]
    evidence = map(Evidence.of_row, seen, [item and item.evidence for item in known])
    return list(map(ExitScores, *rows, evidence, texts))


def _to_host(columns: Sequence[Tensor]) -> list[np.ndarray]:
    """(B, ...) tensors, from another device in one transfer. The second holds labels, the others are of one type."""
    import torch

    if columns[0].is_cpu:
        return [column.numpy() for column in columns]
    flat = [column.flatten(1).to(columns[0].dtype) for column in columns]
    packed = torch.cat(flat, dim=1).cpu().numpy()
    ends = np.cumsum([column.shape[1] for column in flat])[:-1]
    found = [part.reshape(column.shape) for part, column in zip(np.split(packed, ends, axis=1), columns, strict=True)]
    found[1] = found[1].astype(np.int64)
    return found


def _texts(labels: np.ndarray) -> list[bytes]:
    """(B, L) labels -> per stream the bytes of its collapsed ones."""
    keep = labels != BLANK
    keep[:, 1:] &= labels[:, 1:] != labels[:, :-1]
    kept, width = labels[keep].tobytes(), labels.itemsize
    ends = accumulate(np.add.reduce(keep, axis=1).tolist(), initial=0)
    return [kept[start * width : end * width] for start, end in pairwise(ends)]


def unpack(row: np.ndarray, num_labels: int, earlier: ExitScores | None, log_probs: np.ndarray | None) -> ExitScores:
    """One chunk's numbers as a graph leaves them: summary (or nothing), (L,) best pieces, (L,) log-posteriors."""
    first = len(row) - 2 * num_labels
    best, top = row[first : first + num_labels].astype(np.int64), row[first + num_labels :]
    if not first:
        return ExitScores(best, top, log_probs, UNJUDGED)
    text, known = collapse(best).tobytes(), earlier and earlier.known
    numbers = np.array([*row[: first - 1], _agreement(text, known), row[first - 1], math.exp(top.min())], np.float64)
    return ExitScores(best, top, log_probs, Evidence.of_row(numbers, known and known.evidence), text)


def with_beam_share(scores: ExitScores, beams: int) -> ExitScores:
    """`scores`, which hold log-posteriors, with `Evidence.beam_share` of so many prefix beams over the chunk alone."""
    decoder = PrefixBeamDecoder(beam_size=beams, top_tokens=beams)
    share = decoder.advance(decoder.initial(), scores.frames).confidence
    return scores._replace(evidence=Evidence.of_row(scores.evidence.numbers, scores.evidence.previous, share))


def summarise(log_probs: Tensor, top: Tensor, ids: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """(B, NUM_COLUMNS) in the order in which `unpack` reads it; arguments as in `score`."""
    import torch

    entropy = -(log_probs.exp() * log_probs).sum(dim=-1) / math.log(log_probs.shape[-1])
    spoken = (ids != BLANK).to(top.dtype)
    count = spoken.sum(dim=1)
    silent = count == 0
    posterior = top.exp()

    def over_spoken(x: Tensor) -> Tensor:
        return torch.where(silent, x.mean(dim=1), (x * spoken).sum(dim=1) / count.clamp(min=1))

    similarity = torch.cosine_similarity(before, after, dim=-1).mean(dim=1)
    columns = [
        over_spoken(posterior),
        posterior.mean(1),
        over_spoken(entropy),
        entropy.mean(1),
        1 - spoken.mean(1),
        similarity,
    ]
    return torch.stack(columns, dim=1)


def _best(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value and its place along the last dimension; on a CPU numpy's argmax is much faster than torch's."""
    import torch

    if log_probs.is_cpu:
        return log_probs.amax(dim=-1), torch.from_numpy(log_probs.numpy().argmax(axis=-1))
    return log_probs.max(dim=-1)


def _summaries(
    log_posterior: np.ndarray,
    labels: np.ndarray,
    negative_entropy: np.ndarray,
    vocab: int,
    products: Sequence[np.ndarray],
) -> np.ndarray:
    """All (B, L) -> (B, 8) `Evidence.numbers`, the agreement still missing.

    `products`, (B, T): of hidden states before and after, and the norms of either; nothing = no similarity.
    Ufuncs and few of them, because calls are what takes time here.
    """
    batch, total = labels.shape
    values = np.empty((2, batch, total), np.float32)
    np.exp(log_posterior, out=values[0])
    np.divide(negative_entropy, -math.log(vocab), out=values[1])
    spoken = labels != BLANK
    count = np.add.reduce(spoken, axis=1, keepdims=True)
    judged = spoken | (count == 0)
    weight = judged / np.add.reduce(judged, axis=1, keepdims=True)
    seen = np.empty((batch, 8))
    np.add.reduce(values * weight, axis=2, out=seen[:, 0:4:2].T)
    np.divide(np.add.reduce(values, axis=2), total, out=seen[:, 1:4:2].T)
    np.subtract(1.0, count[:, 0] / total, out=seen[:, 4])
    seen[:, 6] = math.nan
    if products:
        product, norm_before, norm_after = products
        cosines = product / np.maximum(norm_before * norm_after, 1e-8)
        np.divide(np.add.reduce(cosines, axis=1), cosines.shape[1], out=seen[:, 6])
    np.minimum.reduce(values[0], axis=1, out=seen[:, 7])
    return seen


def _agreement(text: bytes, earlier: ExitScores | None) -> float:
    return 0.0 if earlier is None or text != earlier.text else 1.0


def collapse(ids: np.ndarray) -> np.ndarray:
    """Greedy CTC collapse of (T,) ids: repeats merged, blanks dropped."""
    keep = np.ones(len(ids), bool)
    keep[1:] = ids[1:] != ids[:-1]
    return ids[keep & (ids != BLANK)]
