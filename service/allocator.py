"""How the process looks after its memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from typing import ClassVar

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_HEAP_BLOCK_BYTES = 32 << 20  # glibc takes no more
_RESERVED_BYTES = 240 << 20  # four heaps of 64 MB: a step of 64 streams takes half of one, and streams keep things, too
_RESERVED_AT_ONCE_BYTES = 15 << 20
_PIN_BYTES = 4096
_keeps = False  # whether this process was told to


def keep_freed_memory(most_bytes: int = 256 << 20) -> bool:
    """Let every thread keep up to `most_bytes` that were freed at the top of its heap, for its next step.

    By default glibc hands the top of the heap back to the system after each step and asks for it again in the next,
    page by page: over a thousand page faults in every step of 16 streams. Returns False where the C library is another
    one and nothing was changed.
    """
    library = _glibc()
    if library is None:
        return False
    options = {_M_MMAP_THRESHOLD: _LARGEST_HEAP_BLOCK_BYTES, _M_TRIM_THRESHOLD: most_bytes}
    global _keeps
    _keeps = all(library.mallopt(name, value) == 1 for name, value in options.items())
    return _keeps


def share_heaps(most: int) -> None:
    """Let the threads of this process share so many heaps. To be called before there are many threads.

    By default there are eight for each processor, and each keeps memory in pieces between blocks that are in use.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(_M_ARENA_MAX, most)


def reserve_heap() -> None:
    """Let the calling thread keep what its steps free, whatever others may keep. To be called before the first of them.

    But after what the thread allocates for good, which would fill the reserve. glibc hands back nothing but the top of
    a heap, and a block that is never freed lies above what is reserved here. That takes address space; memory only as
    steps use it, until `give_back_freed_memory`. Does nothing in a process without `keep_freed_memory`.
    """
    library = _glibc()
    if _keeps and library is not None:  # otherwise blocks of this size do not come from the heap
        library.malloc.restype = ctypes.c_void_p
        sizes = [_RESERVED_AT_ONCE_BYTES] * (_RESERVED_BYTES // _RESERVED_AT_ONCE_BYTES)
        blocks = [library.malloc(ctypes.c_size_t(size)) for size in sizes]
        library.malloc(ctypes.c_size_t(_PIN_BYTES))
        for block in blocks:
            library.free(ctypes.c_void_p(block))


def give_back_freed_memory(idle: bool) -> None:
    """Hand what is kept for the next step back to the system after all; if `idle`, with what only cycles still hold.

    Not what `keep_freed_memory` lets other threads keep at the top of their heaps.
    """
    if idle:
        gc.collect()
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def memory_in_use() -> int | None:
    """Bytes that the C library's allocator has given out and not got back; None where it does not tell.

    Resident memory also holds what is free and kept, which comes and goes with the size of steps and each time protobuf
    gives all of it back, once in 10,000 blocks that it frees. Python's small objects are not in here.
    """
    library = _glibc()
    if library is None or not hasattr(library, "mallinfo2"):
        return None
    library.mallinfo2.restype = _MallInfo
    info = library.mallinfo2()
    return int(info.uordblks + info.hblkhd)


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`, all of it bytes or counts."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in _names.split()]


def _glibc() -> ctypes.CDLL | None:
    """A library of its own for every call, since the types of its functions are set."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
                return library
    return None


def spare_what_stays() -> None:
    """Call once everything that lives as long as the process is there.

    The garbage collector then leaves that alone: looking through all of torch's objects takes 50 ms, in the middle of
    somebody's chunk, and a busy server paid it every few seconds.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # so that the collector no longer waits for a quarter of what was frozen before it looks at the old
    gc.set_threshold(10_000, 10, 10)
