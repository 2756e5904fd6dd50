"""The RPCs of asr_exit.v1.Speech: order of messages, one reader and one writer per stream, status codes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from asr_exit.budget import Budget
from service import wire
from service.dialect import Dialect, EndUtterance, NativeDialect
from service.errors import StreamError, invalid, to_stream_error, undecodable
from service.pb import speech_pb2 as pb
from service.pb import speech_pb2_grpc
from service.session import Session, StreamRequest

if TYPE_CHECKING:
    from asr_exit.checkpoint import Model
    from service.config import ServeConfig
    from service.engine_thread import EngineThread
    from service.language_model import ServedLanguageModel
    from service.outbox import Update

log = logging.getLogger(__name__)


class SpeechServicer(speech_pb2_grpc.SpeechServicer):
    """Runs every RPC on the event loop; recognition itself happens on the engine thread."""

    def __init__(
        self,
        model: Model,
        engine: EngineThread,
        config: ServeConfig,
        description: pb.Model,
        language_model: ServedLanguageModel,
    ) -> None:
        self._model = model
        self._engine = engine
        self._config = config
        self._description = description
        self._language_model = language_model
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

    async def StreamingRecognize(
        self, request_iterator: AsyncIterator[pb.StreamingRecognizeRequest], context: grpc.aio.ServicerContext
    ):
        """See speech.proto."""
        await self.converse(context, NativeDialect(self._model, self._config.stream))

    async def converse(self, context: grpc.aio.ServicerContext, dialect: Dialect) -> None:
        """Serves one streaming call, whatever its protocol."""
        session: Session | None = None
        try:
            session = await self._open(context, dialect)
            reader = asyncio.create_task(self._read(context, session, dialect))
            try:
                await self._write(context, session, dialect)
            finally:
                reader.cancel()
        except StreamError as error:
            self._release(session)  # first: the status waits behind results that the client does not read
            await context.abort(error.code, error.message)
        finally:
            self._release(session)

    async def recognize(
        self, context: grpc.aio.ServicerContext, configure: Callable[[], StreamRequest], audio: bytes
    ) -> list[Update]:
        """Serves one call that carries all its audio: returns the final updates, or ends the call with a status."""
        session: Session | None = None
        try:
            session = await self._start(context, configure)
            sender = asyncio.create_task(self._send_all(session, audio))
            updates = []
            try:
                while (update := await session.receive()) is not None:
                    updates.append(update)
            finally:
                sender.cancel()
            return updates
        except StreamError as error:
            await context.abort(error.code, error.message)
            raise  # abort does not return
        finally:
            self._release(session)

    async def GetModel(self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext) -> pb.Model:
        """See speech.proto."""
        try:
            wire.check_model_name(request.name, self._model)
        except StreamError as error:
            await context.abort(error.code, error.message)
        return self._description

    async def _open(self, context: grpc.aio.ServicerContext, dialect: Dialect) -> Session:
        message = await self._next(context)
        if message is None:
            raise invalid("the stream ended before its configuration: send streaming_config in the first message")
        return await self._start(context, partial(dialect.configure, message))

    async def _start(self, context: grpc.aio.ServicerContext, configure: Callable[[], StreamRequest]) -> Session:
        if self._draining:
            raise _shutting_down()
        try:
            request = configure()
            budget = wire.budget_in_metadata(context.invocation_metadata())
            if budget is not None and request.options.budget == Budget():
                request = replace(request, options=replace(request.options, budget=budget))
            options = self._language_model.apply(request.language_model_weight, request.options)
            request = replace(request, options=options)
            session = Session(request, self._engine, self._config.limits)
        except Exception as error:
            raise _reported(error) from error
        self._sessions.add(session)
        try:
            await session.open()
        except BaseException:
            self._release(session)
            raise
        return session

    def _release(self, session: Session | None) -> None:
        if session is not None:
            session.close()
            self._sessions.discard(session)

    async def _read(self, context: grpc.aio.ServicerContext, session: Session, dialect: Dialect) -> None:
        """Client to engine; ends the session with an error instead of raising."""
        try:
            while (message := await self._next(context)) is not None:
                for part in dialect.parts(message):
                    if isinstance(part, Budget):
                        session.set_budget(part)
                    elif isinstance(part, EndUtterance):
                        await session.flush()
                    else:
                        await session.send_audio(part)
            await session.end_audio()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            session.fail(_reported(error))

    async def _send_all(self, session: Session, audio: bytes) -> None:
        """All of a call's audio to the engine; ends the session with an error instead of raising."""
        try:
            size = self._config.limits.message_bytes
            for start in range(0, len(audio), size):
                await session.send_audio(audio[start : start + size])
            await session.end_audio()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            session.fail(_reported(error))

    async def _write(self, context: grpc.aio.ServicerContext, session: Session, dialect: Dialect) -> None:
        """Engine to client."""
        while (update := await session.receive()) is not None:
            message = dialect.respond(update)
            if message is not None:
                await self._send(context, message)

    async def _send(self, context: grpc.aio.ServicerContext, message: Any) -> None:
        """Waits for a client that reads slowly, but not for ever."""
        idle_s = self._config.limits.idle_s
        try:
            async with asyncio.timeout(idle_s):
                await context.write(message)
        except TimeoutError:
            raise StreamError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"no result was read for {idle_s:g} s: read results while sending audio",
            ) from None

    async def _next(self, context: grpc.aio.ServicerContext) -> Any | None:
        """The next request, or None when the client closed its side."""
        idle_s = self._config.limits.idle_s
        try:
            async with asyncio.timeout(idle_s):
                request = await context.read()
        except TimeoutError:
            raise StreamError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"nothing was sent for {idle_s:g} s: send audio, silence included, or close the stream",
            ) from None
        except DecodeError:
            raise undecodable() from None
        return None if request is grpc.aio.EOF else request


def _reported(error: Exception) -> StreamError:
    converted = to_stream_error(error)
    if converted.code is grpc.StatusCode.INTERNAL:
        log.error("stream failed", exc_info=error)
    return converted


def _shutting_down() -> StreamError:
    return StreamError(grpc.StatusCode.UNAVAILABLE, "the server is shutting down: connect again later")
