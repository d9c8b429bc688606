"""``fastalign prune``: a student cut out of a teacher."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer


def prune(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the model to cut.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    data: Annotated[
        Path, typer.Option(help="Calibration conversations: LLaVA json or jsonl, or a folder.")
    ],
    layers: Annotated[int | None, typer.Option(help="Decoder layers to keep.")] = None,
    hidden: Annotated[
        int | None, typer.Option(help="Width of the residual stream to keep.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads of each layer to keep.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key and value heads to keep.")] = None,
    mlp: Annotated[int | None, typer.Option(help="MLP channels of each layer to keep.")] = None,
    score: Annotated[
        str,
        typer.Option(
            help="Of heads and channels. activation: how strong they are (Minitron); contribution: times "
            "the norm of the weights that read them."
        ),
    ] = "activation",
    samples: Annotated[
        int, typer.Option(min=1, help="Calibration samples, drawn by --seed.")
    ] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 4,
    image_root: Annotated[
        Path | None, typer.Option(help="Where images lie. Default: the folder that --data lies in.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Chat template: bare, vicuna, Jinja. Default: the processor's."),
    ] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a sample.")] = 1536,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ...; auto: an accelerator if any.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run code that the processor's checkpoint brings along.")
    ] = False,
) -> None:
    """Cut a student out of a vision-language model: fewer layers, heads, channels, a narrower stream.

    One forward pass over calibration data scores every part; the lowest go. OUT is a standard checkpoint
    that transformers loads by itself, with prune.json: what was kept and every score. LLaVA, LLaVA-NeXT,
    LLaVA-OneVision (Llama, Mistral, Qwen2, Qwen3 inside), Qwen2-VL and Qwen2.5-VL; the projector follows a
    narrower stream. Cut models need training: `fastalign distill` with losses {lm: 1, hidden: 1} and the
    uncut model as teacher.

    Example, half of a Qwen2.5-VL-3B's layers and 3/4 of its channels:
    fastalign prune Qwen/Qwen2.5-VL-3B-Instruct student --data chat.json --layers 18 --mlp 8256
    """
    import torch

    from ..distill.checkpoints import whole_folder
    from ..distill.data.conversation import TemplateError
    from ..distill.data.records import SampleError, SourceError
    from ..distill.prune import PruneError, Sizes, Structure, choose, cut, measure

    if out.exists():
        _stop(2, f"{out} exists; allowed: a folder that does not")
    allowed = ("float32", "bfloat16", "float16")
    if dtype not in allowed:
        _stop(2, f"--dtype is {dtype!r}; allowed: {', '.join(allowed)}")
    sizes = Sizes(layers, hidden, heads, kv_heads, mlp)
    place = _device(device)
    try:
        loaded, processor = _load(model, getattr(torch, dtype), trust_remote_code)
        structure = Structure(loaded)
        sizes.resolved(structure)  # before the calibration, not after it
        batches, total = _batches(
            processor, data, image_root, template, max_length, samples, batch, seed
        )
        loaded.to(place)
        with _progress(total) as advance:
            importance = measure(loaded, batches, advance)
        kept = choose(loaded, sizes, importance, score)  # type: ignore[arg-type]
        made = cut(loaded, kept, importance)
        report = {
            "model": model,
            "sizes": {"before": structure.sizes(), "after": Structure(made).sizes()},
            "parameters": {"before": _count(loaded), "after": _count(made)},
            "score": score,
            "calibration": {"samples": importance.samples, "tokens": importance.tokens},
            "kept": asdict(kept),
            "scores": _scores(importance),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(out) as folder:
            made.save_pretrained(folder)
            processor.save_pretrained(folder)
            (folder / "prune.json").write_text(json.dumps(report) + "\n")
    except PruneError as error:
        _stop(2, str(error))
    except (SampleError, SourceError, TemplateError, OSError, ValueError, RuntimeError) as error:
        _stop(1, f"{type(error).__name__}: {error}")
    _print(report, importance, kept)
    typer.echo(f"the student is in {out}")


def _stop(code: int, message: str) -> None:
    typer.echo(message, err=True)
    raise typer.Exit(code)


def _device(name: str) -> Any:
    import torch

    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            _stop(2, f"--device is {name!r}: {error}")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _load(name: str, dtype: Any, trust_remote_code: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, use_safetensors=True)
    return model, AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)


def _batches(
    processor: Any,
    data: Path,
    image_root: Path | None,
    template: str | None,
    max_length: int,
    samples: int,
    batch: int,
    seed: int,
) -> tuple[Any, int]:
    """(batches, number of samples) of a random choice of the data."""
    import torch
    from torch.utils.data import DataLoader, Subset

    from ..distill.data import Collator, ConversationDataset, Encoder, read_records

    source, raw = read_records(data)
    root = image_root or (data if data.is_dir() else data.parent)
    dataset = ConversationDataset(raw, source, Encoder(processor, template, max_length), root)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(dataset), generator=generator)[:samples].tolist()
    subset: Any = Subset(dataset, chosen)  # type: ignore[arg-type]
    pad = processor.tokenizer.pad_token_id
    loader = DataLoader(subset, batch, collate_fn=Collator(0 if pad is None else pad))
    return loader, len(chosen)


def _progress(total: int) -> Any:
    """A context that gives a function to advance by a number of samples."""
    from contextlib import contextmanager

    from ._bars import progress_bars

    @contextmanager
    def shown() -> Any:
        with progress_bars(transient=False) as progress:
            task = progress.add_task("calibration", total=total)
            yield lambda count: progress.advance(task, count)

    return shown()


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _scores(importance: Any) -> dict[str, Any]:
    names = ("heads", "mlp", "hidden", "projector", "influence")
    found = ((name, getattr(importance, name)) for name in names)
    return {name: None if value is None else value.tolist() for name, value in found}


def _print(report: dict[str, Any], importance: Any, kept: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['model']}, {importance.samples} samples", title_justify="left")
    for title in ("part", "before", "after", "score that stays"):
        table.add_column(title, justify="left" if title == "part" else "right")
    before, after = report["sizes"]["before"], report["sizes"]["after"]
    layers = kept.layers
    shares = {
        "layers": importance.influence[layers].sum() / importance.influence.sum(),
        "hidden": importance.hidden[kept.hidden].sum() / importance.hidden.sum(),
        "heads": _share(importance.heads[layers], kept.heads),
        "mlp": _share(importance.mlp[layers], kept.mlp),
    }
    for name, had in before.items():
        share = f"{float(shares[name]):.1%}" if name in shares else ""
        table.add_row(name, f"{had:,}", f"{after[name]:,}", share)
    numbers = report["parameters"]
    ratio = f"{numbers['after'] / numbers['before']:.1%}"
    table.add_row(
        "parameters", f"{numbers['before']:,}", f"{numbers['after']:,}", ratio, style="bold"
    )
    dropped = [i for i in range(before["layers"]) if i not in layers]
    if dropped:
        table.caption = f"dropped layers: {', '.join(map(str, dropped))}"
    Console().print(table)


def _share(scores: Any, kept: list[list[int]]) -> Any:
    stays = sum(row[index].sum() for row, index in zip(scores, kept, strict=True))
    return stays / scores.sum()
