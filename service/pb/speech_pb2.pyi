import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StreamingRecognizeRequest(_message.Message):
    __slots__ = ("streaming_config", "audio_content", "control")
    STREAMING_CONFIG_FIELD_NUMBER: _ClassVar[int]
    AUDIO_CONTENT_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    streaming_config: StreamingConfig
    audio_content: bytes
    control: StreamControl
    def __init__(self, streaming_config: _Optional[_Union[StreamingConfig, _Mapping]] = ..., audio_content: _Optional[bytes] = ..., control: _Optional[_Union[StreamControl, _Mapping]] = ...) -> None: ...

class StreamingConfig(_message.Message):
    __slots__ = ("encoding", "sample_rate_hertz", "interim_results", "enable_word_time_offsets", "chunk_ms", "policy", "fill", "compute_budget", "model", "audio_channel_count", "audio_channel", "endpointing", "phrase_hints", "language_model_weight")
    class AudioEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ENCODING_UNSPECIFIED: _ClassVar[StreamingConfig.AudioEncoding]
        LINEAR16: _ClassVar[StreamingConfig.AudioEncoding]
        FLAC: _ClassVar[StreamingConfig.AudioEncoding]
        MULAW: _ClassVar[StreamingConfig.AudioEncoding]
        OGG_OPUS: _ClassVar[StreamingConfig.AudioEncoding]
        ALAW: _ClassVar[StreamingConfig.AudioEncoding]
        FLOAT32: _ClassVar[StreamingConfig.AudioEncoding]
    ENCODING_UNSPECIFIED: StreamingConfig.AudioEncoding
    LINEAR16: StreamingConfig.AudioEncoding
    FLAC: StreamingConfig.AudioEncoding
    MULAW: StreamingConfig.AudioEncoding
    OGG_OPUS: StreamingConfig.AudioEncoding
    ALAW: StreamingConfig.AudioEncoding
    FLOAT32: StreamingConfig.AudioEncoding
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATE_HERTZ_FIELD_NUMBER: _ClassVar[int]
    INTERIM_RESULTS_FIELD_NUMBER: _ClassVar[int]
    ENABLE_WORD_TIME_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_MS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    FILL_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_BUDGET_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    AUDIO_CHANNEL_COUNT_FIELD_NUMBER: _ClassVar[int]
    AUDIO_CHANNEL_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTING_FIELD_NUMBER: _ClassVar[int]
    PHRASE_HINTS_FIELD_NUMBER: _ClassVar[int]
    LANGUAGE_MODEL_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    encoding: StreamingConfig.AudioEncoding
    sample_rate_hertz: int
    interim_results: bool
    enable_word_time_offsets: bool
    chunk_ms: int
    policy: str
    fill: str
    compute_budget: ComputeBudget
    model: str
    audio_channel_count: int
    audio_channel: int
    endpointing: EndpointingConfig
    phrase_hints: _containers.RepeatedCompositeFieldContainer[PhraseHints]
    language_model_weight: float
    def __init__(self, encoding: _Optional[_Union[StreamingConfig.AudioEncoding, str]] = ..., sample_rate_hertz: _Optional[int] = ..., interim_results: bool = ..., enable_word_time_offsets: bool = ..., chunk_ms: _Optional[int] = ..., policy: _Optional[str] = ..., fill: _Optional[str] = ..., compute_budget: _Optional[_Union[ComputeBudget, _Mapping]] = ..., model: _Optional[str] = ..., audio_channel_count: _Optional[int] = ..., audio_channel: _Optional[int] = ..., endpointing: _Optional[_Union[EndpointingConfig, _Mapping]] = ..., phrase_hints: _Optional[_Iterable[_Union[PhraseHints, _Mapping]]] = ..., language_model_weight: _Optional[float] = ...) -> None: ...

class EndpointingConfig(_message.Message):
    __slots__ = ("silence_ms", "rules", "max_utterance_ms")
    SILENCE_MS_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    MAX_UTTERANCE_MS_FIELD_NUMBER: _ClassVar[int]
    silence_ms: int
    rules: _containers.RepeatedCompositeFieldContainer[EndpointRule]
    max_utterance_ms: int
    def __init__(self, silence_ms: _Optional[int] = ..., rules: _Optional[_Iterable[_Union[EndpointRule, _Mapping]]] = ..., max_utterance_ms: _Optional[int] = ...) -> None: ...

