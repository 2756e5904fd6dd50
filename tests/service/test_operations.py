"""What an operator sees: figures, log lines, spans; several engines; a drain under load."""

from __future__ import annotations

import io
import json
import logging
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from asr_exit.checkpoint import Model
from asr_exit.processor import cpu_flags
from service import logs
from service.background import BackgroundServer
from service.client import ServiceError, SpeechClient
from service.config import LogConfig
from service.device import pick_precision
from tests.conftest import babble
from tests.service.conftest import parts, pcm16, serve_config
from tests.service.test_process import serving

DATA = pcm16(babble(3.0))


@pytest.fixture
def log_lines() -> Iterator[io.StringIO]:
    """What the process logs as JSON; the handlers of before come back afterwards."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    lines = io.StringIO()
    logs.set_up(LogConfig(format="json"), lines)
    yield lines
    root.handlers[:] = before[0]
    root.setLevel(before[1])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def figures(port: int) -> dict[str, float]:
    """Sample name with labels -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (s.rpartition(" ") for s in lines if not s.startswith("#"))}


def test_figures(model: Model) -> None:
    port = free_port()
    config = serve_config(metrics={"port": port}, limits={"streams": 1}, stream={"policy": "exit:4"})
    with BackgroundServer(model, config) as server, SpeechClient(server.address) as client:
        running = client.stream(iter([DATA] * 3))
        next(running)
        now = figures(port)
        assert (now["asr_exit_streams"], now["asr_exit_slots"]) == (1, 1)
        with pytest.raises(ServiceError, match="RESOURCE_EXHAUSTED"):
            list(client.stream([DATA]))
        captions = list(running)
        deadline = time.monotonic() + 5
        while (now := figures(port))["asr_exit_streams"]:
            assert time.monotonic() < deadline
    chunks = now["asr_exit_chunk_latency_seconds_count"]
    assert captions[-1].is_final
    assert now["asr_exit_audio_seconds_total"] == pytest.approx(9.0)
    assert now['asr_exit_refused_total{reason="slots"}'] == 1
    assert now['asr_exit_streams_ended_total{code="OK"}'] == 1
    assert now['asr_exit_exit_layer_bucket{le="2.0"}'] == 0
    assert now['asr_exit_exit_layer_bucket{le="4.0"}'] >= chunks - 1  # the end may come without a chunk
    assert now["asr_exit_encoder_macs_total"] > 0
    assert 0 < now["asr_exit_real_time_factor"] < 1
    assert now["asr_exit_step_seconds_count"] <= chunks
    assert now["asr_exit_shed_total"] == 0
    with pytest.raises(OSError, match="refused"):
        figures(port)


@pytest.mark.parametrize("transcripts", [False, True])
def test_log_lines_know_their_stream_and_keep_what_was_said_to_themselves(
    model: Model, log_lines: io.StringIO, transcripts: bool
) -> None:
    config = serve_config(log={"transcripts": transcripts})
    with BackgroundServer(model, config) as server, SpeechClient(server.address) as client:
        text = "".join(caption.text for caption in client.stream(parts(DATA)) if caption.is_final)
    lines = [json.loads(line) for line in log_lines.getvalue().splitlines()]
    about = [line for line in lines if line["logger"] == "service.reception"]
    assert text
    assert [line["message"] for line in about if line["message"] != "final text"] == ["stream opened", "stream ended"]
    assert len({line["stream"] for line in about}) == 1
    assert len(about[0]["stream"]) == 16
    assert about[0]["client"] == "ipv4:127.0.0.1"
    assert about[-1]["audio_s"] == pytest.approx(3.0)
    assert about[-1]["code"] == "OK"
    assert [line["text"] for line in lines if "text" in line] == [text] * transcripts


def test_text_lines_carry_what_is_known() -> None:
    lines = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        logs.set_up(LogConfig(level="warning"), lines)
        logging.getLogger("x").info("not this")
        logging.getLogger("x").warning("hello", extra={"client": "me"})
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
    assert lines.getvalue().endswith("WARNING x: hello client=me\n")
    assert "not this" not in lines.getvalue()


def test_spans(model: Model) -> None:
    trace = pytest.importorskip("opentelemetry.trace", reason="OpenTelemetry is not installed")
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="OpenTelemetry's SDK is not installed")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    with BackgroundServer(model, serve_config()) as server, SpeechClient(server.address) as client:
        list(client.stream(parts(DATA)))
    (span,) = exporter.get_finished_spans()
    assert span.name == "asr_exit.stream"
    assert span.attributes["asr_exit.audio_seconds"] == pytest.approx(3.0)
    assert span.attributes["rpc.grpc.status_code"] == 0


def test_several_engines_share_the_streams(model: Model) -> None:
    config = serve_config(model={"workers": 2, "precision": "fp32"}, limits={"streams": 4})
    texts: list[list[str]] = [[] for _ in range(4)]

    def recognise(client: SpeechClient, into: list[str]) -> None:
        into.extend(caption.text for caption in client.stream(parts(DATA)) if caption.is_final)

    with BackgroundServer(model, config) as server, SpeechClient(server.address) as client:
        threads = [threading.Thread(target=recognise, args=(client, into)) for into in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engines = server.server.engines
        assert [engine.slots for engine in engines] == [2, 2]
        assert all(engine.backend.encoder is model.encoder for engine in engines)  # fp32 weights are shared
    assert texts[0]
    assert texts == [texts[0]] * 4


def test_a_drain_under_load_loses_no_final_result(model_path: Path) -> None:
    """SIGTERM while many streams are in the middle: each one that goes on to its end gets its final text."""
    started, more = threading.Barrier(9), threading.Event()
    finals: list[list[str]] = [[] for _ in range(8)]

    def audio() -> Iterator[bytes]:
        yield DATA
        more.wait(20)
        yield from parts(DATA)

    def recognise(client: SpeechClient, into: list[str]) -> None:
        captions = client.stream(audio())
        next(captions)
        started.wait(20)
        into.extend(caption.text for caption in captions if caption.is_final)

    with serving(model_path, "--precision", "fp32") as (process, address), SpeechClient(address) as client:
        threads = [threading.Thread(target=recognise, args=(client, into)) for into in finals]
        for thread in threads:
            thread.start()
        started.wait(20)
        process.send_signal(signal.SIGTERM)
        more.set()
        for thread in threads:
            thread.join()
        process.communicate(timeout=20)
        assert process.returncode == 0
    assert finals[0]
    assert finals == [finals[0]] * 8


def test_precision_follows_the_processor(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nflags\t\t: fpu amx_bf16 avx2\n")
    assert cpu_flags(path) == {"fpu", "amx_bf16", "avx2"}
    assert cpu_flags(tmp_path / "none") == set()
    assert pick_precision("fp32", "cpu") == "fp32"
    assert pick_precision("auto", "cpu") in ("fp32", "bf16")
