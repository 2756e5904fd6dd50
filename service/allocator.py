"""How the process looks after its memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 256 << 20
_LARGEST_HEAP_BLOCK_BYTES = 32 << 20  # glibc takes no more
_keeps = False  # whether this process was told to
_LOOKED_AT_WHEN_FREED_BYTES = 1 << 20  # glibc trims only when something of 64 KB or more is freed


def keep_freed_memory() -> bool:
    """Let the process keep up to 256 MB that it freed, for its next step.

    By default glibc hands the top of the heap back to the system after each step and asks for it again in the next,
    page by page: over a thousand page faults in every step of 16 streams. Returns False where the C library is another
    one and nothing was changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    options = {_M_MMAP_THRESHOLD: _LARGEST_HEAP_BLOCK_BYTES, _M_TRIM_THRESHOLD: _KEEP_BYTES}
    global _keeps
    _keeps = all(set_option(name, value) == 1 for name, value in options.items())
    return _keeps


def give_back_freed_memory() -> None:
    """Hand what is kept for the next step back to the system after all; for a time when nobody waits.

    To be called on the thread that made the steps: `malloc_trim` leaves the top of every arena but the main thread's
    as it is, which glibc looks at only when something is freed there.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        if _keeps:  # a process that did not ask for it keeps glibc's own threshold
            library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
            library.mallopt(_M_TRIM_THRESHOLD, 0)
            library.free(library.malloc(ctypes.c_size_t(_LOOKED_AT_WHEN_FREED_BYTES)))
            library.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
        library.malloc_trim(0)


def spare_what_stays() -> None:
    """Call once everything that lives as long as the process is there.

    The garbage collector then leaves that alone: looking through all of torch's objects takes 50 ms, in the middle of
    somebody's chunk, and a busy server paid it every few seconds.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # so that the collector no longer waits for a quarter of what was frozen before it looks at the old
    gc.set_threshold(10_000, 10, 10)
