"""A wait that takes too long ends; others, and cancellation from outside, are not touched."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from service.errors import StreamError
from service.patience import Patience


async def test_a_wait_that_takes_too_long_ends_although_others_went_well() -> None:
    async def wait_too_long() -> None:
        with patience:
            patience.begin()
            await asyncio.sleep(5)

    patience = Patience(0.05, "say something")
    with patience:
        for _ in range(4):
            patience.begin()
            await asyncio.sleep(0.02)
            patience.end()
    with pytest.raises(StreamError, match="say something") as caught:
        await wait_too_long()
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    with patience:  # it serves again
        patience.begin()
        await asyncio.sleep(0)
    patience.close()


async def test_a_wait_ends_in_time_whenever_it_began() -> None:
    async def wait_too_long() -> None:
        with patience:
            await asyncio.sleep(0.17)  # the timer has rung by now
            patience.begin()
            begun_at.append(loop.time())
            await asyncio.sleep(5)

    patience, loop, begun_at = Patience(0.1, ""), asyncio.get_running_loop(), list[float]()
    with pytest.raises(StreamError):
        await wait_too_long()
    assert 0.09 <= loop.time() - begun_at[0] < 0.19
    patience.close()


async def test_time_between_waits_does_not_count() -> None:
    patience = Patience(0.03, "")
    with patience:
        patience.begin()
        await asyncio.sleep(0)
        patience.end()
        await asyncio.sleep(0.08)
        patience.begin()
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.06)
    patience.close()


async def test_cancellation_from_outside_stays_what_it_is() -> None:
    async def wait() -> None:
        with Patience(5.0, "") as patience:
            patience.begin()
            await asyncio.sleep(5)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_errors_pass_through() -> None:
    with pytest.raises(ValueError, match="other"), Patience(5.0, ""):
        raise ValueError("other")


async def test_cancellation_from_outside_wins_over_a_limit_reached_before_it_is_delivered() -> None:
    async def wait() -> None:
        patience = Patience(5.0, "")
        patiences.append(patience)
        with patience:
            patience.begin()
            await asyncio.sleep(5)

    patiences: list[Patience] = []
    task = asyncio.create_task(wait())
    await asyncio.sleep(0.01)
    patiences[0]._deadline = 0.0
    task.cancel()
    patiences[0]._ring()  # in the same turn of the loop
    with pytest.raises(asyncio.CancelledError):
        await task
    patiences[0].close()
