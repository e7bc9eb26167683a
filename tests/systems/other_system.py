"""A Linux process in which gqa-export finds what Windows or macOS would give it.

    python other_system.py win32|darwin PROGRAM [ARGUMENTS]     PROGRAM: Python text

What our own modules import is exchanged, other packages keep theirs:

- Modules that the system lacks cannot be imported (`fcntl`, `resource`, ...; Triton has no build for either).
- `os`, `signal` and `errno` have the names that typeshed knows for that system, `sys.platform` and `os.name` its
  values.
- A text file opened without an encoding is an error: the default is not UTF-8 on Windows.

And for the whole process, what Windows' file system does (`win32` only):

- A file that is open or mapped by this process can be neither renamed, replaced nor removed, by none of its names; nor
  can a folder that holds one. `os.rename` does not replace.
- Names with `<>:"|?*`, names of devices and names that end in a dot or a space do not exist; no symbolic links without
  a privilege.
- The folder of temporary files is on another drive than everything else: nothing is renamed or linked between them.

Not simulated: paths with backslashes, another process's open files, the limit of 260 characters.
"""

from __future__ import annotations

import ast
import builtins
import errno
import os
import re
import shutil
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

HIDDEN = {
    "win32": ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "curses", "readline",
              "triton", "cuda"),
    "darwin": ("triton", "cuda"),
}
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]$')
real_import = builtins.__import__


def names_of(module: str, system: str) -> set[str]:
    """The names that typeshed's stub of a module of the standard library has on a system."""
    import mypy

    stubs = Path(mypy.__file__).parent / "typeshed" / "stdlib"
    text = (stubs / f"{module}.pyi" if (stubs / f"{module}.pyi").is_file() else stubs / module / "__init__.pyi")
    found: set[str] = set()

    def holds(test: ast.expr) -> bool:
        text = ast.unparse(test)
        return bool(eval(text, {"sys": types.SimpleNamespace(platform=system, version_info=sys.version_info)}))

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.If):
                visit(node.body if holds(node.test) else node.orelse)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                found.update(target.id for target in targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.ImportFrom | ast.Import):
                found.update((alias.asname or alias.name).split(".")[0] for alias in node.names)

    visit(ast.parse(text.read_text(encoding="utf-8")).body)
    return found


class Seen(types.ModuleType):
    """A module as it is on another system: a part of its names, some with other values."""

    def __init__(self, module: types.ModuleType, names: set[str] | None, values: dict[str, Any]) -> None:
        super().__init__(module.__name__)
        self.__dict__["_seen"] = (module, names, values)

    def __getattr__(self, name: str) -> Any:
        module, names, values = self.__dict__["_seen"]
        if name in values:
            return values[name]
        if names is not None and name not in names and not name.startswith("__"):
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r} on this system")
        return getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_seen"][0], name, value)


def exchange_imports(system: str) -> None:
    """Give our modules that system's standard library."""
    import ctypes
    import signal

    def library(name: str | None, *arguments: Any, **more: Any) -> Any:
        if name is None and system == "win32":
            raise TypeError("bad argument type for built-in operation")  # what CDLL(None) gives there
        return ctypes.CDLL(name, *arguments, **more)

    seen: dict[str, types.ModuleType] = {"sys": Seen(sys, None, {"platform": system}),
                                         "ctypes": Seen(ctypes, None, {"CDLL": library})}
    for module, values in ((os, {"name": "nt", "O_BINARY": 0} if system == "win32" else {}), (signal, {}), (errno, {})):
        seen[module.__name__] = Seen(module, names_of(module.__name__, system) | {"path", "environ", "fspath"}, values)

    def imported(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if level == 0 and str((globals or {}).get("__name__", "")).split(".")[0] in ("gqa_export", "gqa_plugins"):
            if name.split(".")[0] in HIDDEN[system]:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in seen:
                return seen[name]
        return real_import(name, globals, locals, fromlist, level)

    builtins.__import__ = imported
    warnings.filterwarnings("error", category=EncodingWarning, module=r"gqa_export")


def held_here() -> set[tuple[int, int]]:
    """(device, inode) of every file that this process has open or mapped."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            stat = os.stat(f"/proc/self/fd/{number}")
        except OSError:
            continue
        found.add((stat.st_dev, stat.st_ino))
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            _, _, _, device, inode, *_ = line.split(maxsplit=5)
            major, _, minor = device.partition(":")
            found.add((os.makedev(int(major, 16), int(minor, 16)), int(inode)))
    return found


def files_in(path: Path) -> list[Path]:
    """A file, or all files below a folder."""
    return [path] if not path.is_dir() else [Path(place, name) for place, _, names in os.walk(path) for name in names]


def windows_files(drive: Path) -> None:
    """Make this process's file system behave as Windows' does, below the folder `drive`."""
    real = {name: getattr(os, name) for name in ("rename", "replace", "unlink", "rmdir", "link")}
    temporary = Path(tempfile.gettempdir()).resolve()

    def ours(path: Any) -> bool:
        return Path(path).absolute().is_relative_to(drive)

    def check(path: Any) -> None:
        held = held_here()
        for file in files_in(Path(path)):
            stat = os.lstat(file)
            if (stat.st_dev, stat.st_ino) in held:
                raise PermissionError(errno.EACCES, f"the file is being used: {file}", str(path))

    def drives(one: Any, other: Any) -> None:
        if Path(one).absolute().is_relative_to(temporary) != Path(other).absolute().is_relative_to(temporary):
            raise OSError(errno.EXDEV, "the system cannot move the file to a different disk drive", str(one))

    def rename(source: Any, target: Any, **more: Any) -> None:
        if ours(source):
            drives(source, target)
            check(source)
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "cannot create a file when that file already exists", str(target))
        real["rename"](source, target, **more)

    def replace(source: Any, target: Any, **more: Any) -> None:
        if ours(source):
            drives(source, target)
            check(source)
            if os.path.isdir(target):
                raise PermissionError(errno.EACCES, "access is denied", str(target))
            if os.path.lexists(target):
                check(target)
        real["replace"](source, target, **more)

    def unlink(path: Any, **more: Any) -> None:
        if "dir_fd" not in more and ours(path):
            check(path)
        real["unlink"](path, **more)

    def link(source: Any, target: Any, **more: Any) -> None:
        drives(source, target)
        real["link"](source, target, **more)

    def symlink(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "a required privilege is not held by the client")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.mkdir", "os.rename", "os.link"):
            return
        for path in arguments[:2]:
            if isinstance(path, str | os.PathLike) and ours(path):
                for part in Path(path).absolute().relative_to(drive).parts:
                    if FORBIDDEN.search(part) or RESERVED.fullmatch(part):
                        raise OSError(errno.EINVAL, f"the file name syntax is incorrect: {part}", str(path))

    os.rename, os.replace, os.unlink, os.remove, os.link, os.symlink = rename, replace, unlink, unlink, link, symlink
    shutil._use_fd_functions = False
    sys.addaudithook(watch)


def main() -> None:
    """See the module."""
    system, program, *arguments = sys.argv[1:]
    sys.argv = ["program", *arguments]
    names_of("os", system)  # before anything is exchanged
    exchange_imports(system)
    if system == "win32":
        windows_files(Path(os.environ["GQA_DRIVE"]).resolve())
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
