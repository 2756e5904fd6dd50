"""What a step frees stays for the next, and goes back to the system once nobody waits: in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_STEP = """
import threading, psutil
import numpy as np
from service.allocator import give_back_freed_memory, keep_freed_memory

def resident_mb():
    return psutil.Process().memory_info().rss / 1e6

def on_a_thread_of_its_own():
    before = resident_mb()
    blocks = [np.ones(1 << 20, np.uint8) for _ in range(50)]
    del blocks
    kept = resident_mb() - before
    give_back_freed_memory()
    print(kept, resident_mb() - before)
    blocks = [np.ones(1 << 20, np.uint8) for _ in range(50)]
    del blocks
    print(resident_mb() - before)

assert keep_freed_memory()
thread = threading.Thread(target=on_a_thread_of_its_own)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _STEP], capture_output=True, text=True, check=True, timeout=60)
    kept, given_back, kept_again = map(float, done.stdout.split())
    assert kept > 40
    assert given_back < 10
    assert kept_again > 40
