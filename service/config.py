"""Configuration of `asr-exit serve`: one TOML file, strict, every field with its unit in the name."""

from __future__ import annotations

import ipaddress
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path

from asr_exit.buckets import BatchBuckets
from asr_exit.config import from_mapping, require
from asr_exit.errors import ConfigError
from asr_exit.scheduler import Batching


@dataclass(frozen=True)
class ListenConfig:
    """Where to listen."""

    host: str = "127.0.0.1"
    port: int = 50051  # 0 picks a free one
    insecure: bool = False  # listen beyond this machine without TLS: audio and tokens can be read on the way
    drain_s: float = 10.0  # after SIGTERM: how long running streams may take to finish

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, f"listen.port={self.port} must be in 0..65535")
        require(self.drain_s >= 0, f"listen.drain_s={self.drain_s} must not be negative")


@dataclass(frozen=True)
class TlsConfig:
    """Certificates, PEM files. They are read again when they change."""

    certificate: str = ""  # of this server, the chain up to its root; empty: no TLS
    key: str = ""  # its private key
    client_ca: str = ""  # mutual TLS: only clients with a certificate from one of these get in

    def __post_init__(self) -> None:
        require(bool(self.certificate) == bool(self.key), "tls.certificate and tls.key belong together: give both")
        require(not self.client_ca or bool(self.certificate), "tls.client_ca needs tls.certificate and tls.key")


@dataclass(frozen=True)
class AuthConfig:
    """Who may use the service."""

    tokens: str = ""  # file with a token a line, read again when it changes or on SIGHUP; empty: anybody


@dataclass(frozen=True)
class ModelSection:
    """What to run and on what."""

    path: str = ""  # empty: the bundled model
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # of each engine, on a CPU
    workers: int = 1  # engines, each with a thread and caches of its own; as many as there are cores to use
    precision: str = "auto"  # bf16 (weights, activations, caches) where the processor computes in it, else fp32
    batch_buckets: tuple[int, ...] = BatchBuckets().sizes  # on a GPU: sizes that batches are padded to; unmeasured
    cuda_graphs: bool = False  # on a GPU: replay captured segments; off because not yet measured; refused on a CPU

    def __post_init__(self) -> None:
        require(self.device in ("auto", "cpu", "cuda"), f"model.device={self.device!r} must be auto, cpu or cuda")
        require(self.threads >= 1, f"model.threads={self.threads} must be at least 1")
        require(self.workers >= 1, f"model.workers={self.workers} must be at least 1")
        known = self.precision in ("auto", "fp32", "bf16")
        require(known, f"model.precision={self.precision!r} must be auto, fp32 or bf16")
        BatchBuckets(self.batch_buckets)  # raises for sizes that are none


@dataclass(frozen=True)
class LimitsConfig:
    """What one client, and all of them together, may take."""

    streams: int = 64  # slots: streams at the same time
    streams_per_client: int = 0  # of them, most of one token or, without tokens, of one address; 0: no limit
    stream_s: float = 0.0  # audio in one stream; beyond it OUT_OF_RANGE; 0: no limit
    memory_mb: int = 0  # resident memory above which no stream is let in; 0: no limit
    message_bytes: int = 1 << 20  # audio in one message
    backlog_s: float = 10.0  # audio of one stream waiting for the engine; beyond it the stream is not read on
    unread_chunks: int = 128  # results a slow reader may leave unread before its audio is not read on
    idle_s: float = 60.0  # a client that sends nothing, or reads nothing, for longer gets DEADLINE_EXCEEDED

    def __post_init__(self) -> None:
        require(self.streams >= 1, f"limits.streams={self.streams} must be at least 1")
        require(self.streams_per_client >= 0, f"limits.streams_per_client={self.streams_per_client} must be 0 or more")
        require(self.stream_s >= 0, f"limits.stream_s={self.stream_s} must be 0 or more")
        require(self.memory_mb >= 0, f"limits.memory_mb={self.memory_mb} must be 0 or more")
        require(self.message_bytes >= 1024, f"limits.message_bytes={self.message_bytes} must be at least 1024")
        require(
            self.backlog_s >= 3, f"limits.backlog_s={self.backlog_s} must be at least 3 (two of the longest chunks)"
        )
        require(self.unread_chunks >= 1, f"limits.unread_chunks={self.unread_chunks} must be at least 1")
        require(self.idle_s > 0, f"limits.idle_s={self.idle_s} must be positive")


