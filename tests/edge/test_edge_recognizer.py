"""What a device sees of the recogniser: lazy loading, budgets of time, load, thermal state, and clear refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from asr_exit.budget import Budget
from asr_exit.edge import DeviceState, EdgeModel, EdgeRecognizer, Thermal, recognizer
from asr_exit.errors import AudioError, CheckpointError, ConfigError, StreamStateError
from asr_exit.policy import Reason
from asr_exit.stream import ChunkResult, Fill, StreamOptions
from service.bench.probe import Probe
from tests.conftest import babble

pytestmark = pytest.mark.timeout(600)  # exporting the model for the first test takes torch its time

CHUNK = 10_240  # samples of 640 ms


def pushed(device: EdgeRecognizer, seconds: float, seed: int = 0) -> list[ChunkResult]:
    samples = babble(seconds, seed)
    parts = [samples[start : start + CHUNK] for start in range(0, len(samples), CHUNK)]
    return list(itertools.chain(*(device.push(part) for part in parts), device.finish()))


def test_nothing_is_loaded_before_audio_and_deep_weights_only_when_needed(edge_model: EdgeModel) -> None:
    device = EdgeRecognizer(edge_model, StreamOptions(budget=Budget(max_exit_layer=2), fill=Fill.HOLE))
    assert edge_model.sessions.loaded == ()
    assert {result.exit_layer for result in pushed(device, 3.0)} == {2}
    assert edge_model.sessions.loaded == ("segment-0.onnx", "segment-1.onnx")
    assert edge_model.sessions.bytes_read == sum(graph.bytes for graph in edge_model.manifest.segments[:2])
    device.set_budget(Budget())
    assert {result.exit_layer for result in pushed(device, 3.0)} == {4}
    assert len(edge_model.sessions.loaded) == 4


def test_propagation_loads_a_projection_only_when_a_later_chunk_goes_deep(edge_model: EdgeModel) -> None:
    device = EdgeRecognizer(edge_model, StreamOptions(budget=Budget(max_exit_layer=1), fill=Fill.PROPAGATE))
    device.push(babble(2.0))
    assert edge_model.sessions.loaded == ("segment-0.onnx",)
    device.set_budget(Budget(max_exit_layer=3))
    device.push(babble(2.0))
    wanted = {f"segment-{k}.onnx" for k in (0, 1, 2)} | {f"propagate-{k}.onnx" for k in (1, 2)}
    assert set(edge_model.sessions.loaded) == wanted


def test_a_budget_change_takes_effect_at_the_next_chunk(edge_model: EdgeModel) -> None:
    device = EdgeRecognizer(edge_model, StreamOptions(fill=Fill.PROPAGATE), target_latency_ms=60_000)
    (before,) = device.push(babble(0.64))
    device.set_budget(Budget(max_exit_layer=1))
    (after,) = device.push(babble(0.64))
    assert (before.exit_layer, after.exit_layer, after.reason) == (4, 1, Reason.BUDGET)


class FakeTime:
    """A clock that only computation moves, so that a budget of time can be checked to the per cent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: EdgeRecognizer) -> None:
        self.now, self.noise = 0.0, np.random.default_rng(3)
        self.device = device
        clock = SimpleNamespace(perf_counter=lambda: self.now, monotonic=lambda: self.now)
        monkeypatch.setattr("asr_exit.engine.time", clock)
        monkeypatch.setattr("asr_exit.edge.recognizer.time", clock)
        monkeypatch.setattr(recognizer, "Engine", self.slow_engine(recognizer.Engine))
        device.engine = recognizer.Engine(device.model, slots=1)

    def slow_engine(self, make: Callable[..., object]) -> Callable[..., object]:
        def slow(*arguments: object, **options: object) -> object:
            engine = make(*arguments, **options)
            engine.backend = SlowBackend(engine.backend, self)  # type: ignore[attr-defined]
            return engine

        return slow


