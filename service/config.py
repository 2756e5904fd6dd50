"""Configuration of `asr-exit serve`: one TOML file, strict, every field with its unit in the name."""

from __future__ import annotations

import ipaddress
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path

from asr_exit.config import from_mapping, require
from asr_exit.errors import ConfigError


@dataclass(frozen=True)
class ListenConfig:
    """Where to listen."""

    host: str = "127.0.0.1"
    port: int = 50051  # 0 picks a free one
    insecure: bool = False  # needed to listen beyond this machine: the connection is not encrypted
    drain_s: float = 10.0  # after SIGTERM: how long running streams may take to finish

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, f"listen.port={self.port} must be in 0..65535")
        require(self.drain_s >= 0, f"listen.drain_s={self.drain_s} must not be negative")
        require(
            self.insecure or is_loopback(self.host),
            f"listen.host={self.host!r} can be reached from other machines and the connection is not encrypted: "
            "use 127.0.0.1, or allow it with --insecure (listen.insecure = true)",
        )


@dataclass(frozen=True)
class ModelSection:
    """What to run and on what."""

    path: str = ""  # empty: the bundled model
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # of the engine, on a CPU

    def __post_init__(self) -> None:
        require(self.device in ("auto", "cpu", "cuda"), f"model.device={self.device!r} must be auto, cpu or cuda")
        require(self.threads >= 1, f"model.threads={self.threads} must be at least 1")


@dataclass(frozen=True)
class LimitsConfig:
    """What one client, and all of them together, may take."""

    streams: int = 64  # slots: streams at the same time
    message_bytes: int = 1 << 20  # audio in one message
    backlog_s: float = 10.0  # audio of one stream waiting for the engine; beyond it the stream is not read on
    unread_chunks: int = 128  # results a slow reader may leave unread before its audio is not read on
    idle_s: float = 60.0  # a client that sends nothing, or reads nothing, for longer gets DEADLINE_EXCEEDED

    def __post_init__(self) -> None:
        require(self.streams >= 1, f"limits.streams={self.streams} must be at least 1")
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
    policy: str = "auto"  # posterior where the model is calibrated for it, else full
    fill: str = "propagate"  # what the calibration was made with; catch_up brings every final text to full depth
    endpoint_silence_ms: int = 960  # silence that ends an utterance; 0: only the end of the stream does
    max_utterance_ms: int = 20_000  # a longer utterance is cut before its last word


@dataclass(frozen=True)
class LanguageModelConfig:
    """An n-gram model that ranks the hypotheses of the beam decoder. A request may change its weight; 0 is without."""

    path: str = ""  # a file of recipes.librispeech.lm, or .arpa or .arpa.gz; empty: no language model, greedy decoding
    weight: float = 0.5  # of its log-probabilities against the acoustics'
    word_bonus: float = 1.0  # added for each word, against the preference for few words
    unknown_penalty: float = 15.0  # taken off for a word that the model does not know
    beam_size: int = 8

    def __post_init__(self) -> None:
        require(1 <= self.beam_size <= 64, f"language_model.beam_size={self.beam_size} must be 1 to 64")


@dataclass(frozen=True)
class LoadConfig:
    """When to leave the encoder early because the machine is busy."""

    shed_depth: bool = True
    target_latency_ms: float = 640.0  # a chunk waiting longer than this for its result means overload

    def __post_init__(self) -> None:
        require(self.target_latency_ms > 0, f"load.target_latency_ms={self.target_latency_ms} must be positive")


@dataclass(frozen=True)
class ServeConfig:
    """All of it; the sections are the tables of the TOML file."""

    NESTED = {  # noqa: RUF012  (read by from_mapping)
        "listen": ListenConfig,
        "model": ModelSection,
        "limits": LimitsConfig,
        "stream": StreamDefaults,
        "load": LoadConfig,
        "language_model": LanguageModelConfig,
    }

    listen: ListenConfig = field(default_factory=ListenConfig)
    model: ModelSection = field(default_factory=ModelSection)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    stream: StreamDefaults = field(default_factory=StreamDefaults)
    load: LoadConfig = field(default_factory=LoadConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)


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
        number = wanted is float and type(value) is int
        require(type(value) is wanted or number, f"{table}.{known.name}={value!r} must be of type {wanted.__name__}")


def is_loopback(host: str) -> bool:
    """True when only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
