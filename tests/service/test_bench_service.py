"""Load, abuse and soak: the search on made-up servers, and each of them once, tiny, against a real one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_exit.checkpoint import Model
from service.allocator import memory_in_use
from service.background import BackgroundServer
from service.bench import load, overload
from service.bench.load import Trial
from service.bench.soak import slope_in_ten_minutes
from service.bench.speakers import varied
from service.cli import bench_load
from service.cli.main import main
from service.client import StreamSettings
from service.config import load_config
from tests.conftest import babble
from tests.service.fake_engine import FakeEngine


def trial(streams: int, p99_ms: float, errors: int = 0) -> Trial:
    """A trial in which only what the search looks at is filled in."""
    return Trial(
        streams=streams,
        seconds=1.0,
        chunks=1,
        chunk_latency_ms=(p99_ms / 4, p99_ms / 2, p99_ms),
        mean_latency_ms=p99_ms / 4,
        first_partial_ms=None,
        end_of_speech_ms=None,
        word_error_rate=None,
        words=0,
        chunks_by_layer={2: 1, 12: 3},
        chunks_by_decision={},
        errors={"UNAVAILABLE": errors} if errors else {},
        generator_late=0.0,
        cpu_share=0.5,
        overhead_share=0.1,
        streams_per_step=1.0,
        rss_mb=1.0,
        server_latency_ms=p99_ms / 4,
        encoder_gmacs_per_second=10.0,
    )


@pytest.mark.parametrize("capacity", [0, 5, 37, 100, 400, 10_000])
def test_the_search_is_bounded_and_close(capacity: int) -> None:
    def run(streams: int) -> Trial:
        return trial(streams, 100.0 if streams <= capacity else 1000.0)

    done = load.search(run, start=32, most=512, latency_ms=640, trials=12)
    found = load.best(done, 640)
    assert len(done) <= 12
    assert len({one.streams for one in done}) == len(done)
    if capacity == 0:
        assert found is None
    else:
        assert found is not None
        assert 0.9 * min(capacity, 512) - 1 <= found.streams <= capacity


def test_a_trial_with_errors_does_not_hold() -> None:
    assert trial(1, 100).holds(640)
    assert not trial(1, 100, errors=1).holds(640)
    assert not trial(1, 641).holds(640)


def test_policies_are_compared_with_the_first() -> None:
    full, auto = replace(trial(100, 600), word_error_rate=0.2), replace(trial(180, 600), word_error_rate=0.21)
    found = {"full": full, "auto": auto}
    said = "auto: 1.80 times the streams of full, WER at that load +5.0 % relative"
    assert bench_load._findings(found, 640)[-1] == said
    assert len(bench_load._findings(found | {"auto": None}, 640)) == 2  # nothing held: nothing to compare


class FakeServed:
    """What `measure_overload` asks of a served process, over a server whose chunks all leave at layer 2."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.asked = 0

    def figures(self) -> dict[str, float]:
        """The ceiling falls once while it is looked at."""
        self.asked += 1
        lowered = float(self.asked > 2)
        return {"asr_exit_load_ceiling_layer": 12 - 4 * lowered, "asr_exit_load_ceiling_changes_total": lowered}


def test_overload_is_watched(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload, "_LOOK_EVERY_S", 0.1)
    config = load_config(None, {"listen": {"port": 0}, "limits": {"streams": 8}, "load": {"shed_depth": False}})
    with BackgroundServer(model, config, FakeEngine(slots=8)) as server:  # type: ignore[arg-type]
        report = overload.measure_overload(
            FakeServed(server.address),  # type: ignore[arg-type]
            varied(babble(3.0), "a b"),
            StreamSettings(chunk_ms=160, policy="full"),
            capacity=4,
            warm_up_s=1.5,
            seconds=2.5,  # long enough for a busy machine to hear of a chunk
            relief_s=1.5,
            message_ms=40,
        )
    assert (report.overload.streams, report.relief.streams) == (6, 2)
    assert report.overload.chunk_latency_ms is not None
    assert report.overload.mean_exit_layer == 2
    assert report.ceilings[0][1] == 12
    assert report.ceilings[-1][1] == 8
    assert report.ceiling_changes_per_second == pytest.approx(1 / 2.5, rel=0.5)
    assert (report.recovery_s, report.errors) == (0.0, {})
    assert 0 <= report.generator_late < 1


