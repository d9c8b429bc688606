"""Peak memory and time of a training step with and without attention alignment, on a CPU.

``python -m benchmarks.alignment_step --tokens 8192 --rows none response all`` builds tiny-vocabulary
LLaVA models over a Llama decoder of 4 layers, 16 heads of 64, aligns every layer, and prints one line of
CSV for each setting. The step is the teacher's forward, the student's forward and backward; *none* is
the same step without alignment. Peak memory is the most bytes of tensors alive at once (torch's own
allocation records), beyond what was there before the step. Time is the median of CPU seconds of all
threads, which a machine shared with others distorts least. *eager* is arithmetic: what the eager way
adds at least, float32 weights of both models at every layer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastalign.models import AttentionAlignment

IMAGE, VOCABULARY, PATCHES = 5, 64, 256
LAYERS, HEADS, HEAD_SIZE = 4, 16, 64


def build(seed: int, tokens: int) -> Any:
    """A random LLaVA whose images take 256 tokens each."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_SIZE,
        intermediate_size=2816,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=tokens,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def batch(tokens: int, response: int) -> dict[str, Tensor]:
    """One sample: 15/16 of it visual, the last ``response`` tokens labelled."""
    images = tokens * 15 // 16 // PATCHES
    ids = torch.randint(6, VOCABULARY, (1, tokens))
    ids[0, 8 : 8 + images * PATCHES] = IMAGE
    labels = torch.full_like(ids, -100)
    labels[0, -response:] = ids[0, -response:]
    pixels = torch.randn(images, 3, 64, 64)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "use_cache": False}  # type: ignore[dict-item]


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that ``run`` had allocated at once, beyond what was there before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    records = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return int(max(accumulate((e.nbytes() for e in records), initial=0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--rows", nargs="+", default=["none", "response", "all:256", "all"])
    parser.add_argument("--repeat", type=int, default=0, help="timed steps; 0: memory only")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    arguments = parser.parse_args()
    student, teacher = build(1, arguments.tokens).train(), build(2, arguments.tokens).eval()
    inputs = batch(arguments.tokens, arguments.response)
    alignments = {
        rows: None
        if rows == "none"
        else AttentionAlignment(student, teacher, "compodistill", "all", rows)
        for rows in arguments.rows
    }

    def step(alignment: AttentionAlignment | None) -> None:
        student.zero_grad()
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

    eager = 2 * LAYERS * HEADS * arguments.tokens**2 * 4
    print("tokens,rows,peak_mib,relative_to_none,cpu_s,relative_to_none,eager_weights_mib")
    first: tuple[float, float] | None = None
    times: dict[str, list[float]] = {rows: [] for rows in alignments}
    for _ in range(arguments.repeat):  # in turn, so that a busy machine is as busy for each
        for rows, alignment in alignments.items():
            start = time.process_time()
            step(alignment)
            times[rows].append(time.process_time() - start)
    for rows, alignment in alignments.items():
        peak = float("nan")
        if not arguments.no_memory:
            peak = peak_bytes(partial(step, alignment)) / 2**20
        median = statistics.median(times[rows]) if times[rows] else float("nan")
        first = first or (peak, median)
        print(
            f"{arguments.tokens},{rows},{peak:.0f},{peak / first[0]:.3f},{median:.2f},"
            f"{median / first[1]:.3f},{eager / 2**20:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
