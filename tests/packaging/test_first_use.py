"""The library that is compiled on first use: when, where, by whom, and what is refused."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastalign.backends import cpu

from .sites import QUICK, ROOT, load_build, make_site, use

#: A compiler that writes down its calls; its objects and libraries hold the digest that it was given.
STAND_IN = """#!/bin/sh
echo "$*" >> {log}
[ "$1" = --version ] && echo "{version}" && exit 0
sleep {seconds}
for word in "$@"; do
  case "$word" in
    -DFASTALIGN_DIGEST=*) digest="fastalign:$(echo "$word" | tr -d '"' | cut -d= -f2)" ;;
    *.o) [ "$last" != -o ] && objects="$objects $word" ;;
  esac
  [ "$last" = -o ] && out=$word
  last=$word
done
echo "$digest" > "$out"
[ -z "$objects" ] || cat $objects > "$out"
"""


class Compiler:
    """A stand-in for a C++ compiler, and what it was asked."""

    def __init__(self, directory: Path, version: str = "one", seconds: float = 0) -> None:
        directory.mkdir()
        self.path, self._log = directory / "c++", directory / "log"
        self.path.write_text(STAND_IN.format(log=self._log, version=version, seconds=seconds))
        self.path.chmod(0o755)

    def links(self) -> int:
        """How many libraries it made."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return sum("-shared" in line for line in lines)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return make_site(tmp_path / "site")


@pytest.fixture
def build(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``_build`` of an install without a library, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTALIGN_CXXFLAGS", raising=False)
    return load_build(site)


def test_built_once_announced_and_cached(
    build: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiler = Compiler(tmp_path / "bin")
    monkeypatch.setenv("CXX", str(compiler.path))
    assert build.find(build_missing=False) is None
    assert compiler.links() == 0
    with caplog.at_level(logging.WARNING, logger="fastalign"):
        path = build.find()
    assert "was not built at install; compiling it once to" in caplog.text
    assert str(path) in caplog.text
    caplog.clear()
    assert build.find() == path
    assert compiler.links() == 1
    assert not caplog.text


def test_another_compiler_flag_source_or_processor_is_another_library(
    build: ModuleType, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(Compiler(tmp_path / "one").path))
    paths = [build.find()]
    monkeypatch.setenv("CXX", str(Compiler(tmp_path / "two", version="two").path))
    paths.append(build.find())
    monkeypatch.setenv("FASTALIGN_CXXFLAGS", "-O0")
    paths.append(build.find())
    with (site / "fastalign" / "csrc" / "vec.h").open("a") as file:
        file.write("// changed\n")
    paths.append(build.find())
    monkeypatch.setattr(build, "_processor", lambda: "another")
    paths.append(build.find())
    assert len(set(paths)) == 5
    assert all(path.exists() for path in paths)


def test_a_library_of_other_sources_is_not_used(
    build: ModuleType,
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither one that an older install left in the package, nor a cached file cut short."""
    compiler = Compiler(tmp_path / "bin")
    monkeypatch.setenv("CXX", str(compiler.path))
    installed = site / "fastalign" / build.LIBRARY
    installed.write_bytes(b"fastalign:0123456789abcdef")
    with caplog.at_level(logging.WARNING, logger="fastalign"):
        path = build.find()
    assert path != installed
    assert "was built from other sources; compiling it once to" in caplog.text
    path.write_bytes(b"")
    assert build.find() == path
    assert compiler.links() == 2
    installed.write_bytes(f"...fastalign:{build.digest()}...".encode())
    assert build.find() == installed


def test_two_processes_at_once_compile_once(
    build: ModuleType, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(tmp_path / "bin", seconds=0.3)
    monkeypatch.setenv("CXX", str(compiler.path))
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
        "from tests.packaging.sites import load_build\n"
        "build = load_build(Path(sys.argv[1])); print(build._fits(build.find()))"
    )
    command = [sys.executable, "-c", code, str(site)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["True"] * 3
    assert compiler.links() == 1
    assert not list((tmp_path / "cache").glob("fastalign/*/tmp*"))  # no scratch is left


def test_a_failing_compiler_is_quoted(
    build: ModuleType, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (site / "fastalign" / "csrc" / "pool.cpp").open("a") as file:
        file.write("#error no such luck\n")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("FASTALIGN_CXXFLAGS", "-fsyntax-only -O0")
    with pytest.raises(build.BuildError, match=r"(?s)pool\.cpp.*no such luck.*backend='tiled'"):
        build.find()
    assert build.find(build_missing=False) is None  # nothing half-made is left behind


def test_a_named_compiler_that_is_missing_is_an_error(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(build.BuildError, match="CXX is 'no-such-compiler -O1'"):
        build.find()


def test_without_a_compiler_a_cached_library_still_serves(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(Compiler(tmp_path / "bin").path))
    path = build.find()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert build.find() == path
    path.unlink()
    with pytest.raises(build.NoCompiler, match="no C\\+\\+ compiler found"):
        build.find()


def test_a_cache_that_cannot_be_written_says_what_to_set(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(Compiler(tmp_path / "bin").path))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="set XDG_CACHE_HOME"):
        build.find()


def test_without_a_compiler_auto_is_tiled_and_says_so(site: Path, tmp_path: Path) -> None:
    """And an explicit backend='cpu' is an error, not another backend."""
    bare = {"PATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = use(site, tmp_path, **bare)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(site / "fastalign" / "__init__.py")
    assert "the CPU kernels cannot be used: no C++ compiler found" in done.stderr
    assert "backend='auto' uses 'tiled'" in done.stderr
    done = use(site, tmp_path, BACKEND="cpu", **bare)
    assert done.returncode == 1
    assert "no C++ compiler found" in done.stderr
    assert "allowed: 'reference', 'tiled'" in done.stderr


def test_the_real_compiler_on_first_use(site: Path, tmp_path: Path) -> None:
    """The numbers are tiled's, the first process says that it compiles, the second does not."""
    own = {"XDG_CACHE_HOME": str(tmp_path / "cache"), **QUICK}
    first, second, other = (
        use(site, tmp_path, BACKEND=backend, **own) for backend in ("cpu", "cpu", "tiled")
    )
    assert "compiling it once to" in first.stderr
    assert "compiling" not in second.stderr
    assert first.stdout == second.stdout, second.stderr
    got, want = (list(map(float, x.stdout.splitlines()[1].split())) for x in (second, other))
    assert got == pytest.approx(want, rel=1e-4)


INTERFACE = """
#include <cstdint>
extern "C" {
%s
int64_t fa_abi() { return %d; }
int64_t fa_call_size() { return %d; }
}
"""


@pytest.mark.parametrize(("version", "size"), [(cpu._ABI + 1, 0), (cpu._ABI, 8)])
def test_another_interface_is_refused(
    version: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library of another version, or whose struct is larger than Python's."""
    import ctypes

    names = ("error", "isa", "peak_bytes", "poison", "open", "maps", "statistics", "pool",
             "gradients", "close")  # fmt: skip
    source = tmp_path / "other.cpp"
    functions = "\n".join(f"void fa_{name}() {{}}" for name in names)
    source.write_text(INTERFACE % (functions, version, ctypes.sizeof(cpu._Call) + size))
    library = tmp_path / "other.so"
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    monkeypatch.setattr(cpu._build, "find", lambda: library)
    with pytest.raises(RuntimeError, match=r"other\.so has interface .* reinstall fastalign"):
        cpu.load_library.__wrapped__()