class SlowBackend(Probe):
    """Takes 3 ms for the subsampling, and 4 ms and a third more or less for a segment: deeper is cheaper per MAC."""

    def __init__(self, inner: object, time: FakeTime) -> None:
        super().__init__(inner)  # type: ignore[arg-type]
        self.time = time

    def subsample(self, *arguments: object) -> list:  # type: ignore[override]
        self.time.now += 0.003
        return super().subsample(*arguments)  # type: ignore[arg-type]

    def run(self, *arguments: object, **options: object) -> tuple:  # type: ignore[override]
        self.time.now += 0.004 * self.time.noise.uniform(0.67, 1.33)
        return super().run(*arguments, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("over", [1.0, 1.4, 2.0])
def test_a_real_time_factor_is_kept_in_measured_time(
    edge_model: EdgeModel, monkeypatch: pytest.MonkeyPatch, over: float
) -> None:
    options = StreamOptions(fill=Fill.HOLE)
    device = EdgeRecognizer(edge_model, options, target_latency_ms=60_000)
    time = FakeTime(monkeypatch, device)
    least = device.least_real_time_factor()
    assert least == pytest.approx(1.15 * 0.007 / 0.64, rel=0.08)  # with headroom
    device.begin(StreamOptions(fill=Fill.HOLE, budget=Budget(real_time_factor=over * least)))
    begin, layers, loaded = time.now, [], edge_model.sessions.loaded
    for seed in range(12):
        layers += [result.exit_layer for result in device.push(babble(5.12, seed))]
    kept = (time.now - begin) / (12 * 5.12) / (over * least)
    assert edge_model.sessions.loaded == loaded  # nothing is read between two chunks
    if over > 1:
        assert kept == pytest.approx(1, rel=0.1)
        assert len(set(layers)) > 1
    else:  # what headroom the least budget has does not read a deeper graph
        assert kept == pytest.approx(1 / 1.15, rel=0.05)
        assert set(layers) == {1}
        assert loaded == ("segment-0.onnx",)


def test_an_impossible_budget_of_time_names_the_least_possible(edge_model: EdgeModel) -> None:
    device = EdgeRecognizer(edge_model)
    with pytest.raises(ConfigError, match=r"least possible is \d"):
        device.begin(StreamOptions(budget=Budget(real_time_factor=1e-7)))
    with pytest.raises(ConfigError, match="least possible"):
        device.set_budget(Budget(real_time_factor=1e-7))
    assert pushed(device, 1.0)[-1].end_of_stream  # neither broke anything


@pytest.mark.parametrize(
    ("state", "layer"),
    [
        (DeviceState(), 4),
        (DeviceState(Thermal.FAIR), 2),
        (DeviceState(Thermal.SERIOUS), 1),
        (DeviceState(Thermal.CRITICAL), 1),
        (DeviceState(battery=0.15), 1),
        (DeviceState(battery=0.15, charging=True), 4),
        (DeviceState(battery=0.01), 1),
        (DeviceState(battery=0.9), 4),
    ],
)
def test_thermal_state_and_battery_cap_the_depth(edge_model: EdgeModel, state: DeviceState, layer: int) -> None:
    device = EdgeRecognizer(edge_model, StreamOptions(fill=Fill.PROPAGATE), target_latency_ms=60_000)
    device.set_device_state(state)
    (result,) = device.push(babble(0.64))
    shares = [edge_model.macs.to_exit(index, 8) / edge_model.macs.full(8) for index in range(4)]
    within = [index + 1 for index, share in enumerate(shares) if share <= state.share]
    assert result.exit_layer == max(within, default=1)
    assert (result.exit_layer == 4) == (layer == 4)
    assert result.reason is (Reason.FULL if layer == 4 else Reason.LOAD)
    device.set_device_state(DeviceState())
    (result,) = device.push(babble(0.64))
    assert result.exit_layer == 4


def test_slow_steps_shed_depth_and_it_comes_back(edge_model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    now, slow = [0.0], [0.3]
    device = EdgeRecognizer(edge_model, StreamOptions(fill=Fill.HOLE), target_latency_ms=200, clock=lambda: now[0])
    monkeypatch.setattr("asr_exit.engine.time", SimpleNamespace(perf_counter=itertools.count(0, slow[0]).__next__))
    layers = []
    for seed in range(8):
        now[0] += 0.64
        layers += [result.exit_layer for result in device.push(babble(0.64, seed))]
    assert layers[0] == 4
    assert layers[-1] < 4
    monkeypatch.setattr("asr_exit.engine.time", SimpleNamespace(perf_counter=itertools.count(0, 0.01).__next__))
    for seed in range(12):
        now[0] += 0.64
        layers += [result.exit_layer for result in device.push(babble(0.64, seed))]
    assert layers[-1] == 4


def test_a_stream_is_used_in_order(edge_model: EdgeModel) -> None:
    device = EdgeRecognizer(edge_model)
    assert device.finish() == []
    device.begin()
    with pytest.raises(StreamStateError, match="finish"):
        device.begin()
    with pytest.raises(StreamStateError, match="finish"):
        device.transcribe(babble(1.0))
    with pytest.raises(AudioError, match="float32"):
        device.push(np.zeros(3, np.int16))
    device.close()
    assert device.transcribe(babble(1.0)).audio_seconds == 1.0


def test_bad_battery() -> None:
    with pytest.raises(ConfigError, match="battery"):
        DeviceState(battery=80)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "segment-2.onnx").write_bytes(b"no graph"), "not the file that its manifest"),
        (lambda folder: (folder / "segment-2.onnx").unlink(), "cannot be read"),
        (lambda folder: (folder / "manifest.json").unlink(), "asr-exit export"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": "other"}'), "format 'other'"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": "asr-exit-edge/2"}'), "damaged"),
    ],
)
def test_a_damaged_export_is_refused(
    fp32: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    for path in fp32.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(Exception, match=message) as raised:
        EdgeRecognizer(tmp_path).transcribe(babble(1.0))
    assert isinstance(
        raised.value if isinstance(raised.value, CheckpointError) else raised.value.__cause__, CheckpointError
    )
