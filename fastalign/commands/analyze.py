"""``fastalign analyze``: where a teacher and its students look, on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def analyze(
    teacher: Annotated[str, typer.Option(help="Folder or hub name of the teacher.")],
    student: Annotated[
        list[str], typer.Option(help="NAME=FOLDER, once for each student to be compared.")
    ],
    data: Annotated[Path, typer.Option(help="LLaVA json or jsonl, or a folder.")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("out/analysis"),
    samples: Annotated[int, typer.Option(help="Only the first so many.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Samples at a time.")] = 16,
    layers: Annotated[
        str,
        typer.Option(help="Student layer to teacher layers: uniform, compodistill, all, last:3."),
    ] = "uniform",
    template: Annotated[
        str | None, typer.Option(help="Conversation template. Default: the processor's own.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Pictures of attention over an image.")] = 6,
    bins: Annotated[int, typer.Option(help="Of accuracy by similarity.")] = 5,
    grid: Annotated[
        bool, typer.Option(help="Compare every layer with every layer (the heat maps).")
    ] = True,
    mix: Annotated[
        str | None,
        typer.Option(
            help="Also answer with the teacher's attention mixed in, at these shares: 0,0.5,1. "
            "Materialises attention: small models only."
        ),
    ] = None,
    mix_kind: Annotated[
        str, typer.Option(help="map: the joint map; place: each head keeps its mass on the image.")
    ] = "map",
    mix_layers: Annotated[
        str | None,
        typer.Option(help="Only these student layers: 1,2. Default: all that are matched."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Compare students' attention to the image with their teacher's, and with their accuracy.

    Writes report.html (pictures inside), report.json and the pictures. Numbers come from the fused
    kernels, never from materialised attention (--mix excepted). A sample's accuracy is whether greedy
    decoding gives exactly its answers. Exit code 1: data or models that do not fit; 2: the command
    line.
    """
    from ..distill.data.conversation import TemplateError
    from ..distill.data.records import SampleError, SourceError

    try:
        students = _named(student)
        shares = _numbers("--mix", mix, float)
        only = _numbers("--mix-layers", mix_layers, int)
        if batch_size < 1 or samples < 1:
            raise ValueError("--batch-size and --samples: allowed: at least 1")
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    from ..analysis.mixing import Mix
    from ..analyze import Plan, analyse

    try:
        mixes = [
            Mix(share, layers=layers, kind=mix_kind, only=tuple(only) if only else None)
            for share in shares
        ]
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    plan = Plan(
        teacher=teacher,
        students=students,
        data=data,
        samples=samples,
        batch_size=batch_size,
        layers=layers,
        template=template,
        examples=examples,
        bins=bins,
        grid=grid,
        mixes=tuple(mixes),
        device=device,
    )
    try:
        for path in analyse(plan, out, say=typer.echo):
            typer.echo(f"wrote {path}")
    except (SampleError, SourceError, TemplateError, OSError, ValueError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from None


def _named(pairs: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder) or name in found or name == "teacher":
            raise ValueError(f"--student is {pair!r}; allowed: NAME=FOLDER, each name once")
        found[name] = folder
    return found


def _numbers(option: str, text: str | None, kind: Any) -> list[Any]:
    if not text:
        return []
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}; allowed: numbers separated by commas") from None
