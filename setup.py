"""Where the packages lie, and how the C++ kernels are compiled; everything else is in pyproject.toml.

``kernels/`` has no ``__init__.py`` and is installed as ``fastalign.kernels``: with one, and the
repository's root on ``sys.path``, it would shadow the Hugging Face package ``kernels``.

The C++ kernels need a compiler and nothing else (``fastalign/_build.py``). Without a compiler the
install says so and goes on; a compiler that fails stops it.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent


def load_build_module():
    """``fastalign/_build.py`` alone: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("_build", HERE / "fastalign" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["_build"] = module
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Compiles csrc/ to ``fastalign/_cpu.so``: for this machine in an editable install, else portable."""

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"

    def build_extension(self, ext):
        build = load_build_module()
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            build.compiler()
        except build.NoCompiler as error:
            print(f"fastalign: {error}", file=sys.stderr, flush=True)
            return
        build.build(target, portable=not (self.inplace or getattr(self, "editable_mode", False)))


setup(
    packages=[
        *find_packages(include=["fastalign", "fastalign.*"]),
        "fastalign.kernels",
        "fastalign.csrc",  # so that an install without a compiler can build on first use
    ],
    package_dir={"fastalign.kernels": "kernels", "fastalign.csrc": "csrc"},
    package_data={"fastalign": ["py.typed"], "fastalign.csrc": ["*.h", "*.cpp"]},
    exclude_package_data={"fastalign.csrc": ["selfcheck.cpp"]},
    ext_modules=[Extension("fastalign._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels},
)
