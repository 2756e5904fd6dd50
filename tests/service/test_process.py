"""A server in a process of its own: signals, ports, clients that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.background import BackgroundServer
from service.client import ServiceError, SpeechClient
from tests.conftest import babble
from tests.service.conftest import parts, pcm16

DATA = pcm16(babble(2.0))


@contextmanager
def serving(model_path: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs `asr-exit serve` on a free port; yields the process and its address.

    Depth does not give way to load: texts must not depend on what else the machine does.
    """
    settings = model_path.with_name("serve.toml")
    settings.write_text("[load]\nshed_depth = false\n", encoding="utf-8")
    command = [sys.executable, "-m", "service.cli.main", "serve", "--port", "0", "--model", str(model_path)]
    command += ["--config", str(settings), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("listening on "):
                yield process, line.removeprefix("listening on ").strip()
                return
        raise AssertionError(process.stderr.read() if process.stderr else "")
    finally:
        process.kill()
        process.communicate()


def test_sigterm_drains_and_ends_cleanly(model_path: Path) -> None:
    more = threading.Event()

    def audio() -> Iterator[bytes]:
        yield DATA
        more.wait(10)
        yield DATA

    with serving(model_path) as (process, address), SpeechClient(address) as client:
        running = client.stream(audio())
        first = next(running)
        process.terminate()
        wait_for_not_serving(address)
        with pytest.raises(ServiceError, match="UNAVAILABLE"):
            list(client.stream([DATA]))
        more.set()
        captions = [first, *running]
        assert captions[-1].is_final
        assert captions[-1].end_ms == 4000
        out, err = process.communicate(timeout=10)
        assert process.returncode == 0
        assert out.endswith("stopped\n")
        assert "Traceback" not in err


def test_a_second_interrupt_ends_the_draining(model_path: Path) -> None:
    release = threading.Event()

    def audio() -> Iterator[bytes]:
        yield DATA
        release.wait(10)

    with serving(model_path) as (process, address), SpeechClient(address) as client:
        running = client.stream(audio())
        next(running)
        process.send_signal(signal.SIGINT)
        wait_for_not_serving(address)
        process.send_signal(signal.SIGINT)
        with pytest.raises(ServiceError, match="shutting down"):
            list(running)
        release.set()
        process.communicate(timeout=10)
        assert process.returncode == 0


def test_killed_clients_give_their_slots_back(model_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from service.client import SpeechClient\n"
        "def audio():\n"
        "    yield bytes(64000)\n"
        "    time.sleep(60)\n"
        "for caption in SpeechClient(sys.argv[1]).stream(audio()):\n"
        "    print('caption', flush=True)\n"
    )
    with serving(model_path, "--streams", "2") as (_, address), SpeechClient(address) as client:
        command = [sys.executable, "-c", code, address]
        killed = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for process in killed:
            assert process.stdout
            assert process.stdout.readline() == "caption\n"
        with pytest.raises(ServiceError, match="RESOURCE_EXHAUSTED"):
            list(client.stream(parts(DATA)))
        for process in killed:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        deadline = time.monotonic() + 1.0
        while True:
            try:
                assert list(client.stream(parts(DATA)))[-1].is_final
                break
            except ServiceError:
                assert time.monotonic() < deadline, "the slot did not come back within a second"
                time.sleep(0.02)


def test_a_port_that_is_taken(model_path: Path, server: BackgroundServer) -> None:
    port = server.address.rpartition(":")[2]
    command = [sys.executable, "-m", "service.cli.main", "serve", "--port", port, "--model", str(model_path)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert second.returncode == 1
    assert "is the port taken?" in second.stderr
    assert "Traceback" not in second.stderr


def test_other_hosts_need_insecure(model_path: Path) -> None:
    command = [sys.executable, "-m", "service.cli.main", "serve", "--host", "0.0.0.0", "--model", str(model_path)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert refused.returncode == 1
    assert "--insecure" in refused.stderr


def wait_for_not_serving(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        deadline = time.monotonic() + 5
        while stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING:
            assert time.monotonic() < deadline
            time.sleep(0.01)
