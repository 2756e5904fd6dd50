"""Looks for events are rationed only when they come thick, and no event is missed."""

from __future__ import annotations

import asyncio
import functools
import socket

import grpc

from service.event_loop import EventLoop, RationedSelector, run


class FakeTime:
    def __init__(self) -> None:
        self.now_s, self.slept = 100.0, []

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


def selector_with_event(time: FakeTime, burst: int) -> tuple[RationedSelector, list[socket.socket]]:
    ours, theirs = socket.socketpair()
    selector = RationedSelector(0.005, burst, time.clock, time.sleep)
    selector.register(ours, 1)
    theirs.send(b"x")  # never read: every look finds it
    return selector, [ours, theirs]


def test_looks_in_a_burst_are_free_and_later_ones_keep_their_distance() -> None:
    time = FakeTime()
    selector, sockets = selector_with_event(time, burst=3)
    begin = time.now_s
    for _ in range(13):
        assert selector.select(None)
    assert max(time.slept) <= 0.0051
    assert len(time.slept) >= 9  # all but the burst and what rounding lets through
    assert 0.04 <= time.now_s - begin <= 0.051
    time.now_s += 1.0  # nothing for a second: the burst is saved up again
    time.slept.clear()
    for _ in range(3):
        selector.select(None)
    assert not time.slept
    for each in sockets:
        each.close()
    selector.close()


def test_a_look_between_two_tasks_and_a_timer_wait_for_nothing() -> None:
    time = FakeTime()
    selector, sockets = selector_with_event(time, burst=0)
    for _ in range(5):
        selector.select(0)
    assert not time.slept
    for _ in range(3):
        selector.select(0.002)  # a timer rings then
    assert max(time.slept) <= 0.002
    for each in sockets:
        each.close()
    selector.close()


def test_one_call_of_grpc_stands_for_all_its_bytes() -> None:
    """The socket is made as gRPC's is: not blocking, a byte per event, a byte read per call."""
    calls = []

    class Queue:
        def __init__(self, wakes: socket.socket) -> None:
            self.wakes = wakes

        def handle(self, _: object) -> None:
            calls.append(self.wakes.recv(1))

    Queue.__module__ = "grpc._cython.cygrpc"
    reading, writing = socket.socketpair()
    reading.setblocking(False)

    async def main() -> None:
        asyncio.get_running_loop().add_reader(reading, functools.partial(Queue(reading).handle, None))
        writing.send(b"12345")
        await asyncio.sleep(0.05)
        assert calls == [b"5"]
        writing.send(b"6")
        await asyncio.sleep(0.05)
        assert calls == [b"5", b"6"]
        asyncio.get_running_loop().remove_reader(reading)

    run(main())
    reading.close()
    writing.close()


def test_the_bytes_of_others_are_left_alone() -> None:
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    got = []

    async def main() -> None:
        asyncio.get_running_loop().add_reader(reading, lambda: got.append(reading.recv(1)))
        writing.send(b"123")
        await asyncio.sleep(0.05)
        asyncio.get_running_loop().remove_reader(reading)

    run(main())
    assert got == [b"1", b"2", b"3"]
    reading.close()
    writing.close()


def test_grpc_wakes_the_loop_through_a_reader_that_is_recognised() -> None:
    """Otherwise the loop still works, only slower: this says when gRPC changes it."""
    recognised = []

    class Watched(EventLoop):
        def add_reader(self, fd, callback, *args):
            super().add_reader(fd, callback, *args)
            recognised.append("_once" in repr(self._selector.get_key(fd).data[0]))

    async def main() -> None:
        server = grpc.aio.server()
        server.add_insecure_port("127.0.0.1:0")
        await server.start()
        await server.stop(None)

    with asyncio.Runner(loop_factory=Watched) as runner:
        runner.run(main())
    assert recognised == [True]
