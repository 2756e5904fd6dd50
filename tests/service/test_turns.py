"""Engines and the event loop take turns where they share the cores."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from asr_exit.checkpoint import Model
from asr_exit.recognizer import Recognizer
from service.background import BackgroundServer
from service.client import Caption, SpeechClient, StreamSettings
from service.engine_thread import EngineThread
from service.event_loop import EventLoop, RationedSelector, run
from service.server import poster
from service.turns import Turns
from tests.conftest import babble
from tests.service.conftest import parts, pcm16, serve_config
from tests.service.fake_engine import FakeEngine


def as_heard(seed: int) -> np.ndarray:
    """What a server makes of such a recording's 16 bits."""
    return np.frombuffer(pcm16(babble(4.0, seed)), dtype="<i2").astype(np.float32) / 32768


def text_of(captions: list[Caption]) -> str:
    """The final text."""
    return " ".join(caption.text for caption in captions if caption.is_final and caption.text)


@contextmanager
def in_a_step(turns: Turns, seconds: float) -> Iterator[None]:
    """An engine in a step for so long."""

    def step() -> None:
        turns.begin()
        begun.set()
        time.sleep(seconds)
        turns.end(posted=False)

    begun, thread = threading.Event(), threading.Thread(target=step)
    thread.start()
    begun.wait()
    yield
    thread.join()


def looks(selector: RationedSelector, timeout: float | None = None) -> float:
    """Looks for an event that is there; returns how long that took."""
    begin = time.monotonic()
    assert selector.select(timeout)
    return time.monotonic() - begin


@pytest.fixture
def selector() -> Iterator[RationedSelector]:
    ours, theirs = socket.socketpair()
    with ours, theirs, RationedSelector(interval_s=0.002, burst=0) as selector:
        selector.register(ours, 1)
        theirs.send(b"x")
        selector.select(None)
        yield selector


def test_a_look_waits_for_the_end_of_a_step(selector: RationedSelector) -> None:
    selector.turns = Turns(1)
    assert looks(selector) < 0.02
    with in_a_step(selector.turns, 0.06):
        assert 0.03 < looks(selector) < 0.09
        assert looks(selector) < 0.02


def test_but_not_for_ever_and_not_beyond_a_timer(selector: RationedSelector) -> None:
    selector.turns = Turns(1)
    with in_a_step(selector.turns, 0.3):
        assert looks(selector, 0.02) < 0.05
        assert 0.08 < looks(selector) < 0.15


def test_an_engine_without_a_step_keeps_the_loop_looking(selector: RationedSelector) -> None:
    selector.turns = Turns(2)
    with in_a_step(selector.turns, 0.06):
        assert looks(selector) < 0.02
        with in_a_step(selector.turns, 0.06):
            assert looks(selector) > 0.02


def test_an_engine_without_answers_waits_for_nobody_and_with_them_not_for_ever() -> None:
    turns = Turns(1)
    for posted, least_s, most_s in ((False, 0.0, 0.01), (True, 0.015, 0.1)):
        turns.begin()
        begin = time.monotonic()
        turns.end(posted)
        assert least_s <= time.monotonic() - begin < most_s


def test_an_engine_goes_on_when_its_answers_are_out() -> None:
    """Each step's event has run before the next begins, and that is not a matter of waiting long enough."""
    order, took = [], []

    def steps(turns: Turns, loop: asyncio.AbstractEventLoop) -> None:
        post = poster(loop)
        for number in range(5):
            turns.begin()
            order.append(f"step {number}")
            post([lambda number=number: order.append(f"answer {number}")])  # type: ignore[misc]
            begin = time.monotonic()
            turns.end(posted=True)
            took.append(time.monotonic() - begin)

    async def main() -> None:
        loop, turns = asyncio.get_running_loop(), Turns(1)
        assert isinstance(loop, EventLoop)
        loop.take_turns(turns)
        await asyncio.to_thread(steps, turns, loop)

    run(main())
    assert order == [f"{what} {number}" for number in range(5) for what in ("step", "answer")]
    assert sorted(took)[2] < 0.01


def test_an_engine_that_hardly_rests_takes_no_turns() -> None:
    """Otherwise messages would be noticed late on a busy server, and nobody would know that it is overloaded."""
    begun, now = [], 0.0
    turns = Turns(1)
    turns.begin = lambda: begun.append(now)  # type: ignore[method-assign]
    turns.end = lambda posted: None  # type: ignore[method-assign]
    thread = EngineThread(FakeEngine(), lambda events: None, turns=turns, clock=lambda: now)  # type: ignore[arg-type]
    for second, waited_s in enumerate((0.0, 0.1, 0.1, 0.5, 0.2)):
        now = float(second)
        thread._waited_s = waited_s
        thread._take_turn([])
    assert begun == [0.0, 3.0]


@pytest.mark.parametrize("cores", [1, 2])
def test_a_server_takes_turns_where_its_engine_needs_all_cores(
    model: Model, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    """And hears the same."""
    monkeypatch.setattr("service.server.usable_cores", lambda: cores)
    taken = []
    monkeypatch.setattr(Turns, "begin", lambda self, begin=Turns.begin: taken.append(begin(self)))
    texts = {seed: Recognizer(model).transcribe(as_heard(seed)).text for seed in range(6)}
    with BackgroundServer(model, serve_config()) as server, SpeechClient(server.address) as client:

        def recognise(seed: int) -> str:
            return text_of(list(client.stream(parts(pcm16(babble(4.0, seed))), StreamSettings(policy="full"))))

        with ThreadPoolExecutor(len(texts)) as threads:
            assert list(threads.map(recognise, texts)) == list(texts.values())
    assert bool(taken) == (cores == 1)
