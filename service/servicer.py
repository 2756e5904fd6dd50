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
from service.dialect import Dialect, NativeDialect
from service.errors import StreamError, abort, invalid, to_stream_error
from service.patience import Patience
from service.pb import speech_pb2 as pb
from service.pb import speech_pb2_grpc

if TYPE_CHECKING:
    from asr_exit.checkpoint import Model
    from service.config import ServeConfig
    from service.language_model import ServedLanguageModel
    from service.outbox import Update
    from service.reception import Reception
    from service.session import Session, StreamRequest

log = logging.getLogger(__name__)


class SpeechServicer(speech_pb2_grpc.SpeechServicer):
    """Runs every RPC on the event loop; recognition itself happens on the engine thread."""

    def __init__(
        self,
        model: Model,
        reception: Reception,
        config: ServeConfig,
        description: pb.Model,
        language_model: ServedLanguageModel,
    ) -> None:
        self._model = model
        self._reception = reception
        self._config = config
        self._description = description
        self._language_model = language_model

    async def StreamingRecognize(
        self, request_iterator: AsyncIterator[pb.StreamingRecognizeRequest], context: grpc.aio.ServicerContext
    ):
        """See speech.proto."""
        await self.converse(context, NativeDialect(self._model, self._config.stream))

    async def converse(self, context: grpc.aio.ServicerContext, dialect: Dialect) -> None:
        """Serves one streaming call, whatever its protocol."""
        idle_s = self._config.limits.idle_s
        reading = Patience(
            idle_s, f"nothing was sent for {idle_s:g} s: send audio, silence included, or close the stream"
        )
        writing = Patience(idle_s, f"no result was read for {idle_s:g} s: read results while sending audio")
        try:
            await self._converse(context, dialect, reading, writing)
        except StreamError as error:  # the session is closed: the status waits behind results the client does not read
            await abort(context, error)
        finally:
            reading.close()
            writing.close()

    async def _converse(
        self, context: grpc.aio.ServicerContext, dialect: Dialect, reading: Patience, writing: Patience
    ) -> None:
        """Raises StreamError. Apart from `converse`, whose frame an aborted call keeps for the garbage collector."""
        message = await self._first(context, reading)
        if message is grpc.aio.EOF:
            raise invalid("the stream ended before its configuration: send streaming_config in the first message")
        request = self._complete(context, partial(dialect.configure, message))
        async with self._reception.stream(context, request) as session:
            reader = asyncio.create_task(self._read(context, session, dialect, reading))
            try:
                await self._write(context, session, dialect, writing)
            finally:
                reader.cancel()

    async def recognize(
        self, context: grpc.aio.ServicerContext, configure: Callable[[], StreamRequest], audio: bytes
    ) -> list[Update]:
        """Serves one call that carries all its audio: returns the final updates, or ends the call with a status."""
        try:
            updates = []
            async with self._reception.stream(context, self._complete(context, configure)) as session:
                sender = asyncio.create_task(self._send_all(session, audio))
                try:
                    while (update := await session.receive()) is not None:
                        updates.append(update)
                finally:
                    sender.cancel()
            return updates
        except StreamError as error:
            await abort(context, error)

    async def GetModel(self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext) -> pb.Model:
        """See speech.proto."""
        try:
            wire.check_model_name(request.name, self._model)
        except StreamError as error:
            await abort(context, error)
        return self._description

    def _complete(self, context: grpc.aio.ServicerContext, configure: Callable[[], StreamRequest]) -> StreamRequest:
        """What the call asks for, with what its metadata and the server add. Raises StreamError."""
        try:
            request = configure()
            budget = wire.budget_in_metadata(context.invocation_metadata())
            if budget is not None and request.options.budget == Budget():
                request = replace(request, options=replace(request.options, budget=budget))
            options = self._language_model.apply(request.language_model_weight, request.options)
            return replace(request, options=options)
        except Exception as error:
            raise _reported(error) from error

    async def _read(
        self, context: grpc.aio.ServicerContext, session: Session, dialect: Dialect, patience: Patience
    ) -> None:
        """Client to engine; ends the session with an error instead of raising."""
        try:
            with patience:
                while True:
                    patience.begin()
                    message = await context.read()
                    patience.end()
                    if message is grpc.aio.EOF:
                        break
                    for part in dialect.parts(message):
                        if isinstance(part, bytes):
                            if not session.pass_on(part):
                                await session.send_audio(part)
                        elif isinstance(part, Budget):
                            session.set_budget(part)
                        else:
                            await session.flush()
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

    async def _write(
        self, context: grpc.aio.ServicerContext, session: Session, dialect: Dialect, patience: Patience
    ) -> None:
        """Engine to client. Waits for one that reads slowly, but not for ever: StreamError."""
        with patience:
            while (update := await session.receive()) is not None:
                for message in dialect.respond(update):
                    patience.begin()
                    await context.write(message)
                    patience.end()
                if session.request.single_utterance and update.result.is_final and update.text:
                    return

    async def _first(self, context: grpc.aio.ServicerContext, patience: Patience) -> Any:
        """The first request, or EOF when the client closed its side. Raises StreamError."""
        try:
            with patience:
                patience.begin()
                return await context.read()
        except DecodeError as error:
            raise to_stream_error(error) from None


def _reported(error: Exception) -> StreamError:
    converted = to_stream_error(error)
    if converted.code is grpc.StatusCode.INTERNAL:
        log.error("stream failed", exc_info=error)
    return converted
