"""What lies between the matrix products of a Conformer block, compiled for the CPU at hand (numba), for bf16 weights.

There every product takes less time than what torch runs around it, an operation at a time. A kernel here does all that
one product's output needs before the next product: it reads bf16, computes in fp32, writes bf16, and reads and writes
streaming state where it lies. A stream's answer does not depend on its neighbours in the batch.

bf16 numbers are uint16 arrays here. Shapes: N = B * T frames, B streams, T frames of a chunk, D model dimension, H
heads, E head dimension, S slots, W ring cells, h halo.
"""

from __future__ import annotations

import numba
import numpy as np

from asr_exit.machine_code import as_bf16, as_fp32, compiled, exp, of_rank, product, rank, sigmoid, wide

_EPS = np.float32(1e-5)  # of torch's LayerNorm
_RMS_EPS = np.float32(1e-6)
_ROWS = 4  # queries at a time
_GROUP = 8  # frames whose keys are written together
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@numba.njit(inline="always")
def _standardise(row):
    """Zero mean and unit variance, in place, as LayerNorm has it."""
    width, total, square = len(row), _ZERO, _ZERO
    for d in range(width):
        total += row[d]
    mean = total / np.float32(width)
    for d in range(width):
        row[d] -= mean
        square += row[d] * row[d]
    scale = _ONE / np.sqrt(square / np.float32(width) + _EPS)
    for d in range(width):
        row[d] *= scale


@numba.njit(inline="always")
def _clear(out, first, count):
    """Zeros in `count` rows; in loops, which compile in a fraction of a slice's time."""
    for i in range(first, first + count):
        row = out[i]
        for d in range(len(row)):
            row[d] = 0


@compiled
def norm(x, gamma, beta, out):
    """LayerNorm of x (N, D) bf16 into `out`; gamma and beta (D,) fp32."""
    wide()
    count, width = x.shape
    row = np.empty(width, np.float32)
    for i in range(count):
        for d in range(width):
            row[d] = as_fp32(x[i, d])
        _standardise(row)
        for d in range(width):
            out[i, d] = as_bf16(row[d] * gamma[d] + beta[d])


@compiled
def add_norm(x, branch, weight, gamma, beta, total, out):
    """`total` = x + weight * branch, `out` = LayerNorm of that; all (N, D) bf16, `total` may be x."""
    wide()
    count, width = x.shape
    row = np.empty(width, np.float32)
    for i in range(count):
        for d in range(width):
            row[d] = as_fp32(x[i, d]) + weight * as_fp32(branch[i, d])
        for d in range(width):  # apart from the reading: a loop over arrays that may be the same is not vectorised
            total[i, d] = as_bf16(row[d])
        _standardise(row)
        for d in range(width):
            out[i, d] = as_bf16(row[d] * gamma[d] + beta[d])


@compiled
def add_rms_norm(x, branch, gain, out):
    """`out` = (x + branch) of unit root mean square, times `gain`; all (N, D) bf16, `out` may be x."""
    wide()
    count, width = x.shape
    row = np.empty(width, np.float32)
    for i in range(count):
        square = _ZERO
        for d in range(width):
            row[d] = as_fp32(x[i, d]) + as_fp32(branch[i, d])
            square += row[d] * row[d]
        scale = gain / np.sqrt(square / np.float32(width) + _RMS_EPS)
        for d in range(width):
            out[i, d] = as_bf16(row[d] * scale)


@compiled
def convolve(expanded, slots, frames, state, taps, bias, gamma, beta, out):
    """Gated linear unit, depthwise convolution within the chunk, LayerNorm and SiLU: `conv.ChunkConv` but its products.

    Args:
        expanded: (N, 2 * D) bf16. out: (N, D) bf16.
        slots: (B,) of the streams; the last slot of `state` is nobody's, its rows come out as zeros.
        frames: (B,) real frames of each row; what follows them is padding. state: (S, h, D) bf16, brought up to date.
        taps: (K, D) fp32, bias, gamma, beta: (D,) fp32.
    """
    wide()
    streams, (count, width) = len(slots), out.shape
    chunk, halo = count // streams, state.shape[1]
    gated = np.zeros((halo + chunk + halo, width), np.float32)
    row = np.empty(width, np.float32)
    for b in range(streams):
        slot, first, real = slots[b], b * chunk, frames[b]
        if slot == len(state) - 1:
            _clear(out, first, chunk)
            continue
        for j in range(halo):
            for d in range(width):
                gated[j, d] = as_fp32(state[slot, j, d])
        for t in range(real):
            given, gates, place = expanded[first + t], expanded[first + t, width:], gated[halo + t]
            for d in range(width):
                place[d] = as_fp32(as_bf16(as_fp32(given[d]) * sigmoid(as_fp32(gates[d]))))
        for t in range(real, chunk + halo):
            for d in range(width):
                gated[halo + t, d] = _ZERO
        for j in range(halo):
            for d in range(width):
                state[slot, j, d] = as_bf16(gated[real + j, d])
        for t in range(chunk):
            for d in range(width):
                row[d] = bias[d]
            for k in range(len(taps)):
                tap, place = taps[k], gated[t + k]
                for d in range(width):
                    row[d] += tap[d] * place[d]
            _standardise(row)
            place = out[first + t]
            for d in range(width):
                value = row[d] * gamma[d] + beta[d]
                place[d] = as_bf16(value * sigmoid(value))


