"""Makes ``fastalign.kernels`` importable from a checkout.

The kernels lie in ``kernels/`` at the root of the repository, without an ``__init__.py`` (it would
shadow the Hugging Face package of that name), and are installed as ``fastalign.kernels``. An editable
install cannot express a package without ``__init__.py`` inside one that has it, so there the directory
is looked for beside the package.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

NAME = "fastalign.kernels"


def locate() -> None:
    """Register ``fastalign.kernels`` unless it is installed as such."""
    if NAME in sys.modules or importlib.util.find_spec(NAME) is not None:
        return
    directory = Path(__file__).resolve().parents[1] / "kernels"
    if not (directory / "launch.py").exists():
        return
    spec = ModuleSpec(NAME, None, is_package=True)
    spec.submodule_search_locations = [str(directory)]
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    sys.modules["fastalign"].__dict__["kernels"] = module
