"""Clients of asr_exit.v1.Speech, plain and asyncio. Neither imports torch."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, cast

import grpc

from asr_exit.audio import MODEL_RATE_HZ, Encoding, bytes_per_second
from asr_exit.budget import Budget
from service.client_status import ServersEnd, ServiceError, service_error
from service.pb import speech_pb2 as pb
from service.pb import speech_pb2_grpc
from service.results import Caption, CaptionWord, ChunkDepth
from service.tls import channel_credentials
from service.whole_chunks import Collector

__all__ = ["Access", "AsyncSpeechClient", "Caption", "Flush", "Part", "ServiceError", "SpeechClient", "StreamSettings"]


@dataclass(frozen=True, slots=True)
class Flush:
    """Asks for a final result of what was sent so far; the stream goes on."""


Part = bytes | Budget | Flush  # audio, a new budget from here on, or the end of an utterance
_ENCODINGS = {
    "linear16": pb.StreamingConfig.LINEAR16,
    "float32": pb.StreamingConfig.FLOAT32,
    "mulaw": pb.StreamingConfig.MULAW,
    "alaw": pb.StreamingConfig.ALAW,
    "flac": pb.StreamingConfig.FLAC,
    "ogg_opus": pb.StreamingConfig.OGG_OPUS,
    "any": pb.StreamingConfig.ENCODING_UNSPECIFIED,
}
_OPTIONS = [("grpc.max_send_message_length", -1)]


@dataclass(frozen=True)
class StreamSettings:
    """What to ask for; empty and zero take the server's defaults."""

    rate_hz: int = 16_000  # 0: what the file says
    encoding: Encoding | Literal["flac", "ogg_opus", "any"] = "linear16"  # any: a file that says itself what it is
    channels: int = 0
    channel: int = 0  # which to recognise, counted from 1; 0: the mean of all
    interim_results: bool = True
    word_times: bool = False
    chunk_ms: int = 0
    policy: str = ""
    fill: str = ""
    budget: Budget = field(default_factory=Budget)
    model: str = ""
    language_model_weight: float | None = None  # 0: without
    phrases: tuple[str, ...] = ()  # likely to be said
    boost: float = 0.0  # of the phrases
    endpoint_silence_ms: int | None = None  # that ends an utterance; 0: none does
    whole_chunks: bool = True  # raw audio at 16 kHz is sent a chunk at a time, if `chunk_ms` is set: see `Collector`

    def collector(self) -> Collector | None:
        """What collects the audio of a stream; None: it is sent as it comes.

        At other rates a chunk ends some samples after its last one, those that the server's resampler looks ahead.
        """
        raw = self.encoding not in ("flac", "ogg_opus", "any")
        if not (self.whole_chunks and raw and self.rate_hz == MODEL_RATE_HZ and self.chunk_ms > 0):
            return None
        rate = bytes_per_second(cast("Encoding", self.encoding), self.rate_hz, self.channels or 1)
        return Collector(rate * self.chunk_ms // 1000)

    def message(self) -> pb.StreamingRecognizeRequest:
        """The first message of a stream."""
        config = pb.StreamingConfig(
            encoding=_ENCODINGS[self.encoding],
            sample_rate_hertz=self.rate_hz,
            interim_results=self.interim_results,
            enable_word_time_offsets=self.word_times,
            chunk_ms=self.chunk_ms,
            policy=self.policy,
            fill=self.fill,
            compute_budget=budget_message(self.budget),
            model=self.model,
            language_model_weight=self.language_model_weight,
            audio_channel_count=self.channels,
            audio_channel=self.channel,
        )
        if self.phrases:
            config.phrase_hints.add(phrases=self.phrases, boost=self.boost)
        if self.endpoint_silence_ms is not None:
            config.endpointing.silence_ms = self.endpoint_silence_ms
        return pb.StreamingRecognizeRequest(streaming_config=config)


@dataclass(frozen=True)
class Access:
    """How to reach a server: in the clear, or over TLS as soon as any of the files is named or `tls` is set."""

    tls: bool = False  # with the usual certificate authorities
    ca: str = ""  # PEM file of the authorities to trust instead
    certificate: str = ""  # own certificate and key, for mutual TLS
    key: str = ""
    token: str = ""

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None = in the clear."""
        if not (self.tls or self.ca or self.certificate or self.key):
            return None
        return channel_credentials(self.ca, self.certificate, self.key)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


class SpeechClient:
    """Blocking client; a context manager. One client may run many streams."""

    def __init__(self, address: str, access: Access | None = None) -> None:
        """`address` is HOST:PORT. Connects with the first call. Raises ConfigError for files that cannot be read."""
        access = access or Access()
        credentials = access.credentials()
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, credentials, options=_OPTIONS)
        self._metadata = access.metadata()
        self._stub = speech_pb2_grpc.SpeechStub(self._channel)

    def __enter__(self) -> SpeechClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all calls and the connection."""
        self._channel.close()

    def model(self, timeout_s: float = 10.0) -> pb.Model:
        """What the server runs. Raises ServiceError."""
        try:
            return self._stub.GetModel(pb.GetModelRequest(), timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise service_error(error) from None

    def stream(self, audio: Iterable[Part], settings: StreamSettings | None = None) -> Iterator[Caption]:
        """Sends `audio` (consumed on another thread) and yields captions as they come.

        Raises ServiceError when the server ends the call, and whatever iterating over `audio` raised. Leaving the
        iteration early cancels the call.
        """
        failures: list[BaseException] = []
        settings = settings or StreamSettings()
        first, collector = settings.message(), settings.collector()

        def requests() -> Iterator[pb.StreamingRecognizeRequest]:
            yield first
            try:
                for part in audio:
                    for message in (part,) if collector is None else collector.add(part):
                        yield part_message(message)
                for message in () if collector is None else collector.rest():
                    yield part_message(message)
            except GeneratorExit:  # the call has ended: not a failure of `audio`
                raise
            except BaseException as error:
                failures.append(error)
                raise

        call = self._stub.StreamingRecognize(requests(), metadata=self._metadata)
        try:
            for response in call:
                yield from captions(response)
        except grpc.RpcError as error:
            if failures:
                raise failures[0] from None
            raise service_error(error) from None
        finally:
            call.cancel()


class AsyncSpeechClient:
    """The same for asyncio; an async context manager."""

    def __init__(self, address: str, access: Access | None = None) -> None:
        """`address` is HOST:PORT. Connects with the first call. Raises ConfigError for files that cannot be read."""
        access = access or Access()
        credentials = access.credentials()
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
        self._metadata = access.metadata()
        self._stub = speech_pb2_grpc.SpeechStub(self._channel)

    async def __aenter__(self) -> AsyncSpeechClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends all calls and the connection."""
        await self._channel.close()

    async def stream(
        self, audio: AsyncIterable[Part], settings: StreamSettings | None = None
    ) -> AsyncIterator[Caption]:
        """Sends `audio` and yields captions as they come; raises ServiceError when the server ends the call."""
        settings = settings or StreamSettings()
        first, collector = settings.message(), settings.collector()

        async def requests() -> AsyncIterator[pb.StreamingRecognizeRequest]:
            yield first
            async for part in audio:
                for message in (part,) if collector is None else collector.add(part):
                    yield part_message(message)
            for message in () if collector is None else collector.rest():
                yield part_message(message)

        call = self._stub.StreamingRecognize(requests(), metadata=self._metadata)
        end = ServersEnd(call)
        try:
            async for response in call:
                for caption in captions(response):
                    yield caption
        except grpc.RpcError as error:
            if (failure := await end.failure(error)) is not None:
                raise failure from None
        finally:
            call.cancel()


def budget_message(budget: Budget) -> pb.ComputeBudget:
    """A budget on the wire; fields that are None stay unset."""
    return pb.ComputeBudget(
        mean_depth=budget.mean_depth,
        encoder_macs_per_second=budget.encoder_macs_per_second,
        real_time_factor=budget.real_time_factor,
        max_exit_layer=budget.max_exit_layer or 0,
        min_exit_layer=budget.min_exit_layer or 0,
        peak_depth=budget.peak_depth or 0.0,
    )


def part_message(part: Part) -> pb.StreamingRecognizeRequest:
    """Audio or a command on the wire."""
    if isinstance(part, Flush):
        return pb.StreamingRecognizeRequest(control=pb.StreamControl(flush=pb.Flush()))
    if isinstance(part, Budget):
        return pb.StreamingRecognizeRequest(control=pb.StreamControl(compute_budget=budget_message(part)))
    return pb.StreamingRecognizeRequest(audio_content=part)


def captions(response: pb.StreamingRecognizeResponse) -> Iterator[Caption]:
    """The results of one response."""
    for result in response.results:
        best = result.alternatives[0] if result.alternatives else pb.SpeechRecognitionAlternative()
        yield Caption(
            text=best.transcript.strip(),
            committed=best.transcript[: result.committed_characters].strip(),
            is_final=result.is_final,
            stability=result.stability,
            confidence=best.confidence,
            end_ms=_ms(result.result_end_offset),
            latency_ms=_ms(result.chunk_latency),
            words=tuple(
                CaptionWord(word.word, _ms(word.start_offset), _ms(word.end_offset), word.confidence)
                for word in best.words
            ),
            chunks=tuple(
                ChunkDepth(
                    index=chunk.index,
                    start_ms=_ms(chunk.start_offset),
                    end_ms=_ms(chunk.end_offset),
                    exit_layer=chunk.exit_layer,
                    decision=pb.ChunkReport.Decision.Name(chunk.decision).lower(),
                    encoder_macs=chunk.encoder_macs,
                    latency_ms=_ms(chunk.latency),
                )
                for chunk in result.chunks
            ),
        )


def _ms(value: object) -> float:
    return value.seconds * 1000 + value.nanos / 1e6  # type: ignore[attr-defined]
