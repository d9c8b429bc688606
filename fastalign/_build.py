"""Compile and find the C++ kernels: at install (setup.py), else on first use, cached.

The kernels are a plain shared library with a C interface (csrc/align.h): no torch header, no torch
symbol. So it needs a compiler and nothing else, it takes seconds, and no torch release can break it.
What can break is a library built from other sources; ``find`` compares a digest and refuses it.

A library that an install put into the package serves if it is made of the present sources. Otherwise one is
compiled on first use, said in the log, and kept in the user's cache by sources, flags, processor and
compiler; two processes that need it at once build it once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("fastalign")

PACKAGE = Path(__file__).resolve().parent
#: Name of the library inside the package, where an install puts it.
LIBRARY = "_cpu.so"
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-psabi"),
)
#: Instruction set -> flags. A portable library (a wheel) holds them all and picks one at run time.
_PORTABLE: dict[str, tuple[str, ...]] = {"generic": ()}
if platform.machine() in ("x86_64", "AMD64"):
    _PORTABLE["avx2"] = ("-mavx2", "-mfma")
    _PORTABLE["avx512"] = ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma")
    _PORTABLE["avx512_bf16"] = (*_PORTABLE["avx512"], "-mavx512bf16")
#: A library for this machine alone holds one.
_NATIVE: dict[str, tuple[str, ...]] = {
    "native": ("-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native",)
}


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says why and what to do."""


class NoCompiler(BuildError):
    """This machine has no C++ compiler."""


@dataclass(frozen=True)
class Unit:
    """One object file: a source and its own flags."""

    source: str
    name: str
    flags: tuple[str, ...]


def sources() -> Path:
    """The directory of the C++ files: beside the package, or inside it once installed."""
    for place in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (place / "align.h").exists():
            return place
    raise BuildError(f"the C++ sources are missing: no csrc/align.h in {PACKAGE} or beside it")


def extra_flags() -> tuple[str, ...]:
    """``FASTALIGN_CXXFLAGS``: more flags, for sanitizers and tests."""
    return tuple(os.environ.get("FASTALIGN_CXXFLAGS", "").split())


def digest() -> str:
    """What the library is made of: sources and flags, whatever the instruction sets."""
    state = hashlib.sha256(repr((_FLAGS, extra_flags())).encode())
    for path in sorted(sources().iterdir()):
        if path.suffix in (".h", ".cpp") and path.name != "selfcheck.cpp":
            state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()[:16]


def compiler() -> list[str]:
    """The C++ compiler and its first arguments: ``CXX``, else the first of g++, clang++, c++.

    Raises:
        NoCompiler: there is none.
        BuildError: ``CXX`` names one that is not there; no other takes its place.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise BuildError(f"CXX is {os.environ['CXX']!r}, and there is no such program")
        return named
    for name in ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return [path]
    raise NoCompiler(
        "no C++ compiler found (tried $CXX, g++, clang++, c++): install one (Debian: apt install g++) "
        "for the CPU kernels; without them backend='tiled' serves every call"
    )


def build(target: Path, portable: bool) -> None:
    """Compile the kernels to ``target``.

    Args:
        target: the library's path.
        portable: for every machine of this architecture; else for this one, in a third of the time.

    Raises:
        BuildError: no compiler, or one that fails; the message holds its output.
    """
    cxx, openmp = compiler(), () if sys.platform == "darwin" else ("-fopenmp",)
    sets = _PORTABLE if portable else _NATIVE
    common = (*_FLAGS, *openmp, *(f"-DFASTALIGN_{name.upper()}" for name in sets))
    units = [
        Unit("library.cpp", "library", (f'-DFASTALIGN_DIGEST="{digest()}"',)),
        Unit("pool.cpp", "pool", ()),
    ]
    for name, flags in sets.items():
        units += [
            Unit(
                "kernels.cpp",
                f"{name}_{real}",
                (*flags, f"-DFASTALIGN_ISA={name}", f"-DREAL={real}"),
            )
            for real in ("float", "double")
        ]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [f"{scratch}/{unit.name}.o" for unit in units]

        def compile_unit(unit: Unit, output: str) -> None:
            _run([*cxx, *common, *unit.flags, *extra_flags(), "-c", str(sources() / unit.source),
                  "-o", output])  # fmt: skip

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_unit, units, objects))
        library = f"{scratch}/{target.name}"
        _run([*cxx, "-shared", *openmp, *extra_flags(), *objects, "-o", library])
        os.replace(library, target)  # whole or not at all, whoever else is building


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(
            f"compiling the CPU kernels failed: {' '.join(command)}\n{done.stdout}{done.stderr}\n"
            "backend='tiled' serves every call without them; please report this"
        )


def find(build_missing: bool = True) -> Path | None:
    """The library made of the present sources: the installed one, the cached one, or a new build.

    Returns:
        Its path; None if there is none and ``build_missing`` is False.

    Raises:
        BuildError: it has to be built and cannot be.
    """
    installed = PACKAGE / LIBRARY
    if _fits(installed):
        return installed
    found = [path for path in _cached() if _fits(path)]
    if found:
        return found[0]
    if not build_missing:
        return None
    why = "was built from other sources" if installed.exists() else "was not built at install"
    path = _place(compiler())
    try:
        with _alone(path.parent):
            if not _fits(path):  # else another process built it while this one waited
                logger.warning(
                    "the CPU kernels: the library %s; compiling it once to %s", why, path
                )
                build(path, portable=False)
    except OSError as error:
        raise BuildError(
            f"the CPU kernels cannot be built in {path.parent}: {error}; set XDG_CACHE_HOME to a "
            "directory that can be written, or use backend='tiled'"
        ) from error
    return path


def _fits(library: Path) -> bool:
    """Whether a library is there and says that it is made of the present sources and flags."""
    return library.exists() and f"fastalign:{digest()}".encode() in library.read_bytes()


def _root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastalign"


def _place(cxx: list[str]) -> Path:
    """Where a library built on first use lies: by sources, flags, processor and compiler."""
    asked = subprocess.run([*cxx, "--version"], capture_output=True, text=True)
    made_by = hashlib.sha256(f"{cxx}\n{asked.stdout}".encode()).hexdigest()[:8]
    return _root() / f"{digest()}-{_processor()}-{made_by}" / LIBRARY


def _cached() -> list[Path]:
    """Libraries for this processor: this compiler's, or anyone's where there is no compiler (any more)."""
    try:
        return [_place(compiler())]
    except BuildError:
        return sorted(_root().glob(f"{digest()}-{_processor()}-*/{LIBRARY}"))


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One process at a time; the system lets go the lock of a process that dies."""
    directory.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with (directory / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _processor() -> str:
    """A digest of what this processor can do, so that a shared cache serves several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        able = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    except OSError:
        able = ""
    state = (platform.machine(), platform.processor(), able)
    return hashlib.sha256(repr(state).encode()).hexdigest()[:8]
