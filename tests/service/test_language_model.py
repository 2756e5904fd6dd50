"""A language model behind the server and in the commands: who uses it, at which weight, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

import asr_exit
from asr_exit.arpa import read_arpa
from asr_exit.checkpoint import Model
from asr_exit.errors import CheckpointError, ConfigError
from asr_exit.fusion import LanguageModel
from asr_exit.metrics import word_errors
from asr_exit.recognizer import Recognizer
from asr_exit.stream import Fill, StreamOptions
from asr_exit.tokenizer import normalise
from service.background import BackgroundServer
from service.cli.main import main
from service.client import ServiceError, SpeechClient, StreamSettings
from tests.conftest import babble
from tests.service.conftest import parts, pcm16, serve_config

AUDIO = babble(4.0, seed=0)
DATA = pcm16(AUDIO)
HEARD = np.frombuffer(DATA, dtype="<i2").astype(np.float32) / 32768
ARPA = """\\data\\
ngram 1=6
ngram 2=2

\\1-grams:
-3.0\t<unk>
-99\t<s>\t-0.1
-1.0\t</s>
-0.4\tdog\t-0.3
-0.5\tover\t-0.2
-0.9\tthe\t-0.1

\\2-grams:
-0.1\tthe dog
-0.2\tover the

\\end\\
"""


@pytest.fixture(scope="module")
def arpa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm") / "small.arpa"
    path.write_text(ARPA)
    return path


@pytest.fixture(scope="module")
def server(model: Model, arpa: Path) -> Iterator[BackgroundServer]:
    with BackgroundServer(model, serve_config(language_model={"path": str(arpa), "weight": 0.5})) as running:
        yield running


def expected(model: Model, arpa: Path, weight: float) -> str:
    """The same in process."""
    options = StreamOptions(fill=Fill.PROPAGATE)
    if weight:
        fusion = LanguageModel(read_arpa(arpa), weight)
        options = StreamOptions(fill=Fill.PROPAGATE, decoder="beam", language_model=fusion)
    return Recognizer(model, options).transcribe(HEARD).text


def said(address: str, weight: float | None) -> str:
    settings = StreamSettings(interim_results=False, language_model_weight=weight)
    with SpeechClient(address) as client:
        return " ".join(caption.text for caption in client.stream(parts(DATA), settings) if caption.text)


def test_each_request_may_choose_its_weight(server: BackgroundServer, model: Model, arpa: Path) -> None:
    texts = [said(server.address, weight) for weight in (None, 0.0, 4.0)]
    assert texts == [expected(model, arpa, weight) for weight in (0.5, 0.0, 4.0)]
    assert len(set(texts)) == 3


def test_a_weight_out_of_range_or_without_a_model_is_refused(server: BackgroundServer, model: Model) -> None:
    with pytest.raises(ServiceError, match=r"INVALID_ARGUMENT.*weight -1 must be 0 to 5"):
        said(server.address, -1.0)
    with BackgroundServer(model, serve_config()) as without:
        with pytest.raises(ServiceError, match="no language model is served"):
            said(without.address, 0.5)
        assert said(without.address, 0.0) == said(without.address, None)


def test_a_server_does_not_start_with_a_broken_language_model(model: Model, tmp_path: Path) -> None:
    (tmp_path / "lm.bin").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a readable language model"):
        BackgroundServer(model, serve_config(language_model={"path": str(tmp_path / "lm.bin")})).__enter__()
    with pytest.raises(ConfigError, match="beam_size"):
        serve_config(language_model={"beam_size": 0})


def test_transcribe_and_evaluate_take_one(
    model_path: Path, model: Model, arpa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audio = tmp_path / "a.wav"
    soundfile.write(audio, HEARD, 16_000, subtype="PCM_16")
    common = ["--model", str(model_path), "--device", "cpu"]
    with_lm = ["--lm", str(arpa), "--lm-weight", "4"]
    texts = []
    for extra in ([], ["--decoder", "beam"], with_lm, [*with_lm, "--offline", "--chunk-ms", "640"]):
        assert main(["transcribe", str(audio), *common, *extra]) == 0
        texts.append(capsys.readouterr().out.strip())
    assert (texts[0], texts[2]) == (expected(model, arpa, 0), expected(model, arpa, 4.0))
    assert texts[2] == texts[3] != texts[1]

    (tmp_path / "list.tsv").write_text(f"path\ttranscript\na.wav\t{texts[2]}\n")
    errors = []
    for extra in ([], with_lm):
        listed = ["evaluate", "--manifest", str(tmp_path / "list.tsv"), "--policies", "full", "--json"]
        assert main([*listed, *common, *extra]) == 0
        errors.append(json.loads(capsys.readouterr().out)["rows"][0]["wer"])
    assert errors[0] > errors[1] == 0.0


def test_the_bundled_one_helps_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    sample = Path(asr_exit.__file__).parent / "assets" / "sample.flac"
    reference = normalise(sample.with_suffix(".txt").read_text())
    errors = []
    for extra in ([], ["--lm", "bundled"]):
        assert main(["transcribe", str(sample), "--device", "cpu", "--policy", "exit:2", *extra]) == 0
        errors.append(word_errors(reference, capsys.readouterr().out.strip()).errors)
    assert errors[1] < errors[0]


def test_options_that_do_not_fit_are_refused(arpa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "a.wav", HEARD[:8000], 16_000)
    for extra, message in (
        (["--lm-weight", "1"], "need --lm"),
        (["--lm", str(arpa), "--decoder", "greedy"], "leave out --decoder greedy"),
        (["--lm", str(tmp_path / "none.bin")], "no language model at"),
        (["--lm", str(arpa), "--lm-weight", "9"], "must be 0 to 5"),
    ):
        assert main(["transcribe", str(tmp_path / "a.wav"), *extra]) == 1
        assert message in capsys.readouterr().err