class EndpointRule(_message.Message):
    __slots__ = ("min_silence_ms", "min_utterance_ms", "without_speech")
    MIN_SILENCE_MS_FIELD_NUMBER: _ClassVar[int]
    MIN_UTTERANCE_MS_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_SPEECH_FIELD_NUMBER: _ClassVar[int]
    min_silence_ms: int
    min_utterance_ms: int
    without_speech: bool
    def __init__(self, min_silence_ms: _Optional[int] = ..., min_utterance_ms: _Optional[int] = ..., without_speech: bool = ...) -> None: ...

class PhraseHints(_message.Message):
    __slots__ = ("phrases", "boost")
    PHRASES_FIELD_NUMBER: _ClassVar[int]
    BOOST_FIELD_NUMBER: _ClassVar[int]
    phrases: _containers.RepeatedScalarFieldContainer[str]
    boost: float
    def __init__(self, phrases: _Optional[_Iterable[str]] = ..., boost: _Optional[float] = ...) -> None: ...

class StreamControl(_message.Message):
    __slots__ = ("compute_budget", "flush")
    COMPUTE_BUDGET_FIELD_NUMBER: _ClassVar[int]
    FLUSH_FIELD_NUMBER: _ClassVar[int]
    compute_budget: ComputeBudget
    flush: Flush
    def __init__(self, compute_budget: _Optional[_Union[ComputeBudget, _Mapping]] = ..., flush: _Optional[_Union[Flush, _Mapping]] = ...) -> None: ...

