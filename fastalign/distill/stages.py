"""Stages as data: what trains, on what, with which losses and which optimiser."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .data.dataset import OnError
from .data.images import MAX_PIXELS
from .plain import RecipeError, from_plain
from .terms import Losses

Part = Literal["projector", "language_model", "vision", "all"]


@dataclass(frozen=True)
class Data:
    """Where the conversations are.

    Attributes:
        path: a .json or .jsonl file or a folder (``read_records``).
        image_root: None: the folder that ``path`` lies in.
        template: see ``Encoder``.
        on_error: "skip" (the next good sample takes the place, counted and reported) or "raise".
        limit: only the first samples.
        streaming: read a .jsonl file line by line instead of as a whole; its stages need ``steps``, and
            ``group_batches: false``.
        shuffle_buffer: with streaming, how many samples are held to draw the next one from; 1: the file's
            order.
    """

    path: str
    image_root: str | None = None
    template: str | None = None
    max_length: int = 1536
    max_pixels: int = MAX_PIXELS
    on_error: OnError = "skip"
    group_batches: bool = True
    workers: int = 0
    limit: int | None = None
    streaming: bool = False
    shuffle_buffer: int = 10_000

    def __post_init__(self) -> None:
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer is {self.shuffle_buffer}; allowed: at least 1")
        if self.streaming and self.group_batches:
            raise ValueError(
                "streaming is true and group_batches is true (the default): samples alike in length are "
                "found in the whole of the data; allowed: group_batches: false"
            )
        if self.streaming and not self.path.endswith(".jsonl"):
            raise ValueError(f"streaming is true and path is {self.path!r}; allowed: a .jsonl file")


@dataclass(frozen=True)
class Lora:
    """Low-rank training of the language model's linear layers; merged when the stage ends."""

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; allowed: at least 1")


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        name: of its folder.
        trains: parts: ``projector`` (with TAF: the adapter), ``language_model``, ``vision``, ``all``.
        losses: see ``Losses``.
        data: None: the recipe's.
        freeze_attention: a control: the language model's attention blocks stay as they are.
        lora: None: ``language_model`` is trained in full.
        global_batch, micro_batch: samples an optimiser step, and at a time on each device.
        steps: optimiser steps; None: ``epochs`` decide.
        precision: "fp32" or "bf16" (autocast over float32 weights).
        save_every: optimiser steps between checkpoints.
        options: any other argument of ``transformers.TrainingArguments``.
    """

    name: str
    trains: tuple[Part, ...]
    losses: Losses = field(default_factory=Losses)
    data: Data | None = None
    lora: Lora | None = None
    freeze_attention: bool = False
    global_batch: int = 128
    micro_batch: int = 4
    epochs: float = 1.0
    steps: int | None = None
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    warmup: float = 0.03
    schedule: str = "cosine"
    optimizer: str = "adamw_torch"
    max_grad_norm: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    fused_head: bool = True
    share_vision: Literal["auto", "never"] = "auto"
    save_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.trains:
            raise ValueError("trains is empty; allowed: projector, language_model, vision, all")
        for name in ("global_batch", "micro_batch", "save_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: at least 1")
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch is {self.global_batch} and micro_batch {self.micro_batch}; allowed: a "
                "multiple of it"
            )
        if self.lora is not None and "language_model" not in self.trains:
            raise ValueError(
                "lora is given and trains lacks 'language_model'; allowed: both or none"
            )


#: The paper's three stages (its released scripts; DFT's LoRA r128 a256).
PRESETS: dict[str, Stage] = {
    "dpt": Stage(
        name="dpt",
        trains=("projector",),
        losses=Losses(lm=1, kd=1),
        global_batch=256,
        micro_batch=16,
    ),
    "dft": Stage(
        name="dft",
        trains=("language_model", "projector"),
        losses=Losses(lm=1, kd=1, alignment=1),
        lora=Lora(),
        global_batch=128,
        micro_batch=4,
    ),
    "sft": Stage(
        name="sft",
        trains=("language_model", "projector"),
        losses=Losses(lm=1),
        lora=Lora(),
        global_batch=192,
        micro_batch=4,
    ),
}


def stage_from_plain(values: Any, defaults: dict[str, Any], where: str) -> Stage:
    """A stage: a preset's name, or a mapping; ``preset`` in it gives what it does not say.

    ``defaults`` stand between the preset and the mapping. Entries of ``losses`` replace the preset's
    whole losses, so that a term is there because the recipe says so.

    Raises:
        RecipeError: what is wrong, with its place.
    """
    if isinstance(values, str):
        values = {"preset": values}
    if not isinstance(values, dict):
        raise RecipeError(f"{where} is {values!r}; allowed: a preset's name or a mapping")
    merged = {**defaults, **values}
    preset = merged.pop("preset", None)
    if preset is None:
        return from_plain(Stage, merged, where)
    if preset not in PRESETS:
        raise RecipeError(f"{where}.preset is {preset!r}; allowed: {', '.join(PRESETS)}")
    base = PRESETS[preset]
    # Read with the preset's own required entries, so that types and names are checked in one place.
    read = from_plain(Stage, {"name": base.name, "trains": list(base.trains), **merged}, where)
    try:
        return replace(base, **{name: getattr(read, name) for name in merged})
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None
