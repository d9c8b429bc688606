"""A clean source distribution builds, installs and runs away from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path, **environment: str) -> str:
    env = {**os.environ, **environment}
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_sdist_installs_and_runs(tmp_path: Path) -> None:
    run(
        *(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path)),
        cwd=ROOT,
    )
    (archive,) = tmp_path.glob("fastalign-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = [name.partition("/")[2] for name in tar.getnames()]
        tar.extractall(tmp_path / "source", filter="data")
    for wanted in ("fastalign/api.py", "fastalign/py.typed", "LICENSE", "setup.py"):
        assert wanted in names
    (source,) = (tmp_path / "source").iterdir()
    site = tmp_path / "site"
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"),
        *("--no-build-isolation", "--target", str(site), str(source)),
        cwd=tmp_path,
    )
    code = (
        "import fastalign, torch; print(fastalign.__file__); x = torch.randn(1, 2, 5, 4); "
        "m = torch.ones(1, 5, dtype=torch.bool); "
        "print(fastalign.fused_attn_align_loss(x, x, x, x, visual_mask=m).item() < 1e-6)"
    )
    out = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert out == [str(site / "fastalign" / "__init__.py"), "True"]
    assert not (site / "kernels").exists()
