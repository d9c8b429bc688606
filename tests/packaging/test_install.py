"""Source distribution, wheel and editable install, away from the repository."""

from __future__ import annotations

import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from .sites import QUICK, ROOT, USE, call, run, use

PIP = ("-m", "pip", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution."""
    directory = tmp_path_factory.mktemp("sdist")
    run(
        *(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", directory),
        cwd=ROOT,
    )
    (found,) = directory.glob("fastalign-*.tar.gz")
    return found


def unpack_source(archive: Path, directory: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(directory / "source", filter="data")
    (unpacked,) = (directory / "source").iterdir()
    return unpacked


@pytest.fixture
def source(archive: Path, tmp_path: Path) -> Path:
    """Its files, fresh: a build leaves its own among them."""
    return unpack_source(archive, tmp_path)


def make_wheel(source: Path, directory: Path, **environment: str) -> Path:
    run(
        *(sys.executable, *PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation"),
        *("--wheel-dir", directory, source),
        cwd=directory,
        **environment,
    )
    (wheel,) = directory.glob("fastalign-*.whl")
    return wheel


def unpack(wheel: Path) -> Path:
    site = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@pytest.fixture(scope="module")
def site(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel installs; its library is a quick build."""
    directory = tmp_path_factory.mktemp("wheel")
    return unpack(make_wheel(unpack_source(archive, directory), directory, **QUICK))


def numbers(done: str) -> list[float]:
    return [float(x) for x in done.splitlines()[1].split()]


def test_the_source_distribution_is_whole(source: Path) -> None:
    for wanted in (
        *("fastalign/api.py", "fastalign/py.typed", "kernels/launch.py", "csrc/align.h"),
        *("csrc/kernels.cpp", "csrc/selfcheck.cpp", "csrc/Makefile", "LICENSE", "setup.py"),
    ):
        assert (source / wanted).exists(), wanted


def test_the_wheel_holds_library_and_sources(site: Path) -> None:
    package = site / "fastalign"
    for wanted in ("_cpu.so", "py.typed", "csrc/align.h", "csrc/kernels.cpp", "kernels/launch.py"):
        assert (package / wanted).exists(), wanted
    assert not (package / "csrc" / "selfcheck.cpp").exists()
    for name in ("kernels", "csrc", "tests", "benchmarks", "examples"):
        assert not (site / name).exists()


def test_the_wheels_library_serves_without_a_compiler(site: Path, tmp_path: Path) -> None:
    """Whatever instruction set it is told to use, and with tiled's numbers."""
    able = torch.backends.cpu.get_cpu_capability()
    names = ["generic"]
    names += [name for name, part in (("avx2", "AVX"), ("avx512", "AVX512")) if part in able]
    bare = {"PATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache"), **QUICK}
    want = use(site, tmp_path, BACKEND="tiled", **bare)
    for name in names:
        done = use(site, tmp_path, BACKEND="cpu", FASTALIGN_ISA=name, **bare)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] == str(site / "fastalign" / "__init__.py")
        assert done.stdout.splitlines()[2] == name
        assert numbers(done.stdout) == pytest.approx(numbers(want.stdout), rel=1e-4)
    assert not (tmp_path / "cache").exists()


def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(
    source: Path, tmp_path: Path
) -> None:
    done = call(
        *(sys.executable, *PIP, "wheel", "-v", "--no-deps", "--no-index", "--no-build-isolation"),
        *("--wheel-dir", tmp_path, source),
        cwd=tmp_path,
        PATH="",
    )
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler found" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("fastalign-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastalign/api.py" in names
    assert "fastalign/csrc/kernels.cpp" in names
    assert not any(name.endswith(".so") for name in names)


def test_a_compiler_that_fails_stops_the_install(source: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 3\n")
    compiler.chmod(0o755)
    for cxx, said in ((str(compiler), "this compiler is broken"), ("no-such", "CXX is 'no-such'")):
        done = call(
            *(sys.executable, *PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation"),
            *("--wheel-dir", tmp_path, source),
            cwd=tmp_path,
            CXX=cxx,
        )
        assert done.returncode != 0
        assert said in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))


def make_environment(directory: Path) -> Path:
    """A virtual environment that sees this one's packages; returns its interpreter."""
    venv.create(directory, symlinks=True, with_pip=False)
    (purelib,) = directory.glob("lib/python*/site-packages")
    (purelib / "outer.pth").write_text(
        "".join(f"{path}\n" for path in sys.path if path.endswith("site-packages"))
    )
    return directory / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True])
def test_a_real_install_in_an_environment_of_its_own(
    editable: bool, source: Path, tmp_path: Path
) -> None:
    """As the README says, compiled as for users; the library in place is the one that runs."""
    python = make_environment(tmp_path / "venv")
    run(
        *(python, *PIP, "install", "--no-deps", "--no-index", "--no-build-isolation"),
        *(["-e"] if editable else []),
        source,
        cwd=tmp_path,
        FASTALIGN_CXXFLAGS="",
    )
    where = "import fastalign._build as b; print(b.find(build_missing=False))"
    bare = {"PATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache"), "FASTALIGN_CXXFLAGS": ""}
    found = Path(run(python, "-c", where, cwd=tmp_path, **bare).strip())
    assert found.name == "_cpu.so"
    assert source in found.parents if editable else tmp_path / "venv" in found.parents
    got, want = (
        run(python, "-c", USE, cwd=tmp_path, BACKEND=backend, **bare)
        for backend in ("cpu", "tiled")
    )
    assert numbers(got) == pytest.approx(numbers(want), rel=1e-4)
    assert (got.splitlines()[2] == "native") is editable
