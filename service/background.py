"""A server in a thread of this process: for the demo, for notebooks and for tests."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import TYPE_CHECKING

from service.event_loop import run
from service.server import SpeechServer

if TYPE_CHECKING:
    from asr_exit.checkpoint import Model
    from asr_exit.engine import Engine
    from service.config import ServeConfig


class BackgroundServer:
    """Context manager; `address` is where it listens. Raises what starting raised."""

    def __init__(self, model: Model, config: ServeConfig, engine: Engine | None = None) -> None:
        self.server = SpeechServer(model, config, engine)
        self._host = config.listen.host
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=lambda: run(self._main()), name="asr-exit-server")

    def __enter__(self) -> BackgroundServer:
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            self.address = f"{self._host}:{await self.server.start()}"
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._ready.set()
        await self._stop.wait()
        await self.server.stop()
