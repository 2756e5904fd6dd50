"""What a step frees stays for the next, and goes back to the system once nobody waits and now and then before."""

from __future__ import annotations

import asyncio
import platform
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from service.allocator import memory_in_use
from service.engine_thread import EngineThread
from service.server import poster
from tests.service.fake_engine import FakeEngine
from tests.service.test_session import opened, send_seconds, until

_STEP = """
import threading, psutil
import numpy as np
from service.allocator import give_back_freed_memory, keep_freed_memory, reserve_heap

def resident_mb():
    return psutil.Process().memory_info().rss / 1e6

def step():
    blocks = [np.ones(1 << 20, np.uint8) for _ in range(BLOCKS)]

def on_a_thread_of_its_own():
    if RESERVE:
        reserve_heap()
    before = resident_mb()
    print(before - at_first)
    for _ in range(3):
        step()
        print(resident_mb() - before)
    give_back_freed_memory(False)
    print(resident_mb() - before)
    step()
    print(resident_mb() - before)

assert KEEP is None or keep_freed_memory(1 << 20)
at_first = resident_mb()
thread = threading.Thread(target=on_a_thread_of_its_own)
thread.start()
thread.join()
"""
glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")


@glibc_only
def test_a_thread_with_a_reserve_keeps_what_it_frees_until_it_gives_it_back() -> None:
    reserved, *kept, given_back, kept_again = kept_mb(150, reserve=True, keep=True)
    assert reserved < 2
    assert min(*kept, kept_again) > 140
    assert given_back < 5


@glibc_only
def test_other_threads_keep_little() -> None:
    assert max(kept_mb(reserve=False, keep=True)) < 5


@glibc_only
def test_a_process_that_was_not_told_to_keep_memory_reserves_none() -> None:
    assert max(kept_mb(reserve=True, keep=None)) < 5


@glibc_only
@pytest.mark.parametrize("megabytes", [1, 100])
def test_memory_in_use_counts_what_is_held_and_not_what_is_kept(megabytes: int) -> None:
    before = memory_in_use()
    assert before is not None
    blocks = [bytearray(1 << 20) for _ in range(megabytes)]
    held = memory_in_use()
    blocks.clear()
    after = memory_in_use()
    assert held is not None
    assert after is not None
    assert held - before == pytest.approx(megabytes << 20, abs=200_000)
    assert after == pytest.approx(before, abs=200_000)


@glibc_only
def test_threads_share_heaps() -> None:
    script = """
import ctypes, threading
from service.allocator import share_heaps

def hold():
    blocks.append(bytes(1000))
    together.wait()

share_heaps(MOST)
blocks, together = [], threading.Barrier(13)
for _ in range(12):
    threading.Thread(target=hold).start()
ctypes.CDLL(None).malloc_stats()
together.wait()
"""
    for most in (2, 5):
        command = [sys.executable, "-c", script.replace("MOST", str(most))]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert done.stderr.count("Arena ") == most


def kept_mb(blocks: int = 50, *, reserve: bool, keep: bool | None) -> list[float]:
    """Megabytes that `_STEP` prints; its steps take so many `blocks` of one."""
    script = _STEP.replace("RESERVE", str(reserve)).replace("KEEP", str(keep)).replace("BLOCKS", str(blocks))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return list(map(float, done.stdout.split()))


@asynccontextmanager
async def tidying() -> AsyncIterator[tuple[EngineThread, list[tuple[bool, int]]]]:
    """An engine thread, and whether it was idle and how many streams there were each time it tidied."""
    tidied: list[tuple[bool, int]] = []
    engine = FakeEngine()
    thread = EngineThread(
        engine,  # type: ignore[arg-type]
        poster(asyncio.get_running_loop()),
        tidy=lambda idle: tidied.append((idle, len(engine.streams))),
    )
    thread.start()
    try:
        yield thread, tidied
    finally:
        await asyncio.to_thread(thread.stop)


async def test_the_thread_tidies_up_when_the_last_stream_is_gone() -> None:
    async with tidying() as (thread, tidied):
        first, second = await opened(thread), await opened(thread)
        first.close()
        await asyncio.sleep(0.4)
        assert tidied == []
        second.close()
        await until(lambda: tidied == [(True, 0)])
        await asyncio.sleep(0.3)
        assert tidied == [(True, 0)]


async def test_a_thread_that_is_never_idle_tidies_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine_thread._TIDY_EVERY_S", 0.2)
    async with tidying() as (thread, tidied):
        session = await opened(thread)
        for _ in range(12):
            await send_seconds(session, 1)
            await asyncio.sleep(0.05)
        assert 2 <= len(tidied) <= 5
        assert set(tidied) == {(False, 1)}
