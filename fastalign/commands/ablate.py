"""``fastalign ablate``: run a study, or read what it has found so far."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def ablate(
    study: Annotated[Path, typer.Argument(help="A YAML file: task, settings, conditions, seeds.")],
    minutes: Annotated[
        float | None,
        typer.Option(help="Stop at the first checkpoint after this time; run again to go on."),
    ] = None,
    conditions: Annotated[
        str | None, typer.Option(help="Only these, separated by commas. Default: all.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Only these, separated by commas. Default: all.")
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Run nothing: write the table of what is finished.")
    ] = False,
    repeat: Annotated[
        str | None,
        typer.Option(
            metavar="CONDITION-SEED",
            help="Make a finished run again from its record; exit code 1 if one bit differs.",
        ),
    ] = None,
    checkpoints: Annotated[
        Path, typer.Option(help="Where unfinished runs keep what they need to go on.")
    ] = Path("out/ablation"),
    threads: Annotated[int, typer.Option(help="Of torch; part of what a run records.")] = 1,
) -> None:
    """Run a grid of conditions x seeds in which nothing else differs, and compare them.

    Every finished run is a record beside the study (settings, digests, losses, scores along the way and
    in the end, CPU seconds). Runs that have one are not made again. The table has means, differences
    paired by seed and bootstrap intervals; runs that differ in anything that the study does not name
    are refused (exit code 1). Exit code 2: the study or the command line is wrong.
    """
    import torch

    from ..ablation.records import read_records
    from ..ablation.report import write_report
    from ..ablation.runner import repeat as make_again
    from ..ablation.runner import run_study
    from ..ablation.study import StudyError, load_study
    from ..ablation.task import find_task

    try:
        read = load_study(study)
        chosen = _chosen(read.runs(), conditions, seeds)
        again = _one_run(repeat, read.runs())
        task = find_task(read)
    except (StudyError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    torch.set_num_threads(threads)
    try:
        if again is not None:
            differences = make_again(read, *again)
            if differences:
                typer.echo(f"{repeat} came out differently in {', '.join(differences)}", err=True)
                raise typer.Exit(1)
            typer.echo(f"{repeat}: the same, bit for bit")
            return
        if not table:
            progress = run_study(
                read, checkpoints=checkpoints, minutes=minutes, only=chosen, say=typer.echo
            )
            typer.echo(f"{progress.done} runs finished, {progress.left} left")
        records = read_records(read, task)
        for path in write_report(read, records, study.parent):
            typer.echo(f"wrote {path}")
    except (StudyError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


Runs = list[tuple[str, int]]


def _chosen(runs: Runs, conditions: str | None, seeds: str | None) -> Runs:
    for option, text, known in (
        ("--conditions", conditions, {condition for condition, _ in runs}),
        ("--seeds", seeds, {str(seed) for _, seed in runs}),
    ):
        unknown = set(text.split(",") if text else ()) - known
        if unknown:
            raise ValueError(
                f"{option} names {sorted(unknown)[0]!r}; allowed: {', '.join(sorted(known))}"
            )
    wanted = conditions.split(",") if conditions else None
    numbers = seeds.split(",") if seeds else None
    return [
        (condition, seed)
        for condition, seed in runs
        if (wanted is None or condition in wanted) and (numbers is None or str(seed) in numbers)
    ]


def _one_run(name: str | None, runs: Runs) -> tuple[str, int] | None:
    if name is None:
        return None
    by_name = {f"{condition}-{seed}": (condition, seed) for condition, seed in runs}
    if name not in by_name:
        raise ValueError(f"--repeat is {name!r}; allowed: {', '.join(by_name)}")
    return by_name[name]
