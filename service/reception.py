"""Lets streams in and out, whatever their protocol: admission, a worker, a log line, figures, and the end of all."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import grpc

from service.errors import StreamError, to_stream_error
from service.logs import stream_id
from service.session import Session
from service.tracing import span

if TYPE_CHECKING:
    from service.admission import Admission
    from service.auth import Clients
    from service.config import ServeConfig
    from service.engine_thread import EngineThread
    from service.metrics import Metrics
    from service.session import StreamRequest

log = logging.getLogger(__name__)


class Reception:
    """Belongs to the event loop."""

    def __init__(
        self, admission: Admission[EngineThread], clients: Clients, metrics: Metrics, config: ServeConfig
    ) -> None:
        self._admission, self._clients, self._metrics = admission, clients, metrics
        self._limits, self._log_transcripts = config.limits, config.log.transcripts
        self._sessions: set[Session] = set()
        self._draining = False

    @property
    def open_streams(self) -> int:
        """Streams being served now."""
        return len(self._sessions)

    def drain(self) -> None:
        """From now on new streams are refused with UNAVAILABLE; running ones go on."""
        self._draining = True

    def end_all(self) -> None:
        """Ends the running streams with UNAVAILABLE."""
        for session in list(self._sessions):
            session.fail(_shutting_down())

    @asynccontextmanager
    async def stream(self, context: grpc.aio.ServicerContext, request: StreamRequest) -> AsyncIterator[Session]:
        """A session for one call, closed and accounted for when the block ends, however it ends.

        The trailing metadata of the call gets `x-stream-id`, the id that log lines carry. Raises StreamError: draining
        or not admitted.
        """
        if self._draining:
            self._metrics.refused("draining")
            raise _shutting_down()
        client = self._clients.identify(context)
        ticket = self._admission.admit(client)
        self._metrics.opened()
        identity, begin, code = secrets.token_hex(8), time.monotonic(), grpc.StatusCode.OK
        stream_id.set(identity)
        context.set_trailing_metadata((("x-stream-id", identity),))
        session: Session | None = None
        log.info("stream opened", extra={"client": client})
        with span("asr_exit.stream", {"asr_exit.stream_id": identity, "asr_exit.client": client}) as current:
            try:
                on_final = partial(_log_transcript, identity) if self._log_transcripts else None
                release = partial(self._admission.release, ticket)
                session = Session(request, ticket.worker, self._limits, on_final=on_final, on_slot_free=release)
                self._sessions.add(session)
                session.open()
                yield session
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except Exception as error:
                failure = to_stream_error(error)
                code = failure.code
                if failure is not error and code is grpc.StatusCode.INTERNAL:
                    log.error("stream failed", exc_info=error)
                raise failure from error
            finally:
                audio_s = 0.0
                if session is not None:
                    session.close()
                    self._sessions.discard(session)
                    audio_s = session.processed_s
                self._admission.release(ticket)
                self._metrics.ended(code.name)
                current.set_attribute("asr_exit.audio_seconds", audio_s)
                current.set_attribute("rpc.grpc.status_code", code.value[0])
                seconds = round(time.monotonic() - begin, 3)
                log.info("stream ended", extra={"code": code.name, "audio_s": round(audio_s, 2), "seconds": seconds})


def _log_transcript(identity: str, text: str) -> None:
    log.info("final text", extra={"stream": identity, "text": text})


def _shutting_down() -> StreamError:
    return StreamError(grpc.StatusCode.UNAVAILABLE, "the server is shutting down: connect again later")
