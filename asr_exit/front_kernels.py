"""What comes before the first Conformer block, compiled for the CPU at hand (numba), for bf16 weights.

Conventions as in `asr_exit.kernels`. Shapes: B streams, F features of a chunk, S slots, C channels.
"""

from __future__ import annotations

import numpy as np

from asr_exit.machine_code import as_bf16, as_fp32, compiled, wide

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@compiled
def first_stage(log_mel, lengths, ends, mean, deviation, slots, first_tail, second_tail, weight, bias, out):
    """Normalisation and the first convolution of `conv.ConvSubsampling` with its ReLU, and the tails of two stages.

    Args:
        log_mel: (B, F, bands) fp32. lengths: (B,) real features of each row; what follows is taken for zeros.
        ends: (B,) features after which tails are taken.
        mean, deviation: (bands,) fp32. slots: (B,); rows of the last, nobody's, come out as zeros.
        first_tail: (S, bands) bf16 last feature of the chunk before, brought up to date.
        second_tail: (S, bands / 2, C) bf16 last output frame of the chunk before, brought up to date.
        weight: (9, C) fp32, time before frequency. bias: (C,) fp32.
        out: (B, 1 + F / 2, bands / 2, C) bf16; the frame of the chunk before comes first.
    """
    wide()
    streams, features, bands = log_mel.shape
    channels, half = out.shape[3], out.shape[2]
    lines = np.zeros((1 + features, bands + 2), np.float32)
    for b in range(streams):
        slot, count, end = slots[b], lengths[b], ends[b]
        if slot == len(first_tail) - 1:
            for t in range(1 + features // 2):  # loops compile in a fraction of a slice's time
                for f in range(half):
                    for c in range(channels):
                        out[b, t, f, c] = 0
            continue
        tail, line = first_tail[slot], lines[0]
        for f in range(bands):
            line[1 + f] = as_fp32(tail[f])
        for t in range(features):
            given, line = log_mel[b, t], lines[1 + t][1:]
            if t < count:
                for f in range(bands):
                    line[f] = as_fp32(as_bf16((given[f] - mean[f]) / deviation[f]))
            else:
                for f in range(bands):
                    line[f] = _ZERO
        line = lines[end][1:]
        for f in range(bands):
            tail[f] = as_bf16(line[f])
        kept = second_tail[slot]
        for f in range(half):
            for c in range(channels):
                out[b, 0, f, c] = kept[f, c]
        for t in range(features // 2):
            above, middle, below = lines[2 * t], lines[2 * t + 1], lines[2 * t + 2]
            for f in range(half):
                g, place = 2 * f, out[b, 1 + t, f]
                a0, a1, a2 = above[g], above[g + 1], above[g + 2]
                b0, b1, b2 = middle[g], middle[g + 1], middle[g + 2]
                c0, c1, c2 = below[g], below[g + 1], below[g + 2]
                for c in range(channels):
                    value = bias[c] + weight[0, c] * a0 + weight[1, c] * a1 + weight[2, c] * a2
                    value += weight[3, c] * b0 + weight[4, c] * b1 + weight[5, c] * b2
                    value += weight[6, c] * c0 + weight[7, c] * c1 + weight[8, c] * c2
                    place[c] = as_bf16(_ZERO if value < _ZERO else value)
        last = out[b, end // 2]
        for f in range(half):
            for c in range(channels):
                kept[f, c] = last[f, c]


@compiled
def windows(samples, window, hop, preemphasis, out):
    """Frames without their mean, pre-emphasised and windowed, ready for a Fourier transform.

    Args:
        samples: (B, N) fp32. window: (W,) fp32. out: (B, T, at least W) fp32; what is behind W is set to 0.
    """
    wide()
    size, keep = len(window), _ONE - preemphasis
    for b in range(len(samples)):
        for t in range(out.shape[1]):
            given, frame = samples[b, t * hop :], out[b, t]
            before, this, rest = given[: size - 1], given[1:size], frame[1:size]
            total = given[0]
            for n in range(size - 1):
                total += this[n]
            offset = keep * total / np.float32(size)
            frame[0] = (keep * given[0] - offset) * window[0]
            shape = window[1:]
            for n in range(size - 1):
                rest[n] = (this[n] - preemphasis * before[n] - offset) * shape[n]
            for n in range(size, len(frame)):
                frame[n] = _ZERO


@compiled
def power(spectrum, out):
    """Squared magnitudes: (N, 2 * K) fp32, real and imaginary parts in turn -> (N, K)."""
    wide()
    for i in range(len(out)):
        given, place = spectrum[i], out[i]
        for k in range(len(place)):
            place[k] = given[2 * k] * given[2 * k] + given[2 * k + 1] * given[2 * k + 1]
