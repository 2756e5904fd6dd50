"""Between the messages of asr_exit.v1 and the library's terms. No state, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration

from asr_exit.audio import MODEL_RATE_HZ, Encoding, check_rate
from asr_exit.budget import Budget
from asr_exit.policy import CRITERIA, Reason, parse_policy
from asr_exit.stream import Fill, StreamOptions
from service.errors import StreamError, invalid
from service.outbox import ChunkRecord, Update
from service.pb import speech_pb2 as pb
from service.session import StreamRequest

if TYPE_CHECKING:
    from asr_exit.checkpoint import Model
    from asr_exit.words import Word
    from service.config import StreamDefaults

ENCODINGS: dict[pb.StreamingConfig.AudioEncoding, Encoding] = {
    pb.StreamingConfig.LINEAR16: "linear16",
    pb.StreamingConfig.FLOAT32: "float32",
}
POLICIES = ("auto", "full", "fixed", *CRITERIA)
DECISIONS: dict[Reason, pb.ChunkReport.Decision] = {
    Reason.CONFIDENT: pb.ChunkReport.CONFIDENT,
    Reason.BUDGET: pb.ChunkReport.BUDGET,
    Reason.LOAD: pb.ChunkReport.LOAD,
    Reason.FULL: pb.ChunkReport.FULL,
    Reason.FINAL: pb.ChunkReport.FINAL,
}


def parse_config(config: pb.StreamingConfig, defaults: StreamDefaults, model: Model) -> StreamRequest:
    """Checks a configuration and fills in the server's defaults.

    Raises StreamError (another model asked for, unknown encoding), ConfigError or AudioError.
    """
    check_model_name(config.model, model)
    encoding = ENCODINGS.get(config.encoding)
    if encoding is None:
        given = "not set" if config.encoding == 0 else f"{config.encoding}, which is unknown here"
        names = " or ".join(pb.StreamingConfig.AudioEncoding.Name(number) for number in ENCODINGS)
        raise invalid(f"streaming_config.encoding is {given}: use {names}")
    if config.sample_rate_hertz == 0:
        raise invalid("streaming_config.sample_rate_hertz is not set: give the rate of the audio, 8000 to 48000")
    check_rate(config.sample_rate_hertz)
    options = StreamOptions(
        chunk_ms=config.chunk_ms or defaults.chunk_ms,
        policy=parse_policy(
            config.policy or defaults.policy,
            exit_layers=model.config.exit_layers,
            calibration=model.calibration,
            chunk_ms=config.chunk_ms or defaults.chunk_ms,
        ),
        budget=parse_budget(config.compute_budget),
        fill=Fill.parse(config.fill or defaults.fill),
        endpoint_silence_ms=defaults.endpoint_silence_ms,
    )
    model.config.chunk_frames(options.chunk_ms)
    return StreamRequest(
        options=options,
        encoding=encoding,
        rate_hz=config.sample_rate_hertz,
        interim_results=config.interim_results,
        word_times=config.enable_word_time_offsets,
    )


def parse_budget(budget: pb.ComputeBudget) -> Budget:
    """Raises ConfigError for a value out of range. An empty message is no limit."""
    target = budget.WhichOneof("target")
    values = {target: getattr(budget, target)} if target else {}
    for name in ("max_exit_layer", "min_exit_layer", "peak_depth"):
        if value := getattr(budget, name):
            values[name] = value
    return Budget(**values)


def check_model_name(name: str, model: Model) -> None:
    """Raises StreamError when a model is asked for that is not the one served."""
    if name and name != model.name:
        import grpc

        raise StreamError(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"model {name!r} is not served here: leave the name empty or use {model.name!r}",
        )


def response(update: Update, *, word_times: bool, first: bool) -> pb.StreamingRecognizeResponse:
    """One update as a response. `first` says that no final transcript was sent before, so no space is needed."""
    result = update.result
    newest = update.chunks[-1]
    text = " ".join(part for part in (result.committed, result.tail) if part)
    alternatives = []
    space = "" if first else " "
    if text:
        words = result.words
        alternatives.append(
            pb.SpeechRecognitionAlternative(
                transcript=space + text,
                confidence=sum(word.confidence for word in words) / len(words) if words else 0.0,
                words=[_word(word) for word in words] if word_times else [],
            )
        )
    return pb.StreamingRecognizeResponse(
        results=[
            pb.StreamingRecognitionResult(
                alternatives=alternatives,
                is_final=update.lasting,
                stability=1.0 if update.lasting else result.stability,
                result_end_offset=duration(result.end_ms),
                exit_layer=result.exit_layer,
                decision=DECISIONS[result.reason],
                encoder_macs=sum(chunk.encoder_macs for chunk in update.chunks),
                chunk_latency=duration(newest.latency_ms),
                chunks=[_chunk(chunk) for chunk in update.chunks],
                committed_characters=len(space + result.committed) if result.committed else 0,
            )
        ]
    )


def describe(model: Model, defaults: StreamDefaults, chunk_ms: Sequence[int]) -> pb.Model:
    """What GetModel answers."""
    frames = model.config.chunk_frames(defaults.chunk_ms)
    chunks_per_second = 1000.0 / (frames * model.config.frame_ms)
    return pb.Model(
        name=model.name,
        sample_rate_hertz=MODEL_RATE_HZ,
        parameters=sum(parameter.numel() for parameter in model.encoder.parameters()),
        exits=[
            pb.Exit(layer=layer, encoder_macs_per_second=round(model.macs.to_exit(index, frames) * chunks_per_second))
            for index, layer in enumerate(model.config.exit_layers)
        ],
        chunk_ms=chunk_ms,
        default_chunk_ms=defaults.chunk_ms,
        policies=POLICIES,
        default_policy=defaults.policy,
        fills=[fill.value for fill in Fill],
        default_fill=defaults.fill,
        encodings=ENCODINGS.keys(),
        provenance={str(key): str(value) for key, value in model.provenance.items()},
    )


def duration(milliseconds: float) -> Duration:
    """Milliseconds as a Duration, to the microsecond."""
    seconds, micros = divmod(round(milliseconds * 1000), 1_000_000)
    return Duration(seconds=seconds, nanos=micros * 1000)


def _word(word: Word) -> pb.WordInfo:
    return pb.WordInfo(
        start_offset=duration(word.start_ms),
        end_offset=duration(word.end_ms),
        word=word.text,
        confidence=word.confidence,
    )


def _chunk(chunk: ChunkRecord) -> pb.ChunkReport:
    return pb.ChunkReport(
        index=chunk.index,
        start_offset=duration(chunk.start_ms),
        end_offset=duration(chunk.end_ms),
        exit_layer=chunk.exit_layer,
        decision=DECISIONS[chunk.reason],
        encoder_macs=chunk.encoder_macs,
        latency=duration(chunk.latency_ms),
    )
