"""What a step frees stays for the next, and goes back to the system once nobody waits and now and then before."""

from __future__ import annotations

import asyncio
import platform
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from service.engine_thread import EngineThread
from service.server import poster
from tests.service.fake_engine import FakeEngine
from tests.service.test_session import opened, send_seconds, until

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

assert KEEP is None or keep_freed_memory()
thread = threading.Thread(target=on_a_thread_of_its_own)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    kept, given_back, kept_again = kept_mb(_STEP.replace("KEEP", "True"))
    assert kept > 40
    assert given_back < 10
    assert kept_again > 40


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
def test_a_process_that_was_not_told_to_keep_memory_does_not_begin_to_when_it_gives_some_back() -> None:
    _, given_back, kept_again = kept_mb(_STEP.replace("KEEP", "None"))
    assert given_back < 10
    assert kept_again < 10


def kept_mb(script: str) -> list[float]:
    """What it prints."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return list(map(float, done.stdout.split()))


@asynccontextmanager
async def tidying() -> AsyncIterator[tuple[EngineThread, list[int]]]:
    """An engine thread, and how many streams there were each time it tidied."""
    tidied: list[int] = []
    engine = FakeEngine()
    thread = EngineThread(
        engine,  # type: ignore[arg-type]
        poster(asyncio.get_running_loop()),
        tidy=lambda: tidied.append(len(engine.streams)),
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
        await until(lambda: tidied == [0])
        await asyncio.sleep(0.3)
        assert tidied == [0]


async def test_a_thread_that_is_never_idle_tidies_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine_thread._TIDY_EVERY_S", 0.2)
    async with tidying() as (thread, tidied):
        session = await opened(thread)
        for _ in range(12):
            await send_seconds(session, 1)
            await asyncio.sleep(0.05)
        assert 2 <= len(tidied) <= 5
        assert set(tidied) == {1}
