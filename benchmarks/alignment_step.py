"""Peak memory and time of a training step with and without attention alignment, on a CPU.

``python -m benchmarks.alignment_step --tokens 8192 --rows none response all`` builds tiny-vocabulary
LLaVA models over a Llama decoder of 4 layers, 16 heads of 64, aligns every layer, and prints one line of
CSV for each setting. The step is the teacher's forward, the student's forward and backward; *none* is
the same step without alignment. Peak memory is the most bytes of tensors alive at once (torch's own
allocation records), beyond what was there before the step; *workspace* is the most that the C++ kernels
held of their own, at whatever time. Time is the median of CPU seconds of all threads, which a machine
shared with others distorts least, and its ratio the median over rounds, in each of which every setting
runs once. Ratios are to the first setting of ``--rows``. *eager_weights* is arithmetic: what the eager way
adds at least, float32 weights of both models at every layer.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from benchmarks.llava import IMAGE, build_llava
from benchmarks.memory import step_parts
from fastalign.models import AttentionAlignment

VOCABULARY, PATCHES = 64, 256
LAYERS, HEADS = 4, 16


def build(seed: int, tokens: int) -> Any:
    """A random LLaVA whose images take 256 tokens each."""
    return build_llava(
        seed,
        tokens,
        layers=LAYERS,
        heads=HEADS,
        intermediate=2816,
        vocabulary=VOCABULARY,
        image_size=64,
        patches=PATCHES,
    )


def batch(tokens: int, response: int) -> dict[str, Tensor]:
    """One sample: 15/16 of it visual, the last ``response`` tokens labelled."""
    images = tokens * 15 // 16 // PATCHES
    ids = torch.randint(6, VOCABULARY, (1, tokens))
    ids[0, 8 : 8 + images * PATCHES] = IMAGE
    labels = torch.full_like(ids, -100)
    labels[0, -response:] = ids[0, -response:]
    pixels = torch.randn(images, 3, 64, 64)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "use_cache": False}  # type: ignore[dict-item]


def step(
    student: Any, teacher: Any, inputs: dict[str, Tensor], alignment: AttentionAlignment | None
) -> None:
    """The teacher's forward, the student's forward and backward, with alignment or without."""
    if alignment is None:
        with torch.no_grad():
            teacher(**inputs)
        student(**inputs).loss.backward()
        return
    with alignment.step(inputs):
        with torch.no_grad():
            teacher(**inputs)
        out = student(**inputs)
    (out.loss + alignment.loss()).backward()


COLUMNS = (
    *("tokens", "rows", "peak_mib", "peak_ratio", "workspace_mib", "cpu_s", "time_ratio", "steps"),
    *("eager_weights_mib", "threads", "device", "version"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--response", type=int, default=256, help="labelled tokens")
    parser.add_argument("--rows", nargs="+", default=["none", "response", "all:256", "all"])
    parser.add_argument("--repeat", type=int, default=0, help="timed steps; 0: memory only")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--csv", type=Path, help="append the lines to this file")
    arguments = parser.parse_args()
    student, teacher = build(1, arguments.tokens).train(), build(2, arguments.tokens).eval()
    inputs = batch(arguments.tokens, arguments.response)
    alignments = {
        rows: None
        if rows == "none"
        else AttentionAlignment(student, teacher, "compodistill", "all", rows)
        for rows in arguments.rows
    }

    def clean() -> None:
        """Nothing of an earlier step is left, so that its release does not count as this one's."""
        student.zero_grad()
        for alignment in alignments.values():
            if alignment is not None:
                alignment.release()

    run = partial(step, student, teacher)
    for alignment in alignments.values():
        run(batch(2 * PATCHES, PATCHES // 2), alignment)  # imports, kernels, thread pools
    times: dict[str, list[float]] = {rows: [] for rows in alignments}
    for _ in range(arguments.repeat):  # in turn, so that a busy machine is as busy for each
        for rows, alignment in alignments.items():
            clean()
            start = time.process_time()
            run(inputs, alignment)
            times[rows].append(time.process_time() - start)
            print(f"{rows}: {times[rows][-1]:.1f} s", file=sys.stderr, flush=True)
    peaks, spaces = (dict.fromkeys(alignments, math.nan) for _ in range(2))
    for rows, alignment in alignments.items():
        if not arguments.no_memory:
            clean()
            tensors, workspace = step_parts(partial(run, inputs, alignment))
            peaks[rows], spaces[rows] = tensors / 2**20, workspace / 2**20
    first, lines = next(iter(alignments)), []
    for rows in alignments:
        pairs = [t / base for t, base in zip(times[rows], times[first], strict=True)]
        lines.append(
            (
                arguments.tokens,
                rows,
                f"{peaks[rows]:.0f}",
                f"{peaks[rows] / peaks[first]:.3f}",
                f"{spaces[rows]:.0f}",
                f"{statistics.median(times[rows]) if pairs else math.nan:.2f}",
                f"{statistics.median(pairs) if pairs else math.nan:.3f}",
                len(pairs),
                2 * LAYERS * HEADS * arguments.tokens**2 * 4 // 2**20,
                torch.get_num_threads(),
                machine(),
                f"torch {torch.__version__}, transformers {transformers_version()}",
            )
        )
    write(sys.stdout, lines, header=True)
    if arguments.csv is not None:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        header = not arguments.csv.exists()
        with arguments.csv.open("a", newline="") as file:
            write(file, lines, header)


def write(file: TextIO, lines: Sequence[Sequence[object]], header: bool) -> None:
    """The lines as CSV."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([COLUMNS, *lines] if header else lines)


def transformers_version() -> str:
    """Of the installed package."""
    return metadata.version("transformers")


def machine() -> str:
    """The processor, its family (what the name of a rented one hides) and the number of cores."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family)\s*: (.*)$", info, re.MULTILINE))
    return (
        f"{found.get('model name', platform.machine())} family {found.get('cpu family', '?')}, "
        f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    )


if __name__ == "__main__":
    main()
