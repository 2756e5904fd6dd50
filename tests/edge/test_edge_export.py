"""Exporting: what is written, that it is all or nothing, and thresholds for the quantised model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile

from asr_exit.checkpoint import load
from asr_exit.edge import EdgeModel, EdgeRecognizer
from asr_exit.edge.export import publish, quantise
from asr_exit.edge.manifest import Manifest, digest
from asr_exit.edge.recalibrate import carry_over, observe, recalibrate
from asr_exit.errors import CheckpointError
from asr_exit.policy import Posterior
from service.cli.main import main
from tests.conftest import babble
from tests.edge.conftest import CALIBRATION

pytestmark = pytest.mark.timeout(600)  # the first trace of a graph takes torch seconds, minutes on a busy machine


def test_the_manifest_says_everything(fp32: Path, int8: Path, source_path: Path) -> None:
    model = load(source_path)
    for folder, suffix in ((fp32, "onnx"), (int8, "ort")):
        manifest = Manifest.read(folder)
        assert manifest.config == model.config
        assert manifest.pieces == model.tokenizer.pieces
        assert manifest.feature_mean == tuple(model.encoder.feature_mean.tolist())
        assert manifest.macs == model.macs
        written = {path.name for path in folder.iterdir()}
        assert written == {"manifest.json", *(graph.file for graph in manifest.graphs)}
        assert {name.rsplit(".")[-1] for name in written} == {"json", suffix}
        for graph in manifest.graphs:
            assert (graph.bytes, graph.sha256) == ((folder / graph.file).stat().st_size, digest(folder / graph.file))
    assert Manifest.read(int8).calibration == CALIBRATION
    assert Manifest.read(int8).calibrated_on == ""
    assert EdgeRecognizer(int8).options.chunk_ms == 320


def test_graphs_are_opset_20_with_caches_outside(fp32: Path) -> None:
    for name in ("segment-0", "segment-1", "segment-3", "propagate-2"):
        graph = onnx.load(fp32 / f"{name}.onnx")
        assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 20)]
        inputs = {value.name for value in graph.graph.input}
        outputs = {value.name for value in graph.graph.output}
        assert {"cos", "sin", "conv"} <= inputs
        assert {"new_keys", "new_values", "new_conv"} <= outputs
        assert ({"mask", "keys", "values"} <= inputs) == ({"state", "scores", "log_probs"} <= outputs)
        assert ("tail_2" in inputs) == ("new_tail_2" in outputs) == (name == "segment-0")


def test_int8_is_smaller(fp32: Path, int8: Path) -> None:
    """Even this toy, whose graphs are mostly structure; the bundled model comes to a third."""
    sizes = [sum(graph.bytes for graph in Manifest.read(folder).segments) for folder in (fp32, int8)]
    assert sizes[1] < sizes[0]


def test_weights_leave_room_for_sums_of_16_bits(fp32: Path, tmp_path: Path) -> None:
    """255 * w added in pairs must stay below 2**15: processors without int8 dot products saturate there."""
    path = tmp_path / "segment.onnx"
    path.write_bytes((fp32 / "segment-1.onnx").read_bytes())
    quantise(path)
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(path).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2
    ]
    assert len(weights) >= 10
    assert 60 < max(int(np.abs(values.astype(int)).max()) for values in weights) <= 64


def test_an_earlier_export_is_replaced_and_nothing_else(fp32: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    manifest = Manifest.read(fp32)
    for _ in range(2):
        partial = tmp_path / "partial"
        partial.mkdir()
        for graph in manifest.graphs:
            (partial / graph.file).write_bytes((fp32 / graph.file).read_bytes())
        publish(manifest, partial, out)
        assert EdgeRecognizer(out).transcribe(babble(1.0)).text == EdgeRecognizer(fp32).transcribe(babble(1.0)).text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("years of work")
    assert main(["export", "--out", str(precious)]) == 1
    assert "is no exported model" in capsys.readouterr().err
    assert (precious / "chapter.txt").exists()


def test_a_killed_export_leaves_nothing_that_loads(source_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "service.cli.main", "export", "--model", str(source_path), "--out", str(out)]
    process = subprocess.Popen([*command, "--precision", "fp32"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any("segment-0" in line for line in iter(process.stderr.readline, ""))  # stops reading there
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert left, "killed before it wrote anything"
    for folder in (out, *left):
        with pytest.raises(CheckpointError, match="no exported model"):
            EdgeModel(folder)


def test_thresholds_keep_the_share_of_chunks_that_leave() -> None:
    rng = np.random.default_rng(0)
    before = rng.uniform(0, 1, 4000)
    after = np.clip(0.8 * before + 0.05 + 0.01 * rng.standard_normal(4000), 0, 1)
    moved = carry_over(0.6, before, after)
    assert moved == pytest.approx(0.53, abs=0.02)
    assert (after >= moved).mean() == pytest.approx((before >= 0.6).mean(), abs=1e-3)
    assert carry_over(1.0, before, after) == 1.0  # nobody left there before, and nobody does now


def test_any_calibration_is_carried_over_whole() -> None:
    before = {"posterior": np.linspace(0, 1, 101)[None].repeat(2, 0), "entropy": np.linspace(0, 1, 101)[None]}
    after = {name: values / 2 for name, values in before.items()}
    calibration = {
        "data": "somewhere",
        "posterior": {"thresholds": [0.5, None, 0.9], "table": [{"macs_fraction": 0.4, "thresholds": [0.2, 0.4, 0.8]}]},
        "by_chunk_ms": {"160": {"entropy": {"thresholds": [0.6]}}},
        "gate": {"thresholds": [0.5]},
    }
    moved = recalibrate(calibration, before, after)
    assert moved["posterior"]["thresholds"] == [pytest.approx(0.25, abs=0.01), None, 0.9]
    assert moved["posterior"]["table"][0]["thresholds"] == pytest.approx([0.1, 0.2, 0.8], abs=0.01)
    assert moved["by_chunk_ms"]["160"]["entropy"]["thresholds"] == pytest.approx([0.3], abs=0.01)
    assert {key: moved[key] for key in ("data", "gate")} == {key: calibration[key] for key in ("data", "gate")}
    assert moved["posterior"]["table"][0]["macs_fraction"] == 0.4


def test_both_runtimes_are_observed_alike(source, fp32: Path) -> None:
    recordings = [babble(3.0, seed) for seed in range(2)]
    torch_path, device = (observe(model, recordings, 640) for model in (source, EdgeModel(fp32)))
    assert torch_path["posterior"].shape == (3, 10)
    for name, values in torch_path.items():
        assert np.abs(values - device[name]).max() < 1e-4


def test_the_command_line_runs_it(int8: Path, tmp_path: Path, capsys) -> None:
    audio = tmp_path / "a.wav"
    soundfile.write(audio, babble(2.5), 16_000, subtype="PCM_16")
    expected = EdgeRecognizer(int8).transcribe(soundfile.read(audio, dtype="float32")[0])
    assert main(["transcribe", str(audio), "--runtime", "edge", "--edge-model", str(int8), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["text"] == expected.text
    assert len(values["chunks"]) == 8
    assert (
        main(["stream", str(audio), "--runtime", "edge", "--edge-model", str(int8), "--json", "--budget", "0.6"]) == 0
    )
    *captions, summary = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert captions[-1]["type"] == "final"
    assert summary["chunks"] == 8
    assert 0 < summary["macs_fraction"] <= 0.62


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--edge-model DIR"),
        (["--edge-model", "nowhere"], "asr-exit export"),
        (["--edge-model", "INT8", "--offline"], "--offline needs torch"),
        (["--edge-model", "INT8", "--model", "m.safetensors"], "--edge-model instead of --model"),
        (["--edge-model", "INT8", "--policy", "posterior:2"], "from 0 to 1"),
    ],
)
def test_mistakes_end_with_one_line(int8: Path, arguments: list[str], message: str, capsys) -> None:
    arguments = [str(int8) if part == "INT8" else part for part in arguments]
    assert main(["transcribe", "--runtime", "edge", "a.wav", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_calibrated_policies_read_the_manifest(int8: Path) -> None:
    from asr_exit.policy import parse_policy

    manifest = Manifest.read(int8)
    policy = parse_policy("posterior", exit_layers=manifest.config.exit_layers, calibration=manifest.calibration)
    assert isinstance(policy, Posterior)
