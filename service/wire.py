"""Between the messages of asr_exit.v1 and the library's terms. No state, no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration

from asr_exit.audio import MODEL_RATE_HZ, Encoding
from asr_exit.biasing import DEFAULT_BOOST, PhraseHint
from asr_exit.budget import Budget
from asr_exit.endpoint import EndpointRule
from asr_exit.policy import CRITERIA, Reason, parse_policy
from asr_exit.stream import Fill, StreamOptions
from service.audio_input import AudioFormat, Container
from service.errors import StreamError, invalid
from service.outbox import Update
from service.pb import speech_pb2 as pb
from service.session import StreamRequest

if TYPE_CHECKING:
    from asr_exit.checkpoint import Model
    from service.config import StreamDefaults

ENCODINGS: dict[pb.StreamingConfig.AudioEncoding, Encoding | Container] = {
    pb.StreamingConfig.ENCODING_UNSPECIFIED: "any",
    pb.StreamingConfig.LINEAR16: "linear16",
    pb.StreamingConfig.FLOAT32: "float32",
    pb.StreamingConfig.FLAC: "flac",
    pb.StreamingConfig.OGG_OPUS: "ogg_opus",
    pb.StreamingConfig.MULAW: "mulaw",
    pb.StreamingConfig.ALAW: "alaw",
}
BUDGET_KEY = "x-compute-budget"
MAX_HINTS, MAX_HINT_CHARACTERS = 500, 200
MAX_ENDPOINT_RULES = 8
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
        names = ", ".join(pb.StreamingConfig.AudioEncoding.Name(number) for number in ENCODINGS if number)
        raise invalid(f"streaming_config.encoding is {config.encoding}, which is unknown here: use one of {names}")
    if config.sample_rate_hertz == 0 and encoding not in ("any", "flac", "ogg_opus"):
        raise invalid("streaming_config.sample_rate_hertz is not set: give the rate of the audio, 8000 to 48000")
    weight = config.language_model_weight if config.HasField("language_model_weight") else None
    return StreamRequest(
        options=stream_options(
            defaults,
            model,
            chunk_ms=config.chunk_ms,
            policy=config.policy,
            fill=config.fill,
            budget=parse_budget(config.compute_budget),
            hints=[
                PhraseHint(phrase, hints.boost or DEFAULT_BOOST)
                for hints in config.phrase_hints
                for phrase in hints.phrases
            ],
            endpointing=config.endpointing,
        ),
        audio=AudioFormat(encoding, config.sample_rate_hertz, config.audio_channel_count, config.audio_channel),
        interim_results=config.interim_results,
        word_times=config.enable_word_time_offsets,
        language_model_weight=weight,
    )


def stream_options(
    defaults: StreamDefaults,
    model: Model,
    *,
    chunk_ms: int = 0,
    policy: str = "",
    fill: str = "",
    budget: Budget | None = None,
    hints: Sequence[PhraseHint] = (),
    endpointing: pb.EndpointingConfig | None = None,
) -> StreamOptions:
    """The engine's options; what is empty comes from `defaults`. Raises StreamError or ConfigError."""
    endpointing = endpointing or pb.EndpointingConfig()
    if len(hints) > MAX_HINTS or any(len(hint.phrase) > MAX_HINT_CHARACTERS for hint in hints):
        raise invalid(
            f"too many or too long phrase hints: at most {MAX_HINTS} phrases of up to {MAX_HINT_CHARACTERS} characters"
        )
    if len(endpointing.rules) > MAX_ENDPOINT_RULES:
        raise invalid(f"endpointing has {len(endpointing.rules)} rules: use at most {MAX_ENDPOINT_RULES}")
    silence_ms = endpointing.silence_ms if endpointing.HasField("silence_ms") else defaults.endpoint_silence_ms
    options = StreamOptions(
        chunk_ms=chunk_ms or defaults.chunk_ms,
        policy=parse_policy(
            policy or defaults.policy,
            exit_layers=model.config.exit_layers,
            calibration=model.calibration,
            chunk_ms=chunk_ms or defaults.chunk_ms,
        ),
        budget=budget or Budget(),
        fill=Fill.parse(fill or defaults.fill),
        decoder="beam" if hints else "greedy",
        phrase_hints=tuple(hints),
        endpoint_silence_ms=silence_ms,
        endpoint_rules=tuple(
            EndpointRule(rule.min_silence_ms, not rule.without_speech, rule.min_utterance_ms)
            for rule in endpointing.rules
        ),
        max_utterance_ms=endpointing.max_utterance_ms or defaults.max_utterance_ms,
    )
    model.config.chunk_frames(options.chunk_ms)
    return options


