"""The engine: many streams in one batch, each at its own depth.

A step takes at most one chunk per stream and sweeps the segments from shallow to deep. At each segment the batch is
exactly the streams that go on; those that leave put their chunk into the next segment's inbox (`catch_up`) or have the
skipped layers filled at once (`propagate`, `hole`). What computes is behind `asr_exit.backend.Backend`; there are no
tensors here. Not thread-safe: one thread owns an engine.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from asr_exit.backend import Backend, StreamingModel
from asr_exit.budget import Budget, DepthBudget
from asr_exit.captions import Captions
from asr_exit.decide import going_on
from asr_exit.decoders import make_decoder
from asr_exit.errors import AudioError, CapacityError, EngineError, StreamStateError
from asr_exit.evidence import with_beam_share
from asr_exit.features import StreamingLogMel
from asr_exit.policy import Reason
from asr_exit.stream import Blame, Chunk, ChunkResult, Fill, StepOutput, Stream, StreamOptions


class Engine:
    """Runs streams over one model."""

    def __init__(
        self, model: StreamingModel, *, slots: int = 64, device: Any = "cpu", backend: Backend | None = None
    ) -> None:
        """`slots`: most streams open at once. Memory per slot is fixed (caches of every layer).

        `backend`: one of as many slots that `model` made with options of its own; None = its usual one on `device`.
        """
        self.model, self.config, self.macs = model, model.config, model.macs
        self.backend = model.backend(slots, device) if backend is None else backend
        self.slots = slots
        self._streams: dict[int, Stream] = {}  # by slot
        self._load_cap = self.config.num_exits - 1
        self.seconds_per_mac = self.backend.seconds_per_mac()

    # -- streams ------------------------------------------------------------------------------------------------------

    def open(self, options: StreamOptions | None = None) -> Stream:
        """Open a stream.

        Raises:
            CapacityError: every slot is taken. ConfigError: options that this model or device cannot meet.
        """
        options = options or StreamOptions()
        chunk_frames = self.config.chunk_frames(options.chunk_ms)
        deepest = options.policy.deepest(self.config.num_exits)
        cost = self.macs.cost_model(chunk_frames, self.seconds_per_mac)
        budget = DepthBudget(options.budget, cost, self.config.exit_layers, target=options.policy.adjustable)
        pieces, tokenizer = self.model.pieces, getattr(self.model, "tokenizer", None)  # devices have no tokenizer
        captions = Captions(make_decoder(options, pieces, tokenizer), pieces, self.config.label_ms)
        slot = self.backend.acquire()  # nothing below may fail, or the slot would be lost
        if slot is None:
            raise CapacityError(f"all {self.slots} slots are in use; retry later or serve with more slots")
        stream = Stream(
            slot=slot,
            options=options,
            chunk_frames=chunk_frames,
            features=StreamingLogMel(self.config.features),
            captions=captions,
            budget=budget,
            inboxes=[deque() for _ in range(self.config.num_exits)],
            deepest=deepest,
            policy=options.policy,
        )
        self._streams[slot] = stream
        return stream

    def push(self, stream: Stream, samples: np.ndarray) -> None:
        """Append (N,) float32 samples at the model's rate, mono, in [-1, 1]; any N, cheap.

        Raises:
            AudioError: wrong type or shape, NaN or infinite samples. StreamStateError: finished or closed.
        """
        if stream.closed or stream.finished:
            raise StreamStateError("this stream is finished; open another one for more audio")
        if samples.dtype != np.float32 or samples.ndim != 1:
            raise AudioError(f"samples must be a 1-D float32 array, got {samples.ndim}-D {samples.dtype}")
        if not np.isfinite(samples).all():
            raise AudioError("samples hold NaN or infinite values; send finite samples in [-1, 1]")
        stream.features.push(samples)
        stream.samples += len(samples)

    def finish(self, stream: Stream) -> None:
        """No more audio will come; the next steps flush what is left and end with `end_of_stream`."""
        if stream.closed:
            raise StreamStateError("this stream is closed")
        stream.finished = True

    def flush(self, stream: Stream) -> None:
        """End the utterance with the whole frames pushed so far: a final result follows, even without words."""
        if not stream.finished:
            stream.flushes.append(stream.next_frame + stream.features.ready_frames // self.config.subsampling)

    def close(self, stream: Stream) -> None:
        """Drop a stream at once; its slot is free when this returns. Closing twice is fine."""
        if not stream.closed:
            stream.closed = True
            del self._streams[stream.slot]
            self.backend.release(stream.slot)
            for inbox in stream.inboxes:
                inbox.clear()

    def set_budget(self, stream: Stream, budget: Budget) -> None:
        """Change a stream's budget from its next chunk on. Raises ConfigError when it cannot be met."""
        stream.budget.update(budget, self.macs.cost_model(stream.chunk_frames, self.seconds_per_mac))

    def set_load_ceiling(self, exit_index: int | None) -> None:
        """Deepest exit that load allows; None = no limit."""
        deepest = self.config.num_exits - 1
        self._load_cap = deepest if exit_index is None else max(0, min(exit_index, deepest))

    @property
    def free_slots(self) -> int:
        return self.backend.free_slots

    def ready(self) -> int:
        """Streams that the next step would serve."""
        return sum(map(self.is_ready, self._streams.values()))

    def is_ready(self, stream: Stream) -> bool:
        """Whether a step could serve this stream now."""
        if stream.ended or stream.closed:
            return False
        enough = stream.wanted_frames * self.config.subsampling
        return stream.finished or bool(stream.flushes) or stream.features.ready_frames >= enough

    # -- one step -----------------------------------------------------------------------------------------------------

    def step(self, streams: Iterable[Stream] | None = None) -> StepOutput:
        """Serve `streams`, or every stream, one chunk if they are ready (see `asr_exit.scheduler` for whom and when).

        Streams that fail are closed and reported; the others never notice.
        """
        begin = time.perf_counter()
        served = [s for s in (self._streams.values() if streams is None else streams) if self.is_ready(s)]
        for stream in served:
            stream.step_macs, stream.idle_macs, stream.current = stream.idle_macs, 0, None
        self._take_chunks(served)
        live = [stream for stream in served if stream.current is not None and stream.failure is None]
        for segment in range(self.config.num_exits):
            live = [stream for stream in live if stream.failure is None]
            if not live:
                break
            self._run_segment(segment, live)
            live = going_on([stream for stream in live if stream.failure is None], segment)
        moved = [stream for stream in served if stream.current is not None and stream.failure is None]
        self._fill_skipped(moved)
        for stream in moved:
            assert stream.current is not None
            stream.captions.add(stream.current)
        draining = []
        for stream in served:
            with Blame([stream]):
                draining += [stream] if stream.failure is None and self._wants_drain(stream) else []
        self._drain(draining)
        results, failures = [], []
        for stream in served:
            with Blame([stream]):
                if stream.failure is None:
                    stream.total_macs += stream.step_macs
                    results.append(self._result(stream))
            if stream.failure is not None:
                failures.append((stream, stream.failure))
                self.close(stream)
        seconds = time.perf_counter() - begin
        total_macs = max(1, sum(result.encoder_macs for result in results))
        for result in results:
            stream, macs = result.stream, result.encoder_macs
            stream.budget.spend(macs, self._audio_seconds(stream), seconds * macs / total_macs)
        return StepOutput(results, failures, 1000 * seconds)

    def _audio_seconds(self, stream: Stream) -> float:
        return 0.0 if stream.current is None else stream.current.frames * self.config.frame_ms / 1000

    def _take_chunks(self, streams: Iterable[Stream]) -> None:
        """Move each stream's next chunk through the subsampling to the door of the first segment."""
        factor = self.config.subsampling
        taken = [(stream, stream.features.take(stream.wanted_frames * factor)) for stream in streams]
        members = [(stream, samples) for stream, samples in taken if len(samples)]
        if not members:
            return
        with Blame([stream for stream, _ in members]):
            slots = np.array([stream.slot for stream, _ in members])
            features = self.backend.log_mel([samples for _, samples in members])
            lengths = [-(-len(values) // factor) for values in features]
            longest = max(stream.chunk_frames for stream, _ in members)
            states = self.backend.subsample(slots, features, np.array(lengths), longest)
            for (stream, _), frames, state in zip(members, lengths, states, strict=True):
                stream.current = Chunk(stream.chunks, stream.next_frame, frames, state)
                stream.chunks += 1
                stream.next_frame += frames
                stream.inboxes[0].append(stream.current)
                stream.step_macs += self.macs.stem(frames)
                self._set_cap(stream)

    def _set_cap(self, stream: Stream) -> None:
        """Host-side ceiling for the current chunk, before anything is computed."""
        assert stream.current is not None
        waiting = tuple(stream.waiting(segment) for segment in range(self.config.num_exits))
        fills = stream.options.fill is Fill.PROPAGATE
        costs = self.macs.of_step(stream.current.frames, stream.chunk_frames, waiting, fills)
        seconds, setpoint = self._audio_seconds(stream), stream.budget.setpoint
        stream.policy = stream.options.policy if setpoint is None else stream.options.policy.at(setpoint)
        policy_cap = stream.policy.max_exit(self.config.num_exits, stream.current.index)
        budget_cap = stream.budget.ceiling(seconds, costs)
        stream.cap = min(policy_cap, budget_cap, max(self._load_cap, stream.budget.min_exit))
        stream.floor = stream.budget.floor(seconds, costs)
        stream.cap_reason = (
            Reason.FULL if stream.cap == policy_cap else Reason.BUDGET if stream.cap == budget_cap else Reason.LOAD
        )

    def _run_segment(self, segment: int, streams: list[Stream], rounds: int | None = None) -> None:
        """Work off the inboxes of one segment, one chunk per stream and round, and one batch per chunk size."""
        self._propagate_waiting(segment, streams)
        while rounds != 0 and (waiting := [s for s in streams if s.inboxes[segment] and s.failure is None]):
            rounds = None if rounds is None else rounds - 1
            groups: dict[int, list[tuple[Stream, Chunk]]] = defaultdict(list)
            for stream in waiting:
                groups[stream.chunk_frames].append((stream, stream.inboxes[segment].popleft()))
            for chunk_frames, members in groups.items():
                with Blame([stream for stream, _ in members]):
                    self._run_batch(segment, chunk_frames, members)

    def _run_batch(self, segment: int, chunk_frames: int, members: list[tuple[Stream, Chunk]]) -> None:
        slots = np.array([stream.slot for stream, _ in members])
        judged = any(stream.policy.needs_evidence and segment < stream.cap for stream, _ in members)
        beams = max(stream.policy.beams for stream, _ in members) if judged else 0
        read = judged or any(segment >= stream.cap for stream, _ in members)
        states, scores = self.backend.run(
            segment,
            slots,
            [chunk.state for _, chunk in members],
            np.array([chunk.frames for _, chunk in members]),
            chunk_frames,
            [chunk.scores for _, chunk in members],
            read=read,
            want_log_probs=beams > 0 or any(stream.options.decoder == "beam" for stream, _ in members),
            want_evidence=judged,
            want_similarity=any(stream.policy.needs_similarity for stream, _ in members),
        )
        if scores is not None and beams:
            scores = [with_beam_share(item, beams) for item in scores]
        finite = np.isfinite([item.max_log_prob.sum() for item in scores or ()])
        for row, (stream, chunk) in enumerate(members):
            chunk.state, chunk.exit_index = states[row], segment
            stream.step_macs += self.macs.segment(segment, chunk.frames, with_head=read)
            if scores is not None:
                chunk.scores = scores[row]
                if not finite[row]:
                    stream.failure = EngineError(f"the encoder returned values that are not finite at exit {segment}")
            if segment >= self._target(stream):
                chunk.settled = True
            if segment < stream.deepest:
                stream.inboxes[segment + 1].append(chunk)

    def _target(self, stream: Stream) -> int:
        """Exit after which a chunk's text cannot be revised any more."""
        return min(stream.deepest, stream.budget.max_exit)

    # -- layers that a chunk skipped ----------------------------------------------------------------------------------

    def _propagate_waiting(self, segment: int, streams: list[Stream]) -> None:
        """Fill `propagate`: what waits at a door is filled in when a later chunk passes it, and not before."""
        members: list[tuple[Stream, list[Chunk]]] = []
        for stream in streams:
            inbox = stream.inboxes[segment]
            if stream.options.fill is Fill.PROPAGATE and len(inbox) > 1 and stream.failure is None:
                members.append((stream, [inbox.popleft() for _ in range(len(inbox) - 1)]))
        if not members:
            return
        with Blame([stream for stream, _ in members]):
            slots = np.array([stream.slot for stream, _ in members])
            states = [[chunk.state for chunk in chunks] for _, chunks in members]
            frames = np.array([sum(chunk.frames for chunk in chunks) for _, chunks in members])
            self.backend.propagate(segment, slots, states, frames)
        for stream, chunks in members:
            stream.step_macs += sum(self.macs.propagate(chunk.frames) for chunk in chunks)
            if segment < stream.deepest:
                stream.inboxes[segment + 1].extend(chunks)

    def _fill_skipped(self, streams: list[Stream]) -> None:
        """Settle what waits at the doors of skipped segments, by each stream's fill."""
        for stream in streams:
            if stream.options.fill is Fill.PROPAGATE and stream.current is not None:
                stream.current.settled = True
        for segment in range(1, self.config.num_exits):
            while dropping := [s for s in streams if s.failure is None and self._is_dropped(s, segment)]:
                chunks = [stream.inboxes[segment].popleft() for stream in dropping]  # a slot stands once in a batch
                with Blame(dropping):
                    slots = np.array([stream.slot for stream in dropping])
                    self.backend.leave_hole(segment, slots, np.array([chunk.frames for chunk in chunks]))
                for stream, chunk in zip(dropping, chunks, strict=True):
                    chunk.settled = True
                    if segment < stream.deepest:
                        stream.inboxes[segment + 1].append(chunk)

    def _is_dropped(self, stream: Stream, segment: int) -> bool:
        """Whether the oldest chunk at a door leaves a hole there: with `propagate` when no later chunk can see it."""
        inbox, fill = stream.inboxes[segment], stream.options.fill
        if fill is Fill.PROPAGATE:
            seen = max(1, self.config.left_context_frames // stream.chunk_frames)
            return bool(inbox) and inbox[0].index <= stream.chunks - 1 - seen
        return len(inbox) > (stream.options.catch_up_cap_chunks if fill is Fill.CATCH_UP else 0)

    def _wants_drain(self, stream: Stream) -> bool:
        """Whether a final is due whose text deeper exits would still revise, and the budget lets them."""
        if not self._may_catch_up(stream) or not stream.captions.revisable:
            return False
        return stream.is_over or stream.at_endpoint or stream.is_over_long

    @staticmethod
    def _may_catch_up(stream: Stream) -> bool:
        return stream.options.fill is Fill.CATCH_UP and not stream.budget.budget.has_target

    def catch_up(self) -> bool:
        """For idle moments: bring at most one waiting chunk per stream and segment deeper, as budget and load allow.

        Takes no longer than a step; text and MACs come with the stream's next result. Returns whether there was work.
        """
        streams = [s for s in self._streams.values() if self._may_catch_up(s) and s.failure is None and not s.ended]
        for stream in streams:
            stream.step_macs, stream.cap = 0, min(self._target(stream), self._load_cap)
        for segment in range(1, self.config.num_exits):
            self._run_segment(segment, [s for s in streams if segment <= s.cap], rounds=1)
        for stream in streams:
            stream.idle_macs += stream.step_macs
        return any(stream.step_macs for stream in streams)

    def _drain(self, streams: list[Stream]) -> None:
        """Bring everything that waits to each stream's deepest exit."""
        for stream in streams:
            stream.cap = self._target(stream)
        for segment in range(1, self.config.num_exits):
            self._run_segment(segment, [s for s in streams if segment <= s.cap and s.failure is None])

    def _result(self, stream: Stream) -> ChunkResult:
        captions, over = stream.captions, stream.is_over
        final = None
        if over or stream.at_endpoint:
            if stream.flushed:
                stream.flushes.popleft()
            final = captions.take_final()
        elif stream.is_over_long:
            final = captions.take_all_but_last_word()
            if final is None and captions.utterance_ms() > 2 * stream.options.max_utterance_ms:  # one endless word
                final = captions.take_final()
        caption = final or captions.caption()
        chunk = stream.current
        frames_before, frames = (stream.next_frame, 0) if chunk is None else (chunk.start_frame, chunk.frames)
        start_ms, end_ms = (frame * self.config.frame_ms for frame in (frames_before, frames_before + frames))
        if over:
            end_ms = stream.samples / self.config.features.sample_rate_hertz * 1000
        stream.ended = over
        exit_index = stream.cap if chunk is None else chunk.exit_index
        return ChunkResult(
            stream=stream,
            chunk_index=stream.chunks - 1 if chunk is None else chunk.index,
            chunk_ms=0.0 if chunk is None else end_ms - start_ms,
            start_ms=min(start_ms, end_ms),
            end_ms=end_ms,
            exit_layer=self.config.exit_layers[exit_index],
            reason=Reason.FINAL if chunk is None else stream.reason,
            encoder_macs=stream.step_macs,
            committed=caption.committed,
            tail=caption.tail,
            words=caption.words,
            is_final=final is not None,
            end_of_stream=over,
            stability=1.0 if final is not None else caption.stability,
        )
