"""Regenerates `service/pb` from `proto/`: `python -m service.generate [--check]`.

The stubs are flat modules (`service.pb.speech_pb2`): the proto package `asr_exit.v1` would otherwise put a second
`asr_exit` on the import path. Use grpcio-tools 1.76.0; newer ones write stubs that need a newer protobuf runtime.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO_DIR = ROOT / "proto"
STUB_DIR = ROOT / "service" / "pb"
TOOLS_VERSION = "1.76.0"


def generate() -> dict[str, str]:
    """Returns the text of every stub by file name. Raises RuntimeError when protoc refuses the proto files."""
    from importlib import resources

    from grpc_tools import protoc

    protos = sorted(PROTO_DIR.rglob("*.proto"))
    well_known = resources.files("grpc_tools") / "_proto"
    stubs: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as out:
        arguments = ["protoc", f"-I{PROTO_DIR}", f"-I{well_known}"]
        arguments += [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
        if protoc.main(arguments + [str(path) for path in protos]) != 0:
            raise RuntimeError("protoc refused the proto files; see its message above")
        for path in sorted(Path(out).rglob("*.py*")):
            if path.name in stubs:
                raise RuntimeError(f"two proto files generate {path.name}; give them different names")
            stubs[path.name] = path.read_text(encoding="utf-8")
    packages = {".".join(path.relative_to(PROTO_DIR).parent.parts) for path in protos}
    for package in packages:
        flat = re.compile(rf"^from {re.escape(package)} import (\w+_pb2)", re.MULTILINE)
        stubs = {name: flat.sub(r"from service.pb import \1", text) for name, text in stubs.items()}
    return stubs


def stale(stubs: dict[str, str]) -> list[str]:
    """Returns the names of committed stubs that differ from `stubs`, are missing or have no proto file any more."""
    committed = {path.name: path.read_text(encoding="utf-8") for path in STUB_DIR.glob("*_pb2*.py*")}
    return sorted(name for name in stubs.keys() | committed.keys() if stubs.get(name) != committed.get(name))


def main(argv: list[str] | None = None) -> int:
    """Writes the stubs, or with `--check` only says which are out of date (exit status 1 if any)."""
    parser = argparse.ArgumentParser(prog="python -m service.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a committed stub is out of date")
    arguments = parser.parse_args(argv)
    try:
        stubs = generate()
    except ImportError:
        print(f"grpcio-tools is missing: pip install grpcio-tools=={TOOLS_VERSION}", file=sys.stderr)
        return 2
    names = stale(stubs)
    if arguments.check:
        for name in names:
            print(f"service/pb/{name} is out of date: run python -m service.generate", file=sys.stderr)
        return 1 if names else 0
    for name in names:
        target = STUB_DIR / name
        if name in stubs:
            target.write_text(stubs[name], encoding="utf-8")
        else:
            target.unlink()
        print(f"wrote service/pb/{name}" if name in stubs else f"removed service/pb/{name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
