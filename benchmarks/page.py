"""Writes the tables of docs/benchmarks.md from the results: `python -m benchmarks.page [--check]`.

What stands between the page's two markers is replaced; nothing there is typed by hand. ``--check`` writes
nothing and exits with 1 if the page is not what the results say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from .modes import MODES
from .plot import NAMES, picture_of
from .providers import OURS
from .shapes import REQUIRED, SHAPES, SWEEP
from .table import Row, read, result_files

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results: begin (python -m benchmarks.page) -->", "<!-- results: end -->"


class Results:
    """The rows of one file, by what they are about."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self._by = {(row.shape, row.mode, row.provider, row.metric): row for row in self.rows}

    def get(self, shape: str, mode: str, provider: str, metric: str) -> Row | None:
        """One row, or None."""
        return self._by.get((shape, mode, provider, metric))

    def shapes(self, mode: str) -> list[str]:
        """In the order of ``SHAPES``."""
        seen = {row.shape for row in self.rows if row.mode == mode}
        return [name for name in SHAPES if name in seen]

    def providers(self, mode: str, shapes: list[str]) -> list[str]:
        """Those with a figure."""
        timed = {
            row.provider
            for row in self.rows
            if row.mode == mode and row.metric == "time_ms" and row.shape in shapes
        }
        return [name for name in MODES[mode].providers if name in timed]

    def factor(self, shape: str, mode: str, provider: str) -> Row | None:
        """Over the fastest peer."""
        for row in self.rows:
            of = (row.shape, row.mode, row.provider) == (shape, mode, provider)
            if of and row.metric.startswith("factor_over_"):
                return row
        return None


def render(files: list[Path]) -> str:
    """Everything between the markers."""
    if not files:
        return "No results are committed yet."
    return "\n\n".join(_machine(file) for file in files)


def _machine(file: Path) -> str:
    results = Results(read(file))
    first = results.rows[0]
    parts = [
        f"## {first.device}",
        f"{first.version}; `benchmarks/results/{file.name}`. {_ceilings(results)}",
    ]
    if picture_of(file).exists():
        parts.append(f"![Time and memory against visual tokens](images/{picture_of(file).name})")
    for mode in MODES:
        if not results.shapes(mode):
            continue
        parts += [f"### {_TITLES[mode]}", "Milliseconds, median [p20, p80].", _times(results, mode)]
        if mode == "fwd+bwd":
            parts += [
                "Against the fastest peer, the machine's roofline, and what is held:",
                _ours(results),
            ]
            parts += ["Peak MiB of tensors and workspace (resident set):", _memory(results, mode)]
        if reasons := _left_out(results, mode):
            parts.append("Left out: " + "; ".join(reasons) + ".")
    return "\n\n".join(parts)


_TITLES = {
    "fwd+bwd": "Loss and gradients: joint softmax, head mean, cosine",
    "pooled fwd": "Forward of pooled maps",
}


def _ceilings(results: Results) -> str:
    def rate(metric: str) -> str:
        row = results.get("machine", "", "machine", metric)
        return "?" if row is None else f"{row.p50:,.0f}" if row.p50 >= 10 else f"{row.p50:.2g}"

    return (
        f"Measured ceilings: matrix products {rate('gemm_float32_gflops')} GFLOP/s in float32, "
        f"{rate('gemm_bfloat16_gflops')} in bfloat16; {rate('exp_g_per_s')} billion exponentials a second; "
        f"copy {rate('copy_gb_per_s')} GB/s."
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def _times(results: Results, mode: str) -> str:
    shapes = results.shapes(mode)
    providers = results.providers(mode, shapes)

    def cell(shape: str, provider: str) -> str:
        row = results.get(shape, mode, provider, "time_ms")
        if row is None:
            return "–"
        return f"{_number(row.p50)} [{_number(row.p20)}, {_number(row.p80)}]"

    head = ["shape", *(NAMES[p] for p in providers)]
    return _table(head, [[s, *(cell(s, p) for p in providers)] for s in shapes])


def _ours(results: Results) -> str:
    """The best of ours on each shape beside the best peer."""
    lines = []
    for shape in results.shapes("fwd+bwd"):
        timed = [p for p in OURS if results.get(shape, "fwd+bwd", p, "time_ms")]
        if not timed:
            continue
        best = min(timed, key=lambda p: results.get(shape, "fwd+bwd", p, "time_ms").p50)  # type: ignore[union-attr]
        factor = results.factor(shape, "fwd+bwd", best)
        roofline = results.get(shape, "fwd+bwd", best, "roofline")
        in_turn = results.get(shape, "fwd+bwd", best, "in_turn")
        assert roofline is not None
        lines.append([
            shape,
            best,
            "–" if factor is None else f"{factor.p50:.2f} [{factor.p20:.2f}, {factor.p80:.2f}]",
            "–" if factor is None else NAMES[factor.metric.removeprefix("factor_over_")],
            f"{REQUIRED[shape]}" if shape in REQUIRED else "",
            f"{roofline.p50:.0%}",
            "–" if in_turn is None else f"{in_turn.p50:.0%}",
            _number(SHAPES[shape].input_bytes() / 2**20),
        ])  # fmt: skip
    head = [
        "shape",
        "ours",
        "factor",
        "over",
        "required",
        "of the roofline",
        "in turn",
        "inputs, MiB",
    ]
    return _table(head, lines)


def _memory(results: Results, mode: str) -> str:
    shapes = results.shapes(mode)
    providers = results.providers(mode, shapes)

    def cell(shape: str, provider: str) -> str:
        peak = results.get(shape, mode, provider, "peak_mib")
        resident = results.get(shape, mode, provider, "rss_mib")
        if peak is None:
            return "–"
        return _number(peak.p50) + (f" ({_number(resident.p50)})" if resident else "")

    head = ["shape", *(NAMES[p] for p in providers)]
    return _table(head, [[s, *(cell(s, p) for p in providers)] for s in shapes])


def _left_out(results: Results, mode: str) -> list[str]:
    by: dict[tuple[str, str], list[str]] = {}
    for row in results.rows:
        if row.mode == mode and row.metric == "left_out":
            by.setdefault((row.provider, row.note), []).append(row.shape)
    everywhere = len(results.shapes(mode))
    return [
        f"{NAMES[provider]}"
        + (f" on {', '.join(shapes)}" if len(shapes) < everywhere else "")
        + f" ({note})"
        for (provider, note), shapes in by.items()
    ]


def shape_list() -> str:
    """The named shapes in words."""
    named = [f"* `{name}`: {SHAPES[name].describe()}" for name in SHAPES if name not in SWEEP]
    first, last = SHAPES[SWEEP[0]], SHAPES[SWEEP[-1]]
    swept = (
        f"* `sweep-N`, N from {first.visual} to {last.visual:,}; the smallest: {first.describe()}"
    )
    return "\n".join([*named, swept])


def page(text: str, files: list[Path]) -> str:
    """The page with fresh tables.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has lost a marker: {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{shape_list()}\n\n{render(files)}\n\n{END}{after}"


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would change")
    options = parser.parse_args()
    old = PAGE.read_text()
    new = page(old, result_files())
    if options.check:
        if old != new:
            print(
                f"{PAGE} is not what the results say: run python -m benchmarks.page",
                file=sys.stderr,
            )
        return int(old != new)
    PAGE.write_text(new)
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
