"""The container files: what can be checked without building them."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from service.cli.main import build_parser
from service.config import ServeConfig, load_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "service" / "deploy"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_example_has_every_setting_at_its_default() -> None:
    path = DEPLOY / "serve.toml"
    assert load_config(path) == ServeConfig()
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    assert {name: set(table) for name, table in tables.items()} == {
        name: {known.name for known in fields(section)} for name, section in ServeConfig.NESTED.items()
    }


def test_the_dockerfile_copies_what_exists_and_runs_without_rights() -> None:
    steps = instructions()
    known = {
        "FROM",
        "WORKDIR",
        "COPY",
        "RUN",
        "ENV",
        "USER",
        "EXPOSE",
        "STOPSIGNAL",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }
    assert {name for name, _ in steps} <= known
    assert steps[0][0] == "FROM"
    for _, arguments in [step for step in steps if step[0] == "COPY" and "--from" not in step[1]]:
        assert all((ROOT / source).exists() for source in arguments.split()[:-1]), arguments
    assert all(re.search(r":\d", arguments) for name, arguments in steps if name == "FROM")  # no floating tag
    assert next(arguments for name, arguments in reversed(steps) if name == "USER") != "root"
    entry = json.loads(next(arguments for name, arguments in steps if name == "ENTRYPOINT"))
    command = json.loads(next(arguments for name, arguments in steps if name == "CMD"))
    assert entry[0] == "asr-exit"
    build_parser().parse_args([*entry[1:], *command])


def test_the_compose_file_fits_the_dockerfile_and_the_command_line() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    (service,) = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"].values()
    context = (DEPLOY / service["build"]["context"]).resolve()
    assert (context / service["build"]["dockerfile"]).is_file()
    arguments = build_parser().parse_args(["serve", *service["command"]])
    assert arguments.tls_cert  # it listens beyond the machine
    assert arguments.tokens
    assert service["ports"] == ["50051:50051"]
    assert ("EXPOSE", f"50051 {arguments.metrics_port}") in instructions()
