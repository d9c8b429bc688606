"""Train the teacher of the shapes world on a CPU, evaluate it on the test split and save it.

    python -m examples.shapes.train_teacher --out examples/shapes/teacher

Three stages, each from a fixed seed:

1. tower      the SigLIP tower learns what is in every patch's cell (colour, shape, row, column);
2. projector  its features are mapped onto the sum of the word embeddings that describe the cell,
              the part that caption pre-training plays for a large model: it shortens the plateau
              before the decoder starts to look at the image;
3. decoder    Llama and projector learn to answer packed questions, the tower frozen.

The tower is run once for all scenes. Stage 3 saves a checkpoint (atomically) every few hundred
steps and ``--resume`` continues from it; every step draws its batch from its own seed, so that a
resumed run sees the same data.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from examples.shapes.card import write_card
from examples.shapes.muon import Muon
from fastalign.evals.shapes.dataset import (
    IGNORE,
    VISUAL_TOKENS,
    batches,
    draw_questions,
    encode,
    evaluation_set,
    pack,
    patch_labels,
    pixel_values,
)
from fastalign.evals.shapes.models import build_teacher
from fastalign.evals.shapes.questions import NOTHING
from fastalign.evals.shapes.scoring import Report, evaluate
from fastalign.evals.shapes.tokenizer import build_processor
from fastalign.evals.shapes.world import COLOURS, COLUMNS, ROWS, SHAPES, Scene, make_scenes

console = Console()

TYPE_WEIGHTS = {
    "recognise": 0.5,
    "binding": 1.0,
    "relation": 2.5,  # one bit per question and three steps of reasoning: it needs the most
    "neighbour": 1.2,
    "count": 1.0,
    "where": 1.4,
    "at": 1.0,
}
CONVERSATION = 160
"""Tokens per training sequence: 37 of image and start, the rest questions."""


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    scenes: int = 60_000
    tower_steps: int = 2_500
    projector_steps: int = 400
    steps: int = 4_000
    easy_steps: int = 300
    batch_size: int = 32
    questions: int = 12
    lr: float = 3e-3
    layers: int = 4
    validate_every: int = 250
    test_per_type: int = 1_000


# --- stage 1: the tower ---------------------------------------------------------------------------


def tower_features(tower: nn.Module, pixels: Tensor) -> Tensor:
    """[N, 36, 64]: the hidden states that LLaVA's projector will get."""
    features: Tensor = tower(pixels, output_hidden_states=True).hidden_states[-1]
    return features


def train_tower(tower: nn.Module, settings: Settings) -> None:
    scenes = make_scenes("train", min(16_000, settings.scenes), seed=settings.seed, things=(2, 7))
    pixels, labels = pixel_values(scenes), patch_labels(scenes)
    patch = torch.arange(VISUAL_TOKENS)
    side = round(VISUAL_TOKENS**0.5)
    row, column = patch // side // 2, patch % side // 2
    sizes = [len(COLOURS) + 1, len(SHAPES) + 1, len(ROWS), len(COLUMNS)]
    head = nn.Linear(64, sum(sizes))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=settings.tower_steps, pct_start=0.05
    )
    generator = torch.Generator().manual_seed(settings.seed)
    with progress_bar() as progress:
        task = progress.add_task("tower", total=settings.tower_steps)
        for _ in range(settings.tower_steps):
            rows = torch.randint(len(scenes), (64,), generator=generator)
            parts = head(tower_features(tower, pixels[rows])).split(sizes, dim=-1)
            targets = [
                labels[rows, :, 0],
                labels[rows, :, 1],
                row.expand(64, -1),
                column.expand(64, -1),
            ]
            losses = [
                F.cross_entropy(part.flatten(0, 1), target.flatten())
                for part, target in zip(parts, targets, strict=True)
            ]
            loss = losses[0] + losses[1] + 0.3 * (losses[2] + losses[3])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, description=f"tower      loss {loss.item():.4f}")


@torch.no_grad()
def cached_features(tower: nn.Module, scenes: list[Scene]) -> Tensor:
    """float16 [N, 36, 64]"""
    return torch.cat(
        [tower_features(tower, pixel_values(scenes[s])).half() for s in batches(len(scenes), 256)]
    )


# --- stage 2: the projector -----------------------------------------------------------------------


