"""More streams than the server has time for at full depth, and then fewer: depth has to give way and to come back.

`overload_of` times the capacity speak for a while; then all but `relief_of` times stop at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.bench.load import quantiles
from service.bench.served import ServedProcess
from service.bench.speakers import Heard, Speakers, Speech
from service.client import StreamSettings

OVERLOAD, RELIEF = 1.5, 0.5  # times the capacity at full depth
RECOVERY_BAR_S = 2.0
CHANGES_BAR = 1.0  # of the ceiling, in a second
RELIEF_S = 8.0
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Phase:
    """One number of streams for a while. Quantiles p50, p95, p99 in milliseconds; None where nothing was seen."""

    streams: int
    seconds: float
    chunk_latency_ms: tuple[float, ...] | None
    late_half_ms: tuple[float, ...] | None  # of the phase's second half: a growing queue would show there
    mean_exit_layer: float
    cut_by_load: float  # share of chunks that load kept from going deeper


@dataclass(frozen=True)
class OverloadReport:
    """What happened, and how the ceiling moved."""

    overload: Phase
    relief: Phase
    ceiling_changes_per_second: float  # during the overload
    recovery_s: float  # from the end of the overload to the last chunk that load cut
    ceilings: list[tuple[float, int]]  # (second, deepest layer that load allowed)
    errors: dict[str, int]
    generator_late: float  # share of messages sent over 100 ms late

    def holds(self, latency_ms: float) -> bool:
        """Whether all streams kept real time, shallower, and depth came back in time without having swung."""
        late = self.overload.late_half_ms
        return (
            late is not None
            and late[1] <= latency_ms
            and self.overload.cut_by_load > 0
            and self.overload.mean_exit_layer < self.relief.mean_exit_layer
            and self.recovery_s <= RECOVERY_BAR_S
            and self.ceiling_changes_per_second <= CHANGES_BAR
            and not self.errors
        )


def measure_overload(
    server: ServedProcess,
    speeches: Sequence[Speech],
    settings: StreamSettings,
    *,
    capacity: int,
    warm_up_s: float,
    seconds: float,
    message_ms: int,
    relief_s: float = RELIEF_S,
) -> OverloadReport:
    """`capacity`: real-time streams that the server holds at full depth. `seconds` of overload after the warm-up."""
    many, few = max(2, round(OVERLOAD * capacity)), max(1, round(RELIEF * capacity))
    speakers = Speakers(server.address, speeches, settings, message_ms)
    ceilings: list[tuple[float, int]] = []
    changes: list[float] = []

    async def look(begin: float, until_s: float) -> float:
        """Watches the ceiling; returns the second at which it stopped."""
        loop = asyncio.get_running_loop()
        while (now := loop.time() - begin) < until_s:
            figures = await asyncio.to_thread(server.figures)
            ceilings.append((now, int(figures["asr_exit_load_ceiling_layer"])))
            changes.append(figures["asr_exit_load_ceiling_changes_total"])
            await asyncio.sleep(_LOOK_EVERY_S)
        return now

    async def go() -> tuple[float, float]:
        async with speakers.speaking(many) as tasks:
            await asyncio.sleep(warm_up_s)
            speakers.count_from_now()
            begin = asyncio.get_running_loop().time()
            drop_s = await look(begin, seconds)
            changed = changes[-1] - changes[0]
            for task in tasks[few:]:
                task.cancel()
            await look(begin, drop_s + relief_s)
            return drop_s, changed

    drop_s, changed = asyncio.run(go())
    heard = speakers.heard
    cut = [second - drop_s for second, _, decision in heard.depths if decision == "load" and second > drop_s]
    return OverloadReport(
        overload=_phase(heard, many, 0.0, drop_s),
        relief=_phase(heard, few, drop_s + min(RECOVERY_BAR_S, relief_s / 2), drop_s + relief_s),
        ceiling_changes_per_second=changed / drop_s,
        recovery_s=max(cut, default=0.0),
        ceilings=ceilings,
        errors=dict(heard.errors),
        generator_late=heard.late_sends * message_ms / (1000 * (many * drop_s + few * relief_s)),
    )


def _phase(heard: Heard, streams: int, begin_s: float, end_s: float) -> Phase:
    latencies = [(second, latency) for second, latency in heard.chunk_ms if begin_s <= second < end_s]
    depths = [(layer, decision) for second, layer, decision in heard.depths if begin_s <= second < end_s]
    middle_s = (begin_s + end_s) / 2
    return Phase(
        streams=streams,
        seconds=end_s - begin_s,
        chunk_latency_ms=quantiles([latency for _, latency in latencies]),
        late_half_ms=quantiles([latency for second, latency in latencies if second >= middle_s]),
        mean_exit_layer=float(np.mean([layer for layer, _ in depths])) if depths else 0.0,
        cut_by_load=sum(decision == "load" for _, decision in depths) / max(1, len(depths)),
    )
