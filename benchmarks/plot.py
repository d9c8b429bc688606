"""Speed and memory against visual tokens, from a CSV: `python -m benchmarks.plot [CSV ...]`.

One picture a machine, two panels, both axes logarithmic: milliseconds of one forward and backward, and peak
MiB of tensors and workspace beyond the inputs, over the sweep's shapes (equal but for the number of visual
tokens). A line that ends early belongs to a provider that did not fit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .providers import OURS
from .shapes import SHAPES, SWEEP
from .table import RESULTS, Row, read, result_files

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
#: How providers are called in pictures and tables.
NAMES = {
    "eager_full": "eager, whole matrix",
    "eager_rows": "eager, compared rows",
    "eager_rows_compiled": "torch.compile of it",
    "eager_rows_upcast": "eager rows in float32",
    "eager_rows_upcast_compiled": "torch.compile of it (float32)",
    "chunked_checkpoint": "row chunks + checkpoint",
    "sdpa_identity": "SDPA on the identity",
    "flex_identity": "FlexAttention on the identity",
    "flash_colreduce": "flash-colreduce",
    "tiled": "fastalign tiled",
    "cpu": "fastalign cpu",
    "triton": "fastalign triton",
}
_PANELS = (
    ("time_ms", "milliseconds, forward + backward"),
    ("peak_mib", "peak MiB beyond the inputs"),
)
#: Distinct in lightness too; ours are strong and solid, the others thin and dashed.
_OURS = {"cpu": "#c1121f", "tiled": "#e07a1f", "triton": "#6a0dad"}
_OTHERS = ("#14213d", "#2a6f97", "#468faf", "#89a894", "#6c757d", "#9a8c98", "#b5a36a", "#557a46")


def series(rows: list[Row], metric: str) -> dict[str, list[Row]]:
    """The sweep's points of each provider, by visual tokens."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.x):
        if row.shape in SWEEP and row.metric == metric and row.mode == "fwd+bwd":
            found.setdefault(row.provider, []).append(row)
    return found


def draw(rows: list[Row], path: Path) -> None:
    """Write the picture (png)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (metric, label) in zip(axes, _PANELS, strict=True):
        others = iter(_OTHERS)
        for provider, points in series(rows, metric).items():
            ours = provider in OURS
            x, y = [p.x for p in points], [max(p.p50, 1e-3) for p in points]
            colour = _OURS[provider] if ours else next(others)
            axis.plot(
                x, y, "-o" if ours else "--o", color=colour, label=NAMES[provider],
                linewidth=2.4 if ours else 1.2, markersize=5 if ours else 3.5, zorder=3 if ours else 2,
            )  # fmt: skip
            if metric == "time_ms":
                axis.fill_between(
                    x, [p.p20 for p in points], [p.p80 for p in points], color=colour, alpha=0.15
                )
        axis.set(xscale="log", yscale="log", xlabel="visual tokens", ylabel=label)
        ticks = sorted({SHAPES[name].visual for name in SWEEP})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    shape = SHAPES[SWEEP[0]]
    figure.suptitle(
        f"{len(shape.positions())} text rows, heads {shape.heads[0]}/{shape.heads[1]}, key heads "
        f"{shape.key_heads[0]}/{shape.key_heads[1]}, d {shape.size}, {str(shape.dtype)[6:]}; "
        f"{rows[0].device}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def picture_of(results: Path) -> Path:
    """Where the picture of a file of results goes."""
    return IMAGES / f"alignment-{results.stem}.png"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("results", nargs="*", type=Path, help="default: benchmarks/results/*.csv")
    parser.add_argument("--out", type=Path, help="a file; with one CSV only")
    options = parser.parse_args()
    files = options.results or result_files()
    if not files:
        parser.error(f"no results: none given, none in {RESULTS}")
    if options.out and len(files) > 1:
        parser.error("--out takes one CSV")
    for file in files:
        rows = read(file)
        if not series(rows, "time_ms"):
            print(f"{file}: no shapes of the sweep ({', '.join(SWEEP)}), no picture")
            continue
        path = options.out or picture_of(file)
        draw(rows, path)
        print(path)


if __name__ == "__main__":
    main()