class Flush(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ComputeBudget(_message.Message):
    __slots__ = ("mean_depth", "encoder_macs_per_second", "real_time_factor", "max_exit_layer", "min_exit_layer", "peak_depth")
    MEAN_DEPTH_FIELD_NUMBER: _ClassVar[int]
    ENCODER_MACS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    REAL_TIME_FACTOR_FIELD_NUMBER: _ClassVar[int]
    MAX_EXIT_LAYER_FIELD_NUMBER: _ClassVar[int]
    MIN_EXIT_LAYER_FIELD_NUMBER: _ClassVar[int]
    PEAK_DEPTH_FIELD_NUMBER: _ClassVar[int]
    mean_depth: float
    encoder_macs_per_second: float
    real_time_factor: float
    max_exit_layer: int
    min_exit_layer: int
    peak_depth: float
    def __init__(self, mean_depth: _Optional[float] = ..., encoder_macs_per_second: _Optional[float] = ..., real_time_factor: _Optional[float] = ..., max_exit_layer: _Optional[int] = ..., min_exit_layer: _Optional[int] = ..., peak_depth: _Optional[float] = ...) -> None: ...

class StreamingRecognizeResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[StreamingRecognitionResult]
    def __init__(self, results: _Optional[_Iterable[_Union[StreamingRecognitionResult, _Mapping]]] = ...) -> None: ...

class StreamingRecognitionResult(_message.Message):
    __slots__ = ("alternatives", "is_final", "stability", "result_end_offset", "exit_layer", "decision", "encoder_macs", "chunk_latency", "chunks", "committed_characters")
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    IS_FINAL_FIELD_NUMBER: _ClassVar[int]
    STABILITY_FIELD_NUMBER: _ClassVar[int]
    RESULT_END_OFFSET_FIELD_NUMBER: _ClassVar[int]
    EXIT_LAYER_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    ENCODER_MACS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_LATENCY_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_CHARACTERS_FIELD_NUMBER: _ClassVar[int]
    alternatives: _containers.RepeatedCompositeFieldContainer[SpeechRecognitionAlternative]
    is_final: bool
    stability: float
    result_end_offset: _duration_pb2.Duration
    exit_layer: int
    decision: ChunkReport.Decision
    encoder_macs: int
    chunk_latency: _duration_pb2.Duration
    chunks: _containers.RepeatedCompositeFieldContainer[ChunkReport]
    committed_characters: int
    def __init__(self, alternatives: _Optional[_Iterable[_Union[SpeechRecognitionAlternative, _Mapping]]] = ..., is_final: bool = ..., stability: _Optional[float] = ..., result_end_offset: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., exit_layer: _Optional[int] = ..., decision: _Optional[_Union[ChunkReport.Decision, str]] = ..., encoder_macs: _Optional[int] = ..., chunk_latency: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., chunks: _Optional[_Iterable[_Union[ChunkReport, _Mapping]]] = ..., committed_characters: _Optional[int] = ...) -> None: ...

class ChunkReport(_message.Message):
    __slots__ = ("index", "start_offset", "end_offset", "exit_layer", "decision", "encoder_macs", "latency")
    class Decision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        DECISION_UNSPECIFIED: _ClassVar[ChunkReport.Decision]
        CONFIDENT: _ClassVar[ChunkReport.Decision]
        BUDGET: _ClassVar[ChunkReport.Decision]
        LOAD: _ClassVar[ChunkReport.Decision]
        FULL: _ClassVar[ChunkReport.Decision]
        FINAL: _ClassVar[ChunkReport.Decision]
    DECISION_UNSPECIFIED: ChunkReport.Decision
    CONFIDENT: ChunkReport.Decision
    BUDGET: ChunkReport.Decision
    LOAD: ChunkReport.Decision
    FULL: ChunkReport.Decision
    FINAL: ChunkReport.Decision
    INDEX_FIELD_NUMBER: _ClassVar[int]
    START_OFFSET_FIELD_NUMBER: _ClassVar[int]
    END_OFFSET_FIELD_NUMBER: _ClassVar[int]
    EXIT_LAYER_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    ENCODER_MACS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_FIELD_NUMBER: _ClassVar[int]
    index: int
    start_offset: _duration_pb2.Duration
    end_offset: _duration_pb2.Duration
    exit_layer: int
    decision: ChunkReport.Decision
    encoder_macs: int
    latency: _duration_pb2.Duration
    def __init__(self, index: _Optional[int] = ..., start_offset: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., end_offset: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., exit_layer: _Optional[int] = ..., decision: _Optional[_Union[ChunkReport.Decision, str]] = ..., encoder_macs: _Optional[int] = ..., latency: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class SpeechRecognitionAlternative(_message.Message):
    __slots__ = ("transcript", "confidence", "words")
    TRANSCRIPT_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    transcript: str
    confidence: float
    words: _containers.RepeatedCompositeFieldContainer[WordInfo]
    def __init__(self, transcript: _Optional[str] = ..., confidence: _Optional[float] = ..., words: _Optional[_Iterable[_Union[WordInfo, _Mapping]]] = ...) -> None: ...

class WordInfo(_message.Message):
    __slots__ = ("start_offset", "end_offset", "word", "confidence")
    START_OFFSET_FIELD_NUMBER: _ClassVar[int]
    END_OFFSET_FIELD_NUMBER: _ClassVar[int]
    WORD_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    start_offset: _duration_pb2.Duration
    end_offset: _duration_pb2.Duration
    word: str
    confidence: float
    def __init__(self, start_offset: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., end_offset: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., word: _Optional[str] = ..., confidence: _Optional[float] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "sample_rate_hertz", "parameters", "exits", "chunk_ms", "default_chunk_ms", "policies", "default_policy", "fills", "default_fill", "encodings", "provenance")
    class ProvenanceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATE_HERTZ_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    EXITS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_MS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_CHUNK_MS_FIELD_NUMBER: _ClassVar[int]
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_POLICY_FIELD_NUMBER: _ClassVar[int]
    FILLS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_FILL_FIELD_NUMBER: _ClassVar[int]
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    sample_rate_hertz: int
    parameters: int
    exits: _containers.RepeatedCompositeFieldContainer[Exit]
    chunk_ms: _containers.RepeatedScalarFieldContainer[int]
    default_chunk_ms: int
    policies: _containers.RepeatedScalarFieldContainer[str]
    default_policy: str
    fills: _containers.RepeatedScalarFieldContainer[str]
    default_fill: str
    encodings: _containers.RepeatedScalarFieldContainer[StreamingConfig.AudioEncoding]
    provenance: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., sample_rate_hertz: _Optional[int] = ..., parameters: _Optional[int] = ..., exits: _Optional[_Iterable[_Union[Exit, _Mapping]]] = ..., chunk_ms: _Optional[_Iterable[int]] = ..., default_chunk_ms: _Optional[int] = ..., policies: _Optional[_Iterable[str]] = ..., default_policy: _Optional[str] = ..., fills: _Optional[_Iterable[str]] = ..., default_fill: _Optional[str] = ..., encodings: _Optional[_Iterable[_Union[StreamingConfig.AudioEncoding, str]]] = ..., provenance: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Exit(_message.Message):
    __slots__ = ("layer", "encoder_macs_per_second")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ENCODER_MACS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    layer: int
    encoder_macs_per_second: int
    def __init__(self, layer: _Optional[int] = ..., encoder_macs_per_second: _Optional[int] = ...) -> None: ...
