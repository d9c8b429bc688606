"""A step's peak of tensor bytes with alignment over that without, as benchmarks/alignment_step has them."""

from __future__ import annotations

from functools import partial

from benchmarks import alignment_step
from benchmarks.memory import peak_bytes
from fastalign.models import AttentionAlignment


def test_alignment_of_every_layer_costs_little_memory() -> None:
    """The ratios of 8,192 tokens (docs/capture.md), here of 768: they hardly depend on the length."""
    tokens = 768
    student, teacher = (alignment_step.build(seed, tokens) for seed in (1, 2))
    run = partial(alignment_step.step, student.train(), teacher.eval())
    alignment = AttentionAlignment(student, teacher, "compodistill", "all", "all")
    run(alignment_step.batch(256 + 128, 64), alignment)  # what is made once is not counted
    alignment.release()
    inputs = alignment_step.batch(tokens, 256)
    student.zero_grad()
    plain = peak_bytes(partial(run, inputs, None))
    student.zero_grad()
    peak = peak_bytes(partial(run, inputs, alignment))
    weights = 2 * alignment_step.LAYERS * alignment_step.HEADS * tokens**2 * 4
    assert peak < 1.15 * plain
    assert peak - plain < 0.15 * weights  # what the eager way would add at least
