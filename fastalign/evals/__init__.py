"""Evaluations: benchmarks from local files, and the shapes world (``fastalign.evals.shapes``)."""
