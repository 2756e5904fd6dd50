"""The small parts: configuration, pacing, results on their way out, stubs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from asr_exit.budget import Budget
from asr_exit.checkpoint import Model
from asr_exit.errors import ConfigError
from asr_exit.load_control import LoadSignal
from asr_exit.stream import Fill, StreamOptions
from service import wire
from service.config import ServeConfig, is_loopback, load_config
from service.feed import Pace
from service.load import LoadMonitor, machine_usage
from service.pb import speech_pb2 as pb
from service.server import SpeechServer


def test_defaults_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text('[listen]\nport = 1234\n[stream]\npolicy = "exit:4"\n')
    config = load_config(path, {"listen": {"port": 0}, "limits": {"streams": 3}})
    assert (config.listen.port, config.listen.host, config.stream.policy, config.limits.streams) == (
        0,
        "127.0.0.1",
        "exit:4",
        3,
    )
    assert load_config(None) == ServeConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[listen]\nprot = 1\n", "did you mean 'port'"),
        ("[limit]\nstreams = 1\n", "did you mean 'limits'"),
        ("listen = 3\n", r"write \[listen\]"),
        ("[listen]\nport = 70000\n", "0..65535"),
        ('[listen]\nhost = "0.0.0.0"\n', "--insecure"),
        ('[model]\ndevice = "gpu"\n', "auto, cpu or cuda"),
        ("[model]\nbatch_buckets = [4, 2]\n", "rising"),
        ("[model]\nbatch_buckets = 4\n", "of type list"),
        ("[limits]\nbacklog_s = 1\n", "at least 3"),
        ('[limits]\nstreams = "many"\n', "limits.streams"),
        ("[listen\n", "not valid TOML"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_the_library_and_the_server_have_the_same_defaults() -> None:
    library, served = StreamOptions(), ServeConfig().stream
    assert library.fill == Fill.parse(served.fill)
    assert library.chunk_ms == served.chunk_ms
    assert library.endpoint_silence_ms == served.endpoint_silence_ms
    assert library.max_utterance_ms == served.max_utterance_ms


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.toml")


def test_graphs_without_a_gpu_are_refused_before_anything_listens(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"model\.cuda_graphs = false"):
        SpeechServer(model, load_config(None, {"model": {"device": "cpu", "cuda_graphs": True}}))


def test_beyond_loopback_only_when_allowed() -> None:
    with pytest.raises(ConfigError, match="not encrypted"):
        load_config(None, {"listen": {"host": "example.org"}})
    assert load_config(None, {"listen": {"host": "0.0.0.0", "insecure": True}}).listen.insecure
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"]))


def test_latency_counts_from_the_last_sample_of_the_chunk() -> None:
    pace = Pace()
    for tenth in range(1, 11):
        pace.arrived(0.1, now=tenth / 10)
    latency, late = pace.chunk_done(0.64, now=1.05)
    assert latency == pytest.approx(0.35)
    assert late == pytest.approx(0.35)


def test_audio_sent_at_once_is_not_late() -> None:
    pace = Pace()
    pace.arrived(6.4, now=0.0)
    late = [pace.chunk_done(0.64 * (index + 1), now=0.05 * (index + 1))[1] for index in range(10)]
    assert late[0] == pytest.approx(0.05)
    assert max(late[1:]) == 0.0


def test_a_slow_engine_is_late() -> None:
    pace, late = Pace(), []
    for index in range(5):
        pace.arrived(0.64, now=0.64 * (index + 1))
        late.append(pace.chunk_done(0.64 * (index + 1), now=1.28 * (index + 1))[1])
    assert late == [pytest.approx(0.64 * (index + 1)) for index in range(5)]


def test_stubs_are_up_to_date() -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed: stubs cannot be regenerated")
    from service import generate

    stubs = generate.generate()
    assert set(stubs) >= {"speech_pb2.py", "speech_pb2.pyi", "speech_pb2_grpc.py"}
    assert generate.stale(stubs) == []
    assert generate.stale({**stubs, "speech_pb2.py": ""}) == ["speech_pb2.py"]


def test_every_part_of_a_budget_travels() -> None:
    message = pb.ComputeBudget(mean_depth=0.5, max_exit_layer=10, min_exit_layer=4, peak_depth=0.8)
    assert wire.parse_budget(message) == Budget(0.5, max_exit_layer=10, min_exit_layer=4, peak_depth=0.8)
    assert wire.parse_budget(pb.ComputeBudget()) == Budget()
    with pytest.raises(ConfigError, match="deeper than max_exit_layer"):
        wire.parse_budget(pb.ComputeBudget(max_exit_layer=2, min_exit_layer=4))


def test_the_load_monitor_asks_for_the_machines_use_twice_a_second() -> None:
    seen: list[LoadSignal] = []

    class Controller:
        ceiling = 3

        def update(self, signal: LoadSignal) -> None:
            seen.append(signal)

    uses, now = iter([(0.5, None), (0.7, 0.9)]), [0.0]
    monitor = LoadMonitor(Controller(), clock=lambda: now[0], usage=lambda: next(uses))  # type: ignore[arg-type]
    result = SimpleNamespace(stream=SimpleNamespace(options=SimpleNamespace(chunk_ms=640)))
    output = SimpleNamespace(results=[result], step_ms=30.0)
    for now[0] in (10.0, 10.4, 10.6):
        assert monitor.after_step(output, 50.0, ready_streams=1, free_slots=2) == 3  # type: ignore[arg-type]
    assert [(signal.cpu_fraction, signal.gpu_fraction) for signal in seen] == [(0.5, None), (0.5, None), (0.7, 0.9)]
    assert [signal.queue_delay_ms for signal in seen] == [20.0] * 3
    cpu, gpu = machine_usage()
    assert cpu is not None
    assert 0 <= cpu <= 1
    assert gpu is None or 0 <= gpu <= 1
