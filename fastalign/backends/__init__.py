"""Backends: each takes a ``Problem`` and returns the loss or its gradients. They never import each other.

A backend is a module with ``forward(problem) -> Forward``, ``backward(problem, saved, grad) ->
Gradients`` (``contract.py``) and ``unsupported(problem)``, the reason why it cannot do a problem or
None; ``fastalign.registry`` knows their names.
"""
