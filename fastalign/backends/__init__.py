"""Backends: each takes a ``Problem`` and returns the loss or its gradients. They never import each other.

A backend is a module with ``forward(problem) -> Forward`` and
``backward(problem, saved, grad) -> Gradients`` (``contract.py``).
"""
