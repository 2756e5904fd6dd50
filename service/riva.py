"""NVIDIA Riva's speech recognition API on our sessions: clients of nvidia.riva.asr work unmodified."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import grpc

from asr_exit.budget import Budget
from service import wire
from service.compat import LANGUAGE, CompatDialect, check_model, mount
from service.dialect import EndUtterance, Part, first_config, later_kind
from service.errors import StreamError, invalid
from service.pb import riva_pb2 as pb
from service.pb import speech_pb2
from service.session import StreamRequest

if TYPE_CHECKING:
    from asr_exit.checkpoint import Model
    from asr_exit.words import Word
    from service.config import StreamDefaults
    from service.outbox import Update
    from service.servicer import SpeechServicer

SERVICE_NAME = "nvidia.riva.asr.RivaSpeechRecognition"


class RivaDialect(CompatDialect):
    """One call of StreamingRecognize or Recognize."""

    def __init__(self, model: Model, defaults: StreamDefaults) -> None:
        super().__init__(model, defaults)
        self._word_times = False
        self._id: pb.RequestId | None = None

    def configure(self, message: pb.StreamingRecognizeRequest) -> StreamRequest:
        """See Dialect."""
        config = first_config(message)
        self._id = message.id if message.HasField("id") else None
        return self._parse(config.config, interim_results=config.interim_results, runtime=message.runtime_config)

    def parts(self, message: pb.StreamingRecognizeRequest) -> Iterable[Part]:
        """See Dialect."""
        kind = later_kind(message)
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

    def respond(self, update: Update) -> Iterable[pb.StreamingRecognizeResponse]:
        """See Dialect. Without words there is nothing to say."""
        if not update.text:
            return ()
        result = pb.StreamingRecognitionResult(
            alternatives=[self._alternative(update)],
            is_final=update.lasting,
            stability=update.result.stability,
            channel_tag=1,
            audio_processed=update.result.end_ms / 1000,
        )
        return (pb.StreamingRecognizeResponse(results=[result], id=self._id),)

    def configure_whole(self, message: pb.RecognizeRequest) -> StreamRequest:
        """See CompatDialect."""
        return self._parse(message.config, interim_results=False, runtime={})

    def audio_of(self, message: pb.RecognizeRequest) -> bytes:
        """See CompatDialect."""
        return message.audio

    def respond_whole(self, message: pb.RecognizeRequest, updates: Sequence[Update]) -> pb.RecognizeResponse:
        """See CompatDialect."""
        response = pb.RecognizeResponse(id=message.id if message.HasField("id") else None)
        for update in updates:
            if update.text:
                response.results.add(
                    alternatives=[self._alternative(update)],
                    channel_tag=1,
                    audio_processed=update.result.end_ms / 1000,
                )
        return response

    def _parse(
        self, config: pb.RecognitionConfig, *, interim_results: bool, runtime: Mapping[str, str]
    ) -> StreamRequest:
        check_model(config.model, self._model)
        custom = {**config.custom_configuration, **runtime}
        chunk_ms = custom.get("chunk_ms", "0")
        if not chunk_ms.isdecimal():
            raise invalid(f"custom_configuration chunk_ms={chunk_ms!r} must be a number of milliseconds, such as 640")
        endpointing = speech_pb2.EndpointingConfig()
        if config.endpointing_config.stop_history:
            endpointing.silence_ms = config.endpointing_config.stop_history
        options = {
            "chunk_ms": int(chunk_ms),
            "policy": custom.get("policy", ""),
            "fill": custom.get("fill", ""),
            "budget": _budget(custom),
            "endpointing": endpointing,
        }
        self._word_times = config.enable_word_time_offsets
        return self._request(config, options, interim_results=interim_results, word_times=self._word_times)

    def _alternative(self, update: Update) -> pb.SpeechRecognitionAlternative:
        final = update.lasting
        return pb.SpeechRecognitionAlternative(
            transcript=update.text + " ",
            confidence=update.confidence if final else 0.0,
            words=[_word(word) for word in update.result.words] if self._word_times and final else [],
        )


class RivaServicer:
    """The RPCs of nvidia.riva.asr.RivaSpeechRecognition."""

    def __init__(self, model: Model, defaults: StreamDefaults, core: SpeechServicer, chunk_ms: Iterable[int]) -> None:
        self._model, self._defaults, self._core = model, defaults, core
        self._chunk_ms = tuple(chunk_ms)

    def handler(self) -> grpc.GenericRpcHandler:
        """What a server has to add."""
        get_config = grpc.unary_unary_rpc_method_handler(
            self._get_config,
            request_deserializer=pb.RivaSpeechRecognitionConfigRequest.FromString,
            response_serializer=pb.RivaSpeechRecognitionConfigResponse.SerializeToString,
        )
        dialect = partial(RivaDialect, self._model, self._defaults)
        return mount(SERVICE_NAME, pb, self._core, dialect, {"GetRivaSpeechRecognitionConfig": get_config})

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


def _budget(values: Mapping[str, str]) -> Budget:
    text = values.get("compute_budget", "")
    return Budget.parse(text) if text else Budget()


def _word(word: Word) -> pb.WordInfo:
    return pb.WordInfo(
        start_time=round(word.start_ms), end_time=round(word.end_ms), word=word.text, confidence=word.confidence
    )
