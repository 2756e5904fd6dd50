"""Who gets in: slots, clients, memory, overload; and when the refused should come back."""

from __future__ import annotations

import grpc
import pytest

from asr_exit.checkpoint import Model
from service.admission import Admission
from service.background import BackgroundServer
from service.client import ServiceError, SpeechClient
from service.config import LimitsConfig
from service.errors import StreamError
from tests.conftest import babble
from tests.service.conftest import parts, pcm16, serve_config

DATA = pcm16(babble(2.0))


class World:
    """Everything that admission looks at."""

    def __init__(self, workers: str = "a", **limits: int) -> None:
        self.now, self.resident_mb, self.overloaded = 0.0, 10.0, False
        self.refused: list[str] = []
        self.admission = Admission(
            workers,
            LimitsConfig(**limits),
            overloaded=lambda: self.overloaded,
            resident_mb=lambda: self.resident_mb,
            on_refused=self.refused.append,
            clock=lambda: self.now,
        )

    def refusal(self, client: str = "me") -> StreamError:
        with pytest.raises(StreamError) as caught:
            self.admission.admit(client)
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        return caught.value


def test_streams_go_where_the_fewest_are() -> None:
    world = World("abc", streams=7)
    tickets = [world.admission.admit("me") for _ in range(6)]
    assert sorted(ticket.worker for ticket in tickets) == list("aabbcc")
    for ticket in tickets:
        if ticket.worker == "b":
            world.admission.release(ticket)
            world.admission.release(ticket)  # twice is once
    assert world.admission.streams == 4
    assert [world.admission.admit("me").worker for _ in range(2)] == ["b", "b"]


def test_full() -> None:
    world = World(streams=2)
    first, _ = world.admission.admit("me"), world.admission.admit("you")
    assert "all 2 stream slots" in world.refusal().message
    world.admission.release(first)
    world.admission.admit("me")
    assert world.refused == ["slots"]


def test_one_client_cannot_take_everything() -> None:
    world = World(streams=9, streams_per_client=2)
    ticket, _ = world.admission.admit("me"), world.admission.admit("me")
    assert "2 streams, the most allowed" in world.refusal().message
    world.admission.admit("you")
    world.admission.release(ticket)
    world.admission.admit("me")
    assert world.refused == ["client"]


def test_short_of_memory_until_it_is_given_back() -> None:
    world = World(memory_mb=100)
    world.resident_mb = 101.0
    assert "memory" in world.refusal().message
    world.resident_mb = 99.0
    world.refusal()  # measured a moment ago
    world.now += 1.0
    world.admission.admit("me")


def test_a_machine_with_nothing_left_to_shed_takes_nobody() -> None:
    world = World()
    world.overloaded = True
    world.refusal()
    world.overloaded = False
    world.admission.admit("me")
    assert world.refused == ["load"]


def test_the_retry_hint_follows_how_long_streams_last() -> None:
    world = World(streams=4)
    for _ in range(60):
        ticket = world.admission.admit("me")
        world.now += 8.0
        world.admission.release(ticket)
    for _ in range(4):
        world.admission.admit("me")
    assert world.refusal().retry_after_ms == pytest.approx(2000, rel=0.05)


def test_the_hint_reaches_the_client(model: Model) -> None:
    limits = {"streams": 4, "streams_per_client": 1}
    with BackgroundServer(model, serve_config(limits=limits)) as server, SpeechClient(server.address) as client:
        running = client.stream(iter(parts(DATA) + [DATA] * 20))
        next(running)
        with pytest.raises(ServiceError, match="most allowed") as caught:
            list(client.stream(parts(DATA)))
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        assert caught.value.retry_after_ms is not None
        assert 100 <= caught.value.retry_after_ms <= 30_000
        running.close()


def test_a_stream_that_is_too_long(model: Model) -> None:
    with (
        BackgroundServer(model, serve_config(limits={"stream_s": 1.5})) as server,
        SpeechClient(server.address) as client,
        pytest.raises(ServiceError, match=r"OUT_OF_RANGE: more than 1.5 s"),
    ):
        list(client.stream(parts(DATA)))
