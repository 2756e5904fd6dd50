"""Pieces of machine code for the kernels: bf16 to fp32 and back, the exponential, a small matrix product.

The product is written as LLVM vectors of 16 lanes, because a compiler left to itself keeps its sums in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_FAST = {"reassoc", "contract", "nsz", "arcp"}  # and NaN stays NaN
_INT, _LONG, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _INTS, _SHORTS = (ir.VectorType(kind, 16) for kind in (_FLOAT, _INT, ir.IntType(16)))
_LOG2_E = np.float32(1.4426950408889634)
_LOW, _HIGH = np.float32(-100.0), np.float32(126.0)
_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
_C1, _C2, _C3, _C4 = (np.float32(c) for c in (0.6931472, 0.2402265, 0.05550411, 0.009618129))
_DIGEST = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]


def compiled(function: Callable[..., None]) -> Any:
    """Compiled at the first call, and kept on disk where there is a place for it.

    numba makes what it keeps anew when the file of the function changes. Under a name that says which pieces of this
    file are in it, it does so when those change, too.
    """
    options = {"nogil": True, "fastmath": _FAST, "error_model": "numpy"}
    function.__qualname__ = f"{function.__name__}_{_DIGEST}"
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no place that can be written to
        return numba.njit(**options)(function)


@intrinsic
def wide(context):
    """In a kernel's first line: its loops use the widest vectors there are. LLVM shuns those of 512 bits by default.

    It does so for the sake of programs that use them now and then, at the price of a slower clock; the products between
    two kernels pay that anyway.
    """

    def code(_: Any, build: Any, signature: Any, args: Sequence[Any]) -> Any:
        set.add(build.function.attributes, '"prefer-vector-width"="512"')  # llvmlite does not list it
        return _INT(0)

    return types.int32(), code


@intrinsic
def as_fp32(context, number):
    """A bf16 number, given as uint16."""

    def code(_: Any, build: Any, signature: Any, args: Sequence[Any]) -> Any:
        return build.bitcast(build.shl(build.zext(args[0], _INT), _INT(16)), _FLOAT)

    return types.float32(types.uint16), code


@intrinsic
def as_bf16(context, number):
    """Rounded to the nearest, to even in the middle, as torch does; NaN stays NaN."""

    def code(_: Any, build: Any, signature: Any, args: Sequence[Any]) -> Any:
        bits = build.bitcast(args[0], _INT)
        odd = build.and_(build.lshr(bits, _INT(16)), _INT(1))
        rounded = build.lshr(build.add(bits, build.add(odd, _INT(0x7FFF))), _INT(16))
        is_nan = build.fcmp_unordered("uno", args[0], args[0])
        return build.trunc(build.select(is_nan, _INT(0x7FC0), rounded), ir.IntType(16))

    return types.uint16(types.float32), code


@intrinsic
def _power_of_two(context, exponent):
    """2 to a whole number of -126 to 127."""

    def code(_: Any, build: Any, signature: Any, args: Sequence[Any]) -> Any:
        return build.bitcast(build.shl(build.add(args[0], _INT(127)), _INT(23)), _FLOAT)

    return types.float32(types.int32), code


@intrinsic
def _bits(context, number):
    def code(_: Any, build: Any, signature: Any, args: Sequence[Any]) -> Any:
        return build.bitcast(args[0], _INT)

    return types.int32(types.float32), code


@intrinsic
def _number(context, bits):
    def code(_: Any, build: Any, signature: Any, args: Sequence[Any]) -> Any:
        return build.bitcast(args[0], _FLOAT)

    return types.float32(types.int32), code


@numba.njit(inline="always")
def rank(x):
    """A whole number that grows with x. The largest of many is found in vectors, unlike the largest of many x."""
    bits = _bits(x)
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@numba.njit(inline="always")
def of_rank(rank):
    """The number x with that `rank`."""
    return _number(rank ^ ((rank >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@numba.njit(inline="always")
def exp(x):
    """To 5 decimal places, far beyond bf16; at most e to the 87, and 0 below e to the -69.

    Without tiny numbers: products of those would leave what the processor computes at full speed.
    """
    exponent = x * _LOG2_E
    power = _LOW if exponent < _LOW else exponent  # NaN passes
    power = _HIGH if power > _HIGH else power
    whole = np.floor(power + _HALF)
    part = power - whole
    fraction = _ONE + part * (_C1 + part * (_C2 + part * (_C3 + part * _C4)))
    return _ZERO if exponent < _LOW else fraction * _power_of_two(np.int32(whole))


@numba.njit(inline="always")
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return _ONE / (_ONE + exp(-x))


def _tile(columns: int, rows: int = 4) -> Any:
    """An intrinsic that writes `rows` rows of 16 * `columns` sums over k products to memory, kept in registers before.

    Its arguments are addresses and bytes from row to row, of a (rows, k) fp32, b (k, 16 * columns) bf16, c (rows, 16 *
    columns) fp32, and k.
    """

    @intrinsic
    def tile(context, a, a_step, b, b_step, c, c_step, k):
        def code(target: Any, build: Any, signature: Any, args: Sequence[Any]) -> Any:
            a, a_step, b, b_step, c, c_step, k = args
            nothing = ir.Constant(_FLOATS, [0.0] * 16)
            multiply_add: Callable[..., Any] = cgutils.get_or_insert_function(
                build.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fma.v16f32"
            )

            def at(address: Any, kind: Any) -> Any:
                return build.inttoptr(address, kind.as_pointer())

            sums = [[cgutils.alloca_once(build, _FLOATS) for _ in range(columns)] for _ in range(rows)]
            for row in sums:
                for place in row:
                    build.store(nothing, place)
            with cgutils.for_range(build, k) as loop:
                line = build.add(b, build.mul(loop.index, b_step))
                factors = []
                for column in range(columns):
                    short = build.load(at(build.add(line, _LONG(32 * column)), _SHORTS), align=2)
                    wide = build.shl(build.zext(short, _INTS), ir.Constant(_INTS, [16] * 16))
                    factors.append(build.bitcast(wide, _FLOATS))
                for row in range(rows):
                    place = build.add(build.add(a, build.mul(_LONG(row), a_step)), build.mul(loop.index, _LONG(4)))
                    single = build.load(at(place, _FLOAT), align=4)
                    anything = ir.Constant(_FLOATS, ir.Undefined)
                    single = build.insert_element(anything, single, _INT(0))
                    spread = build.shuffle_vector(single, anything, ir.Constant(_INTS, [0] * 16))
                    for column in range(columns):
                        place = sums[row][column]
                        build.store(build.call(multiply_add, [spread, factors[column], build.load(place)]), place)
            for row in range(rows):
                for column in range(columns):
                    place = build.add(build.add(c, build.mul(_LONG(row), c_step)), _LONG(64 * column))
                    build.store(build.load(sums[row][column]), at(place, _FLOATS), align=4)
            return target.get_dummy_value()

        return types.void(*[types.int64] * 7), code

    return tile


_tile_80, _tile_64, _tile_16 = _tile(5), _tile(4), _tile(1)


@numba.njit(inline="always")
def product(a, b, b_first, b_width, c):
    """c = a times a part of b.

    Args:
        a: (4, k) fp32. c: (4, n) fp32, n a multiple of 16.
        b: bf16; element (i, j) of the (k, n) part is the one at `b_first` + i * `b_width` + j in memory.
    """
    k, n, done = a.shape[1], c.shape[1], 0
    a_at, b_at, c_at = a.ctypes.data, b.ctypes.data + 2 * b_first, c.ctypes.data
    while n - done >= 80:
        _tile_80(a_at, 4 * k, b_at + 2 * done, 2 * b_width, c_at + 4 * done, 4 * n, k)
        done += 80
    while n - done >= 64:
        _tile_64(a_at, 4 * k, b_at + 2 * done, 2 * b_width, c_at + 4 * done, 4 * n, k)
        done += 64
    while n - done >= 16:
        _tile_16(a_at, 4 * k, b_at + 2 * done, 2 * b_width, c_at + 4 * done, 4 * n, k)
        done += 16
