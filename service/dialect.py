"""What a protocol adds to a session: how its messages are read and written. One object for each call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from asr_exit.budget import Budget
from service import wire
from service.errors import invalid
from service.outbox import Update
from service.pb import speech_pb2 as pb
from service.session import StreamRequest

if TYPE_CHECKING:
    from asr_exit.checkpoint import Model
    from service.config import StreamDefaults


@dataclass(frozen=True, slots=True)
class EndUtterance:
    """The client wants a final result for what it has sent so far."""


Part = bytes | Budget | EndUtterance


class Dialect(Protocol):
    """Reads and writes the messages of one streaming call."""

    def configure(self, message: Any) -> StreamRequest:
        """Reads the first message. Raises StreamError, ConfigError or AudioError."""

    def parts(self, message: Any) -> Iterable[Part]:
        """Reads a later message. Raises StreamError or ConfigError."""

    def respond(self, update: Update) -> Iterable[Any]:
        """Writes an update, as none, one or more messages."""


def first_config(message: Any) -> Any:
    """The `streaming_config` of a call's first message. Raises StreamError when it carries something else."""
    kind = message.WhichOneof("streaming_request")
    if kind != "streaming_config":
        raise invalid(f"the first message carries {kind or 'nothing'}: it must carry streaming_config")
    return message.streaming_config


def later_kind(message: Any) -> str | None:
    """Which field a later message carries, if any. Raises StreamError for a second configuration."""
    kind = message.WhichOneof("streaming_request")
    if kind == "streaming_config":
        raise invalid("streaming_config was sent twice: it belongs into the first message only")
    return kind


class NativeDialect:
    """asr_exit.v1: see speech.proto."""

    def __init__(self, model: Model, defaults: StreamDefaults) -> None:
        self._model, self._defaults = model, defaults
        self._word_times = False
        self._first = True

    def configure(self, message: pb.StreamingRecognizeRequest) -> StreamRequest:
        """See Dialect."""
        request = wire.parse_config(first_config(message), self._defaults, self._model)
        self._word_times = request.word_times
        return request

    def parts(self, message: pb.StreamingRecognizeRequest) -> Iterable[Part]:
        """See Dialect."""
        kind = later_kind(message)
        if kind == "audio_content":
            return (message.audio_content,)
        if kind == "control" and message.control.WhichOneof("command") == "compute_budget":
            return (wire.parse_budget(message.control.compute_budget),)
        if kind == "control" and message.control.WhichOneof("command") == "flush":
            return (EndUtterance(),)
        raise invalid(f"a message with an empty {kind or 'request'}: send audio_content or a control command")

    def respond(self, update: Update) -> Iterable[pb.StreamingRecognizeResponse]:
        """See Dialect."""
        message = wire.response(update, word_times=self._word_times, first=self._first)
        result = message.results[0]
        self._first = self._first and not (result.is_final and result.alternatives)
        return (message,)