def test_bars_of_an_overload() -> None:
    over = overload.Phase(168, 20.0, (300.0, 500.0, 900.0), (300.0, 500.0, 600.0), 7.0, 0.8)
    relief = overload.Phase(56, 6.0, (100.0, 200.0, 300.0), (100.0, 200.0, 300.0), 12.0, 0.0)
    good = overload.OverloadReport(over, relief, 0.2, 1.5, [(0.0, 12)], {}, 0.0)
    assert good.holds(640)
    assert not good.holds(499)
    for spoilt in (
        replace(good, recovery_s=2.1),
        replace(good, ceiling_changes_per_second=1.1),
        replace(good, errors={"UNAVAILABLE": 1}),
        replace(good, overload=replace(over, cut_by_load=0.0)),
        replace(good, overload=replace(over, mean_exit_layer=12.0)),
    ):
        assert not spoilt.holds(640)


def test_quantiles_and_plot(tmp_path: Path) -> None:
    assert load.quantiles([]) is None
    assert load.quantiles(list(range(101))) == (50, 95, 99)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    load.plot([trial(8, 100), trial(16, 900)], 640, str(tmp_path / "load.png"))
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_slope_ignores_the_warm_up() -> None:
    steady = [(float(second), 100.0 + second / 600) for second in range(300, 600, 5)]
    samples = [(0.0, 5.0), (100.0, 90.0), *[(200.0, 95.0)] * 58, *steady]
    assert slope_in_ten_minutes(samples, until=600.0) == pytest.approx(1.0)
    assert slope_in_ten_minutes([(0.0, 5.0)], until=600.0) == 0.0


def test_slope_ignores_the_end() -> None:
    """Streams that all end at once answer with their last words: a burst of its own."""
    samples = [(float(second), 100.0 + second / 600) for second in range(0, 600, 5)]
    burst = [(float(second), 500.0) for second in range(601, 620, 5)]
    assert slope_in_ten_minutes([*samples, *burst], until=600.0) == pytest.approx(1.0)


def test_one_recording_makes_several() -> None:
    speeches = varied(babble(1.0), "a b")
    lengths = {len(speech.pcm) for speech in speeches}
    assert len(lengths) == len(speeches) >= 5
    assert all(abs(np.log(length / 32_000)) < 0.12 for length in lengths)


@pytest.fixture(scope="module")
def tiny(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a small model and short recordings: what is begun is spoken to its end."""
    folder = tmp_path_factory.mktemp("speech")
    rows = ["path\ttranscript"]
    for index in range(3):
        soundfile.write(folder / f"{index}.wav", babble(2.0 + 0.4 * index, seed=index), 16_000)
        rows.append(f"{index}.wav\tthe quick brown fox")
    (folder / "manifest.tsv").write_text("\n".join(rows) + "\n")
    options = ["--model", str(model_path), "--manifest", str(folder / "manifest.tsv")]
    return [*options, "--no-pin", "--precision", "fp32", "--json"]


def test_load(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "load", "--streams", "3", "--seconds", "4", "--warm-up", "2.5"]
    main([*command, "--latency-ms", "5000", "--policy", "exit:4", *tiny])
    report = json.loads(capsys.readouterr().out)
    (seen,) = report["trials"]
    assert (report["holds"], report["streams"], seen["errors"]) == (True, 3, {})
    assert report["streams_by_policy"] == {"exit:4": 3}
    assert 3 <= seen["chunks"] <= 24
    assert set(seen["chunks_by_layer"]) == {"4"}
    assert 0 < seen["server_latency_ms"] < seen["mean_latency_ms"] + 100
    assert 0 < seen["encoder_gmacs_per_second"] < report["matrix_gmacs_per_second"]
    assert seen["chunk_latency_ms"] == sorted(seen["chunk_latency_ms"])
    assert 0 < seen["cpu_share"] < 1
    assert 0 <= seen["overhead_share"] <= 1
    assert seen["streams_per_step"] >= 1


def test_abuse(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "abuse", "--bad", "16", "--good", "2", *tiny]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bad_streams"] == {"cancelled": 4, "half-closed": 4, "idle": 4, "killed": 4}
    assert report["good_streams"] >= 2
    assert (report["changed_texts"], report["failed_streams"], report["open_streams"]) == ([], 0, 0)
    assert (report["in_use_growth_mb"] is not None) == (memory_in_use() is not None)
    assert abs(report["in_use_growth_mb"] or 0.0) < 5


def test_soak(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "soak", "--minutes", "0.06", "--streams", "2", *tiny])
    report = json.loads(capsys.readouterr().out)
    assert report["trial"]["errors"] == {}
    assert len(report["rss_mb"]) >= 5
    tells = memory_in_use() is not None
    assert len(report["in_use_mb"]) == (len(report["rss_mb"]) if tells else 0)
    assert (report["in_use_slope_mb"] is not None) == tells
    assert all(0 < used < held for (_, used), (_, held) in zip(report["in_use_mb"], report["rss_mb"], strict=False))
    assert report["latency_last_ms"] > 0
