"""TensorRT for RTX in pieces that fit a limited copy to a machine without a network: packed here, unpacked there.

    python scripts/carry_tensorrt.py pack --python 3.12 --out out/rtx     needs the network; some minutes
    python scripts/carry_tensorrt.py unpack out/rtx/library.xz DIR        on the GPU machine, standard library only
    python scripts/carry_tensorrt.py unpack out/rtx/bindings.xz DIR

`pack` writes library.xz (libtensorrt_rtx alone: most of the size) and bindings.xz (the Python bindings, the parser and
other files), and prints their sizes. `unpack` makes DIR/tensorrt_rtx_libs and the bindings' package in DIR: put DIR on
PYTHONPATH.
"""

from __future__ import annotations

import argparse
import io
import lzma
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("tensorrt-rtx-cu13-bindings==1.7.1.116", "onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0")
LIBRARY, LIBRARIES = "libtensorrt_rtx.so", "onnxruntime_ep_nv_tensorrt_rtx"
FOLDER = "tensorrt_rtx_libs"
"""where gqa_export looks for the libraries, whatever package brought them"""
FILTERS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME,
                                     "dict_size": 192 * 2**20}]
"""a dictionary that most of the library fits into, and jumps as absolute addresses: what makes it fit"""


def compress(files: dict[str, bytes]) -> bytes:
    """A tar of the files, in the same order every time, compressed."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, data in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            archive.addfile(entry, io.BytesIO(data))
    return lzma.compress(made.getvalue(), format=lzma.FORMAT_XZ, filters=FILTERS)


def split(wheels: Sequence[Path]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(the library, the rest that an engine needs) of the wheels: file -> content."""
    library, rest = {}, {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                base = name.rpartition("/")[2]
                if name.endswith("/"):
                    continue
                if base.startswith(LIBRARY):
                    library[f"{FOLDER}/{base}"] = archive.read(name)
                elif not name.startswith(LIBRARIES):
                    rest[name] = archive.read(name)
                elif ".so" in base and "providers" not in base:
                    rest[f"{FOLDER}/{base}"] = archive.read(name)
    return library, rest


def pack(version: str, out: Path) -> None:
    """Fetch the wheels for that Python and write the two pieces."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
                        "--python-version", version, "--implementation", "cp", "--platform", "manylinux_2_28_x86_64",
                        "--platform", "manylinux_2_27_x86_64", "--platform", "manylinux2014_x86_64", "-d", folder,
                        *PACKAGES], check=True)
        pieces = split(sorted(Path(folder).glob("*.whl")))
    out.mkdir(parents=True, exist_ok=True)
    for name, files in zip(("library", "bindings"), pieces, strict=True):
        data = compress(files)
        (out / f"{name}.xz").write_bytes(data)
        print(f"{out / name}.xz: {len(files)} files, {len(data) / 2**20:.2f} MiB", flush=True)


def unpack(piece: Path, folder: Path) -> None:
    """Undo `compress` into the folder, beside what another piece put there."""
    with lzma.open(piece) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        archive.extractall(folder, filter="data")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack")
    packing.add_argument("--python", default="3.12", help="Python of the GPU machine")
    packing.add_argument("--out", type=Path, required=True)
    unpacking = verbs.add_parser("unpack")
    unpacking.add_argument("piece", type=Path)
    unpacking.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    if options.verb == "pack":
        pack(options.python, options.out)
        return 0
    try:
        unpack(options.piece, options.folder)
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        print(f"error: {options.piece} cannot be unpacked: {error}\n  fix: copy it again, whole", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
