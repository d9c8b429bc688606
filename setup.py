"""Where the packages lie; everything else is in pyproject.toml.

``kernels/`` has no ``__init__.py`` and is installed as ``fastalign.kernels``: with one, and the
repository's root on ``sys.path``, it would shadow the Hugging Face package ``kernels``.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastalign", "fastalign.*"]), "fastalign.kernels"],
    package_dir={"fastalign.kernels": "kernels"},
    package_data={"fastalign": ["py.typed"]},
)
