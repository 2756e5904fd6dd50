"""Engines and the event loop take turns where they share the cores."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from asr_exit.checkpoint import Model
from asr_exit.recognizer import Recognizer
from asr_exit.stream import StreamOptions
from service.audio_input import AudioFormat
from service.background import BackgroundServer
from service.client import Caption, SpeechClient, StreamSettings
from service.engine_thread import EngineThread
from service.event_loop import EventLoop, RationedSelector, run
from service.feed import NOBODY, Audio, Feed, Flush, Open
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
        assert 0.03 < looks(selector) < 0.1


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


@pytest.mark.parametrize("heard_s", [None, 1.0, 0.02])
def test_a_look_is_soon_where_a_stream_may_have_sent_more(selector: RationedSelector, heard_s: float | None) -> None:
    """One message of a stream is seen at each look: too few looks, and it falls behind more and more."""
    selector.turns = turns = Turns(1)
    with in_a_step(turns, 0.3):
        if heard_s is not None:
            turns.heard(heard_s)
        first_s, second_s = looks(selector), looks(selector)
    assert second_s > 0.04
    assert first_s < 0.02 if heard_s == 0.02 else first_s > 0.04


def test_audio_tells_the_turns_how_often_it_comes() -> None:
    heard: list[float] = []
    turns = Turns(1)
    turns.heard = heard.append  # type: ignore[method-assign]
    thread = EngineThread(FakeEngine(), lambda events: None, turns=turns)  # type: ignore[arg-type]
    feed = Feed(StreamOptions(), AudioFormat("linear16", 16_000), NOBODY)
    for command in (Open(), Audio(b"", 10.0), Audio(b"", 10.5), Flush(), Audio(b"", 10.75)):
        thread.submit(feed, command)
    assert heard == [float("inf"), 0.5, 0.25]


def test_calls_do_not_queue_up_behind_steps(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC hands over one call at each look. With a look for each step they came late, and load went unnoticed."""
    monkeypatch.setattr("service.server.usable_cores", lambda: 1)
    made: list[Turns] = []
    monkeypatch.setattr("service.server.Turns", lambda engines: made.append(Turns(engines)) or made[-1])
    with BackgroundServer(model, serve_config()) as server, grpc.insecure_channel(server.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        check(health_pb2.HealthCheckRequest())
        made[0].begin()  # a step without an end
        begin = time.monotonic()
        answers = [check.future(health_pb2.HealthCheckRequest()) for _ in range(100)]
        assert {answer.result(30).status for answer in answers} == {health_pb2.HealthCheckResponse.SERVING}
        took_s = time.monotonic() - begin
        made[0].end(posted=False)
    assert took_s < 0.75


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
