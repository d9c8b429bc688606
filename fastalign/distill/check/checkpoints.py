"""Are the checkpoints there, whole, in safetensors, and do their tokens mean the same?

Read are configurations, tokenizers and the headers of weight files, never weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..loading import load_processor, place_of
from ..memory.models import loads_teacher, read_config
from ..plain import RecipeError
from ..recipe import Recipe
from .outcome import Part, size_text


@dataclass(frozen=True)
class Weights:
    """The weight files of a checkpoint: their names, numbers of weights and bytes."""

    files: tuple[str, ...]
    weights: int
    size: int


@contextmanager
def offline() -> Iterator[None]:
    """Inside, nothing is asked of a hub (what is not here is not found), and loading draws no bars."""
    from huggingface_hub import constants
    from transformers.utils import logging

    before, bars = constants.HF_HUB_OFFLINE, logging.is_progress_bar_enabled()
    constants.HF_HUB_OFFLINE = True
    logging.disable_progress_bar()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        if bars:
            logging.enable_progress_bar()


def check_checkpoints(recipe: Recipe) -> Part:
    """Configuration and weight files of the models that the recipe loads."""
    part = Part("checkpoints")
    for role in ("teacher", "student") if loads_teacher(recipe) else ("student",):
        name, entry = getattr(recipe.models, role), f"models.{role}"
        try:
            config = read_config(recipe, name, entry)
        except RecipeError as error:
            part.problems += error.problems
            continue
        try:
            found = find_weights(place_of(recipe, name), entry)
        except RecipeError as error:
            part.problems += error.problems
            continue
        part.facts[role] = {
            "model_type": config.model_type,
            "files": list(found.files),
            "weights": found.weights,
            "bytes": found.size,
        }
    part.summary = "; ".join(
        f"{role}: {facts['model_type']}, {facts['weights']:,} weights, {size_text(facts['bytes'])}"
        for role, facts in part.facts.items()
    )
    return part


def find_weights(place: str, entry: str) -> Weights:
    """The safetensors files of a folder or of a hub name that is in the cache.

    Raises:
        RecipeError: there are none, one is missing, or is cut off (its header says how long it is).
    """
    single, index = (_find(place, f"model.safetensors{end}") for end in ("", ".index.json"))
    if single is not None:
        files = [single]
    elif index is not None:
        try:
            names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"{entry}: {index} cannot be read: {error}") from None
        paths = {name: _find(place, name) for name in names}
        missing = [name for name, path in paths.items() if path is None]
        if missing:
            raise RecipeError(
                f"{entry}: {place} lacks {missing[0]} and {len(missing) - 1} more of the {len(names)} "
                "files that its index names; allowed: a whole checkpoint"
            )
        files = [path for path in paths.values() if path is not None]
    else:
        other = _find(place, "pytorch_model.bin") or _find(place, "pytorch_model.bin.index.json")
        has = " (it has pytorch_model.bin, a pickle)" if other else ""
        raise RecipeError(
            f"{entry}: {place} holds no model.safetensors{has}; allowed: a checkpoint in safetensors, on "
            "this machine (the check downloads nothing)"
        )
    counts = [_count(path, entry) for path in files]
    return Weights(
        tuple(Path(path).name for path in files),
        sum(counts),
        sum(os.path.getsize(path) for path in files),
    )


def _find(place: str, name: str) -> str | None:
    from transformers.utils import cached_file

    try:
        found: str | None = cached_file(
            place, name, local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
    except OSError:
        return None
    return found


def _count(path: str, entry: str) -> int:
    """Weights of a file, from its header."""
    from math import prod

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            return sum(prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"{entry}: {path} is no whole safetensors file: {error}") from None


# ------------------------------------------------------------------------------ tokenizers


def read_processor(recipe: Recipe, part: Part) -> Any:
    """The processor, or None and a problem."""
    entry = "models.processor" if recipe.models.processor else "models.student"
    try:
        processor = load_processor(recipe)
    except (OSError, ValueError, ImportError, KeyError) as error:
        part.problems.append(f"{entry}: its processor cannot be loaded: {error}")
        return None
    if not hasattr(processor, "tokenizer"):
        part.problems.append(
            f"{entry}: its processor is a {type(processor).__name__} without a tokenizer; allowed: one of "
            "a vision-language model"
        )
        return None
    if processor.tokenizer.pad_token_id is None:
        part.problems.append(
            f"{entry}: its tokenizer has no pad token; allowed: one with a pad token"
        )
    return processor


def compare_tokenizers(recipe: Recipe, processor: Any, sizes: dict[str, int], part: Part) -> None:
    """The student's token ids go to both models, so below both sizes they must mean the same.

    Args:
        sizes: rows of each model's embedding.
    """
    from transformers import AutoTokenizer

    shared = min(sizes.values())
    kind = "shared" if len(set(sizes.values())) == 1 else "prefix-shared"
    part.facts["vocabulary"] = {**sizes, "compared": shared}
    try:
        teacher = AutoTokenizer.from_pretrained(
            place_of(recipe, recipe.models.teacher),
            trust_remote_code=recipe.models.trust_remote_code,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        part.notes.append(
            f"models.teacher: it has no tokenizer that could be compared with the student's ({error})"
        )
        part.summary = "the teacher's tokenizer is not there: tokens not compared"
        return
    ours, theirs = (
        {i: token for token, i in t.get_vocab().items() if i < shared}
        for t in (processor.tokenizer, teacher)
    )
    differing = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    if differing:
        first = differing[0]
        part.problems.append(
            f"models: {len(differing)} of the {shared:,} tokens that both models have differ, the first is "
            f"{first}: {ours.get(first)!r} for the student, {theirs.get(first)!r} for the teacher; "
            "allowed: one tokenizer, of which one may know further tokens at its end"
        )
        return
    part.summary = (
        f"{kind}: {sizes['student']:,} and {sizes['teacher']:,} tokens, {shared:,} compared"
    )
