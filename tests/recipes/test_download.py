"""Fetching subsets from a real HTTP server: resumed, checked, unpacked whole or not at all, full disks."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from asr_exit.data import FeatureStore
from asr_exit.errors import ConfigError
from recipes.librispeech import download, prepare
from recipes.librispeech.download import Archive, DownloadError, ensure_subset, fetch
from tests.recipes.sine import write_librispeech

ROOT = Path(__file__).parents[2]
NAME = "train-clean-5"


class Files(BaseHTTPRequestHandler):
    """Serves `content` with Range; `cuts` are byte counts after which answers break off, one per answer."""

    content: dict[str, bytes]
    cuts: list[int]
    ranges: bool
    asked: list[str | None]

    def do_GET(self) -> None:
        data = self.content.get(self.path)
        asked = self.headers.get("Range")
        self.asked.append(asked)
        if data is None:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        if start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + self.cuts.pop(0)] if self.cuts else data[start:])
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def server(archive: bytes) -> Iterator[type[Files]]:
    handler = type("Handler", (Files,), {"content": {f"/31/{NAME}.tar.gz": archive}, "cuts": [], "asked": []})
    handler.ranges = True
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        handler.mirror = f"http://127.0.0.1:{running.server_port}"  # type: ignore[attr-defined]
        yield handler
        running.shutdown()
        thread.join()


def packed(folder: Path) -> bytes:
    """`folder` as LibriSpeech/... in a .tar.gz."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        tar.add(folder, "LibriSpeech")
    return data.getvalue()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("corpus")
    write_librispeech(folder, NAME)
    return packed(folder)


