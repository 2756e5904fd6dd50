#!/usr/bin/env bash
# A 64-bit Arm system for tests/arm64 that runs under emulation: Debian's Python, and Arm builds of numpy and ONNX Runtime.
#     tests/arm64/prepare.sh DIR && ASR_EXIT_ARM64=DIR pytest -m arm64
# Needs root for apt-get only where qemu-user-static and debootstrap are not installed, and about 400 MB in DIR.
set -euo pipefail
root=$(realpath -m "${1:?usage: $0 DIR}")

command -v qemu-aarch64-static debootstrap >/dev/null || apt-get install -y -q qemu-user-static debootstrap

# Unpack only: nothing is configured or run, so no root and no mounts are needed.
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
debootstrap --arch=arm64 --variant=minbase --download-only --include=python3.11,python3.11-minimal \
    bookworm "$packages"
mkdir -p "$root"
find "$packages/var/cache/apt/archives" -name '*.deb' -exec dpkg-deb -x {} "$root" \;

# Later versions of ONNX Runtime crash at import under this emulation.
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.11 --implementation cp \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
    --platform manylinux2014_aarch64 -d "$packages/wheels" onnxruntime==1.26.0 'numpy>=2.2,<2.4' flatbuffers protobuf
mkdir -p "$root/site"
for wheel in "$packages"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$root/site"; done

QEMU_LD_PREFIX=$root PYTHONPATH=$root/site PYTHONDONTWRITEBYTECODE=1 \
    qemu-aarch64-static -cpu cortex-a76 "$root/usr/bin/python3.11" -c \
    'import numpy, onnxruntime, platform; print(platform.machine(), numpy.__version__, onnxruntime.__version__)'
