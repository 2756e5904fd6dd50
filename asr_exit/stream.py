"""What a stream asks for, what it holds, and what it gets back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Literal

from asr_exit.backend import State
from asr_exit.biasing import PhraseHint
from asr_exit.budget import Budget, DepthBudget
from asr_exit.captions import Captions
from asr_exit.config import require
from asr_exit.endpoint import EndpointRule
from asr_exit.errors import ConfigError, EngineError
from asr_exit.evidence import ExitScores
from asr_exit.features import StreamingLogMel
from asr_exit.fusion import LanguageModel
from asr_exit.policy import ExitPolicy, Full, Reason
from asr_exit.words import Word


class Fill(StrEnum):
    """What the layers that a chunk skipped get."""

    CATCH_UP = "catch_up"  # the chunk itself, later: exact; earlier text is revised by it
    PROPAGATE = "propagate"  # keys, values and convolution input projected from the exit's hidden state
    HOLE = "hole"  # nothing: the keys are masked, the convolution restarts

    @classmethod
    def parse(cls, name: str) -> Fill:
        """`name` to member. Raises ConfigError naming the choices."""
        try:
            return cls(name)
        except ValueError:
            raise ConfigError(f"unknown fill {name!r}; use one of {', '.join(cls)}") from None


@dataclass(frozen=True)
class StreamOptions:
    """Options of one stream. Raises ConfigError when one is out of range."""

    chunk_ms: float = 640
    policy: ExitPolicy = field(default_factory=Full)
    budget: Budget = field(default_factory=Budget)
    fill: Fill = Fill.PROPAGATE
    decoder: Literal["greedy", "beam"] = "greedy"
    beam_size: int = 8
    endpoint_silence_ms: float = 960  # this much silence after words ends an utterance; 0 = it does not
    endpoint_rules: tuple[EndpointRule, ...] = ()  # each of them ends an utterance, too
    max_utterance_ms: float = 20_000  # a longer utterance is cut before its last word
    catch_up_cap_chunks: int = 64  # longer backlogs are worked off at once, or given up where the budget forbids that
    phrase_hints: tuple[PhraseHint, ...] = ()  # need the beam decoder
    language_model: LanguageModel | None = None  # needs the beam decoder

    def __post_init__(self) -> None:
        require(self.decoder in ("greedy", "beam"), f"unknown decoder {self.decoder!r}; use greedy or beam")
        require(1 <= self.beam_size <= 64, "beam_size must be 1-64")
        require(self.endpoint_silence_ms >= 0, "endpoint_silence_ms must be 0 (off) or more")
        require(self.max_utterance_ms >= 1_000, "max_utterance_ms must be at least 1000")
        require(self.catch_up_cap_chunks >= 1, "catch_up_cap_chunks must be at least 1")
        require(self.language_model is None or self.decoder == "beam", "a language model needs decoder='beam'")
        _ = self.rules  # raises for a silence that is out of range
        require(not self.phrase_hints or self.decoder == "beam", "phrase hints need decoder='beam'")

    @cached_property
    def rules(self) -> tuple[EndpointRule, ...]:
        """All that end an utterance, but for its greatest length."""
        silence = (EndpointRule(self.endpoint_silence_ms),) if self.endpoint_silence_ms else ()
        return silence + self.endpoint_rules


@dataclass(eq=False)
class Chunk:
    """One chunk on its way through the segments."""

    index: int
    start_frame: int
    frames: int
    state: State  # (T, D) input of the next segment
    exit_index: int = -1  # deepest exit computed so far
    scores: ExitScores | None = None  # of the deepest exit that was read
    settled: bool = False  # no deeper answer will come


@dataclass(eq=False)
class Stream:
    """One open stream. Only the engine touches its fields."""

    slot: int
    options: StreamOptions
    chunk_frames: int
    features: StreamingLogMel
    captions: Captions
    budget: DepthBudget
    inboxes: list[deque[Chunk]]  # per segment, the chunks waiting at its door
    deepest: int  # exit index below which the policy never goes
    policy: ExitPolicy  # that of the options, set to what the budget asks for now
    samples: int = 0
    chunks: int = 0
    next_frame: int = 0
    current: Chunk | None = None
    cap: int = 0  # deepest exit that the current chunk may take
    floor: int = 0  # shallowest one: the budget is a target and would be missed from below
    cap_reason: Reason = Reason.FULL
    reason: Reason = Reason.FULL
    step_macs: int = 0
    total_macs: int = 0
    idle_macs: int = 0  # spent between steps, reported with the next result
    finished: bool = False  # no more audio will come
    flushes: deque[int] = field(default_factory=deque)  # frames at which the utterance is to end
    ended: bool = False  # its last result is out
    closed: bool = False
    failure: Exception | None = None

    @property
    def wanted_frames(self) -> int:
        """Encoder frames of the next chunk: to the end of the chunk grid's cell, or to where a flush cuts it."""
        end = self.next_frame - self.next_frame % self.chunk_frames + self.chunk_frames
        return min(end, self.flushes[0] if self.flushes else end) - self.next_frame

    @property
    def flushed(self) -> bool:
        """Whether a flush is due here."""
        return bool(self.flushes) and self.next_frame >= self.flushes[0]

    @property
    def is_over(self) -> bool:
        """Whether all audio has been taken and no more will come."""
        return self.finished and self.features.ready_frames == 0

    @property
    def at_endpoint(self) -> bool:
        """Whether an utterance ends here."""
        return self.flushed or self.captions.at_endpoint(self.options.rules)

    @property
    def is_over_long(self) -> bool:
        """Whether the utterance has to be cut."""
        return self.captions.has_words and self.captions.utterance_ms() > self.options.max_utterance_ms

    def waiting(self, segment: int) -> int:
        """Chunks waiting at the door of `segment`."""
        return len(self.inboxes[segment])


@dataclass(frozen=True)
class ChunkResult:
    """What a step says about one stream. Times are milliseconds from the start of the stream."""

    stream: Stream
    chunk_index: int
    chunk_ms: float  # length of audio in this chunk
    start_ms: float
    end_ms: float
    exit_layer: int
    reason: Reason
    encoder_macs: int  # spent by this step for this stream, catching up and filling included
    committed: str  # text of the current utterance that will not change
    tail: str  # text after it that may
    words: tuple[Word, ...]  # of the current utterance
    is_final: bool  # the utterance ended: `committed` is its final text, `tail` is empty
    end_of_stream: bool
    stability: float  # 1 for finals; else how likely the text is to stay as it is


@dataclass(frozen=True)
class StepOutput:
    """Results of one step, and the streams that failed in it (closed already)."""

    results: list[ChunkResult]
    failures: list[tuple[Stream, Exception]]
    step_ms: float


class Blame:
    """Context that turns an exception of a batch into the failure of that batch's streams."""

    def __init__(self, streams: list[Stream]) -> None:
        self._streams = streams

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        for stream in self._streams:
            failure = EngineError(f"computation failed: {error}")
            failure.__cause__ = error
            stream.failure = failure
        return True
