"""``fastalign cache``: sizes, space, and every stage's recording in turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..models import TeacherCache
from ..models.cache import MANIFEST
from .data import Collator
from .loading import load_data, load_processor, load_teacher
from .recipe import Recipe
from .targets import Progress, cache_folder, cached_stages, estimate, open_cache, record_targets

Say = Callable[[str], None]
Bar = Callable[[str], AbstractContextManager[Progress]]


def record_recipe(recipe: Recipe, *, plan: bool, say: Say, bar: Bar) -> None:
    """Record what every stage that needs the teacher will read; what is there already is checked.

    Args:
        plan: only say how much it will be.
        bar: makes a progress bar of a name.

    Raises:
        RecipeError: a finished recording of something else.
        ValueError: too little space, damaged files, the beginning of another recording.
        SourceError, SampleError: data that cannot be used.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    processor = load_processor(recipe)
    teacher: Any = None
    for stage in cached_stages(recipe):
        folder = cache_folder(recipe, stage)
        if (folder / MANIFEST).is_file():
            there = open_cache(recipe, stage, processor)
            TeacherCache(folder)  # reads every byte
            say(f"{stage.name}: {len(there):,} samples are there, their checksums hold")
            continue
        data = load_data(recipe, stage, processor)
        size = estimate(recipe, stage, data, Collator(processor.tokenizer.pad_token_id))
        say(f"{stage.name}: {size}")
        begun = sum(file.stat().st_size for file in folder.glob("shard-*.safetensors"))
        if size.total - begun > size.free:
            raise ValueError(
                f"{folder} has too little space for {size}; allowed: models.cache with fewer entries, a "
                "smaller top_k or dtype bfloat16, or losses.alignment_rows 'response'"
            )
        if plan:
            continue
        if teacher is None:
            teacher = _placed(recipe, load_teacher(recipe))
        with bar(stage.name) as progress:
            cache, passed_over = record_targets(recipe, stage, processor, teacher, data, progress)
        text = f"; {passed_over} bad samples passed over" if passed_over else ""
        say(f"{stage.name}: recorded {len(cache):,} samples in {folder}{text}")


def _placed(recipe: Recipe, teacher: Any) -> Any:
    placed = getattr(teacher, "hf_device_map", None) or getattr(
        teacher, "quantization_method", None
    )
    device = "cuda" if torch.cuda.is_available() and not recipe.cpu else "cpu"
    return teacher.requires_grad_(False) if placed else teacher.requires_grad_(False).to(device)
