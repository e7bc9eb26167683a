"""`gqa-export` without the seconds in which Python imports PyTorch: a process that has done so, forked per command.

    python tests/warm_program.py SOCKET      serves until its standard input is closed

`put_in_front(folder)` starts it and writes a `gqa-export` into `folder` that hands its arguments, folder, environment
and standard streams over and ends as the forked command ends. README.md is run without it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as link:
    link.connect({path!r})
    said = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(link, [len(said).to_bytes(8, "little") + said], [0, 1, 2])
    code = link.recv(4)
sys.exit(int.from_bytes(code, "little") if len(code) == 4 else 70)
"""


@contextmanager
def put_in_front(folder: Path) -> Iterator[None]:
    """A `gqa-export` in `folder` that starts at once, for as long as the block lasts."""
    path = str(folder / "warm")
    program = folder / "gqa-export"
    program.write_text(CLIENT.format(python=sys.executable, path=path))
    program.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield
    finally:
        server.communicate(timeout=60)


def serve(path: str) -> None:
    """Import what commands import, then fork one command per connection until nobody holds our standard input."""
    import select

    import onnx  # noqa: F401
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import polygraphy.comparator  # noqa: F401
    from quick_polygraphy import quicken
    from transformers import AutoModelForCausalLM  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import gqa_export.cli  # noqa: F401
    from gqa_export.trace.capture import export, translate

    translate.library(export.OPSET)
    quicken()

    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        door.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([door, sys.stdin], [], [])
            if door not in ready:
                return
            link, _ = door.accept()
            with link:
                link.sendall(one_command(link).to_bytes(4, "little"))


def one_command(link: socket.socket) -> int:
    """Fork a command and wait for its exit code."""
    data, streams, _, _ = socket.recv_fds(link, 1 << 20, 3)
    size = 8 + int.from_bytes(data[:8], "little")
    while len(data) < size:
        data += link.recv(size - len(data))
    child = os.fork()
    if child == 0:
        run(json.loads(data[8:]), streams)
    for stream in streams:
        os.close(stream)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF


def run(said: list, streams: list[int]) -> None:
    """In the child: become the command. Never returns."""
    from gqa_export.cli import entry

    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        sys.argv, folder, environment = said
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        entry()
    finally:
        os._exit(70)


if __name__ == "__main__":
    serve(sys.argv[1])
