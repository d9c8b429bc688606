"""Compiles every kernel for every architecture and reports what the machine code says.

    python -m benchmarks.static_report [--json FILE] [--targets sm_90 ...] [--head-dims 128 ...]

No GPU is needed. Each kernel is compiled with the table's configuration, specialised as a real call
would specialise it. The gates: it compiles, within the launch limits, without stack or spills, with the
architecture's tensor-core instruction and without atomics; and the static bound of the head-mean kernels
at head_dim 128 in bf16 stays near its floor (docs/triton.md). The exit status is 1 if a gate is not met.

The whole matrix takes an hour and more; it may be run in pieces, target by target, and judged whole:

    python -m benchmarks.static_report --targets sm_90 --json sm_90.json
    python -m benchmarks.static_report --from sm_80.json sm_90.json --json all.json

Triton keeps what it compiled (TRITON_CACHE_DIR), so that a repetition takes seconds a cell.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields

import torch
import triton

# said explicitly in every launch; the variable only silences the compiler's notice about its default
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from benchmarks.static.report import (
    DTYPES,
    HEAD_DIMS,
    TARGETS,
    Row,
    failures,
    has_tf32,
    launches,
    row_of,
    sums,
)


def one_cell(cell: tuple[str, int, str], variants: bool, kernels: list[str]) -> list[Row]:
    """The rows of one (target, head_dim, dtype); kernels: only these, or all if there is none."""
    target, head_dim, dtype = cell
    return [
        row_of(objective, launch, TARGETS[target], head_dim, dtype)
        for objective, launch in launches(target, head_dim, dtype, variants)
        if not kernels or launch.name in kernels
    ]


def rows_of(path: str) -> list[Row]:
    """The rows of an earlier run's JSON."""
    with open(path, encoding="utf-8") as file:
        rows = json.load(file)["rows"]
    return [Row(**{**row, "problems": tuple(row["problems"])}) for row in rows]


def write(path: str, rows: list[Row]) -> None:
    """Rows, sums and versions as JSON, a line each."""
    report = {
        "versions": {"triton": triton.__version__, "torch": torch.__version__},
        "sums": [asdict(total) for total in sums(rows)],
        "rows": [row.to_dict() for row in rows],
    }
    parts = []
    for name, value in report.items():
        if isinstance(value, list):
            lines = ",\n".join(json.dumps(item) for item in value)
            parts.append(f'"{name}": [\n{lines}\n]')
        else:
            parts.append(f'"{name}": {json.dumps(value)}')
    with open(path, "w", encoding="utf-8") as file:
        file.write("{\n" + ",\n".join(parts) + "\n}\n")


def write_csv(path: str, rows: list[Row]) -> None:
    """The rows alone, a third of their JSON; problems joined by semicolons."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row.to_dict(), "problems": "; ".join(row.problems)} for row in rows)


def line(row: Row) -> str:
    """One row for people."""
    bound = ""
    if row.clocks_per_element is not None:
        bound = (
            f"{row.clocks_per_element:8.4f} {row.inner:8.4f} {row.floor:8.4f} {row.ratio:6.2f} "
            f"{row.limiter:8s}"
        )
    flag = "" if not row.problems else "  <- " + "; ".join(row.problems)
    return (
        f"{row.kernel:16s} {row.target:7s} {row.dtype} {row.head_dim:4d} {row.config:25s} "
        f"{row.registers:4d} {row.stack_bytes:5d} {row.smem_bytes // 1024:4d}/{row.smem_limit // 1024:<4d}"
        f"{row.tensor_core_ops:5d} {row.ex2:4d} {row.atomics:2d} {bound}{flag}"
    )


HEADER = (
    f"{'kernel':16s} {'target':7s} type head {'config':25s} {'regs':>4s} {'stack':>5s} {'smem KB':9s}"
    f"{'mma':>5s} {'ex2':>4s} {'at':>2s} {'clk/el':>8s} {'inner':>8s} {'floor':>8s} {'ratio':>6s} limiter"
)


def main(arguments: list[str] | None = None) -> int:
    """Run the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write rows, sums and versions as JSON")
    parser.add_argument("--csv", metavar="FILE", help="write the rows as CSV")
    parser.add_argument(
        "--from",
        dest="pieces",
        nargs="+",
        default=[],
        metavar="FILE",
        help="take the rows of earlier runs; nothing is compiled unless --targets says what",
    )
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), help="default: all")
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=list(DTYPES))
    parser.add_argument("--kernels", nargs="+", default=[], metavar="NAME", help="default: all")
    parser.add_argument(
        "--variants", action="store_true", help="compile other objectives' branches, too"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)"
    )
    options = parser.parse_args(arguments)
    targets = options.targets or ([] if options.pieces else list(TARGETS))
    cells = [
        (target, head_dim, dtype)
        for target in targets
        for head_dim in options.head_dims
        for dtype in options.dtypes
        if dtype != "tf32" or has_tf32(target)
    ]
    print(HEADER, flush=True)
    rows = [row for piece in options.pieces for row in rows_of(piece)]
    # spawned: a forked process stands still at its first tensor, because torch's threads are not with it
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        what = (options.variants, options.kernels)
        for done in as_completed([pool.submit(one_cell, cell, *what) for cell in cells]):
            for row in done.result():
                rows.append(row)
                print(line(row), flush=True)
            if options.json:  # after every cell: a run that is cut off leaves what it has
                write(options.json, rows)
    if options.json:
        write(options.json, rows)
    if options.csv:
        write_csv(options.csv, rows)
    for total in sums(rows):
        print(
            f"{total.target:7s} {total.name:34s} {total.clocks} clocks, floor {total.floor}, "
            f"ratio {total.ratio}, limit {total.most}"
        )
    missed = failures(rows)
    for message in missed:
        print("GATE", message)
    print(f"{len(rows)} kernels compiled, {len(missed)} gates not met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
