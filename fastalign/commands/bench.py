"""``fastalign bench``: speed and memory beside what people use today, correctness first."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


def bench(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="A named shape; repeat for several. Default: those with required factors."
        ),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="One provider; repeat for several. Default: all that fit."),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="'fwd+bwd' or 'pooled fwd'; repeat for both. Default: fwd+bwd."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved runs of each provider.")] = 9,
    seconds: Annotated[
        float, typer.Option(help="What one provider may take; a slow one gets fewer rounds.")
    ] = 20,
    limit_gib: Annotated[float, typer.Option(help="Leave out what needs more memory.")] = 6,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rss: Annotated[
        bool, typer.Option(help="Take the resident set too (a process for each figure).")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write every row to this CSV.")] = None,
    rehearse: Annotated[
        bool,
        typer.Option(
            help="Without a GPU: run what a GPU run would measure on small shapes, untimed; needs "
            "TRITON_INTERPRET=1 in the environment."
        ),
    ] = False,
    listed: Annotated[
        bool, typer.Option("--list", help="List shapes and providers, measure nothing.")
    ] = False,
) -> None:
    """Time the alignment loss, forward and backward, beside eager, torch.compile and others.

    Every provider's loss and gradients are checked first; one that is wrong gets no figure and the exit
    code is 1. Needs the repository: the suite (benchmarks/) is no part of the installed package.
    """
    suite, shapes, modes = (_suite(name) for name in ("alignment", "shapes", "modes"))
    if listed:
        Console().print(_names(shapes, modes))
        return
    kinds = tuple(mode or ("fwd+bwd",))
    _check("--mode", kinds, list(modes.MODES))
    _check("--shape", shape or (), list(shapes.SHAPES))
    known = {name for kind in kinds for name in modes.MODES[kind].providers}
    _check("--provider", provider or (), sorted(known))
    _check("--device", (device,), ["cpu", "cuda"])
    if rehearse:
        _rehearse(tuple(provider or ()), kinds)
        return
    if lack := _suite("clock").missing(device):
        typer.echo(f"--device is {device!r}; {lack} (--rehearse needs none)", err=True)
        raise typer.Exit(2)
    options = suite.Options(
        shapes=tuple(shape or shapes.REQUIRED),
        providers=tuple(provider or ()),
        modes=kinds,
        rounds=rounds,
        seconds=seconds,
        limit_gib=limit_gib,
        device=device,
        resident=rss,
    )
    outcome = suite.run(options, lambda line: typer.echo(line, err=True))
    if out is not None:
        _suite("table").write(out, outcome.rows)
    Console().print(*_results(outcome.rows), sep="\n")
    for name, who, why in outcome.red:
        typer.echo(f"RED: {name} {who}: {why}; no figure", err=True)
    if outcome.red:
        raise typer.Exit(1)


def _rehearse(providers: tuple[str, ...], kinds: tuple[str, ...]) -> None:
    """Print a line for each provider; exit code 1 if one is wrong."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        typer.echo(
            f"--rehearse with TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')!r}; it must be 1, so "
            "that the Triton kernels run in the interpreter",
            err=True,
        )
        raise typer.Exit(2)
    verdicts = _suite("rehearsal").rehearse(
        providers, kinds, lambda line: typer.echo(line, err=True)
    )
    table = Table(pad_edge=False, caption="correctness on a CPU; nothing was timed")
    for name in ("shape", "mode", "provider", "outcome"):
        table.add_column(name)
    for v in verdicts:
        outcome = (
            f"RED: {v.wrong}" if v.wrong else f"left out: {v.left_out}" if v.left_out else "right"
        )
        table.add_row(v.shape, v.mode, v.provider, outcome)
    Console().print(table)
    if any(v.wrong for v in verdicts):
        raise typer.Exit(1)


def _suite(name: str) -> Any:
    """A module of the suite, which lies beside the package in a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "alignment.py").exists():
        typer.echo(
            "the benchmarks are not there: they are part of the repository, not of the installed package; "
            "clone it, pip install -e . there, and run fastalign bench again",
            err=True,
        )
        raise typer.Exit(1)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(f"benchmarks.{name}")


def _check(option: str, given: Any, allowed: list[str]) -> None:
    for value in given:
        if value not in allowed:
            typer.echo(f"{option} is {value!r}; allowed: {', '.join(allowed)}", err=True)
            raise typer.Exit(2)


def _names(shapes: Any, modes: Any) -> Table:
    table = Table(title="Shapes", pad_edge=False)
    table.add_column("name", no_wrap=True, style="bold")
    table.add_column("what it is")
    for name, shape in shapes.SHAPES.items():
        table.add_row(name, shape.describe())
    table.caption = "\n".join(
        f"{name}: {', '.join(kind.providers)}" for name, kind in modes.MODES.items()
    )
    return table


def _results(rows: list[Any]) -> Iterator[Table | Text]:
    """A table for each shape and mode, narrow enough for 80 columns; below it, who was left out and why."""
    by: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row.shape != "machine":
            metric = "factor" if row.metric.startswith("factor_over_") else row.metric
            by.setdefault((row.shape, row.mode), {}).setdefault(row.provider, {})[metric] = row
    for (shape, mode), providers in by.items():
        table = Table(title=f"{shape}, {mode}", title_justify="left", pad_edge=False, min_width=78)
        table.add_column("provider", no_wrap=True)
        for name in ("ms", "p20-p80", "factor", "roofline", "peak MiB"):
            table.add_column(name, justify="right", no_wrap=True)
        left_out = []
        for name, found in providers.items():
            if "left_out" in found:
                left_out.append(f"{name}: {found['left_out'].note}")
                continue
            time, factor = found["time_ms"], found.get("factor")
            table.add_row(
                name,
                f"{time.p50:.2f}",
                f"{time.p20:.2f}-{time.p80:.2f}",
                f"{factor.p50:.2f}" if factor else "-",
                f"{found['roofline'].p50:.0%}",
                f"{found['peak_mib'].p50:.1f}",
            )
        yield table
        yield Text("".join(f"left out: {line}\n" for line in left_out), style="dim")
    yield Text("factor: the fastest peer's time over this one's, paired within rounds")
