"""What a stream held is gone with the stream: nothing waits for the garbage collector, however the stream ended."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import service.reception
from service.background import BackgroundServer
from service.client import ServiceError, SpeechClient, StreamSettings
from service.session import Session
from tests.conftest import babble
from tests.service.conftest import parts, pcm16

DATA = pcm16(babble(1.5))


def whole(client: SpeechClient) -> None:
    """A stream to its end."""
    assert list(client.stream(parts(DATA)))[-1].is_final


def left(client: SpeechClient) -> None:
    """Cancelled after the first result."""
    captions = client.stream(parts(DATA, 640))
    next(captions)
    captions.close()  # type: ignore[attr-defined]


def wrong(client: SpeechClient) -> None:
    """Ended by the server: half a sample."""
    with pytest.raises(ServiceError):
        list(client.stream([*parts(DATA), b"123"], StreamSettings()))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[weakref.WeakSet[Any]]:
    """The sessions that the server opens and the feeds that their audio goes through, as long as they live."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Watched(Session):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            alive.update((self, self._feed))

    monkeypatch.setattr(service.reception, "Session", Watched)
    gc.disable()
    yield alive
    gc.enable()


@pytest.mark.parametrize("use", [whole, left, wrong])
def test_nothing_is_left_for_the_collector(
    server: BackgroundServer, held: weakref.WeakSet[Any], use: Callable[[SpeechClient], None]
) -> None:
    with SpeechClient(server.address) as client:
        use(client)
        deadline = time.monotonic() + 10
        while held and time.monotonic() < deadline:
            time.sleep(0.02)
    assert not list(held)
