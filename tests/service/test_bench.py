"""Every measurement on seconds of generated audio with the small random model."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import soundfile

from asr_exit.checkpoint import Model
from asr_exit.conv import ConvSubsampling
from asr_exit.ctc import FrameScores, GreedyDecoder
from asr_exit.engine import Engine
from asr_exit.fused import FusedSubsampling
from asr_exit.policy import RandomDepth
from asr_exit.recognizer import Recognizer
from asr_exit.stream import Fill, StreamOptions
from service.bench import memory, parity, speed, streams, switches
from service.cli.main import main
from tests.conftest import babble


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four recordings, the shortest without a single frame."""
    folder = tmp_path_factory.mktemp("set")
    lines = ["path\ttext"]
    for index, seconds in enumerate((2.3, 0.008, 4.1, 1.0)):
        soundfile.write(folder / f"{index}.wav", babble(seconds, seed=index), 16_000)
        lines.append(f"{index}.wav\tsome words")
    path = folder / "manifest.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


def bench(capsys: pytest.CaptureFixture[str], model_path: Path, *arguments: str) -> tuple[int, dict]:
    status = main(["bench", *arguments, "--model", str(model_path), "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["bench"] == arguments[0]
    assert values["holds"] == (status == 0)
    assert {"date", "commit", "hardware", "torch", "threads"} <= values["environment"].keys()
    return status, values


def test_engine(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, values = bench(capsys, model_path, "engine", "--batches", "1,2", "--seconds", "1", "--clock", "cpu")
    assert [(row["batch"], row["exit_layer"]) for row in values["rows"]] == [
        (batch, layer) for batch in (1, 2) for layer in range(2, 13, 2)
    ]
    for row in values["rows"]:
        assert 0 < row["macs_ratio"] <= 1
        assert 0 < row["outside_share"] < 1
        assert row["streams_per_core"] == pytest.approx(row["batch"] / row["real_time_factor"])
    assert values["rows"][-1]["step_ratio"] == values["rows"][-1]["encoder_ratio"] == 1


def test_engine_prints_a_table(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", "--batches", "1", "--seconds", "1", "--model", str(model_path)]) == 0
    shown = capsys.readouterr().out
    assert "bar" in shown
    assert "torch" in shown


@pytest.mark.parametrize("arguments", [["--batches", "1,x"], ["--seconds", "0"], ["--clock", "cpu", "--threads", "2"]])
def test_engine_refuses_nonsense(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", *arguments]) == 1
    assert arguments[0] in capsys.readouterr().err


def test_the_encoder_clock_leaves_nothing_behind(model: Model) -> None:
    speed.measure_speed(model, babble(1.0), batches=[1], chunk_ms=160, seconds=0.1)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.encoder.modules())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_encoder_clock_counts_subsampling(
    model: Model, precision: Literal["fp32", "bf16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not kernels do it."""
    for kind in (ConvSubsampling, FusedSubsampling):
        plain = kind.forward

        def slow(*arguments: Any, plain: Any = plain) -> Any:
            time.sleep(0.2)
            return plain(*arguments)

        monkeypatch.setattr(kind, "forward", slow)
    rows = speed.measure_speed(model.in_precision(precision), babble(1.0), batches=[1], chunk_ms=160, seconds=0.1)
    assert max(row.outside_share for row in rows) < 0.5


@pytest.mark.parametrize("chunk_ms", ["160", "1280"])
def test_parity(manifest: Path, model_path: Path, capsys: pytest.CaptureFixture[str], chunk_ms: str) -> None:
    set_of = ["--manifest", str(manifest), "--streams", "3", "--chunk-ms", chunk_ms]
    status, values = bench(capsys, model_path, "parity", *set_of)
    assert status == 0
    assert values["recordings"] == 4
    assert len(values["max_error_by_exit"]) == 6
    assert 0 < max(values["max_error_by_exit"]) < 1e-4
    assert values["differences"] == []


def test_parity_finds_a_difference(model: Model) -> None:
    class Deaf(Recognizer):
        def log_posteriors(self, samples: np.ndarray, chunk_ms: float | None) -> list[np.ndarray]:
            return super().log_posteriors(samples[::-1].copy(), chunk_ms)

    report = parity.check_parity(Deaf(model), [babble(3.0)], chunk_ms=640, streams=1)
    assert not report.holds
    assert [found.excused for found in report.differences] == [False]
    assert report.differences[0].frames > 0


def test_ties_are_excused_and_nothing_else() -> None:
    offline = np.log(np.array([[0.6, 0.4], [0.49999, 0.50001]], np.float32))
    streaming = offline[:, ::-1].copy()
    streaming[0] = offline[0]
    assert parity._difference(0, "a", "b", streaming, offline).excused
    assert not parity._difference(0, "a", "b", offline[:, ::-1], offline).excused
    assert not parity._difference(0, "a", "b", offline, offline).excused


def test_switches(manifest: Path, model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, values = bench(capsys, model_path, "switches", "--manifest", str(manifest), "--chunk-ms", "320")
    assert status == 0
    assert values["with_revision"] == {"differences": [], "real_differences": 0}
    rows = values["without_revision"]
    assert len(rows) == 8
    for fill in ("propagate", "hole"):
        edges = [row["edges"] for row in rows if row["fill"] == fill and row["seam_handling"]]
        assert sum(edges) == sum(-(-n // 4) - 1 for n in (29, 52, 13))  # encoder frames, in chunks of 4
    assert main(["bench", "switches", "--manifest", str(manifest), "--limit", "1", "--model", str(model_path)]) == 0
    assert "without revision" in capsys.readouterr().out


def test_an_utterance_that_is_cut_for_its_length_is_caught_up_first(model: Model) -> None:
    samples = babble(9.0, seed=2)
    base = StreamOptions(max_utterance_ms=2_000, chunk_ms=320, fill=Fill.CATCH_UP)

    def texts(**changes: object) -> list[str]:
        options = dataclasses.replace(base, **changes)
        return [run.text for run in streams.stream_all(Engine(model, slots=1), [samples], lambda _: options)]

    full = texts()
    assert full[0]
    for seed in range(3):
        assert texts(policy=RandomDepth(seed)) == full


def scores(*ids: int) -> FrameScores:
    return FrameScores(np.array(ids), np.zeros(len(ids), np.float32))


def test_tokens_doubled_and_dropped_at_an_edge() -> None:
    """Exit 0 spikes a frame or two before exit 1; where they take turns, token 7 is written twice and 9 never."""
    passes = [(0, 5, 0, 7, 0, 0, 0, 0, 0, 0, 0, 9), (0, 5, 0, 0, 0, 7, 0, 0, 0, 0, 9, 0)]
    witnesses = [GreedyDecoder().advance(GreedyDecoder().initial(), scores(*ids)).tokens() for ids in passes]
    chunks = [scores(*passes[0][:4]), scores(*passes[1][4:10]), scores(0, 0)]

    def count(exits: list[int], seam_frames: int) -> tuple[switches.SeamCounts, switches.SeamCounts]:
        changed, same = (switches.SeamCounts("propagate", seam_frames > 0, at) for at in (True, False))
        switches.count_edges(exits, chunks, witnesses, GreedyDecoder(seam_frames), changed, same)
        return changed, same

    changed, same = count([0, 1, 0], seam_frames=0)
    assert (changed.edges, changed.doubled, changed.dropped) == (2, 1, 1)
    assert same.edges == 0
    changed, _ = count([0, 1, 0], seam_frames=2)
    assert (changed.doubled, changed.dropped, changed.per_thousand(changed.dropped)) == (0, 1, 500)
    changed, same = count([0, 1, 1], seam_frames=2)
    assert (changed.edges, same.edges, changed.dropped, same.dropped) == (1, 1, 0, 1)
    chunks[1] = scores(0, 7, 0, 0, 8, 0)  # a label that neither exit alone writes there
    changed, _ = count([0, 1, 0], seam_frames=2)
    assert (changed.doubled, changed.foreign) == (0, 1)


def test_difference_shows_only_what_differs() -> None:
    assert streams.difference("a b c d", "a x d") == "'b c' / 'x' after 1 words"
    assert streams.difference("a a", "a") == "'a' / '' after 1 words"


def test_memory(model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audio = tmp_path / "a.wav"
    soundfile.write(audio, babble(3.0), 16_000)
    arguments = ["--hours", "0.01", "--audio", str(audio), "--policy", "random:1", "--chunk-ms", "1280"]
    _, values = bench(capsys, model_path, "memory", *arguments)
    assert values["hours"] == pytest.approx(0.01)
    assert values["steps"] >= 36 / 1.28
    assert values["rss_end_mb"] > 0
    assert values["growth_mb"] == pytest.approx(values["rss_end_mb"] - values["rss_settled_mb"])


def test_memory_bar() -> None:
    report = memory.MemoryReport(1.0, 10, 3, 100.0, 104.0, 106.0, 10.0, 11.0, 0.1)
    assert report.holds
    assert report.drift == pytest.approx(0.1)
    assert not dataclasses.replace(report, rss_end_mb=105.5).holds
