"""The command line, in this process where that shows the same, in one of its own where it matters."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import asr_exit
from asr_exit.audio import load_audio
from asr_exit.checkpoint import Model
from asr_exit.recognizer import Recognizer
from service.background import BackgroundServer
from service.cli import sources
from service.cli.captions import ASCII_BARS, LiveView, PlainView, depth_bar
from service.cli.main import COMMANDS, build_parser, main
from service.client import Caption, ChunkDepth
from tests.conftest import TEXT, babble
from tests.service.conftest import pcm16

SAMPLE = Path(asr_exit.__file__).parent / "assets" / "sample.flac"


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audio") / "a.wav"
    soundfile.write(path, babble(2.5), 16_000)
    return path


@pytest.fixture(scope="module")
def librispeech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    chapter = root / "dev-tiny" / "1" / "2"
    chapter.mkdir(parents=True)
    lines = []
    for index, text in enumerate(TEXT[:3]):
        soundfile.write(chapter / f"1-2-{index:04}.flac", babble(1.0 + index, seed=index), 16_000)
        lines.append(f"1-2-{index:04} {text.upper()}\n")
    (chapter / "1-2.trans.txt").write_text("".join(lines))
    return root


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_help_is_quick() -> None:
    code = "import sys; from service.cli.main import build_parser; build_parser(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "service.cli.evaluate" in loaded
    assert not {"torch", "numpy", "grpc", "rich", "soundfile"} & set(loaded)


def test_streaming_needs_no_torch() -> None:
    code = "import sys; import service.client, service.cli.captions, service.cli.sources; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" not in loaded


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            build_parser().parse_args([command, "--help"])
        assert stopped.value.code == 0
        assert f"asr-exit {command}" in capsys.readouterr().out


def test_transcribe(recording: Path, model: Model, model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = Recognizer(model).transcribe(load_audio(recording)).text
    assert main(["transcribe", str(recording), "--model", str(model_path)]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert main(["transcribe", str(recording), "--model", str(model_path), "--offline", "--chunk-ms", "640"]) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_transcribe_json(recording: Path, model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["transcribe", str(recording), str(recording), "--json", "--policy", "exit:4", "--model", str(model_path)]
    assert main(command) == 0
    first, second = lines_of(capsys.readouterr().out)
    assert first["text"] == second["text"]
    assert first["mean_exit_layer"] == 4
    assert 0 < first["macs_fraction"] < 0.6
    assert [chunk["exit_layer"] for chunk in first["chunks"]] == [4] * 4
    assert " ".join(word["text"] for word in first["words"]) == first["text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.wav"], "no such file"),
        ([__file__], "not a readable audio file"),
        (["--policy", "deep"], "unknown policy 'deep'"),
        (["--budget", "2"], "at most 1"),
        (["--budget", "mean_depht=0.5"], "mean_depth"),
        (["--fill", "zeros"], "unknown fill"),
        (["--offline", "--budget", "0.5"], "--offline runs everything at one depth"),
        (["--model", __file__], "not a readable safetensors file"),
        (["--model", "missing.safetensors"], "no model file"),
        (["--threads", "0"], "at least 1"),
    ],
)
def test_mistakes_end_with_one_line(
    recording: Path, model_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    audio = [] if arguments[0].endswith((".wav", ".py")) else [str(recording)]
    assert main(["transcribe", "--model", str(model_path), *audio, *arguments]) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("asr-exit transcribe: ")
    assert "Traceback" not in printed


def test_stream(recording: Path, model: Model, server: BackgroundServer, capsys: pytest.CaptureFixture[str]) -> None:
    expected = Recognizer(model).transcribe(load_audio(recording)).text
    assert main(["stream", str(recording), "--server", server.address]) == 0
    printed = capsys.readouterr()
    assert expected in printed.out
    assert "mean layer 12.0" in printed.out
    assert "2.5 s of audio, mean exit layer 12.0 of 12, " in printed.err


def test_stream_json_from_stdin(
    recording: Path, model: Model, server: BackgroundServer, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    samples = load_audio(recording)
    piped = recording.with_suffix(".raw")
    piped.write_bytes(pcm16(samples))
    with piped.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert main(["stream", "-", "--json", "--policy", "exit:6", "--server", server.address]) == 0
    *captions, summary = lines_of(capsys.readouterr().out)
    assert [caption["type"] for caption in captions[-2:]] == ["interim", "final"]
    assert captions[-1]["words"]
    assert summary["type"] == "summary"
    assert summary["mean_exit_layer"] == 6
    assert summary["chunks"] == 4
    assert summary["audio_seconds"] == 2.5
    assert summary["text"] == captions[-1]["text"]


def test_stream_without_a_server(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stream", str(recording), "--server", "127.0.0.1:1"]) == 1
    assert "asr-exit stream: UNAVAILABLE" in capsys.readouterr().err


def test_stream_from_a_microphone_that_is_not_there(
    server: BackgroundServer, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert main(["stream", "--microphone", "--server", server.address]) == 1
    assert "--microphone needs sounddevice" in capsys.readouterr().err


def test_evaluate_json(librispeech: Path, model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--librispeech", str(librispeech), "--subset", "dev-tiny", "--json", "--streams", "2"]
    assert main([*command, "--model", str(model_path)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert set(values) == {"utterances", "hours", "chunk_ms", "rows"}
    assert (values["utterances"], values["chunk_ms"]) == (3, 640)
    assert values["hours"] == pytest.approx(6 / 3600)
    rows = {row["policy"]: row for row in values["rows"]}
    assert list(rows) == ["exit:2", "exit:4", "exit:6", "exit:8", "exit:10", "exit:12", "full"]
    assert all(set(row) == {"policy", "wer", "mean_exit_layer", "macs_fraction", "rtf"} for row in rows.values())
    assert [rows[f"exit:{layer}"]["mean_exit_layer"] for layer in (2, 4, 12)] == [2, 4, 12]
    assert rows["full"]["macs_fraction"] == pytest.approx(1.0)
    assert rows["full"]["wer"] == rows["exit:12"]["wer"] > 0
    fractions = [row["macs_fraction"] for row in values["rows"][:6]]
    assert fractions == sorted(fractions)


def test_evaluate_manifest(librispeech: Path, model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = librispeech / "manifest.tsv"
    manifest.write_text("utt_id\trel_path\ttranscript\na\tdev-tiny/1/2/1-2-0000.flac\tTHE QUICK FOX\n")
    command = [
        "evaluate",
        "--manifest",
        str(manifest),
        "--policies",
        "exit:2,posterior:0.5",
        "--model",
        str(model_path),
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "posterior:0.5" in printed
    assert "1 recordings" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--librispeech", "nowhere", "--subset", "dev"], "no LibriSpeech transcripts"),
        (["--librispeech", "nowhere"], "needs --subset"),
        (["--manifest", "nowhere.tsv"], "cannot read the manifest"),
        (["--manifest", __file__], "must name, separated by tabs"),
    ],
)
def test_evaluate_mistakes(
    model_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["evaluate", "--model", str(model_path), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_demo(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--fast", "--policy", "exit:6", "--model", str(model_path)]) == 0
    printed = capsys.readouterr().out
    assert "server on 127.0.0.1:" in printed
    seconds = soundfile.info(str(SAMPLE)).duration
    assert f"{math.ceil(seconds / 0.64)} chunks" in printed
    assert "mean exit layer 6.0 of 12" in printed
    assert f"errors in {len(SAMPLE.with_suffix('.txt').read_text(encoding='utf-8').split())} words" in printed


def caption(text: str, committed: str, *layers: int, final: bool = False) -> Caption:
    chunks = tuple(ChunkDepth(index, 0.0, 640.0, layer, "full", 1, 5.0) for index, layer in enumerate(layers))
    return Caption(text, committed, final, 0.5, 0.5, 640.0, 5.0, (), chunks)


def test_plain_view_without_unicode() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    view = PlainView((2, 4, 6), file)
    view.show(caption("so", "", 2, 6))
    view.show(caption("so far", "so far", 4, final=True))
    file.seek(0)
    assert file.read() == "[  0.64 s]  so far  185  mean layer 4.0\n"
    assert depth_bar(caption("", "", 2, 4, 6).chunks, (2, 4, 6), ASCII_BARS) == "158"


def test_live_view_rewrites_partials_and_keeps_finals(monkeypatch) -> None:
    from rich.console import Console

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr("rich.console.Console", lambda **options: console)
    with LiveView((2, 4, 6)) as view:
        view.show(caption("hello wor", "hello", 2))
        view.show(caption("hello world", "hello world", 6, final=True))
    printed = screen.getvalue()
    assert "hello wor\n" in printed.replace("\r", "")
    assert "layer 2/6 (full), 5 ms" in printed
    assert "hello world  ▁█  mean layer 4.0" in printed
    assert "\x1b[1A" in printed or "\x1b[2K" in printed


class FakeTime:
    """In place of the module `time`: sleeping takes exactly as long as it was asked to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_paced_parts_come_when_their_audio_was_spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeTime()
    monkeypatch.setattr(sources, "time", clock)
    sent = []
    for part in sources.paced([b"12345678"] * 4, 80):
        sent.append((round(clock.now, 6), part))
        clock.now += 0.25 if len(sent) == 2 else 0.03  # whoever sends takes time, once more than a part lasts
    assert [part for _, part in sent] == [b"12345678"] * 4
    assert [at for at, _ in sent] == [0.1, 0.2, 0.45, 0.48]  # late parts at once, none early, no time lost for good


def test_file_parts_keep_the_samples(recording: Path) -> None:
    messages, rate_hz = sources.file_parts(str(recording))
    assert rate_hz == 16_000
    assert len(messages) == 32  # of 80 ms
    values = np.frombuffer(b"".join(messages), dtype="<i2")
    np.testing.assert_allclose(values / 32767, load_audio(recording), atol=1e-4)