@compiled
def keep(expanded, slots, frames, state):
    """What `convolve` would leave in `state` of frames that it never sees.

    Args:
        expanded: (N, 2 * D) bf16. slots: (B,) of the streams; the last slot of `state` is nobody's.
        frames: (B,) real frames of each row; what follows them is padding. state: (S, h, D) bf16, brought up to date.
    """
    wide()
    halo, width = state.shape[1:]
    longest = len(expanded) // len(slots)
    for b in range(len(slots)):
        slot, count = slots[b], min(frames[b], halo)
        if slot == len(state) - 1:
            continue
        for j in range(halo - count):
            for d in range(width):
                state[slot, j, d] = state[slot, j + count, d]
        first = b * longest + frames[b] - count
        for j in range(count):
            given, gates, place = expanded[first + j], expanded[first + j, width:], state[slot, halo - count + j]
            for d in range(width):
                place[d] = as_bf16(as_fp32(given[d]) * sigmoid(as_fp32(gates[d])))


@numba.njit(inline="always")
def _rotate(given, first, half, cos, sin, scale, out):
    """`attention.rotate` of one head, times `scale`: 2 * `half` numbers from `first` on, bf16 to fp32."""
    low, high = given[first : first + half], given[first + half : first + 2 * half]
    low_out, high_out = out[first : first + half], out[first + half : first + 2 * half]
    for d in range(half):
        c, s = as_fp32(cos[d]) * scale, as_fp32(sin[d]) * scale
        a, b = as_fp32(low[d]), as_fp32(high[d])
        low_out[d] = a * c - b * s
        high_out[d] = b * c + a * s


@numba.njit(inline="always")
def _softmax(scores, hidden):
    """Softmax of `scores` + `hidden` in place."""
    window, highest, total = len(scores), np.int32(-(2**31)), _ZERO
    for w in range(window):
        scores[w] += hidden[w]
    for w in range(window):
        highest = max(highest, rank(scores[w]))
    top = of_rank(highest)
    for w in range(window):
        weight = exp(scores[w] - top)
        scores[w] = weight
        total += weight
    total = _ONE / total
    for w in range(window):
        scores[w] *= total


@compiled
def store(projected, cells, cos, sin, keys, values):
    """Rotate keys and write them and the values where they belong.

    Args:
        projected: (N, >= 2 * D) bf16; keys and values are its last 2 * D columns.
        cells: (N,) ring cells, slot * W + cell. cos, sin: (N, E / 2) bf16.
        keys: (S, H, E, W) bf16, so that queries meet 16 keys at once. values: (S, W, H, E) bf16.
    """
    wide()
    heads, head_dim, window = keys.shape[1:]
    half, width, count = head_dim // 2, heads * head_dim, len(cells)
    first_key = projected.shape[1] - 2 * width
    turned, rotated = np.empty(width, np.float32), np.empty((_GROUP, width), np.uint16)
    rows, value_rows = keys.reshape(len(keys), width, window), values.reshape(-1, width)
    for group in range(0, count, _GROUP):
        size = min(_GROUP, count - group)
        for g in range(size):
            i = group + g
            given, key = projected[i, first_key : first_key + width], rotated[g]
            for h in range(heads):
                _rotate(given, h * head_dim, half, cos[i], sin[i], _ONE, turned)
            for d in range(width):
                key[d] = as_bf16(turned[d])
            given, value = projected[i, first_key + width :], value_rows[cells[i]]
            for d in range(width):
                value[d] = given[d]
        slot, cell = cells[group] // window, cells[group] % window
        if cells[group + size - 1] - cells[group] == size - 1 and cell + size <= window:  # mostly: neighbours
            place = rows[slot, :, cell : cell + size]
            if size == _GROUP:  # a number that the compiler knows
                for d in range(width):
                    for g in range(_GROUP):
                        place[d, g] = rotated[g, d]
            else:
                for d in range(width):
                    for g in range(size):
                        place[d, g] = rotated[g, d]
        else:
            for g in range(size):
                slot, cell = cells[group + g] // window, cells[group + g] % window
                for d in range(width):
                    rows[slot, d, cell] = rotated[g, d]


@compiled
def attend(projected, slots, mask, cos, sin, keys, values, out):
    """Softmax attention of the queries over their stream's ring cells; the chunk's own keys are `store`d before.

    Args:
        projected: (N, 3 * D) bf16; queries are its first D columns. slots: (B,); rows of the last, nobody's, get zeros.
        mask: (B, W) bf16, added to the scores. cos, sin, keys, values: as for `store`. out: (N, D) bf16.
    """
    wide()
    streams, heads, head_dim, window = len(slots), *keys.shape[1:]
    chunk, half, width = len(out) // streams, head_dim // 2, heads * head_dim
    scores, queries = np.empty((_ROWS, window), np.float32), np.zeros((_ROWS, head_dim), np.float32)
    mixed = np.empty((_ROWS, head_dim), np.float32)
    hidden = np.empty(window, np.float32)
    root = _ONE / np.sqrt(np.float32(head_dim))
    for b in range(streams):
        slot, first = slots[b], b * chunk
        if slot == len(keys) - 1:
            _clear(out, first, chunk)
            continue
        for w in range(window):
            hidden[w] = as_fp32(mask[b, w])
        for h in range(heads):
            begin = h * head_dim
            for group in range(first, first + chunk, _ROWS):
                rows = min(_ROWS, first + chunk - group)
                for r in range(rows):
                    i = group + r
                    _rotate(projected[i, begin:], 0, half, cos[i], sin[i], root, queries[r])
                product(queries, keys, (slot * heads + h) * head_dim * window, window, scores)
                for r in range(rows):
                    _softmax(scores[r], hidden)
                product(scores, values, (slot * window * heads + h) * head_dim, width, mixed)
                for r in range(rows):
                    answer, place = mixed[r], out[group + r, begin:]
                    for d in range(head_dim):
                        place[d] = as_bf16(answer[d])
