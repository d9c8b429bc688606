"""One module a benchmark: reading its files, asking, scoring. ``fastalign.evals.registry`` lists them."""
