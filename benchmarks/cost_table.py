"""What attention alignment costs: step time and peak memory beside logit distillation, on a CPU.

    python -m benchmarks.cost_table --visual 576 1152 2304
    python -m benchmarks.cost_table --visual 4608 8192 --rounds 1 --limit-gib 12
    python -m benchmarks.cost_table --table evidence/cost

A step is the teacher's forward, the student's forward and backward with LM + logit KD at the answer.
Methods, side by side in each round:

kd         nothing else; both models run SDPA
eager      the released CompoDistill objective the way its code gets attention: both models eager,
           ``output_attentions`` of all layers, the aligned layers' maps stacked, then heads and window
           averaged, sinks filtered, rows pooled
fastalign  the same objective (``compodistill_code``) and layers through ``AttentionAlignment``, SDPA
paper      the paper's other objective (``compodistill``: all rows, flat cosine) through it

Time is CPU seconds of one thread, median over rounds; peak is the most bytes of tensors alive at once
beyond what was there before the step (torch's own allocation records). The pair has the paper's
proportions: 5 and 3 layers (40 : 24), 5 and 4 heads (20 : 16), head size 64. A method whose attention
maps alone would exceed ``--limit-gib`` is not run and says so.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.llava import HEAD_SIZE, IMAGE, build_llava
from benchmarks.memory import peak_bytes
from fastalign.distill import logit_kd_loss
from fastalign.models import AttentionAlignment, match_layers

METHODS = ("kd", "eager", "fastalign", "paper")
VOCABULARY, PATCHES, TEXT, ANSWER = 512, 64, 256, 64
TEACHER, STUDENT = (5, 5), (3, 4)
"""(layers, heads)"""
COLUMNS = ("visual", "length", "method", "cpu_s", "peak_mib", "rounds", "torch", "note")


def build(seed: int, layers: int, heads: int, length: int) -> Any:
    """A random LLaVA whose images take 64 tokens each."""
    return build_llava(
        seed,
        length,
        layers=layers,
        heads=heads,
        intermediate=3 * heads * HEAD_SIZE,
        vocabulary=VOCABULARY,
        image_size=32,
        patches=PATCHES,
    )


def make_batch(visual: int) -> dict[str, Tensor]:
    """One sample: ``visual`` image tokens, then text, the end of which is the answer."""
    torch.manual_seed(0)
    ids = torch.randint(6, VOCABULARY, (1, visual + TEXT))
    ids[0, 1 : 1 + visual] = IMAGE
    labels = torch.full_like(ids, -100)
    labels[0, -ANSWER:] = ids[0, -ANSWER:]
    pixels = torch.randn(visual // PATCHES, 3, 32, 32)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def code_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The released objective on stacked head-mean maps [pairs, V, V] (teacher: its window's mean)."""
    keep = teacher != 0
    for maps in (student.detach(), teacher):
        flat = maps.flatten(1)
        bound = flat.mean(1) + flat.std(1)
        keep = keep & (maps <= bound[:, None, None])
    count = keep.sum(1).clamp(min=1)
    ours, theirs = ((maps * keep).sum(1) / count for maps in (student, teacher))
    loss: Tensor = (1 - torch.cosine_similarity(ours, theirs, dim=-1)).sum()
    return loss


