"""Installs to look at: the package as pip lays it out, and processes that use it away from the checkout."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
#: A true build, but of code that nobody waits for: seconds instead of a minute.
QUICK = {"FASTALIGN_CXXFLAGS": "-O0"}


def call(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command, away from the checkout's settings; whatever comes of it."""
    own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX")}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**own, **environment},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The same, and it must succeed; returns what it printed."""
    done = call(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_site(directory: Path) -> Path:
    """A copy of the working tree as an install lays it out, without a compiled library."""
    package = directory / "fastalign"
    skipped = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastalign", package, ignore=skipped)
    for name in ("csrc", "kernels"):
        shutil.copytree(ROOT / name, package / name, ignore=skipped)
    return directory


def load_build(site: Path) -> ModuleType:
    """``fastalign/_build.py`` of a site, as setup.py loads it: without torch, at that place."""
    spec = importlib.util.spec_from_file_location("_build", site / "fastalign" / "_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["_build"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


#: Prints where the package came from, the loss and gradient of a fixed problem, and the instruction set.
USE = """
import logging, os, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
import torch, fastalign
torch.manual_seed(0)
q, k, r, s = (torch.randn(1, h, 70, 24) for h in (4, 2, 6, 3))
mask = torch.arange(70)[None] % 3 > 0
q.requires_grad_()
loss = fastalign.fused_attn_align_loss(
    q, k, r, s, visual_mask=mask, backend=os.environ.get("BACKEND", "auto"))
loss.backward()
print(fastalign.__file__)
print(loss.item(), q.grad.abs().sum().item())
if os.environ.get("BACKEND") == "cpu":
    from fastalign.backends.cpu import load_library
    print(load_library().fa_isa().decode())
"""


def use(site: Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process that imports fastalign from ``site`` and runs it (``USE``)."""
    return call(sys.executable, "-c", USE, cwd=cwd, PYTHONPATH=str(site), **environment)
