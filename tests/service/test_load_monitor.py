"""Depth is shed before streams are refused: only late results at the shallowest exit count as overload."""

from __future__ import annotations

from types import SimpleNamespace

from asr_exit.load_control import LoadController
from asr_exit.stream import StepOutput
from service.load import LoadMonitor


class Machine:
    """Steps of a made-up engine whose results are `late_ms` behind."""

    def __init__(self) -> None:
        self.now = 0.0
        controller = LoadController(6, target_latency_ms=640, clock=lambda: self.now)
        self.monitor = LoadMonitor(controller, clock=lambda: self.now)

    def step(self, late_ms: float, count: int = 1) -> int:
        """The ceiling after so many steps, a quarter of a second each."""
        stream = SimpleNamespace(options=SimpleNamespace(chunk_ms=640))
        output = StepOutput([SimpleNamespace(stream=stream)], [], step_ms=100.0)  # type: ignore[list-item]
        for _ in range(count):
            self.now += 0.25
            ceiling = self.monitor.after_step(output, late_ms, ready_streams=0, free_slots=1)
        return ceiling


def test_depth_goes_first() -> None:
    machine = Machine()
    assert machine.step(100.0, 8) == 5
    assert machine.step(900.0, 2) < 5
    assert not machine.monitor.overloaded
    while machine.step(900.0):
        assert not machine.monitor.overloaded
        machine.now += 1.0
    machine.step(900.0)
    assert machine.monitor.overloaded


def test_overload_is_forgotten_when_results_come_in_time_or_not_at_all() -> None:
    machine = Machine()
    machine.step(5000.0, 200)
    assert machine.monitor.overloaded
    machine.now += 1.01
    assert not machine.monitor.overloaded
    machine.step(5000.0)
    assert machine.monitor.overloaded
    machine.step(100.0, 5)
    assert not machine.monitor.overloaded