@dataclass(frozen=True)
class StreamDefaults:
    """What a request gets for the fields it leaves empty."""

    chunk_ms: int = 640
    policy: str = "auto"  # the criterion that its calibration chose, full depth where the model has none
    fill: str = "propagate"  # what the calibration was made with; catch_up brings every final text to full depth
    endpoint_silence_ms: int = 960  # silence that ends an utterance; 0: only the end of the stream does
    max_utterance_ms: int = 20_000  # a longer utterance is cut before its last word


@dataclass(frozen=True)
class LanguageModelConfig:
    """An n-gram model that ranks the hypotheses of the beam decoder. A request may change its weight; 0 is without."""

    path: str = ""  # `bundled`, a file of recipes.librispeech.lm, or .arpa(.gz); empty: none, greedy decoding
    weight: float = 0.4  # of its log-probabilities against the acoustics'
    word_bonus: float = 1.0  # added for each word, against the preference for few words
    unknown_penalty: float = 20.0  # taken off for a word that the model does not know
    beam_size: int = 8

    def __post_init__(self) -> None:
        require(1 <= self.beam_size <= 64, f"language_model.beam_size={self.beam_size} must be 1 to 64")


@dataclass(frozen=True)
class LoadConfig:
    """When to leave the encoder early because the machine is busy."""

    shed_depth: bool = True
    target_latency_ms: float = 480.0  # a chunk waiting longer than this for its result means overload

    def __post_init__(self) -> None:
        require(self.target_latency_ms > 0, f"load.target_latency_ms={self.target_latency_ms} must be positive")


@dataclass(frozen=True)
class MetricsConfig:
    """Prometheus figures over plain HTTP, at /metrics."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: off

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, f"metrics.port={self.port} must be in 0..65535")


@dataclass(frozen=True)
class LogConfig:
    """What is written to standard error."""

    format: str = "text"  # or json: an object a line, with the stream's id
    level: str = "info"  # debug, info, warning or error; info has two lines per stream
    transcripts: bool = False  # write final texts, too; audio is never written

    def __post_init__(self) -> None:
        require(self.format in ("text", "json"), f"log.format={self.format!r} must be text or json")
        known = self.level in ("debug", "info", "warning", "error")
        require(known, f"log.level={self.level!r} must be debug, info, warning or error")


@dataclass(frozen=True)
class ServeConfig:
    """All of it; the sections are the tables of the TOML file."""

    NESTED = {  # noqa: RUF012  (read by from_mapping)
        "listen": ListenConfig,
        "tls": TlsConfig,
        "auth": AuthConfig,
        "model": ModelSection,
        "limits": LimitsConfig,
        "stream": StreamDefaults,
        "load": LoadConfig,
        "language_model": LanguageModelConfig,
        "batching": Batching,
        "metrics": MetricsConfig,
        "log": LogConfig,
    }

    listen: ListenConfig = field(default_factory=ListenConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    auth: AuthConfig = field(default_factory=AuthConfig)
    model: ModelSection = field(default_factory=ModelSection)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    stream: StreamDefaults = field(default_factory=StreamDefaults)
    load: LoadConfig = field(default_factory=LoadConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    batching: Batching = field(default_factory=Batching)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        require(
            self.listen.insecure or bool(self.tls.certificate) or is_loopback(self.listen.host),
            f"listen.host={self.listen.host!r} can be reached from other machines and the connection is not encrypted: "
            "use 127.0.0.1, give a certificate ([tls] or --tls-cert and --tls-key), or allow it with --insecure "
            "(listen.insecure = true)",
        )


def load_config(path: str | Path | None, overrides: dict[str, dict[str, object]] | None = None) -> ServeConfig:
    """Reads a TOML file (None: only defaults) and lays `overrides` (table -> key -> value) over it.

    Raises ConfigError for a missing or malformed file, an unknown key (naming the nearest) or a value out of range.
    """
    values: dict[str, object] = {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for table, pairs in (overrides or {}).items():
        section = values.setdefault(table, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{table} must be a table: write [{table}] and its keys below it")
        section.update(pairs)
    for table, section in values.items():
        if table in ServeConfig.NESTED:
            _check_types(table, section)
    return from_mapping(ServeConfig, values, "config")


def _check_types(table: str, section: object) -> None:
    """Raises ConfigError for a value whose type is not that of its default."""
    if not isinstance(section, dict):
        raise ConfigError(f"{table} must be a table: write [{table}] and its keys below it")
    for known in fields(ServeConfig.NESTED[table]):
        value, wanted = section.get(known.name, known.default), type(known.default)
        fits = (wanted is float and type(value) is int) or (wanted is tuple and type(value) is list)
        name = "list" if wanted is tuple else wanted.__name__
        require(type(value) is wanted or fits, f"{table}.{known.name}={value!r} must be of type {name}")


def is_loopback(host: str) -> bool:
    """True when only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
