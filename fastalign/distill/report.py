"""What a run leaves to read: a summary in numbers, loss curves, a model card."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from .recipe import Recipe, recipe_to_plain
from .stages import Stage

if TYPE_CHECKING:
    from .trainer import DistillTrainer


def stage_summary(stage: Stage, trainer: DistillTrainer) -> dict[str, Any]:
    """Plain values: steps, times, memory, losses at the end, samples passed over."""
    return {
        "stage": stage.name,
        "steps": trainer.state.global_step,
        **trainer.stopwatch.summary(),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "shared_vision_tower": trainer.objective.shares_vision,
        "last_losses": last_losses(trainer.state.log_history),
        "skipped": dict(trainer.skipped),
        "history": loss_history(trainer.state.log_history),
    }


def time_table(summary: Mapping[str, Any]) -> str:
    """A stage's times by part, tokens a second, peak memory and the alignment's share, as text."""
    steps = max(1, summary["timed_steps"])
    wall, cpu = summary["seconds_by_part"], summary["cpu_seconds_by_part"]
    lines = [f"{'part':<12}{'s a step':>10}{'CPU s a step':>14}{'share':>8}"]
    for name, seconds in wall.items():
        share = seconds / max(1e-9, summary["seconds"])
        lines.append(f"{name:<12}{seconds / steps:>10.4f}{cpu[name] / steps:>14.4f}{share:>8.1%}")
    lines.append(
        f"{summary['tokens_per_second']:,.0f} tokens/s; peak {summary['peak_bytes'] / 2**20:,.0f} MiB "
        f"({summary['peak_is']})"
    )
    if "alignment" in wall:
        lines.append(
            f"alignment makes the step {summary['alignment_share']:.1%} longer than it is without"
        )
    return "\n".join(f"    {line}" for line in lines)


def loss_history(log: Iterable[dict[str, float]]) -> list[dict[str, float]]:
    """The entries of the Trainer's log that hold losses."""
    return [
        {k: v for k, v in entry.items() if k == "step" or k.startswith("loss")}
        for entry in log
        if "loss" in entry
    ]


def last_losses(log: Iterable[dict[str, float]]) -> dict[str, float]:
    entries = loss_history(log)
    return {k: v for k, v in entries[-1].items() if k != "step"} if entries else {}


def write_curves(log: Iterable[dict[str, float]], path: Path) -> bool:
    """The losses over the steps as a picture; False: fewer than two entries, no picture."""
    from ..analysis.pictures import curves_figure, save_figure

    entries = loss_history(log)
    names = [name for name in (entries[0] if entries else {}) if name != "step"]
    curves = {name: [entry.get(name, float("nan")) for entry in entries] for name in names}
    if len(entries) < 2:
        return False
    save_figure(curves_figure(curves, x=[int(entry["step"]) for entry in entries]), path)
    return True


def pictures_of(summaries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The stages' pictures, paths in the run's folder (stages of older runs have none noted)."""
    return [name for summary in summaries for name in summary.get("pictures", [])]


def model_card(recipe: Recipe, summaries: list[dict[str, Any]]) -> str:
    """README.md of the final student."""
    import yaml

    lines = [
        "---",
        "tags: [fastalign, distillation]",
        "---",
        f"# {Path(recipe.models.student).name}, distilled from {Path(recipe.models.teacher).name}",
        "",
        f"Made by fastalign {__version__}. Stages:",
        "",
        "| stage | steps | losses at the end | samples passed over |",
        "|---|---|---|---|",
    ]
    for s in summaries:
        losses = ", ".join(f"{name} {value:.4g}" for name, value in s["last_losses"].items())
        lines.append(f"| {s['stage']} | {s['steps']} | {losses} | {sum(s['skipped'].values())} |")
    if recipe.models.taf is not None:
        lines += [
            "",
            "The student reads the image through the teacher's projector (model type `llava_taf`). Load it "
            "with `import fastalign.distill.taf` and then `AutoModelForImageTextToText.from_pretrained`.",
        ]
    pictures = [name.replace("/", "-") for name in pictures_of(summaries)]
    if pictures:
        lines += ["", *(f"![{name}]({name})" for name in pictures)]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    plain = yaml.safe_dump(recipe_to_plain(recipe), sort_keys=False)
    return "\n".join(
        [*lines, "", "Versions: " + ", ".join(versions), "", "```yaml", plain + "```", ""]
    )
