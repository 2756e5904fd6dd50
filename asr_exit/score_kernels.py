"""What an exit says about its frames, compiled for the CPU at hand (numba), for bf16 weights: see `asr_exit.evidence`.

Conventions as in `asr_exit.kernels`. Shapes: N frames of any streams, V vocabulary, D model dimension.
"""

from __future__ import annotations

import numpy as np

from asr_exit.machine_code import as_fp32, compiled, exp, of_rank, rank, wide

_ZERO = np.float32(0.0)


@compiled
def posteriors(logits, top, labels, negative_entropy):
    """What each row of logits says.

    Args:
        logits: (N, V) bf16.
        top: (N,) fp32 natural log posterior of the best label. labels: (N,) int64 that label, the first of equals.
        negative_entropy: (N,) fp32 sum over all labels of posterior times log posterior.
    """
    wide()
    vocab = logits.shape[1]
    row, ranks = np.empty(vocab, np.float32), np.empty(vocab, np.int32)
    for i in range(len(logits)):
        given, highest, label = logits[i], np.int32(-(2**31)), np.int32(vocab)
        for k in range(vocab):
            row[k] = as_fp32(given[k])
            ranks[k] = rank(row[k])
        for k in range(vocab):
            highest = max(highest, ranks[k])
        for k in range(vocab):
            label = min(label, np.int32(k) if ranks[k] == highest else np.int32(vocab))
        largest, total, weighted = of_rank(highest), _ZERO, _ZERO
        for k in range(vocab):
            below = row[k] - largest
            share = exp(below)
            total += share
            weighted += share * below
        log_total = np.log(total)
        labels[i], top[i] = label, -log_total
        negative_entropy[i] = weighted / total - log_total


@compiled
def likeness(before, after, product, norm_before, norm_after):
    """Of each pair of rows of before and after (N, D) bf16: their scalar product and their norms, (N,) fp32 each."""
    wide()
    for i in range(len(before)):
        first, second = before[i], after[i]
        mixed, one, other = _ZERO, _ZERO, _ZERO
        for d in range(len(first)):
            a, b = as_fp32(first[d]), as_fp32(second[d])
            mixed += a * b
            one += a * a
            other += b * b
        product[i], norm_before[i], norm_after[i] = mixed, np.sqrt(one), np.sqrt(other)
