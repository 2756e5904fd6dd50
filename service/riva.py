"""NVIDIA Riva's speech recognition API on our sessions: clients of nvidia.riva.asr work unmodified.

The messages are our own copies (proto/asr_exit/compat/riva.proto), mounted at the path of Riva's service.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError

from asr_exit.biasing import DEFAULT_BOOST, LARGEST_BOOST, PhraseHint
from asr_exit.budget import Budget
from service import wire
from service.audio_input import AudioFormat, Container
from service.dialect import EndUtterance, Part
from service.errors import StreamError, invalid, undecodable
from service.pb import riva_pb2 as pb
from service.pb import speech_pb2
from service.session import StreamRequest

if TYPE_CHECKING:
    from asr_exit.audio import Encoding
    from asr_exit.checkpoint import Model
    from asr_exit.words import Word
    from service.config import StreamDefaults
    from service.outbox import Update
    from service.servicer import SpeechServicer

SERVICE_NAME = "nvidia.riva.asr.RivaSpeechRecognition"
LANGUAGE = "en-US"
_ENCODINGS: dict[int, Encoding | Container] = {
    pb.ENCODING_UNSPECIFIED: "any",
    pb.LINEAR_PCM: "linear16",
    pb.FLAC: "flac",
    pb.MULAW: "mulaw",
    pb.OGGOPUS: "ogg_opus",
    pb.ALAW: "alaw",
}


class RivaDialect:
    """One call of StreamingRecognize; `parse` also reads the configuration of Recognize."""

    def __init__(self, model: Model, defaults: StreamDefaults) -> None:
        self._model, self._defaults = model, defaults
        self._word_times = False
        self._id: pb.RequestId | None = None

    def configure(self, message: pb.StreamingRecognizeRequest) -> StreamRequest:
        """See Dialect."""
        kind = message.WhichOneof("streaming_request")
        if kind != "streaming_config":
            raise invalid(f"the first message carries {kind or 'nothing'}: it must carry streaming_config")
        self._id = message.id if message.HasField("id") else None
        config = message.streaming_config
        request = self.parse(config.config, interim_results=config.interim_results, runtime=message.runtime_config)
        self._word_times = request.word_times
        return request

    def parts(self, message: pb.StreamingRecognizeRequest) -> Iterable[Part]:
        """See Dialect."""
        kind = message.WhichOneof("streaming_request")
        if kind == "streaming_config":
            raise invalid("streaming_config was sent twice: it belongs into the first message only")
        if kind is None and not message.runtime_config:
            raise invalid("an empty message: send audio_content or runtime_config")
        if message.HasField("id"):
            self._id = message.id
        parts: list[Part] = []
        if "flush" in message.runtime_config and message.runtime_config["flush"].lower() not in ("", "0", "false"):
            parts.append(EndUtterance())
        if "compute_budget" in message.runtime_config:
            parts.append(_budget(message.runtime_config))
        if kind == "audio_content":
            parts.append(message.audio_content)
        return parts

    def respond(self, update: Update) -> pb.StreamingRecognizeResponse | None:
        """See Dialect. Without words there is nothing to say."""
        alternative = _alternative(update, self._word_times)
        if alternative is None:
            return None
        result = pb.StreamingRecognitionResult(
            alternatives=[alternative],
            is_final=update.lasting,
            stability=update.result.stability,
            channel_tag=1,
            audio_processed=update.result.end_ms / 1000,
        )
        return pb.StreamingRecognizeResponse(results=[result], id=self._id)

    def parse(
        self, config: pb.RecognitionConfig, *, interim_results: bool, runtime: Mapping[str, str]
    ) -> StreamRequest:
        """Checks a configuration. Raises StreamError, ConfigError or AudioError."""
        self._check_what_is_served(config)
        custom = {**config.custom_configuration, **runtime}
        chunk_ms = custom.get("chunk_ms", "0")
        if not chunk_ms.isdecimal():
            raise invalid(f"custom_configuration chunk_ms={chunk_ms!r} must be a number of milliseconds, such as 640")
        encoding = _ENCODINGS.get(config.encoding)
        if encoding is None:
            raise invalid(f"encoding {config.encoding} is unknown here: use {', '.join(pb.AudioEncoding.keys())}")
        if encoding in ("linear16", "mulaw", "alaw") and config.sample_rate_hertz == 0:
            encoding = "any"
        endpointing = speech_pb2.EndpointingConfig()
        if config.endpointing_config.stop_history:
            endpointing.silence_ms = config.endpointing_config.stop_history
        return StreamRequest(
            options=wire.stream_options(
                self._defaults,
                self._model,
                chunk_ms=int(chunk_ms),
                policy=custom.get("policy", ""),
                fill=custom.get("fill", ""),
                budget=_budget(custom),
                hints=[hint for context in config.speech_contexts for hint in _hints(context)],
                endpointing=endpointing,
            ),
            audio=AudioFormat(encoding, config.sample_rate_hertz, config.audio_channel_count, channel=1),
            interim_results=interim_results,
            word_times=config.enable_word_time_offsets,
        )

    def _check_what_is_served(self, config: pb.RecognitionConfig) -> None:
        check_model(config.model, self._model)
        language = config.language_code.lower()
        if language and language.partition("-")[0] != "en":
            raise invalid(
                f"language_code {config.language_code!r} is not served here: use {LANGUAGE} or leave it empty"
            )
        if config.diarization_config.enable_speaker_diarization:
            raise invalid("speaker diarization is not served here: leave diarization_config out")
        if config.enable_separate_recognition_per_channel and config.audio_channel_count > 1:
            raise invalid("channels are not recognised separately here: open one stream for each channel")


class RivaServicer:
    """The RPCs of nvidia.riva.asr.RivaSpeechRecognition."""

    def __init__(self, model: Model, defaults: StreamDefaults, core: SpeechServicer, chunk_ms: Iterable[int]) -> None:
        self._model, self._defaults, self._core = model, defaults, core
        self._chunk_ms = tuple(chunk_ms)

    def handler(self) -> grpc.GenericRpcHandler:
        """What a server has to add."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "StreamingRecognize": grpc.stream_stream_rpc_method_handler(
                    self._streaming_recognize,
                    request_deserializer=pb.StreamingRecognizeRequest.FromString,
                    response_serializer=pb.StreamingRecognizeResponse.SerializeToString,
                ),
                "Recognize": grpc.unary_unary_rpc_method_handler(
                    self._recognize,
                    request_deserializer=_recognize_request,
                    response_serializer=pb.RecognizeResponse.SerializeToString,
                ),
                "GetRivaSpeechRecognitionConfig": grpc.unary_unary_rpc_method_handler(
                    self._get_config,
                    request_deserializer=pb.RivaSpeechRecognitionConfigRequest.FromString,
                    response_serializer=pb.RivaSpeechRecognitionConfigResponse.SerializeToString,
                ),
            },
        )

    async def _streaming_recognize(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        await self._core.converse(context, RivaDialect(self._model, self._defaults))

    async def _recognize(
        self, request: pb.RecognizeRequest | None, context: grpc.aio.ServicerContext
    ) -> pb.RecognizeResponse:
        def configure() -> StreamRequest:
            if request is None:
                raise undecodable()
            return RivaDialect(self._model, self._defaults).parse(request.config, interim_results=False, runtime={})

        updates = await self._core.recognize(context, configure, request.audio if request else b"")
        assert request is not None, "refused above"
        response = pb.RecognizeResponse(id=request.id if request.HasField("id") else None)
        for update in updates:
            alternative = _alternative(update, request.config.enable_word_time_offsets)
            if alternative is not None:
                response.results.add(
                    alternatives=[alternative], channel_tag=1, audio_processed=update.result.end_ms / 1000
                )
        return response

    async def _get_config(
        self, request: pb.RivaSpeechRecognitionConfigRequest, context: grpc.aio.ServicerContext
    ) -> pb.RivaSpeechRecognitionConfigResponse:
        try:
            check_model(request.model_name, self._model)
        except StreamError as error:
            await context.abort(error.code, error.message)
        parameters = {
            "language_code": LANGUAGE,
            "sample_rate": str(wire.MODEL_RATE_HZ),
            "exit_layers": ",".join(map(str, self._model.config.exit_layers)),
            "chunk_ms": ",".join(map(str, self._chunk_ms)),
            "policies": ",".join(wire.POLICIES),
        }
        response = pb.RivaSpeechRecognitionConfigResponse()
        for kind in ("online", "offline"):
            more = {"type": kind, "streaming": str(kind == "online")}
            response.model_config.add(model_name=self._model.name, parameters=parameters | more)
        return response


def check_model(name: str, model: Model) -> None:
    """As `wire.check_model_name`, with the status that Riva has for it: INVALID_ARGUMENT."""
    try:
        wire.check_model_name(name, model)
    except StreamError as error:
        raise invalid(error.message) from None


def _recognize_request(data: bytes) -> pb.RecognizeRequest | None:
    """None for what cannot be decoded; raising here would end the call with a status that says nothing."""
    try:
        return pb.RecognizeRequest.FromString(data)
    except DecodeError:
        return None


def _budget(values: Mapping[str, str]) -> Budget:
    text = values.get("compute_budget", "")
    return Budget.parse(text) if text else Budget()


def _hints(context: pb.SpeechContext) -> Iterable[PhraseHint]:
    boost = max(-LARGEST_BOOST, min(LARGEST_BOOST, context.boost or DEFAULT_BOOST))
    return (PhraseHint(phrase, boost) for phrase in context.phrases)


def _alternative(update: Update, word_times: bool) -> pb.SpeechRecognitionAlternative | None:
    result, final = update.result, update.lasting
    text = " ".join(part for part in (result.committed, result.tail) if part)
    if not text:
        return None
    words = result.words
    return pb.SpeechRecognitionAlternative(
        transcript=text + " ",
        confidence=sum(word.confidence for word in words) / len(words) if words and final else 0.0,
        words=[_word(word) for word in words] if word_times and final else [],
    )


def _word(word: Word) -> pb.WordInfo:
    return pb.WordInfo(
        start_time=round(word.start_ms), end_time=round(word.end_ms), word=word.text, confidence=word.confidence
    )
