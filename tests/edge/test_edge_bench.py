"""`asr-exit bench edge` and `bench memory --edge-model` on seconds of audio."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile

from asr_exit.edge.manifest import Manifest
from service.cli.main import main
from tests.conftest import babble

pytestmark = pytest.mark.timeout(600)  # exporting the model for the first test takes torch its time


def test_every_figure_is_there(fp32: Path, source_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for index, seconds in enumerate((2.3, 0.008)):
        soundfile.write(tmp_path / f"{index}.wav", babble(seconds, seed=index), 16_000)
    recordings = tmp_path / "set.tsv"
    recordings.write_text("path\ttext\n0.wav\tsome words\n1.wav\t\n")
    command = ["bench", "edge", "--edge-model", str(fp32), "--model", str(source_path), "--seconds", "2"]
    status = main([*command, "--mean-depth", "0.7", "--policy", "full", "--manifest", str(recordings), "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["holds"] == (status == 0) == all(bar["met"] for bar in values["bars"].values())
    assert [(row["runtime"], row["exit_layer"]) for row in values["rows"]] == [
        (runtime, layer) for runtime in ("torch", "edge") for layer in range(1, 5)
    ]
    assert values["rows"][-1]["encoder_ratio"] == values["rows"][-1]["macs_ratio"] == 1
    everything, shallow, *_ = values["processes"]
    manifest = Manifest.read(fp32)
    assert shallow["bytes_read"] == manifest.segments[0].bytes
    assert everything["bytes_read"] >= sum(graph.bytes for graph in manifest.segments)
    assert everything["peak_rss_mb"] > everything["bare_rss_mb"] > 0
    assert everything["encoder_macs_per_second"] > shallow["encoder_macs_per_second"]
    texts = values["texts"]
    assert texts["recordings"] == 2
    assert texts["differences"] == []
    assert 0 < max(texts["max_error_by_exit"]) < 1e-4
    assert texts["edge_wer"] == texts["torch_wer"]
    assert texts["edge_budget_spent"] == pytest.approx(texts["torch_budget_spent"])


def test_tables_in_markdown(fp32: Path, source_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["bench", "edge", "--edge-model", str(fp32), "--model", str(source_path), "--seconds", "0.1"]
    assert main([*command, "--markdown"]) in (0, 1)
    shown = capsys.readouterr().out
    assert "| runtime | exit | step ms |" in shown
    assert "| peak memory of the process, MB |" in shown


def test_memory_of_the_device_path(fp32: Path, capsys: pytest.CaptureFixture) -> None:
    main(["bench", "memory", "--edge-model", str(fp32), "--hours", "0.01", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["steps"] == 57
    assert values["rss_end_mb"] > 0
