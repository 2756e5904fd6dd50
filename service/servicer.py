"""The RPCs of asr_exit.v1.Speech: order of messages, one reader and one writer per stream, status codes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc

from service import wire
from service.errors import StreamError, abort, invalid, to_stream_error
from service.pb import speech_pb2 as pb
from service.pb import speech_pb2_grpc

if TYPE_CHECKING:
    from asr_exit.checkpoint import Model
    from service.config import ServeConfig
    from service.language_model import ServedLanguageModel
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
        try:
            request = await self._first(context)
            async with self._reception.stream(context, request) as session:
                reader = asyncio.create_task(self._read(context, session))
                try:
                    await self._write(context, session)
                finally:
                    reader.cancel()
        except StreamError as error:  # the session is closed: the status waits behind results the client does not read
            await abort(context, error)

    async def GetModel(self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext) -> pb.Model:
        """See speech.proto."""
        try:
            wire.check_model_name(request.name, self._model)
        except StreamError as error:
            await abort(context, error)
        return self._description

    async def _first(self, context: grpc.aio.ServicerContext) -> StreamRequest:
        """The configuration in the first message. Raises StreamError."""
        request = await self._next(context)
        if request is None:
            raise invalid("the stream ended before its configuration: send streaming_config in the first message")
        kind = request.WhichOneof("streaming_request")
        if kind != "streaming_config":
            raise invalid(f"the first message carries {kind or 'nothing'}: it must carry streaming_config")
        try:
            parsed = wire.parse_config(request.streaming_config, self._config.stream, self._model)
            options = self._language_model.apply(request.streaming_config, parsed.options)
            return replace(parsed, options=options)
        except Exception as error:
            raise _reported(error) from error

    async def _read(self, context: grpc.aio.ServicerContext, session: Session) -> None:
        """Client to engine; ends the session with an error instead of raising."""
        try:
            while (request := await self._next(context)) is not None:
                kind = request.WhichOneof("streaming_request")
                if kind == "audio_content":
                    await session.send_audio(request.audio_content)
                elif kind == "control" and request.control.WhichOneof("command") == "compute_budget":
                    session.set_budget(wire.parse_budget(request.control.compute_budget))
                elif kind == "streaming_config":
                    raise invalid("streaming_config was sent twice: it belongs into the first message only")
                else:
                    raise invalid(
                        f"a message with an empty {kind or 'request'}: send audio_content or a control command"
                    )
            session.finish()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            session.fail(_reported(error))

    async def _write(self, context: grpc.aio.ServicerContext, session: Session) -> None:
        """Engine to client."""
        first = True
        while (update := await session.receive()) is not None:
            message = wire.response(update, word_times=session.request.word_times, first=first)
            await self._send(context, message)
            result = message.results[0]
            first = first and not (result.is_final and result.alternatives)

    async def _send(self, context: grpc.aio.ServicerContext, message: pb.StreamingRecognizeResponse) -> None:
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

    async def _next(self, context: grpc.aio.ServicerContext) -> pb.StreamingRecognizeRequest | None:
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
        return None if request is grpc.aio.EOF else request


def _reported(error: Exception) -> StreamError:
    converted = to_stream_error(error)
    if converted.code is grpc.StatusCode.INTERNAL:
        log.error("stream failed", exc_info=error)
    return converted
