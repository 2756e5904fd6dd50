"""A server in a process of its own, pinned to a core, and what can be seen of it from outside."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from asr_exit.errors import AsrExitError

_STOP_S = 15.0


class BenchError(AsrExitError):
    """The server under test did not start, or the measurement could not be made."""


@dataclass(frozen=True)
class Usage:
    """What a process has used until now."""

    cpu_s: float  # user and system
    rss_mb: float


@dataclass
class ServedProcess:
    """`asr-exit serve` as a child process."""

    address: str
    metrics_port: int
    process: psutil.Process

    def usage(self) -> Usage:
        """Processor time and resident memory."""
        times = self.process.cpu_times()
        return Usage(times.user + times.system, self.process.memory_info().rss / 1e6)

    def memory_in_use_mb(self) -> float | None:
        """What the server's C library has given out and not got back; None where it does not tell."""
        in_use = self.figures().get("asr_exit_memory_in_use_bytes")
        return None if in_use is None else in_use / 1e6

    def figures(self) -> dict[str, float]:
        """Everything at /metrics: sample name with labels -> value."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}


def cores() -> tuple[set[int], set[int]]:
    """A core for the server and the rest for the generator; both empty where processes cannot be pinned."""
    if not hasattr(os, "sched_getaffinity"):
        return set(), set()
    allowed = sorted(os.sched_getaffinity(0))
    return ({allowed[0]}, set(allowed[1:])) if len(allowed) > 1 else (set(), set())


def pin(process_id: int, wanted: set[int]) -> None:
    """Keep a process (0: this one) on these cores; an empty set changes nothing."""
    if wanted:
        os.sched_setaffinity(process_id, wanted)


@contextmanager
def serving(arguments: Sequence[str], toml: str = "", on_cores: set[int] | None = None) -> Iterator[ServedProcess]:
    """Runs `asr-exit serve` on free ports with these arguments and this configuration file until the block ends.

    Raises BenchError when it does not come up.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        metrics_port = probe.getsockname()[1]
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config, tempfile.TemporaryFile("w+") as errors:
        config.write(toml)
        config.flush()
        command = [sys.executable, "-m", "service.cli.main", "serve", "--config", config.name, "--port", "0"]
        command += ["--metrics-port", str(metrics_port), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        try:
            pin(child.pid, on_cores or set())
            assert child.stdout
            for line in child.stdout:
                if line.startswith("listening on "):
                    address = line.removeprefix("listening on ").strip()
                    yield ServedProcess(address, metrics_port, psutil.Process(child.pid))
                    break
            else:
                errors.seek(0)
                raise BenchError(f"the server under test did not start: {errors.read().strip()[-2000:]}")
        finally:
            child.terminate()
            try:
                child.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