@pytest.fixture(autouse=True)
def checksums(archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    expect(archive, monkeypatch)


def expect(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "ARCHIVES", {NAME: Archive(31, hashlib.md5(data).hexdigest())})


def test_prepare_downloads_what_is_missing_and_trains_on_it(server: type[Files], tmp_path: Path, capsys) -> None:
    corpus, out = tmp_path / "LibriSpeech", tmp_path / "data"
    arguments = ["--librispeech", str(corpus), "--subsets", NAME, "--dev", NAME, "--out", str(out), "--download"]
    arguments += ["--mirror", server.mirror, "--vocab-size", "40", "--processes", "1"]  # type: ignore[attr-defined]
    prepare.main(arguments)
    assert json.loads((out / "data.json").read_text())["train"][NAME]["clips"] == 8
    assert sorted(path.name for path in corpus.iterdir()) == ["archives", NAME]
    assert list((corpus / "archives").iterdir()) == []
    prepare.main(arguments)
    assert len(server.asked) == 1
    assert f"{NAME}: is there" in capsys.readouterr().err


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_resumed(server: type[Files], archive: bytes, tmp_path: Path, ranges: bool) -> None:
    server.ranges, server.cuts = ranges, [5000, 3000]
    path = tmp_path / "a.tar.gz"
    lines: list[str] = []
    url, md5 = f"{server.mirror}/31/{NAME}.tar.gz", hashlib.md5(archive).hexdigest()  # type: ignore[attr-defined]
    fetch(url, path, md5, pause_s=0.01, report=lines.append)
    assert path.read_bytes() == archive
    second = 8000 if ranges else 3000
    assert server.asked == [None, "bytes=5000-", f"bytes={second}-"]
    assert [line for line in lines if "ended early" in line] == [
        "a.tar.gz: the connection ended early; trying again"
    ] * 2


def test_attempts_end_and_the_next_run_goes_on(server: type[Files], archive: bytes, tmp_path: Path) -> None:
    server.cuts = [100, 100]
    url, md5 = f"{server.mirror}/31/{NAME}.tar.gz", hashlib.md5(archive).hexdigest()  # type: ignore[attr-defined]
    path = tmp_path / "a.tar.gz"
    with pytest.raises(DownloadError, match=r"2 times.*run again to go on"):
        fetch(url, path, md5, attempts=2, pause_s=0.01)
    assert not path.exists()
    assert path.with_name("a.tar.gz.part").read_bytes() == archive[:200]
    fetch(url, path, md5)
    assert server.asked[-1] == "bytes=200-"
    assert path.read_bytes() == archive


def test_a_part_that_is_whole_or_too_long(server: type[Files], archive: bytes, tmp_path: Path) -> None:
    url, md5 = f"{server.mirror}/31/{NAME}.tar.gz", hashlib.md5(archive).hexdigest()  # type: ignore[attr-defined]
    path, part = tmp_path / "a.tar.gz", tmp_path / "a.tar.gz.part"
    for content in (archive, archive + b"more"):
        part.write_bytes(content)
        fetch(url, path, md5, pause_s=0.01)
        assert path.read_bytes() == archive
        path.unlink()


def test_a_wrong_checksum_is_refused_and_not_kept(server: type[Files], tmp_path: Path, monkeypatch) -> None:
    expect(b"something else", monkeypatch)
    with pytest.raises(DownloadError, match="not the published archive"):
        ensure_subset(tmp_path, NAME, mirror=server.mirror)  # type: ignore[attr-defined]
    assert [path.name for path in tmp_path.rglob("*")] == ["archives"]


def test_an_archive_from_elsewhere_is_checked_and_used(archive: bytes, tmp_path: Path) -> None:
    (tmp_path / "archives").mkdir()
    placed = tmp_path / "archives" / f"{NAME}.tar.gz"
    placed.write_bytes(archive[:-1])
    with pytest.raises(DownloadError, match="not the published archive"):
        ensure_subset(tmp_path, NAME, mirror="http://127.0.0.1:9")
    placed.write_bytes(archive)
    assert len(list(ensure_subset(tmp_path, NAME, mirror="http://127.0.0.1:9").rglob("*.flac"))) == 8
    assert not placed.exists()


def test_unknown_subsets_and_unreachable_servers(server: type[Files], tmp_path: Path, archive: bytes) -> None:
    with pytest.raises(ConfigError, match="train-clean-6 is not a subset"):
        ensure_subset(tmp_path, "train-clean-6")
    with pytest.raises(DownloadError, match="404"):
        ensure_subset(tmp_path, NAME, mirror=f"{server.mirror}/elsewhere")  # type: ignore[attr-defined]
    with pytest.raises(DownloadError, match=r"refused, 2 times"):
        fetch("http://127.0.0.1:9/x", tmp_path / "x", "", attempts=2, pause_s=0.01)
    with pytest.raises(SystemExit, match="--download needs --librispeech"):
        prepare.main(["--download", "--out", str(tmp_path / "data")])


def tar_with(*members: tarfile.TarInfo) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return data.getvalue()


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = 1
    for key, value in fields.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive at all", "is broken"),
        (gzip.compress(b"no tar inside" * 100), "is broken"),
        (tar_with(member(f"LibriSpeech/{NAME}/a"), member("../../escaped")), "is broken"),
        (tar_with(member("/tmp/asr-exit-escaped/x"), member("../escaped")), "is broken"),
        (
            tar_with(member(f"LibriSpeech/{NAME}/l", type=tarfile.SYMTYPE, linkname="../../../..", size=0)),
            "is broken",
        ),
        (tar_with(member("LibriSpeech/dev-clean/a")), "holds no folder"),
        (None, "is broken"),
    ],
    # Names of their own: the bytes of an archive hold the second it was made in, and pytest's workers must agree.
    ids=["not gzip", "not tar", "parent folder", "absolute path", "symlink", "other folder", "cut off"],
)
def test_bad_archives_leave_nothing(
    content: bytes | None, message: str, archive: bytes, server: type[Files], tmp_path: Path, monkeypatch
) -> None:
    content = archive[: len(archive) // 2] if content is None else content  # None: cut off, as if published like that
    expect(content, monkeypatch)
    server.content[f"/31/{NAME}.tar.gz"] = content
    corpus = tmp_path / "corpus"
    with pytest.raises(DownloadError, match=message):
        ensure_subset(corpus, NAME, mirror=server.mirror)  # type: ignore[attr-defined]
    assert sorted(path.name for path in corpus.iterdir()) == ["archives"]
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_while_downloading(server: type[Files], tmp_path: Path) -> None:
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / f"{NAME}.tar.gz.part").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match=r"No space left on device.*make room"):
        ensure_subset(tmp_path, NAME, mirror=server.mirror)  # type: ignore[attr-defined]
    assert not (tmp_path / NAME).exists()


def test_too_little_space_is_said_before_anything_is_loaded(server: type[Files], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(DownloadError, match=r"GB are needed and 0\.0 GB are free"):
        ensure_subset(tmp_path, NAME, mirror=server.mirror)  # type: ignore[attr-defined]
    assert [path.name for path in tmp_path.rglob("*")] == ["archives"]


def test_shards_that_cannot_be_written_are_an_error_and_never_read(speech: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk: in a process of its own, workers included."""
    code = "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
    code += "from recipes.librispeech.prepare import main; main(sys.argv[1:])"
    arguments = ["--librispeech", str(speech), "--subsets", "sine", "--out", str(tmp_path / "data"), "--processes", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("prepare: cannot write below")
    assert "make room and run again" in done.stderr
    assert "Traceback" not in done.stderr
    left = [path.name for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert left == []
    with pytest.raises(ConfigError, match="no feature shards"):
        FeatureStore(tmp_path / "data" / "train")


def test_published_checksums_are_well_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert len({archive.md5 for archive in download.ARCHIVES.values()}) == len(download.ARCHIVES) == 9
    assert all(len(archive.md5) == 32 and int(archive.md5, 16) for archive in download.ARCHIVES.values())
