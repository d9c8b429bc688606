"""Models, processor and data of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data import ConversationDataset, Encoder, read_records
from .data.stream import ConversationStream
from .recipe import Recipe, resolve
from .stages import Data, Lora, Stage


def place_of(recipe: Recipe, name: str) -> str:
    """A folder beside the recipe if there is one, a hub name otherwise."""
    local = resolve(recipe, name)
    return str(local) if local.exists() else name


def load_model(recipe: Recipe, name: str, dtype: str, bits: int | None = None) -> Any:
    """A standard image-text-to-text checkpoint, from safetensors only.

    Raises:
        ValueError: it lacks weights of the model, which would otherwise be random ones.
    """
    from transformers import AutoModelForImageTextToText

    from . import taf  # noqa: F401  (makes the Auto classes know its checkpoints)

    more: dict[str, Any] = {}
    if bits is not None:
        from transformers import BitsAndBytesConfig

        more["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=bits == 8, load_in_4bit=bits == 4
        )
    model, report = AutoModelForImageTextToText.from_pretrained(
        place_of(recipe, name),
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        trust_remote_code=recipe.models.trust_remote_code,
        output_loading_info=True,
        **more,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights of a {type(model).__name__}, the first is "
            f"{missing[0]!r}; allowed: a whole checkpoint"
        )
    return model


def load_config_model(recipe: Recipe, name: str) -> Any:
    """A checkpoint's model from its config.json alone: shapes, no weights (meta tensors)."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    from . import taf  # noqa: F401  (makes the Auto classes know its checkpoints)

    trust = recipe.models.trust_remote_code
    config = AutoConfig.from_pretrained(place_of(recipe, name), trust_remote_code=trust)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust)


def load_teacher(recipe: Recipe) -> Any:
    models = recipe.models
    return load_model(recipe, models.teacher, models.teacher_dtype, models.teacher_bits).eval()


def load_student(recipe: Recipe, teacher: Any) -> Any:
    """The student as the first stage gets it."""
    student = load_model(recipe, recipe.models.student, recipe.models.student_dtype)
    if recipe.models.taf is None or student.config.model_type == "llava_taf":
        return student
    from .taf import fetch_adapter

    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return fetch_adapter(student, teacher, adapter=recipe.models.taf)


def load_processor(recipe: Recipe) -> Any:
    from transformers import AutoProcessor

    name = recipe.models.processor or recipe.models.student
    return AutoProcessor.from_pretrained(
        place_of(recipe, name), trust_remote_code=recipe.models.trust_remote_code
    )


def load_data(
    recipe: Recipe, stage: Stage, processor: Any, recorded: Mapping[str, int] | None = None
) -> ConversationDataset:
    """A stage's data as a whole, streaming or not; ``recorded``: see ``Conversations``."""
    data = recipe.data_of(stage)
    path = resolve(recipe, data.path)
    source, raw = read_records(path)
    return ConversationDataset(
        raw,
        source,
        Encoder(processor, data.template, data.max_length),
        _image_root(recipe, data),
        on_error=data.on_error,
        max_pixels=data.max_pixels,
        limit=data.limit,
        recorded=recorded,
    )


def load_stream(
    recipe: Recipe, stage: Stage, processor: Any, recorded: Mapping[str, int] | None = None
) -> ConversationStream:
    """A stage's streaming data, of which nothing is read yet."""
    data = recipe.data_of(stage)
    return ConversationStream(
        resolve(recipe, data.path),
        Encoder(processor, data.template, data.max_length),
        _image_root(recipe, data),
        buffer=data.shuffle_buffer,
        on_error=data.on_error,
        max_pixels=data.max_pixels,
        limit=data.limit,
        recorded=recorded,
    )


def _image_root(recipe: Recipe, data: Data) -> Path:
    if data.image_root is not None:
        return resolve(recipe, data.image_root)
    path = resolve(recipe, data.path)
    return path if path.is_dir() else path.parent


def part_of(name: str) -> str:
    """The part that a parameter belongs to: vision, projector, fetched (never trained), language_model."""
    if ".fetched." in name:
        return "fetched"
    for word in ("projector", "merger", "connector", "adapter"):
        if word in name:
            return "projector"
    if "vision" in name or "visual" in name:
        return "vision"
    return "language_model"


def in_attention(name: str) -> bool:
    """Whether a parameter or module lies in an attention block of the language model."""
    return part_of(name) == "language_model" and ".self_attn." in name


def choose_trained(model: nn.Module, stage: Stage) -> Any:
    """Freeze and unfreeze; with LoRA, the PEFT model around it."""
    wanted = (
        {"projector", "language_model", "vision"} if "all" in stage.trains else set(stage.trains)
    )
    for name, parameter in model.named_parameters():
        frozen = stage.freeze_attention and in_attention(name)
        parameter.requires_grad_(part_of(name) in wanted and not frozen)
    if stage.lora is not None:
        return _with_lora(
            model, stage.lora, projector="projector" in wanted, attention=not stage.freeze_attention
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"stage {stage.name}: trains {list(stage.trains)} has no parameters")
    return model


def _with_lora(model: Any, lora: Lora, *, projector: bool, attention: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    head = model.get_output_embeddings()
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and part_of(name + ".") == "language_model"
        and module is not head
        and (attention or not in_attention(name + "."))
    ]
    kept = _projector_modules(model) if projector else []
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            modules_to_save=kept or None,
        ),
    )


def _projector_modules(model: nn.Module) -> list[str]:
    """The projector's outermost trainable modules: PEFT copies, trains and saves these in full."""
    found: list[str] = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if any(name.startswith(f + ".") for f in found):
            continue
        named = any(w in last for w in ("projector", "merger", "connector", "adapter"))
        frozen = any(".fetched." in f".{n}" for n, _ in module.named_parameters())
        if named and not frozen:
            found.append(name)
    return found
