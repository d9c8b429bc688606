"""What importing the package brings in, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(code: str, cwd: Path = ROOT) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_fastalign_needs_torch_alone() -> None:
    """Every other third-party package is blocked; the function then runs."""
    python(
        """
import sys, importlib.abc
blocked = ("triton", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors",
           "PIL", "matplotlib", "rich", "typer", "yaml", "ninja")
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{name} is blocked in this test")
sys.meta_path.insert(0, Block())
import torch, fastalign
x = torch.randn(1, 2, 5, 4)
mask = torch.ones(1, 5, dtype=torch.bool)
loss = fastalign.fused_attn_align_loss(x, x, x, x, visual_mask=mask)
assert abs(loss.item()) < 1e-6
"""
    )


def test_importing_fastalign_imports_neither_triton_nor_transformers() -> None:
    loaded = python(
        "import sys, torch; before = set(sys.modules); import fastalign; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    for name in ("triton", "transformers", "PIL", "matplotlib", "rich", "typer"):
        assert f"'{name}'" not in loaded
    assert "'fastalign'" in loaded


def test_import_kernels_is_never_ours(tmp_path: Path) -> None:
    """With the repository's root on sys.path, `import kernels` finds another package or none."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
try:
    import kernels
except ImportError:
    print("none")
else:
    # a folder without __init__.py is a namespace: any real package of that name wins over it
    print(kernels.__file__ or "namespace")
"""
    assert python(code) in ("none", "namespace")
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("name = 'the Hugging Face package'\n")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.path.append({str(tmp_path)!r})  # after ours, as site-packages would be
import kernels
print(kernels.name)
"""
    assert python(code) == "the Hugging Face package"


def test_the_command_says_what_to_install() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['typer'] = None\n"
         "from fastalign.cli import main; main()"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 1
    assert "pip install 'fastalign[cli]'" in result.stderr
