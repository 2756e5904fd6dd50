"""A wait that takes too long ends; others, and cancellation from outside, are not touched."""

from __future__ import annotations

import asyncio

import pytest

from service.patience import Patience


async def test_a_wait_that_takes_too_long_ends_although_others_went_well() -> None:
    patience = Patience(0.05)
    for _ in range(4):
        with patience:
            await asyncio.sleep(0.02)
    with pytest.raises(TimeoutError), patience:
        await asyncio.sleep(5)
    with patience:  # it serves again
        await asyncio.sleep(0)
    patience.close()


async def test_time_between_waits_does_not_count() -> None:
    patience = Patience(0.03)
    with patience:
        await asyncio.sleep(0)
    await asyncio.sleep(0.06)
    with patience:
        await asyncio.sleep(0.01)
    patience.close()


async def test_cancellation_from_outside_stays_what_it_is() -> None:
    async def wait() -> None:
        with Patience(5.0):
            await asyncio.sleep(5)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_errors_pass_through() -> None:
    with pytest.raises(ValueError, match="other"), Patience(5.0):
        raise ValueError("other")


async def test_cancellation_from_outside_wins_over_a_limit_reached_before_it_is_delivered() -> None:
    async def wait() -> None:
        patience = Patience(5.0)
        patiences.append(patience)
        with patience:
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
