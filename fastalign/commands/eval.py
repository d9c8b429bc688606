"""``fastalign eval``: a benchmark from local files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer


def _print_list(wanted: bool) -> None:
    if not wanted:
        return
    from ..evals.registry import BENCHMARKS

    for benchmark in BENCHMARKS.values():
        task = f"; lmms-eval: {benchmark.lmms_eval}" if benchmark.lmms_eval else ""
        typer.echo(f"{benchmark.name}: {benchmark.title} ({benchmark.source}){task}")
        typer.echo(f"    data: {benchmark.files}")
        typer.echo(f"    methods: {', '.join(benchmark.methods)} (the first is the default)")
    raise typer.Exit


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the model.")],
    benchmark: Annotated[str, typer.Argument(help="Its name; --list shows all.")],
    data: Annotated[Path, typer.Option(help="The benchmark's file, or the folder of its files.")],
    out: Annotated[Path, typer.Option(help="The run's folder: replies, samples, scores.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images; nothing outside of it is read.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="options, generate or match, as the benchmark allows (see --list)."),
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(help='What follows each question instead of the usual; "" for nothing.'),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="bare, vicuna or a Jinja template; default: the processor's own."),
    ] = None,
    processor: Annotated[
        str | None, typer.Option(help="Folder of the processor, if it is not the model's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time; changes no result.")] = 8,
    limit: Annotated[int | None, typer.Option(help="Only that many samples.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="As torch names it: cpu, cuda, cuda:1, ...")] = "cpu",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder; nothing is redone.")
    ] = False,
    listing: Annotated[
        bool,
        typer.Option(
            "--list",
            help="Show the benchmarks and the files they take.",
            is_eager=True,
            callback=_print_list,
        ),
    ] = False,
) -> None:
    """Score a model on a published benchmark, from local files in their public formats.

    Each reply is on the disk before the next batch begins; --resume goes on after a crash and refuses
    another model, other data or another wording. scores.json holds the scores as fractions (MME:
    points), samples.jsonl what was made of each sample's replies. docs/evaluation.md: protocols.
    """
    from ..distill.data.conversation import TemplateError
    from ..distill.data.records import SampleError, SourceError
    from ..evals.loading import DTYPES, load
    from ..evals.protocols import Method, Wording
    from ..evals.registry import BENCHMARKS
    from ..evals.runner import RunError
    from ..evals.runner import evaluate as run

    if benchmark not in BENCHMARKS:
        _stop(2, f"benchmark is {benchmark!r}; allowed: {', '.join(BENCHMARKS)}")
    chosen = BENCHMARKS[benchmark]
    if method is not None and method not in chosen.methods:
        _stop(2, f"--method is {method!r}; allowed for {benchmark}: {', '.join(chosen.methods)}")
    if dtype not in DTYPES:
        _stop(2, f"--dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    wording = Wording(cast(Method, method or chosen.methods[0]), instruction)
    try:
        samples = chosen.read(data, images)
        typer.echo(f"{chosen.title}: {len(samples)} samples")
        answerer = load(model, processor=processor, template=template, dtype=dtype, device=device)
        result = run(
            chosen, samples, answerer, out, wording=wording, batch_size=batch_size, limit=limit,
            resume=resume, say=typer.echo,
        )  # fmt: skip
    except RunError as error:
        _stop(2, str(error))
    except (SampleError, SourceError, TemplateError, OSError, ValueError, RuntimeError) as error:
        _stop(1, f"{type(error).__name__}: {error}")
    for name, value in _flat(result["scores"]):
        typer.echo(f"{name:<40} {value:.4f}")
    if result["samples"] < result["of"]:
        typer.echo(f"on {result['samples']} of {result['of']} samples: not the benchmark's score")
    if result["unread"]:
        typer.echo(f"{result['unread']} replies named no answer; they count as wrong")
    typer.echo(f"wrote {out / 'scores.json'}")


def _stop(code: int, message: str) -> None:
    typer.echo(message, err=True)
    raise typer.Exit(code)


def _flat(scores: dict[str, Any], before: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in scores.items():
        if isinstance(value, dict):
            found += _flat(value, f"{before}{name}/")
        else:
            found.append((before + name, float(value)))
    return found