def align_projector(
    model: LlavaForConditionalGeneration, features: Tensor, labels: Tensor, settings: Settings
) -> None:
    """Regress the projected patches onto E[colour] + E[shape] + E[row] + E[column].

    ``features`` float16 [N, 36, 64], ``labels`` int64 [N, 36, 2]. An empty cell is E["nothing"].
    """
    embedding = model.model.language_model.embed_tokens.weight
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        # Words start at a size that RMSNorm's epsilon cannot touch; reading a word out starts as
        # its embedding, so that what attention copies is already close to an answer.
        embedding.normal_(std=0.5, generator=torch.Generator().manual_seed(settings.seed))
        model.lm_head.weight.copy_(embedding * 0.12)
        projector.linear_1.weight.div_(features[:1000].float().std())

        def words(names: tuple[str, ...]) -> Tensor:
            rows: Tensor = embedding[[encode(name)[0] for name in names]]
            return rows.clone()

        colour = words((NOTHING, *COLOURS))
        shape = torch.cat([torch.zeros(1, embedding.shape[1]), words(SHAPES)])
        patch = torch.arange(VISUAL_TOKENS)
        side = round(VISUAL_TOKENS**0.5)
        place = words(ROWS)[patch // side // 2] + words(COLUMNS)[patch % side // 2]

    optimizer = torch.optim.Adam(projector.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(settings.seed)
    with progress_bar() as progress:
        task = progress.add_task("projector", total=settings.projector_steps)
        for step in range(settings.projector_steps):
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / settings.projector_steps)
            rows = torch.randint(len(features), (64,), generator=generator)
            target = colour[labels[rows, :, 0]] + shape[labels[rows, :, 1]] + place
            loss = F.mse_loss(projector(features[rows].float()), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.update(task, advance=1, description=f"projector  loss {loss.item():.4f}")


# --- stage 3: the decoder -------------------------------------------------------------------------


def answer_loss(
    model: LlavaForConditionalGeneration, features: Tensor, batch: dict[str, Tensor]
) -> Tensor:
    """Mean cross-entropy of the answers' tokens; the head is applied where a label is."""
    language, ids, labels = model.model.language_model, batch["input_ids"], batch["labels"][:, 1:]
    words = language.embed_tokens(ids)
    visual = model.model.multi_modal_projector(features.float())
    embeds = torch.cat([words[:, :1], visual, words[:, 1 + VISUAL_TOKENS :]], dim=1)
    hidden = language(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
    asked = labels != IGNORE
    return F.cross_entropy(model.lm_head(hidden[asked]), labels[asked])


def optimizers(model: LlavaForConditionalGeneration, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, Adam at half its rate for embeddings, head, norms, biases."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [
        p
        for n, p in trained
        if p.ndim == 2 and not any(w in n for w in ("embed_tokens", "lm_head", "linear_1"))
    ]
    inside = {id(p) for p in matrices}
    others = [p for _, p in trained if id(p) not in inside]
    return [Muon(matrices, lr=lr), torch.optim.Adam(others, lr=lr / 2, betas=(0.9, 0.95))]


def rate(step: int, steps: int) -> float:
    """Warm up for 50 steps, hold, and decay linearly over the last 40 %."""
    hold = 0.6 * steps
    decay = 1.0 if step < hold else max(0.02, (steps - step) / (steps - hold))
    return min(1.0, (step + 1) / 50) * decay


def train_decoder(
    model: LlavaForConditionalGeneration,
    pools: dict[str, tuple[list[Scene], Tensor]],
    settings: Settings,
    checkpoint: Path,
    log: Path,
    resume: bool,
) -> None:
    validation = evaluation_set("validation", 200, seed=settings.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    makers = optimizers(model, settings.lr)
    rates = [maker.param_groups[0]["lr"] for maker in makers]
    start = 0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for maker, saved in zip(makers, state["optimizers"], strict=True):
            maker.load_state_dict(saved)
        start = state["step"]
    model.train()
    with progress_bar() as progress:
        task = progress.add_task("decoder", total=settings.steps, completed=start)
        smooth = None
        for step in range(start, settings.steps):
            for maker, full in zip(makers, rates, strict=True):
                maker.param_groups[0]["lr"] = full * rate(step, settings.steps)
            loss = answer_loss(model, *draw_batch(pools, step, settings))
            for maker in makers:
                maker.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            for maker in makers:
                maker.step()
            smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
            progress.update(task, advance=1, description=f"decoder    loss {smooth:.4f}")
            done = step + 1
            if done % settings.validate_every == 0 or done == settings.steps:
                report = evaluate(model, validation, twins=False)
                note(log, {"step": done, "loss": smooth, **report.as_dict()})
                progress.console.print(f"step {done}: loss {smooth:.4f}  {summary(report)}")
                state = {
                    "model": model.state_dict(),
                    "optimizers": [maker.state_dict() for maker in makers],
                    "step": done,
                }
                save_atomically(state, checkpoint)


def draw_batch(
    pools: dict[str, tuple[list[Scene], Tensor]], step: int, settings: Settings
) -> tuple[Tensor, dict[str, Tensor]]:
    """Features and packed conversations of one step: a function of the seed and the step."""
    rng = random.Random(f"batch/{settings.seed}/{step}")
    easy = step < settings.easy_steps and step % 4 != 0
    scenes, features = pools["easy" if easy else "full"]
    rows = [rng.randrange(len(scenes)) for _ in range(settings.batch_size)]
    conversations = [
        draw_questions(scenes[row], rng, settings.questions, TYPE_WEIGHTS) for row in rows
    ]
    return features[rows], pack(conversations, CONVERSATION)


# --- keeping what was made ------------------------------------------------------------------------


def save_atomically(state: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def note(log: Path, line: dict[str, Any]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")


def summary(report: Report) -> str:
    relation = {k: v for k, v in report.details.items() if k.startswith("relation/")}
    scores = {**report.types, **relation}
    return "  ".join(f"{name} {score.accuracy:.3f}" for name, score in scores.items())


def save(model: LlavaForConditionalGeneration, folder: Path, facts: dict[str, Any]) -> None:
    """A folder that ``from_pretrained`` loads, written beside and moved into place file by file."""
    part = folder.with_name(folder.name + ".part")
    model.generation_config.max_new_tokens = 8
    model.save_pretrained(part)
    build_processor().save_pretrained(part)
    (part / "scores.json").write_text(json.dumps(facts, indent=2) + "\n")
    write_card(part)
    folder.mkdir(parents=True, exist_ok=True)
    for file in part.iterdir():
        os.replace(file, folder / file.name)
    part.rmdir()


def command(settings: Settings) -> str:
    """What made this teacher: the settings that are not the defaults are named."""
    line = "python -m examples.shapes.train_teacher --out examples/shapes/teacher"
    usual = asdict(Settings())
    for name, value in asdict(settings).items():
        if value != usual[name]:
            line += f" --{name.replace('_', '-')} {value}"
    return line


def progress_bar() -> Progress:
    return Progress(*Progress.get_default_columns()[:-1], TimeRemainingColumn(), console=console)


def main() -> None:
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the teacher")
    parser.add_argument("--work", type=Path, default=Path("out/teacher"), help="checkpoint, log")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    for name, value in asdict(default).items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(value), default=value, help=f"default {value}")
    arguments = parser.parse_args()
    settings = Settings(**{name: getattr(arguments, name) for name in asdict(default)})
    torch.set_num_threads(arguments.threads)
    began = time.monotonic()

    model = build_teacher(settings.seed, layers=settings.layers)
    tower = model.model.vision_tower
    tower_file = arguments.work / "tower.pt"
    if arguments.resume and tower_file.exists():
        tower.load_state_dict(torch.load(tower_file, weights_only=True))
    else:
        train_tower(tower, settings)
        save_atomically(tower.state_dict(), tower_file)
    tower.requires_grad_(False)

    console.print("rendering the training scenes")
    pools = {}
    for name, count, things in (
        ("easy", settings.scenes // 4, (2, 3)),
        ("full", settings.scenes, (3, 6)),
    ):
        scenes = make_scenes("train", count, seed=settings.seed, things=things)
        pools[name] = scenes, cached_features(tower, scenes)
    scenes, features = pools["full"]
    align_projector(model, features, patch_labels(scenes), settings)
    train_decoder(
        model,
        pools,
        settings,
        arguments.work / "checkpoint.pt",
        arguments.work / "log.jsonl",
        arguments.resume,
    )

    minutes = (time.monotonic() - began) / 60
    test = evaluation_set("test", settings.test_per_type, seed=settings.seed)
    report = evaluate(model, test)
    facts = {
        "command": command(settings),
        "settings": asdict(settings),
        "minutes": round(minutes, 1),
        "test_scenes": len(test.scenes),
        "test": report.as_dict(),
    }
    save(model, arguments.out, facts)
    console.print(f"{minutes:.1f} minutes; test: {summary(report)}")
    console.print(f"composition {report.composition:.3f}; saved to {arguments.out}")


if __name__ == "__main__":
    main()
