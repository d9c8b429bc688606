"""``fastalign check``: a recipe's problems, before hours are spent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ._bars import progress_bars


def check(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; `fastalign init` writes one.")],
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Look at the first so many samples of each source. Default: all."),
    ] = None,
    device_memory: Annotated[
        str | None,
        typer.Option(
            metavar="GIB",
            help="The run will be on another device, with this memory: 80, 80GiB, 24GB. Default: this "
            "machine's.",
        ),
    ] = None,
    visual_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Plan the memory for samples of max_length tokens, so many of them of images. Default: "
            "for the longest samples that were found.",
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print every line of the memory plans with its formula.")
    ] = False,
    dry_step: Annotated[
        bool,
        typer.Option(
            "--dry-step/--no-dry-step",
            help="Take a step of each stage on two samples; loads both models.",
        ),
    ] = True,
    report: Annotated[
        Path | None,
        typer.Option(help="Write everything that was found, with every bad sample, to this json."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the same as json instead of tables.")
    ] = False,
) -> None:
    """Look for everything that can go wrong with a recipe, before `fastalign distill` spends hours.

    The recipe's entries; checkpoints (there, whole, safetensors) and tokenizers; what each stage trains and
    the layers that it matches; every sample (images, conversations, lengths, image tokens of both models),
    loaded as training loads it; room on the disk; a memory plan for the longest sample; a step of every
    stage on two samples, in which nothing is learned. Nothing is downloaded, and nothing is written but
    --report.

    Exit code 0: no problem; 1: problems, each printed with its place; 2: the command line is wrong, or
    RECIPE is no YAML file.

    Example, a run that is meant for an 80 GiB device: fastalign check recipe.yaml --device-memory 80
    """
    import yaml

    size = _size(device_memory)
    try:
        yaml.safe_load(recipe.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        typer.echo(f"{recipe} cannot be read as YAML: {error}", err=True)
        raise typer.Exit(2) from None
    if report is not None and not report.absolute().parent.is_dir():
        typer.echo(f"--report is {report}; allowed: a file in a folder that is there", err=True)
        raise typer.Exit(2)
    from rich.console import Console

    from ..distill.check import Options, check_recipe
    from ..distill.check.render import print_outcome

    with _progress() as progress:
        outcome = check_recipe(recipe, Options(samples, size, visual_tokens, dry_step, progress))
    text = json.dumps(outcome.plain(), indent=2)
    if report is not None:
        try:
            report.write_text(text + "\n")
        except OSError as error:
            typer.echo(f"--report is {report}: {error}", err=True)
            raise typer.Exit(2) from None
    if as_json:
        typer.echo(text)
    else:
        print_outcome(outcome, Console(), plans=plan)
    if not outcome.ok:
        raise typer.Exit(1)


def _size(text: str | None) -> int | None:
    """Bytes; a plain number is GiB."""
    if text is None:
        return None
    from ..distill.memory.render import parse_size

    try:
        return parse_size(f"{float(text)}GiB" if _is_number(text) else text)
    except ValueError as error:
        typer.echo(f"--device-memory is {error}", err=True)
        raise typer.Exit(2) from None


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """A bar on standard error for each source."""
    with progress_bars() as bars:

        def begin(name: str, total: int) -> Callable[[], None]:
            task: Any = bars.add_task(Path(name).name, total=total)
            return lambda: bars.advance(task)

        yield begin
