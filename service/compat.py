"""What the APIs of Riva and Google have alike: most of RecognitionConfig, and calls that carry all their audio.

Their messages are our own copies (proto/asr_exit/compat), mounted at the paths of their services.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from asr_exit.biasing import DEFAULT_BOOST, LARGEST_BOOST, PhraseHint
from service import wire
from service.audio_input import AudioFormat, Container
from service.dialect import Part
from service.errors import StreamError, invalid, undecodable
from service.session import StreamRequest

if TYPE_CHECKING:
    from asr_exit.audio import Encoding
    from asr_exit.checkpoint import Model
    from service.config import StreamDefaults
    from service.outbox import Update
    from service.servicer import SpeechServicer

LANGUAGE = "en-US"
_ENCODINGS: dict[str, Encoding | Container] = {  # by their names there
    "ENCODING_UNSPECIFIED": "any",
    "LINEAR_PCM": "linear16",
    "LINEAR16": "linear16",
    "FLAC": "flac",
    "MULAW": "mulaw",
    "OGGOPUS": "ogg_opus",
    "OGG_OPUS": "ogg_opus",
    "ALAW": "alaw",
}


class CompatDialect(ABC):
    """One call of a foreign API: a Dialect that can also answer a call that carries all its audio."""

    def __init__(self, model: Model, defaults: StreamDefaults) -> None:
        self._model, self._defaults = model, defaults

    @abstractmethod
    def configure(self, message: Any) -> StreamRequest:
        """See Dialect."""

    @abstractmethod
    def parts(self, message: Any) -> Iterable[Part]:
        """See Dialect."""

    @abstractmethod
    def respond(self, update: Update) -> Iterable[Any]:
        """See Dialect."""

    @abstractmethod
    def configure_whole(self, message: Any) -> StreamRequest:
        """Reads a RecognizeRequest. Raises StreamError, ConfigError or AudioError."""

    @abstractmethod
    def audio_of(self, message: Any) -> bytes:
        """All the audio of a RecognizeRequest."""

    @abstractmethod
    def respond_whole(self, message: Any, updates: Sequence[Update]) -> Any:
        """Answers a RecognizeRequest; `updates` are final."""

    def _request(self, config: Any, options: Mapping[str, Any] | None = None, **fields: Any) -> StreamRequest:
        """Checks a RecognitionConfig but its model; `options` are for `wire.stream_options`, `fields` for the result.

        Raises StreamError, ConfigError or AudioError.
        """
        language = config.language_code.lower()
        if language and language.partition("-")[0] != "en":
            raise invalid(
                f"language_code {config.language_code!r} is not served here: use {LANGUAGE} or leave it empty"
            )
        if config.diarization_config.enable_speaker_diarization:
            raise invalid("speaker diarization is not served here: leave diarization_config out")
        if config.enable_separate_recognition_per_channel and config.audio_channel_count > 1:
            raise invalid("channels are not recognised separately here: open one stream for each channel")
        hints = [hint for context in config.speech_contexts for hint in _hints(context)]
        return StreamRequest(
            options=wire.stream_options(self._defaults, self._model, hints=hints, **(options or {})),
            audio=AudioFormat(_encoding(config), config.sample_rate_hertz, config.audio_channel_count, channel=1),
            **fields,
        )


def mount(
    service: str,
    messages: Any,
    core: SpeechServicer,
    dialect: Callable[[], CompatDialect],
    more: Mapping[str, grpc.RpcMethodHandler],
) -> grpc.GenericRpcHandler:
    """What a server has to add: StreamingRecognize and Recognize with the messages of that module, and `more` methods.

    `dialect` makes one for each call.
    """

    async def stream(_requests: object, context: grpc.aio.ServicerContext) -> None:
        await core.converse(context, dialect())

    async def recognize(request: Any | None, context: grpc.aio.ServicerContext) -> Any:
        call = dialect()

        def configure() -> StreamRequest:
            if request is None:
                raise undecodable()
            return call.configure_whole(request)

        updates = await core.recognize(context, configure, b"" if request is None else call.audio_of(request))
        return call.respond_whole(request, updates)

    def recognize_request(data: bytes) -> Any | None:
        """None for what cannot be decoded; raising here would end the call with a status that says nothing."""
        try:
            return messages.RecognizeRequest.FromString(data)
        except DecodeError:
            return None

    methods = {
        "StreamingRecognize": grpc.stream_stream_rpc_method_handler(
            stream,
            request_deserializer=messages.StreamingRecognizeRequest.FromString,
            response_serializer=messages.StreamingRecognizeResponse.SerializeToString,
        ),
        "Recognize": grpc.unary_unary_rpc_method_handler(
            recognize,
            request_deserializer=recognize_request,
            response_serializer=messages.RecognizeResponse.SerializeToString,
        ),
    }
    return grpc.method_handlers_generic_handler(service, methods | dict(more))


def check_model(name: str, model: Model) -> None:
    """As `wire.check_model_name`, with the status that these APIs have for it: INVALID_ARGUMENT."""
    try:
        wire.check_model_name(name, model)
    except StreamError as error:
        raise invalid(error.message) from None


def _encoding(config: Any) -> Encoding | Container:
    enum = config.DESCRIPTOR.fields_by_name["encoding"].enum_type
    known = enum.values_by_number.get(config.encoding)
    encoding = _ENCODINGS.get(known.name) if known else None
    if encoding is None:
        names = ", ".join(name for name in enum.values_by_name if name in _ENCODINGS)
        raise invalid(f"encoding {known.name if known else config.encoding} is unknown here: use {names}")
    samples = encoding not in ("flac", "ogg_opus")
    return "any" if samples and config.sample_rate_hertz == 0 else encoding


def _hints(context: Any) -> Iterable[PhraseHint]:
    boost = max(-LARGEST_BOOST, min(LARGEST_BOOST, context.boost or DEFAULT_BOOST))
    return (PhraseHint(phrase, boost) for phrase in context.phrases)
