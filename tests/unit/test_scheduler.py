"""Which streams go into a step and when, on a fake clock and with names for streams."""

from __future__ import annotations

import random

import pytest

from asr_exit.errors import ConfigError
from asr_exit.scheduler import Batching, Scheduler


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def scheduler(max_batch: int = 4, max_wait_ms: float = 10.0) -> tuple[Scheduler[str], Clock]:
    clock = Clock()
    return Scheduler(Batching(max_batch, max_wait_ms), clock), clock


def test_the_longest_due_go_first_and_the_rest_waits() -> None:
    queue, _ = scheduler(max_batch=2)
    for name, due in {"c": 3.0, "a": 1.0, "d": 4.0, "b": 2.0}.items():
        queue.offer(name, due)
    assert [queue.take(), queue.take(), queue.take()] == [["a", "b"], ["c", "d"], []]


def test_equal_due_times_are_served_in_order_of_arrival() -> None:
    queue, _ = scheduler()
    for name in ("z", "m", "a"):
        queue.offer(name, 1.0)
    assert queue.take() == ["z", "m", "a"]


def test_a_step_waits_for_company_but_not_long() -> None:
    queue, clock = scheduler()
    assert queue.wait_s(open_streams=3) is None
    queue.offer("a", 0.0)
    assert queue.wait_s(open_streams=3) == pytest.approx(0.010)
    clock.now += 0.006
    queue.offer("b", 0.0)  # a newcomer does not prolong the wait
    assert queue.wait_s(open_streams=3) == pytest.approx(0.004)
    clock.now += 0.005
    assert queue.wait_s(open_streams=3) == 0.0


@pytest.mark.parametrize(("ready", "open_streams"), [(1, 1), (3, 3), (4, 100), (9, 100)])
def test_nobody_waits_when_no_one_can_join(ready: int, open_streams: int) -> None:
    queue, _ = scheduler(max_batch=4)
    for number in range(ready):
        queue.offer(str(number), 0.0)
    assert queue.wait_s(open_streams) == 0.0


def test_streams_that_left_are_not_served_and_may_come_back() -> None:
    queue, _ = scheduler()
    for name in "abc":
        queue.offer(name, ord(name))
    queue.withdraw("b")
    queue.withdraw("nobody")
    queue.offer("b", 0.0)
    queue.withdraw("a")
    assert queue.take() == ["b", "c"]
    assert len(queue) == 0


def test_offering_twice_serves_once_at_the_first_due_time() -> None:
    queue, _ = scheduler()
    queue.offer("a", 5.0)
    queue.offer("b", 4.0)
    queue.offer("a", 1.0)
    assert queue.take() == ["b", "a"]
    assert queue.take() == []


@pytest.mark.parametrize(("ready", "sizes"), [(5, [5]), (11, [8, 3]), (39, [20, 16, 3]), (21, [20, 1])])
def test_batches_come_in_few_sizes_and_leave_nobody_behind(ready: int, sizes: list[int]) -> None:
    queue, _ = scheduler(max_batch=20)
    for number in range(ready):
        queue.offer(f"{number:02d}", float(number))
    batches = [queue.take() for _ in sizes]
    assert [len(batch) for batch in batches] == sizes
    assert [name for batch in batches for name in batch] == [f"{number:02d}" for number in range(ready)]


def test_a_queue_of_leavers_does_not_grow() -> None:
    queue, _ = scheduler()
    for number in range(10_000):
        queue.offer(str(number), float(number))
        queue.withdraw(str(number))
    assert len(queue._heap) <= 16


def test_nobody_starves_and_nobody_is_served_twice() -> None:
    rng = random.Random(1)
    queue, clock = scheduler(max_batch=3)
    due = {str(number): rng.random() for number in range(10)}
    offered: dict[str, float] = {}
    for _ in range(500):
        clock.now += 0.1
        for name in due:
            if name not in offered and rng.random() < 0.3:
                offered[name] = due[name] = due[name] + 0.64
                queue.offer(name, due[name])
        oldest = sorted(offered, key=offered.__getitem__)[:3]
        assert queue.take() == oldest
        for name in oldest:
            del offered[name]


@pytest.mark.parametrize(("max_batch", "max_wait_ms"), [(0, 1.0), (1, -1.0), (1, float("nan"))])
def test_values_out_of_range(max_batch: int, max_wait_ms: float) -> None:
    with pytest.raises(ConfigError, match="must be"):
        Batching(max_batch, max_wait_ms)
