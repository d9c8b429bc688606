"""What can be said about compiled kernels without a GPU: resources, gates, and a bound from the code."""

from fastalign import _kernels

_kernels.locate()
