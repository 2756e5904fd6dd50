"""Google Cloud Speech-to-Text v1 on our sessions: clients of google.cloud.speech.v1 work unmodified."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from service import wire
from service.compat import LANGUAGE, CompatDialect, check_model, mount
from service.dialect import first_config, later_kind
from service.errors import invalid
from service.pb import google_speech_pb2 as pb
from service.session import StreamRequest

if TYPE_CHECKING:
    from asr_exit.checkpoint import Model
    from asr_exit.words import Word
    from service.config import StreamDefaults
    from service.outbox import Update
    from service.servicer import SpeechServicer

SERVICE_NAME = "google.cloud.speech.v1.Speech"
# Google's names for general use do not name a model but a kind of audio: what is served is the best there is for each.
GENERAL_MODELS = frozenset(
    (
        "default",
        "latest_long",
        "latest_short",
        "command_and_search",
        "phone_call",
        "telephony",
        "telephony_short",
        "video",
    )
)


class GoogleDialect(CompatDialect):
    """One call of StreamingRecognize or Recognize."""

    def __init__(self, model: Model, defaults: StreamDefaults) -> None:
        super().__init__(model, defaults)
        self._config = pb.RecognitionConfig()
        self._single_utterance = False
        self._first = True

    def configure(self, message: pb.StreamingRecognizeRequest) -> StreamRequest:
        """See Dialect."""
        streaming = first_config(message)
        if streaming.enable_voice_activity_events:
            raise invalid("voice activity events are not served here: leave enable_voice_activity_events out")
        self._single_utterance = streaming.single_utterance
        return self._parse(
            streaming.config,
            interim_results=streaming.interim_results,
            single_utterance=streaming.single_utterance,
        )

    def parts(self, message: pb.StreamingRecognizeRequest) -> Iterable[bytes]:
        """See Dialect."""
        if later_kind(message) is None:
            raise invalid("an empty message: send audio_content")
        return (message.audio_content,)

    def respond(self, update: Update) -> Iterator[pb.StreamingRecognizeResponse]:
        """See Dialect. Without words there is nothing to say."""
        if not update.text:
            return
        final, end = update.lasting, wire.duration(update.result.end_ms)
        if self._single_utterance and final and not update.result.end_of_stream:
            event = pb.StreamingRecognizeResponse.END_OF_SINGLE_UTTERANCE
            yield pb.StreamingRecognizeResponse(speech_event_type=event, speech_event_time=end)
        result = pb.StreamingRecognitionResult(
            alternatives=[self._alternative(update)],
            is_final=final,
            stability=0.0 if final else update.result.stability,
            result_end_time=end,
            language_code=LANGUAGE.lower(),
        )
        yield pb.StreamingRecognizeResponse(results=[result])

    def configure_whole(self, message: pb.RecognizeRequest) -> StreamRequest:
        """See CompatDialect."""
        if message.audio.WhichOneof("audio_source") != "content":
            raise invalid("only audio.content is served here: send the audio itself, not a uri")
        return self._parse(message.config, interim_results=False)

    def audio_of(self, message: pb.RecognizeRequest) -> bytes:
        """See CompatDialect."""
        return message.audio.content

    def respond_whole(self, message: pb.RecognizeRequest, updates: Sequence[Update]) -> pb.RecognizeResponse:
        """See CompatDialect."""
        response = pb.RecognizeResponse()
        for update in updates:
            if update.text:
                response.results.add(
                    alternatives=[self._alternative(update)],
                    result_end_time=wire.duration(update.result.end_ms),
                    language_code=LANGUAGE.lower(),
                )
        return response

    def _parse(self, config: pb.RecognitionConfig, **fields: Any) -> StreamRequest:
        if config.HasField("adaptation"):
            raise invalid("adaptation is not served here: use speech_contexts")
        if config.model not in GENERAL_MODELS:
            check_model(config.model, self._model)
        self._config = config
        return self._request(
            config, word_times=config.enable_word_time_offsets or config.enable_word_confidence, **fields
        )

    def _alternative(self, update: Update) -> pb.SpeechRecognitionAlternative:
        final = update.lasting
        asked = self._config.enable_word_time_offsets or self._config.enable_word_confidence
        space = "" if self._first else " "
        self._first = self._first and not final
        return pb.SpeechRecognitionAlternative(
            transcript=space + update.text,
            confidence=update.confidence if final else 0.0,
            words=[self._word(word) for word in update.result.words] if asked and final else [],
        )

    def _word(self, word: Word) -> pb.WordInfo:
        timed = self._config.enable_word_time_offsets
        return pb.WordInfo(
            start_time=wire.duration(word.start_ms) if timed else None,
            end_time=wire.duration(word.end_ms) if timed else None,
            word=word.text,
            confidence=word.confidence if self._config.enable_word_confidence else 0.0,
        )


def google_handler(model: Model, defaults: StreamDefaults, core: SpeechServicer) -> grpc.GenericRpcHandler:
    """What a server has to add."""
    more = {"LongRunningRecognize": grpc.unary_unary_rpc_method_handler(_long_running_recognize)}
    return mount(SERVICE_NAME, pb, core, partial(GoogleDialect, model, defaults), more)


async def _long_running_recognize(_request: bytes, context: grpc.aio.ServicerContext) -> None:
    await context.abort(
        grpc.StatusCode.UNIMPLEMENTED,
        "LongRunningRecognize is not served here: use StreamingRecognize, which takes recordings of any length, or "
        "Recognize for up to 16 MB",
    )