class Steps:
    """One pair of models and a batch; ``steps[method]()`` runs a step."""

    def __init__(self, visual: int) -> None:
        length = visual + TEXT
        self.inputs = make_batch(visual)
        self.student = build(1, *STUDENT, length).train()
        self.teacher = build(2, *TEACHER, length).eval().requires_grad_(False)
        self.matching = match_layers(
            "compodistill_code", list(range(STUDENT[0])), list(range(TEACHER[0]))
        )
        self.alignments = {
            name: AttentionAlignment(self.student, self.teacher, spec=spec, layers=layers)
            for name, spec, layers in (
                ("fastalign", "compodistill_code", "compodistill_code"),
                ("paper", "compodistill", "compodistill"),
            )
        }

    def run(self, method: str) -> None:
        """The step; the student's gradients are there afterwards."""
        if method == "eager":
            self._eager()
            return
        alignment = self.alignments.get(method)
        if alignment is None:
            self._backward(*self._forwards())
            return
        with alignment.step(self.inputs):
            outputs = self._forwards()
        self._backward(*outputs, alignment.loss())

    def clean(self) -> None:
        """Nothing of an earlier step is left, so that its release is not counted as this one's."""
        self.student.zero_grad(set_to_none=True)
        for alignment in self.alignments.values():
            alignment._step = None

    def _forwards(self, **options: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            theirs = self.teacher(**self._seen(), use_cache=False, **options)
        return theirs, self.student(**self._seen(), use_cache=False, **options)

    def _seen(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.inputs.items() if name != "labels"}

    def _backward(self, theirs: Any, ours: Any, extra: Tensor | None = None) -> None:
        labels = self.inputs["labels"]
        at = labels[:, 1:] != -100
        lm = torch.nn.functional.cross_entropy(ours.logits[:, :-1][at], labels[:, 1:][at])
        loss = lm + logit_kd_loss(ours.logits, theirs.logits, labels)
        (loss if extra is None else loss + extra).backward()

    def _eager(self) -> None:
        for model in (self.student, self.teacher):
            model.set_attn_implementation("eager")
        try:
            theirs, ours = self._forwards(output_attentions=True)
            visual = (self.inputs["input_ids"][0] == IMAGE).nonzero().flatten()
            image = slice(int(visual[0]), int(visual[-1]) + 1)
            s = torch.stack([ours.attentions[i] for i in self.matching])
            t = torch.stack(
                [
                    torch.stack([theirs.attentions[j] for j in group])
                    for group in self.matching.values()
                ]
            )
            extra = code_loss(s.mean(2)[:, 0, image, image], t.mean(3).mean(1)[:, 0, image, image])
            self._backward(theirs, ours, extra)
        finally:
            for model in (self.student, self.teacher):
                model.set_attn_implementation("sdpa")


def eager_bytes(visual: int) -> int:
    """What the eager way holds at least: every map of both models, float32."""
    maps = sum(layers * heads for layers, heads in (TEACHER, STUDENT))
    return maps * (visual + TEXT) ** 2 * 4


def measure(visual: int, rounds: int, limit: float) -> list[dict[str, Any]]:
    """One line a method."""
    steps = Steps(visual)
    needed = eager_bytes(visual) / 2**30
    # Softmax keeps its output, the dropout copy and the scores' gradient: about three at the worst.
    methods = [m for m in METHODS if m != "eager" or 3 * needed <= limit]
    times: dict[str, list[float]] = {m: [] for m in methods}
    for number in range(rounds + 1):  # the first warms up
        for method in methods:
            steps.clean()
            start = time.process_time()
            steps.run(method)
            if number:
                times[method].append(time.process_time() - start)
    lines = []
    for method in METHODS:
        line: dict[str, Any] = {
            "visual": visual,
            "length": visual + TEXT,
            "method": method,
            "rounds": rounds,
            "torch": str(torch.__version__),
        }
        if method in methods:
            steps.clean()
            peak = peak_bytes(partial(steps.run, method))
            line |= {
                "cpu_s": f"{statistics.median(times[method]):.3f}",
                "peak_mib": f"{peak / 2**20:.0f}",
                "note": "",
            }
        else:
            line |= {
                "cpu_s": "",
                "peak_mib": "",
                "note": f"not run: maps of {needed:.1f} GiB, held up to three times",
            }
        lines.append(line)
    return lines


# ------------------------------------------------------------------------------ table


def table(lines: list[dict[str, str]]) -> str:
    """The markdown of what was measured, and the arithmetic for the paper's pair."""
    by_size: dict[int, dict[str, dict[str, str]]] = {}
    for line in lines:
        by_size.setdefault(int(line["visual"]), {})[line["method"]] = line
    out = [
        "# What alignment costs",
        "",
        "Made by `python -m benchmarks.cost_table --table evidence/cost` from `cost.csv`; do not edit.",
        "One CPU thread, float32, batch 1, tiny models of the paper's proportions (teacher 5 layers x 5",
        "heads, student 3 x 4, head size 64), "
        + f"{TEXT} text tokens, {ANSWER} of them the answer.",
        "Time is CPU seconds a step (median of the rounds, the system's seconds included), memory the peak",
        "of tensors beyond what was there before.",
        "`eager` and `fastalign` compute the released code's objective, `paper` the paper's.",
        "",
        _row("visual tokens", *(f"{m}, s" for m in METHODS), *(f"{m}, MiB" for m in METHODS)),
        _row(*["---:"] * (1 + 2 * len(METHODS))),
    ]
    notes = []
    for visual, methods in sorted(by_size.items()):
        cells = [_relative(methods, "cpu_s", m) for m in METHODS]
        cells += [_relative(methods, "peak_mib", m) for m in METHODS]
        out.append(_row(f"{visual:,}", *cells))
        rounds = {m["rounds"] for m in methods.values()}
        if rounds == {"1"}:
            notes.append(f"{visual:,}: one step of each method after one that warms up, no median.")
        notes += [f"{visual:,}, {m['method']}: {m['note']}." for m in methods.values() if m["note"]]
    out += [
        "",
        "In brackets: relative to kd.",
        *([""] if notes else []),
        *(f"* {n}" for n in notes),
        "",
        *arithmetic(),
    ]
    return "\n".join(out) + "\n"


def _relative(methods: dict[str, dict[str, str]], column: str, method: str) -> str:
    if method not in methods or not methods[method][column]:
        return "not run"
    value, base = float(methods[method][column]), float(methods["kd"][column])
    shown = f"{value:,.0f}" if column == "peak_mib" else f"{value:.2f}"
    return shown if method == "kd" else f"{shown} ({value / base:.2f})"


def arithmetic() -> list[str]:
    """The paper's pair, as arithmetic: nothing here was measured."""
    gib = 2**30
    student = 24 * 16 * 1536**2 * 2 * 2
    teacher = 40 * 20 * 1536**2 * 2 * 2
    stacked = (7 * 16 + 7 * 5 * 20) * 1536**2 * 2 * 2
    kept = 11 * 2 * 1536 * 2560 * 2 * 2
    gradients = 7 * 2 * 1536 * 2048 * 2 * 2
    large = (24 * 16 + 40 * 20) * 8448**2 * 2 * 2
    return [
        "## The paper's pair, by arithmetic (not measured)",
        "",
        "Qwen1.5-4B (40 layers x 20 heads) and Qwen1.5-1.8B (24 x 16), head size 128, batch 2, 1,536",
        "tokens, 2 bytes a number. The eager way holds layers x heads x tokens^2 x batch x bytes:",
        "",
        f"* student 24 x 16 x 1536^2 x 2 x 2 = {student / gib:.2f} GiB",
        f"* teacher 40 x 20 x 1536^2 x 2 x 2 = {teacher / gib:.2f} GiB",
        "* the stacked copy of 7 student layers and of 7 windows of 5 teacher layers, (7 x 16 + 7 x 5 x "
        f"20) x 1536^2 x 2 x 2 = {stacked / gib:.2f} GiB",
        f"* together {(student + teacher + stacked) / gib:.2f} GiB; the maps alone at 8,448 tokens: (24 x "
        f"16 + 40 x 20) x 8448^2 x 2 x 2 = {large / gib:.0f} GiB",
        "",
        "fastalign holds q and k of the teacher's 11 layers in windows, and the gradients of q and k of",
        "7 student layers, until the backward:",
        "",
        f"* teacher 11 x 2 x 1536 x 2560 x 2 x 2 = {kept / gib:.2f} GiB",
        f"* student 7 x 2 x 1536 x 2048 x 2 x 2 = {gradients / gib:.2f} GiB",
        "* and a workspace of at most 0.06 GiB; all of it grows with tokens, not with tokens^2",
        "",
        "(The teacher's layers in windows: 13 to 23 of 40, as windows of 5 begin at 13 to 19.) Time is not",
        "extrapolated: on another machine attention, matrix products and memory have other prices.",
    ]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--visual", type=int, nargs="*", default=[], help="multiples of 64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit-gib", type=float, default=8.0, help="of eager's memory")
    parser.add_argument("--csv", type=Path, default=Path("evidence/cost/cost.csv"))
    parser.add_argument("--table", type=Path, help="folder: write table.md from its cost.csv")
    arguments = parser.parse_args()
    if any(v < PATCHES or v % PATCHES for v in arguments.visual):
        parser.error(f"--visual is {arguments.visual}; allowed: multiples of {PATCHES}")
    torch.set_num_threads(1)
    for visual in arguments.visual:
        lines = measure(visual, arguments.rounds, arguments.limit_gib)
        new = not arguments.csv.exists()
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        with arguments.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            for line in lines:
                writer.writerow(line)
                print(",".join(str(line[c]) for c in COLUMNS), flush=True)
    if arguments.table:
        with (arguments.table / "cost.csv").open(newline="") as file:
            text = table(list(csv.DictReader(file)))
        (arguments.table / "table.md").write_text(text)
        print(f"wrote {arguments.table / 'table.md'}")


if __name__ == "__main__":
    main()
