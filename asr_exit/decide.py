"""Which streams of a batch go deeper after an exit, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence

from asr_exit.policy import Evidence, Reason, stops
from asr_exit.stream import Fill, Stream


def going_on(streams: Sequence[Stream], exit_index: int) -> list[Stream]:
    """Those of `streams` whose current chunk goes deeper than `exit_index`, in order; the others get their reason."""
    asked, leaving = list[Stream](), set[Stream]()
    for stream in streams:
        if exit_index >= stream.cap:
            stream.reason = stream.cap_reason
            leaving.add(stream)
        elif exit_index >= stream.floor:
            asked.append(stream)
    answers = stops(exit_index, [stream.policy for stream in asked], [_evidence(stream) for stream in asked])
    for stream, stop in zip(asked, answers, strict=True):
        if stop and not _backlog_is_full(stream, exit_index + 1):
            stream.reason = Reason.CONFIDENT
            leaving.add(stream)
    return [stream for stream in streams if stream not in leaving]


def _evidence(stream: Stream) -> Evidence | None:
    if not stream.policy.needs_evidence:
        return None
    assert stream.current is not None
    assert stream.current.scores is not None
    return stream.current.scores.evidence


def _backlog_is_full(stream: Stream, segment: int) -> bool:
    """Whether so many chunks wait at the door of `segment` that the current one has to take them along."""
    return stream.options.fill is Fill.CATCH_UP and stream.waiting(segment) > stream.options.catch_up_cap_chunks
