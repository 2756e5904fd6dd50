"""Fetching LibriSpeech subsets: resumed where an earlier attempt stopped, checked, unpacked as a whole or not at all.

The archives are those of <https://www.openslr.org/12> and, for the two small subsets, <https://www.openslr.org/31>; the
checksums are those published there as md5sum.txt.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.client
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from asr_exit.errors import AsrExitError, ConfigError

MIRROR = "https://www.openslr.org/resources"
_BLOCK_BYTES = 1 << 20
_TIMEOUT_S = 60.0


class DownloadError(AsrExitError):
    """A subset could not be fetched, or what came is not it."""


@dataclass(frozen=True)
class Archive:
    """Where a subset is and what its archive must hash to."""

    resource: int  # number of the corpus on OpenSLR
    md5: str


ARCHIVES: Mapping[str, Archive] = {
    "train-clean-5": Archive(31, "5df7d4e78065366204ca6845bb08f490"),
    "dev-clean-2": Archive(31, "6d7ab67ac6a1d2c993d050e16d61080d"),
    "train-clean-100": Archive(12, "2a93770f6d5c6c964bc36631d331a522"),
    "train-clean-360": Archive(12, "c0e676e450a7ff2f54aeade5171606fa"),
    "train-other-500": Archive(12, "d1a0fd59409feb2c614ce4d30c387708"),
    "dev-clean": Archive(12, "42e2234ba48799c1f50f24a7926300a1"),
    "dev-other": Archive(12, "c8d0bcc9cca99d4f8b62fcc847357931"),
    "test-clean": Archive(12, "32fa31d27d2e1cad72775fee3f4849a9"),
    "test-other": Archive(12, "fb5a50374b501bb3bac4815ee91d3135"),
}


def ensure_subset(
    root: Path, name: str, *, mirror: str = MIRROR, report: Callable[[str], None] = lambda line: None
) -> Path:
    """ROOT/NAME, fetched and unpacked unless it is there. A folder of that name is always a whole subset.

    Args:
        root: folder of the subsets; archives are kept in ROOT/archives until they are unpacked.
        report: gets a line on every step, and one a second while bytes arrive.
    Raises:
        ConfigError: no such subset.
        DownloadError: unreachable, wrong checksum, broken archive, or no space.
    """
    folder = root / name
    if folder.is_dir():
        report(f"{name}: is there")
        return folder
    archive = ARCHIVES.get(name)
    if archive is None:
        raise ConfigError(f"{name} is not a subset of LibriSpeech; use {', '.join(ARCHIVES)}")
    packed = root / "archives" / f"{name}.tar.gz"
    try:
        packed.parent.mkdir(parents=True, exist_ok=True)
        if packed.is_file():
            _check_md5(packed, archive.md5, f"delete {packed} and run again")
        else:
            fetch(f"{mirror}/{archive.resource}/{name}.tar.gz", packed, archive.md5, report=report)
        report(f"{name}: unpacking")
        unpack(packed, name, root)
        packed.unlink()
    except OSError as error:
        raise DownloadError(
            f"cannot write below {root}: {error.strerror or error}; what has arrived is kept: "
            "make room and run again, or give another folder"
        ) from error
    return folder


def fetch(
    url: str,
    path: Path,
    md5: str,
    *,
    attempts: int = 5,
    pause_s: float = 2.0,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Download to `path`, which appears only when it is whole and its checksum is right; until then PATH.part grows.

    Raises:
        DownloadError: unreachable after all attempts (the part is kept), or wrong checksum (it is deleted).
        OSError: the file cannot be written.
    """
    part = path.with_name(path.name + ".part")
    for attempt in range(attempts):
        try:
            if _fetch_rest(url, part, report):
                break
            problem = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code in (403, 404, 410):
                raise DownloadError(f"{url} is not there ({error.code}); check --mirror") from None
            problem = f"status {error.code}"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, OSError) and reason.errno == errno.ENOSPC:
                raise
            problem = str(reason) or type(error).__name__
        if attempt + 1 < attempts:
            report(f"{path.name}: {problem}; trying again")
            time.sleep(pause_s * 2**attempt)
    else:
        raise DownloadError(f"{url}: {problem}, {attempts} times; what has arrived is kept: run again to go on")
    try:
        _check_md5(part, md5, "it is deleted: run again, or choose another --mirror")
    except DownloadError:
        part.unlink()
        raise
    part.replace(path)


def _fetch_rest(url: str, part: Path, report: Callable[[str], None]) -> bool:
    """Append what is missing to `part`. False when the connection ended before that."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "asr-exit", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(have):  # nothing is missing
            return True
        part.unlink()  # longer than the archive: not a beginning of it
        return False
    with response:
        if response.status != 206:  # the server sends everything
            have = 0
        total = have + int(response.headers.get("Content-Length") or 0)
        _check_space(part.parent, total - have)
        shown = time.monotonic()
        with part.open("ab" if have else "wb") as out:
            while block := response.read(_BLOCK_BYTES):
                out.write(block)
                have += len(block)
                if time.monotonic() - shown >= 1.0:
                    shown = time.monotonic()
                    report(f"{part.stem}: {have / 1e6:.0f} of {total / 1e6:.0f} MB")
        return have >= total


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(errno.ENOSPC, f"{num_bytes / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")


def _check_md5(path: Path, md5: str, advice: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        raise DownloadError(f"{path.name} is not the published archive (checksum {found}, not {md5}); {advice}")


def unpack(packed: Path, name: str, root: Path) -> None:
    """LibriSpeech/NAME of an archive to ROOT/NAME, by rename once all of it is there.

    Raises:
        DownloadError: broken, without that folder, or with an entry that would land elsewhere.
        OSError: no space.
    """
    staging = root / f".{name}.unpacking"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        _check_space(root, packed.stat().st_size)
        with tarfile.open(packed, "r:gz") as archive:
            archive.extractall(staging, filter="data")
        inner = staging / "LibriSpeech" / name
        if not inner.is_dir():
            raise DownloadError(f"{packed.name} holds no folder LibriSpeech/{name}: it is another archive; delete it")
        inner.replace(root / name)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DownloadError(f"{packed} is broken ({error}); nothing of it is used: delete it and run again") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