def parse_budget(budget: pb.ComputeBudget) -> Budget:
    """Raises ConfigError for a value out of range. An empty message is no limit."""
    target = budget.WhichOneof("target")
    values = {target: getattr(budget, target)} if target else {}
    for name in ("max_exit_layer", "min_exit_layer", "peak_depth"):
        if value := getattr(budget, name):
            values[name] = value
    return Budget(**values)


def budget_in_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> Budget | None:
    """The budget that the call's metadata set, if any. Raises ConfigError when it cannot be read."""
    for key, value in metadata or ():
        if key == BUDGET_KEY:
            return Budget.parse(value if isinstance(value, str) else value.decode("latin-1"))
    return None


def check_model_name(name: str, model: Model) -> None:
    """Raises StreamError when a model is asked for that is not the one served."""
    if name and name != model.name:
        import grpc

        raise StreamError(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"model {name!r} is not served here: leave the name empty or use {model.name!r}",
        )


def response(update: Update, *, word_times: bool, first: bool) -> pb.StreamingRecognizeResponse:
    """One update as a response. `first` says that no final transcript was sent before, so no space is needed.

    Messages are filled in where they lie: building them apart and copying them in takes three times as long.
    """
    result, response = update.result, pb.StreamingRecognizeResponse()
    space = "" if first else " "
    out = response.results.add(
        is_final=update.lasting,
        stability=1.0 if update.lasting else result.stability,
        exit_layer=result.exit_layer,
        decision=DECISIONS[result.reason],
        encoder_macs=sum([chunk.encoder_macs for chunk in update.chunks]),
        committed_characters=len(space + result.committed) if result.committed else 0,
    )
    if text := update.text:
        best = out.alternatives.add(transcript=space + text, confidence=update.confidence)
        for word in result.words if word_times else ():
            shown = best.words.add(word=word.text, confidence=word.confidence)
            set_duration(shown.start_offset, word.start_ms)
            set_duration(shown.end_offset, word.end_ms)
    set_duration(out.result_end_offset, result.end_ms)
    set_duration(out.chunk_latency, update.chunks[-1].latency_ms)
    for chunk in update.chunks:
        record = out.chunks.add(
            index=chunk.index,
            exit_layer=chunk.exit_layer,
            decision=DECISIONS[chunk.reason],
            encoder_macs=chunk.encoder_macs,
        )
        set_duration(record.start_offset, chunk.start_ms)
        set_duration(record.end_offset, chunk.end_ms)
        set_duration(record.latency, chunk.latency_ms)
    return response


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
        encodings=[number for number in ENCODINGS if number],
        provenance={str(key): str(value) for key, value in model.provenance.items()},
    )


def duration(milliseconds: float) -> Duration:
    """Milliseconds as a Duration, to the microsecond."""
    value = Duration()
    set_duration(value, milliseconds)
    return value


def set_duration(field: Duration, milliseconds: float) -> None:
    """Fills in a message's Duration as `duration` does; zero is present, too."""
    micros = round(milliseconds * 1000)
    field.seconds, field.nanos = micros // 1_000_000, micros % 1_000_000 * 1000
    if not micros:
        field.SetInParent()
