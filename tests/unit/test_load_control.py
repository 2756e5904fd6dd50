"""The load controller against a simulated server with a fake clock."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from asr_exit.errors import ConfigError
from asr_exit.load_control import LEAST_MARGINAL, LoadController, LoadSignal, needed_seconds

CHUNK_SECONDS = 0.64


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Server:
    """Streams that each send a chunk every 640 ms, evenly staggered; a step serves one chunk of every ready stream.

    At full depth one stream needs `1 / capacity` of the machine; cost is proportional to depth. Each step takes
    `fixed_seconds` more (in proportion to depth, too), and up to `noise` of its time more or less.
    """

    capacity: int = 16
    fixed_seconds: float = 0.0
    noise: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    target_ms: float = 640.0
    wish: int = 5
    clock: Clock = field(default_factory=Clock)
    due: dict[int, float] = field(default_factory=dict)
    latencies_ms: list[tuple[float, float]] = field(default_factory=list)
    ceilings: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.controller = LoadController(6, self.target_ms, self.clock)

    def set_streams(self, count: int) -> None:
        self.due = {k: self.due.get(k, self.clock.now + CHUNK_SECONDS * k / count) for k in range(count)}

    def run(self, seconds: float) -> None:
        end = self.clock.now + seconds
        while self.clock.now < end:
            ready = [k for k, due in self.due.items() if due <= self.clock.now]
            if not ready:
                self.clock.now = max(self.clock.now + 1e-3, min([*self.due.values(), self.clock.now + 0.1]))
                if self.clock.now - (self.ceilings[-1][0] if self.ceilings else 0.0) > 0.05:
                    self._report(0.0, 0.0, 0)
                continue
            depth = min(self.wish, self.controller.ceiling)
            step = (self.fixed_seconds + len(ready) * CHUNK_SECONDS / self.capacity) * (depth + 1) / 6
            step *= 1 + self.rng.uniform(-self.noise, self.noise)
            waits = [self.clock.now - self.due[k] for k in ready]
            self.clock.now += step
            for k, wait in zip(ready, waits, strict=True):
                self.latencies_ms.append((self.clock.now, 1000 * (wait + step)))
                self.due[k] += CHUNK_SECONDS
            still = sum(due <= self.clock.now for due in self.due.values())
            self._report(1000 * max(waits), 1000 * step, still, len(ready))

    def _report(self, delay_ms: float, step_ms: float, ready: int, chunks: int = 0) -> None:
        self.controller.update(LoadSignal(delay_ms, step_ms, 640.0, ready_streams=ready, free_slots=8, chunks=chunks))
        self.ceilings.append((self.clock.now, self.controller.ceiling))

    def changes(self, since: float = 0.0) -> list[float]:
        pairs = itertools.pairwise(self.ceilings)
        return [now for (_, before), (now, after) in pairs if before != after and now >= since]

    def worst_ms(self, since: float) -> float:
        return max(latency for at, latency in self.latencies_ms if at >= since)


def test_an_easy_load_is_left_at_full_depth() -> None:
    server = Server()
    server.set_streams(10)
    server.run(60)
    assert server.changes() == []
    assert server.controller.ceiling == 5
    assert server.worst_ms(0) < 640


@pytest.mark.parametrize(("overload", "settled_seconds"), [(1.5, 6), (2.5, 8), (5.0, 30)])
def test_overload_sheds_depth_keeps_real_time_and_does_not_oscillate(overload: float, settled_seconds: float) -> None:
    """At 5.0 even the first exit leaves only a sixth of the machine to work off the backlog; it still goes."""
    server = Server()
    server.set_streams(int(16 * overload))
    start = server.clock.now
    server.run(60)
    assert server.controller.ceiling < 6 / overload  # below what the machine can carry
    assert server.worst_ms(start + settled_seconds) < 640  # no growing queue: latency is back under the target
    assert server.changes(start + 8) == []
    times = server.changes()
    assert times
    assert all(later - earlier >= 1.0 for earlier, later in itertools.pairwise(times))


def assert_depth_comes_back(server: Server, overload: float, within_seconds: float = 2.0) -> None:
    """After half the capacity is left, for good."""
    server.set_streams(int(server.capacity * overload))
    server.run(30)
    assert server.controller.ceiling < 5
    server.set_streams(server.capacity // 2)
    server.run(within_seconds)
    assert server.controller.ceiling == 5
    since = server.clock.now
    server.run(60)
    assert server.changes(since) == []
    assert server.worst_ms(since) < 640


@pytest.mark.parametrize("overload", [1.5, 5.0])
def test_depth_is_back_within_two_seconds_of_audio_when_load_halves(overload: float) -> None:
    assert_depth_comes_back(Server(), overload)


@pytest.mark.parametrize("seed", range(12))
def test_a_window_that_holds_the_end_of_a_load_keeps_nobody_shallow(seed: int) -> None:
    """However the load ends within the window, depth comes back all at once."""
    server = Server(200, fixed_seconds=0.01, noise=0.2, rng=random.Random(seed), target_ms=480.0)
    server.set_streams(300)
    server.run(3 + 0.08 * seed)
    assert_depth_comes_back(server, 1.5, within_seconds=1.5)


@pytest.mark.parametrize("fixed_seconds", [0.01, 0.03])
@pytest.mark.parametrize("capacity", [64, 200])
def test_many_small_steps_do_not_look_like_a_full_machine(capacity: int, fixed_seconds: float) -> None:
    """Half of its capacity keeps such a server busy nearly all the time."""
    assert_depth_comes_back(Server(capacity, fixed_seconds=fixed_seconds, noise=0.1), 1.5)


@pytest.mark.parametrize("load", [0.7, 0.85, 0.95, 1.1, 1.3, 2.0])
@pytest.mark.parametrize("fixed_seconds", [0.0, 0.02])
def test_no_load_makes_the_ceiling_swing(load: float, fixed_seconds: float) -> None:
    server = Server(128, fixed_seconds=fixed_seconds, noise=0.15)
    server.set_streams(int(128 * load))
    server.run(20)
    since = server.clock.now
    server.run(120)
    assert len(server.changes(since)) <= 4  # in two minutes
    assert server.worst_ms(since) < 1.5 * 640


def test_what_steps_need_in_large_batches() -> None:
    exact = [(count, 0.03 + 0.003 * count) for count in (1, 2, 5, 8, 3, 2)]
    busy = sum(seconds for _, seconds in exact)
    mean = 21 / 6
    assert needed_seconds(exact) == pytest.approx(busy * LEAST_MARGINAL)  # 0.0105 of 0.0405: believed to a point
    steep = [(count, 0.005 + 0.003 * count) for count in (1, 2, 5, 8, 3, 2)]
    wanted = 0.003 * mean / (0.005 + 0.003 * mean)
    assert needed_seconds(steep) == pytest.approx(sum(seconds for _, seconds in steep) * wanted)
    alike = [(40, 0.1), (41, 0.2), (40, 0.3), (39, 0.1), (40, 0.1), (41, 0.1)]
    assert needed_seconds(alike) == pytest.approx(0.9)
    assert needed_seconds(exact[:4]) == pytest.approx(sum(seconds for _, seconds in exact[:4]))
    assert needed_seconds([(0, 0.1)] * 10) == pytest.approx(1.0)
    falling = [(count, 0.1 / count) for count in (1, 2, 5, 8, 3, 2)]
    assert needed_seconds(falling) == pytest.approx(LEAST_MARGINAL * sum(seconds for _, seconds in falling))
    assert needed_seconds([]) == 0.0


def test_load_that_comes_and_goes_changes_at_most_once_a_second() -> None:
    server = Server()
    for streams in (24, 8, 40, 4, 24, 30, 12, 80, 2):
        server.set_streams(streams)
        server.run(5)
    times = server.changes()
    assert len(times) >= 6
    assert all(later - earlier >= 1.0 for earlier, later in itertools.pairwise(times))


def test_no_depth_is_shed_when_the_policy_itself_stays_shallow() -> None:
    server = Server(wish=1)
    server.set_streams(40)  # 2.5 times the full-depth capacity, but the policy only uses a third of the depth
    server.run(30)
    assert server.changes() == []


# -- single decisions -------------------------------------------------------------------------------------------------


def controller(clock: Clock, **options: Any) -> LoadController:
    return LoadController(6, 100.0, clock, **options)


def feed(control: LoadController, clock: Clock, latency_ms: float, seconds: float, **more: Any) -> None:
    """Equal signals, 20 a second."""
    for _ in range(round(seconds * 20)):
        clock.now += 0.05
        control.update(LoadSignal(latency_ms, 5.0, 640.0, **more))


def test_one_hiccup_changes_nothing() -> None:
    clock = Clock()
    control = controller(clock)
    for _ in range(10):
        feed(control, clock, 10.0, 1.5)
        clock.now += 0.05
        control.update(LoadSignal(900.0, 5.0, 640.0))
    assert control.ceiling == 5


@pytest.mark.parametrize(("latency_ms", "ceiling"), [(120.0, 4), (220.0, 3), (500.0, 2)])
def test_the_further_over_the_target_the_larger_the_step(latency_ms: float, ceiling: int) -> None:
    clock = Clock()
    control = controller(clock)
    feed(control, clock, latency_ms, 0.1)
    assert control.ceiling == ceiling
    feed(control, clock, latency_ms, 0.9)
    assert control.ceiling == ceiling  # not before a second has passed
    feed(control, clock, latency_ms, 20.0)
    assert control.ceiling == 0


def test_a_backlog_that_drains_fast_enough_sheds_no_more() -> None:
    clock = Clock()
    control = controller(clock)
    feed(control, clock, 1000.0, 0.1)
    after_first = control.ceiling
    for latency in range(980, 100, -10):  # 200 ms a second
        feed(control, clock, float(latency), 0.05)
    assert control.ceiling == after_first < 5
    stuck = controller(clock)
    feed(stuck, clock, 1000.0, 4.4)
    assert stuck.ceiling < after_first


def test_raising_waits_for_headroom() -> None:
    clock = Clock()
    control = controller(clock)
    feed(control, clock, 500.0, 0.1)
    assert control.ceiling == 2
    feed(control, clock, 70.0, 10.0)  # 75 ms of 100: any step up would predict 100 or more
    assert control.ceiling == 2
    feed(control, clock, 45.0, 2.0)  # 50 ms: 67 ms predicted one up, 83 ms two up
    assert control.ceiling == 3
    feed(control, clock, 10.0, 2.0)
    assert control.ceiling == 5


def test_no_second_change_within_a_second_not_even_back() -> None:
    clock = Clock()
    control = controller(clock)
    feed(control, clock, 500.0, 0.1)
    while control.ceiling == 2:
        feed(control, clock, 45.0, 0.05)
    assert control.ceiling == 3
    feed(control, clock, 900.0, 0.9)
    assert control.ceiling == 3
    feed(control, clock, 900.0, 0.15)
    assert control.ceiling == 1


def test_time_spent_computing_counts_even_at_low_latency() -> None:
    clock = Clock()
    control = LoadController(6, 1000.0, clock)
    feed(control, clock, 3000.0, 0.1)
    assert control.ceiling == 3
    for _ in range(100):
        clock.now += 0.05
        control.update(LoadSignal(0.0, 38.0, 640.0))  # busy 76 % of the time
    assert control.ceiling == 3


def test_known_costs_are_used_for_the_prediction() -> None:
    clock = Clock()
    control = controller(clock, costs=(10.0, 10.1, 10.2, 10.3, 10.4, 10.5))  # depth is nearly free
    feed(control, clock, 500.0, 0.1)
    assert control.ceiling == 2
    feed(control, clock, 70.0, 2.0)
    assert control.ceiling == 5


def test_a_cpu_saturated_by_others_slows_the_way_up() -> None:
    clock = Clock()
    control = controller(clock)
    feed(control, clock, 500.0, 0.1)
    feed(control, clock, 0.0, 1.1, cpu_fraction=0.99)
    assert control.ceiling == 3
    feed(control, clock, 0.0, 1.1, cpu_fraction=0.5)
    assert control.ceiling == 5


def test_a_busy_gpu_slows_the_way_up_as_a_busy_cpu_does() -> None:
    clock = Clock()
    control = controller(clock)
    feed(control, clock, 500.0, 0.1)
    feed(control, clock, 0.0, 1.1, gpu_fraction=0.99, cpu_fraction=0.1)
    assert control.ceiling == 3


@pytest.mark.parametrize(("pressure", "ceiling"), [(0.0, 5), (0.3, 3), (0.5, 2), (0.9, 0), (1.0, 0), (3.0, 0)])
def test_heat_limits_depth(pressure: float, ceiling: int) -> None:
    clock = Clock()
    control = controller(clock)
    feed(control, clock, 10.0, 3.0, thermal_pressure=pressure)
    assert control.ceiling == ceiling
    feed(control, clock, 10.0, 2.0, thermal_pressure=0.0)
    assert control.ceiling == 5


@pytest.mark.parametrize(("charge", "ceiling"), [(0.9, 5), (0.2, 5), (0.19, 1), (0.1, 0), (0.0, 0)])
def test_a_low_battery_limits_depth(charge: float, ceiling: int) -> None:
    clock = Clock()
    control = controller(clock)
    feed(control, clock, 10.0, 3.0, battery_fraction=charge)
    assert control.ceiling == ceiling


def test_heat_around_a_step_does_not_make_depth_oscillate() -> None:
    clock = Clock()
    control = controller(clock)
    ceilings = []
    for turn in range(60):
        feed(control, clock, 10.0, 0.5, thermal_pressure=0.333 + 0.01 * (-1) ** turn)
        ceilings.append(control.ceiling)
    changes = sum(before != after for before, after in itertools.pairwise(ceilings))
    assert changes <= 1
    assert ceilings[-1] == 2  # the cooler side


def test_heat_and_load_together_keep_to_one_change_a_second() -> None:
    clock = Clock()
    control = controller(clock)
    at, last = [], control.ceiling
    for turn in range(400):
        clock.now += 0.05
        hot = 0.6 if turn // 15 % 2 else 0.0
        control.update(LoadSignal(300.0 if turn // 25 % 2 else 1.0, 5.0, 640.0, thermal_pressure=hot))
        if control.ceiling != last:
            at.append(clock.now)
            last = control.ceiling
    assert len(at) >= 4
    assert all(later - earlier >= 1.0 - 1e-9 for earlier, later in itertools.pairwise(at))


@pytest.mark.parametrize(
    "name",
    [
        "queue_delay_ms",
        "step_ms",
        "chunk_ms",
        "ready_streams",
        "cpu_fraction",
        "gpu_fraction",
        "thermal_pressure",
        "battery_fraction",
    ],
)
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_signals_must_be_numbers_from_zero(name: str, value: float) -> None:
    fields: dict[str, Any] = {"queue_delay_ms": 0.0, "step_ms": 0.0, "chunk_ms": 640.0} | {name: value}
    with pytest.raises(ConfigError, match=name):
        LoadSignal(**fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_exits": 0}, "num_exits"),
        ({"target_latency_ms": 0}, "target_latency_ms"),
        ({"target_latency_ms": math.nan}, "target_latency_ms"),
        ({"change_seconds": -1}, "change_seconds"),
        ({"costs": (1.0, 2.0)}, "costs"),
        ({"costs": (3.0, 2.0, 1.0)}, "costs"),
        ({"costs": (0.0, 1.0, 2.0)}, "costs"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoadController(**({"num_exits": 3, "target_latency_ms": 100.0} | arguments))
