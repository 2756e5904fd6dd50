"""The shape of the project: import directions, public names, file sizes, what must import without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import asr_exit

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "asr_exit": {"service", "recipes", "tests"},
    "service": {"recipes", "tests"},
    "recipes": {"service", "tests"},
}
SOURCES = [path for package in FORBIDDEN for path in sorted((ROOT / package).rglob("*.py")) if "_pb2" not in path.name]


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way_and_files_stay_readable(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert not imported_packages(path) & FORBIDDEN[package]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in asr_exit.__all__:
        assert getattr(asr_exit, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute"):
        _ = asr_exit.nothing_like_this


def test_device_side_modules_import_without_torch() -> None:
    modules = [
        "features",
        "ctc",
        "beam",
        "words",
        "policy",
        "decide",
        "budget",
        "load_control",
        "config",
        "errors",
        "tokenizer",
    ]
    modules += ["captions", "cost", "evidence", "stream", "engine", "scoring", "ngram", "arpa", "fusion", "decoders"]
    modules += ["biasing", "endpoint"]
    code = f"import sys\n{''.join(f'import asr_exit.{m}{chr(10)}' for m in modules)}assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_command_line_starts_without_torch() -> None:
    code = "import contextlib, sys, service.cli.main as m\nwith contextlib.suppress(SystemExit): m.main(['--help'])\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
