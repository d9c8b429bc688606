"""Tests of the Triton kernels; ``fastalign.kernels`` is made importable first."""

from fastalign import _kernels

_kernels.locate()
