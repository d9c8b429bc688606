"""Compile and find the C++ kernels: at install (setup.py), else on first use, cached.

The kernels are a plain shared library with a C interface (csrc/align.h): no torch header, no torch
symbol. So it needs a compiler and nothing else, it takes seconds, and no torch release can break it.
What can break is a library built from other sources; ``find`` compares a digest and refuses it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
#: A library for this machine alone holds one.
_NATIVE: dict[str, tuple[str, ...]] = {
    "native": ("-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native",)
}


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says why and what to do."""


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
        if path.suffix in (".h", ".cpp"):
            state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()[:16]


def compiler() -> str:
    """The C++ compiler: ``CXX``, else the first of g++, clang++, c++.

    Raises:
        BuildError: there is none.
    """
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError(
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
            _run([cxx, *common, *unit.flags, *extra_flags(), "-c", str(sources() / unit.source),
                  "-o", output])  # fmt: skip

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_unit, units, objects))
        library = f"{scratch}/{target.name}"
        _run([cxx, "-shared", *openmp, *extra_flags(), *objects, "-o", library])
        os.replace(library, target)  # whole or not at all, whoever else is building


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(
            f"compiling the CPU kernels failed: {' '.join(command)}\n{done.stdout}{done.stderr}\n"
            "backend='tiled' serves every call without them; please report this"
        )


def cached() -> Path:
    """Where a library built on first use lies: by sources, flags and processor."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "fastalign" / f"{digest()}-{_processor()}" / LIBRARY


def _processor() -> str:
    """A digest of what this processor can do, so that a shared cache serves several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        able = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    except OSError:
        able = ""
    state = (platform.machine(), platform.processor(), able)
    return hashlib.sha256(repr(state).encode()).hexdigest()[:8]


def find(build_missing: bool = True) -> Path | None:
    """The library made of the present sources: the installed one, the cached one, or a new build.

    Returns:
        Its path; None if there is none and ``build_missing`` is False.

    Raises:
        BuildError: it has to be built and cannot be.
    """
    wanted = digest()
    installed = PACKAGE / LIBRARY
    if installed.exists() and f"fastalign:{wanted}".encode() in installed.read_bytes():
        return installed
    path = cached()
    if path.exists():
        return path
    if not build_missing:
        return None
    why = "was built from other sources" if installed.exists() else "was not built at install"
    logger.warning("the CPU kernels: the library %s; compiling it once to %s", why, path)
    build(path, portable=False)
    return path
