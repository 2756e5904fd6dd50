"""The exported model on 64-bit Arm, emulated: see tests/arm64/prepare.sh."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.arm64.compare import EMULATOR, compare
from tests.conftest import babble

ROOT = os.environ.get("ASR_EXIT_ARM64", "")
pytestmark = [
    pytest.mark.arm64,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not ROOT, reason="ASR_EXIT_ARM64 names no folder made by tests/arm64/prepare.sh"),
    pytest.mark.skipif(shutil.which(EMULATOR[0]) is None, reason=f"{EMULATOR[0]} is not installed"),
]


def test_fp32_equals_this_processor(fp32: Path) -> None:
    report = compare(Path(ROOT), fp32, [babble(2.7, seed) for seed in range(3)])
    assert report.machines[1] == "aarch64"
    assert any(report.texts[0])
    assert report.differing_texts == 0
    assert max(report.max_error_by_exit) < 1e-4


def test_int8_is_as_near_as_int8_gets(int8: Path) -> None:
    report = compare(Path(ROOT), int8, [babble(2.7, seed) for seed in range(3)])
    assert report.machines[1] == "aarch64"
    assert report.same_label > 0.95
